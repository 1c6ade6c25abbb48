"""The ledger, on figures added up by hand."""

from hf_objectives.labels.ledger import Ledger


def booked() -> Ledger:
    ledger = Ledger()
    account = ledger["a"]
    account.rows_in, account.rows_out, account.tokens_in, account.trained, account.masked = 3, 2, 100, 30, 20
    account.drop("too long", tokens=45, row=7)
    account.drop("cut", tokens=5)
    return ledger


def test_account_balances():
    account = booked()["a"]
    assert account.balance() == 100 - (30 + 20 + 45 + 5) == 0
    assert account.dropped_rows == {"too long": 1} and account.dropped_examples == {"too long": [7]}
    account.tokens_in += 1
    assert account.balance() == 1


def test_merge_and_total():
    ledger = booked()
    ledger.merge(booked())
    ledger["b"].tokens_in = ledger["b"].masked = 4
    total = ledger.total()
    assert (total.tokens_in, total.trained, total.masked) == (204, 60, 44)
    assert total.dropped_tokens == {"too long": 90, "cut": 10} and total.balance() == 0
    assert ledger["a"].dropped_examples == {"too long": [7, 7]}


def test_lines_and_json():
    ledger = booked()
    assert ledger.lines() == [
        "a: 3 rows, 100 tokens = 30 trained (60.0%) + 20 masked + 50 dropped; "
        "1 rows and 45 tokens dropped (too long; rows 7), 0 rows and 5 tokens dropped (cut; rows kept in part)"
    ]
    assert ledger.to_dict()["a"]["dropped_tokens"] == {"too long": 45, "cut": 5}
