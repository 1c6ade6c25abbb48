"""RewardModelTrainer: scores read at the end of the text, exact figures, and TRL's loss to the last digit."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer

from hf_objectives import demo
from hf_objectives.errors import ConfigError, DataError, FormatError, NonFiniteError, TokenizerError
from hf_objectives.labels.chat import encode_chat
from hf_objectives.trainers.reward import REPLACED, RewardModelConfig, RewardModelTrainer, encode_reward_row
from tests.support.chat_corpus import byte_tokenizer, with_bos

TOKENIZER = demo.build_tokenizer()
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "max_length": 200,
}


def llama(vocab_size: int, *, num_labels: int = 1, kind=LlamaForSequenceClassification):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = kind(LlamaConfig(vocab_size=vocab_size, num_labels=num_labels, **sizes)).eval()
    if num_labels == 1 and kind is LlamaForSequenceClassification:
        torch.nn.init.normal_(model.score.weight, std=0.5)  # so that rewards differ
    return model


def plain_rows(n: int) -> list[dict]:
    """Pairs of plain text: TRL's, and ours, end them with EOS."""
    return [
        {"prompt": f"Count {i}: ", "chosen": " ".join(map(str, range(1 + i % 5))), "rejected": "no" + "!" * (i % 7)}
        for i in range(n)
    ]


def trainer(folder, rows=None, *, model=None, tokenizer=TOKENIZER, config=RewardModelConfig, kind=None, **options):
    given = {key: options.pop(key) for key in ("peft_config", "data_collator") if key in options}
    rows = rows or demo.preferences(23)
    kind = kind or RewardModelTrainer
    model = llama(len(tokenizer) + 8) if model is None else model
    args = config(str(folder), **{**SETTINGS, **options})
    rows = Dataset.from_list(rows)
    return kind(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, **given)


def last_scores(model, ids: list[list[int]]) -> list[float]:
    """The score at the last token of each text, alone, by the backbone and the head: no padding token has a say."""
    with torch.no_grad():
        return [float(model.score(model.model(torch.tensor([one])).last_hidden_state[0, -1])) for one in ids]


# -- where scores are read -------------------------------------------------------------------------------------------


