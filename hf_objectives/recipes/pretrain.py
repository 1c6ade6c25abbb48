"""Pretrain a language model, from random weights or further, and report bits per byte and perplexity per source.

    accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_quickstart.yaml
    accelerate launch recipes/pretrain.py --prepared corpus --model_name_or_path path/or/id --max_tokens 1_000_000_000 \\
        --lr_scheduler_type warmup_stable_decay --output_dir runs/further
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_objectives import DataCollatorWithEosPacking, DiagnosticsCallback, demo
from hf_objectives.distributed import world_size
from hf_objectives.errors import ConfigError
from hf_objectives.mixture import DatasetMixture, build_mixture
from hf_objectives.preparation import CorpusSettings, Manifest, OrderedStream, load_prepared, prepare_corpus
from hf_objectives.recipes.arguments import named_sources, parse_config
from hf_objectives.recipes.mixture_rows import HELP, of_folder, read_mixture
from hf_objectives.recipes.plan import check_launch, print_plan, resolve_plan
from hf_objectives.recipes.preview import highlight
from hf_objectives.recipes.run import (
    BUILT_IN,
    RecipeModel,
    finish,
    for_report,
    load_model,
    on_main,
    print_mixture,
    resume_point,
)
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments

_WSD = "warmup_stable_decay"


@dataclass
class PretrainModel(RecipeModel):
    """The model: a checkpoint to go on from, or a configuration whose weights are drawn at random."""

    model_config: str | None = field(
        default=None, metadata={"help": "From scratch: a config.json, or a mapping with model_type (JSON)."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer of a model from scratch."})


@dataclass
class PretrainData(CorpusSettings):
    """The data: a prepared folder, or raw sources that are prepared first."""

    eval_share: float = field(default=0.01, metadata={"help": "Share of the documents that is held out."})
    prepared: str | None = field(default=None, metadata={"help": "A folder made by hf-objectives prepare."})
    dataset_name: str | None = field(default=None, metadata={"help": "A path, a glob, a Hub id or 'builtin'."})
    sources: str | None = field(default=None, metadata={"help": "A mapping of names to paths or mappings (JSON)."})
    mixture: str | None = field(default=None, metadata={"help": HELP})
    prepared_dir: str | None = field(default=None, metadata={"help": "Where raw sources are prepared."})
    streaming: bool = field(default=False, metadata={"help": "Stream the shards instead of mapping them."})
    isolate_documents: bool = field(default=True, metadata={"help": "No document sees another of its row."})
    packing = True  # what the plan and the model card say

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prepared and not (self.mixture and not self.dataset_name and not self.sources):
            self.named_sources()
        elif self.prepared and (self.dataset_name or self.sources):
            raise ConfigError("give prepared, or dataset_name or sources, not both")

    def named_sources(self) -> Mapping[str, Any]:
        """Raw sources by name."""
        return named_sources(self.sources, self.dataset_name)

    @property
    def is_mixture_alone(self) -> bool:
        """Whether a mixture says where its sources are."""
        return not (self.prepared or self.dataset_name or self.sources)


@dataclass
class PretrainArguments(PerplexityTrainingArguments):
    """How long to train, and how the learning rate ends."""

    max_tokens: int | None = field(default=None, metadata={"help": "Tokens to train on, instead of steps or epochs."})
    decay_share: float = field(
        default=0.2, metadata={"help": "Last share of the steps, over which warmup_stable_decay decays."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and (self.max_tokens < 1 or self.max_steps > 0):
            raise ConfigError(
                f"max_tokens is {self.max_tokens} and max_steps {self.max_steps}; expected one of the two, above 0"
            )
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"decay_share is {self.decay_share}; expected more than 0, at most 1")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns the held-out metrics before and after."""
    classes = (PretrainModel, PretrainData, PretrainArguments)
    (model_config, data, args), origin = parse_config(classes, argv)
    console = Console(stderr=False, soft_wrap=False)
    check_launch(args)
    set_seed(args.seed)
    model, tokenizer = build_model(model_config, args)
    loaded = load(data, tokenizer, args, origin)
    set_length(args, loaded)
    if args.max_tokens is not None:
        origin = {**origin, "max_steps": f"max_tokens, {origin['max_tokens']}"}
    collator = DataCollatorWithEosPacking(
        tokenizer, max_length=data.max_length, isolate_documents=data.isolate_documents
    )
    if on_main():
        print_plan(resolve_plan(args, data, model, loaded.num_rows, origin), console)
        first_look(next(iter(loaded.train)), collator, loaded, console)
        for_report(args, data, model_config)
    wants_push, args.push_to_hub = args.push_to_hub, False  # pushed at the end, when everything is on disk
    trainer = PerplexityTrainer(
        model, args, collator, train_dataset=loaded.train, eval_dataset=loaded.held_out, processing_class=tokenizer
    )
    trainer.add_callback(DiagnosticsCallback(trainer))
    before = trainer.evaluate() if loaded.held_out is not None else {}
    trainer.train(resume_from_checkpoint=resume_point(args))
    after = trainer.evaluate() if loaded.held_out is not None else {}
    trainer.save_model()
    trainer.save_state()
    results = {"before": before, "after": after, "ledger": ledger(loaded.manifest) if loaded.manifest else {}}
    if isinstance(loaded.train, DatasetMixture):
        report = loaded.train.report(trainer.rows_taken)
        results["mixture"] = report.to_dict()
    if on_main():
        if isinstance(loaded.train, DatasetMixture):
            print_mixture(report, trainer, console)
        base = None if model_config.model_config else model_config.model_name_or_path
        finish(trainer, results, base, data, console, wants_push, objective="pretraining")
    trainer.accelerator.wait_for_everyone()
    return results


