"""Sharded safetensors, read and written one tensor at a time, so that memory holds one tensor and not a model.

Reading goes through plain file reads rather than a memory map, whose touched pages would count as memory in use.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from domainshuttle.model.tensor_file import file_extents, tensor_header, weight_files

STEM = "diffusion_pytorch_model"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor, and where its bytes lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    offset: int
    size: int


class WeightReader:
    """Every tensor of the safetensors files in a folder; a context manager that keeps the files open.

    Raises:
        FileNotFoundError: when the folder holds no safetensors file, or its index names one that is not there.
        ValueError: when a file is damaged, or two files hold the same tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[Path, BinaryIO] = {}
        for path in weight_files(folder):
            for name, info in _read_header(path).items():
                if name in self.infos:
                    raise ValueError(f"{name} is both in {self.infos[name].path.name} and in {path.name} of {folder}")
                self.infos[name] = info

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, in memory of its own."""
        info = self.infos[name]
        if info.path not in self._files:
            self._files[info.path] = info.path.open("rb")
        file = self._files[info.path]
        file.seek(info.offset)
        if info.size == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        data = bytearray(info.size)
        if file.readinto(data) != info.size:
            raise ValueError(f"{info.path} ends within {name}: the file is truncated, fetch it again")
        return torch.frombuffer(data, dtype=info.dtype).view(info.shape)

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file."""
    extents = file_extents(path)
    for name, one in extents.items():
        if one.dtype not in _DTYPES:
            raise ValueError(f"{name} in {path} has type {one.dtype}; supported are {', '.join(_DTYPES)}")
    return {
        name: TensorInfo(one.shape, _DTYPES[one.dtype], path, one.start, one.stop - one.start)
        for name, one in extents.items()
    }


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> list[Path]:
    """Write named tensors as safetensors in diffusers' file names, calling ``read`` for one at a time.

    A file appears under its name only when it is whole. More than one file comes with an index.

    Raises:
        ValueError: when ``read`` gives a tensor of another shape or type than was announced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_split(tensors, max_shard_bytes))
    paths, weight_map, total = [], {}, 0
    for i, shard in enumerate(shards):
        number = "" if len(shards) == 1 else f"-{i + 1:05d}-of-{len(shards):05d}"
        path = folder / f"{STEM}{number}.safetensors"
        total += _write_file(path, shard, read)
        weight_map.update({name: path.name for name, _, _ in shard})
        paths.append(path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return paths


def _split(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], max_shard_bytes: int
) -> Iterator[list[tuple[str, tuple[int, ...], torch.dtype]]]:
    """Consecutive tensors in groups of at most ``max_shard_bytes`` (a larger tensor is alone)."""
    shard: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    size = 0
    for name, shape, dtype in tensors:
        more = math.prod(shape) * dtype.itemsize
        if shard and size + more > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, shape, dtype))
        size += more
    yield shard


def _write_file(
    path: Path, shard: list[tuple[str, tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor]
) -> int:
    """Write one safetensors file; returns the bytes of its tensors."""
    partial = path.with_name(path.name + ".partial")
    entries = [(name, _NAMES[dtype], shape) for name, shape, dtype in shard]
    with partial.open("wb") as file:
        # not compact, as the first version wrote it: weights that are exported again have the digest that they had
        file.write(tensor_header(entries, {"format": "pt"}, compact=False))
        for name, shape, dtype in shard:
            tensor = read(name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {dtype} {list(shape)}")
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # else the name can outlive a loss of power, and the bytes not
    os.replace(partial, path)  # noqa: PTH105 - atomic also over an older file
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in shard)
