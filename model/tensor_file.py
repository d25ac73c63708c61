"""The safetensors format: 8 bytes of length, a header of JSON, the tensors' bytes. Known without torch.

Nothing of a file is trusted: a header or an extent that does not fit is refused before anything is allocated for it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of a value of each type."""
_ALIGNMENT = 64
_MOST_DIMENSIONS = 8
_MOST_HEADER = 100_000_000  # as the library accepts
_USUAL_HEAD = 4096  # bytes that hold the header of most samples


class TensorFileError(ValueError):
    """A file that is no whole safetensors file."""


@dataclass(frozen=True)
class TensorExtent:
    """Where one tensor of a safetensors file lies: its name, its safetensors dtype ('BF16'), its shape, and its bytes
    from `start` to `stop` in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def tensor_extents(
    read: Callable[[int, int], bytes | bytearray | memoryview], size: int, where: str
) -> dict[str, TensorExtent]:
    """Where the tensors of a safetensors file of `size` bytes lie, of which `read(offset, size)` gives parts.

    Raises:
        TensorFileError: for a header that can't be read, or an extent that does not fit.
    """
    head = read(0, _USUAL_HEAD)
    length = int.from_bytes(bytes(head[:8]), "little")
    if len(head) < 8 or length > min(size - 8, _MOST_HEADER):
        raise TensorFileError(f"{where}: header of {length} bytes in a file of {size}: cut short or not safetensors")
    text = bytes(head[8 : 8 + length]) if 8 + length <= len(head) else bytes(read(8, length))
    begin, body = 8 + length, size - 8 - length
    extents: dict[str, TensorExtent] = {}
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if len(shape) > _MOST_DIMENSIONS or not all(type(value) is int for value in (*shape, start, end)):
                raise TensorFileError(
                    f"{where}: tensor {name!r}: expected at most {_MOST_DIMENSIONS} dimensions, and whole numbers as "
                    "sizes and offsets; the file is corrupt"
                )
            if entry["dtype"] not in ITEM_SIZES:
                raise TensorFileError(f"{where}: tensor {name!r} is {entry['dtype']}: expected {', '.join(ITEM_SIZES)}")
            # plain integers: a product of fixed width would wrap around on a hostile shape
            count = ITEM_SIZES[entry["dtype"]] * math.prod(shape)
            if min(shape, default=0) < 0 or not 0 <= start <= end <= body or end - start != count:
                raise TensorFileError(
                    f"{where}: tensor {name!r} {entry['dtype']} {list(shape)[:8]} at {start} to {end} of {body}: "
                    "its extent does not fit; the file is cut short or corrupt"
                )
            if max(shape, default=0) > body:  # beside a 0, which numpy would refuse
                raise TensorFileError(f"{where}: tensor {name!r} {list(shape)}: larger than the file; it is corrupt")
            extents[name] = TensorExtent(name, entry["dtype"], shape, begin + start, begin + end)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, TensorFileError):
            raise
        raise TensorFileError(f"{where}: unreadable safetensors header ({error!r}); the file is corrupt") from error
    return extents


def file_extents(path: Path) -> dict[str, TensorExtent]:
    """Where the tensors of one safetensors file lie; raises ValueError for one that is damaged."""
    with path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        try:
            return tensor_extents(read, path.stat().st_size, path.name)
        except TensorFileError as error:
            raise ValueError(f"{path} is damaged or is cut off: {error}; fetch it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; those that its index names, if it has one.

    Raises:
        FileNotFoundError: when there is none, or the index names one that is not there.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{indices[0]} names {len(missing)} files that are not there: {missing}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors file in {folder}: give the folder that holds the weights")
    return files


def tensor_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    compact: bool = True,
) -> bytes:
    """The beginning of a safetensors file of these tensors (name, dtype, shape), whose bytes follow without gaps.

    They begin at a multiple of 64; without `compact`, of 8, and there are spaces in the header. The same tensors give
    the same bytes, in every version: digests cover them.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + ITEM_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":") if compact else None).encode()
    text += b" " * (-(8 + len(text)) % (_ALIGNMENT if compact else 8))
    return len(text).to_bytes(8, "little") + text