def build_model(config: PretrainModel, args: Any) -> tuple[Any, Any]:
    """Model and tokenizer: those of a checkpoint, or random weights of a configuration.

    Raises:
        ConfigError: no model, a configuration that names none, or one whose vocabulary is smaller than the tokenizer's.
    """
    if not config.model_config:
        return load_model(config, use_cpu=args.device.type == "cpu")
    name = config.tokenizer_name or config.model_name_or_path
    if not name:
        raise ConfigError(
            "tokenizer_name is missing; a model from scratch needs a tokenizer (a Hub id, folder or 'builtin')"
        )
    tokenizer: Any = demo.build_tokenizer() if name == BUILT_IN else AutoTokenizer.from_pretrained(name)
    given = config.model_config
    if given.lstrip().startswith("{"):
        values = json.loads(given)
        if "model_type" not in values:
            raise ConfigError("model_config names no model_type; expected 'llama', say, beside its sizes")
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        settings = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **values})
    else:
        settings = AutoConfig.from_pretrained(given)
    if settings.get_text_config().vocab_size < len(tokenizer):
        raise ConfigError(
            f"the model's vocabulary has {settings.get_text_config().vocab_size} ids, the tokenizer {len(tokenizer)}; "
            "raise vocab_size, or use the tokenizer that the configuration was made for"
        )
    settings.use_cache = True
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, **attention), tokenizer


@dataclass
class Loaded:
    """What a run reads.

    Attributes:
        train: rows to train on: mapped, a stream, or a mixture.
        held_out: rows to evaluate on, or None.
        num_rows, num_tokens: rows to train on and their tokens; of an endless one, of its first thousands.
        manifest: of the prepared folder, where there is one.
    """

    train: Any
    held_out: Any
    num_rows: int
    num_tokens: int
    manifest: Manifest | None


