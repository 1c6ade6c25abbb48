"""What the recipes share: arguments, model and tokenizer, data, summary, and the end of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_objectives import __version__, demo
from hf_objectives.diagnostics import plot_mixture, plot_training_metrics
from hf_objectives.distributed import leave_group, rank
from hf_objectives.errors import ConfigError, HFObjectivesError
from hf_objectives.inspection import save_environment
from hf_objectives.labels import Ledger
from hf_objectives.mixture import MixtureReport
from hf_objectives.preparation import (
    exclusive,
    hold_out,
    is_hub_id,
    list_files,
    load_rows,
    prepare_dataset,
    tokenizer_digest,
)
from hf_objectives.publishing import push, write_card
from hf_objectives.recipes.arguments import named_sources, read_template
from hf_objectives.recipes.mixture_rows import HELP, read_mixture
from hf_objectives.recipes.preview import mixture_table

logger = logging.getLogger(__name__)
BUILT_IN = "builtin"
_READY, _SPLITS = "ready.pickle", ("train", "evaluation")


@dataclass
class DataArguments:
    """Where rows come from and how they become tokens."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, a .json/.jsonl/.parquet/.txt file, or 'builtin'."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    sources: str | None = field(
        default=None,
        metadata={"help": "Several named sources, a mapping of name to dataset_name, or to a mapping (JSON)."},
    )
    mixture: str | None = field(default=None, metadata={"help": HELP})
    eval_share: float = field(default=0.1, metadata={"help": "Share of each source that is held out."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row."})
    packing: bool = field(default=True, metadata={"help": "Pack several documents into a row."})
    strategy: str = field(default="best_fit", metadata={"help": "best_fit or concat."})
    overlength: str = field(default="drop", metadata={"help": "drop, split_turns or cut."})
    train_on: str = field(default="assistant", metadata={"help": "assistant, last_assistant or all."})
    control_tokens: str = field(default="plain", metadata={"help": "plain or allow."})
    expand_turns: bool = field(default=False, metadata={"help": "One row per user turn."})
    chat_template: str | None = field(default=None, metadata={"help": "A template, or the path of a .jinja file."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare data."})

    def __post_init__(self) -> None:
        read_mixture(self.mixture, self.named_sources())

    def named_sources(self) -> Mapping[str, Any]:
        """Source names and where each is."""
        return named_sources(self.sources, self.dataset_name)


@dataclass
class RecipeModel(ModelConfig):
    """TRL's model arguments; `model_name_or_path: builtin` is the tiny model of the built-in corpus."""


def load_model(config: ModelConfig, *, use_cpu: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer.

    Raises:
        ConfigError: no model was named, or a 4-bit one for a CPU.
    """
    if not config.model_name_or_path:
        raise ConfigError("model_name_or_path is missing; give a Hub id, a folder, or 'builtin'")
    if config.model_name_or_path == BUILT_IN:
        built = demo.build_tokenizer()
        return demo.build_model(built), built
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model_name_or_path, revision=config.model_revision)
    if config.load_in_4bit and use_cpu:
        raise ConfigError(
            "load_in_4bit on a CPU: bitsandbytes packs weights for evaluation there, and writing a checkpoint after it "
            "leaves them wrong without an error (seen with 0.50.2); use a GPU, or leave it off"
        )
    quantization = get_quantization_config(config)
    # transformers loads the checkpoint's dtype; weights that an optimizer moves want float32 unless asked otherwise.
    dtype = "float32" if config.dtype in (None, "auto") and not config.use_peft else config.dtype or "auto"
    model = AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path,
        revision=config.model_revision,
        attn_implementation=config.attn_implementation,
        dtype=torch.float32 if use_cpu and config.dtype in (None, "auto") else dtype,
        quantization_config=quantization,
    )
    return model, tokenizer


def load_policy(config: ModelConfig, *, use_cpu: bool = False) -> tuple[Any, Any]:
    """`load_model`; an adapter that fine-tuning with LoRA left becomes part of the weights, which are all trained then."""
    name = config.model_name_or_path
    adapter = None if not name or name == BUILT_IN else find_adapter_config_file(name, revision=config.model_revision)
    if not name or adapter is None:
        return load_model(config, use_cpu=use_cpu)
    from peft import PeftModel

    base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
    model, _ = load_model(replace(config, model_name_or_path=base, model_revision="main"), use_cpu=use_cpu)
    model = PeftModel.from_pretrained(model, name).merge_and_unload()
    return model.requires_grad_(True), AutoTokenizer.from_pretrained(name)  # PEFT froze what was beneath the adapter


def with_lora(model: Any, config: ModelConfig, *, gradient_checkpointing: bool) -> Any:
    """The model with the adapters that TRL's flags ask for, or as it is."""
    lora = get_peft_config(config)
    if lora is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if config.load_in_4bit or config.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    elif gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, lora)


@dataclass
class Prepared:
    """Encoded data: rows to train on and to evaluate on, a few before packing, and the ledgers."""

    train: Any
    evaluation: Any
    examples: list[dict[str, Any]]
    ledger: Ledger

    def save(self, folder: Path) -> None:
        """Write it; `_READY` last, so that it is whole or not there."""
        for name in _SPLITS:
            if (rows := getattr(self, name)) is not None:
                rows.save_to_disk(str(folder / name))
        draft = folder / f"{_READY}.draft"
        draft.write_bytes(pickle.dumps((self.examples, self.ledger)))
        draft.replace(folder / _READY)

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """What `save` wrote, its rows mapped from disk."""
        examples, ledger = pickle.loads((folder / _READY).read_bytes())
        train, evaluation = (
            load_from_disk(str(folder / name)) if (folder / name).exists() else None for name in _SPLITS
        )
        return cls(train, evaluation, examples, ledger)


def prepare(data: DataArguments, tokenizer: Any, *, seed: int, output_dir: str) -> Prepared:
    """Load, split, encode and pack every source; in a launch of several processes once, in a folder of the run, while the
    others wait on its lock."""
    if template := read_template(data.chat_template):
        tokenizer.chat_template = template  # saved with the model, so that inference renders what was trained
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _prepare(data, tokenizer, seed=seed)
    # Weights change no token.
    of_rows = {name: where_of(about) for name, about in data.named_sources().items()}
    settings = {**asdict(data), "num_proc": None, "chat_template": tokenizer.chat_template, "sources": of_rows}
    settings["mixture"] = is_mixed(data)
    versions = [_version(where, data.dataset_split) for where in of_rows.values()]
    about = [settings, seed, tokenizer_digest(tokenizer), versions]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(output_dir) / "prepared" / key
    with exclusive(folder, lambda: "encoding rows"):
        if not (folder / _READY).exists():
            _prepare(data, tokenizer, seed=seed).save(folder)
    return Prepared.load(folder)


def _version(where: str, split: str) -> Any:
    """What changes when the rows of a source do."""
    if where == BUILT_IN:
        return __version__
    if is_hub_id(where):
        return load_rows(where, split=split)._fingerprint  # type: ignore[union-attr]
    stats = {file: Path(file).stat() for file in list_files(where)}
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]


def _prepare(data: DataArguments, tokenizer: Any, *, seed: int) -> Prepared:
    """Load, split, encode and pack every source."""
    train: list[Mapping[str, Any]] = []
    held_out: list[Mapping[str, Any]] = []
    for name, about in data.named_sources().items():
        where = where_of(about)
        if where == BUILT_IN:
            train += demo.chats(14_000, seed=seed)
            held_out += demo.chats(400, seed=seed, split="test")
            continue
        rows = load_rows(where, split=data.dataset_split)
        keep, out = hold_out(rows, data.eval_share, seed=seed)
        train += [{**rows[i], "source": name, "row": i} for i in keep]
        held_out += [{**rows[i], "source": name, "row": i} for i in out]
    settings: dict[str, Any] = {
        "max_length": data.max_length,
        "overlength": data.overlength,
        "train_on": data.train_on,
        "control_tokens": data.control_tokens,
        "expand_turns": data.expand_turns,
    }
    ledger = Ledger()
    packed: dict[str, Any] = {"packing": data.packing, "strategy": data.strategy, "num_proc": data.num_proc}
    # A mixture packs the documents that it draws.
    for_train = {**packed, "packing": data.packing and not is_mixed(data)}
    trained_rows = prepare_dataset(train, tokenizer, **settings, **for_train, ledger=ledger)
    few = prepare_dataset(train[:64] + train[-64:], tokenizer, **settings, packing=False)
    evaluation = prepare_dataset(held_out, tokenizer, **settings, **packed) if held_out else None
    return Prepared(trained_rows, evaluation, list(few), ledger)


def is_mixed(data: DataArguments) -> bool:
    """Whether the rows to train on are a mixture's."""
    return read_mixture(data.mixture, data.named_sources()) is not None


def where_of(source: Any) -> str:
    """Where a source is: a path, or the path of a mapping.

    Raises:
        ConfigError: neither.
    """
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, str):
        raise ConfigError(f"a source is {source!r}; expected a path, or a mapping with path (and weight, max_epochs)")
    return path


def resume_point(args: Any) -> str | None:
    """The checkpoint to go on from: the one named, or the newest for `--resume_from_checkpoint true`.

    Raises:
        ConfigError: there is none.
    """
    asked = args.resume_from_checkpoint
    if asked in (None, "", "false", "False", False):
        return None
    if asked not in ("true", "True", True):
        return str(asked)
    found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if found is None:
        raise ConfigError(f"no checkpoint to resume from in {args.output_dir}")
    return found


def for_report(*settings: Any) -> None:
    """Settings, versions and machine beside the run, for `hf-objectives report`; the first has the output folder."""
    save_environment(Path(settings[0].output_dir) / "environment.json", settings)


def finish(
    trainer: Any,
    results: dict[str, Any],
    base_model: str | None,
    data: Any,
    console: Console,
    wants_push: bool,
    *,
    objective: str = "sft",
) -> None:
    """Everything on disk, then the table, then the network."""
    folder = Path(trainer.args.output_dir or ".")
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    # The Trainer starts a new history when it trains; the first point of the curve is the model as it came.
    history = [{"step": 0, **results["before"]}, *trainer.state.log_history]
    curve = plot_training_metrics(history, folder / "training_curves.png")
    write_card(folder, results=results, base_model=base_model, data=data, args=trainer.args, objective=objective)
    if results["after"]:
        bits = objective == "pretraining"  # what compares models of different tokenizers
        print_summary(results["before"], results["after"], console, per_source_bits=bits)
    console.print(f"Model, {curve.name}, results.json and README.md are in {folder}", highlight=False)
    if wants_push:
        push(folder, trainer.args.hub_model_id, private=bool(trainer.args.hub_private_repo), console=console)


def print_summary(
    before: Mapping[str, float], after: Mapping[str, float], console: Console, *, per_source_bits: bool = False
) -> None:
    """Held-out figures before and after, in all and per source."""
    table = Table(title="Held out, before and after", title_justify="left", header_style="bold")
    for column, justify in (("", "left"), ("tokens", "right"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    sources = sorted(key[5:-11] for key in after if key.startswith("eval_") and key.endswith("_perplexity"))
    for name, prefix in [("perplexity", "eval"), *((f"perplexity, {s}", f"eval_{s}") for s in sources if s)]:
        table.add_row(
            name,
            f"{int(after[f'{prefix}_num_tokens']):,}",
            _figure(before.get(f"{prefix}_perplexity")),
            _figure(after[f"{prefix}_perplexity"]),
        )
    for key, name in (
        ("eval_bits_per_byte", "bits per byte"),
        *((f"eval_{s}_bits_per_byte", f"bits per byte, {s}") for s in sources if s and per_source_bits),
        ("eval_stop_probability", "probability of stopping at a turn's end"),
        ("eval_exact_match", "exact match"),
    ):
        if key in after:
            table.add_row(name, "", _figure(before.get(key)), _figure(after[key]))
    console.print(table)


def print_mixture(report: MixtureReport, trainer: Any, console: Console) -> None:
    """What each source was to give and gave, and a picture of it over the run."""
    console.print(mixture_table(report))
    folder = Path(trainer.args.output_dir or ".")
    plot_mixture(trainer.state.log_history, folder / "mixture.png")


def _figure(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}" if value < 1e6 else f"{value:.2e}"


def on_main() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0 and int(os.environ.get("LOCAL_RANK", "0")) == 0


def run_program(main: Callable[[], Any]) -> None:
    """Run a recipe as a program: our own errors end it with one line, and the process group is left in order."""
    try:
        main()
    except HFObjectivesError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    finally:
        leave_group()
