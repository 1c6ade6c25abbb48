"""Acts of trainers on two processes, all in one launch; each rank writes the outcomes of its acts as JSON."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset, IterableDataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_objectives import DiagnosticsCallback, demo
from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.distributed import gather_objects, leave_group, rank
from hf_objectives.errors import ConfigError, DiskFullError, NonFiniteError
from hf_objectives.trainers import (
    PerplexityTrainer,
    PerplexityTrainingArguments,
    RunTerminated,
    StepWatch,
    watch_steps,
)
from tests.support import dpo_worlds, language_models, reward_worlds
from tests.support.language_models import (
    TOKENIZER,
    answer_five,
    arguments,
    chats,
    llama,
    mixtral,
    poisoned,
    rows_with_a_bad_one,
)
from tests.support.monitored_runs import trainer_of
from tests.support.ppo_acts import ppo_layouts, ppo_steps
from tests.support.ranks import run_ranks
from tests.support.terminations import Terminate


def evaluate(folder: Path) -> dict:
    """Losses for both collators and several batch sizes; 23 rows do not divide by two."""
    losses = {}
    for name, collator in (
        ("padded", DataCollatorForAssistantOnlyLM(TOKENIZER)),
        ("packed", DataCollatorWithEosPacking(TOKENIZER, max_length=200)),
    ):
        for batch_size in (1, 7):
            options = arguments(folder, per_device_eval_batch_size=batch_size)
            run = PerplexityTrainer(llama(), options, collator, eval_dataset=chats(), processing_class=TOKENIZER)
            losses[f"{name} {batch_size}"] = run.evaluate()
    return losses


def answers(folder: Path) -> list:
    """Five prompts, of which one rank answers three and the other two."""
    return answer_five()


def gradient(folder: Path) -> dict:
    """The gradient of one step of eight rows, four on each rank."""
    seen = {}

    class Stop(Exception):
        pass

    class Catch(PerplexityTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            seen.update({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()})
            raise Stop

    options = arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0)
    try:
        Catch(llama(), options, None, train_dataset=chats(8), processing_class=TOKENIZER).train()
    except Stop:
        torch.save(seen, folder / f"gradient_{rank()}.pt")
    return {}


def experts(folder: Path) -> dict:
    """What a mixture of experts logs of a step of eight rows, and of packed rows from a stream."""
    logs = {}
    for name, rows, collator in (
        ("padded", chats(8), None),
        ("stream", IterableDataset.from_generator(chats), DataCollatorWithEosPacking(TOKENIZER, max_length=400)),
    ):
        options = {"max_steps": 1, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
        args = arguments(folder, per_device_train_batch_size=4, **options)
        run = PerplexityTrainer(mixtral(), args, collator, train_dataset=rows, processing_class=TOKENIZER)
        run.train()
        logs[name] = run.state.log_history[0]
    return logs


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def not_finite(folder: Path, make_arguments: Callable = arguments) -> dict:
    """The bad row is on one rank; both must stop, with the weights they had."""
    model, before = poisoned(), {}
    options = make_arguments(folder, per_device_train_batch_size=1, max_steps=4, check_isolation=False)

    class Remember(PerplexityTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            before.update({name: local(p).clone() for name, p in self.model.named_parameters()})
            return super()._get_grad_norm(model, grad_norm)

    run = Remember(model, options, None, train_dataset=rows_with_a_bad_one(), processing_class=TOKENIZER)
    try:
        run.train()
    except NonFiniteError as error:
        for module in run.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the report's forward leaves norm and head whole
        same = all(torch.equal(local(p), before[name]) for name, p in run.model.named_parameters())
        return {"stopped": str(error), "step": run.state.global_step + 1, "same": same}
    return {"stopped": ""}


def on_shards(folder: Path, kind: str = "FULL_STATE_DICT", **options) -> PerplexityTrainingArguments:
    """Arguments of an FSDP2 run. Accelerate shards on accelerators alone, torch on a CPU as well: so the group is called
    one of GPUs, after the device was chosen."""
    fsdp = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": kind,
    }
    args = arguments(folder, fsdp=True, fsdp_config=fsdp, **options)
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def sharded(folder: Path) -> dict:
    """Evaluate, train, save half-way, evaluate, save; resume from half-way; the same unsharded."""
    outcome = {}
    for tied in (False, True):
        for options in (arguments, on_shards):
            name = f"{options.__name__} {'tied' if tied else 'untied'}"

            def make(name: str = name, tied: bool = tied, options: Callable = options) -> PerplexityTrainer:
                steps = {"max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
                args = options(folder / name, save_strategy="steps", save_steps=2, **steps)
                collator = DataCollatorWithEosPacking(TOKENIZER, max_length=200)
                return PerplexityTrainer(
                    llama(tie_word_embeddings=tied), args, collator,
                    train_dataset=chats(), eval_dataset=chats(), processing_class=TOKENIZER,
                )  # fmt: skip

            run = make()
            before = run.evaluate()["eval_loss"]
            run.train()
            assert run.is_fsdp_enabled == (options is on_shards)
            run.save_model(str(folder / name / "final"))
            resumed = make()
            resumed.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
            losses = [[log["loss"] for log in one.state.log_history if "loss" in log] for one in (run, resumed)]
            evaluations = [one.evaluate()["eval_loss"] for one in (run, resumed)]
            outcome[name] = {"losses": losses, "evaluations": evaluations, "before": before}
    return outcome


def not_finite_sharded(folder: Path) -> dict:
    return not_finite(folder, on_shards)


def dpo(folder: Path) -> dict:
    """Metrics of seven pairs on two ranks, from rows and from a stream, and what training logs of eight."""
    rows = Dataset.from_list(dpo_worlds.PAIRS[:7])
    sets = {"rows": rows, "stream": rows.to_iterable_dataset(), "packed": rows, "unnumbered": rows}
    found = {}
    for name, tests in sets.items():
        run = dpo_worlds.ours(
            dpo_worlds.load(folder / "model"),
            folder / name,
            tests=tests,
            trainer={"ref_model": dpo_worlds.load(folder / "other")},
            per_device_eval_batch_size=2,
            padding_free=name == "packed",
        )
        if name == "unnumbered":
            run.data_collator.return_rows = False
        found[name] = run.evaluate()
    run = dpo_worlds.ours(str(folder / "model"), folder / "run", max_steps=2, per_device_train_batch_size=2)
    run.train()
    found["logs"] = [log for log in run.state.log_history if "loss" in log]
    return found


def rewards(folder: Path) -> dict:
    """What a reward model logs of packed and of padded pairs: two steps of eight rows, evaluations of seven, one before."""
    logs = {}
    for free in (False, True):
        run = reward_worlds.trainer(folder / str(free), padding_free=free, per_device_train_batch_size=4)
        run.evaluate()
        run.train()
        logs[f"padding_free={free}"] = run.state.log_history
    return logs


def skip(folder: Path) -> dict:
    """A monitor that leaves out the step of a bad batch; the sums of the weights on all ranks."""
    run = trainer_of("ours", folder, stop_on_non_finite=False, per_device_train_batch_size=1)
    run.add_callback(DiagnosticsCallback(run, on_spike="skip"))
    run.train()
    return {"weights": gather_objects(float(sum(p.double().sum() for p in run.model.parameters())))}


def checkpoints(folder: Path) -> dict:
    """A run with dropout that saves twice; resumed with half a random state of rank 1, and with no space there."""

    def make(name: str, **options) -> PerplexityTrainer:
        steps = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
        model = llama(attention_dropout=0.1)
        return language_models.trainer(folder / name, model=model, **{**steps, **options})

    best = make("whole", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=2)
    best.train()
    found = {"best": best.state.best_model_checkpoint, "losses": losses(best)}
    if rank() == 1:
        cut = folder / "whole" / "checkpoint-6" / "rng_state_1.pth"
        cut.write_bytes(cut.read_bytes()[:1000])
    torch.manual_seed(9)
    resumed = make("whole", save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    found |= {"resumed": losses(resumed), "manifest": (folder / "whole" / "checkpoint-4" / "manifest.json").read_text()}

    full = make("full")
    save = full._save_rng_state

    def saved(output_dir: str) -> None:
        if rank() == 1 and full.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(output_dir)

    full._save_rng_state = saved
    try:
        full.train()
    except DiskFullError as error:
        found["full"] = str(error)
    gather_objects(None)  # rank 0 removes what was half written
    return {**found, "left": sorted(path.name for path in (folder / "full").iterdir())}


def steps_of(run: PerplexityTrainer, checkpoint: str | None = None) -> list[list[list[int]]]:
    """The rows of this rank in each step."""
    steps: list[list[list[int]]] = []

    class Rows(StepWatch):
        def step_ends(self, batches, grad_norm):
            ids = [
                row for inputs, _ in batches for row in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            steps.append([row[mask == 1].tolist() for row, mask in ids])

    watch_steps(run, Rows())
    run.train(resume_from_checkpoint=checkpoint)
    return steps


def resumed_rows(folder: Path) -> dict:
    """A run of eight rows a step, and one that takes half the rows of a process from its checkpoint on; the refused one."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    whole = steps_of(language_models.trainer(folder, **options, per_device_train_batch_size=4))
    checkpoint = str(folder / "checkpoint-4")
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = steps_of(language_models.trainer(folder / "again", max_steps=6, **halves), checkpoint)
    try:
        language_models.trainer(folder, max_steps=6, per_device_train_batch_size=8).train(checkpoint)
    except ConfigError as error:
        return {"whole": whole, "resumed": resumed, "refused": str(error)}
    return {}


