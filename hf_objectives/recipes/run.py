"""The course of every recipe: from the arguments to a trained, saved and documented model."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from transformers import set_seed

from hf_objectives.diagnostics import DiagnosticsCallback, diagnose, plot_mixture, plot_training_metrics
from hf_objectives.distributed import leave_group, rank
from hf_objectives.errors import CheckpointError, ConfigError, FileFormatError, HFObjectivesError
from hf_objectives.inspection import Finding
from hf_objectives.mixture import DatasetMixture
from hf_objectives.preparation import Place
from hf_objectives.publishing import CardFacts, check_base, push, settings_to_show, write_card
from hf_objectives.recipes.arguments import DEFAULT, parse_config
from hf_objectives.recipes.built_in import Marks
from hf_objectives.recipes.evaluated import write_evaluated
from hf_objectives.recipes.harness import HarnessCallback
from hf_objectives.recipes.launch import LaunchRecord, launches_in, state_of
from hf_objectives.recipes.plan import Line, check_launch, print_plan, resolve_plan
from hf_objectives.recipes.preview import figures_table, mixture_table
from hf_objectives.trainers import check_repository, find_checkpoint, guard_trackers

logger = logging.getLogger(__name__)


class Recipe:
    """A recipe: its arguments, the trainer that it builds and the figures that it reports; `run` is its course.

    Attributes:
        arguments: dataclasses of the model, the data and the training; their fields are the recipe's options.
        objective: what the model card calls the run.
        figures: held-out metrics beside perplexities, and what the table calls them.
        model_config, data, args: the arguments of this run.
        origin: where each value came from, see `parse_config`.
        loading: whether the run trains on a CPU, and whether it runs code of the model's repository, by the names of
            `load_model`.
        train_rows: rows to train on: mapped, a stream, or a mixture; set by `load_rows`.
        num_rows: their number, of a stream the number that its length is counted in; set by `load_rows`.
        rows_digest: changes when the rows do, or the order of a stream; set by `load_rows`.
        mixture: the mixture to train on; set by `load_rows` where there is one.
        parts: subset and commit of each source on the Hub, as they were before training.
        reads_again: whether the rows of an earlier run are read again, so that nothing is prepared.
        results: what `results.json` holds beside the metrics.
        of_model_alone: a pattern of the metrics that follow from the trained model alone, for `verify`; empty: none.
    """

    arguments: ClassVar[tuple[type, ...]]
    figures: ClassVar[dict[str, str]]
    objective = "sft"
    of_model_alone = ""

    def __init__(self, model_config: Any, data: Any, args: Any, origin: Mapping[str, str]) -> None:
        self.model_config, self.data, self.args, self.origin = model_config, data, args, origin
        trusts = any(getattr(given, "trust_remote_code", False) for given in (model_config, args))
        self.loading = {"use_cpu": args.device.type == "cpu", "trust_remote_code": trusts}
        self.console = Console(soft_wrap=False)
        self.train_rows: Any = None
        self.num_rows = 0
        self.rows_digest: str | None = None
        self.reads_again = False
        self.mixture: DatasetMixture | None = None
        self.results: dict[str, Any] = {}
        self.parts: dict[str, dict[str, str]] = {}

    def build_trainer(self) -> Any:
        """Load the model and the data."""
        raise NotImplementedError

    def load_rows(self, tokenizer: Any) -> None:
        """Load the rows to train on, as the trainer takes them; no model is needed."""
        raise NotImplementedError

    def introduce(self, trainer: Any) -> None:
        """Print what will be done; in the main process."""
        lines = resolve_plan(self.args, self.data, trainer.model, self.num_rows, self.origin)
        if self.loading["trust_remote_code"]:
            lines.append(Line("code of the repository", "is run", self.origin["trust_remote_code"]))
        print_plan(lines, self.console)

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Held-out metrics of the model as it is; none where nothing is held out."""
        measured = trainer.eval_dataset is not None or getattr(trainer, "lm_evaluation", None) is not None
        return trainer.evaluate() if measured else {}

    def examine(self, trainer: Any, model: Any = None, *, trained: bool = False) -> Marks:
        """Ask a model the questions of the built-in corpus, see `Marks.of`; None: the one that is trained."""
        model = trainer.accelerator.unwrap_model(trainer.model if model is None else model)
        return Marks.of(model, trainer.processing_class, seed=self.args.seed, trained=trained)

    def save(self, trainer: Any) -> None:
        """Write the model and the state of its training."""
        trainer.save_model()
        trainer.save_state()

    def draw(self, trainer: Any, before: Mapping[str, Any], path: Path) -> Path:
        """Draw the curves of the run; returns the picture's path."""
        # The Trainer starts a new history when it trains; the first point of the curve is the model as it came.
        return plot_training_metrics([{"step": 0, **before}, *trainer.state.log_history], path)

    def print_figures(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Print the held-out figures before and after."""
        self.console.print(figures_table(before, after, self.figures))

    @classmethod
    def run(cls, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Run the recipe with these arguments; None for those of the program.

        Returns:
            What `results.json` holds: the held-out metrics `before` and `after`, and what the recipe adds.
        """
        (model_config, data, args), origin = parse_config(cls.arguments, argv)
        check_launch(args)
        begin = resume_point(args)
        if args.push_to_hub and on_main():
            if getattr(model_config, "use_peft", False):
                check_base(model_config.model_name_or_path)
            check_repository(args)
        set_seed(args.seed)
        recipe = cls(model_config, data, args, origin)
        trainer = recipe.build_trainer()
        guard_trackers(trainer)
        if getattr(data, "eval_tasks", None):
            trainer.add_callback(HarnessCallback(trainer, data))
        if on_main():
            recipe.parts = {name: _parts(place) for name, place in recipe.places().items()}
            recipe.introduce(trainer)
        known = {"recipe": cls.__name__.lower()}
        trainer.add_callback(LaunchRecord(trainer, known, recipe.rows_digest, (args, data, model_config)))
        trainer.add_callback(DiagnosticsCallback(trainer))
        before = recipe.evaluate(trainer)
        trainer.train(resume_from_checkpoint=begin)
        after = recipe.evaluate(trainer)
        wants_push, args.push_to_hub = args.push_to_hub, False  # at the end, when everything is on disk
        recipe.save(trainer)
        results = {"before": before, "after": after, "figures": list(cls.figures), **recipe.results}
        if recipe.mixture is not None:
            results["mixture"] = recipe.mixture.report(trainer.rows_taken).to_dict()
        if on_main():
            recipe.report(trainer, results, Path(args.output_dir))
        trainer.accelerator.wait_for_everyone()
        if wants_push and on_main():
            recipe.push(trainer)
        return results

    def push(self, trainer: Any) -> None:
        """Push the run as the Hub's fields of the arguments say.

        Raises:
            PushError: see `publishing.push`.
        """
        args = self.args
        url = push(
            Path(args.output_dir),
            trainer.hub_model_id or args.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
        )
        self.console.print(f"Pushed to {url}", highlight=False)

    def report(self, trainer: Any, results: dict[str, Any], folder: Path) -> None:
        """Write results, pictures and model card, then print the figures. A picture or a card that fails is told."""
        history = trainer.state.log_history
        if self.mixture is not None:
            self.console.print(mixture_table(self.mixture.report(trainer.rows_taken)))
            # A run may end before its first log.
            if any(key.startswith("mixture/") for entry in history for key in entry):
                self.attempt("mixture.png", lambda: plot_mixture(history, folder / "mixture.png"))
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        picture = folder / "training_curves.png"
        self.attempt(picture.name, lambda: self.draw(trainer, results["before"], picture))
        self.attempt("the model card", lambda: self.write_card(trainer, results, folder))
        if results["after"]:
            self.print_figures(results["before"], results["after"])
        self.console.print(f"Model, {picture.name}, results.json and README.md are in {folder}", highlight=False)

    def attempt(self, what: str, make: Callable[[], Any]) -> None:
        """Make something that the run can do without: what goes wrong is told, and costs neither the model nor its push."""
        try:
            make()
        except Exception as error:
            logger.exception("%s could not be made", what)
            self.console.print(
                f"{what} could not be made ({type(error).__name__}: {error}); the rest is there", markup=False
            )

    def write_card(self, trainer: Any, results: Mapping[str, Any], folder: Path) -> None:
        """Write the model card, and what `verify` needs."""
        configs = (self.model_config, self.data, self.args)
        given = {name: found for name in self.origin for found in _given(name, configs) if self.origin[name] != DEFAULT}
        settings = settings_to_show(given)
        recipe, places = type(self).__name__.lower(), self.places()
        write_evaluated(folder, recipe, settings, trainer, results["after"])
        from_scratch = getattr(self.model_config, "model_config", None) is not None
        write_card(
            folder,
            CardFacts(
                objective=self.objective,
                recipe=recipe,
                results=results,
                base_model=None if from_scratch else self.model_config.model_name_or_path,
                sources={name: place.path for name, place in places.items()},
                parts=self.parts,
                labels=self.labels(),
                settings=settings,
                findings=_findings(trainer.state.log_history),
            ),
        )

    def places(self) -> dict[str, Place]:
        """Where the rows of each source lie, as the card tells it."""
        if hasattr(self.data, "places"):
            return self.data.places()
        name = self.data.dataset_name
        return {Path(name).name: self.data.place(Path(name).name, name)}

    def labels(self) -> str:
        """Which tokens were trained, in words."""
        train_on = getattr(self.data, "train_on", getattr(self.args, "train_on", None))
        return _LABELS.get(str(train_on), "")


_LABELS = {
    "assistant": "Trained are the tokens that the model would have to produce: each assistant turn from the end of the "
    "generation prompt to its stop token.",
    "last_assistant": "Trained is the last assistant turn alone, from the end of the generation prompt to its stop token.",
    "all": "Trained is every token.",
}


def _parts(place: Place) -> dict[str, str]:
    parts = {"config": place.config, "revision": place.commit() if place.on_hub else None}
    return {name: value for name, value in parts.items() if value is not None}


def _findings(history: list[dict[str, float]]) -> Sequence[Finding] | str:
    """What `diagnose` finds in a log, or why it cannot judge it."""
    try:
        return diagnose(history) if history else "nothing was logged"
    except FileFormatError as error:  # a run of a few steps
        return str(error)


def _given(name: str, configs: Sequence[Any]) -> list[Any]:
    """The value of a setting, where one of the configs has it, as YAML takes it."""
    found = [getattr(config, name) for config in configs if hasattr(config, name)]
    return [_plain(value) for value in found[:1]]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def resume_point(args: Any) -> str | None:
    """The checkpoint to go on from: the one that is named, or the newest whole one for `--resume_from_checkpoint true`.

    Raises:
        ConfigError: the folder holds checkpoints of other runs only.
        CheckpointError: see `find_checkpoint`.
    """
    asked = str(args.resume_from_checkpoint or "false")
    folder = Path(args.output_dir)
    launches = launches_in(folder)
    others: set[Path] = set()

    def stranger(checkpoint: Path) -> str | None:
        state = checkpoint / "trainer_state.json"
        try:
            if not launches or not state.exists() or state_of(state, launches):
                return None
        except (ValueError, TypeError):  # half a file; find_checkpoint names it
            return None
        others.add(checkpoint)
        return "another run left it"

    try:
        return find_checkpoint(
            {"true": True, "false": False}.get(asked.lower(), asked),
            folder,
            incomplete=getattr(args, "resume_incomplete", False),
            stranger=stranger,
        )
    except CheckpointError:
        if others and others == {*folder.glob("checkpoint-*")}:
            raise ConfigError(
                f"no checkpoint of the last run in {args.output_dir}, only of others before it; name the one to go on from "
                "with resume_from_checkpoint"
            ) from None
        raise


def on_main() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0 and int(os.environ.get("LOCAL_RANK", "0")) == 0


def run_program(main: Callable[[], Any]) -> None:
    """Run a recipe as a program: an error of ours is one line and its exit code, and the process group is left in order."""
    try:
        main()
    except HFObjectivesError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        leave_group()
