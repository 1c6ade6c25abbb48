"""Batches of preference pairs: what TRL's own collator makes of them, with exact masks and numbered rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_objectives import DataCollatorForPreferencePairs, demo
from hf_objectives.errors import ConfigError, FormatError, NothingSupervisedError, TokenizerError
from hf_objectives.labels.pairs import encode_pair
from tests.support.chat_corpus import byte_tokenizer, with_bos

TOKENIZER = demo.build_tokenizer()
ROWS = demo.preferences(5)
IDS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [12, 13]},
]


def test_a_batch_by_hand():
    masked = [{**IDS[0], "chosen_mask": [1, 0], "rejected_mask": [1]}, IDS[1]]
    pad = TOKENIZER.pad_token_id
    batch = DataCollatorForPreferencePairs(TOKENIZER, train_on="all")(masked)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 10, 11],
        [1, 2, 3, 6, pad],
        [7, 12, 13, pad, pad],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 0], [0, 1, 1, 0, 0]]
    assert {values.dtype for values in batch.values()} == {torch.int64}


@pytest.mark.parametrize("multiple", [None, 8])
def test_rows_without_masks_are_what_trl_makes_of_them(multiple):
    rows = [{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.25} for row in IDS]
    ours = DataCollatorForPreferencePairs(TOKENIZER, train_on="all", pad_to_multiple_of=multiple)(rows)
    theirs = DataCollatorForPreference(TOKENIZER.pad_token_id, pad_to_multiple_of=multiple)(rows)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values) and ours[name].dtype == values.dtype, name


def test_raw_rows_are_encoded_and_padding_is_on_the_right():
    tokenizer = with_bos(byte_tokenizer())
    tokenizer.padding_side = "left"  # pad is the stop token here: told apart by the masks
    batch = DataCollatorForPreferencePairs(tokenizer)(ROWS)
    pairs = [encode_pair(tokenizer, row) for row in ROWS]
    for i, side in ((0, "chosen"), (5, "rejected")):
        for j, pair in enumerate(pairs):
            size = int(batch["attention_mask"][i + j].sum())
            assert batch["input_ids"][i + j, :size].tolist() == pair["prompt_ids"] + pair[f"{side}_ids"]
            on = batch["completion_mask"][i + j].nonzero().flatten().tolist()
            assert on == [len(pair["prompt_ids"]) + k for k, flag in enumerate(pair[f"{side}_mask"]) if flag]


def test_workers_give_the_same():
    collate = DataCollatorForPreferencePairs(TOKENIZER)
    (batch,) = DataLoader(ROWS, batch_size=5, num_workers=1, collate_fn=collate)
    assert all(torch.equal(batch[name], values) for name, values in collate(ROWS).items())


def test_rows_are_numbered_where_asked():
    rows = [{**row, "row": number} for row, number in zip(IDS, (7, 3), strict=True)]
    assert DataCollatorForPreferencePairs(TOKENIZER, train_on="all", return_rows=True)(rows)["row_ids"].tolist() == [
        7,
        3,
    ]
    assert "row_ids" not in DataCollatorForPreferencePairs(TOKENIZER, train_on="all")(rows)
    assert "row_ids" not in DataCollatorForPreferencePairs(TOKENIZER, train_on="all", return_rows=True)(IDS)


def test_encoded_rows_that_are_too_long_lose_the_beginning_of_their_prompt():
    bos = TOKENIZER.bos_token_id
    row = {"prompt_ids": [bos, 31, 32, 33, 34, 35], "chosen_ids": [41, 42, 43], "rejected_ids": [51]}
    cut = DataCollatorForPreferencePairs(TOKENIZER, max_length=7, train_on="all")([row])
    assert cut["input_ids"].tolist()[0] == [bos, 33, 34, 35, 41, 42, 43]
    assert cut["completion_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0]]
    # The prompt gives way to half of the length; the longer answer loses its end.
    cut = DataCollatorForPreferencePairs(TOKENIZER, max_length=4, train_on="all")([row])
    assert cut["input_ids"].tolist()[0] == [bos, 35, 41, 42]


def test_nothing_predicts_the_first_token_of_all():
    batch = DataCollatorForPreferencePairs(TOKENIZER, train_on="all")(
        [{"prompt_ids": [], "chosen_ids": [4, 5], "rejected_ids": [6, 7]}]
    )
    assert batch["completion_mask"].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"prompt": "q", "chosen": "a"}, FormatError, "row 1: rejected is missing"),
        ({"prompt_ids": [1], "chosen_ids": [2]}, FormatError, "row 1: rejected_ids is missing"),
        ({"chosen_ids": [1, 2], "rejected_ids": [1]}, FormatError, "row 1: prompt_ids is missing beside chosen_ids"),
        ({**IDS[0], "chosen_mask": [1]}, FormatError, "row 1: chosen_mask has 1 entries for 2 ids"),
        ({**IDS[0], "rejected_ids": []}, NothingSupervisedError, "row 1: rejected has no token"),
        ({**IDS[0], "chosen_mask": [0, 0]}, NothingSupervisedError, "row 1: chosen has no token"),
        ({**IDS[0], "prompt_ids": []}, NothingSupervisedError, "row 1: rejected has no token"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "a", "row": 40},
            FormatError,
            "row 40: chosen and rejected are equal",
        ),
        ("text", FormatError, "row 1: a row is str"),
        ({**IDS[0], "ref_chosen_logps": 1.0}, FormatError, "1 of 2 rows of a batch have ref_chosen_logps"),
    ],
)
def test_rows_that_cannot_be_used(row, error, words):
    with pytest.raises(error, match=words):
        DataCollatorForPreferencePairs(TOKENIZER, train_on="all")([IDS[0], row])


def test_settings_that_cannot_work():
    for name, value in (("max_length", 1), ("pad_to_multiple_of", 0), ("train_on", "user"), ("control_tokens", "x")):
        with pytest.raises(ConfigError, match=name):
            DataCollatorForPreferencePairs(TOKENIZER, **{name: value})
    bare = byte_tokenizer()
    bare.pad_token = bare.eos_token = None
    with pytest.raises(TokenizerError, match="neither a pad nor an EOS"):
        DataCollatorForPreferencePairs(bare, train_on="all")(IDS)


@pytest.mark.parametrize("row", [IDS[0], {"chosen_ids": [1, 2], "rejected_ids": [1]}])
def test_ids_without_masks_are_refused_where_not_every_token_is_trained(row):
    with pytest.raises(FormatError, match="row 0: .* no chosen_mask and rejected_mask.*train_on='all'"):
        DataCollatorForPreferencePairs(TOKENIZER)([row])


def test_ids_that_a_host_added_do_not_stand_for_the_texts():
    texts = {"prompt": "2 and 2 is ", "chosen": "four", "rejected": "five<|im_end|>"}
    ended = {**texts, "chosen": "four<|im_end|>"}  # as TRL writes it
    collate = DataCollatorForPreferencePairs(TOKENIZER)
    expected = encode_pair(TOKENIZER, {**texts, "rejected": "five"})
    size = len(expected["prompt_ids"] + expected["chosen_ids"])
    batch = collate([{**ended, "prompt_ids": [9], "chosen_ids": [9], "rejected_ids": [9]}])
    assert batch["input_ids"][0, :size].tolist() == expected["prompt_ids"] + expected["chosen_ids"]
    assert int(batch["completion_mask"].sum()) == sum(expected["chosen_mask"] + expected["rejected_mask"])


def test_margins_come_along():
    rows = [{**row, "margin": margin} for row, margin in zip(IDS, (0.5, 2), strict=True)]
    assert DataCollatorForPreferencePairs(TOKENIZER, train_on="all")(rows)["margin"].tolist() == [0.5, 2.0]
