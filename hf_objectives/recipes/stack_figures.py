"""The figures of the stack: what is measured after each stage, the bar of each, and the picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_objectives import demo
from hf_objectives.evaluation import LanguageModelEvaluation
from hf_objectives.recipes.built_in import Marks

# What the table's heads stand for.
COLUMNS = {
    "texts": "text ppl",
    "chats": "chat ppl",
    "exact_match": "exact",
    "exact_match_trained": "trained",
    "exact_match_facts": "facts",
    "accuracy": "pairs",
    "reward": "reward",
    "calibration_error": "ECE",
    "kl": "KL",
    "tokens": "tokens",
    "seconds": "s",
}
EACH = 100  # questions of each skill in the exam after a stage
_PANELS = {
    "perplexity": "Perplexity, held out (log scale)",
    "exact_match": "Exact match, unseen questions",
    "accuracy": "Accuracy on held-out pairs",
    "kl": "KL to the fine-tuned model (nats an answer)",
}


def measure(policy: Path, judge: str | None, base: str | None, *, seed: int) -> dict[str, Any]:
    """Held-out figures of a checkpoint: perplexity of `texts` and `chats`, those of `Marks` (greedy), `by_skill`, the mean
    `reward` that a judge gives its sampled answers, and `kl` to the base in nats per answer.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    held_out = {"texts": demo.texts(400, split="test"), "chats": demo.chats(400, split="test")}
    perplexities = LanguageModelEvaluation(held_out, tokenizer, max_length=None, batch_size=16).measure(model)
    marks = Marks.of(model, tokenizer, seed=seed, each=EACH, trained=True)
    row: dict[str, Any] = {name: perplexities[f"eval_{name}_perplexity"] for name in held_out}
    row |= {**marks.figures(), "by_skill": marks.by_skill()}
    set_seed(seed)
    prompts = [
        [{"role": "user", "content": question.question}] for question, _ in marks.unseen if not question.expression
    ]
    ids, mask, answered = sample(model, tokenizer, prompts)
    if judge is not None:
        said = torch.where(answered.bool(), ids, tokenizer.pad_token_id)
        row["reward"] = mean_reward(judge, prompts, tokenizer.batch_decode(said, skip_special_tokens=True))
    if base is not None:
        other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        row["kl"] = divergence(model, other, ids, mask, answered)
    return row


