"""The live monitor: catches the batch of a spike or of a loss that is not finite, and says what the log shows so far."""

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
    describe_examples,
    describes,
    excerpt,
    random_state,
    to_json,
    write_event,
)
from hf_objectives.diagnostics.detect import diagnose
from hf_objectives.diagnostics.monitor import Spike, SpikeMonitor
from hf_objectives.diagnostics.replay import WEIGHTS
from hf_objectives.diagnostics.suspects import BLOCKLIST, SUSPECTS, Blocked, Suspects, write_blocklist
from hf_objectives.distributed import any_rank, gather_objects, rank
from hf_objectives.errors import ConfigError, NonFiniteError

logger = logging.getLogger(__name__)
ON_SPIKE = ("log", "skip", "stop")
FINDINGS = "findings.jsonl"
_FIRST_LOOK, _NEXT_LOOK = 20, 1.25  # logged lines before the detectors run, and the factor to the next time
# Looks at the examples of a loss that is high, in deviations: their share of the time, and looks that are free beside it.
_LOOKS = ((2.5, 0.003, 3), (1.5, 0.001, 1))
_IN_A_ROW = 20  # steps left out, after which nothing is trained any more
_WRAPPED = ("training_step", "_get_grad_norm")


def _kind(spike: Spike) -> str:
    """ "spike", "example" (one stands out, the step's loss does not) or "non_finite"."""
    if math.isnan(spike.deviations) and math.isfinite(spike.value):
        return "example"
    return "spike" if math.isfinite(spike.value) and math.isfinite(spike.deviations) else "non_finite"