def terminated(folder: Path) -> dict:
    """SIGTERM to rank 1 alone."""
    options = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "no"}
    run = language_models.trainer(folder, model=llama(), **options)
    if rank() == 1:
        run.add_callback(Terminate(3))
    code = None
    try:
        run.train()
    except RunTerminated as error:
        code = error.code
    gather_objects(None)
    return {
        "code": code,
        "step": run.state.global_step,
        "left": sorted(path.name for path in folder.glob("*checkpoint*")),
    }


def losses(run: PerplexityTrainer) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def sharded_checkpoints(folder: Path) -> dict:
    """Shards in folders of a checkpoint: listed in its manifest, and gone on from; a shard that is cut is found."""

    def make() -> PerplexityTrainer:
        steps = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
        args = on_shards(folder, "SHARDED_STATE_DICT", **steps)
        return PerplexityTrainer(llama(), args, None, train_dataset=chats(), processing_class=TOKENIZER)

    whole = make()
    whole.train()
    listed = sorted(json.loads((folder / "checkpoint-2" / "manifest.json").read_text())["files"])
    gather_objects(None)
    if rank() == 1:
        (shard,) = (folder / "checkpoint-4" / "optimizer_0").glob("__1_*.distcp")
        shard.write_bytes(shard.read_bytes()[:-1])
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    return {"listed": listed, "losses": losses(whole), "resumed": losses(resumed)}