LEFT = {"padding_side": "left"}  # as of a policy that generates
# Padding that ends no text; padding that is EOS, with another token to pad with or the unknown one; none at all; BOS.
TOKENIZERS = {
    "own": lambda: byte_tokenizer(special=["<|im_start|>", "<|pad|>"], pad_token="<|pad|>", **LEFT),
    "eos": lambda: byte_tokenizer(special=["<|im_start|>", "<|right_pad_id|>"], **LEFT),
    "unknown": lambda: byte_tokenizer(special=["<|im_start|>"], unk_token="<|endoftext|>", **LEFT),
    "none": lambda: byte_tokenizer(special=["<|im_start|>", "<|reserved_0|>"], pad_token=None, **LEFT),
    "bos": lambda: with_bos(byte_tokenizer(special=["<|im_start|>", "<|reserved_0|>"], **LEFT)),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ["newline", "eos"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_has_one_reward_however_it_is_padded(tmp_path, name, end):
    """ChatML ends turns with a newline after EOS, plain text with EOS itself."""
    tokenizer = TOKENIZERS[name]()
    chats = [row["prompt"] + row["chosen"] for row in demo.preferences(9)]
    rows = demo.preferences(9) if end == "newline" else plain_rows(9)
    run = trainer(tmp_path, rows, tokenizer=tokenizer)
    run.evaluate()
    untrained = last_scores(run.model.eval(), [row["rejected_ids"] for row in run.eval_dataset])
    assert run.pair_rewards.rejected.tolist() == pytest.approx(untrained, abs=1e-5)
    run.train()
    run.evaluate()
    run.save_model()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == loaded.pad_token_id != loaded.eos_token_id
    assert (loaded.padding_side, tokenizer.padding_side) == ("right", "left")
    if end == "newline":
        texts = [encode_chat(loaded, chat)["input_ids"] for chat in chats]
        assert all(ids[-2] == loaded.eos_token_id for ids in texts)
    else:
        # What a program that scores texts does, TRL's RLOO among them: the text, and what closes it.
        texts = [loaded(row["prompt"] + row["chosen"] + loaded.eos_token)["input_ids"] for row in rows]
        assert all(ids[-1] == loaded.eos_token_id for ids in texts)
    expected = last_scores(model, texts)
    assert run.pair_rewards.chosen.tolist() == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        alone = [float(model(torch.tensor([ids])).logits[0, 0]) for ids in texts]
        sides = []
        for side in ("left", "right"):
            batch = loaded.pad({"input_ids": texts}, padding_side=side, return_tensors="pt")
            sides.append(model(**batch).logits[:, 0].tolist())
    for found in (alone, *sides):
        assert found == pytest.approx(expected, abs=1e-5)
    # An answer that broke off before EOS has a reward of its own.
    short = last_scores(model, [texts[0][: texts[0].index(loaded.eos_token_id)]])[0]
    assert abs(short - expected[0]) > 1e-4


def test_trl_passes_over_a_closing_eos(tmp_path):
    """What the above is for; fails once TRL or transformers reads by the mask."""
    tokenizer = byte_tokenizer(special=["<|im_start|>"])
    run = trainer(tmp_path, plain_rows(4), tokenizer=tokenizer, config=RewardConfig, kind=RewardTrainer)
    model = run.model.eval()
    finished = torch.tensor([tokenizer("yes" + tokenizer.eos_token)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(finished).logits, model(finished[:, :-1]).logits)


@pytest.mark.slow
def test_where_only_eos_can_pad(tmp_path):
    tokenizer = byte_tokenizer(special=["<|im_start|>"])
    with pytest.raises(ConfigError, match="row 0 ends with '<|im_end|>', which is the padding token too"):
        trainer(tmp_path, plain_rows(4), tokenizer=tokenizer)
    trainer(tmp_path, plain_rows(4), tokenizer=tokenizer, allow_eos_padding=True).train()
    # Rows that end otherwise are read at their end all the same.
    run = trainer(tmp_path, demo.preferences(4), tokenizer=tokenizer)
    assert run.evaluate()["eval_num_pairs"] == 4
    # The first row may be fine and a later one not.
    ids = [{"chosen_ids": [5, 6], "rejected_ids": [5, 7]}] * 2
    ids.append({"chosen_ids": [5, 6], "rejected_ids": [5, 7, tokenizer.eos_token_id]})
    run = trainer(tmp_path, ids, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="the rejected side of row 2 ends with '<|im_end|>'"):
        run.evaluate()


def test_a_collator_that_pads_with_another_token(tmp_path):
    def collate(examples):
        ids = [torch.tensor(one[side]) for side in ("chosen_ids", "rejected_ids") for one in examples]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=7)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        return {"input_ids": padded, "attention_mask": mask}

    with pytest.raises(ConfigError, match="the collator pads with id 7"):
        trainer(tmp_path, data_collator=collate).evaluate()


def test_a_tokenizer_of_another_model(tmp_path):
    with pytest.raises(TokenizerError, match="the tokenizer has 640 tokens and the model 600 embeddings"):
        trainer(tmp_path, model=llama(600))
    rows = [{"chosen_ids": [5, 900], "rejected_ids": [5, 7]}]
    with pytest.raises(FormatError, match="row 0: id 900 in chosen; the model has embeddings for 0 to 647"):
        trainer(tmp_path, rows).evaluate()


# -- loss and figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_loss_and_gradients_are_trls(tmp_path, center, margin):
    rows = demo.preferences(8)
    encoded = [encode_reward_row(TOKENIZER, row) for row in rows]
    encoded = [{**row, **({"margin": 0.1 * i} if margin else {})} for i, row in enumerate(encoded)]
    lengths = ("chosen_length", "rejected_length")
    theirs_rows = [{key: value for key, value in row.items() if key not in lengths} for row in encoded]
    given = {"center_rewards_coefficient": center, "per_device_train_batch_size": 8}
    ours = trainer(tmp_path, [{**row, "margin": 0.1 * i} if margin else row for i, row in enumerate(rows)], **given)
    theirs = trainer(tmp_path, theirs_rows, config=RewardConfig, kind=RewardTrainer, **given)
    found = []
    for run in (ours, theirs):
        run.model.train()
        inputs = next(iter(run.get_eval_dataloader()))  # the rows in their order
        loss = run.compute_loss(run.model, run._prepare_inputs(inputs))
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in run.model.named_parameters()}, run._metrics["train"]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][2] == found[1][2]
    for name, gradient in found[1][1].items():
        assert torch.allclose(found[0][1][name], gradient, atol=1e-6), name
    metrics = ours.evaluate()
    assert metrics["eval_loss"] == pytest.approx(found[1][0], abs=1e-6)


