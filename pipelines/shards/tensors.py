"""The encoded sample and its file, `key.safetensors`: bf16 tensors, written and read without a pickle.

numpy has no bf16, so an array of bf16 values is held as its bit patterns in `uint16`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import LATENT_CHANNELS, Buffer, SampleInfo, check_key, required_member


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 values -> bf16 bit patterns (uint16, same shape), rounded to the nearest, ties to even, as torch does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # A NaN whose payload lies in the dropped bits would round to infinity: keep it a NaN.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> float32 values of the same shape, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class EncodedSample:
    """An encoded sample; all arrays are bf16 bit patterns in uint16.

    `target` [16, f, h, w] latents, `references` a list of [16, h, w] latents in the order of `info.references`, `text`
    [l, d] the text encoder's states without padding, `views` [16, h, w] latents of altered references by their number.
    Raises DataError on another dtype, rank or count.
    """

    key: str
    info: SampleInfo
    target: np.ndarray
    references: list[np.ndarray]
    text: np.ndarray
    views: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_key(self.key)
        for name, array in self.tensors().items():
            rank = 4 if name == "target" else 2 if name == "text" else 3
            channels = LATENT_CHANNELS if rank > 2 else None
            if array.dtype != np.uint16 or array.ndim != rank or (channels and array.shape[0] != channels):
                raise DataError(
                    f"sample {self.key!r}: {name} is {array.dtype} {list(array.shape)}: expected bf16 bits (uint16) of "
                    f"rank {rank}" + (f" with {channels} channels first" if channels else "")
                )
        if len(self.references) != len(self.info.references):
            raise DataError(
                f"sample {self.key!r}: {len(self.references)} reference latents, but key.json names "
                f"{len(self.info.references)} references"
            )
        if strangers := sorted(set(self.views) - set(range(len(self.references)))):
            raise DataError(
                f"sample {self.key!r}: views of references {strangers}, but it has {len(self.references)} references"
            )

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays under their names in `key.safetensors`."""
        references = {f"reference.{number}": latents for number, latents in enumerate(self.references)}
        views = {f"view.{number}": latents for number, latents in sorted(self.views.items())}
        return {"target": self.target, **references, **views, "text": self.text}

    def to_bytes(self) -> bytes:
        """The bytes of `key.safetensors`: the same for equal contents, data aligned to 64 bytes."""
        return write_safetensors(self.tensors())

    def members(self) -> dict[str, Buffer]:
        """The members to write into a shard, `json` first."""
        return {"json": self.info.to_json(), "safetensors": self.to_bytes()}

    @classmethod
    def from_bytes(cls, key: str, info: SampleInfo, data: Buffer) -> "EncodedSample":
        """The sample of `key.safetensors`; its arrays are views of `data`, not copies."""
        views = tensor_views(data, f"{key}.safetensors")
        count = len(info.references)
        expected = ["target", *(f"reference.{number}" for number in range(count)), "text"]
        altered = [number for number in range(count) if f"view.{number}" in views]
        if sorted(views) != sorted([*expected, *(f"view.{number}" for number in altered)]):
            raise DataError(
                f"sample {key!r}: tensors {sorted(views)}: expected {sorted(expected)}, and view.i of references"
            )
        wrong = sorted(name for name, view in views.items() if view.dtype != "BF16")
        if wrong:
            raise DataError(
                f"sample {key!r}: tensor {wrong[0]!r} is {views[wrong[0]].dtype}: expected BF16; encode it again"
            )
        arrays = {n: np.frombuffer(view.buffer, np.uint16).reshape(view.shape) for n, view in views.items()}
        references = [arrays[f"reference.{number}"] for number in range(count)]
        own_views = {number: arrays[f"view.{number}"] for number in altered}
        return cls(key, info, arrays["target"], references, arrays["text"], own_views)

    @classmethod
    def from_members(cls, key: str, members: Mapping[str, Buffer]) -> "EncodedSample":
        """The sample of a shard's members (extension -> bytes), without copying the tensors."""
        info = SampleInfo.from_json(required_member(key, members, "json"), f"{key}.json")
        return cls.from_bytes(key, info, required_member(key, members, "safetensors"))


@dataclass(frozen=True)
class TensorView:
    """One tensor of a safetensors buffer: its safetensors dtype ('BF16'), its shape, and its bytes as a view."""

    dtype: str
    shape: tuple[int, ...]
    buffer: memoryview


@dataclass(frozen=True)
class TensorExtent:
    """Where one tensor of a safetensors file lies: its name, its safetensors dtype ('BF16'), its shape, and its bytes
    from `start` to `stop` in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


_MOST_DIMENSIONS = 8


_ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "I64": 8} | {
    "BOOL": 1
}


def write_safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Safetensors bytes of bf16 bit patterns (uint16 arrays), the data aligned to 64 bytes.

    Written here because the library's numpy side has no bf16.
    """
    header: dict[str, object] = {}
    position = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    body = (np.ascontiguousarray(array).tobytes() for array in tensors.values())
    return b"".join((len(text).to_bytes(8, "little"), text, *body))


def tensor_views(data: Buffer, where: str = "safetensors") -> dict[str, TensorView]:
    """The tensors of a safetensors buffer as views of it; a header or an extent that does not fit raises DataError."""
    whole = memoryview(data).cast("B")
    extents = tensor_extents(lambda offset, size: whole[offset : offset + size], len(whole), where)
    return {name: TensorView(one.dtype, one.shape, whole[one.start : one.stop]) for name, one in extents.items()}


def tensor_extents(read: Callable[[int, int], Buffer], size: int, where: str) -> dict[str, TensorExtent]:
    """Where the tensors of a safetensors file of `size` bytes lie, of which `read(offset, size)` gives parts; a header
    or an extent that does not fit raises DataError."""
    head = read(0, _USUAL_HEAD)
    length = int.from_bytes(bytes(head[:8]), "little")
    if len(head) < 8 or length > size - 8:
        raise DataError(f"{where}: header of {length} bytes in a file of {size}: cut short or not safetensors")
    text = bytes(head[8 : 8 + length]) if 8 + length <= len(head) else bytes(read(8, length))
    begin, body = 8 + length, size - 8 - length
    extents: dict[str, TensorExtent] = {}
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if len(shape) > _MOST_DIMENSIONS or not all(type(value) is int for value in (*shape, start, end)):
                raise DataError(
                    f"{where}: tensor {name!r}: expected at most {_MOST_DIMENSIONS} dimensions, and whole numbers as "
                    "sizes and offsets; the file is corrupt"
                )
            # plain integers: numpy's product would wrap around on a hostile shape
            count = _ITEM_SIZES[entry["dtype"]] * math.prod(shape)
            if min(shape, default=0) < 0 or not 0 <= start <= end <= body or end - start != count:
                raise DataError(
                    f"{where}: tensor {name!r} {entry['dtype']} {list(shape)[:8]} at {start} to {end} of {body}: "
                    "its extent does not fit; the file is cut short or corrupt"
                )
            if max(shape, default=0) > body:  # beside a 0, which numpy would refuse
                raise DataError(f"{where}: tensor {name!r} {list(shape)}: larger than the file; it is corrupt")
            extents[name] = TensorExtent(name, entry["dtype"], shape, begin + start, begin + end)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: unreadable safetensors header ({error!r}); the file is corrupt") from error
    return extents


_USUAL_HEAD = 4096
"""Bytes that hold the header of most samples."""
