"""A model card of measured facts, and a push that cannot lose a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from rich.console import Console

from hf_objectives import __version__

# What a run of each objective did to its base model, and the task of the result.
_MADE = {
    "sft": ("Fine-tuned", "text-generation"),
    "pretraining": ("Pretrained further", "text-generation"),
    "dpo": ("Aligned with preference pairs (DPO)", "text-generation"),
    "reward": ("A reward model, trained on preference pairs", "text-classification"),
    "ppo": ("Trained by reward (PPO)", "text-generation"),
    "rloo": ("Trained by reward (RLOO)", "text-generation"),
    "grpo": ("Trained by reward (GRPO)", "text-generation"),
    "distill": ("Trained on a teacher's distributions (distillation)", "text-generation"),
}
_SETTINGS = (
    *("max_length", "packing", "overlength", "train_on", "max_completion_length", "loss_type", "beta", "lmbda"),
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)
# Files of a run's folder that are not pushed: checkpoints, and the training data, which is not ours to publish.
_NOT_PUSHED = ["checkpoint-*", "_tmp-checkpoint-*", "prepared/*", "ref/*"]


def write_card(
    folder: Path, *, results: Mapping[str, Any], base_model: str | None, data: Any, args: Any, objective: str = "sft"
) -> Path:
    """Write `README.md`: the tokens that were trained, the mixture, and the held-out figures before and after.

    The licence is that of the base model's card, where a local folder has one. Otherwise the card names none.

    Args:
        folder: the folder of the run.
        results: the metrics `before` and `after`; `figures` names those that are shown beside perplexities; `ledger` and
            `mixture` are shown where they are there, and so is the `teacher`, a folder or a Hub id.
        base_model: the model that was trained, a folder or a Hub id; None for random weights.
        data, args: the settings of the run.
        objective: a key of `_MADE`.
    """
    local = Path(base_model or "")
    made, task = _MADE[objective]
    made = f"{made} from `{_shown(base_model)}`" if base_model else "Pretrained from scratch"
    if teacher := results.get("teacher"):
        made += f", teacher `{_shown(teacher)}`,"
    metadata = ModelCardData(
        base_model=base_model if base_model and not local.exists() and "/" in base_model else None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag=task,
        tags=["hf-objectives", objective],
        license=_licence(local) if base_model else None,
    )
    chosen = [(name, holder) for name in _SETTINGS for holder in (data, args) if hasattr(holder, name)]
    settings = {name: getattr(holder, name) for name, holder in chosen}
    lines = [f"# {folder.name}", "", f"{made} with hf_objectives {__version__}.", "", *_tables(results), ""]
    lines += [
        "Settings:",
        "",
        "```json",
        json.dumps(settings, indent=1),
        "```",
        "",
        "![curves](training_curves.png)",
        "",
    ]
    path = folder / "README.md"
    path.write_text(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines), encoding="utf-8")
    return path


def _tables(results: Mapping[str, Any]) -> list[str]:
    """The figures, the ledger and the mixture of a run as tables of Markdown."""
    lines = ["| held out | tokens | before | after |", "|---|---|---|---|"]
    for key, after in results["after"].items():
        if key.endswith("_perplexity") or key in results.get("figures", ()):
            tokens = results["after"].get(f"{key.removesuffix('_perplexity')}_num_tokens", "")
            before = results["before"].get(key)
            lines.append(f"| {key.removeprefix('eval_')} | {tokens} | {_number(before)} | {_number(after)} |")
    if ledger := results.get("ledger"):
        lines += ["", "| source | rows | tokens | trained | dropped |", "|---|---|---|---|---|"]
        for source, account in ledger.items():
            dropped = sum(account["dropped_tokens"].values())
            cells = (source, account["rows_in"], account["tokens_in"], account["trained"], dropped)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if mixture := results.get("mixture"):
        lines += ["", f"| source | asked, {mixture['unit']} | given | tokens | epochs |", "|---|---|---|---|---|"]
        for entry in mixture["sources"]:
            shares = f"{entry['asked']:.2%} | {entry['share']:.2%}"
            lines.append(f"| {entry['name']} | {shares} | {entry['tokens']} | {entry['epochs']:.2f} |")
    return lines


def push(folder: Path, repo_id: str | None, *, private: bool, console: Console) -> bool:
    """Upload a finished run. A failure is printed with the command that tries again; the run on disk stays as it is.

    Returns:
        Whether the run is on the Hub.
    """
    name = repo_id or folder.name
    retry = f"hf upload {name} {folder} " + " ".join(f"--exclude '{pattern}'" for pattern in _NOT_PUSHED)
    try:
        api = HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, ignore_patterns=_NOT_PUSHED)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        console.print(
            f"The push failed ({error}). The run is whole in {folder}; try again with\n  {retry}", highlight=False
        )
        return False
    console.print(f"Pushed to {url}", highlight=False)
    return True


def _shown(model: str) -> str:
    """The name of a model: of a local folder its last part alone."""
    return Path(model).name if Path(model).exists() else model


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    return ModelCard.load(card).data.to_dict().get("license") if card.exists() else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
