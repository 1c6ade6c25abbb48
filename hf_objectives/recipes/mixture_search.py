"""Find the weights of a mixture: train a small proxy model on many mixtures, fit how each evaluation loss depends on the
weights, recommend the best ones, and train them beside the natural ones to see whether it is so.

    python recipes/mixture_search.py --config recipes/configs/mixture_search_quickstart.yaml

A second run trains what is missing only. `--engine ray` sends the same trials through Ray Tune.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from hf_objectives import DataCollatorWithEosPacking, demo
from hf_objectives import mixture as mixing_laws
from hf_objectives.errors import ConfigError, WorkerError, nearest
from hf_objectives.mixture import MixtureConfig, build_mixture, number
from hf_objectives.preparation import CorpusSettings, Manifest, difference, load_prepared, prepare_corpus
from hf_objectives.recipes.arguments import named_sources, parse_config
from hf_objectives.recipes.pretrain import Loaded, PretrainArguments, PretrainModel, build_model, set_length
from hf_objectives.recipes.run import BUILT_IN
from hf_objectives.trainers import PerplexityTrainer

# Arguments of a Trainer that change no loss, or of which every trial has its own, by how they begin.
_NO_MATTER = tuple(
    "log save hub push eval per_device_eval dataloader report run_name project trackio output_dir disable_tqdm local_rank "
    "do_ ddp seed data_seed max_tokens include skip".split()
)
_OWN = {"save_strategy": "no", "eval_strategy": "no", "push_to_hub": False, "report_to": "none", "disable_tqdm": True}
_KINDS = {"natural": "tab:gray", "recommended": "tab:red"}
Place = tuple[str, str, list[str]]  # rows of some sources in a split of a prepared folder


@dataclass
class SearchData(CorpusSettings):
    """The sources, as of a mixture: their weights, or without any their sizes, are the natural ones."""

    eval_share: float = field(default=0.05, metadata={"help": "Share of each source's documents that is held out."})
    prepared: str | None = field(default=None, metadata={"help": "A folder made by hf-objectives prepare."})
    sources: str | None = field(
        default=None, metadata={"help": "Names and paths or mappings (JSON); 'builtin' has one source a skill."}
    )
    isolate_documents: bool = field(default=True, metadata={"help": "No document sees another of its row."})

    def named_sources(self) -> dict[str, Any]:
        """Where each source is, by name.

        Raises:
            ConfigError: none, or one alone; or an unknown engine.
        """
        if self.engine not in ENGINES:
            raise ConfigError(f"engine is {self.engine!r}; expected one of {', '.join(ENGINES)}")
        if self.prepared and self.sources:
            raise ConfigError("give prepared or sources, not both")
        if self.prepared:
            named = dict.fromkeys(Manifest.read(Path(self.prepared)).sources)
        elif self.sources == BUILT_IN:
            named = dict.fromkeys(demo.SKILLS)
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
    trials: int = field(default=16, metadata={"help": "Mixtures to try; the first is the natural one."})
    concentration: float = field(default=1.0, metadata={"help": "How near the others are to it."})
    parallel: int = field(default=1, metadata={"help": "Trials that run at a time."})
    check_seeds: int = field(default=2, metadata={"help": "Seeds under which the result is checked."})
    vary_seeds: bool = field(default=False, metadata={"help": "Another seed in every trial."})

    def __post_init__(self) -> None:
        for name, least in (("trials", mixing_laws.MIN_TRIALS), ("parallel", 1), ("check_seeds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")


CLASSES = (PretrainModel, SearchData, SearchSettings, PretrainArguments)


@dataclass(frozen=True)
class Job:
    """A training run: where it goes, its arguments and mixture (rows and tokens in a sample of it), its evaluation sets,
    and all that its result depends on."""

    folder: str
    argv: list[str]
    mixture: dict[str, Any]
    sample: tuple[int, int]
    evaluation: dict[str, Place]
    settings: dict[str, Any]
    threads: int
    use_cpu: bool

    def result(self) -> dict[str, Any] | None:
        """What it wrote at its end, None before."""
        there = Path(self.folder) / "result.json"
        return json.loads(there.read_text()) if there.exists() else None


def read_evaluation(text: str, sources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name of the evaluation set its `weight`, and a list of `path` or of `source`.

    Raises:
        ConfigError: neither path nor source, an unknown source or key, or weights that mean nothing.
    """
    known = ("path", "source", "weight")
    read: dict[str, dict[str, Any]] = {}
    for name, about in named_sources(text, None).items():
        entry = {"weight": 1, **(about if isinstance(about, dict) else {"path": about})}
        if unknown := [key for key in entry if key not in known]:
            raise ConfigError(f"evaluation {name!r}: unknown key {unknown[0]!r}{nearest(unknown[0], known)}")
        if ("path" in entry) == ("source" in entry):
            raise ConfigError(f"evaluation {name!r}: give a path or a source, one of the two")
        listed: dict[str, Any] = {
            key: [entry[key]] if isinstance(entry[key], str) else entry[key] for key in known[:2] if key in entry
        }
        for source in listed.get("source", ()):
            if source not in sources:
                raise ConfigError(
                    f"evaluation {name!r} names source {source!r}; expected one of {', '.join(sources)}"
                    f"{nearest(str(source), sources)}"
                )
        read[name] = {**listed, "weight": number(f"evaluation {name!r}: weight", entry["weight"])}
    mixing_laws.check_combination({name: one["weight"] for name, one in read.items()}, read)
    return read


