"""A rank's part of what is trained: float32 masters, optimiser states and their moving average; saved and loaded.

ZeRO-3 divides every parameter, flattened and padded, evenly over the ranks, and lays a rank's parts end to end in flat
tensors. A shard is one safetensors file a rank that holds these parts by name, without the padding; so it needs no
pickle, and at another number of ranks each reads from the others' files what has become its own: nothing is converted.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from domainshuttle.model.file_mode import save_tensors
from domainshuttle.pipelines.errors import counted

FOLDER = "zero"
"""The folder of the shards in a checkpoint."""
MASTER, AVERAGE, STATES = "master", "ema", ("exp_avg", "exp_avg_sq")
_LAYOUT, _HEADER = 1, "state"


def even_share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and last (exclusive) of a rank's elements of a parameter of `size` elements."""
    share = math.ceil(size / ranks)
    return min(rank * share, size), min((rank + 1) * share, size)


@dataclass(frozen=True)
class Part:
    """This rank's part of one parameter, and where it lies in the flat tensors."""

    name: str
    shape: tuple[int, ...]
    group: int
    offset: int
    padded: int
    first: int
    last: int

    def view(self, flats: list[Tensor]) -> Tensor:
        """Its elements in one kind of flat tensors, without padding."""
        return flats[self.group].narrow(0, self.offset, self.last - self.first)


class Partition:
    """What this rank holds of the trained parameters, in DeepSpeed's ZeRO-3 `optimizer` (version 0.19)."""

    def __init__(self, optimizer: Any, names: Mapping[nn.Parameter, str]) -> None:
        self._optimizer = optimizer
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.parts: dict[str, Part] = {}
        for group, parameters in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in parameters:
                padded = parameter.partition_numel()
                first, last = even_share(parameter.ds_numel, self.rank, self.ranks)
                name = names[parameter]
                self.parts[name] = Part(name, tuple(parameter.ds_shape), group, offset, padded, first, last)
                offset += padded
        self._average: list[Tensor] | None = None
        self._spare: list[dict[str, list[Tensor]]] = []

    @property
    def _masters(self) -> list[Tensor]:
        return [flat.detach() for flat in self._optimizer.fp32_partitioned_groups_flat]

    @property
    def _states(self) -> list[dict[str, Any]]:
        """Adam's states of each flat tensor; empty ones before the first step."""
        states = self._optimizer.optimizer.state
        return [states.get(flat) or {} for flat in self._optimizer.fp32_partitioned_groups_flat]

    @property
    def steps(self) -> int | None:
        """Applied steps, which Adam's bias correction counts; None before the first."""
        return int(self._states[0]["step"]) if self._states[0] else None

    def flats(self) -> dict[str, list[Tensor]]:
        """The flat tensors of every kind that there is."""
        flats = {MASTER: self._masters}
        if self.steps is not None:
            flats |= {kind: [state[kind] for state in self._states] for kind in STATES}
        if self._average is not None:
            flats[AVERAGE] = self._average
        return flats

    def finite(self) -> bool:
        """Whether all masters of this rank, and their averages, are finite numbers."""
        flats = self.flats()
        return all(bool(flat.isfinite().all()) for kind in (MASTER, AVERAGE) for flat in flats.get(kind, ()))

    # Moving average

    def release(self) -> None:
        """Empties masters and optimiser states, and lets go of the average."""
        for flats in self.flats().values():
            for flat in flats:
                flat.grad = None  # with offload the masters have them
                flat.untyped_storage().resize_(0)
        self._average = None

    def start_average(self) -> None:
        """Begins the moving average at the masters."""
        self._average = [flat.clone() for flat in self._masters]

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * master."""
        for average, master in zip(self._average or [], self._masters, strict=True):
            average.lerp_(master, 1 - decay)

    # Gathering

    def gather(self, name: str, kind: str = MASTER) -> Tensor:
        """A parameter's whole master, state or average, float32 in its shape; all ranks must call."""
        part = self.parts[name]
        mine = self.flats()[kind][part.group].narrow(0, part.offset, part.padded)
        mine = mine.to(self._optimizer.fp16_partitioned_groups_flat[part.group].device)
        whole = mine.new_empty(part.padded * self.ranks)
        dist.all_gather_into_tensor(whole, mine)
        return whole[: math.prod(part.shape)].view(part.shape)

    # Saving and loading

    def snapshot(self) -> Callable[[Path], None]:
        """Copies this rank's part into the host's memory; what is returned writes it, also from another thread.

        The memory is used again by the snapshot after the write; while it is not written, the next takes its own.
        """
        flats, steps = self.flats(), self.steps
        host = self._spare.pop() if self._spare else {}
        for kind, each in flats.items():
            if kind not in host:
                host[kind] = [torch.empty(f.shape, dtype=f.dtype, pin_memory=f.is_cuda) for f in each]
            for copy, flat in zip(host[kind], each, strict=True):
                copy.copy_(flat, non_blocking=True)
        if any(flat.is_cuda for flat in flats[MASTER]):
            torch.cuda.synchronize()

        def write(folder: Path) -> None:
            try:
                self._write(folder, {kind: host[kind] for kind in flats}, steps)
            finally:
                self._spare.append(host)

        return write

    def _write(self, folder: Path, flats: dict[str, list[Tensor]], steps: int | None) -> None:
        tensors = {
            f"{kind}/{name}": part.view(each)
            for kind, each in flats.items()
            for name, part in self.parts.items()
            if part.last > part.first
        }
        header = {
            "layout": _LAYOUT,
            "ranks": self.ranks,
            "steps": steps,
            "kinds": sorted(flats),
            "shapes": {name: part.shape for name, part in self.parts.items()},
        }
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        # one entry: several come in no fixed order, and equal states shall make equal files
        save_tensors(tensors, _shard(folder, self.rank, self.ranks), {_HEADER: json.dumps(header)})

    @torch.no_grad()
    def load(self, folder: Path, own: bool = False) -> None:
        """Reads this rank's part from shards of any number of ranks; with `own`, of as many, from its own shard alone.

        Without an average in them, the average begins at their masters. Raises RuntimeError for shards that are
        missing, of another layout, or of other parameters.
        """
        with _Shards(folder, _shard(folder, self.rank, self.ranks) if own else None) as shards:
            shards.check({name: part.shape for name, part in self.parts.items()})
            self._optimizer.checkpoint_event_prologue()
            optimizer = self._optimizer.optimizer
            for flat in self._optimizer.fp32_partitioned_groups_flat:
                optimizer.state.pop(flat, None)
                if shards.steps is not None:
                    # a fused Adam counts where its parameters are
                    place = flat.device if optimizer.defaults["fused"] else "cpu"
                    step = torch.tensor(float(shards.steps), device=place)
                    optimizer.state[flat] = {"step": step} | {kind: torch.zeros_like(flat.detach()) for kind in STATES}
            for kind, flats in self.flats().items():
                if kind not in shards.kinds:
                    continue
                for part in self.parts.values():
                    shards.read_into(part.view(flats), f"{kind}/{part.name}", part)
            for held, master in zip(self._optimizer.fp16_partitioned_groups_flat, self._masters, strict=True):
                held.copy_(master)  # what layers use; with offload the masters are in the host's memory
            self._optimizer.checkpoint_event_epilogue()
            if self._average is not None and AVERAGE not in shards.kinds:
                self.start_average()


