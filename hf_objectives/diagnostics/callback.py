"""The live monitor: it records the batch of a spike or of a loss that is not finite, and runs the detectors on the log."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from hf_objectives.diagnostics.batch_record import (
    WEIGHTS,
    describe_examples,
    describes,
    excerpt,
    mean_loss,
    random_state,
    to_json,
    write_event,
)
from hf_objectives.diagnostics.detect import diagnose
from hf_objectives.diagnostics.monitor import Spike, SpikeMonitor
from hf_objectives.diagnostics.suspects import BLOCKLIST, SUSPECTS, Blocked, Suspects, write_blocklist
from hf_objectives.distributed import any_rank, gather_objects, rank
from hf_objectives.errors import ConfigError, NonFiniteError
from hf_objectives.trainers import StepWatch, attention_of, origin_of, prepared_batch, watch_steps
from hf_objectives.types import check_one_of

logger = logging.getLogger(__name__)
ON_SPIKE = ("log", "skip", "stop")
FINDINGS = "findings.jsonl"
_FIRST_LOOK, _NEXT_LOOK = 20, 1.25  # logged lines before the detectors run, and the factor to the next time
# A high loss that is no spike has its examples looked at: (deviations, share of the run's time, looks that are free).
_LOOKS = ((2.5, 0.003, 3), (1.5, 0.001, 1))
_IN_A_ROW = 20  # skipped steps after which the run has ended in all but name
_Window = list[tuple[Mapping[str, Any], Tensor]]


class DiagnosticsCallback(TrainerCallback, StepWatch):
    """Watches every step of a Trainer (ours, transformers', TRL's).

        trainer.add_callback(DiagnosticsCallback(trainer))

    On a spike, or on a loss or gradient that is not finite, it writes `<output_dir>/diagnostics/step_<n>_rank_<r>/` before
    the optimizer's step: the loss of each example, its text with the trained tokens marked, source and row, the gradient
    norm, the tensors and the random states. `hf-objectives replay` computes that batch again. Examples whose loss is far from
    that of their source are named in `suspects.jsonl`. Where source and row are known and the event stands alone, they are
    also in `blocklist.json`, which a mixture takes as its blocklist. As lines are logged it runs `diagnose`, logs each new
    finding once and adds it to `findings.jsonl`.

    Single examples are described for causal language models. Of trainers with reward functions (GRPO, RLOO, PPO), whose loss
    says nothing about a batch, only values that are not finite are events. An error of the monitor itself (a full disk, a
    batch of another kind) is logged; it ends what failed, and not the run.

    Args:
        trainer: the trainer that it is added to.
        on_spike: "log" writes and continues; "skip" also skips the optimizer's step on all ranks; "stop" skips it and ends
            training there (under DeepSpeed after the step). A trainer with `stop_on_non_finite` raises its own error at a
            loss that is not finite.
        save_weights: write the weights of the moment too, so that a replay gives exactly these losses.
        sample_every: steps between two looks at the losses of all examples of a batch, each of which costs a forward pass. A
            spike's examples are compared with them. With 0 only high losses are looked at: three times, and then for 0.3 % of
            the time.
        max_events: number of events that are written; further ones are counted.
        output_dir: folder in place of the trainer's.

    Raises:
        ConfigError: an unknown `on_spike`, a number below 0, a second monitor; "skip" under DeepSpeed, whose engine steps by
            itself, or with a trainer that stops at non-finite losses first; weights under FSDP.
        NonFiniteError: in training, after "skip" has skipped more than 20 steps in a row.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        on_spike: str = "log",
        save_weights: bool = False,
        sample_every: int = 100,
        max_events: int = 20,
        output_dir: str | Path | None = None,
    ) -> None:
        check_one_of("on_spike", on_spike, ON_SPIKE)
        for name, number in (("sample_every", sample_every), ("max_events", max_events)):
            if number < 0:
                raise ConfigError(f"{name} is {number}; expected 0 or more")
        if on_spike == "skip" and trainer.is_deepspeed_enabled:
            raise ConfigError("on_spike='skip' under DeepSpeed, whose engine steps by itself; use 'log' or 'stop'")
        if on_spike == "skip" and getattr(trainer.args, "stop_on_non_finite", False):
            raise ConfigError("on_spike='skip' contradicts stop_on_non_finite; set stop_on_non_finite=False")
        if save_weights and trainer.is_fsdp_enabled:
            raise ConfigError("save_weights under FSDP: one rank alone cannot gather the weights; use checkpoints")
        if any(isinstance(callback, DiagnosticsCallback) for callback in trainer.callback_handler.callbacks):
            raise ConfigError(
                "the trainer has a DiagnosticsCallback already; trainer.remove_callback(DiagnosticsCallback)"
            )
        self.trainer, self.on_spike, self.save_weights = trainer, on_spike, save_weights
        self.sample_every, self.max_events = sample_every, max_events
        self.folder = Path(output_dir or trainer.args.output_dir or ".") / "diagnostics"
        self._has_rewards = hasattr(trainer, "reward_funcs")
        self._leave: Callable[[], None] = lambda: None
        self._begin()

    def _begin(self) -> None:
        """Set the state of a training that has not begun."""
        self.events = 0
        self._monitor, self._suspects = SpikeMonitor(), Suspects()
        self._window: _Window = []
        self._random: dict[str, Any] = {}
        self._grad_norm: float | None = None
        self._looks_failed = False
        self._said: set[tuple[str, int]] = set()
        self._next_look = _FIRST_LOOK
        self._failed: list[Callable[..., Any]] = []  # not tried again
        self._skipped = 0  # steps in a row
        # In seconds: when the run began, and what all looks and the last one took.
        self._began, self._spent, self._last = time.perf_counter(), 0.0, 0.0

    # -- the steps of the trainer -------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch, and read what a run before a resume has written."""
        self._leave()  # a training before this one may have ended in an error
        self._begin()
        self._leave = watch_steps(self.trainer, self)
        for path in {self.folder / BLOCKLIST, self._path(BLOCKLIST)}:
            self._suspects.read(path)
        if not state.global_step:
            return
        if args.logging_strategy == "steps" and args.logging_steps == 1:
            self._monitor.seed([line["loss"] for line in state.log_history[-64:] if "loss" in line])
        findings = self._path(FINDINGS)
        for line in findings.read_text(encoding="utf-8").splitlines() if findings.is_file() else ():
            try:
                said = json.loads(line)
            except ValueError:  # the run was killed while it wrote the line; the finding is written again
                continue
            if said["step"] <= state.global_step:
                self._said.add((said["kind"], said["step"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching, look at the whole log once more, and join the blocked rows of all ranks."""
        self._leave()
        self._suspects.finish()
        gathered = gather_objects({source: set(rows) for source, rows in self._suspects.blocked.items()})
        self._safely(self._close, state, gathered)
        if self.events > self.max_events:
            logger.warning(
                "%d spikes in all; the first %d were written to %s", self.events, self.max_events, self.folder
            )

    def _close(self, state: Any, gathered: list[Blocked]) -> None:
        if state.is_world_process_zero:
            write_blocklist(self.folder / BLOCKLIST, gathered)
        self._diagnose(state)

    def step_begins(self) -> None:
        """Keep the random state, for a replay."""
        self._random = random_state()

    def step_ends(self, batches: _Window, grad_norm: Any) -> None:
        """Keep the batches until the step is judged."""
        self._window, self._grad_norm = batches, None if grad_norm is None else float(grad_norm)

    def step_fails(self) -> None:
        """Where the trainer stops at this step, record it all the same."""
        if self._window:
            self._look(self.trainer.state)
            self._safely(self._keep_suspects, self.trainer.state)
        self._leave()

    def _keep_suspects(self, state: Any) -> None:
        if self._suspects.finish():
            write_blocklist(self._path(BLOCKLIST), [self._suspects.blocked])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the step before the weights change."""
        bad = self._look(state)
        if self.on_spike == "log":
            return
        self._skipped = self._skipped + 1 if any_rank(bad) else 0
        if not self._skipped:
            return
        # The optimizer steps all the same. Without gradients it leaves weights, moments and weight decay as they are.
        # DeepSpeed's engine has gradients of its own.
        if not self.trainer.is_deepspeed_enabled:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            logger.warning("step %d: left out", state.global_step + 1)
        control.should_training_stop |= self.on_spike == "stop"
        if self._skipped > _IN_A_ROW:
            self._leave()
            raise NonFiniteError(
                f"step {state.global_step + 1}: the last {self._skipped} steps were left out, nothing is trained any more; "
                f"their batches are in {self.folder}"
            )

    def _look(self, state: Any) -> bool:
        """Judge the step; record it if it is an event, or if one of its examples may be one. Returns the former."""
        window, self._window = self._window, []
        if not window:
            return False
        loss = float(sum(float(loss) for _, loss in window))
        spike = self._monitor.add(loss)
        if self._has_rewards and math.isfinite(loss):
            spike = None
        # An fp16 scaler handles overflow: it lowers its scale and skips the step itself.
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
        if spike is None and not scaled and self._grad_norm is not None and not math.isfinite(self._grad_norm):
            spike = Spike(loss, loss, math.inf, math.inf)
        self._safely(self._examine, state, loss, spike, window)
        return spike is not None

    def _safely(self, look: Callable[..., None], state: Any, *args: Any) -> None:
        """A monitor must not end the run, and a rank that fails alone would leave the others waiting."""
        if look in self._failed:
            return
        try:
            look(state, *args)
        except Exception:
            self._failed.append(look)
            step = state.global_step + 1
            logger.exception("step %d: the monitor failed; it goes on without what failed, and so does the run", step)

    def _examine(self, state: Any, loss: float, spike: Spike | None, window: _Window) -> None:
        step = state.global_step + 1
        if self._suspects.settle(spike is not None):
            write_blocklist(self._path(BLOCKLIST), [self._suspects.blocked])
        if spike is None and not self._is_due(step):
            return
        is_written = self.events < self.max_events
        if spike is None or is_written:
            examples = self._examples(window)
            suspects = self._suspects.judge(examples, math.inf if spike is None else _limit(spike, examples))
            for suspect in suspects:
                self._append(SUSPECTS, {"step": step, **suspect})
            self._suspects.take(suspects, len(examples))
            if spike is None:
                if not suspects or step == 1:
                    return
                spike = Spike(loss, math.nan, math.nan, math.nan)
        self.events += 1
        if is_written:
            self._write(step, state, spike, window, examples)

    def _is_due(self, step: int) -> bool:
        if self.sample_every and (step % self.sample_every == 0 or step == 1):
            return True
        elapsed, height = time.perf_counter() - self._began, self._monitor.height
        return any(height > high and self._spent <= share * elapsed + free * self._last for high, share, free in _LOOKS)

    # -- examples -----------------------------------------------------------------------------------------------------

    def _examples(self, window: _Window) -> list[dict[str, Any]]:
        """Describe the step's examples, by a forward pass that leaves no trace in the run."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        # A sharded model runs on all ranks or on none.
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or getattr(model, "tp_size", None)
        if sharded or self._looks_failed or not describes(model):
            return []
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        training, described, begin = model.training, [], time.perf_counter()
        model.eval()
        try:
            for number, (batch, _) in enumerate(window):
                with trainer.compute_loss_context_manager():
                    found = describe_examples(model, prepared_batch(trainer, batch), tokenizer)
                described += [{"micro_batch": number, **example} for example in found]
        except Exception:
            # No memory for a further forward pass, or a model of another kind: the step itself is recorded all the same.
            self._looks_failed = True
            step = trainer.state.global_step + 1
            logger.exception("step %d: its examples cannot be looked at, and no others will", step)
            return []
        finally:
            model.train(training)
        self._last = time.perf_counter() - begin
        self._spent += self._last
        return described

    def _write(self, step: int, state: Any, spike: Spike, window: _Window, examples: list[dict[str, Any]]) -> None:
        trainer, args = self.trainer, self.trainer.args
        folder = self.folder / f"step_{step}_rank_{rank()}"
        rates = {} if trainer.lr_scheduler is None else {"learning_rate": trainer.lr_scheduler.get_last_lr()[0]}
        seed = args.seed if args.data_seed is None else args.data_seed
        event = {
            "step": step,
            "rank": rank(),
            "kind": spike.kind,
            "loss": spike.value,
            "losses_of_micro_batches": [float(loss) for _, loss in window],
            "level": spike.level,
            "limit": spike.limit,
            "deviations": spike.deviations,
            "grad_norm": self._grad_norm,
            **rates,
            "epoch": state.epoch,
            # What a replay must know of the run.
            "run": str(Path(args.output_dir or ".").resolve()),
            "weights": WEIGHTS if self.save_weights else None,
            "model": origin_of(trainer.model),
            "dtype": next((str(p.dtype)[6:] for p in trainer.model.parameters() if p.is_floating_point()), None),
            "autocast": {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision),
            "attn_implementation": attention_of(trainer.model),
            "data_state": {"global_step": state.global_step, "epoch": state.epoch, "seed": seed},
            "examples": examples,
        }
        if self.save_weights:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / WEIGHTS)
        write_event(folder, event, [batch for batch, _ in window], self._random)
        usual = "" if math.isnan(spike.level) else f", usually {spike.level:.4g}"
        logger.warning(
            "step %d: loss %.4g%s, gradient norm %s. %s Written to %s",
            *(step, spike.value, usual, self._grad_norm, _advice(examples), folder),
        )

    # -- the log ------------------------------------------------------------------------------------------------------

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the detectors at growing intervals, so that all looks together cost as much as a few."""
        lines = len(state.log_history)
        if lines >= self._next_look:
            self._next_look = max(lines + 10, int(lines * _NEXT_LOOK))
            self._safely(self._diagnose, state)

    def _diagnose(self, state: Any) -> None:
        if not state.is_world_process_zero or len(state.log_history) < 2:
            return
        for found in diagnose(state.log_history):
            # A finding that lasts has the same first step at every look. That of a new one may still move a little.
            near = max(5, found.step // 10)
            if any(kind == found.kind and abs(step - found.step) <= near for kind, step in self._said):
                continue
            self._said.add((found.kind, found.step))
            self._append(FINDINGS, found.to_dict())
            say = logger.info if found.severity == "info" else logger.warning
            say("%s, %s: %s. %s", found.kind, found.steps, found.evidence, found.advice)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # the line before was cut off when the run was killed
            file.write(to_json(entry).encode() + b"\n")

    def _path(self, name: str) -> Path:
        stem, ending = name.split(".")
        return self.folder / (name if rank() == 0 else f"{stem}_rank_{rank()}.{ending}")


def _limit(spike: Spike, examples: list[dict[str, Any]]) -> float:
    """The loss above which an example is suspect: that of the step, where it too is in nats per token."""
    off = abs(mean_loss(examples) - spike.value)
    return spike.limit if math.isfinite(spike.value) and off < 0.25 * abs(spike.value) else math.inf


def _advice(examples: list[dict[str, Any]]) -> str:
    """What to look at in a batch."""
    if not examples:
        return "The monitor can tell no documents in this batch."
    trained = [example for example in examples if example["tokens"]]
    if not trained:
        return f"No token of this batch is trained: every label is masked, as in {excerpt(examples[0]['text'], 120)!r}."
    # Where no example stands out, the whole batch came with the spike.
    suspects = [example for example in examples if example["suspect"]] or [
        max(trained, key=lambda example: example["loss"])
    ]
    named = "; ".join(
        f"source {suspect['source']!r}, row {suspect['row']}, loss {suspect['loss']:.3g}: {suspect['text'][:120]!r}"
        for suspect in suspects[:3]
    )
    return f"Look at {named}."
