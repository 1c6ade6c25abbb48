"""Held-out rows: one rule for rows in memory, files and datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.readers import load_rows
from hf_objectives.preparation.splits import draw_rows, hold_out
from tests.support.corpora import SMALL, TOKENIZER, write_texts

ROWS = [{"text": f"row {i}"} for i in range(2_000)]


def test_a_share_is_held_out():
    keep, out = hold_out(ROWS, 0.1)
    # 2,000 draws of probability 0.1: 200 expected, standard deviation 13.4.
    assert abs(len(out) - 200) < 54 and sorted(keep + out) == list(range(2_000)) and keep == sorted(keep)
    assert hold_out(ROWS, 0.1) == (keep, out) != hold_out(ROWS, 0.1, seed=1)
    assert set(out) <= set(hold_out(ROWS, 0.2)[1])
    assert hold_out(ROWS[:3], 0.0) == ([0, 1, 2], []) and len(hold_out(ROWS[:3], 0.001)[1]) == 1
    assert len(hold_out(ROWS[:3], 0.999)[0]) == 1 and len(hold_out([{}] * 9, 0.5)[1]) in (1, 8)
    drawn = draw_rows(ROWS, 7)
    assert drawn.dtype == np.float64 and 0 <= drawn.min() < 0.01 and 0.99 < drawn.max() < 1


def test_shares_that_cannot_be():
    with pytest.raises(ConfigError, match="eval_share is 1.0; expected 0 or more, under 1"):
        hold_out(ROWS, 1.0)
    with pytest.raises(ConfigError, match="eval_share 0.5 of 1 rows leaves nothing to train on"):
        hold_out(ROWS[:1], 0.5)


def test_the_content_of_a_row_decides():
    twice = [*ROWS, *ROWS[:100]]
    out = set(hold_out(twice, 0.3)[1])
    assert all((i in out) == (2_000 + i in out) for i in range(100))  # two equal rows are on one side
    assert {twice[i]["text"] for i in out} == {ROWS[i]["text"] for i in hold_out(ROWS, 0.3)[1]}
    assert hold_out(Dataset.from_list(ROWS), 0.3) == hold_out(ROWS, 0.3)
    assert draw_rows([{"a": 1, "b": 2}], 0) == draw_rows([{"b": 2, "a": 1}], 0)
    # What JSON does not hold has a side as well.
    assert len(draw_rows([{"a": np.arange(2)}, {"a": {1: 2}}, {"a": 1 << 70}, {"a": "\ud800"}, {"a": {2}}], 0)) == 5


@pytest.mark.parametrize("kind", ["jsonl", "txt", "dataset"])
def test_fine_tuning_and_preparation_hold_out_the_same_rows(tmp_path, kind):
    """This failed before: preparation drew by file and line, fine-tuning by the number of the row."""
    texts = [row["text"] for row in demo.texts(90)]
    texts = list(dict.fromkeys(text.replace("\n\n", "\n") for text in texts))
    if kind == "dataset":
        rows = sources = Dataset.from_dict({"text": texts})
    else:  # two files, blank lines in between, several segments
        for i, part in enumerate((texts[:30], texts[30:])):
            if kind == "jsonl":
                path = Path(write_texts(tmp_path / f"{i}.jsonl", part))
                path.write_text(path.read_text() + "\n" + json.dumps({"text": f"last {i}"}) + "\n")
            else:
                (tmp_path / f"{i}.txt").write_text("\n\n\n".join(part))
        sources = str(tmp_path / f"*.{kind}")
        rows = load_rows(sources)
    held = [rows[i]["text"] for i in hold_out(rows, 0.3, seed=5)[1]]
    config = CorpusConfig(eval_share=0.3, eval_seed=5, **{**SMALL, "max_length": 1_024})
    prepare_corpus({"a": sources}, TOKENIZER, tmp_path / "out", config)
    decoded = [
        TOKENIZER.decode(ids).removesuffix(TOKENIZER.eos_token)
        for row in load_prepared(tmp_path / "out", "validation")
        for ids in np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1])
    ]
    assert sorted(decoded) == sorted(held) and 10 < len(held) < 50
