"""Count what happened to every token, per source: trained, masked or dropped, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Reasons to leave something out.
TOO_LONG, CUT, UNSUPERVISED = "longer than max_length", "cut at max_length", "nothing supervised"
SKIPPED = ", skipped"  # after the name of the error that the row would have raised
_EXAMPLES_KEPT = 5
Counts = NDArray[np.int64]
_SUMS = ("rows_in", "rows_out", "tokens_in", "trained", "masked", "num_bytes")


@dataclass(slots=True)
class Account:
    """What happened to the rows and tokens of one source.

    Attributes:
        rows_in: rows read.
        rows_out: rows kept; more than read where conversations were expanded or split.
        tokens_in: tokens encoded.
        trained, masked: tokens kept that are trained, and that are context only.
        num_bytes: bytes of UTF-8 that the tokens kept stand for, where they were counted.
        dropped_tokens, dropped_rows: what was left out, by reason.
        dropped_examples: the first few row numbers, by reason.
    """

    rows_in: int = 0
    rows_out: int = 0
    tokens_in: int = 0
    trained: int = 0
    masked: int = 0
    num_bytes: int = 0
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    dropped_rows: Counter[str] = field(default_factory=Counter)
    dropped_examples: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, *, tokens: int, row: int | None = None) -> None:
        """Count tokens that are left out; give `row`, its number, where the whole row is."""
        self.dropped_tokens[reason] += tokens
        if row is not None:
            self.dropped_rows[reason] += 1
            examples = self.dropped_examples.setdefault(reason, [])
            if len(examples) < _EXAMPLES_KEPT:
                examples.append(row)

    def add(self, other: Account, *, examples: bool = True) -> None:
        """Add the sums of another account and, with `examples`, its example rows."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped_tokens.update(other.dropped_tokens)
        self.dropped_rows.update(other.dropped_rows)
        for reason, rows in other.dropped_examples.items() if examples else ():
            self.dropped_examples[reason] = (self.dropped_examples.get(reason, []) + rows)[:_EXAMPLES_KEPT]

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}

    def balance(self) -> int:
        """`tokens_in - (trained + masked + dropped)`: 0, or tokens were lost."""
        return self.tokens_in - self.trained - self.masked - self.dropped_tokens.total()


class Ledger:
    """Accounts by source name; asking for a new name opens an account.

    Example:
        >>> ledger = Ledger()
        >>> account = ledger["alpaca"]
        >>> account.tokens_in, account.trained, account.masked = 10, 4, 6
        >>> account.balance()
        0
    """

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}

    def __getitem__(self, source: str) -> Account:
        account = self.accounts.get(source)
        if account is None:
            account = self.accounts[source] = Account()
        return account

    def total(self) -> Account:
        """All sources in one account, without the example rows."""
        total = Account()
        for account in self.accounts.values():
            total.add(account, examples=False)
        return total

    def merge(self, other: Ledger) -> None:
        """Add another ledger's accounts to this one's."""
        for source, account in other.accounts.items():
            self[source].add(account)

    def to_dict(self) -> dict[str, Any]:
        """The ledger as JSON values."""
        return {source: account.to_dict() for source, account in self.accounts.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Ledger:
        """The ledger whose `to_dict` gave these values."""
        ledger = cls()
        for source, account in values.items():
            counters = {name: Counter(account[name]) for name in ("dropped_tokens", "dropped_rows")}
            ledger.accounts[source] = Account(**{**account, **counters})
        return ledger

    def lines(self) -> list[str]:
        """One line per source, for a terminal or a log."""
        lines = []
        for source, account in self.accounts.items():
            share = account.trained / max(1, account.trained + account.masked)
            dropped = ", ".join(
                f"{account.dropped_rows.get(reason, 0)} rows and {tokens} tokens dropped ({reason}; rows "
                f"{', '.join(map(str, account.dropped_examples.get(reason, []))) or 'kept in part'})"
                for reason, tokens in account.dropped_tokens.items()
            )
            lines.append(
                f"{source}: {account.rows_in} rows, {account.tokens_in} tokens = {account.trained} trained ({share:.1%}) + "
                f"{account.masked} masked + {account.dropped_tokens.total()} dropped"
                + (f"; {dropped}" if dropped else "")
            )
        return lines


def account_rows(
    ledger: Ledger,
    sources: Sequence[str],
    numbers: Sequence[int],
    whole: Counts,
    kept: Counts,
    trained: Counts,
    fits: Any,
) -> Counts:
    """Count what happened to every token of some rows, of these sources and numbers.

    Args:
        whole, kept, trained: int64 [rows], tokens before the limit, tokens after it, and those of them that are trained.
        fits: bool [rows], False where a row is left out because it is too long.

    Returns:
        int64 [kept rows]: which rows fit and train a token.
    """
    keep = fits & (trained > 0)
    codes: dict[str, int] = {}
    code_of_row = np.fromiter((codes.setdefault(source, len(codes)) for source in sources), np.int64, len(sources))
    for source, code in codes.items():
        rows = code_of_row == code
        account = Account(tokens_in=int(whole[rows].sum()), rows_out=int((rows & keep).sum()))
        account.trained = int(trained[rows & keep].sum())
        account.masked = int(kept[rows & keep].sum()) - account.trained
        ledger[source].add(account)
    for reason, left_out, tokens in ((TOO_LONG, ~fits, whole), (UNSUPERVISED, fits & (trained == 0), kept)):
        for i in np.flatnonzero(left_out).tolist():
            ledger[sources[i]].drop(reason, tokens=int(tokens[i]), row=numbers[i])
    for i in np.flatnonzero(fits & (kept < whole)).tolist():
        ledger[sources[i]].drop(CUT, tokens=int(whole[i] - kept[i]))
    return np.flatnonzero(keep)
