"""Pretrain a language model, from random weights or further, and report bits per byte and perplexity per source.

    accelerate launch recipes/pretrain.py --config pretrain_quickstart
    accelerate launch recipes/pretrain.py --prepared corpus --model_name_or_path path/or/id --max_tokens 1_000_000_000 \\
        --lr_scheduler_type warmup_stable_decay --output_dir runs/further
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from hf_objectives.collators import DataCollatorWithEosPacking
from hf_objectives.distributed import world_size
from hf_objectives.errors import ConfigError
from hf_objectives.mixture import build_mixture
from hf_objectives.preparation import CorpusSettings, Manifest, OrderedStream, Place, load_prepared, prepare_corpus
from hf_objectives.recipes.arguments import BUILT_IN, DEFAULT, named_sources
from hf_objectives.recipes.built_in import built_in_rows, is_built_in
from hf_objectives.recipes.data import (
    digest_of_mixture,
    digest_of_stream,
    mix_folder,
    sha256,
)
from hf_objectives.recipes.data_arguments import MIXTURE_HELP, read_mixture
from hf_objectives.recipes.harness import HarnessArguments
from hf_objectives.recipes.models import PretrainModel, load_or_draw
from hf_objectives.recipes.preview import figures_table, print_example
from hf_objectives.recipes.run import Recipe
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments
from hf_objectives.types import option

_WSD = "warmup_stable_decay"


@dataclass
class PretrainData(CorpusSettings, HarnessArguments):
    """The data: a prepared folder, or raw sources that are prepared first."""

    eval_share: float = option(0.01, "Share of the documents that is held out.")
    prepared: str | None = option(None, "A folder made by hf-objectives prepare.")
    dataset_name: str | None = option(None, "A path, a glob, a Hub id or 'builtin'.")
    sources: str | None = option(None, "A mapping of names to paths or mappings (JSON).")
    mixture: str | None = option(None, MIXTURE_HELP)
    prepared_dir: str | None = option(None, "Where raw sources are prepared.")
    streaming: bool = option(False, "Stream the shards instead of mapping them.")
    isolate_documents: bool = option(True, "No document sees another of its row.")
    packing = True  # what the plan and the model card say

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prepared and (self.dataset_name or self.sources):
            raise ConfigError("give prepared, or dataset_name or sources, not both")
        if not self.prepared and not (self.mixture and self.is_mixture_alone):
            self.named_sources()

    def named_sources(self) -> Mapping[str, Any]:
        """Raw sources by name."""
        return named_sources(self.sources, self.dataset_name)

    @property
    def is_mixture_alone(self) -> bool:
        """Whether only a mixture can say where its sources are."""
        return not (self.prepared or self.dataset_name or self.sources)


@dataclass
class PretrainArguments(PerplexityTrainingArguments):
    """How long to train, and how the learning rate ends."""

    max_tokens: int | None = option(None, "Tokens to train on, instead of steps or epochs.")
    decay_share: float = option(0.2, "Last share of the steps, over which warmup_stable_decay decays.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and (self.max_tokens < 1 or self.max_steps > 0):
            raise ConfigError(
                f"max_tokens is {self.max_tokens} and max_steps {self.max_steps}; expected one of the two, above 0"
            )
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"decay_share is {self.decay_share}; expected more than 0, at most 1")


class Pretrain(Recipe):
    """Pretraining."""

    arguments = (PretrainModel, PretrainData, PretrainArguments)
    objective = "pretraining"
    of_model_alone = r"eval_(?!runtime|model_preparation_time|\w+_per_second).+"
    figures: ClassVar[dict[str, str]] = {}
    manifest: Manifest | None = None  # of the prepared folder, where there is one
    held_out: Any = None
    num_tokens = 0  # of `num_rows` rows to train on

    def build_trainer(self) -> PerplexityTrainer:
        """Load the model and the data, and turn tokens into steps."""
        data, args = self.data, self.args
        model, tokenizer = load_or_draw(self.model_config, **self.loading)
        self.load_rows(tokenizer)
        set_length(args, self.num_rows, self.num_tokens, endless=isinstance(self.train_rows, OrderedStream))
        if args.max_tokens is not None:
            self.origin = {**self.origin, "max_steps": f"max_tokens, {self.origin['max_tokens']}"}
        self.collator = DataCollatorWithEosPacking(
            tokenizer, max_length=data.max_length, isolate_documents=data.isolate_documents, train_on="all"
        )
        return PerplexityTrainer(
            *(model, args, self.collator),
            train_dataset=self.train_rows,
            eval_dataset=self.held_out,
            processing_class=tokenizer,
        )

    def load_rows(self, tokenizer: Any) -> None:
        """Load rows to train on (mapped, a stream, or a mixture) and rows held out."""
        data, seed = self.data, self.args.seed
        if data.is_mixture_alone:
            settings = {"packing": "within", "max_length": data.max_length, **(read_mixture(data.mixture, {}) or {})}
            self.mixture = build_mixture(settings, tokenizer=tokenizer, seed=seed)
            self.held_out = self.mixture.eval_dataset
            content: Any = digest_of_mixture(settings)
        else:
            folder = Path(data.prepared or data.prepared_dir or Path(self.args.output_dir) / "prepared")
            if not self.reads_again:
                prepare(data, tokenizer, seed, folder, self.origin)
            self.manifest = manifest = Manifest.read(folder)
            self.results["ledger"] = ledger(manifest)
            sources = dict.fromkeys(manifest.named) if data.prepared else data.named_sources()
            has_held_out = any(shard.split == "validation" for shard in manifest.shards)
            self.held_out = load_prepared(folder, "validation") if has_held_out else None
            shards = [shard for shard in manifest.shards if shard.split == "train"]
            content = [shard.sha256 for shard in shards]
            weights = read_mixture(data.mixture, sources)
            if weights is None:
                self.num_rows, self.num_tokens = sum(s.rows for s in shards), sum(s.tokens for s in shards)
                self.train_rows = load_prepared(folder, streaming=data.streaming, seed=seed)
                streams = isinstance(self.train_rows, OrderedStream)
                self.rows_digest = digest_of_stream(self.train_rows, content, seed) if streams else sha256(content)
                return
            self.mixture = mix_folder(weights, folder, tokenizer, seed)
        self.train_rows = self.mixture
        self.rows_digest = digest_of_stream(self.mixture, content, seed)
        self.num_rows, self.num_tokens = self.mixture.first_rows()  # it has no end; of its first thousands

    def places(self) -> dict[str, Place]:
        """The raw sources; none where the run was given a prepared folder, or a mixture that says where its own are."""
        data = self.data
        raw = {} if data.prepared or data.is_mixture_alone else data.named_sources()
        paths = {name: source["path"] if isinstance(source, Mapping) else source for name, source in raw.items()}
        return {name: Place(path if isinstance(path, str) else ", ".join(path)) for name, path in paths.items()}

    def introduce(self, trainer: Any) -> None:
        """Print the plan, the beginning of a packed row, and what happened to every token."""
        super().introduce(trainer)
        batch = self.collator([next(iter(trainer.train_dataset))])
        self.console.rule("A packed row (trained tokens marked)", align="left")
        ids, labels = (batch[name][0, :200].tolist() for name in ("input_ids", "labels"))
        print_example("row 0", trainer.processing_class, ids, labels, self.console)
        for line in self.manifest.lines() if self.manifest else trainer.train_dataset.notes:
            self.console.print(line, highlight=False, markup=False)

    def print_figures(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Print the figures; bits per byte of each source, which compare models of different tokenizers."""
        end = "_bits_per_byte"
        sources = {key: f"bits per byte, {key[5 : -len(end)]}" for key in sorted(after) if key.endswith(end)}
        figures = {**sources, f"eval{end}": "bits per byte", **self.figures}
        self.console.print(figures_table(before, after, figures))