def pair_figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Of the results of a stage that learns from pairs: `accuracy` with its interval, and `calibration_error`."""
    after = results["after"]
    for name in ("eval_accuracy", "eval_rewards/accuracies"):
        if name in after:
            found = {"accuracy": after[name], "low": after[f"{name}_low"], "high": after[f"{name}_high"]}
            if "eval_expected_calibration_error" in after:
                found["calibration_error"] = after["eval_expected_calibration_error"]
            return found
    return {}


def tokens_of(folder: Path) -> int | None:
    """Tokens that a stage has seen, from its log."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    seen = [entry[key] for entry in history for key in ("num_tokens_seen", "num_tokens") if entry.get(key)]
    return int(max(seen)) if seen else None


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[list[dict[str, str]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled answers: ids and attention mask [prompts, length], and where the answer is, up to its stop token."""
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    begin = batch["input_ids"].shape[1]
    ids = model.generate(
        **batch, max_new_tokens=32, do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id
    )
    stopped = (ids[:, begin:] == tokenizer.eos_token_id).long().cumsum(dim=1)
    answered = torch.zeros_like(ids)
    answered[:, begin:] = (stopped - (ids[:, begin:] == tokenizer.eos_token_id).long() == 0).long()
    mask = torch.cat([batch["attention_mask"], answered[:, begin:]], dim=1)
    return ids, mask, answered


@torch.no_grad()
def mean_reward(judge: str, prompts: list[list[dict[str, str]]], answers: list[str]) -> float:
    """The mean reward that a reward model gives to answers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(judge)
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32)
    chats = [[*prompt, {"role": "assistant", "content": said}] for prompt, said in zip(prompts, answers, strict=True)]
    tokenizer.padding_side = "right"
    batch = tokenizer.apply_chat_template(chats, return_dict=True, return_tensors="pt", padding=True)
    return model(**batch).logits[:, 0].mean().item()


@torch.no_grad()
def divergence(model: nn.Module, base: nn.Module, ids: Tensor, mask: Tensor, answered: Tensor) -> float:
    """KL(model || base) in nats per answer: the whole divergence at every token of the model's own answers, summed."""
    places = torch.nn.functional.pad(answered[:, 1:], (0, 1)).bool()
    ours, theirs = (one(input_ids=ids, attention_mask=mask).logits[places].log_softmax(-1) for one in (model, base))
    return ((ours.exp() * (ours - theirs)).sum() / len(ids)).item()


def missed(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where a stage is short of its bar, one line each: every stage is better than the one before in what it is for."""
    of = {row["stage"]: row for row in rows}
    short: list[str] = []

    def at_least(stage: str, what: str, value: float, bar: float) -> None:
        if value < bar:
            short.append(f"{stage}: {what} is {value:.3f}, expected at least {bar:.3f}")

    def at_most(stage: str, what: str, value: float, bar: float) -> None:
        if value > bar:
            short.append(f"{stage}: {what} is {value:.3f}, expected at most {bar:.3f}")

    if "sft" in of and "pretrain" in of:
        at_most("sft", "text perplexity", of["sft"]["texts"], 1.1 * of["pretrain"]["texts"])
        at_least("sft", "exact match", of["sft"]["exact_match"], of["pretrain"]["exact_match"] + 0.1)
    if "reward" in of:
        at_least("reward", "accuracy", of["reward"]["accuracy"], 0.9)
        at_most("reward", "calibration error", of["reward"]["calibration_error"], 0.05)
    if "ppo" in of and "sft" in of:
        at_least("ppo", "exact match", of["ppo"]["exact_match"], of["sft"]["exact_match"] + 0.15)
        at_most("ppo", "KL", of["ppo"]["kl"], 1.0)
        for skill, marks in of["ppo"]["by_skill"].items():  # as far as so few questions can tell
            at_least("ppo", f"{skill}, upper end", marks["high"], of["sft"]["by_skill"][skill]["exact_match"] - 0.05)
    if "dpo" in of:
        at_least("dpo", "reward accuracy", of["dpo"]["accuracy"], 0.9)
    if "dpo" in of and "sft" in of:
        at_least("dpo", "exact match", of["dpo"]["exact_match"], of["sft"]["exact_match"])
        at_most("dpo", "chat perplexity", of["dpo"]["chats"], 1.1 * of["sft"]["chats"])
    if "distill" in of:
        at_least("distill", "exact match", of["distill"]["exact_match"], of["student"]["exact_match"] + 0.01)
    return short


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The stages' figures as a picture; a share has its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        parts = ("texts", "chats") if key == "perplexity" else (key,)
        shown = [row for row in rows if any(row.get(part) is not None for part in parts)]
        for i, part in enumerate(parts):
            width = 0.8 / len(parts)
            places = [place + width * (i - (len(parts) - 1) / 2) for place in range(len(shown))]
            bars = axes.bar(places, [row[part] for row in shown], width, label=part, yerr=_interval(part, shown))
            axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_xticks(range(len(shown)), [row["stage"] for row in shown])
        axes.set(title=title, yscale="log" if key == "perplexity" else "linear")
        axes.margins(y=0.15)
        axes.grid(alpha=0.25, axis="y")
        if len(parts) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _interval(part: str, rows: Sequence[Mapping[str, Any]]) -> list[list[float]] | None:
    """The lengths of error bars below and above, where a figure has an interval."""
    low, high = {"exact_match": ("exact_match_low", "exact_match_high"), "accuracy": ("low", "high")}.get(
        part, ("", "")
    )
    if not low:
        return None
    # At 0 and 1 rounding may leave an end on the wrong side.
    return [[max(0.0, row[part] - row[low]) for row in rows], [max(0.0, row[high] - row[part]) for row in rows]]
