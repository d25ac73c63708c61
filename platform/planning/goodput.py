"""How much of the devices' time goes into steps that count, with failures: in closed form, known without torch.

Failures come independently of each other (exponentially), of every device alike. A checkpoint of every `interval`
seconds of steps holds training up for `stall` seconds and is whole `write` seconds later. A failure is noticed after
`detect` seconds, then the workers take `start` seconds to their first step, during which others may fail; what was done
since the newest whole checkpoint is done again.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reliability:
    """Of a number of devices, in seconds."""

    between_failures: float
    start: float
    detect: float
    stall: float
    write: float

    def goodput(self, interval: float) -> float:
        """Share of the time that goes into steps that count, with a checkpoint every `interval` seconds of steps.

        Between two failures X seconds are worked, X exponential with the rate l, and floor((X - write) / (interval +
        stall)) checkpoints become whole: e^(-l write) / (e^(l (interval + stall)) - 1) on average. A failure with the
        starts that follow, until one comes through, takes (e^(l start) - 1) / l + e^(l start) detect.
        """
        rate = 1 / self.between_failures
        try:
            whole = math.exp(-rate * self.write) / math.expm1(rate * (interval + self.stall))
            begun = math.exp(rate * self.start)
        except OverflowError:  # no checkpoint becomes whole, or no start comes through
            return 0.0
        return interval * whole / (begun * (self.between_failures + self.detect))

    def best_interval(self) -> float:
        """Seconds of steps between checkpoints with which the goodput is highest; at least a second."""
        low, high = 1.0, 20 * self.between_failures
        golden = (math.sqrt(5) - 1) / 2
        while high - low > 1e-3 * high:  # it rises to one maximum and falls
            left, right = high - golden * (high - low), low + golden * (high - low)
            low, high = (left, high) if self.goodput(left) < self.goodput(right) else (low, right)
        return (low + high) / 2
