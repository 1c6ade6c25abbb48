"""The manifest of a prepared folder: what went in, what came out, what was left out and why, and under which policy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_objectives.errors import PreparedDataError
from hf_objectives.preparation.config import VERSION
from hf_objectives.preparation.shards import Shard
from hf_objectives.preparation.work import SPLITS, Finished

MANIFEST = "manifest.json"
_COUNTS = ("tokens", "supervised", "num_bytes")
_EXAMPLES = 5


@dataclass
class Manifest:
    """What a prepared folder holds.

    Attributes:
        policy: all that decides what rows a document becomes, see `CorpusSettings.policy`.
        complete: whether every shard is there.
        versions: packages that prepared it.
        sources: by source, `documents_in`, `documents`, `tokens_in`, `dropped_tokens` and `dropped_documents` by reason,
            `dropped_examples`, and for each split `tokens`, `supervised` and `num_bytes` (of UTF-8). For every source
            tokens_in = train tokens + validation tokens + all dropped_tokens.
        broken, broken_named: records that could not be read and were skipped, and the first few in words.
        shards: the files.
    """

    policy: dict[str, Any]
    complete: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: int = 0
    broken_named: list[str] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens in all packed rows."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_rows(self) -> int:
        """Packed rows of all splits."""
        return sum(shard.rows for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        draft = folder / (MANIFEST + ".draft")
        draft.write_text(json.dumps(asdict(self), indent=1))
        draft.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            PreparedDataError: there is none, or it is of a version that this one does not read.
        """
        try:
            values = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError as error:
            raise PreparedDataError(f"{folder} holds no {MANIFEST}; prepare it with hf-objectives prepare") from error
        except json.JSONDecodeError as error:
            raise PreparedDataError(f"{folder / MANIFEST} is damaged ({error}); delete it and prepare again") from error
        made = values.get("policy", {}).get("preparation_version")
        if made != VERSION:
            raise PreparedDataError(
                f"{folder} was prepared under version {made} of the rows; this is version {VERSION}"
            )
        return cls(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})

    def lines(self) -> list[str]:
        """One line a source, for a terminal or a log."""
        lines = []
        for name, account in self.sources.items():
            kept = {split: account[split]["tokens"] for split in SPLITS if split in account}
            tokens, documents = account["dropped_tokens"], account["dropped_documents"]
            parts = [f"{n:,} {split}" for split, n in kept.items()]
            parts += [
                f"{n:,} dropped ({reason}" + (f", {documents[reason]:,} documents)" if reason in documents else ")")
                for reason, n in tokens.items()
                if n
            ]
            notes = [f"{n:,} documents: {reason}" for reason, n in documents.items() if not tokens.get(reason)]
            if self.policy["eval_share"] and "validation" not in kept:
                notes.append("no document held out")
            lines.append(
                f"{name}: {account['documents_in']:,} documents, {account['tokens_in']:,} tokens = "
                + "; ".join([" + ".join(parts or ["nothing kept"]), *notes])
            )
        room = self.num_rows * self.policy["max_length"]
        if room:
            lines.append(
                f"{self.num_rows:,} rows of {self.policy['max_length']:,} tokens, {self.num_tokens / room:.2%} full, "
                f"in {len(self.shards):,} shards"
            )
        if self.broken:
            lines.append(f"{self.broken:,} broken records skipped, such as {self.broken_named[0]}")
        return lines


def totals(finished: Iterable[Finished], manifest: Manifest) -> Manifest:
    """The manifest with the accounts and shards of finished segments, in their order."""
    for segment in finished:
        manifest.shards += segment.shards
        manifest.broken += segment.broken
        manifest.broken_named = (manifest.broken_named + segment.broken_named)[:_EXAMPLES]
        for name, account in segment.accounts.items():
            _add(manifest.sources.setdefault(name, {}), account)
    return manifest


def _add(total: dict[str, Any], account: Mapping[str, Any]) -> None:
    for name in ("documents_in", "documents", "tokens_in"):
        total[name] = total.get(name, 0) + account[name]
    for name in ("dropped_tokens", "dropped_documents"):
        total[name] = dict(Counter(total.get(name, {})) + Counter(account[name]))
    examples = total.setdefault("dropped_examples", {})
    for reason, rows in account["dropped_examples"].items():
        examples[reason] = (examples.get(reason, []) + rows)[:_EXAMPLES]
    for split in SPLITS:
        if split in account:
            held = total.setdefault(split, dict.fromkeys(_COUNTS, 0))
            for name in _COUNTS:
                held[name] += account[split][name]