def _shard(folder: Path, rank: int, ranks: int) -> Path:
    return folder / FOLDER / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


class _Shards:
    """The shards of a checkpoint, or the one at `only`, open for reading."""

    def __init__(self, folder: Path, only: Path | None = None) -> None:
        self.folder = folder / FOLDER
        found = sorted(self.folder.glob("rank-*-of-*.safetensors")) if only is None else [only]
        if not any(path.exists() for path in found):
            raise RuntimeError(f"{self.folder} holds no shards: it is no checkpoint of this platform")
        self._files: dict[int, Any] = {}
        headers = []
        for path in found:
            try:
                file = safe_open(path, "pt")
                headers.append(json.loads(file.metadata()[_HEADER]))
                self._files[int(path.name.split("-")[1])] = file
            except (SafetensorError, KeyError, TypeError) as error:
                raise RuntimeError(f"{path} can't be read: {error}") from error
        of = {(header["layout"], header["ranks"], header["steps"]) for header in headers}
        ranks = len(found) if only is None else headers[0]["ranks"]
        if of != {(_LAYOUT, ranks, headers[0]["steps"])}:
            raise RuntimeError(
                f"{self.folder} holds no whole set of shards: {counted(len(found), 'shard')}, with layouts, ranks and "
                f"steps {sorted(of, key=str)}"
            )
        self.ranks: int = headers[0]["ranks"]
        self.steps: int | None = headers[0]["steps"]
        self.kinds: list[str] = headers[0]["kinds"]
        self.shapes = {name: tuple(shape) for name, shape in headers[0]["shapes"].items()}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises RuntimeError that names the parameters by which the shards differ from what is trained."""
        lists = {
            "missing from the checkpoint": [name for name in expected if name not in self.shapes],
            "only in the checkpoint": [name for name in self.shapes if name not in expected],
            "of another shape": [name for name in expected if self.shapes.get(name, expected[name]) != expected[name]],
        }
        if any(lists.values()):
            told = [f"{title} {len(names)}, such as {names[0]}" for title, names in lists.items() if names]
            raise RuntimeError(
                f"{self.folder} holds other parameters than are trained: {'; '.join(told)}. Restore the model and "
                "`trained` of the run that wrote it"
            )

    def read_into(self, target: Tensor, key: str, part: Part) -> None:
        """Fills `target` with elements [first, last) of a flattened parameter, from the shards that hold them."""
        size = math.prod(part.shape)
        for rank in range(self.ranks):
            first, last = even_share(size, rank, self.ranks)
            begin, end = max(first, part.first), min(last, part.last)
            if begin < end:
                piece = self._files[rank].get_slice(key)[begin - first : end - first]
                target[begin - part.first : end - part.first].copy_(piece)

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()


@contextlib.contextmanager
def saved_parameters(
    folder: Path, averaged: bool
) -> Iterator[tuple[Mapping[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """Shapes, by name, of the parameters that a checkpoint's shards hold, and what reads one of them whole, float32.

    With `averaged` its moving average, where one is kept, else its master. Needs no process group. Raises RuntimeError
    for shards that are missing, damaged or of several checkpoints.
    """
    with _Shards(folder) as shards:
        kind = AVERAGE if averaged and AVERAGE in shards.kinds else MASTER

        def read(name: str) -> Tensor:
            shape = shards.shapes[name]
            whole = torch.empty(math.prod(shape))
            shards.read_into(whole, f"{kind}/{name}", Part(name, shape, 0, 0, whole.numel(), 0, whole.numel()))
            return whole.view(shape)

        yield shards.shapes, read
