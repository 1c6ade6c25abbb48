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
CARD, EVALUATED = "README.md", "evaluated.json"
CARD_FILES = (CARD, "results.json", EVALUATED, "training.yaml", "training_curves.png", "mixture.png")


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


def checkpoint_files(folder: Path) -> list[str]:
    """What a resume needs of a checkpoint, of all ranks: the files that its manifest lists, and the manifest."""
    listed = parse_json((folder / MANIFEST).read_bytes())["files"]
    return sorted([MANIFEST, *listed])
