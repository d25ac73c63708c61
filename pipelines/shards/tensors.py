"""The encoded sample and its file, `key.safetensors`: bf16 tensors, written and read without a pickle.

numpy has no bf16, so an array of bf16 values is held as its bit patterns in `uint16`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from domainshuttle.model.tensor_file import TensorExtent, TensorFileError, tensor_extents, tensor_header
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import LATENT_CHANNELS, Buffer, SampleInfo, check_key, required_member


@dataclass(frozen=True)
class EncodedSample:
    """An encoded sample; all arrays are bf16 bit patterns in uint16.

    `target` [16, f, h, w] latents, `references` a list of [16, h, w] latents in the order of `info.references`, `text`
    [l, d] the text encoder's states without padding, `views` [16, h, w] latents of altered references by their number,
    `caption_tokens` how many the whole caption has, where it was cut (0: it was not, or nobody counted). Raises
    DataError on another dtype, rank or count.
    """

    key: str
    info: SampleInfo
    target: np.ndarray
    references: list[np.ndarray]
    text: np.ndarray
    views: Mapping[int, np.ndarray] = field(default_factory=dict)
    caption_tokens: int = 0
    converted: tuple[str, ...] = ()
    """What was done to the pixels of its files beside decoding them; not in the file."""
    pixels: bytes = b""
    """A digest of the raw files and claims that decided its latents, where it is known; not in the file."""

    @property
    def whole_caption_tokens(self) -> int:
        """Tokens of the whole caption: those of `text`, or more where it was cut."""
        return max(self.caption_tokens, len(self.text))

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
        cut = self.caption_tokens > len(self.text)
        return write_safetensors(self.tensors(), {_CAPTION_TOKENS: str(self.caption_tokens)} if cut else None)

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
        tokens = _metadata(data).get(_CAPTION_TOKENS, "")
        counted = int(tokens) if isinstance(tokens, str) and re.fullmatch(r"\d{1,9}", tokens) else 0
        return cls(key, info, arrays["target"], references, arrays["text"], own_views, counted)

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


_CAPTION_TOKENS = "caption_tokens"


def write_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes of bf16 bit patterns (uint16 arrays), the data aligned to 64 bytes.

    Written here because the library's numpy side has no bf16.
    """
    header = tensor_header(((name, "BF16", array.shape) for name, array in tensors.items()), metadata)
    return b"".join((header, *(np.ascontiguousarray(array).tobytes() for array in tensors.values())))


def _metadata(data: Buffer) -> dict[str, object]:
    """What a safetensors buffer, whose header was read, says beside its tensors."""
    whole = memoryview(data).cast("B")
    header = json.loads(bytes(whole[8 : 8 + int.from_bytes(whole[:8], "little")]))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def tensor_views(data: Buffer, where: str = "safetensors") -> dict[str, TensorView]:
    """The tensors of a safetensors buffer as views of it; a header or an extent that does not fit raises DataError."""
    whole = memoryview(data).cast("B")
    extents = read_extents(lambda offset, size: whole[offset : offset + size], len(whole), where)
    return {name: TensorView(one.dtype, one.shape, whole[one.start : one.stop]) for name, one in extents.items()}


def read_extents(read: Callable[[int, int], Buffer], size: int, where: str) -> dict[str, TensorExtent]:
    """`tensor_extents` of a member of a shard, with a DataError where it is no whole safetensors file."""
    try:
        return tensor_extents(read, size, where)
    except TensorFileError as error:
        raise DataError(str(error)) from error
