"""The sample: its schema, its names, and its two forms, raw (pictures and clips) and encoded (latents and text states).

Both forms are members of a WebDataset shard: files that share a key and differ in their extension.

* Raw: `key.json` (`SampleInfo`), `key.jpg|png|webp|mp4` (the target), `key.ref0.jpg` ... (the reference pictures), and
  `key.source.mp4`, where a target was made of another clip of which references are still to be cut out. Where it was
  labelled also `key.labels.json`, of another shard, which then holds instead of `key.json`.
* Encoded: `key.json` and `key.safetensors` with `target` [16, f, h, w], `reference.0` [16, h, w] ... and `text` [l, d]
  in bf16, and a `view.i` [16, h, w], an altered view of reference i, where it is the only picture of its subject.

numpy has no bf16, so an array of bf16 values is held as its bit patterns in `uint16`. A loader makes torch tensors of
them without a copy: `torch.from_numpy(bits).view(torch.bfloat16)`. Nothing here reads or writes a pickle.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.errors import DataError

Buffer = bytes | bytearray | memoryview

KINDS = ("image", "video")
ORIGINS = ("same_clip", "other_clip", "edited", "photo")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov")
LATENT_CHANNELS = 16
LABELS_MEMBER = "labels.json"
"""The member that holds a labelled sample's description, beside the `json` that it was built with."""
READ_AHEAD = 256 << 20
"""Bytes of batches that a rank holds ahead, by default."""
LEAST_FPS, MOST_FPS = 0.01, 1000.0
"""Rates of clips, in frames a second: others are mistakes, and no fraction with a small denominator stands for them."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
EXTENSION_PATTERN = re.compile(r"(?=.{1,19}\Z)[a-z0-9]+(\.[a-z0-9]+)*")
REFERENCE_PATTERN = re.compile(r"ref\d+\.(jpg|jpeg|png|webp)")
SOURCE_CLIP_PATTERN = r"^source\.(mp4|webm|mkv|mov)$"

Size = tuple[Annotated[int, Field(ge=1, le=65536)], Annotated[int, Field(ge=1, le=65536)]]


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


LabelState = Literal["labelled", "refused", "bad_answer", "low_score", "unreadable"]


class Label(_Model):
    """Where a value of a sample comes from: `by` made the value that stands ('source': it is as it was built). `model`,
    `prompt` (version and digest) and `answer` (its name in the store of answers) are of what was asked, and `state`
    what came of it."""

    by: Literal["endpoint", "transformers", "words", "source"]
    state: LabelState
    model: str = ""
    prompt: str = ""
    answer: str = ""


class SampleInfo(_Model):
    """What `key.json` holds. `size` is the target's (height, width) in pixels, as it is looked at, and `frames` its
    length, at `fps`. All of it is said of the raw files, in an encoded sample too: its bucket and rate are told by its
    latents and the index. Subject ids are 0..n-1 in order, and each reference names one of them. `video` names the
    video that a clip was cut out of, and `source_clip` the member that an edited target was made of. `labels` says of
    the caption, the subjects' words and their domains who labelled them; nothing where nobody did."""

    caption: str
    source: Annotated[str, Field(min_length=1)]
    kind: Literal["image", "video"]
    fps: Annotated[FiniteFloat, Field(ge=LEAST_FPS, le=MOST_FPS)] | None = None
    frames: Annotated[int, Field(ge=1)]
    size: Size
    subjects: list[Subject]
    references: list[Reference]
    scores: dict[str, FiniteFloat] = Field(default_factory=dict)
    video: Annotated[str, Field(min_length=1)] | None = None
    source_clip: Annotated[str, Field(pattern=SOURCE_CLIP_PATTERN)] | None = None
    labels: dict[Literal["caption", "words", "domains"], Label] = Field(default_factory=dict)

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

    @property
    def caption_length(self) -> int:
        """Characters of the caption; 0 for a blank one."""
        return len(self.caption) if self.caption.strip() else 0

    def to_json(self) -> bytes:
        """The bytes of `key.json`: UTF-8, keys in a fixed order, the same bytes for equal contents."""
        # most samples have none, and those that were built before there were any keep their bytes
        without = {name for name in ("video", "source_clip", "labels") if not getattr(self, name)}
        return json.dumps(self.model_dump(mode="json", exclude=without), ensure_ascii=False, sort_keys=True).encode()

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
        expected = self._named()
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
        """The extension of the target: the one file that `info` does not name."""
        return next(iter(set(self.files) - self._named()))

    def _named(self) -> set[str]:
        source_clip = {self.info.source_clip} if self.info.source_clip else set()
        return {reference.file for reference in self.info.references} | source_clip

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
        info = SampleInfo.from_json(description(key, members), f"{key}.json")
        return cls(key, info, {name: data for name, data in members.items() if name not in ("json", LABELS_MEMBER)})


def description(key: str, members: Mapping[str, Buffer]) -> Buffer:
    """The bytes of the description that holds: that of the labels where there is one. Raises DataError."""
    built = required_member(key, members, "json")
    return members.get(LABELS_MEMBER, built)


def required_member(key: str, members: Mapping[str, Buffer], extension: str) -> Buffer:
    if extension not in members:
        raise DataError(f"sample {key!r}: member {extension!r} is missing; it has {sorted(members)}")
    return members[extension]