def prepare(
    data: SearchData, given: dict[str, Any], evaluation: Mapping[str, Any], tokenizer: Any, out: Path
) -> tuple[str, dict[str, Place]]:
    """Encode and pack sources and evaluation sets, once for all trials; the sources' folder, and where each set is."""
    folder, beside = Path(data.prepared or out / "prepared").resolve(), (out / "evaluation").resolve()
    settings = CorpusSettings(**{f.name: getattr(data, f.name) for f in fields(CorpusSettings)})
    apart: dict[str, Any] = {name: {"path": one["path"]} for name, one in evaluation.items() if "path" in one}
    held_out = {name: one["source"] for name, one in evaluation.items() if "source" in one}
    if data.sources == BUILT_IN:  # its test split shares no question with any source; the first skills are the largest
        for rank, skill in enumerate(given, 1):
            given = {**given, skill: Dataset.from_list(demo.texts(5400 // rank, seed=rank, skills=[skill]))}
        for name, of in held_out.items():
            rows = [row for skill in of for row in demo.texts(300 // len(of), split="test", skills=[skill])]
            apart[name] = Dataset.from_list(rows)
        held_out = {}
    if not data.prepared:
        prepare_corpus(given, tokenizer, folder, replace(settings, eval_share=settings.eval_share if held_out else 0))
    if apart:
        prepare_corpus(apart, tokenizer, beside, replace(settings, eval_share=0))
    places = {name: (str(folder), "validation", list(of)) for name, of in held_out.items()}
    places |= {name: (str(beside), "train", [name]) for name in apart}
    return str(folder), {name: places[name] for name in evaluation}


def train_trial(job: Job) -> None:
    """Train the proxy on a mixture and write its losses, whole or not at all."""
    torch.set_num_threads(job.threads)
    (config, data, _, args), _ = parse_config(CLASSES, job.argv)
    set_seed(args.seed)
    model, tokenizer = build_model(config, args)
    if config.model_name_or_path == BUILT_IN and not config.model_config:
        model = demo.build_model(tokenizer, seed=args.seed)
    mixture = build_mixture(job.mixture, tokenizer=tokenizer, seed=args.data_seed)
    set_length(args, Loaded(mixture, None, *job.sample, None))
    collator = DataCollatorWithEosPacking(
        tokenizer, max_length=data.max_length, isolate_documents=data.isolate_documents
    )
    trainer = PerplexityTrainer(model, args, collator, train_dataset=mixture, processing_class=tokenizer)
    trainer.train()
    sets = {name: load_prepared(at, split, sources=of) for name, (at, split, of) in job.evaluation.items()}
    losses = {name: trainer.evaluate(rows)["eval_loss"] for name, rows in sets.items()}
    rows = trainer.state.global_step * args.per_device_train_batch_size * args.gradient_accumulation_steps
    result = {"settings": job.settings, "losses": losses, "given": mixture.report(rows).to_dict()}
    draft = Path(job.folder) / "result.draft"
    draft.write_text(json.dumps(result, indent=1))
    draft.replace(draft.with_suffix(".json"))


def run_local(jobs: Sequence[Job], parallel: int, said: Callable[[Job], None]) -> None:
    """Each job in a process of its own on this machine, so many at a time; one that dies takes no other with it."""
    gpus = torch.cuda.device_count()
    context: Any = multiprocessing.get_context("spawn" if gpus else "forkserver")
    if not gpus:  # forked from one that has imported what takes seconds to import
        context.set_forkserver_preload(["trl", "hf_objectives.trainers", "hf_objectives.mixture.build"])
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(parallel):
        free.put(slot)

    def one(job: Job) -> None:
        slot = free.get()
        process = context.Process(target=_alone, args=(job, slot % gpus if gpus else None))
        process.start()
        process.join()
        free.put(slot)
        if process.exitcode < 0:
            with (Path(job.folder) / "log.txt").open("a") as log:
                log.write(f"killed by signal {-process.exitcode}\n")
        said(job)

    threads = ThreadPoolExecutor(parallel)
    try:
        list(threads.map(one, jobs))
    finally:  # at once after Ctrl-C, which the processes have seen too
        threads.shutdown(wait=False, cancel_futures=True)


def _end_with(parent: Any) -> None:
    parent.join()  # or the jobs of a run that was killed train on, beside those of the next one
    os._exit(1)


def _alone(job: Job, gpu: int | None) -> None:
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if gpu is not None:  # of several a Trainer would take all
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    with (Path(job.folder) / "log.txt").open("a") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    train_trial(job)


def run_ray(jobs: Sequence[Job], parallel: int, said: Callable[[Job], None]) -> None:
    """Jobs as trials of Ray Tune, on the cluster that `ray.init` finds or a local one; all machines see the same files."""
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise ConfigError("engine='ray' needs Ray Tune: pip install 'hf-objectives[ray]' -c constraints.txt") from error
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of the configuration are relative to where the run began
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpu = int(not jobs[0].use_cpu and "GPU" in ray.cluster_resources())
    found = tune.Tuner(
        tune.with_resources(lambda given: train_trial(jobs[given["job"]]), {"cpu": jobs[0].threads, "gpu": gpu}),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=parallel),
        run_config=tune.RunConfig(storage_path=str(Path(jobs[0].folder).parents[1] / "ray"), verbose=0),
    ).fit()
    for result in (found[i] for i in range(len(found))):
        job = jobs[(result.config or {})["job"]]
        if result.error is not None:
            (Path(job.folder) / "log.txt").write_text(str(result.error))
        said(job)


ENGINES = {"local": run_local, "ray": run_ray}


def run(jobs: Sequence[Job], engine: str, parallel: int, console: Console) -> list[dict[str, Any]]:
    """Results of jobs, in order; those that are there already are not made again.

    Raises:
        ConfigError: one that is there was made under other settings; says which.
        WorkerError: jobs failed; names them and their logs, once all others are done.
    """
    names = {job.folder: "/".join(Path(job.folder).parts[-2:]) for job in jobs}
    for job in jobs:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        if (there := job.result()) and (different := difference(there["settings"], job.settings)):
            raise ConfigError(
                f"{names[job.folder]} was trained otherwise. {'; '.join(different)}. Choose another output_dir, or "
                f"delete {job.folder}"
            )
    failed: dict[str, str] = {}

    def said(job: Job) -> None:
        name, log = names[job.folder], Path(job.folder) / "log.txt"
        if (result := job.result()) is not None:
            losses = (f"{of} {loss:.4f}" for of, loss in result["losses"].items())
            console.print(f"{name}: {', '.join(losses)}", highlight=False)
            return
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        failed[name] = f"{name} ({lines[-1] if lines else 'no word'}; see {log})"

    if todo := [job for job in jobs if job.result() is None]:
        ENGINES[engine](todo, min(parallel, len(todo)), said)
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs were there already", highlight=False)
    if failed:
        raise WorkerError(
            f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed[name] for name in sorted(failed))}. The others "
            "are kept: run again to train what is missing"
        )
    return [result for job in jobs if (result := job.result()) is not None]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the search; returns what `results.json` holds."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--config" in given[:-1]:  # a trial may begin elsewhere
        given[given.index("--config") + 1] = str(Path(given[given.index("--config") + 1]).resolve())
    (config, data, search, args), _ = parse_config(CLASSES, given)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the search starts its processes itself; launch one, and say how many with parallel")
    console, out, where = Console(), Path(args.output_dir).resolve(), data.named_sources()
    evaluation = read_evaluation(search.evaluation, where)
    ours = ("weight", "max_epochs")  # of a source's keys; the others are the preparation's
    sources = {n: {"path": "", **{k: one[k] for k in ours if k in (one or ())}} for n, one in where.items()}
    MixtureConfig.read({"sources": sources})  # says what is wrong before anything is encoded
    tokenizer = build_model(config, args)[1]
    folder, places = prepare(data, where, evaluation, tokenizer, out)
    sources = {name: {**one, "path": folder} for name, one in sources.items()}
    whole = build_mixture({"sources": sources}, tokenizer=tokenizer, seed=args.seed)
    natural, sample = whole.plan.weights, whole.first_rows()
    set_length(args, Loaded(whole, None, *sample, None))
    about = {**asdict(config), **{k: v for k, v in args.to_dict().items() if not k.startswith(_NO_MATTER)}}
    rows = {f"source {name!r}": (folder, "train", [name]) for name in sources}
    for name, (at, split, of) in {**rows, **{f"evaluation {name!r}": place for name, place in places.items()}}.items():
        shards = [shard for shard in Manifest.read(Path(at)).shards if shard.split == split and shard.source in of]
        about[name] = [shard.sha256[:12] for shard in shards]
    about["isolate_documents"] = data.isolate_documents
    first = {"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed}

    def mixed(weights: np.ndarray) -> dict[str, dict[str, Any]]:
        return {n: {**one, "weight": w} for (n, one), w in zip(sources.items(), weights.tolist(), strict=True)}

    def trained(runs: Sequence[tuple[str, np.ndarray, int]]) -> np.ndarray:
        jobs = []
        for name, weights, more in runs:
            seeds = {key: seed + more for key, seed in first.items()}
            words = [f"--{key}={value}" for key, value in {**_OWN, "output_dir": out / name, **seeds}.items()]
            settings = {**about, **seeds, "weights": dict(zip(sources, weights.tolist(), strict=True))}
            settings = json.loads(json.dumps(settings, default=str))
            mixture, share = {"sources": mixed(weights)}, max(1, torch.get_num_threads() // search.parallel)
            jobs.append(Job(str(out / name), given + words, mixture, sample, places, settings, share, args.use_cpu))
        results = run(jobs, data.engine, search.parallel, console)
        return np.array([[result["losses"][name] for name in evaluation] for result in results])

    weights = mixing_laws.draw_mixtures(natural, search.trials, concentration=search.concentration, seed=args.seed)
    losses = trained([(f"trials/{i:03d}", one, i * search.vary_seeds) for i, one in enumerate(weights)])
    laws = {name: mixing_laws.fit_law(weights, losses[:, i], seed=args.seed) for i, name in enumerate(evaluation)}
    combination = {name: one["weight"] for name, one in evaluation.items()}
    found = mixing_laws.recommend(laws, combination, natural, sources=list(sources), seed=args.seed)
    asked = {"natural": natural, f"recommended-{zlib.crc32(found.weights.tobytes()):08x}": found.weights}
    seeds = range(search.trials, search.trials + search.check_seeds)
    checks = [trained([(f"check/{name}-{i}", one, i) for i in seeds]) for name, one in asked.items()] if seeds else []
    results = mixing_laws.summarise(list(sources), natural, laws, combination, found, checks)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "recommended.yaml").write_text(yaml.safe_dump({"sources": mixed(found.weights)}, sort_keys=False))
    plot(results, out / "mixture_search.png")
    print_tables(results, console)
    console.print(f"recommended.yaml, results.json and mixture_search.png are in {args.output_dir}", highlight=False)
    return results


def print_tables(results: Mapping[str, Any], console: Console) -> None:
    """Shares, losses and how well the laws hold."""
    forms = (*mixing_laws.LAWS, mixing_laws.MEAN)
    pairs = [f"{kind}\n{of}" for kind in _KINDS for of in ("predicted", "measured")]
    columns = {
        "Share of tokens": ("source", *_KINDS, "±"),
        "Loss, nats a token": ("evaluation", "weight", *pairs, "difference"),
        "Error of each law in cross-validation": ("evaluation", *forms, "p", "chosen"),
    }
    tables = []
    for title, names in columns.items():
        tables.append(Table(title=title, title_justify="left", header_style="bold"))
        for name in names:
            tables[-1].add_column(name, justify="left" if name == names[0] else "right")
    for row in zip(*(results[key] for key in ("sources", *_KINDS, "recommended_error")), strict=True):
        tables[0].add_row(row[0], *(f"{share:.1%}" for share in row[1:]))
    for name, one in results["evaluation"].items():
        cells = ["" if one["weight"] is None else f"{one['weight']:g}"]
        for of in (one[kind] for kind in _KINDS):
            measured = f"{np.mean(of['measured']):.4f}" if of["measured"] else "-"
            cells += ["{:.4f} ± {:.4f}".format(*of["predicted"]), measured]
        gaps = np.subtract(one["recommended"]["measured"], one["natural"]["measured"])
        spread = f"{gaps.mean():+.4f}\n{gaps.min():+.4f} to {gaps.max():+.4f}" if len(gaps) else "-"
        tables[1].add_row(name, *cells, spread)
        if "law" in one:
            errors = [f"{one['cv_rmse'][form]:.4f}" for form in forms]
            tables[2].add_row(name, *errors, f"{one['p_value']:.2g}", one["law"])
    for table in tables:
        console.print(table)
    for note in results["notes"]:
        console.print(f"Note: {note}.", highlight=False, markup=False)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw trials as predicted and as measured, shares, and the loss over the share of the most influential source."""
    from matplotlib.figure import Figure

    sets = results["evaluation"]
    shown = sorted((name for name in sets if "law" in sets[name]), key=lambda name: -sets[name]["weight"])[:4]
    figure = Figure(figsize=(11, 8), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    above, (left, right) = rows[0].subplots(1, len(shown), squeeze=False)[0], rows[1].subplots(1, 2)
    for name, axes in zip(shown, above, strict=True):
        one = sets[name]
        axes.scatter(one["held_out"], one["trials"], s=22, label="trials, each left out of the fit")
        ends = [of(of(one["held_out"]), of(one["trials"])) for of in (min, max)]
        axes.plot(ends, ends, color="black", lw=0.8, alpha=0.5)
        for kind, colour in _KINDS.items():
            seen = one[kind]["measured"]
            axes.scatter(
                [one[kind]["predicted"][0]] * len(seen), seen, marker="D", color=colour, label=f"{kind}, checked"
            )
        axes.set(title=f"{name}: {one['law']}", xlabel="predicted loss", ylabel="measured loss")
    above[0].legend(frameon=False)
    at = np.arange(len(results["sources"]))
    for kind, colour in _KINDS.items():
        errors = results["recommended_error"] if kind == "recommended" else None
        left.bar(at + (0.2 if errors else -0.2), results[kind], 0.4, yerr=errors, color=colour, label=kind)
    left.set_xticks(at, results["sources"], rotation=40, ha="right")
    left.set(title="Share of tokens")
    most, combined = results["influential"], sets[mixing_laws.COMBINED]
    right.scatter([row[most["source"]] for row in results["trials"]], combined["trials"], s=22, label="trials")
    right.plot(most["shares"], most["combined"], label="laws, other sources in natural proportion")
    for kind, colour in _KINDS.items():
        seen = combined[kind]["measured"] or combined[kind]["predicted"][:1]
        right.scatter([results[kind][most["source"]]] * len(seen), seen, marker="D", color=colour, label=kind)
    right.set(title="Combined loss", xlabel=f"share of {results['sources'][most['source']]}")
    for axes in (*above, left, right):
        axes.grid(alpha=0.25)
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
