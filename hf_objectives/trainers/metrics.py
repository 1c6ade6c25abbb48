"""Metrics of training logs: sums over micro-batches and ranks, divided once when a log is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_objectives.distributed import gather_objects, sum_over_ranks
from hf_objectives.evaluation import TokenCount
from hf_objectives.losses import Moments, PolicyLoss, ValueLoss, explained_variance
from hf_objectives.types import ends_of_runs

logger = logging.getLogger(__name__)
_TOKENS = 1 << 20  # more than any vocabulary has; the last one stands for none


def over_ranks(moments: Moments) -> Moments:
    """The moments of the values of all ranks."""
    return Moments(*sum_over_ranks(list(moments)))


class MetricSums:
    """Sums of named values since the last log; float64, on the device of the values, in the order of their names."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._sums: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add the values of a micro-batch, float64 [names]."""
        self._sums = values if self._sums is None else self._sums + values

    def take(self) -> dict[str, float]:
        """Return the sums over all ranks by name, and begin again at 0."""
        own = [0.0] * len(self._names) if self._sums is None else self._sums.tolist()
        self._sums = None
        return dict(zip(self._names, sum_over_ranks(own), strict=True))


class TokenMetrics:
    """Perplexity, tokens and their rate in the logs of `PerplexityTrainer`."""

    def __init__(self) -> None:
        self.start(0, 0)

    def start(self, total_trained: int, total_seen: int) -> None:
        """Begin anew, with these totals of trained tokens and of all tokens."""
        self._sums = MetricSums("nats", "trained", "seen", "places", "aux", "steps")
        self.total_trained, self.total_seen = total_trained, total_seen
        self._since = time.perf_counter()

    def add(
        self,
        nll: Tensor,
        positions: Tensor,
        inputs: Mapping[str, Any],
        sources: Tensor | None,
        aux: Tensor | None = None,
        share: float = 1.0,
    ) -> None:
        """Add a micro-batch.

        Packed rows have no mask. Where rows name sources, their padding has the source -1.

        Args:
            nll: summed nats of the trained tokens.
            positions: bool [batch, length], places that predict a trained token.
            inputs: the inputs of the model.
            sources: int64 [batch, length], or None.
            aux: the auxiliary loss of a mixture of experts; None where there is none.
            share: the micro-batch's share of its step.
        """
        places = positions.numel()
        seen = nll.new_tensor(places)
        if (mask := inputs.get("attention_mask")) is not None:
            seen = mask.sum()
        elif sources is not None:
            seen = (sources >= 0).sum()
        steps = nll.new_tensor(0.0 if aux is None else share)
        router = nll.new_tensor(0.0) if aux is None else aux.detach().to(nll.device) * share
        values = (nll, positions.sum(), seen, nll.new_tensor(places), router, steps)
        self._sums.add(torch.stack([value.double() for value in values]))

    def take(self) -> dict[str, float]:
        """The metrics since the last log: those of tokens where a token was trained, `aux_loss` where experts are routed."""
        sums = self._sums.take()
        seconds = time.perf_counter() - self._since
        self.start(self.total_trained + int(sums["trained"]), self.total_seen + int(sums["seen"]))
        router = {"aux_loss": sums["aux"] / sums["steps"]} if sums["steps"] else {}
        if not sums["trained"]:
            return router
        return {
            **router,
            "perplexity": TokenCount(sums["nats"], int(sums["trained"])).perplexity,
            "num_supervised_tokens": self.total_trained,
            "num_tokens_seen": self.total_seen,
            "tokens_per_second": sums["seen"] / max(seconds, 1e-9),
            "padding_share": 1 - sums["seen"] / sums["places"],
        }


class SourceLosses:
    """The loss of each source in the logs of `PerplexityTrainer`: nats over trained tokens since the last log."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, token_nll: Tensor, sources: Tensor, names: Sequence[str]) -> None:
        """Add a micro-batch; nothing is read from its device.

        Args:
            token_nll: float [trained tokens], in nats.
            sources: int64 [trained tokens], the source of each by its number in `names`, -1 for none.
            names: names of the batch's sources.
        """
        rows = torch.where(sources < 0, len(names), sources)
        values = torch.stack([token_nll.double(), torch.ones_like(token_nll, dtype=torch.float64)], dim=1)
        sums = values.new_zeros(len(names) + 1, 2).index_add_(0, rows, values)
        known = self._sums.get(tuple(names))
        self._sums[tuple(names)] = sums if known is None else known + sums

    def take(self) -> dict[str, float]:
        """`loss/<source>` over all ranks, where there are several sources; begin again at 0."""
        own: dict[str, list[float]] = {}
        for names, sums in self._sums.items():
            for name, (nats, tokens) in zip(names, sums.tolist(), strict=False):  # the last row is of no source
                total = own.setdefault(name, [0.0, 0.0])
                total[0], total[1] = total[0] + nats, total[1] + tokens
        self._sums = {}
        every = gather_objects(own)
        losses = {}
        for name in sorted(set().union(*every)):
            nats, tokens = (sum(sums[name][i] for sums in every if name in sums) for i in (0, 1))
            if tokens:
                losses[f"loss/{name}"] = nats / tokens
        return losses if len(losses) > 1 else {}


class TrainedStops:
    """Which tokens ended trained turns."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def add(self, targets: Tensor) -> None:
        """Add targets, int64 [batch, length], -100 where nothing is trained; nothing is read from their device."""
        if self._seen is None:
            self._seen = torch.zeros(_TOKENS, dtype=torch.bool, device=targets.device)
        self._seen[torch.where(ends_of_runs(targets), targets.clamp(0, _TOKENS - 1), _TOKENS - 1)] = True

    def ids(self, tokenizer: Any) -> list[int]:
        """The control tokens of the tokenizer among them, on any rank."""
        if self._seen is None or tokenizer is None:
            return []
        control = [i for i in sorted(tokenizer.added_tokens_decoder) if i < _TOKENS - 1]
        seen = sum_over_ranks(self._seen[control].double().tolist())
        return [i for i, count in zip(control, seen, strict=True) if count]


