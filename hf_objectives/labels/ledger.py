"""What became of every token: a ledger per source that must add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

_EXAMPLES_KEPT = 5
_SUMS = ("rows_in", "rows_out", "tokens_in", "trained", "masked", "num_bytes")


@dataclass(slots=True)
class Account:
    """The account of one source.

    Attributes:
        rows_in: rows read.
        rows_out: rows kept; more than read where conversations were expanded or split.
        tokens_in: tokens encoded.
        trained, masked: tokens kept that are trained and that are context only.
        num_bytes: bytes of UTF-8 that the tokens kept stand for, where they were counted.
        dropped_tokens, dropped_rows: what was left out, by reason.
        dropped_examples: the first few row numbers by reason.
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
        """Book tokens left out; `row` where the whole row goes."""
        self.dropped_tokens[reason] += tokens
        if row is not None:
            self.dropped_rows[reason] += 1
            seen = self.dropped_examples.setdefault(reason, [])
            if len(seen) < _EXAMPLES_KEPT:
                seen.append(row)

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}

    def balance(self) -> int:
        """tokens in - (trained + masked + dropped): 0, or tokens were lost."""
        return self.tokens_in - self.trained - self.masked - self.dropped_tokens.total()


class Ledger:
    """Accounts by source name.

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
            for name in _SUMS:
                setattr(total, name, getattr(total, name) + getattr(account, name))
            total.dropped_tokens.update(account.dropped_tokens)
            total.dropped_rows.update(account.dropped_rows)
        return total

    def merge(self, other: Ledger) -> None:
        """Add another ledger's accounts to this one's."""
        for source, theirs in other.accounts.items():
            mine = self[source]
            for name in _SUMS:
                setattr(mine, name, getattr(mine, name) + getattr(theirs, name))
            mine.dropped_tokens.update(theirs.dropped_tokens)
            mine.dropped_rows.update(theirs.dropped_rows)
            for reason, rows in theirs.dropped_examples.items():
                mine.dropped_examples[reason] = (mine.dropped_examples.get(reason, []) + rows)[:_EXAMPLES_KEPT]

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
        """One line a source, for a terminal or a log."""
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
