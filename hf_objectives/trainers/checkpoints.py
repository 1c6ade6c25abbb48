"""What makes a checkpoint whole, how one comes to its name, and which one a run goes on from.

A checkpoint is written in a staging folder, checksummed, synced to the disk and renamed. So a folder `checkpoint-N` with a
`manifest.json` was whole once; the manifest says whether it still is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import sort_checkpoints

from hf_objectives.distributed import gather_objects, rank, world_size
from hf_objectives.errors import CheckpointError
from hf_objectives.types import option, parse_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
#: Transformers does not take it for a checkpoint, and its pushes to the Hub leave out what begins with "_".
_UNREAD = "training_args.bin"  # a pickle, which no resume reads and no push takes along
_STAGING = "_tmp-checkpoint-"
_STATE = "trainer_state.json"
_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "*/adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.bin"),
    *("pytorch_model_fsdp.bin", "pytorch_model_fsdp_*", "global_step*"),  # the last is a folder of DeepSpeed
)
#: What a resumed run needs beside weights and state, and where it may stand; DeepSpeed's `latest` names a folder of its own.
_NEEDED = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "latest"),
    "scheduler": ("scheduler.pt", "latest"),
    "random states": ("rng_state*.pth",),
}
_ANEW = (
    "A resume would take its weights and its step, and begin optimizer, learning-rate schedule and random states anew"
)


@dataclass
class CheckpointSettings:
    """Settings of every trainer here that saves checkpoints."""

    resume_incomplete: bool = option(
        False, "Go on from a checkpoint without optimizer, scheduler or random states, as save_only_model leaves them."
    )


class StepRows(NamedTuple):
    """How many rows an optimizer step takes: those of a batch, batches of a process, processes with rows of their own."""

    batch: int
    accumulation: int
    processes: int

    @property
    def total(self) -> int:
        """Rows of all processes."""
        return self.batch * self.accumulation * self.processes

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self))} = {self.total} rows a step"


class WholeCheckpoint(str):
    """The folder of a checkpoint that was found whole, so that nobody reads it all a second time."""


# -- writing -----------------------------------------------------------------------------------------------------


def staging_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written, in the folder of a run."""
    return run / f"{_STAGING}{step}" / f"checkpoint-{step}"


def clear_staging(run: Path) -> None:
    """Remove what a save left that was killed or failed."""
    for folder in run.glob(f"{_STAGING}*"):
        shutil.rmtree(folder)


def publish(staged: Path, run: Path, *, saves: bool, together: bool, step_rows: StepRows | None = None) -> None:
    """List a checkpoint that is written in its manifest, sync it to the disk, and give it its name; all ranks call it.

    Args:
        staged: the staging folder of the checkpoint.
        run: the folder of the run.
        saves: whether this rank renames.
        together: whether all ranks see the same folder, so that each reads a share of the files.
        step_rows: what the manifest tells of the batches of the run, see `step_rows_of`.
    """
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()) if saves else []
    sums: dict[str, str] = {}
    if together:
        names = next(filter(None, gather_objects(names)), [])
        share = {name: _checksum(staged / name) for name in names[rank() :: world_size()] if (staged / name).exists()}
        sums = {name: crc for part in gather_objects(share) for name, crc in part.items()}
    if not saves:
        return
    listed = {}
    for name in names:
        _sync(staged / name)
        if name == _UNREAD:
            continue
        crc = sums.get(name) or _checksum(staged / name)
        listed[name] = {"size": (staged / name).stat().st_size, "crc32": crc}
    manifest = staged / MANIFEST
    facts = {} if step_rows is None else {"step_rows": step_rows._asdict()}
    manifest.write_text(json.dumps({"version": 1, "processes": world_size(), **facts, "files": listed}, indent=1))
    for path in (manifest, *(path for path in staged.rglob("*") if path.is_dir()), staged):
        _sync(path)
    final, replaced = run / staged.name, staged.with_name("replaced")
    try:
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    _sync(run)
    shutil.rmtree(staged.parent)