# Those on shards come last: they change what accelerate takes the group for.
ACTS = (
    evaluate,
    answers,
    gradient,
    experts,
    not_finite,
    dpo,
    rewards,
    ppo_steps,
    ppo_layouts,
    skip,
    checkpoints,
    resumed_rows,
    terminated,
    sharded,
    not_finite_sharded,
    sharded_checkpoints,
)


@dataclass(frozen=True)
class Outcomes:
    """What the acts left: `<folder>/<act>` and the standard error of both ranks."""

    folder: Path
    stderr: str

    def of(self, act: str) -> list[dict]:
        """The outcome on each rank."""
        return [json.loads((self.folder / act / f"outcome_{rank}.json").read_text()) for rank in (0, 1)]


def start(folder: Path) -> Outcomes:
    """Run all acts."""
    for seed, name in enumerate(("model", "other")):
        model = demo.build_model(dpo_worlds.TOKENIZER, hidden_size=32, num_layers=2, seed=seed)
        model.save_pretrained(folder / "dpo" / name)
    done = run_ranks(__file__, [str(folder)])
    assert done.returncode == 0, done.stderr[-6000:]
    return Outcomes(folder, done.stderr)


def main() -> None:
    for act in ACTS:
        folder = Path(sys.argv[1]) / act.__name__
        folder.mkdir(exist_ok=True)
        outcome = act(folder)  # the first one makes the group
        (folder / f"outcome_{rank()}.json").write_text(json.dumps(outcome))
    leave_group()


if __name__ == "__main__":
    main()
