"""Find the weights of a mixture.

Train a small proxy model on many mixtures, fit how each evaluation loss depends on the weights, recommend the best weights,
and train them beside the natural ones to check the recommendation.

    python recipes/mixture_search.py --config mixture_search_quickstart

A second run trains only what is missing. `--engine ray` sends the same trials through Ray Tune.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from hf_objectives import demo
from hf_objectives.collators import DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError
from hf_objectives.mixture import (
    COMBINED,
    LAWS,
    MEAN,
    MIN_TRIALS,
    MixtureConfig,
    build_mixture,
    check_combination,
    draw_mixtures,
    fit_law,
    number,
    recommend,
    summarise,
)
from hf_objectives.preparation import CorpusSettings, Manifest, load_prepared, prepare_corpus
from hf_objectives.recipes.arguments import BUILT_IN, named_sources, parse_config
from hf_objectives.recipes.data_arguments import source_settings
from hf_objectives.recipes.models import PretrainModel, load_or_draw
from hf_objectives.recipes.pretrain import PretrainArguments, set_length
from hf_objectives.recipes.preview import table
from hf_objectives.recipes.trials import ENGINES, Job, Place, run_jobs
from hf_objectives.trainers import PerplexityTrainer
from hf_objectives.types import check_keys, check_one_of, option

# Arguments of a Trainer that change no loss, or of which every trial has its own, by how they begin.
_NO_MATTER = tuple(
    "log save hub push eval per_device_eval dataloader report run_name project trackio output_dir disable_tqdm local_rank "
    "do_ ddp seed data_seed max_tokens include skip".split()
)
_COLOURS = {"natural": "tab:gray", "recommended": "tab:red"}
_OWN = {"save_strategy": "no", "eval_strategy": "no", "push_to_hub": False, "report_to": "none", "disable_tqdm": True}


@dataclass
class SearchData(CorpusSettings):
    """The sources, as of a mixture. Their weights, or without any their sizes, are the natural ones."""

    eval_share: float = option(0.05, "Share of each source's documents that is held out.")
    prepared: str | None = option(None, "A folder made by hf-objectives prepare.")
    sources: str | None = option(None, "Names and paths or mappings (JSON); 'builtin' has one source a skill.")
    isolate_documents: bool = option(True, "No document sees another of its row.")

    def named_sources(self) -> dict[str, Any]:
        """The path or mapping of each source, by name."""
        check_one_of("engine", self.engine, ENGINES)
        if self.prepared and self.sources:
            raise ConfigError("give prepared or sources, not both")
        if self.prepared:
            named = dict.fromkeys(Manifest.read(Path(self.prepared)).named)
        elif self.sources == BUILT_IN:
            named = dict.fromkeys(name for name in demo.SKILLS if name not in (*demo.FACTS, *demo.HARD))
        else:
            named = dict(named_sources(self.sources, None)) if self.sources else {}
        if len(named) < 2:
            raise ConfigError(f"sources: {', '.join(named) or 'none'}; expected at least two to mix")
        return named


@dataclass
class SearchSettings:
    """How the weights are searched."""

    evaluation: str = field(
        metadata={"help": "By name a path, or a mapping with path or source (its held-out part) and weight (JSON)."}
    )
    trials: int = option(16, "Mixtures to try; the first is the natural one.")
    concentration: float = option(1.0, "How near the others are to it.")
    parallel: int = option(1, "Trials that run at a time.")
    check_seeds: int = option(2, "Seeds under which the result is checked.")
    vary_seeds: bool = option(False, "Another seed in every trial.")

    def __post_init__(self) -> None:
        for name, least in (("trials", MIN_TRIALS), ("parallel", 1), ("check_seeds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")


CLASSES = (PretrainModel, SearchData, SearchSettings, PretrainArguments)


def read_evaluation(text: str, sources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name of the evaluation set its `weight`, and a list of `path` or of `source`."""
    read: dict[str, dict[str, Any]] = {}
    for name, given in named_sources(text, None).items():
        entry = {"weight": 1, **(given if isinstance(given, dict) else {"path": given})}
        check_keys(f"evaluation {name!r}", entry, ("path", "source", "weight"))
        if ("path" in entry) == ("source" in entry):
            raise ConfigError(f"evaluation {name!r}: give a path or a source, one of the two")
        kind = "path" if "path" in entry else "source"
        listed = [entry[kind]] if isinstance(entry[kind], str) else entry[kind]
        for source in listed if kind == "source" else ():
            check_one_of(f"evaluation {name!r}: source", source, sources)
        read[name] = {kind: listed, "weight": number(f"evaluation {name!r}: weight", entry["weight"])}
    check_combination({name: entry["weight"] for name, entry in read.items()}, read)
    return read


