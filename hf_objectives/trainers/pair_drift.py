"""How far the answers have moved from where training began, and a word when the better ones fall with the worse ones."""

from __future__ import annotations

import logging

from torch import Tensor

from hf_objectives.distributed import sum_over_ranks

logger = logging.getLogger(__name__)


class Drift:
    """Change of the log-probability of chosen and rejected answers since step 0, over the steps since the last log.

    Args:
        warn_drop: warn once when the chosen answers have lost more nats per token than this while the margin has grown
            since the log before; None for never.
    """

    def __init__(self, warn_drop: float | None) -> None:
        self._warn_drop, self._warned, self._margin = warn_drop, False, 0.0
        self._sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add a micro-batch's `PairScores.drift`."""
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, step: int) -> dict[str, float]:
        """`logps_change/chosen` and `logps_change/rejected` in nats per token over all ranks, and a fresh start."""
        own = [0.0] * 5 if self._sums is None else self._sums.tolist()
        self._sums = None
        chosen, rejected, chosen_tokens, rejected_tokens, pairs = sum_over_ranks(own)
        if not chosen_tokens or not rejected_tokens:
            return {}
        figures = {"logps_change/chosen": chosen / chosen_tokens, "logps_change/rejected": rejected / rejected_tokens}
        margin, before = (chosen - rejected) / pairs, self._margin
        self._margin = margin
        fell = self._warn_drop is not None and figures["logps_change/chosen"] < -self._warn_drop
        if fell and margin > before and not self._warned:
            self._warn(step, figures, margin, before)
        return figures

    def _warn(self, step: int, figures: dict[str, float], margin: float, before: float) -> None:
        self._warned = True
        logger.warning(
            "step %d: the chosen answers have become less likely, by %.3f nats per token since the start (rejected: %+.3f), "
            "while the margin between them grew from %.3f to %.3f nats. The loss sees the margin alone, and a model that "
            "makes both less likely may lose its language; nll_weight or dpop_lambda in PerplexityDPOConfig "
            "(1 and 50 in their papers) keep the chosen answers likely. Said once a run; warn_chosen_drop sets the bound",
            step,
            -figures["logps_change/chosen"],
            figures["logps_change/rejected"],
            before,
            margin,
        )
