"""The sample: its schema, its names, and its two forms, raw (pictures and clips) and encoded (latents and text states).

Both forms are members of a WebDataset shard: files that share a key and differ in their extension.

* Raw: `key.json` (`SampleInfo`), `key.jpg|png|webp|mp4` (the target), `key.ref0.jpg` ... (the reference pictures).
* Encoded: `key.json` and `key.safetensors` with `target` [16, f, h, w], `reference.0` [16, h, w] ... and `text` [l, d]
  in bf16, and a `view.i` [16, h, w], an altered view of reference i, where it is the only picture of its subject.

numpy has no bf16, so an array of bf16 values is held as its bit patterns in `uint16`. A loader makes torch tensors of
them without a copy: `torch.from_numpy(bits).view(torch.bfloat16)`. Nothing here reads or writes a pickle.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

Buffer = bytes | bytearray | memoryview

DOMAINS = ("human", "object", "fantasy", "background", "other")
ORIGINS = ("same_clip", "other_clip", "edited", "photo")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov")
LATENT_CHANNELS = 16
READ_AHEAD, MOST_BAD = 256 << 20, 0.01
"""Bytes of batches that a rank holds ahead, and the share of unreadable samples above which a run ends, by default."""
LEAST_FPS, MOST_FPS = 0.01, 1000.0
"""Rates of clips, in frames a second: others are mistakes, and no fraction with a small denominator stands for them."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
EXTENSION_PATTERN = re.compile(r"(?=.{1,19}\Z)[a-z0-9]+(\.[a-z0-9]+)*")
REFERENCE_PATTERN = re.compile(r"ref\d+\.(jpg|jpeg|png|webp)")

Size = tuple[Annotated[int, Field(ge=1, le=65536)], Annotated[int, Field(ge=1, le=65536)]]


class DataError(ValueError):
    """Data that breaks its contract: the message says what, where, what was expected and what to do."""


class TooManyBadError(DataError):
    """More bad samples than a run accepts: starting again would meet them again."""


def check_key(key: str) -> str:
    """Return `key` if it is safe as the base of a member's name, else raise DataError.

    Safe: 1 to 80 letters, digits, `_` and `-`, the first one a letter or a digit (so no dot, slash, `..` or absolute
    name).
    """
    if not KEY_PATTERN.fullmatch(key):
        raise DataError(
            f"sample key {key[:120]!r}: expected 1 to 80 of A-Z a-z 0-9 _ - with a letter or digit first; "
            "make one of a free name with safe_key()"
        )
    return key


def check_extension(extension: str) -> str:
    """Return `extension` (such as 'jpg' or 'ref0.jpg') if it is safe, else raise DataError."""
    if not EXTENSION_PATTERN.fullmatch(extension):
        raise DataError(
            f"member extension {extension[:60]!r}: expected 1 to 19 lower-case letters and digits, in parts joined by "
            "one dot, such as 'jpg' or 'ref0.jpg'; rename the file"
        )
    return extension


