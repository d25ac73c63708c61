"""How fast each rank is by itself: in a step all ranks wait for the slowest, so the time of a step names nobody.

Once every logged interval each rank multiplies two matrices, right after a step and so as warm as at work, and says
how long it has waited for its own data. Both are compared over the ranks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

SLOW = 1 / 1.15
"""Share of the median rank's rate below which a rank is slow."""


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
