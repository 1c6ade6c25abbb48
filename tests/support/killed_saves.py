"""Saves of a tiny run that are killed at every file: one process that forks, and writes what came of it as JSON."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

import torch
import transformers.modeling_utils

from hf_objectives.errors import CheckpointError
from hf_objectives.trainers.checkpoints import find_checkpoint
from tests.support import language_models, ppo_worlds

SAVED, KILLED, STEPS = 2, 4, 6  # a whole checkpoint, the one at whose save the run is killed, the end
SETTINGS = {
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": STEPS, "learning_rate": 1e-2,
    "warmup_steps": 3,
}  # fmt: skip
CHANGES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}
#: With another folder of output in it. A resumed run does not read it.
NOT_COMPARED = {"training_args.bin", "manifest.json"}


def make(kind: str, folder: Path, **options):
    """A trainer with dropout, so that random states matter; PPO answers by the policy."""
    settings = {**SETTINGS, **options}
    if kind == "ppo":
        return ppo_worlds.ppo(
            folder, per_device_train_batch_size=2, steps_per_generation=2, num_iterations=2, **settings
        )
    return language_models.trainer(folder, model=language_models.llama(attention_dropout=0.1), **settings)


def kill_at(moment: int, folder: Path, *, halve: bool) -> None:
    """Kill this process at a change in a folder, by its number from 0; `halve` cuts the file that was written last in two."""
    changes, last = count(), []

    def change(path) -> None:
        if str(path).startswith(str(folder)):
            if next(changes) == moment:
                if halve and last and Path(last[-1]).is_file():
                    os.truncate(last[-1], Path(last[-1]).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            last.append(path)

    def audited(event: str, args: tuple) -> None:
        if event in CHANGES and not (event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            change(args[0])

    def around(holder, name: str, path_at: int) -> None:
        usual = getattr(holder, name)

        def watched(*args, **kwargs):
            path = kwargs.get("filename", args[path_at] if len(args) > path_at else None)
            path = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path
            change(path)  # Python's own audit does not see these
            result = usual(*args, **kwargs)
            change(path)
            return result

        setattr(holder, name, watched)

    around(torch, "save", 1)
    around(transformers.modeling_utils, "safe_save_file", 1)
    around(os, "fsync", 0)
    sys.addaudithook(audited)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED
    }


def losses(run) -> dict[int, float]:
    return {log["step"]: log["loss"] for log in run.state.log_history if "loss" in log}


def weights(run) -> list[torch.Tensor]:
    critic = getattr(run, "critic", None)
    return [*run.model.state_dict().values(), *(() if critic is None else critic.state_dict().values())]


def killed_saves(kind: str, folder: Path) -> dict:
    """Train; at the save of a step let copies of the process be killed at every change; resume from what they left."""
    whole = make(kind, folder / "whole")
    save, copies, known = whole._save_checkpoint, [], {}

    def saved(model, trial) -> None:
        if whole.state.global_step == KILLED:
            known[SAVED] = contents(folder / "whole" / f"checkpoint-{SAVED}")
            for moment, halve in ((moment, halve) for moment in count() for halve in (False, True)):
                copy = folder / f"killed-{moment}-{halve}"
                shutil.copytree(folder / "whole", copy)
                copies.append(copy)
                state = random.getstate()
                child = os.fork()
                if not child:
                    random.setstate(state)  # Python gives a child another one
                    whole.args.output_dir = str(copy)
                    kill_at(moment, copy, halve=halve)
                    save(model, trial)
                    os._exit(0)
                if os.waitpid(child, 0)[1] == 0:
                    break
        save(model, trial)
        if whole.state.global_step == KILLED:
            known[KILLED] = contents(folder / "whole" / f"checkpoint-{KILLED}")

    whole._save_checkpoint = saved
    whole.train()
    chosen, groups = [], {}
    for copy in copies:
        try:
            found = Path(find_checkpoint(True, copy))
        except CheckpointError as error:
            return {"lost": str(error)}
        step = int(found.name.rpartition("-")[2])
        chosen.append(step)
        if contents(found) != known[step]:
            return {"other bytes": str(found)}
        groups[step] = copy
    resumed = {}
    for step, copy in groups.items():
        torch.manual_seed(99)
        run = make(kind, copy)
        run.train(resume_from_checkpoint=True)
        same = [torch.equal(p, q) for p, q in zip(weights(run), weights(whole), strict=True)]
        resumed[step] = {"losses": losses(run), "weights": all(same)}
    return {"chosen": chosen, "losses": losses(whole), "resumed": resumed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {kind: killed_saves(kind, Path(sys.argv[1]) / kind) for kind in sys.argv[2:]}
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
