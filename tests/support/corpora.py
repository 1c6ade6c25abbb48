"""Small corpora for the tests of preparation."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import disable_progress_bars

from hf_objectives import demo
from hf_objectives.preparation.manifest import Manifest
from tests.support.chat_corpus import byte_tokenizer

disable_progress_bars()
TOKENIZER = byte_tokenizer()
SMALL = {"max_length": 64, "shard_bytes": 2_000, "num_proc": 1}


def write_rows(path: Path, rows: list[dict]) -> str:
    """Rows as JSON lines; gives the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    """Texts as JSON lines; gives the path."""
    return write_rows(path, [{"text": text} for text in texts])


def write_demo(path: Path, count: int) -> str:
    """Texts of the built-in corpus as JSON lines; gives the path."""
    return write_rows(path, demo.texts(count))


def check_balance(manifest: Manifest) -> None:
    """Every token is in the account once, and accounts and shards agree."""
    for split, ledger in manifest.ledgers.items():
        assert all(account.balance() == 0 for account in ledger.accounts.values())
        total, shards = ledger.total(), [shard for shard in manifest.shards if shard.split == split]
        assert total.trained + total.masked == sum(shard.tokens for shard in shards)
        assert total.trained == sum(shard.supervised for shard in shards)


def shard_times(folder: Path) -> dict[str, int]:
    """When each shard to train on was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "train").iterdir()}
