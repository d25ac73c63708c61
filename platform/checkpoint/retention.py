"""Which checkpoints of a segment stay. The rule is a pure function; the store does the removing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Reason = Literal["last", "every", "best"]


@dataclass(frozen=True)
class Retention:
    """The rule. A checkpoint stays while any of the three holds for it."""

    last: int
    """This many with the highest steps; at least 1."""
    every: int | None = None
    """Those whose step is a multiple of this stay for good."""
    best: int = 0
    """This many with the lowest loss; those of equal loss by the higher step."""

    def kept(self, losses: Mapping[int, float | None]) -> dict[int, list[Reason]]:
        """The steps that stay, with the reasons, among the whole checkpoints of a segment: step to loss.

        A checkpoint without a loss, or with one that is not finite, is none of the best.
        """
        reasons: dict[int, list[Reason]] = {}
        for step in sorted(losses)[-self.last :]:
            reasons.setdefault(step, []).append("last")
        for step in losses:
            if self.every and step % self.every == 0:
                reasons.setdefault(step, []).append("every")
        scored = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
        for _, negative in sorted(scored)[: self.best]:
            reasons.setdefault(-negative, []).append("best")
        return reasons