def step_rows_of(folder: Path) -> StepRows | None:
    """The rows of a step of the run that saved a checkpoint; None where its manifest does not say, or is not there."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        facts = parse_json((folder / MANIFEST).read_bytes()).get("step_rows")
        return None if facts is None else StepRows(**facts)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged ({error!s:.200}); resume from another checkpoint"
        ) from error


def rotate(run: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the oldest checkpoints of a run until `limit` are left; those to keep stay, whatever their age."""
    if limit is None or limit <= 0:
        return
    kept = {path.resolve() for path in keep}
    folders = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]  # the oldest first
    too_many = len(folders) - max(limit, len(kept))
    for folder in [folder for folder in folders if folder.resolve() not in kept][: max(too_many, 0)]:
        # Renamed first: a removal that is killed half-way leaves nothing that looks like a checkpoint.
        removed = run / f"{_STAGING}{folder.name}-removed"
        with contextlib.suppress(OSError):
            folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _checksum(path: Path) -> str:
    """CRC-32 of a file. It finds damage, at twice the rate of SHA-256; who means harm could write the manifest as well."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- whole or not ------------------------------------------------------------------------------------------------


def fault_of(folder: Path, *, incomplete: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """Find why a run cannot go on from a checkpoint.

    With a manifest every byte is read. A checkpoint without one, which another program or an earlier release wrote, has to
    hold what a resume needs, in files that can be read.

    Args:
        folder: the checkpoint.
        incomplete: whether it may lack optimizer, scheduler and random states.
        share: which of how many processes this one is, that read a checkpoint with a manifest together.

    Returns:
        The first fault, with the name of the file; None for a whole checkpoint.
    """
    if not folder.is_dir():
        return "no such folder"
    has_manifest = (folder / MANIFEST).exists()
    if not has_manifest and folder.parent.name.startswith(_STAGING):
        return "it was being written when its run ended"
    fault = _against_manifest(folder, share) if has_manifest else _unlisted_fault(folder) if share[0] == 0 else None
    if fault is None and not incomplete and (lacking := lacks(folder)):
        return f"it has no {' and no '.join(lacking)}. {_ANEW}; set resume_incomplete=True to ask for that"
    return fault


def lacks(folder: Path) -> list[str]:
    """Which of optimizer, scheduler and random states a checkpoint is without."""
    return [what for what, places in _NEEDED.items() if not _holds(folder, places)]


def _holds(folder: Path, patterns: Iterable[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _against_manifest(folder: Path, share: tuple[int, int]) -> str | None:
    try:
        files = parse_json((folder / MANIFEST).read_bytes())["files"]
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != facts["size"]:
                return f"{name} has {size} bytes; {MANIFEST} says {facts['size']}"
        for name, facts in [*files.items()][share[0] :: share[1]]:  # what takes long comes last
            if (found := _checksum(folder / name)) != facts["crc32"]:
                return f"{name} was changed: its CRC-32 is {found}; {MANIFEST} says {facts['crc32']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as error:
        return f"a file cannot be read ({error})"
    return None


def _unlisted_fault(folder: Path) -> str | None:
    if not (folder / _STATE).exists():
        return f"it has no {_STATE}, which is written last"
    if not _holds(folder, _WEIGHTS):
        return "it has no weights"
    for index in folder.glob("*.index.json"):
        if _unreadable(index) is None:
            try:
                names = sorted({*parse_json(index.read_bytes())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError):
                return f"{index.name} is damaged"
            for name in names:
                if not (folder / name).exists():
                    return f"{name} is missing, which {index.name} names"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if (reason := _unreadable(path)) is not None:
            return f"{path.relative_to(folder).as_posix()} cannot be read ({reason})"
    return None


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read as what its name says."""
    try:
        if path.suffix == ".json":
            parse_json(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass  # the header is held against the file's length
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


# -- finding -----------------------------------------------------------------------------------------------------


def find_checkpoint(
    asked: str | Path | bool | None,
    run: Path,
    *,
    incomplete: bool = False,
    own_files: Iterable[str] = (),
    stranger: Callable[[Path], str | None] = lambda folder: None,
) -> WholeCheckpoint | None:
    """Find the checkpoint to go on from; all ranks call it, and find the same one.

    Args:
        asked: the checkpoint's folder; True for the newest whole one of the run; None or False for none.
        run: the folder of the run.
        incomplete: whether it may lack optimizer, scheduler and random states.
        own_files: files that this rank will read, beside those that every Trainer does.
        stranger: why a checkpoint of the folder is not one of this run; None for one that is.

    Raises:
        CheckpointError: the checkpoint that was named cannot be gone on from, or there is none that can.
    """
    if asked is None or asked is False or isinstance(asked, WholeCheckpoint):
        return asked or None
    if asked is not True:
        if fault := _fault_on_any_rank(Path(asked), incomplete, own_files):
            raise CheckpointError(f"{asked} is no checkpoint to resume from: {fault}")
        return _chosen(Path(asked), {})
    if _share()[0] == 0:
        _finish_renames(run)
    names = {name for part in gather_objects(_checkpoints_in(run)) for name in part}
    passed: dict[str, str] = {}
    for name in sorted(names, key=lambda name: int(name[11:]), reverse=True):
        fault = stranger(run / name) or _fault_on_any_rank(run / name, incomplete, own_files)
        if fault is None:
            return _chosen(run / name, passed)
        passed[name] = fault
    raise CheckpointError(f"no checkpoint to resume from in {run}{_listed(passed)}")


def _checkpoints_in(run: Path) -> list[str]:
    return [path.name for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _chosen(folder: Path, passed: dict[str, str]) -> WholeCheckpoint:
    states = gather_objects(None if (folder / _random_states()).exists() else _random_states())
    lines = [f"passed over{_listed(passed)}"] if passed else []
    if lacking := lacks(folder):
        lines.append(f"it has no {' and no '.join(lacking)}. {_ANEW.replace('A resume would', 'The resume will')}")
    elif missing := [*filter(None, states)]:
        lines.append(f"it has no {', '.join(missing)}: other processes saved it. Random states begin anew there")
    if lines and rank() == 0:
        logger.warning("resuming from %s; %s", folder, "; ".join(lines))
    return WholeCheckpoint(folder)


def _listed(passed: dict[str, str]) -> str:
    return ": " + "; ".join(f"{name} ({fault})" for name, fault in passed.items()) if passed else ""


def _random_states() -> str:
    return "rng_state.pth" if world_size() == 1 else f"rng_state_{rank()}.pth"


def _share() -> tuple[int, int]:
    """Which process of its node this is, and of how many: nodes may have disks of their own."""
    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return local if world_size() > 1 else (0, 1)


def _fault_on_any_rank(folder: Path, incomplete: bool, own_files: Iterable[str]) -> str | None:
    """The processes of a node read a checkpoint together, and each looks for its own files."""
    fault = fault_of(folder, incomplete=incomplete, share=_share())
    if fault is None and not (folder / MANIFEST).exists():
        own = [*own_files]
        if world_size() > 1 and any(folder.glob("rng_state_*.pth")):
            own.append(_random_states())
        fault = next((f"{name} is missing" for name in own if not (folder / name).exists()), None)
    return next(filter(None, gather_objects(fault)), None)


def _finish_renames(run: Path) -> None:
    """Give checkpoints their name that were whole when their run was killed: the manifest is written last."""
    for staged in run.glob(f"{_STAGING}*/checkpoint-*"):
        if not (run / staged.name).exists() and fault_of(staged, incomplete=True) is None:
            with contextlib.suppress(FileNotFoundError):  # a process of another node was faster
                staged.rename(run / staged.name)
