"""Mixtures on two real processes: a rank has its rows, resumes at the exact next ones, or an error says what to change."""

from __future__ import annotations

import itertools

import pytest

from tests.support.hosts import TOKENIZER
from tests.support.two_hosts import BATCH, SAVED, STEPS, mixture, outcomes

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("two_hosts"))


def expected(rank, steps, packing=None):
    """The rows of a rank: of those that all take together its part, in order."""
    rows = [[int(i) for i in row["input_ids"]] for row in itertools.islice(mixture(packing), 2 * BATCH * steps)]
    return [rows[(2 * step + rank) * BATCH :][:BATCH] for step in range(steps)]


def check(found, rows):
    """The rows of each step, which batches pad with the pad token; it is EOS here."""
    assert len(found) == len(rows)
    for batch, step in zip(found, rows, strict=True):
        for ids, row in zip(batch, step, strict=True):
            assert ids[: len(row)] == row and set(ids[len(row) :]) <= {TOKENIZER.eos_token_id}


@pytest.mark.parametrize("host", ["ours", "transformers"])
@pytest.mark.parametrize("packing", [None, "within", "across"])
def test_a_resumed_run_goes_on_at_the_next_rows(ranks, host, packing):
    for rank, seen in enumerate(ranks):
        whole, rest = seen["resumed"][f"{host} {packing}"]
        check(whole["rows"], expected(rank, STEPS, packing))
        check(rest["rows"], expected(rank, STEPS, packing)[SAVED:])
        assert rest["losses"] == whole["losses"]


def test_batches_of_one_width_are_handed_out_whole(ranks):
    for rank, seen in enumerate(ranks):
        check(seen["handed_out"]["one width"], expected(rank, 3))


def test_batches_that_cannot_be_handed_out_are_refused(ranks):
    seen = ranks[0]["handed_out"]
    assert seen["several widths"].startswith("RuntimeError") and "dispatch_batches=False" in seen["several widths"]
    assert seen["packed"].startswith("ConfigError: accelerate hands out the batches of one process")


def test_a_mixture_as_a_dataset_is_shared_once(ranks):
    for rank, seen in enumerate(ranks):
        check(seen["datasets"]["whole"], expected(rank, 3))


def test_a_mixture_that_was_split_before_is_refused(ranks):
    texts = [seen["datasets"]["split"] for seen in ranks] + [ranks[0]["datasets"]["split, handed out"]]
    assert all(text.startswith("ConfigError: split_dataset_by_node gives each process") for text in texts)
