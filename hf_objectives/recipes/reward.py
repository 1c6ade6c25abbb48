"""Train a reward model on preference pairs, and report how far it can be believed before and after.

    accelerate launch recipes/reward.py --config recipes/configs/reward_quickstart.yaml --model_name_or_path runs/quickstart
    accelerate launch recipes/reward.py --config recipes/configs/smollm2_reward.yaml \\
        --model_name_or_path path/or/id --dataset_name pairs.jsonl --output_dir runs/mine
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification, set_seed
from transformers.utils import find_adapter_config_file
from trl import get_peft_config, get_quantization_config

from hf_objectives import demo
from hf_objectives.diagnostics import DiagnosticsCallback, plot_reward_model
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import Reliability
from hf_objectives.publishing import push, write_card
from hf_objectives.recipes.alignment_rows import RowArguments, Rows, split_rows
from hf_objectives.recipes.arguments import parse_config, read_template
from hf_objectives.recipes.plan import check_launch, print_plan, resolve_plan
from hf_objectives.recipes.run import BUILT_IN, RecipeModel, on_main, resume_point
from hf_objectives.trainers import RewardModelConfig, RewardModelTrainer, encode_reward_row, suppress_seqcls_warning

# What the table, the card and results.json say, and what each figure is.
FIGURES = {
    "eval_accuracy": "accuracy",
    "eval_margin": "margin (chosen less rejected)",
    "eval_loss": "loss (nats per pair)",
    "eval_expected_calibration_error": "expected calibration error",
    "eval_length_bias": "rank correlation of reward and length",
    "eval_longer_preferred": "the longer answer preferred",
}
BASELINE = "eval_longer_accuracy"


@dataclass
class PairArguments(RowArguments):
    """Where the pairs come from, and what becomes of an adapter."""

    chat_template: str | None = field(default=None, metadata={"help": "A template, or the path of a .jinja file."})
    merge_adapter: bool = field(
        default=True, metadata={"help": "Save a LoRA run as a whole model; false saves the adapter and its head."}
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns the held-out figures before and after."""
    (model_config, data, args), origin = parse_config((RecipeModel, PairArguments, RewardModelConfig), argv)
    console = Console(stderr=False, soft_wrap=False)
    check_launch(args)
    set_seed(args.seed)
    model, tokenizer = load(model_config, use_cpu=args.device.type == "cpu")
    if template := read_template(data.chat_template):
        tokenizer.chat_template = template  # saved with the model, so that scoring renders what was trained
    pairs, held_out = split_rows(data, seed=args.seed, built_in=(24_000, 400))
    if not held_out:
        raise ConfigError("eval_share is 0; a reward model that is not held against pairs says nothing")
    wants_push, args.push_to_hub = args.push_to_hub, False  # pushed at the end, when everything is on disk
    model_config.lora_task_type = "SEQ_CLS"  # the score head is trained, and saved with the adapter
    trainer = RewardModelTrainer(
        model,
        args,
        train_dataset=encode(pairs, tokenizer, args),
        eval_dataset=encode(held_out, tokenizer, args),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )
    if on_main():
        rows = SimpleNamespace(
            max_length=args.max_length or max(len(ids) for ids in trainer.train_dataset["chosen_ids"]),
            packing=False,
            overlength="the prompt's beginning goes first",
            train_on="the score at the last token of each answer",
        )
        print_plan(resolve_plan(args, rows, trainer.model, len(pairs), origin), console)
    before, reliability_before = evaluate(trainer)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train(resume_from_checkpoint=resume_point(args))
    after, reliability_after = evaluate(trainer)
    save(trainer, merge=data.merge_adapter)
    diagrams = {"before": reliability_before, "after": reliability_after}
    results = {"before": before, "after": after, "figures": [*FIGURES, BASELINE], "num_pairs": len(pairs)}
    results["reliability"] = {name: as_json(found) for name, found in diagrams.items()}
    if on_main():
        finish(trainer, results, diagrams, model_config.model_name_or_path, console)
        if wants_push:
            folder = Path(args.output_dir or ".")
            push(folder, args.hub_model_id, private=bool(args.hub_private_repo), console=console)
    trainer.accelerator.wait_for_everyone()
    return results


