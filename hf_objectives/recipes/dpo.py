"""Align a chat model with preference pairs by DPO, and report what it gained and what it cost the language model.

    accelerate launch recipes/dpo.py --config recipes/configs/dpo_quickstart.yaml --model_name_or_path runs/quickstart
    accelerate launch recipes/dpo.py --config recipes/configs/smollm2_dpo.yaml \\
        --model_name_or_path path/or/id --dataset_name pairs.jsonl --output_dir runs/mine
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from trl import get_peft_config

from hf_objectives.diagnostics import DiagnosticsCallback, plot_training_metrics
from hf_objectives.labels import encode_pair
from hf_objectives.publishing import push, write_card
from hf_objectives.recipes.alignment_rows import RowArguments, Rows, lm_datasets, split_rows
from hf_objectives.recipes.arguments import parse_config, read_template
from hf_objectives.recipes.plan import check_launch, print_plan, resolve_plan
from hf_objectives.recipes.run import BUILT_IN, RecipeModel, load_policy, on_main, resume_point
from hf_objectives.trainers import PerplexityDPOConfig, PerplexityDPOTrainer

# What the table, the card and results.json say, and what each figure is.
FIGURES = {
    "eval_chosen_perplexity": "perplexity of chosen answers",
    "eval_rejected_perplexity": "perplexity of rejected answers",
    "eval_reference_chosen_perplexity": "  chosen, under the reference",
    "eval_reference_rejected_perplexity": "  rejected, under the reference",
    "eval_rewards/accuracies": "reward accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_logps_change/chosen": "change of chosen, nats per token",
    "eval_logps_change/rejected": "change of rejected, nats per token",
}


@dataclass
class PairArguments(RowArguments):
    """Where the pairs come from, and what is watched beside them."""

    chat_template: str | None = field(default=None, metadata={"help": "A template, or the path of a .jinja file."})
    lm_datasets: str | None = field(
        default=None,
        metadata={"help": "Rows whose perplexity is watched: a mapping of name to file, Hub id or 'builtin' (JSON)."},
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns the held-out figures before and after."""
    (model_config, data, args), origin = parse_config((RecipeModel, PairArguments, PerplexityDPOConfig), argv)
    console = Console(stderr=False, soft_wrap=False)
    check_launch(args)
    set_seed(args.seed)
    model, tokenizer = load_policy(model_config, use_cpu=args.device.type == "cpu")
    if template := read_template(data.chat_template):
        tokenizer.chat_template = template  # saved with the model, so that inference renders what was trained
    pairs, held_out = split_rows(data, seed=args.seed, built_in=(16_000, 400))
    wants_push, args.push_to_hub = args.push_to_hub, False  # pushed at the end, when everything is on disk
    lora = get_peft_config(model_config)
    trainer = PerplexityDPOTrainer(
        model,
        # A copy, since the parent would load the model by its name again; LoRA's reference is the model without it.
        None if lora or args.precompute_ref_log_probs else copy.deepcopy(model),
        args,
        train_dataset=encode(pairs, tokenizer, args),
        eval_dataset=encode(held_out, tokenizer, args) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora,
        eval_lm_datasets=lm_datasets(data.lm_datasets),
    )
    if on_main():
        rows = SimpleNamespace(
            max_length=args.max_length or "as long as they are",
            packing=False,
            overlength="the prompt's beginning goes first",
            train_on=f"{args.train_on}, of both answers",
        )
        print_plan(resolve_plan(args, rows, trainer.model, len(pairs), origin), console)
    measured = trainer.eval_dataset is not None or trainer.lm_evaluation is not None
    before = trainer.evaluate() if measured else {}
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train(resume_from_checkpoint=resume_point(args))
    after = trainer.evaluate() if measured else {}
    trainer.save_model()
    trainer.save_state()
    results = {"before": before, "after": after, "figures": list(FIGURES), "num_pairs": len(pairs)}
    if on_main():
        finish(trainer, results, model_config.model_name_or_path, console)
        if wants_push:
            folder = Path(args.output_dir or ".")
            push(folder, args.hub_model_id, private=bool(args.hub_private_repo), console=console)
    trainer.accelerator.wait_for_everyone()
    return results


def encode(rows: Rows, tokenizer: Any, args: PerplexityDPOConfig) -> Dataset:
    """Pairs as ids; from Python values, so that no Arrow struct mixes the keys of two rows."""
    settings: dict[str, Any] = {
        "max_length": args.max_length,
        "train_on": args.train_on,
        "control_tokens": args.control_tokens,
    }
    encoded = []
    for row in rows:
        pair = encode_pair(tokenizer, row, source=row["source"], row_index=row["row"], **settings)
        encoded.append({**pair, "row": row["row"]})
    return Dataset.from_list(encoded)


def finish(trainer: PerplexityDPOTrainer, results: dict[str, Any], base_model: str | None, console: Console) -> None:
    """Everything on disk, then the table."""
    folder = Path(trainer.args.output_dir or ".")
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    # The Trainer starts a new history when it trains; the first point of the curve is the model as it came.
    history = [{"step": 0, **results["before"]}, *trainer.state.log_history]
    curve = plot_training_metrics(history, folder / "training_curves.png")
    base = None if base_model == BUILT_IN else base_model
    write_card(folder, results=results, base_model=base, data=None, args=trainer.args, objective="dpo")
    print_figures(results["before"], results["after"], console)
    console.print(f"Model, {curve.name}, results.json and README.md are in {folder}", highlight=False)


def print_figures(before: Mapping[str, float], after: Mapping[str, float], console: Console) -> None:
    """The held-out figures, and the perplexity of what was watched with its change."""
    pairs = after.get("eval_num_pairs")
    title = "before and after" if pairs is None else f"{int(pairs):,} held-out pairs, before and after"
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for key, name in FIGURES.items():
        if key in after:
            table.add_row(name, *(_number(metrics.get(key)) for metrics in (before, after)))
        if key == "eval_rewards/accuracies" and key in after:
            table.add_row("  95 % interval", *(_interval(metrics) for metrics in (before, after)))
    end = "_perplexity_increase"
    for key in [key for key in after if key.endswith(end)]:
        name = key.removesuffix(end)
        values = [_number(metrics.get(f"{name}_perplexity")) for metrics in (before, after)]
        table.add_row(f"perplexity of {name.removeprefix('eval_')}", values[0], f"{values[1]} ({after[key]:+.1%})")
    console.print(table)


def _interval(metrics: Mapping[str, float]) -> str:
    return f"{metrics['eval_rewards/accuracies_low']:.3f} to {metrics['eval_rewards/accuracies_high']:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
