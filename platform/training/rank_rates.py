"""How fast each rank is by itself: in a step all ranks wait for the slowest, so the time of a step names nobody.

Once every logged interval each rank multiplies two matrices, right after a step and so as warm as at work, and says
how long it has waited for its own data. Both are compared over the ranks, and so are the times of its steps as far as
it spent them by itself.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from domainshuttle.platform.run.workers import SLOW
from domainshuttle.platform.training.collective_device import collective_device
from domainshuttle.platform.training.device_memory import peak_bytes

_MOST_RANKS = 64
"""Of so many workers each has curves of its own; of more the slowest and the one with the most memory have."""


class MatrixProbe:
    """The rate of a device's own matrix products: bf16 on an accelerator, float32 on a CPU; milliseconds a call."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        side, self._repeats = (2048, 64) if self._cuda else (256, 1)
        dtype = torch.bfloat16 if self._cuda else torch.float32
        # apart from torch's generators, whose states decide what a resumed run draws
        values = torch.arange(side * side, dtype=torch.float32).reshape(side, side) % 7 - 3
        self._left, self._out = values.to(device, dtype), torch.empty(side, side, device=device, dtype=dtype)
        self._flops = 2 * side**3 * self._repeats
        self._multiply(1)

    def rate(self) -> float:
        """FLOP/s, now."""
        if not self._cuda:
            began = time.perf_counter()
            self._multiply(self._repeats)
            return self._flops / max(time.perf_counter() - began, 1e-9)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._multiply(self._repeats)
        end.record()
        end.synchronize()
        return self._flops / max(start.elapsed_time(end) / 1e3, 1e-9)

    def _multiply(self, repeats: int) -> None:
        for _ in range(repeats):
            torch.mm(self._left, self._left, out=self._out)


@dataclass(frozen=True)
class RankRates:
    """Of each rank, by its number: FLOP/s of its own products, and the share of its time that it waited for data."""

    flops: Sequence[float]
    waits: Sequence[float]

    @classmethod
    def gathered(cls, flops: float, wait: float, device: torch.device) -> "RankRates":
        """Those of all ranks; all must call together."""
        mine = torch.tensor([flops, wait], dtype=torch.float64, device=device)
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine)
        rows: list[list[float]] = torch.stack(everyones).tolist()
        return cls([one for one, _ in rows], [other for _, other in rows])

    @property
    def slowest(self) -> int:
        return min(range(len(self.flops)), key=self.flops.__getitem__)

    @property
    def longest_waiting(self) -> int:
        """The rank that waits longest for its data."""
        return max(range(len(self.waits)), key=self.waits.__getitem__)

    @property
    def slowest_share(self) -> float:
        """Of the median rank's rate, what the slowest reaches."""
        return self.flops[self.slowest] / max(median(self.flops), 1e-9)

    def record(self) -> dict[str, float]:
        """For the run's progress file."""
        return {
            "slowest_rank": self.slowest,
            "slowest_share": round(self.slowest_share, 4),
            "longest_wait_rank": self.longest_waiting,
            "longest_wait": round(self.waits[self.longest_waiting], 4),
        }


class SlowRanks:
    """Tells of a rank that stays slow, once: by its mean rate over the last `intervals`."""

    def __init__(self, intervals: int) -> None:
        self._flops: deque[Sequence[float]] = deque(maxlen=intervals)
        self._told: set[int] = set()

    def newly(self, rates: RankRates) -> tuple[int, float] | None:
        """After another interval: a rank that is slow and was not told of, and its rate in percent of the median."""
        self._flops.append(rates.flops)
        usual = RankRates([sum(one) / len(one) for one in zip(*self._flops, strict=True)], rates.waits)
        full = len(self._flops) == self._flops.maxlen
        if not full or usual.slowest_share >= SLOW or usual.slowest in self._told:
            return None
        self._told.add(usual.slowest)
        return usual.slowest, 100 * usual.slowest_share


def compare_ranks(seconds: Mapping[str, float], steps: int, waited: float) -> dict[str, float]:
    """Metrics of an interval: step time, lag and peak memory by rank; all ranks must call.

    A rank's step time has no waiting for the others at the step's end. Its lag is how much later than the first it was,
    as far as it waited for data, wrote or sampled itself, or came last to the step's end: what a rank loses within a
    step's computation, all lose with it, since they gather the weights together.

    Args:
        seconds: of the interval by category of the ledger.
        steps: that the interval had.
        waited: seconds for the others, at the ends of the steps.
    """
    stalls = sum(seconds.get(name, 0.0) for name in ("waiting", "checkpointing", "sampling"))
    steps, world_size, device = max(steps, 1), dist.get_world_size(), collective_device()
    mine = [(sum(seconds.values()) - waited) / steps, (stalls - waited) / steps, peak_bytes() / 2**30]
    every = [torch.zeros(len(mine), dtype=torch.float64, device=device) for _ in range(world_size)]
    dist.all_gather(every, torch.tensor(mine, dtype=torch.float64, device=device))
    times, lates, peaks = zip(*(one.tolist() for one in every), strict=True)
    lags = [late - min(lates) for late in lates]
    found = {"memory/peak_gib": max(peaks), "memory/peak_rank": float(peaks.index(max(peaks)))}
    if world_size > 1:
        found |= {"speed/slowest_rank": float(lags.index(max(lags))), "speed/slowest_rank_lag_s": max(lags)}
    if 1 < world_size <= _MOST_RANKS:
        for name, values in (("step_seconds", times), ("lag_seconds", lags), ("peak_memory_gib", peaks)):
            found |= {f"ranks/{name}/rank_{rank}": value for rank, value in enumerate(values)}
    return found
