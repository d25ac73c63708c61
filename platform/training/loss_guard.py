"""The guard: which optimiser steps may change the model, and when a run must go back.

A step whose loss is not finite, or far above the median of those before, is dropped: its gradients are thrown away and
its samples are noted. After several dropped steps in a row the weights themselves are suspect: the run goes back to its
last whole checkpoint, and the steps that were bad are skipped the second time, since the same data would do the same
again.

Every decision follows from the losses alone, which all ranks agree on, and the history is part of the checkpoint, so a
resumed run decides as the unbroken one would have.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, Literal

from domainshuttle.platform.config.schema import GuardSection

Verdict = Literal["good", "not finite", "spike"]

NOTHING_LEARNED = 2.0
"""About the loss of a model that predicts nothing: noise of variance 1, and latents of about as much."""


class LossGuard:
    """Judges the loss of each step, the mean over all ranks, before its gradients are applied."""

    def __init__(
        self, section: GuardSection, state: Mapping[str, Any] | None = None, skipped: Collection[int] = ()
    ) -> None:
        self.section = section
        state = state or {}
        self._good: deque[float] = deque(state.get("usual", ()), maxlen=section.window)
        self._first: float | None = state.get("first")
        # what a rollback skips does not count twice
        self.bad_in_a_row = [step for step in state.get("bad_in_a_row", ()) if step not in skipped]

    def judge(self, loss: float) -> Verdict:
        """`spike`: above `spike_factor` times the median of the last `window` good losses, once there are as many."""
        if not math.isfinite(loss):
            return "not finite"
        factor = self.section.spike_factor
        if factor is not None and len(self._good) == self.section.window:
            median = statistics.median(self._good)
            if loss > factor * median:
                return "spike"
        return "good"

    def judge_weights(self, loss: float) -> bool:
        """Whether weights are good that a stage would end with, by their loss.

        It may also lie no `spike_factor` times above the stage's first loss and that of a model that has learned
        nothing: where most steps were as bad, or there were few, their median tells nothing.
        """
        factor, first = self.section.spike_factor, self._first
        diverged = factor is not None and first is not None and loss > factor * max(first, NOTHING_LEARNED)
        return self.judge(loss) == "good" and not diverged

    def median_loss(self) -> float | None:
        """The median of the last `window` good losses, of as many as there are; None before the first."""
        return statistics.median(self._good) if self._good else None

    def applied(self, loss: float) -> None:
        """Notes a step that changed the model."""
        self._good.append(loss)
        if self._first is None:
            self._first = loss
        self.bad_in_a_row.clear()

    def dropped(self, step: int) -> bool:
        """Notes a step that was dropped; True when the run must go back to its last checkpoint."""
        self.bad_in_a_row.append(step)
        return len(self.bad_in_a_row) >= self.section.rollback_after

    def state(self) -> dict[str, Any]:
        """The history, for the checkpoint."""
        return {"usual": list(self._good), "first": self._first, "bad_in_a_row": list(self.bad_in_a_row)}
