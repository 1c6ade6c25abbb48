"""Ways to divide the same rows of a step: ranks, hosts, launchers, shards, micro-batches, checkpoints of other launches. What
each gives is held against one process that takes the rows of a step in one batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.support.cluster_runs import CASES, ROOT, Run, figures, launch

STEPS, SAVED = 20, 10
#: The cases of launches that differ in how ranks are started, and in what they go on from.
FEW = (
    *(("pretraining", "mixture"), ("fine-tuning", "padded"), ("fine-tuning", "packed")),
    *(("reward", "padded"), ("dpo", "padding-free")),
)
#: What float32 may change: of the losses and gradient norms of a run, of an evaluation under the same weights, and of one
#: under weights that twenty steps were rounded in.
BOUNDS = {"loss": 1e-5, "grad_norm": 1e-5, "before": 1e-6, "after": 1e-5}
#: Figures of the clock.
_NOT_COMPARED = ("runtime", "_second", "_time", "flos")


@dataclass(frozen=True)
class Outcome:
    """How far a run was from one process.

    Attributes:
        run: the run.
        ranks: of its launch.
        launch: what the launch was.
        far: the largest distance of each of BOUNDS.
    """

    run: Run
    ranks: int
    launch: str
    far: Mapping[str, float]

    @property
    def equal(self) -> bool:
        """Whether all is within its bound."""
        return all(self.far[name] <= bound for name, bound in BOUNDS.items())

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.1e}" for name, value in self.far.items())
        return f"{self.launch}, {self.ranks} ranks, {self.run.name}: {figures}"


def distances(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """The largest distance of each of BOUNDS: relative for losses and gradient norms. Figures of an evaluation may be
    differences of large sums, and are near 0 then: their distance is relative where they are larger than 1."""
    assert [log["step"] for log in found["steps"]] == [log["step"] for log in expected["steps"]]
    far = {
        name: max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(found["steps"], expected["steps"], strict=True))
        for name in ("loss", "grad_norm")
    }
    for name in ("before", "after"):
        figures = {
            key: value for key, value in expected[name].items() if not any(word in key for word in _NOT_COMPARED)
        }
        assert figures.keys() <= found[name].keys() and len(figures) >= 5
        far[name] = max(abs(found[name][key] - value) / max(abs(value), 1) for key, value in figures.items())
    return far


class Clusters:
    """Launches of one folder, and the runs of one process that theirs are compared with."""

    def __init__(self, folder: Path, cases: Sequence[tuple[str, str]] = CASES, steps: int = STEPS) -> None:
        self.folder, self.cases, self.steps = folder, cases, steps
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as each rank has
        self._expected = {run.case: figures(run, folder / "one process") for run in self.runs()}
        torch.set_num_threads(threads)

    def runs(self, *, few: bool = False, **options: Any) -> list[Run]:
        """A run of each case, or of a few."""
        return [Run(*case, steps=self.steps, **options) for case in self.cases if not few or case in FEW]

    def compare(self, name: str, runs: Sequence[Run], ranks: int, **options: Any) -> list[Outcome]:
        """Launch runs, and compare them."""
        found = launch(self.folder / name, runs, ranks, **options)
        return [
            Outcome(run, ranks, name, distances(one, self._expected[run.case]))
            for run, one in zip(runs, found, strict=True)
        ]

    def checkpoint(self, name: str, ranks: int, run: Run) -> str:
        """Where a run of a launch left its checkpoint."""
        return str(self.folder / name / f"{ranks} ranks" / run.name / f"checkpoint-{SAVED}")


def divided(clusters: Clusters) -> Iterator[Outcome]:
    """One, two and four ranks of torchrun; whole and in shards; one and four micro-batches."""
    yield from clusters.compare("torchrun", clusters.runs(accumulation=4), 1)
    for ranks in (2, 4):
        runs = [
            run
            for sharded in (False, True)
            for accumulation in (1, 4)
            for run in clusters.runs(sharded=sharded, accumulation=accumulation)
        ]
        yield from clusters.compare("torchrun", runs, ranks)


def briefly(clusters: Clusters) -> Iterator[Outcome]:
    """Two launchers of one rank each, that meet at a rendezvous; micro-batches, whole and in shards."""
    runs = [*clusters.runs(accumulation=4), *clusters.runs(sharded=True, accumulation=2)]
    yield from clusters.compare("torchrun on two hosts", runs, 2, hosts=2)


def two_hosts(clusters: Clusters, ranks: int = 4) -> Iterator[Outcome]:
    """Two launchers that meet at a rendezvous, as on two hosts."""
    runs = [*clusters.runs(few=True), *clusters.runs(few=True, sharded=True, accumulation=2)]
    yield from clusters.compare("torchrun on two hosts", runs, ranks, hosts=2)


#: The files of hf_objectives/recipes/accelerate that run on a CPU, with the options that a machine of two processes changes.
FILES: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "multi_gpu": ("--num_processes=2", "--mixed_precision=no", "--main_process_port={port}"),
    "fsdp2": ("--num_processes=2", "--mixed_precision=no", "--main_process_port={port}"),
    "multi_node": (
        *("--num_processes=2", "--mixed_precision=no", "--machine_rank={host}"),
        *("--main_process_ip=127.0.0.1", "--main_process_port={port}"),
    ),
}


def from_files(clusters: Clusters) -> Iterator[Outcome]:
    """`accelerate launch` with the files of hf_objectives/recipes/accelerate."""
    for name, changed in FILES.items():
        file = str(ROOT / "hf_objectives" / "recipes" / "accelerate" / f"{name}.yaml")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *changed]
        runs, hosts = clusters.runs(few=True, sharded=name == "fsdp2"), 2 if name == "multi_node" else 1
        yield from clusters.compare(
            f"accelerate launch, {name}.yaml", runs, 1 if name == "cpu" else 2, hosts=hosts, launcher=command
        )


def resumed(clusters: Clusters) -> Iterator[Outcome]:
    """A checkpoint of two ranks, whole or in shards, from which others go on, with other workers too."""
    name = "two ranks save"
    saving = [*clusters.runs(few=True, save=SAVED), *clusters.runs(few=True, save=SAVED, sharded=True)]
    yield from clusters.compare(name, saving, 2)
    for ranks, accumulation in ((1, 2), (2, 4), (4, 4)):
        runs = [
            replace(run, save=0, workers=2, accumulation=accumulation, resume=clusters.checkpoint(name, 2, run))
            for run in saving
            if ranks > 1 or not run.sharded
        ]
        yield from clusters.compare("others go on", runs, ranks)
