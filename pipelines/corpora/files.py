"""The pictures and clips of a source: read, looked into, and made members of a sample."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.corpora.downloads import check_download
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.conversions import noted_conversions
from domainshuttle.pipelines.media.cut import ClipFile, clip_file
from domainshuttle.pipelines.media.decode import decode_image, encode_jpeg
from domainshuttle.pipelines.media.file_types import picture_format
from domainshuttle.pipelines.quarantine import SampleFault
from domainshuttle.pipelines.sample import Buffer, RawSample, Reference, SampleInfo, Subject, safe_key

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
Origin = Literal["same_clip", "other_clip", "edited", "photo"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's bytes, the extension of its format, and its (height, width) as it is looked at."""

    data: Buffer
    extension: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shown:
    """A reference picture of a sample: of which of its subjects, and where it came from."""

    subject: int
    origin: Origin
    picture: Picture


def picture_of(data: Buffer, name: str) -> Picture:
    """A picture as it is; it is decoded, so that one that can't be is left out. Raises SampleFault."""
    try:
        with noted_conversions():  # it keeps its bytes: what is done to its pixels is noted where they are used
            pixels = decode_image(data, name)
        extension = _EXTENSIONS[picture_format(data, name)]
    except DataError as error:
        raise SampleFault("unreadable picture", str(error)) from error
    return Picture(data, extension, (pixels.shape[0], pixels.shape[1]))


def read_picture(root: Path, name: str) -> Picture:
    """A picture of a source's folder. Raises SampleFault where it is missing or unreadable."""
    return picture_of(read_media(root, name, "picture"), name)


def clip_of(data: Buffer, name: str) -> ClipFile:
    """A clip as it is. Raises SampleFault where it can't be read."""
    try:
        with noted_conversions():
            return clip_file(data, name)
    except DataError as error:
        raise SampleFault("unreadable clip", str(error)) from error


def drawn_picture(pixels: Pixels) -> Picture:
    """[h,w,3] that were cut out of something, as JPEG."""
    return Picture(encode_jpeg(pixels), "jpg", (pixels.shape[0], pixels.shape[1]))


def read_media(root: Path, name: str, what: str) -> bytes:
    """A file of a source's folder. Raises SampleFault where it is missing, leads out of it, or is a stub of a
    download."""
    path = within(root, name)
    if not path.is_file():
        raise SampleFault(f"missing {what}", f"{name} is not in {root}")
    try:
        return check_download(path).read_bytes()
    except DataError as error:
        raise SampleFault(f"unreadable {what}", str(error)) from error


def within(root: Path, name: str) -> Path:
    """A path below a folder. Raises SampleFault for a name that leads out of it."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or "\0" in name:
        raise SampleFault("unsafe name", f"{name[:120]!r} does not lead to a file below {root}")
    return root / name


def sample_of(
    id_: str,
    source: str,
    caption: str,
    target: Picture | ClipFile,
    subjects: Sequence[tuple[str, int]],
    shown: Iterable[Shown],
    scores: dict[str, float],
    video: str | None = None,
    source_clip: ClipFile | None = None,
) -> RawSample:
    """A raw sample of its parts; `subjects` are (word, domain), in the order of their ids."""
    files: dict[str, Buffer] = {target.extension: target.data}
    if source_clip is not None:
        files[f"source.{source_clip.extension}"] = source_clip.data
    references = []
    for number, one in enumerate(shown):
        name = f"ref{number}.{one.picture.extension}"
        files[name] = one.picture.data
        references.append(Reference(file=name, subject=one.subject, origin=one.origin, size=one.picture.size))
    clip = isinstance(target, ClipFile)
    info = SampleInfo(
        caption=caption,
        source=source,
        kind="video" if clip else "image",
        fps=target.fps if isinstance(target, ClipFile) else None,
        frames=target.frames if isinstance(target, ClipFile) else 1,
        size=target.size,
        subjects=[Subject(id=number, word=word, domain=domain) for number, (word, domain) in enumerate(subjects)],
        references=references,
        scores=scores,
        video=video,
        source_clip=f"source.{source_clip.extension}" if source_clip is not None else None,
    )
    return RawSample(safe_key(id_), info, files)
