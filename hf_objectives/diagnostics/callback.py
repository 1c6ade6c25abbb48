"""The live monitor: catches the batch of a spike or of a loss that is not finite, and says what the log shows so far."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback

from hf_objectives.diagnostics.batch_record import describe_examples, random_state, write_event
from hf_objectives.diagnostics.detect import diagnose
from hf_objectives.diagnostics.monitor import Spike, SpikeMonitor
from hf_objectives.diagnostics.robust import MAD
from hf_objectives.distributed import any_rank, rank
from hf_objectives.errors import ConfigError, NonFiniteError

logger = logging.getLogger(__name__)
ON_SPIKE = ("log", "skip", "stop")
_FIRST_LOOK, _NEXT_LOOK = 20, 1.25  # logged lines before the detectors run, and the factor to the next time
_KNOWN = 256  # losses of examples that are remembered of each source
_ENOUGH = 32  # of them, without which the batch is compared with itself as well
_FAR = 6.0  # robust deviations


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
    loss is far outside those of their source are named in `suspects.jsonl` beside it, and, where source and row are known, in
    `blocklist.json`, which a mixture takes as its blocklist. As lines are logged it runs `diagnose`, logs each new finding
    once and adds it to `findings.jsonl`.

    Args:
        trainer: the trainer that it is added to.
        on_spike: "log" writes and goes on; "skip" leaves the optimizer step out as well, on all ranks; "stop" does, too, and
            ends training there (under DeepSpeed after the step).
        save_weights: write the weights of the moment too, so that a replay gives the very losses.
        sample_every: steps between two looks at the losses of all examples of a batch, which cost a forward pass each; they
            are what an example of a spike is compared with. A loss that is high, but no spike, has its examples looked at,
            too.
        max_events: events that are written; further ones are counted.
        output_dir: instead of the trainer's.

    Raises:
        ConfigError: an unknown `on_spike`; "skip" under DeepSpeed, whose engine steps by itself, or with a trainer that stops
            at non-finite losses before.
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
        if on_spike not in ON_SPIKE:
            raise ConfigError(f"on_spike is {on_spike!r}; expected one of {', '.join(ON_SPIKE)}")
        if on_spike == "skip" and trainer.is_deepspeed_enabled:
            raise ConfigError("on_spike='skip' under DeepSpeed, whose engine steps by itself; use 'log' or 'stop'")
        if on_spike == "skip" and getattr(trainer.args, "stop_on_non_finite", False):
            raise ConfigError(
                "on_spike='skip' and stop_on_non_finite contradict each other; set stop_on_non_finite=False"
            )
        self.trainer, self.on_spike, self.save_weights = trainer, on_spike, save_weights
        self.sample_every, self.max_events = sample_every, max_events
        self.folder = Path(output_dir or trainer.args.output_dir or ".") / "diagnostics"
        self.events = 0
        self._monitor = SpikeMonitor()
        self._known: dict[Any, deque[float]] = defaultdict(lambda: deque(maxlen=_KNOWN))
        self._blocked: dict[str, set[int]] = defaultdict(set)
        self._window: list[tuple[Mapping[str, Any], Tensor]] = []
        self._random: dict[str, Any] = {}
        self._grad_norm: float | None = None
        self._said: set[tuple[str, int]] = set()
        self._next_look = _FIRST_LOOK
        self._unwrapped: dict[str, Any] = {}

    # -- the trainer's step, seen from outside ----------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch: callbacks are told neither the batch nor its loss, so the trainer's two methods are wrapped."""
        self._leave()  # a training before this one may have ended in an error
        self._window = []
        self._unwrapped = {name: getattr(self.trainer, name) for name in ("training_step", "_get_grad_norm")}
        self.trainer.training_step = self._training_step
        self.trainer._get_grad_norm = self._get_grad_norm

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the trainer as it was."""
        self._leave()
        if self.events > self.max_events:
            logger.warning(
                "%d spikes in all; the first %d were written to %s", self.events, self.max_events, self.folder
            )

    def _leave(self) -> None:
        for name in self._unwrapped:
            delattr(self.trainer, name)
        self._unwrapped = {}

    def _training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self._window:
            self._random = random_state()
        loss = self._unwrapped["training_step"](model, inputs, *args, **kwargs)
        self._window.append((inputs if isinstance(inputs, Mapping) else {}, loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        try:
            norm = self._unwrapped["_get_grad_norm"](model, grad_norm)
        except NonFiniteError:
            # The trainer stops here, on all ranks; the record is written all the same.
            self._grad_norm = None if grad_norm is None else float(grad_norm)
            self._look(self.trainer.state)
            self._leave()
            raise
        self._grad_norm = None if norm is None else float(norm)
        return norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the step before the weights change."""
        bad = self._look(state)
        if self.on_spike != "log" and any_rank(bad):
            # The optimizer's step follows all the same; without gradients it leaves weights, moments and weight decay as
            # they are. DeepSpeed's engine has its own.
            if not self.trainer.is_deepspeed_enabled:
                self.trainer.optimizer.zero_grad(set_to_none=True)
                logger.warning("step %d: left out", state.global_step + 1)
            control.should_training_stop |= self.on_spike == "stop"

    def _look(self, state: Any) -> bool:
        window, self._window = self._window, []
        if not window:
            return False
        loss = float(sum(float(one) for _, one in window))
        spike = self._monitor.add(loss)
        # Under an fp16 scaler an overflow is no fault: it lowers its scale and leaves the step out itself.
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
        if spike is None and not scaled and self._grad_norm is not None and not math.isfinite(self._grad_norm):
            spike = Spike(loss, loss, math.inf, math.inf)
        step = state.global_step + 1
        if spike is not None:
            self.events += 1
            if self.events <= self.max_events:
                self._record(step, state, spike, window)
        elif self._monitor.high or step % self.sample_every == 0 or step == 1:
            examples = self._examples(window)
            if self._name_suspects(step, examples) and step > 1:
                self.events += 1
                if self.events <= self.max_events:
                    self._write(step, state, Spike(loss, math.nan, math.nan, math.nan), window, examples)
        return spike is not None

    # -- examples -----------------------------------------------------------------------------------------------------

    def _examples(self, window: list[tuple[Mapping[str, Any], Tensor]]) -> list[dict[str, Any]]:
        """The losses of the step's examples, by a forward pass without gradient that leaves no trace."""
        trainer = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return []  # a sharded model runs on all ranks or on none
        model = trainer.accelerator.unwrap_model(trainer.model)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        training, described = model.training, []
        model.eval()
        try:
            for number, (batch, _) in enumerate(window):
                with trainer.compute_loss_context_manager():
                    prepared = trainer._prepare_input(dict(batch))
                    found = describe_examples(model, prepared, tokenizer)
                described += [{"micro_batch": number, **one} for one in found]
        finally:
            model.train(training)
        return described

    def _name_suspects(
        self, step: int, examples: list[dict[str, Any]], limit: float = math.inf
    ) -> list[dict[str, Any]]:
        """Mark each example with its distance from its source's usual loss; those far outside are suspects."""
        suspects = []
        for one in examples:
            known = list(self._known[one["source"]])
            # With a short history of its source, the batch itself says what is usual, too.
            beside = [other["loss"] for other in examples if other is not one and other["source"] == one["source"]]
            usual = np.array(known if len(known) >= _ENOUGH else known[-_ENOUGH:] + beside)
            usual = usual[np.isfinite(usual)]
            far = 0.0
            if len(usual) >= 5:
                level = float(np.median(usual))
                spread = max(MAD * float(np.median(np.abs(usual - level))), 0.05 * abs(level), 1e-6)
                far = (one["loss"] - level) / spread
            one["deviations"] = far if math.isfinite(one["loss"]) else math.inf
            one["suspect"] = not math.isfinite(one["loss"]) or far > _FAR or one["loss"] > limit
        for one in examples:
            if one["suspect"]:
                suspects.append(one)
                self._append("suspects.jsonl", {"step": step, **one})
                if one["source"] is not None and one["row"] is not None:
                    self._blocked[one["source"]].add(one["row"])
            else:
                self._known[one["source"]].append(one["loss"])
        if suspects and self._blocked:
            rows = {source: sorted(numbers) for source, numbers in self._blocked.items()}
            self._path("blocklist.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        return suspects

    def _record(self, step: int, state: Any, spike: Spike, window: list[tuple[Mapping[str, Any], Tensor]]) -> None:
        examples = self._examples(window)
        # Where the step's loss is in nats per token, what is out of its noise by itself is suspect, too.
        mean = sum(one["loss"] * one["tokens"] for one in examples) / max(1, sum(one["tokens"] for one in examples))
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
        trainer = self.trainer
        suspects = [one for one in examples if one["suspect"]]
        # Where none stands out, the batch as a whole is what the spike came with.
        suspects = suspects or sorted(examples, key=lambda one: -one["loss"])[:1]
        folder = self.folder / f"step_{step}_rank_{rank()}"
        rates = {} if trainer.lr_scheduler is None else {"learning_rate": trainer.lr_scheduler.get_last_lr()[0]}
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
            **rates,
            "epoch": state.epoch,
            "weights": "weights" if self.save_weights else None,
            "model": getattr(trainer.model.config, "_name_or_path", None) if hasattr(trainer.model, "config") else None,
            "data_state": {"global_step": state.global_step, "epoch": state.epoch, "seed": trainer.args.data_seed},
            "examples": examples,
        }
        write_event(folder, event, [batch for batch, _ in window], self._random)
        if self.save_weights:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / "weights")
        named = "; ".join(
            f"source {one['source']!r}, row {one['row']}, loss {one['loss']:.3g}: {one['text'][:120]!r}"
            for one in suspects[:3]
        )
        logger.warning(
            "step %d: loss %.4g%s, gradient norm %s. %s Written to %s",
            *(step, spike.value, f", usually {spike.level:.4g}" if spike.level == spike.level else "", self._grad_norm),
            f"Look at {named}." if named else "The batch names no labels.",
            folder,
        )

    # -- the log ------------------------------------------------------------------------------------------------------

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the detectors, ever more rarely, so that all looks together cost as much as a few."""
        lines = len(state.log_history)
        if lines >= self._next_look:
            self._next_look = max(lines + 10, int(lines * _NEXT_LOOK))
            self._diagnose(state)

    def _diagnose(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        for one in diagnose(state.log_history):
            # What lasts begins at the same step in every look; what only begins to show may move a little.
            if any(kind == one.kind and abs(step - one.step) <= max(5, one.step // 10) for kind, step in self._said):
                continue
            self._said.add((one.kind, one.step))
            self._append("findings.jsonl", one.to_dict())
            say = logger.info if one.severity == "info" else logger.warning
            say("%s, %s: %s. %s", one.kind, one.steps, one.evidence, one.advice)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        with self._path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        stem, ending = name.split(".")
        return self.folder / (name if rank() == 0 else f"{stem}_rank_{rank()}.{ending}")