class PairMetrics:
    """Change of the log-probability of chosen and rejected answers since step 0, in the logs of DPO.

    Args:
        warn_drop: warn once when the chosen answers have lost more nats per token than this while the margin has grown
            since the last log; None for never.
    """

    def __init__(self, warn_drop: float | None) -> None:
        self._warn_drop, self._warned, self._margin = warn_drop, False, 0.0
        self._sums = MetricSums("chosen", "rejected", "chosen_tokens", "rejected_tokens", "pairs")

    def add(self, sums: Tensor) -> None:
        """Add `PairScores.drift` of a micro-batch."""
        self._sums.add(sums)

    def take(self, step: int) -> dict[str, float]:
        """`logps_change/chosen` and `logps_change/rejected` since the last log, in nats per token."""
        sums = self._sums.take()
        if not sums["chosen_tokens"] or not sums["rejected_tokens"]:
            return {}
        change = {side: sums[side] / sums[f"{side}_tokens"] for side in ("chosen", "rejected")}
        margin, before = (sums["chosen"] - sums["rejected"]) / sums["pairs"], self._margin
        self._margin = margin
        fell = self._warn_drop is not None and change["chosen"] < -self._warn_drop
        if fell and margin > before and not self._warned:
            self._warned = True
            logger.warning(
                "step %d: the chosen answers have become less likely, by %.3f nats per token since the start (rejected: "
                "%+.3f), while the margin grew from %.3f to %.3f nats. The loss sees only the margin, and a model that makes "
                "both answers less likely may lose its language. nll_weight or dpop_lambda in PerplexityDPOConfig (1 and 50 "
                "in their papers) keep the chosen answers likely. This is said once a run; warn_chosen_drop sets the bound",
                *(step, -change["chosen"], change["rejected"], before, margin),
            )
        return {f"logps_change/{side}": value for side, value in change.items()}


class PolicyMetrics:
    """Losses per token, clip fractions, entropy and explained variance in the logs of PPO."""

    _MEANS = ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "approx_kl")

    def __init__(self) -> None:
        moments = [f"{name}_{part}" for name in ("errors", "returns") for part in Moments._fields]
        self._sums = MetricSums("tokens", *moments, *self._MEANS)
        self.failures = 0  # answers on which a reward function failed

    def add(
        self,
        mask: Tensor,
        entropy: Tensor,
        policy: PolicyLoss,
        value: ValueLoss | None,
        errors: Moments | None = None,
        returns: Moments | None = None,
    ) -> None:
        """Add a micro-batch.

        Args:
            mask: [batch, length] of its tokens.
            entropy: scalar, the sum over them in nats.
            policy, value: their losses; `value` is None without a critic.
            errors, returns: moments of returns minus values, and of returns.
        """
        zero = entropy.new_zeros(())
        values, clipped = (zero, zero) if value is None else value
        sums = [policy.loss, values, entropy, policy.clipped, clipped, policy.approx_kl]
        moments = [part for moment in (errors, returns) for part in moment or Moments(0, 0, 0)]
        counted = torch.tensor([float(mask.sum()), *moments], dtype=torch.float64)
        self._sums.add(torch.cat([counted, torch.stack([part.detach().double() for part in sums]).cpu()]))

    def take(self) -> dict[str, float]:
        """Means per token over all ranks since the last log; empty without a step and without a failed reward."""
        sums = self._sums.take()
        failures, self.failures = sum_over_ranks([float(self.failures)])[0], 0
        tokens = sums["tokens"]
        if not tokens and not failures:
            return {}
        metrics = {name: sums[name] / tokens for name in self._MEANS} if tokens else {}
        errors, returns = (
            Moments(*(sums[f"{name}_{part}"] for part in Moments._fields)) for name in ("errors", "returns")
        )
        if returns.number:
            metrics["explained_variance"] = explained_variance(errors, returns)
        return {**metrics, "rewards/failed": failures}