def safe_key(name: str) -> str:
    """A safe key for any name: unchanged where it is safe already, else cleaned and made unique by a hash of the
    name."""
    if KEY_PATTERN.fullmatch(name):
        return name
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:60] or "sample"
    return f"{cleaned}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def sample_id(corpus_source: str, key: str) -> int:
    """A stable signed 64-bit name of a sample, from its source and key: the same on every machine and in every form."""
    digest = hashlib.blake2b(f"{corpus_source}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Subject(_Model):
    """One subject of a sample. `domain` is the one wanted in the target: an index of DOMAINS, or -1 for none."""

    id: Annotated[int, Field(ge=0, le=126)]
    word: str
    domain: Annotated[int, Field(ge=-1, le=len(DOMAINS) - 1)]


class Reference(_Model):
    """One reference picture: its member's extension, its subject's id, where it came from, and its (height, width) in
    pixels."""

    file: str
    subject: int
    origin: Literal["same_clip", "other_clip", "edited", "photo"]
    size: Size

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        if not REFERENCE_PATTERN.fullmatch(self.file):
            raise ValueError(f"reference file {self.file!r}: expected 'ref<number>.jpg|png|webp', such as 'ref0.jpg'")
        return self


class SampleInfo(_Model):
    """What `key.json` holds. `size` is the target's (height, width) in pixels, as it is looked at, and `frames` its
    length, at `fps`. All of it is said of the raw files, in an encoded sample too: its bucket and rate are told by its
    latents and the index. Subject ids are 0..n-1 in order, and each reference names one of them."""

    caption: str
    source: Annotated[str, Field(min_length=1)]
    kind: Literal["image", "video"]
    fps: Annotated[FiniteFloat, Field(ge=LEAST_FPS, le=MOST_FPS)] | None = None
    frames: Annotated[int, Field(ge=1)]
    size: Size
    subjects: list[Subject]
    references: list[Reference]
    scores: dict[str, FiniteFloat] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        ids = [subject.id for subject in self.subjects]
        if ids != list(range(len(ids))):
            raise ValueError(f"subject ids {ids}: expected {list(range(len(ids)))}, in order and each once")
        for reference in self.references:
            if reference.subject not in ids:
                raise ValueError(
                    f"reference {reference.file!r} names subject {reference.subject}: the sample has {ids}"
                )
        files = [reference.file for reference in self.references]
        if len(set(files)) != len(files):
            raise ValueError(f"reference files {files}: expected each once")
        if self.kind == "image" and self.frames != 1:
            raise ValueError(f"an image with {self.frames} frames: expected frames = 1, or kind = 'video'")
        return self

    def to_json(self) -> bytes:
        """The bytes of `key.json`: UTF-8, keys in a fixed order, the same bytes for equal contents."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: Buffer, where: str = "key.json") -> "SampleInfo":
        """Parse and validate `key.json`; raises DataError that names `where` and each field at fault."""
        try:
            return cls.model_validate_json(bytes(data))
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'json'}: {e['msg']}" for e in error.errors()[:5])
            raise DataError(f"{where}: not a valid sample description: {faults}") from error


@dataclass(frozen=True)
class RawSample:
    """A raw sample: `files` maps each extension ('jpg', 'mp4', 'ref0.jpg') to its bytes; `key.json` is made of `info`.

    Raises DataError where the target or a reference is missing, or a file belongs to nothing.
    """

    key: str
    info: SampleInfo
    files: Mapping[str, Buffer]

    def __post_init__(self) -> None:
        check_key(self.key)
        expected = {reference.file for reference in self.info.references}
        missing = sorted(expected - set(self.files))
        if missing:
            raise DataError(f"sample {self.key!r}: missing reference {missing}; it has {sorted(self.files)}")
        targets = sorted(set(self.files) - expected)
        allowed = IMAGE_EXTENSIONS if self.info.kind == "image" else VIDEO_EXTENSIONS
        if len(targets) != 1 or targets[0] not in allowed:
            raise DataError(
                f"sample {self.key!r}: target files {targets}: expected exactly one of {list(allowed)} beside the "
                f"references that key.json names, because its kind is {self.info.kind!r}"
            )

    @property
    def target_extension(self) -> str:
        """The extension of the target: the one file that is not a reference."""
        return next(iter(set(self.files) - {reference.file for reference in self.info.references}))

    @property
    def target(self) -> Buffer:
        """The target's bytes, as they are in the shard."""
        return self.files[self.target_extension]

    def members(self) -> dict[str, Buffer]:
        """The members to write into a shard, `json` first."""
        return {"json": self.info.to_json(), **self.files}

    @classmethod
    def from_members(cls, key: str, members: Mapping[str, Buffer]) -> "RawSample":
        """The sample of a shard's members (extension -> bytes); the buffers are kept, not copied."""
        info = SampleInfo.from_json(_member(key, members, "json"), f"{key}.json")
        return cls(key, info, {name: data for name, data in members.items() if name != "json"})


def _member(key: str, members: Mapping[str, Buffer], extension: str) -> Buffer:
    if extension not in members:
        raise DataError(f"sample {key!r}: member {extension!r} is missing; it has {sorted(members)}")
    return members[extension]


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
        info = SampleInfo.from_json(_member(key, members, "json"), f"{key}.json")
        return cls.from_bytes(key, info, _member(key, members, "safetensors"))


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