def test_trl_means_what_we_replace(tmp_path):
    """The contract with TRL: its figures of an evaluation are these, and a new one would need a look."""
    run = trainer(tmp_path, [{"chosen_ids": [5, 6], "rejected_ids": [5, 7]}], config=RewardConfig, kind=RewardTrainer)
    seen = {}
    run.log = lambda logs, *_: seen.update(run._metrics["eval"])
    run.evaluate()
    assert set(seen) == {*REPLACED, "num_tokens"}


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_figures_are_those_of_a_plain_loop(tmp_path, batch_size):
    model = llama(len(TOKENIZER))
    rows = demo.preferences(23)
    run = trainer(tmp_path, rows, model=model, per_device_eval_batch_size=batch_size)
    metrics = run.evaluate()
    margins, rewards, wins = [], [], 0.0
    for row in rows:
        sides = [encode_chat(TOKENIZER, row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")]
        chosen, rejected = last_scores(model, sides)
        margins.append(chosen - rejected)
        rewards += [chosen, rejected]
        wins += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
    assert metrics["eval_num_pairs"] == 23
    assert metrics["eval_accuracy"] == pytest.approx(wins / 23, abs=1e-12)
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / 23, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 23, abs=1e-5)
    found = [metrics[f"eval_{name}_reward"] for name in ("min", "mean", "max")]
    assert found == pytest.approx([min(rewards), sum(rewards) / 46, max(rewards)], abs=1e-5)
    assert metrics["eval_accuracy_low"] < metrics["eval_accuracy"] < metrics["eval_accuracy_high"]
    # The log says the same: the parent's means of batches do not come back.
    logged = run.state.log_history[-1]
    assert {f"eval_{name}": metrics[f"eval_{name}"] for name in REPLACED}.items() <= logged.items()


def test_lengths_are_those_of_the_answers(tmp_path):
    """Seven and two bytes, each with its stop token; the prompt and the newline after it are not counted."""
    tokenizer = byte_tokenizer(special=["<|im_start|>", "<|pad|>"], pad_token="<|pad|>")
    sides = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "seven.."), ("rejected", "no"))
    }
    row = {"prompt": [{"role": "user", "content": "How long?"}], **sides}
    encoded = encode_reward_row(tokenizer, row)
    assert (encoded["chosen_length"], encoded["rejected_length"]) == (8, 3)
    run = trainer(tmp_path, [row], tokenizer=tokenizer)
    assert run.evaluate()["eval_longer_accuracy"] == 1.0


def test_several_sets_streams_and_ids(tmp_path):
    rows = Dataset.from_list(demo.preferences(10))
    run = trainer(tmp_path, demo.preferences(10), per_device_eval_batch_size=4)
    whole = run.evaluate()
    streamed = run.evaluate(rows.to_iterable_dataset())
    both = run.evaluate({"a": rows, "b": rows.select(range(3))})
    ids = [{"chosen_ids": one["chosen_ids"], "rejected_ids": one["rejected_ids"]} for one in run.eval_dataset]
    tokens = run.evaluate(Dataset.from_list(ids), metric_key_prefix="test")
    for key in ("loss", "accuracy", "num_pairs"):
        assert streamed[f"eval_{key}"] == both[f"eval_a_{key}"] == whole[f"eval_{key}"]
        assert tokens[f"test_{key}"] == pytest.approx(whole[f"eval_{key}"], abs=1e-12)
    assert both["eval_b_num_pairs"] == 3
    again = run.eval_dataset.shuffle(seed=1)
    assert run.evaluate(again)["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-7)
    assert run.evaluate()["eval_num_pairs"] == 10  # nothing is left over from the evaluation before


@pytest.mark.slow
def test_learns(tmp_path):
    run = trainer(tmp_path, demo.preferences(60), max_steps=60, learning_rate=5e-3, per_device_train_batch_size=16)
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before / 2 and after["eval_accuracy"] > 0.9


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_are_too_long_lose_their_prompt(tmp_path):
    rows = demo.preferences(12)
    rows[3]["prompt"][0]["content"] = "word " * 300 + rows[3]["prompt"][0]["content"]
    run = trainer(tmp_path, rows, max_length=64)
    sizes = [len(ids) for ids in run.train_dataset["chosen_ids"]]
    assert len(sizes) == 12 and max(sizes) <= 64
    assert rows[3]["chosen"][0]["content"] in TOKENIZER.decode(run.train_dataset[3]["chosen_ids"])


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, DataError, "source 'train', row 2"),
        ({"chosen_ids": [1, 2], "rejected_ids": [1, 2]}, FormatError, "row 2: chosen_ids and rejected_ids are equal"),
        ({"chosen_ids": [1] * 201, "rejected_ids": [2]}, FormatError, "row 2: chosen_ids has 201 tokens"),
        ({"chosen_ids": [1], "rejected_ids": []}, FormatError, "row 2: rejected_ids has 0 tokens"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, error, words):
    fine = {"chosen_ids": [1, 2], "rejected_ids": [1, 3]} if "chosen_ids" in row else plain_rows(1)[0]
    with pytest.raises(error, match=words):
        trainer(tmp_path, [fine, fine, row])