def load(config: RecipeModel, *, use_cpu: bool) -> tuple[Any, Any]:
    """A model with a score head, new where there was none, and its tokenizer.

    Raises:
        ConfigError: no model was named, or a 4-bit one for a CPU.
    """
    where = config.model_name_or_path
    if not where:
        raise ConfigError("model_name_or_path is missing; give a Hub id, a folder, or 'builtin'")
    if where == BUILT_IN:
        tokenizer: Any = demo.build_tokenizer()
        built = demo.build_model(tokenizer).config
        built.num_labels = 1
        return LlamaForSequenceClassification(built), tokenizer
    if config.load_in_4bit and use_cpu:
        raise ConfigError("load_in_4bit on a CPU; use a GPU, or leave it off")
    tokenizer = AutoTokenizer.from_pretrained(where, revision=config.model_revision)
    # transformers loads the checkpoint's dtype; weights that an optimizer moves want float32 unless asked otherwise.
    settings = {
        "dtype": "float32" if config.dtype in (None, "auto") else config.dtype,
        "attn_implementation": config.attn_implementation,
        "quantization_config": get_quantization_config(config),
        "num_labels": 1,
    }
    adapter = find_adapter_config_file(where, revision=config.model_revision)
    base = json.loads(Path(adapter).read_text())["base_model_name_or_path"] if adapter else where
    revision = None if adapter else config.model_revision
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(base, revision=revision, **settings)
    if adapter:  # what fine-tuning with LoRA left: the adapter becomes part of the weights
        from peft import PeftConfig, PeftModel

        lora = PeftConfig.from_pretrained(where)
        lora.task_type = None  # this model does not generate
        model = PeftModel.from_pretrained(model, where, config=lora).merge_and_unload()
        model.requires_grad_(True)  # PEFT froze what was beneath the adapter
    return model, tokenizer


def encode(rows: Rows, tokenizer: Any, args: RewardModelConfig) -> Dataset:
    """Pairs as ids; from Python values, so that no Arrow struct mixes the keys of two rows."""
    settings: dict[str, Any] = {"max_length": args.max_length, "control_tokens": args.control_tokens}
    return Dataset.from_list(
        [encode_reward_row(tokenizer, row, source=row["source"], row_index=row["row"], **settings) for row in rows]
    )


def evaluate(trainer: RewardModelTrainer) -> tuple[dict[str, float], Reliability]:
    """Held-out figures and calibration."""
    metrics = trainer.evaluate()
    assert trainer.pair_rewards is not None
    return metrics, trainer.pair_rewards.reliability()


def save(trainer: RewardModelTrainer, *, merge: bool) -> None:
    """The model and its tokenizer; an adapter as part of the weights, so that any program can score with the folder."""
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if merge and hasattr(inner, "merge_and_unload") and not getattr(inner.config, "quantization_config", None):
        trainer.model = trainer.model_wrapped = inner.merge_and_unload()
    trainer.save_model()
    trainer.save_state()


def finish(
    trainer: RewardModelTrainer,
    results: dict[str, Any],
    diagrams: Mapping[str, Reliability],
    base_model: str | None,
    console: Console,
) -> None:
    """Everything on disk, then the table."""
    folder = Path(trainer.args.output_dir or ".")
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    # The Trainer starts a new history when it trains; the first point of the curve is the model as it came.
    history = [{"step": 0, **results["before"]}, *trainer.state.log_history]
    picture = plot_reward_model(history, diagrams, folder / "training_curves.png")
    base = None if base_model == BUILT_IN else base_model
    write_card(folder, results=results, base_model=base, data=None, args=trainer.args, objective="reward")
    print_figures(results["before"], results["after"], console)
    console.print(f"Model, {picture.name}, results.json and README.md are in {folder}", highlight=False)


def print_figures(before: Mapping[str, float], after: Mapping[str, float], console: Console) -> None:
    """The held-out figures, and what preferring the longer answer would reach."""
    title = f"{int(after['eval_num_pairs']):,} held-out pairs, before and after"
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for key, name in FIGURES.items():
        table.add_row(name, *(_number(metrics.get(key)) for metrics in (before, after)))
        if key == "eval_accuracy":
            table.add_row("  95 % interval", *(_interval(metrics) for metrics in (before, after)))
    baseline = _number(after.get(BASELINE))
    table.add_row("accuracy of preferring the longer answer", baseline, baseline)
    console.print(table)


def as_json(found: Reliability) -> dict[str, list[float | None]]:
    """A reliability diagram's bins as lists; None in an empty bin."""
    values = {name: getattr(found, name).tolist() for name in ("edges", "counts", "confidence", "accuracy")}
    return {name: [None if value != value else value for value in listed] for name, listed in values.items()}


def _interval(metrics: Mapping[str, float]) -> str:
    return f"{metrics['eval_accuracy_low']:.3f} to {metrics['eval_accuracy_high']:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