def prepare(
    data: SearchData, sources: dict[str, Any], evaluation: Mapping[str, Any], tokenizer: Any, out: Path
) -> tuple[str, dict[str, Place]]:
    """Encode and pack sources and evaluation sets, once for all trials; the sources' folder, and where each set is."""
    folder, beside = Path(data.prepared or out / "prepared").resolve(), (out / "evaluation").resolve()
    apart: dict[str, Any] = {name: {"path": entry["path"]} for name, entry in evaluation.items() if "path" in entry}
    held_out = {name: entry["source"] for name, entry in evaluation.items() if "source" in entry}
    if data.sources == BUILT_IN:  # its test split shares no question with any source; the first skills are the largest
        for rank, skill in enumerate(sources, 1):
            texts = demo.texts(5400 // rank, seed=rank, skills=[skill])
            sources = {**sources, skill: Dataset.from_list(texts)}
        for name, skills in held_out.items():
            rows = [row for s in skills for row in demo.texts(300 // len(skills), split="test", skills=[s])]
            apart[name] = Dataset.from_list(rows)
        held_out = {}
    if not data.prepared:
        prepare_corpus(sources, tokenizer, folder, replace(data, eval_share=data.eval_share if held_out else 0))
    if apart:
        prepare_corpus(apart, tokenizer, beside, replace(data, eval_share=0))
    places = {name: (str(folder), "validation", list(names)) for name, names in held_out.items()}
    places |= {name: (str(beside), "train", [name]) for name in apart}
    return str(folder), {name: places[name] for name in evaluation}


def train_trial(job: Job) -> None:
    """Train the proxy on a mixture and write its losses."""
    torch.set_num_threads(job.threads)
    (config, data, _, args), _ = parse_config(CLASSES, job.argv)
    set_seed(args.seed)
    model, tokenizer = load_or_draw(
        config, use_cpu=args.device.type == "cpu", trust_remote_code=config.trust_remote_code
    )
    if config.model_name_or_path == BUILT_IN and not config.model_config:
        model = demo.build_model(tokenizer, seed=args.seed)
    mixture = build_mixture(job.mixture, tokenizer=tokenizer, seed=args.data_seed)
    set_length(args, *job.sample, endless=True)
    collator = DataCollatorWithEosPacking(
        tokenizer, max_length=data.max_length, isolate_documents=data.isolate_documents, train_on="all"
    )
    trainer = PerplexityTrainer(model, args, collator, train_dataset=mixture, processing_class=tokenizer)
    trainer.train()
    sets = {
        name: load_prepared(folder, split, sources=names) for name, (folder, split, names) in job.evaluation.items()
    }
    losses = {name: trainer.evaluate(rows)["eval_loss"] for name, rows in sets.items()}
    rows = trainer.state.global_step * args.per_device_train_batch_size * args.gradient_accumulation_steps
    job.write_result(losses, mixture.report(rows).to_dict())


class Search:
    """A search: its arguments, its prepared rows, its natural weights (float64 [sources]), and the runs that it makes."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv, self.console = list(argv), Console()
        if "--config" in self.argv[:-1]:  # a trial may begin elsewhere
            place = self.argv.index("--config") + 1
            self.argv[place] = str(Path(self.argv[place]).resolve())
        (self.config, self.data, self.settings, self.args), _ = parse_config(CLASSES, self.argv)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("the search starts its processes itself; launch one, and say how many with parallel")
        self.out, named = Path(self.args.output_dir).resolve(), self.data.named_sources()
        self.evaluation = read_evaluation(self.settings.evaluation, named)
        self.sources = {name: {"path": "", **source_settings(source)} for name, source in named.items()}
        MixtureConfig.read({"sources": self.sources})  # says what is wrong before anything is encoded
        tokenizer = load_or_draw(
            self.config, use_cpu=self.args.device.type == "cpu", trust_remote_code=self.config.trust_remote_code
        )[1]
        folder, self.places = prepare(self.data, named, self.evaluation, tokenizer, self.out)
        self.sources = {name: {**source, "path": folder} for name, source in self.sources.items()}
        mixture = build_mixture({"sources": self.sources}, tokenizer=tokenizer, seed=self.args.seed)
        self.natural, self.sample = mixture.plan.weights, mixture.first_rows()
        set_length(self.args, *self.sample, endless=True)
        self.fingerprint = self._fingerprint(folder)

    def _fingerprint(self, folder: str) -> dict[str, Any]:
        """All that the result of a trial depends on, but for its seeds and weights."""
        training = {key: value for key, value in self.args.to_dict().items() if not key.startswith(_NO_MATTER)}
        rows = {f"source {name!r}": (folder, "train", [name]) for name in self.sources}
        rows |= {f"evaluation {name!r}": place for name, place in self.places.items()}
        hashes = {
            name: [s.sha256[:12] for s in Manifest.read(Path(at)).shards if s.split == split and s.source in names]
            for name, (at, split, names) in rows.items()
        }
        return {**asdict(self.config), **training, **hashes, "isolate_documents": self.data.isolate_documents}

    def mixture(self, weights: np.ndarray) -> dict[str, Any]:
        """The configuration of a mixture with these weights."""
        weighted = zip(self.sources.items(), weights.tolist(), strict=True)
        return {"sources": {name: {**source, "weight": weight} for (name, source), weight in weighted}}

    def losses(self, runs: Sequence[tuple[str, np.ndarray, int]]) -> np.ndarray:
        """Train runs, each a folder, weights and a number that is added to its seeds; losses [runs, evaluations]."""
        jobs = []
        args = self.args
        for name, weights, added in runs:
            data_seed = args.seed if args.data_seed is None else args.data_seed
            seeds = {"seed": args.seed + added, "data_seed": data_seed + added}
            words = [f"--{key}={value}" for key, value in {**_OWN, "output_dir": self.out / name, **seeds}.items()]
            shares = dict(zip(self.sources, weights.tolist(), strict=True))
            settings = json.loads(json.dumps({**self.fingerprint, **seeds, "weights": shares}, default=str))
            threads = max(1, torch.get_num_threads() // self.settings.parallel)
            folder, mixture = str(self.out / name), self.mixture(weights)
            jobs.append(
                Job(folder, self.argv + words, mixture, self.sample, self.places, settings, threads, args.use_cpu)
            )
        results = run_jobs(jobs, train_trial, self.data.engine, self.settings.parallel, self.console)
        return np.array([[result["losses"][name] for name in self.evaluation] for result in results])


def print_tables(results: Mapping[str, Any], console: Console) -> None:
    """Print shares, losses, and how well the laws hold."""
    shares = [
        (row[0], *(f"{share:.1%}" for share in row[1:]))
        for row in zip(*(results[key] for key in ("sources", *_COLOURS, "recommended_error")), strict=True)
    ]
    console.print(table("Share of tokens", ("source", *_COLOURS, "±"), shares))
    kinds = [f"{kind}\n{figure}" for kind in _COLOURS for figure in ("predicted", "measured")]
    columns = ("evaluation", "weight", *kinds, "difference")
    console.print(table("Loss, nats a token", columns, [_losses(*item) for item in results["evaluation"].items()]))
    forms = (*LAWS, MEAN)
    errors = [
        (name, *(f"{found['cv_rmse'][form]:.4f}" for form in forms), f"{found['p_value']:.2g}", found["law"])
        for name, found in results["evaluation"].items()
        if "law" in found
    ]
    console.print(table("Error of each law in cross-validation", ("evaluation", *forms, "p", "chosen"), errors))
    for note in results["notes"]:
        console.print(f"Note: {note}.", highlight=False, markup=False)


def _losses(name: str, found: Mapping[str, Any]) -> list[str]:
    """A row of the table of losses."""
    cells = [name, "" if found["weight"] is None else f"{found['weight']:g}"]
    for kind in (found[kind] for kind in _COLOURS):
        measured = f"{np.mean(kind['measured']):.4f}" if kind["measured"] else "-"
        cells += ["{:.4f} ± {:.4f}".format(*kind["predicted"]), measured]
    gaps = np.subtract(found["recommended"]["measured"], found["natural"]["measured"])
    return [*cells, f"{gaps.mean():+.4f}\n{gaps.min():+.4f} to {gaps.max():+.4f}" if len(gaps) else "-"]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw trials as predicted and as measured, shares, and the loss over the share of the most influential source."""
    from matplotlib.figure import Figure

    sets = results["evaluation"]
    shown = sorted((name for name in sets if "law" in sets[name]), key=lambda name: -sets[name]["weight"])[:4]
    figure = Figure(figsize=(11, 8), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    above, (left, right) = rows[0].subplots(1, len(shown), squeeze=False)[0], rows[1].subplots(1, 2)
    for name, axes in zip(shown, above, strict=True):
        found = sets[name]
        axes.scatter(found["held_out"], found["trials"], s=22, label="trials, each left out of the fit")
        ends = [end(end(found["held_out"]), end(found["trials"])) for end in (min, max)]
        axes.plot(ends, ends, color="black", lw=0.8, alpha=0.5)
        for kind, colour in _COLOURS.items():
            seen, predicted = found[kind]["measured"], found[kind]["predicted"][0]
            axes.scatter([predicted] * len(seen), seen, marker="D", color=colour, label=f"{kind}, checked")
        axes.set(title=f"{name}: {found['law']}", xlabel="predicted loss", ylabel="measured loss")
    above[0].legend(frameon=False)
    places = np.arange(len(results["sources"]))
    most, combined = results["influential"], sets[COMBINED]
    right.scatter([row[most["source"]] for row in results["trials"]], combined["trials"], s=22, label="trials")
    right.plot(most["shares"], most["combined"], label="laws, other sources in natural proportion")
    for kind, colour in _COLOURS.items():
        errors = results["recommended_error"] if kind == "recommended" else None
        left.bar(places + (0.2 if errors else -0.2), results[kind], 0.4, yerr=errors, color=colour, label=kind)
        seen = combined[kind]["measured"] or combined[kind]["predicted"][:1]
        right.scatter([results[kind][most["source"]]] * len(seen), seen, marker="D", color=colour, label=kind)
    left.set_xticks(places, results["sources"], rotation=40, ha="right")
    left.set(title="Share of tokens")
    right.set(title="Combined loss", xlabel=f"share of {results['sources'][most['source']]}")
    for axes in (*above, left, right):
        axes.grid(alpha=0.25)
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the search; returns what `results.json` holds."""
    search = Search(sys.argv[1:] if argv is None else argv)
    settings, natural, out, seed = search.settings, search.natural, search.out, search.args.seed
    weights = draw_mixtures(natural, settings.trials, concentration=settings.concentration, seed=seed)
    losses = search.losses([(f"trials/{i:03d}", w, i * settings.vary_seeds) for i, w in enumerate(weights)])
    laws = {name: fit_law(weights, losses[:, i], seed=seed) for i, name in enumerate(search.evaluation)}
    combination = {name: entry["weight"] for name, entry in search.evaluation.items()}
    found = recommend(laws, combination, natural, sources=list(search.sources), seed=seed)
    asked = {"natural": natural, f"recommended-{zlib.crc32(found.weights.tobytes()):08x}": found.weights}
    seeds = range(settings.trials, settings.trials + settings.check_seeds)
    checks = [search.losses([(f"check/{name}-{i}", w, i) for i in seeds]) for name, w in asked.items() if seeds]
    results = summarise(list(search.sources), natural, laws, combination, found, checks)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "recommended.yaml").write_text(yaml.safe_dump(search.mixture(found.weights), sort_keys=False))
    plot(results, out / "mixture_search.png")
    print_tables(results, search.console)
    folder = search.args.output_dir
    search.console.print(f"recommended.yaml, results.json and mixture_search.png are in {folder}", highlight=False)
    return results