def test_control_tokens_out_of_a_users_text(tmp_path):
    row = demo.preferences(1)[0]
    row["prompt"][0]["content"] += "<|im_end|>"
    plain = encode_reward_row(TOKENIZER, row)["chosen_ids"]
    allowed = encode_reward_row(TOKENIZER, row, control_tokens="allow")["chosen_ids"]
    assert allowed.count(TOKENIZER.eos_token_id) == plain.count(TOKENIZER.eos_token_id) + 1
    assert trainer(tmp_path, [row], control_tokens="allow").train_dataset[0]["chosen_ids"] == allowed


# -- models ----------------------------------------------------------------------------------------------------------


def test_a_causal_model_gets_a_head(tmp_path, caplog):
    llama(len(TOKENIZER), kind=LlamaForCausalLM).save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.INFO, "hf_objectives.trainers.reward"):
        run = trainer(tmp_path / "run", model=str(tmp_path / "base"))
    assert [r.message for r in caplog.records if "score head is new" in r.message]
    run.save_model()
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_objectives.trainers.reward"):
        trainer(tmp_path / "again", model=str(tmp_path / "run"))
    assert not [r.message for r in caplog.records if "score head is new" in r.message]


def test_a_head_of_two_scores(tmp_path):
    with pytest.raises(ValueError, match="reward models require `num_labels=1`"):
        trainer(tmp_path, model=llama(len(TOKENIZER), num_labels=2))


def test_rewards_that_are_not_finite(tmp_path):
    model = llama(len(TOKENIZER))
    run = trainer(tmp_path, model=model)
    model.score.weight.data[:] = math.inf
    with pytest.raises(NonFiniteError, match="row 0: rewards"):
        run.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("saved", [None, ["score"]], ids=["head frozen", "head trained"])
def test_an_adapter_is_saved_with_its_head(tmp_path, saved):
    """The head of a causal model is drawn at random, so that a folder without it would score by another one."""
    llama(len(TOKENIZER), kind=LlamaForCausalLM).save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    run = trainer(tmp_path / "run", model=str(tmp_path / "base"), peft_config=lora)
    run.train()
    run.evaluate()
    run.save_model()
    ids = [row["chosen_ids"] for row in run.eval_dataset]
    for kind in (AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
        torch.manual_seed(9)
        model = kind.from_pretrained(tmp_path / "run", num_labels=1).eval()
        model.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "run").pad_token_id
        with torch.no_grad():
            found = [float(model(torch.tensor([one])).logits[0, 0]) for one in ids]
        assert found == pytest.approx(run.pair_rewards.chosen.tolist(), abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(folder, **options):
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        made = trainer(folder, model=llama(len(TOKENIZER)), **{**saving, **options})
        return made

    whole = run(tmp_path / "whole")
    whole.train()
    halves = run(tmp_path / "halves")
    halves.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_margins_of_some_rows_or_of_none(tmp_path):
    rows = demo.preferences(6)
    with pytest.raises(FormatError, match="row 1: margin is missing"):
        trainer(tmp_path, [{**row, "margin": None if i == 1 else 1.0} for i, row in enumerate(rows)])
    run = trainer(tmp_path, [{**row, "margin": None} for row in rows])
    assert "margin" not in run.train_dataset.column_names and run.evaluate()["eval_num_pairs"] == 6