def ledger(manifest: Manifest) -> dict[str, Any]:
    """The accounts of a manifest as the model card reads them."""
    return {
        name: {
            "rows_in": account.rows_in,
            "tokens_in": account.tokens_in,
            "trained": manifest.ledgers["train"][name].trained,
            "dropped_tokens": dict(account.dropped_tokens),
        }
        for name, account in manifest.sources.items()
    }


def prepare(data: PretrainData, tokenizer: Any, seed: int, folder: Path, origin: Mapping[str, str]) -> None:
    """Check a folder that is prepared already, or prepare raw sources: by one process, while the others wait on its lock."""
    if data.prepared:
        asked = {f.name for f in fields(CorpusSettings) if origin.get(f.name, DEFAULT) != DEFAULT}
        asked = {"max_length", *asked} - {"num_proc", "engine", "on_error", "labels"}
        asked_for = {name: getattr(data, name) for name in asked}
        load_prepared(folder, tokenizer=tokenizer, expect=asked_for, streaming=True)  # opens the shards, and reads none
        return
    sources: dict[str, Any] = {}
    for name, source in data.named_sources().items():
        sources[name] = source
        if isinstance(source, str) and is_built_in(source):
            rows = built_in_rows(f"{BUILT_IN}:texts" if source == BUILT_IN else source, 30_000, seed=seed)
            sources[name] = Dataset.from_list(rows)
    prepare_corpus(sources, tokenizer, folder, data)


def set_length(args: Any, num_rows: int, num_tokens: int, *, endless: bool) -> None:
    """Turn tokens into steps, and give the learning rate its decay, in `args`.

    `num_tokens` are those of `num_rows` rows to train on; `endless` rows need a length of the run.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size()
    if args.max_tokens is not None:
        args.max_steps = max(1, -(-args.max_tokens * num_rows // (num_tokens * batch)))
    if endless and args.max_steps <= 0:
        raise ConfigError("a stream has no length; say how long with max_tokens (or max_steps)")
    if args.lr_scheduler_type.value == _WSD:
        steps = args.max_steps if args.max_steps > 0 else -(-num_rows // batch) * int(args.num_train_epochs)
        decay = {"num_decay_steps": max(1, round(steps * args.decay_share))}
        args.lr_scheduler_kwargs = {**decay, **(args.lr_scheduler_kwargs or {})}


main = Pretrain.run
