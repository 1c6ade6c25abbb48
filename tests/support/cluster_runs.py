"""Runs whose figures must not depend on the cluster: the same rows a step, divided in another way. Each rank of a launch runs
this file with the runs as JSON; rank 0 writes what each logged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_objectives import demo
from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.distributed import gather_objects, leave_group, rank, world_size
from hf_objectives.mixture import build_mixture
from hf_objectives.preparation import prepare_dataset
from hf_objectives.trainers import (
    PerplexityDPOConfig,
    PerplexityDPOTrainer,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    RewardModelConfig,
    RewardModelTrainer,
)

ROOT = Path(__file__).parents[2]
LAUNCHED_SHARDED = "ACCELERATE_USE_FSDP" in os.environ  # by accelerate launch; a first sharded run sets it too
STEP_ROWS, LENGTH = 16, 256
ROWS, TESTS = 160, 23  # ten steps an epoch; a number that no number of ranks divides
LANGUAGE = {"pretraining": "all", "fine-tuning": "assistant"}
CASES = (
    *((objective, rows) for objective in LANGUAGE for rows in ("padded", "packed", "mixture")),
    *((objective, rows) for objective in ("reward", "dpo") for rows in ("padded", "padding-free")),
)


@dataclass(frozen=True)
class Run:
    """A run of one objective.

    Attributes:
        objective, rows: one of CASES.
        sharded: whether FSDP2 shards the model.
        accumulation: micro-batches of a step.
        workers: of the loader.
        save: after how many steps it is saved; 0 for never.
        resume: the checkpoint that it goes on from.
    """

    objective: str
    rows: str
    sharded: bool = False
    accumulation: int = 1
    steps: int = 20
    workers: int = 0
    save: int = 0
    resume: str = ""

    @property
    def case(self) -> tuple[str, str]:
        """Of CASES."""
        return self.objective, self.rows

    @property
    def name(self) -> str:
        """What its results are called."""
        words = [self.objective, self.rows, "fsdp2" * self.sharded, f"accumulation {self.accumulation}"]
        words += [f"workers {self.workers}"] * bool(self.workers) + ["resumed"] * bool(self.resume)
        return " ".join(filter(None, words))


def processes() -> int:
    """Ranks of this launch, also before they are a group."""
    return int(os.environ.get("WORLD_SIZE", 1))


def options(run: Run, folder: Path) -> dict[str, Any]:
    """Arguments that all trainers know."""
    given: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "max_steps": run.steps, "logging_steps": 1, "logging_nan_inf_filter": False,
        "per_device_train_batch_size": STEP_ROWS // run.accumulation // processes(), "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": run.accumulation, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
        "dataloader_num_workers": run.workers, "save_strategy": "steps" if run.save else "no", "save_steps": run.save or 1,
    }  # fmt: skip
    if run.sharded and not LAUNCHED_SHARDED:
        given["fsdp"] = True
        given["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return given


def settled(args: Any, run: Run) -> Any:
    """Arguments after the device was chosen. Accelerate shards on accelerators alone, torch on a CPU as well: so the group is
    called one of GPUs."""
    assert args.device.type == "cpu"
    if run.sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def language_model(run: Run, folder: Path) -> PerplexityTrainer:
    """Pretraining on texts, or fine-tuning on chats."""
    make, train_on = (demo.texts if run.objective == "pretraining" else demo.chats), LANGUAGE[run.objective]
    tokenizer = demo.build_tokenizer()
    collator: Any = DataCollatorForAssistantOnlyLM(tokenizer, train_on=train_on)
    rows: Any = make(ROWS)
    if run.rows == "packed":
        collator = DataCollatorWithEosPacking(tokenizer, max_length=LENGTH, train_on=train_on)
        whole = Dataset.from_list(make(8 * ROWS))
        rows = prepare_dataset(whole, tokenizer, max_length=LENGTH, train_on=train_on).select(range(ROWS))
    elif run.rows == "mixture":
        sources = {
            name: {"weight": weight, "dataset": Dataset.from_list(make(ROWS, seed=weight))}
            for name, weight in (("two", 2), ("one", 1))
        }
        config: dict[str, Any] = {"sources": sources, "train_on": train_on, "max_length": LENGTH}
        if run.objective == "pretraining":
            collator = DataCollatorWithEosPacking(tokenizer, max_length=LENGTH, train_on=train_on)
            config["packing"] = "across"
        rows = build_mixture(config, tokenizer=tokenizer)
    args = settled(PerplexityTrainingArguments(**options(run, folder)), run)
    return PerplexityTrainer(
        demo.build_model(tokenizer, hidden_size=32, num_layers=2), args, collator,
        train_dataset=rows, eval_dataset=make(TESTS, split="test"), processing_class=tokenizer,
    )  # fmt: skip


def reward(run: Run, folder: Path) -> RewardModelTrainer:
    """A reward model, whose head is drawn wide, so that rewards differ."""
    tokenizer = demo.build_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer) + 8, num_labels=1, **sizes))
    torch.nn.init.normal_(model.score.weight, std=0.5)
    # A margin is a small difference of large rewards. At 1e-3 the steps make what float32 rounds there twenty times as large;
    # in float64 gradient norms are the same to 3e-16.
    changed = {"learning_rate": 1e-4, "padding_free": run.rows == "padding-free"}
    args = settled(RewardModelConfig(**{**options(run, folder), **changed}), run)
    return RewardModelTrainer(model, args, processing_class=tokenizer, **pairs())


def dpo(run: Run, folder: Path) -> PerplexityDPOTrainer:
    """DPO against another model, so that the first losses differ too."""
    tokenizer = demo.build_tokenizer()
    model, other = (demo.build_model(tokenizer, hidden_size=32, num_layers=2, seed=seed) for seed in (0, 1))
    args = settled(PerplexityDPOConfig(**options(run, folder), padding_free=run.rows == "padding-free"), run)
    return PerplexityDPOTrainer(model, other, args, processing_class=tokenizer, **pairs())


def pairs() -> dict[str, Dataset]:
    """Preference pairs to train on and to evaluate."""
    return {
        "train_dataset": Dataset.from_list(demo.preferences(ROWS)),
        "eval_dataset": Dataset.from_list(demo.preferences(TESTS, split="test")),
    }


def figures(run: Run, folder: Path) -> dict[str, Any]:
    """What a run logs of each step, and evaluations before and after it."""
    make = {"reward": reward, "dpo": dpo}.get(run.objective, language_model)
    trainer: Any = make(run, folder / f"{processes()} ranks" / run.name)
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=run.resume or None)
    assert trainer.is_fsdp_enabled == run.sharded
    steps = [log for log in trainer.state.log_history if "loss" in log]
    return {"steps": steps, "before": before, "after": trainer.evaluate(), "ranks": world_size(), "run": asdict(run)}


# -- what starts the ranks and reads their results --------------------------------------------------------------------


def launch(
    folder: Path, runs: Sequence[Run], ranks: int, *, hosts: int = 1, launcher: Sequence[str] = ()
) -> list[dict]:
    """Start ranks with torchrun, a launcher a host, and return what each run logged.

    Args:
        folder: where runs write.
        ranks: of all hosts together.
        hosts: launchers that meet at a rendezvous.
        launcher: the command of another launcher, in which `{host}` and `{port}` are filled in.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=numbers", "--local-addr=127.0.0.1"]
    usual = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={hosts}",
        f"--nproc-per-node={ranks // hosts}",
        *meet,
    ]
    words = [__file__, str(folder), json.dumps([asdict(run) for run in runs])]
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for host in range(hosts):
        command = [word.format(host=host, port=port) for word in launcher or usual]
        with (folder / f"output_{ranks}_{host}.txt").open("w") as output:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            started.append(
                subprocess.Popen([*command, *words], stdout=output, stderr=output, cwd=ROOT, env=environment)
            )
    codes = [one.wait() for one in started]
    texts = [(folder / f"output_{ranks}_{host}.txt").read_text() for host in range(hosts)]
    assert not any(codes), "\n".join(text[-6000:] for text in texts)
    return [json.loads((folder / f"{ranks} ranks" / f"{run.name}.json").read_text()) for run in runs]


def main() -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for given in json.loads(sys.argv[2]):
        run = Run(**given)
        found = figures(run, folder)
        path = folder / f"{world_size()} ranks" / f"{run.name}.json"
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        gather_objects(None)
    leave_group()


if __name__ == "__main__":
    main()