class DiagnosticsCallback(TrainerCallback):
    """Watches every step of a Trainer (ours, transformers', TRL's).

        trainer.add_callback(DiagnosticsCallback(trainer))

    On a spike or a loss or gradient that is not finite, before the optimizer's step, it writes
    `<output_dir>/diagnostics/step_<n>_rank_<r>/`: the loss of each example, its text with trained tokens marked, source and
    row, gradient norm, the tensors and the random states; `hf-objectives replay` computes that batch again. Examples whose
    loss is far outside those of their source are named in `suspects.jsonl` beside it, and, where source and row are known and
    the event stands alone, in `blocklist.json`, which a mixture takes as its blocklist. As lines are logged it runs
    `diagnose`, logs each new finding once and adds it to `findings.jsonl`.

    Single examples are told of causal language models. Of trainers with reward functions (GRPO, RLOO, PPO), whose loss says
    nothing about a batch, only values that are not finite are events. What fails in the monitor itself (a full disk, a batch
    of another kind) is logged and ends the looks at examples, not the run.

    Args:
        trainer: the trainer that it is added to.
        on_spike: "log" writes and goes on; "skip" leaves the optimizer step out as well, on all ranks; "stop" does, too, and
            ends training there (under DeepSpeed after the step). A trainer with `stop_on_non_finite` raises its own error
            at a loss that is not finite.
        save_weights: write the weights of the moment too, so that a replay gives the very losses.
        sample_every: steps between two looks at the losses of all examples of a batch, which cost a forward pass each; they
            are what an example of a spike is compared with. 0 never looks without cause. A loss that is high, but no spike,
            has its examples looked at, too: three looks, and then 0.3 % of the time.
        max_events: events that are written; further ones are counted.
        output_dir: instead of the trainer's.

    Raises:
        ConfigError: an unknown `on_spike`, a number below 0, a second monitor; "skip" under DeepSpeed, whose engine steps by
            itself, or with a trainer that stops at non-finite losses before; weights under FSDP.
        NonFiniteError: in training, after "skip" left out 20 steps in a row.
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
        self._policy = hasattr(trainer, "reward_funcs")
        if on_spike not in ON_SPIKE:
            raise ConfigError(f"on_spike is {on_spike!r}; expected one of {', '.join(ON_SPIKE)}")
        for name, number in (("sample_every", sample_every), ("max_events", max_events)):
            if number < 0:
                raise ConfigError(f"{name} is {number}; expected 0 or more")
        if on_spike == "skip" and trainer.is_deepspeed_enabled:
            raise ConfigError("on_spike='skip' under DeepSpeed, whose engine steps by itself; use 'log' or 'stop'")
        if on_spike == "skip" and getattr(trainer.args, "stop_on_non_finite", False):
            raise ConfigError(
                "on_spike='skip' and stop_on_non_finite contradict each other; set stop_on_non_finite=False"
            )
        if save_weights and trainer.is_fsdp_enabled:
            raise ConfigError("save_weights under FSDP: one rank alone cannot gather the weights; use checkpoints")
        if any(isinstance(one, DiagnosticsCallback) for one in trainer.callback_handler.callbacks):
            raise ConfigError(
                "the trainer has a DiagnosticsCallback already; trainer.remove_callback(DiagnosticsCallback)"
            )
        self.trainer, self.on_spike, self.save_weights = trainer, on_spike, save_weights
        self.sample_every, self.max_events = sample_every, max_events
        self.folder = Path(output_dir or trainer.args.output_dir or ".") / "diagnostics"
        self._usual: dict[str, Any] = {}  # the trainer's own methods, by name
        self._own: dict[str, bool] = {}  # whether they were set on the trainer itself
        self._begin()

    def _begin(self) -> None:
        """The state of a training that has not begun."""
        self.events = 0
        self._monitor, self._suspects = SpikeMonitor(), Suspects()
        self._window: list[tuple[Mapping[str, Any], Tensor]] = []
        self._random: dict[str, Any] = {}
        self._grad_norm: float | None = None
        self._looks_failed = False
        self._said: set[tuple[str, int]] = set()
        self._next_look = _FIRST_LOOK
        self._failed: list[Callable[..., Any]] = []  # what is not tried again
        self._left_out = 0
        # Seconds: of the clock, in looks, in the last look.
        self._began, self._spent, self._last = time.perf_counter(), 0.0, 0.0

    # -- the trainer's step, seen from outside ----------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch: callbacks are told neither the batch nor its loss, so the trainer's two methods are wrapped."""
        self._leave()  # a training before this one may have ended in an error
        self._begin()
        self._own = {name: name in vars(self.trainer) for name in _WRAPPED}
        self._usual = {name: getattr(self.trainer, name) for name in _WRAPPED}
        self.trainer.training_step = self._training_step
        self.trainer._get_grad_norm = self._get_grad_norm
        for path in {self.folder / BLOCKLIST, self._path(BLOCKLIST)}:
            self._suspects.read(path)
        if state.global_step:
            self._go_on(args, state)

    def _go_on(self, args: Any, state: Any) -> None:
        """What was said and seen before a resume."""
        if args.logging_strategy == "steps" and args.logging_steps == 1:
            self._monitor.seed([line["loss"] for line in state.log_history[-64:] if "loss" in line])
        found = self._path(FINDINGS)
        if found.is_file():
            for line in found.read_text(encoding="utf-8").splitlines():
                try:
                    said = json.loads(line)
                except ValueError:  # the run was killed while it wrote the line; it is said again
                    continue
                if said["step"] <= state.global_step:
                    self._said.add((said["kind"], said["step"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the trainer as it was; look at the whole log once more, and gather what all ranks would leave out."""
        self._leave()
        self._suspects.finish()
        gathered = gather_objects({source: set(rows) for source, rows in self._suspects.blocked.items()})
        self._safely(self._close, state, gathered)
        if self.events > self.max_events:
            logger.warning(
                "%d spikes in all; the first %d were written to %s", self.events, self.max_events, self.folder
            )

    def _keep(self, state: Any) -> None:
        if self._suspects.finish():
            write_blocklist(self._path(BLOCKLIST), [self._suspects.blocked])

    def _close(self, state: Any, gathered: list[Blocked]) -> None:
        if state.is_world_process_zero:
            write_blocklist(self.folder / BLOCKLIST, gathered)
        self._diagnose(state)

    def _leave(self) -> None:
        for name, method in self._usual.items():
            if self._own[name]:
                setattr(self.trainer, name, method)
            else:
                vars(self.trainer).pop(name, None)
        self._usual, self._window = {}, []

    def _training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self._window:
            self._random = random_state()
        try:
            loss = self._usual["training_step"](model, inputs, *args, **kwargs)
        except BaseException:
            self._leave()
            raise
        self._window.append((inputs if isinstance(inputs, Mapping) else {}, loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        try:
            norm = self._usual["_get_grad_norm"](model, grad_norm)
        except NonFiniteError:
            # The trainer stops here, on all ranks; the record is written all the same.
            self._grad_norm = None if grad_norm is None else float(grad_norm)
            self._look(self.trainer.state)
            self._safely(self._keep, self.trainer.state)
            self._leave()
            raise
        self._grad_norm = None if norm is None else float(norm)
        return norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the step before the weights change."""
        bad = self._look(state)
        if self.on_spike == "log":
            return
        self._left_out = self._left_out + 1 if any_rank(bad) else 0
        if not self._left_out:
            return
        # The optimizer's step follows all the same; without gradients it leaves weights, moments and weight decay as they
        # are. DeepSpeed's engine has its own.
        if not self.trainer.is_deepspeed_enabled:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            logger.warning("step %d: left out", state.global_step + 1)
        control.should_training_stop |= self.on_spike == "stop"
        if self._left_out > _IN_A_ROW:
            self._leave()
            raise NonFiniteError(
                f"step {state.global_step + 1}: the last {self._left_out} steps were left out, nothing is trained any more; "
                f"their batches are in {self.folder}"
            )

    def _look(self, state: Any) -> bool:
        """Whether the step stands out; if so, or if one of its examples may, it is looked at and written."""
        window, self._window = self._window, []
        if not window:
            return False
        loss = float(sum(float(one) for _, one in window))
        spike = self._monitor.add(loss)
        if self._policy and math.isfinite(loss):
            spike = None
        # Under an fp16 scaler an overflow is no fault: it lowers its scale and leaves the step out itself.
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
        if spike is None and not scaled and self._grad_norm is not None and not math.isfinite(self._grad_norm):
            spike = Spike(loss, loss, math.inf, math.inf)
        self._safely(self._examine, state, loss, spike, window)
        return spike is not None

    def _safely(self, look: Callable[..., None], state: Any, *args: Any) -> None:
        """A monitor must not end what it watches, and a rank that fails alone would leave the others waiting."""
        if look in self._failed:
            return
        try:
            look(state, *args)
        except Exception:
            self._failed.append(look)
            logger.exception(
                "step %d: the monitor failed; it goes on without what failed, and so does the run",
                state.global_step + 1,
            )

    def _examine(
        self, state: Any, loss: float, spike: Spike | None, window: list[tuple[Mapping[str, Any], Tensor]]
    ) -> None:
        step = state.global_step + 1
        if self._suspects.settle(spike is not None):
            write_blocklist(self._path(BLOCKLIST), [self._suspects.blocked])
        if spike is not None:
            self.events += 1
            if self.events <= self.max_events:
                self._record(step, state, spike, window)
        elif self._is_due(step):
            examples = self._examples(window)
            if self._name_suspects(step, examples) and step > 1:
                self.events += 1
                if self.events <= self.max_events:
                    self._write(step, state, Spike(loss, math.nan, math.nan, math.nan), window, examples)

    def _is_due(self, step: int) -> bool:
        if self.sample_every and (step % self.sample_every == 0 or step == 1):
            return True
        elapsed, height = time.perf_counter() - self._began, self._monitor.height
        return any(height > high and self._spent <= share * elapsed + free * self._last for high, share, free in _LOOKS)

    # -- examples -----------------------------------------------------------------------------------------------------

    def _examples(self, window: list[tuple[Mapping[str, Any], Tensor]]) -> list[dict[str, Any]]:
        """The losses of the step's examples, by a forward pass without gradient that leaves no trace."""
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
                    prepared = trainer._prepare_input(dict(batch))
                    found = describe_examples(model, prepared, tokenizer)
                described += [{"micro_batch": number, **one} for one in found]
        except Exception:
            # Memory that a further forward pass has not, a model of another kind: the step itself is recorded all the same.
            self._looks_failed = True
            logger.exception(
                "step %d: its examples cannot be looked at, and no others will", trainer.state.global_step + 1
            )
            return []
        finally:
            model.train(training)
        self._last = time.perf_counter() - begin
        self._spent += self._last
        return described

    def _name_suspects(
        self, step: int, examples: list[dict[str, Any]], limit: float = math.inf
    ) -> list[dict[str, Any]]:
        suspects = self._suspects.judge(examples, limit)
        for one in suspects:
            self._append(SUSPECTS, {"step": step, **one})
        self._suspects.take(suspects, len(examples))
        return suspects

    def _record(self, step: int, state: Any, spike: Spike, window: list[tuple[Mapping[str, Any], Tensor]]) -> None:
        examples = self._examples(window)
        # Where the step's loss is in nats per token, what is out of its noise by itself is suspect, too.
        trained = [one for one in examples if one["tokens"]]
        mean = sum(one["loss"] * one["tokens"] for one in trained) / max(1, sum(one["tokens"] for one in trained))
        same_unit = math.isfinite(spike.value) and abs(mean - spike.value) < 0.25 * abs(spike.value)
        self._name_suspects(step, examples, spike.limit if same_unit else math.inf)
        self._write(step, state, spike, window, examples)

    def _write(
        self,
        step: int,
        state: Any,
        spike: Spike,
        window: list[tuple[Mapping[str, Any], Tensor]],
        examples: list[dict[str, Any]],
    ) -> None:
        folder = self.folder / f"step_{step}_rank_{rank()}"
        event = {
            "step": step,
            "rank": rank(),
            "kind": _kind(spike),
            "loss": spike.value,
            "losses_of_micro_batches": [float(loss) for _, loss in window],
            "level": spike.level,
            "limit": spike.limit,
            "deviations": spike.deviations,
            "grad_norm": self._grad_norm,
            **self._surroundings(state),
            "examples": examples,
        }
        if self.save_weights:
            self.trainer.accelerator.unwrap_model(self.trainer.model).save_pretrained(folder / WEIGHTS)
        write_event(folder, event, [batch for batch, _ in window], self._random)
        logger.warning(
            "step %d: loss %.4g%s, gradient norm %s. %s Written to %s",
            *(step, spike.value, f", usually {spike.level:.4g}" if spike.level == spike.level else "", self._grad_norm),
            _words(examples),
            folder,
        )

    def _surroundings(self, state: Any) -> dict[str, Any]:
        """What of the run a replay has to know."""
        trainer, args = self.trainer, self.trainer.args
        config = getattr(trainer.model, "config", None)
        seed = args.seed if args.data_seed is None else args.data_seed
        precision = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
        rates = {} if trainer.lr_scheduler is None else {"learning_rate": trainer.lr_scheduler.get_last_lr()[0]}
        return {
            **rates,
            "epoch": state.epoch,
            "run": str(Path(args.output_dir or ".").resolve()),
            "weights": WEIGHTS if self.save_weights else None,
            "model": getattr(config, "_name_or_path", None),
            "dtype": next((str(p.dtype)[6:] for p in trainer.model.parameters() if p.is_floating_point()), None),
            "autocast": precision,
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "data_state": {"global_step": state.global_step, "epoch": state.epoch, "seed": seed},
        }

    # -- the log ------------------------------------------------------------------------------------------------------

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the detectors, ever more rarely, so that all looks together cost as much as a few."""
        lines = len(state.log_history)
        if lines >= self._next_look:
            self._next_look = max(lines + 10, int(lines * _NEXT_LOOK))
            self._safely(self._diagnose, state)

    def _diagnose(self, state: Any) -> None:
        if not state.is_world_process_zero or len(state.log_history) < 2:
            return
        for one in diagnose(state.log_history):
            # What lasts begins at the same step in every look; what only begins to show may move a little.
            if any(kind == one.kind and abs(step - one.step) <= max(5, one.step // 10) for kind, step in self._said):
                continue
            self._said.add((one.kind, one.step))
            self._append(FINDINGS, one.to_dict())
            say = logger.info if one.severity == "info" else logger.warning
            say("%s, %s: %s. %s", one.kind, one.steps, one.evidence, one.advice)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # a line that was cut off when the run was killed
            file.write(to_json(entry).encode() + b"\n")

    def _path(self, name: str) -> Path:
        stem, ending = name.split(".")
        return self.folder / (name if rank() == 0 else f"{stem}_rank_{rank()}.{ending}")


def _words(examples: list[dict[str, Any]]) -> str:
    """What to look at in a batch."""
    if not examples:
        return "The monitor can tell no documents in this batch."
    if not any(one["tokens"] for one in examples):
        return f"No token of this batch is trained: every label is masked, as in {excerpt(examples[0]['text'], 120)!r}."
    suspects = [one for one in examples if one["suspect"]]
    # Where none stands out, the batch as a whole is what the spike came with.
    suspects = suspects or sorted((one for one in examples if one["tokens"]), key=lambda one: -one["loss"])[:1]
    named = "; ".join(
        f"source {one['source']!r}, row {one['row']}, loss {one['loss']:.3g}: {one['text'][:120]!r}"
        for one in suspects[:3]
    )
    return f"Look at {named}."