def load(data: PretrainData, tokenizer: Any, args: Any, origin: Mapping[str, str]) -> Loaded:
    """The data of a run.

    Raises:
        ConfigError: a mixture that cannot be.
        PreparedDataError: a folder made with another tokenizer or under other settings than this run's.
    """
    if data.is_mixture_alone:
        alone = {"packing": "within", "max_length": data.max_length, **(read_mixture(data.mixture, {}) or {})}
        mixture = build_mixture(alone, tokenizer=tokenizer, seed=args.seed)
        return Loaded(mixture, mixture.eval_dataset, *mixture.first_rows(), None)
    folder, manifest = prepare(data, tokenizer, args, origin)
    named = dict.fromkeys(manifest.sources) if data.prepared else data.named_sources()
    settings = read_mixture(data.mixture, named)
    held_out = load_prepared(folder, "validation") if any(s.split == "validation" for s in manifest.shards) else None
    if settings is not None:
        mixture = of_folder(settings, folder, tokenizer, args.seed)
        return Loaded(mixture, held_out, *mixture.first_rows(), manifest)
    train = [shard for shard in manifest.shards if shard.split == "train"]
    rows, tokens = sum(shard.rows for shard in train), sum(shard.tokens for shard in train)
    return Loaded(load_prepared(folder, streaming=data.streaming, seed=args.seed), held_out, rows, tokens, manifest)


def prepare(data: PretrainData, tokenizer: Any, args: Any, origin: Mapping[str, str]) -> tuple[Path, Manifest]:
    """The prepared folder and its manifest; raw sources are prepared by one process, the others wait on its lock.

    Raises:
        PreparedDataError: a folder made with another tokenizer or under other settings than this run's.
    """
    if data.prepared:
        folder = Path(data.prepared)
        asked = {f.name for f in fields(CorpusSettings)} & {
            name for name, source in origin.items() if source != "default"
        }
        expect = {name: getattr(data, name) for name in asked - {"num_proc", "engine", "on_error", "labels"}}
        load_prepared(folder, tokenizer=tokenizer, expect={"max_length": data.max_length, **expect})
        return folder, Manifest.read(folder)
    folder = Path(data.prepared_dir or Path(args.output_dir) / "prepared")
    sources: dict[str, Any] = dict(data.named_sources())
    for name, where in sources.items():
        if where == BUILT_IN:
            sources[name] = Dataset.from_list(demo.texts(20_000, seed=args.seed))
    settings = CorpusSettings(**{f.name: getattr(data, f.name) for f in fields(CorpusSettings)})
    return folder, prepare_corpus(sources, tokenizer, folder, settings)


def set_length(args: Any, loaded: Loaded) -> None:
    """Turn tokens into steps, and give the schedule its decay.

    Raises:
        ConfigError: a stream without an end.
    """
    rows, endless = loaded.num_rows, isinstance(loaded.train, OrderedStream)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size()
    if args.max_tokens is not None:
        args.max_steps = max(1, -(-args.max_tokens * rows // (loaded.num_tokens * batch)))
    if endless and args.max_steps <= 0:
        raise ConfigError("a stream has no length; say how long with max_tokens (or max_steps)")
    if args.lr_scheduler_type.value == _WSD:
        steps = args.max_steps if args.max_steps > 0 else -(-rows // batch) * int(args.num_train_epochs)
        given = dict(args.lr_scheduler_kwargs or {})
        args.lr_scheduler_kwargs = {"num_decay_steps": max(1, round(steps * args.decay_share)), **given}


def first_look(row: Mapping[str, Any], collator: Any, loaded: Loaded, console: Console) -> None:
    """The begin of a packed row with its trained tokens marked, and what became of every token."""
    batch = collator([row])
    console.rule("A packed row (trained tokens marked)", align="left")
    shown = [batch[name][0, :200].tolist() for name in ("input_ids", "labels")]
    console.print(highlight(collator.tokenizer, *shown, brackets=not console.is_terminal))
    for line in loaded.manifest.lines() if loaded.manifest else loaded.train.notes:
        console.print(line, highlight=False, markup=False)


def ledger(manifest: Manifest) -> dict[str, Any]:
    """The manifest's accounts as the model card reads them."""
    return {
        name: {
            "rows_in": account.rows_in,
            "tokens_in": account.tokens_in,
            "trained": manifest.ledgers["train"][name].trained,
            "dropped_tokens": dict(account.dropped_tokens),
        }
        for name, account in manifest.sources.items()
    }
