"""Real texts, repeated with changes until a corpus is as large as asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import orjson

from hf_objectives.preparation.readers import load_rows


def changed(texts: list[str], num_bytes: int, seed: int = 0) -> Iterator[str]:
    """The texts again and again, one word in twenty replaced by another word of the texts or a number."""
    rng = random.Random(seed)
    words = sorted({word for text in texts for word in text.split(" ")})
    made = 0
    while True:
        for text in texts:
            parts = text.split(" ")
            for _ in range(max(1, len(parts) // 20)):
                new = rng.choice(words) if rng.random() < 0.7 else str(rng.randrange(10**6))
                parts[rng.randrange(len(parts))] = new
            again = " ".join(parts)
            made += len(again.encode())
            yield again
            if made >= num_bytes:
                return


def write_corpus(files: list[str], folder: Path, megabytes: int) -> Path:
    """`corpus-<n>mb.jsonl` of the texts of some files, made once; a line of a text file longer than 1,000 characters is a
    document of its own."""
    path = folder / f"corpus-{megabytes}mb.jsonl"
    if not path.exists():
        texts = []
        for file in files:
            long_lines = file.endswith(".txt") and max(map(len, Path(file).read_text().split("\n"))) > 10_000
            texts += [row["text"] for row in load_rows(file, documents="line" if long_lines else "blank_line")]
        with path.with_suffix(".draft").open("wb") as out:
            for text in changed(texts, megabytes * 1_000_000):
                out.write(orjson.dumps({"text": text}) + b"\n")
        path.with_suffix(".draft").replace(path)
    return path
