"""What of a run's folder goes to the Hub: files by their names, never what happens to lie there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hf_objectives.trainers.checkpoints import MANIFEST
from hf_objectives.types import parse_json

#: Weights or adapter, configs, tokenizer and template. safetensors alone: other formats of weights can run code.
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "processor_config.json", "preprocessor_config.json"),
)
#: The card and what it rests on.
CARD, RESULTS, EVALUATED = "README.md", "results.json", "evaluated.json"
CARD_FILES = (CARD, RESULTS, EVALUATED, "training.yaml", "training_curves.png", "mixture.png")
#: What a run needs to go on from a checkpoint, beside the model.
RESUME_FILES = (
    *(MANIFEST, "trainer_state.json", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_[0-9]*.pth"),
    *("optimizer.pt", "optimizer.bin", "optimizer_0/*", "pytorch_model_fsdp_0/*", "latest", "global_step*/*"),
)


def listed_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    """The files of a folder that patterns name, as paths from there, sorted; symbolic links are left out."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def model_files(folder: Path) -> list[str]:
    """The files of the model in a folder, with the code that its config names."""
    config = folder / "config.json"
    named = parse_json(config.read_bytes()).get("auto_map", {}) if config.is_file() else {}
    modules = {str(name).split("--")[-1].split(".")[0] + ".py" for name in named.values() if isinstance(name, str)}
    return listed_files(folder, (*MODEL_FILES, *modules))
