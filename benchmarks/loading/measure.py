"""How a loader is measured, the same for each. Runs in the peers' environment as well: needs torch and psutil alone.

A loader gives batches, each a list of tensors whose first dimension is the samples. What is measured ends where their
bytes lie in a staging buffer that is used again, as pinned memory is: they are copied to one, unless the loader hands
them out in such memory already. What counts:

* seconds to the first batch, from where the loader is built in a process that has its imports done;
* samples a second, steady: from 15 seconds after the first batch on, when what else starts has started (on two
  cores Ray's own actors take 10 to 12);
* CPU milliseconds a sample in that time, of all processes of the tree (Ray's included);
* the tree's peak memory, looked at after that time while the loader goes on, because looking costs time. It is what
  the kernel names `Pss_Anon` and `Pss_Shmem`: pages of files are left out, of a shard that is mapped as of one that is
  read.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

LOOKS, LOOK_SECONDS = 4, 0.25
SETTLE_SECONDS = 15.0
Batch = list[Tensor]


def memory_bytes(processes: Iterable[psutil.Process]) -> int:
    """Their memory apart from files, what several share counted once."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


@dataclass
class Measured:
    """What was measured of a loader: seconds, samples/s, CPU ms a sample, bytes of the tree, bytes a sample."""

    first: float
    rate: float
    cpu: float
    memory: float
    sample_bytes: float

    @classmethod
    def together(cls, consumers: Sequence["Measured"]) -> "Measured":
        """Consumers that ran side by side, each with the CPU time and memory of all."""
        rate = sum(one.rate for one in consumers)
        return cls(
            first=max(one.first for one in consumers),
            rate=rate,
            cpu=sum(one.cpu * one.rate for one in consumers) / len(consumers) / rate,
            memory=max(one.memory for one in consumers),
            sample_bytes=consumers[0].sample_bytes,
        )


class Staging:
    """The buffers that batches are copied to, one for each place and shape of tensor; none where they are `staged`."""

    def __init__(self, staged: bool) -> None:
        self.staged = staged
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def take(self, batch: Batch) -> int:
        """Copies a batch, unless it is staged; returns its bytes."""
        if self.staged:
            return sum(tensor.nbytes for tensor in batch)
        size = 0
        for place, tensor in enumerate(batch):
            key = (place, tensor.dtype, *tensor.shape)
            if key not in self._buffers:
                self._buffers[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            self._buffers[key].copy_(tensor)
            size += tensor.nbytes
        return size


def measure(
    start: Callable[[], Iterable[Batch]],
    seconds: float,
    began: float | None = None,
    root: int | None = None,
    staged: bool = False,
) -> Measured:
    """Builds a loader and takes its batches for `seconds` of its steady time.

    `began` is when it was begun to be built, where that was in another process (time.perf_counter() counts the same in
    all); `root` is the process whose tree counts, by default this one. `staged`: the batches lie in memory that is used
    again.
    """
    torch.set_num_threads(1)
    tree = psutil.Process(root or os.getpid())
    staging = Staging(staged)
    began = began or time.perf_counter()
    iterator = iter(start())
    staging.take(next(iterator))
    first = time.perf_counter() - began
    settled = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < settled:
        staging.take(next(iterator))
    samples = size = 0
    cpu = -_cpu_seconds(tree)
    started = now = time.perf_counter()
    for batch in iterator:
        size += staging.take(batch)
        samples += len(batch[0])
        now = time.perf_counter()
        if now - started >= seconds:
            break
    cpu += _cpu_seconds(tree)
    looks: list[int] = []
    looking = threading.Thread(target=_look, args=(tree, looks))
    looking.start()
    while looking.is_alive() and (last := next(iterator, None)) is not None:
        staging.take(last)
    looking.join()
    return Measured(first, samples / (now - started), 1000 * cpu / samples, max(looks), size / samples)


def _processes(tree: psutil.Process) -> list[psutil.Process]:
    return [tree, *tree.children(recursive=True)]


def _cpu_seconds(tree: psutil.Process) -> float:
    """Those of children that have ended are in their parents' figures."""
    total = 0.0
    for process in _processes(tree):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def _look(tree: psutil.Process, looks: list[int]) -> None:
    for _ in range(LOOKS):
        looks.append(memory_bytes(_processes(tree)))
        time.sleep(LOOK_SECONDS)
