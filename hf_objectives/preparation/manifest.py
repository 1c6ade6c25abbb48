"""The manifest of a prepared folder: what went in, what came out, what was left out and why, and under which policy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_objectives.errors import PreparedDataError
from hf_objectives.labels import Account, Ledger
from hf_objectives.preparation.config import VERSION
from hf_objectives.preparation.shards import Shard, check_types
from hf_objectives.preparation.splits import SPLITS
from hf_objectives.preparation.work import Finished
from hf_objectives.types import parse_json

MANIFEST = "manifest.json"
_EXAMPLES = 5


@dataclass
class Manifest:
    """What a prepared folder holds.

    Attributes:
        policy: all that decides which rows a document becomes, see `CorpusConfig.policy`.
        complete: whether every shard is there.
        versions: packages that prepared it.
        ledgers: by split ("train" and "validation"), what happened to every token of each source. In each account,
            tokens_in = trained + masked + dropped_tokens; `num_bytes` counts UTF-8. Stored as `Ledger.to_dict` gives it.
        broken, broken_named: number of records that could not be read and were skipped; messages of the first few.
        shards: the files.
    """

    policy: dict[str, Any]
    complete: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    ledgers: dict[str, Ledger] = field(default_factory=lambda: {split: Ledger() for split in SPLITS})
    broken: int = 0
    broken_named: list[str] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        """The account of each source, over both splits."""
        both = Ledger()
        for ledger in self.ledgers.values():
            both.merge(ledger)
        return both

    @property
    def sources(self) -> dict[str, Account]:
        """The accounts of `ledger`, by source."""
        return self.ledger.accounts

    @property
    def named(self) -> list[str]:
        """The sources as preparation was given them. Their rows may name others, which then have the accounts."""
        return list(dict.fromkeys(shard.source for shard in self.shards))

    @property
    def num_tokens(self) -> int:
        """Tokens in all packed rows."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_rows(self) -> int:
        """Packed rows of all splits."""
        return sum(shard.rows for shard in self.shards)

    def add(self, finished: Iterable[Finished]) -> None:
        """Add the accounts and shards of finished segments, in their order."""
        for segment in finished:
            self.shards += segment.shards
            self.broken += segment.skipped.count
            self.broken_named = (self.broken_named + segment.skipped.named)[:_EXAMPLES]
            for split, ledger in segment.ledgers.items():
                self.ledgers[split].merge(Ledger.from_dict(ledger))

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        ledgers = {split: ledger.to_dict() for split, ledger in self.ledgers.items()}
        values = {**vars(self), "ledgers": ledgers, "shards": [asdict(shard) for shard in self.shards]}
        draft = folder / (MANIFEST + ".draft")
        draft.write_text(json.dumps(values, indent=1))
        draft.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder; a PreparedDataError where there is none, or one that cannot be used."""
        try:
            values = parse_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise PreparedDataError(f"{folder} holds no {MANIFEST}; prepare it with hf-objectives prepare") from error
        except (OSError, ValueError) as error:
            raise _damaged(folder, error) from error
        policy = values.get("policy") if isinstance(values, dict) else None
        if not isinstance(policy, dict):
            raise _damaged(folder, "it has no policy")
        made = policy.get("preparation_version")
        if made != VERSION:
            raise PreparedDataError(
                f"{folder} was prepared under version {made} of the rows; this is version {VERSION}, which holds out other "
                "rows or writes other columns. Prepare it again in another folder, or overwrite it"
            )
        try:
            ledgers = {split: Ledger.from_dict(ledger) for split, ledger in values["ledgers"].items()}
            read = cls(**{**values, "ledgers": ledgers, "shards": [Shard(**shard) for shard in values["shards"]]})
            check_types(read)
            for key in ("max_length", "eval_share"):
                read.policy[key] + 0
            for part in (
                *read.shards,
                *(account for ledger in ledgers.values() for account in ledger.accounts.values()),
            ):
                check_types(part)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _damaged(folder, f"{type(error).__name__}: {error}") from error
        return read

    def lines(self) -> list[str]:
        """One line a source, the held-out rows, the packed rows and the broken records; for a terminal or a log."""
        lines = self.ledger.lines()
        if self.policy["eval_share"]:
            held = {name: self.ledgers["validation"].accounts.get(name, Account()) for name in self.sources}
            counts = [f"{n.rows_out:,} rows of {name} with {n.trained + n.masked:,} tokens" for name, n in held.items()]
            lines.append(f"held out of these: {', '.join(counts)}")
        if room := self.num_rows * self.policy["max_length"]:
            lines.append(
                f"{self.num_rows:,} rows of {self.policy['max_length']:,} tokens, {self.num_tokens / room:.2%} full, "
                f"in {len(self.shards):,} shards"
            )
        if self.broken:
            lines.append(f"{self.broken:,} broken records skipped, such as {self.broken_named[0]}")
        return lines


def _damaged(folder: Path, reason: Any) -> PreparedDataError:
    return PreparedDataError(f"{folder / MANIFEST} is damaged ({reason!s:.200}); delete it and prepare again")
