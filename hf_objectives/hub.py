"""A model card of measured facts, and a push that cannot lose a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from rich.console import Console

from hf_objectives import __version__

logger = logging.getLogger(__name__)


# Of a run's folder: checkpoints, and the data that it was trained on, which is not ours to publish.
_NOT_PUSHED = ["checkpoint-*", "prepared/*"]


def write_card(
    folder: Path, *, results: Mapping[str, Any], base_model: str | None, data: Any, args: Any, objective: str = "sft"
) -> Path:
    """Write `README.md`: what was trained on how much of what, in which mixture, and the held-out figures before and after.

    `objective` is "sft" or "pretraining", a `base_model` of None stands for random weights.

    The licence is the base model's own card's, where a folder holds one; it is left out otherwise, not invented.
    """
    local = Path(base_model or "")
    made = "Fine-tuned" if objective == "sft" else "Pretrained further"
    made = f"{made} from `{local.name if local.exists() else base_model}`" if base_model else "Pretrained from scratch"
    metadata = ModelCardData(
        base_model=base_model if base_model and not local.exists() and "/" in base_model else None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag="text-generation",
        tags=["hf-objectives", objective],
        license=_licence(local) if base_model else None,
    )
    lines = [
        f"# {folder.name}",
        "",
        f"{made} with hf_objectives {__version__}.",
        "",
    ]
    lines += ["| held out | tokens | before | after |", "|---|---|---|---|"]
    for key, after in results["after"].items():
        if key.endswith("_perplexity"):
            tokens = results["after"].get(key.replace("_perplexity", "_num_tokens"), "")
            before = results["before"].get(key)
            lines.append(f"| {key.removeprefix('eval_')} | {tokens} | {_number(before)} | {_number(after)} |")
    lines += ["", "| source | rows | tokens | trained | dropped |", "|---|---|---|---|---|"]
    for source, account in results["ledger"].items():
        dropped = sum(account["dropped_tokens"].values())
        lines.append(f"| {source} | {account['rows_in']} | {account['tokens_in']} | {account['trained']} | {dropped} |")
    if mixture := results.get("mixture"):
        lines += ["", f"| source | asked, {mixture['unit']} | given | tokens | epochs |", "|---|---|---|---|---|"]
        for one in mixture["sources"]:
            shares = f"{one['asked']:.2%} | {one['share']:.2%}"
            lines.append(f"| {one['name']} | {shares} | {one['tokens']} | {one['epochs']:.2f} |")
    settings = {
        "max_length": data.max_length,
        "packing": data.packing,
        "overlength": data.overlength,
        "train_on": data.train_on,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
    }
    lines += [
        "",
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
    path.write_text(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines))
    return path


def push(folder: Path, repo_id: str | None, *, private: bool, console: Console) -> bool:
    """Upload a finished run; a failure is said with the line to try again, and costs nothing but the upload.

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


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.exists():
        return None
    return ModelCard.load(card).data.to_dict().get("license")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
