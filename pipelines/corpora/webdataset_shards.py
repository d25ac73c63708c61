"""WebDataset shards of others, as img2dataset and video2dataset write them: pictures and clips with captions.

`key.jpg` or `key.mp4`, with `key.txt`, `key.json` or both. Keys may be any, also with folders; members of other kinds
are counted and left. References are made by a later stage.
"""

import contextlib
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import found_files
from domainshuttle.pipelines.corpora.files import clip_of, picture_of, sample_of
from domainshuttle.pipelines.corpora.json_records import parse
from domainshuttle.pipelines.corpora.source import (
    Fields,
    FolderSource,
    LeftOut,
    Notes,
    Piece,
    Record,
    SourceConfig,
    Tables,
    uncaptioned,
)
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason, of_sample
from domainshuttle.pipelines.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, RawSample
from domainshuttle.pipelines.shards.companions import companion

_TARGETS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)  # a clip may have a picture of itself beside it
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
"""By a shard's first bytes: some programs unpack what they download, and leave it its name."""
_SHARDS = ["**/*.tar", "**/*.tar.gz", "**/*.tgz", "**/*.tar.zst", "**/*.tzst", "**/*.tar.bz2"]
_ARCHIVE = re.compile(
    r".+\.(tar(\.(lz4|lzma|zst|bz2|z|\d+|[a-z]{2}))?|tgz|tzst|tbz2?|txz|tlz4?|zip|7z|rar)", re.IGNORECASE
)
_OTHERS = "other files"
"""The piece of archives that are not read."""
_MOST_TEXT = 16 << 20


class WebDatasetConfig(SourceConfig):
    """Shards of pictures or clips with captions."""

    builder: Literal["webdataset"] = "webdataset"
    shards: list[str] = Field(_SHARDS, min_length=1, description="below `folder`")
    captions: list[str] = Field(
        ["caption", "text", "prompt"], description="fields of key.json, where there is no key.txt"
    )
    source_video: str | None = Field(
        None, description="field of key.json that names the video that a clip was cut out of, such as url"
    )


class WebDatasetSource(FolderSource[WebDatasetConfig]):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        found = found_files(self.root, self.config.shards, "shards")
        pieces = [Piece.of(path, self.root, in_order=True) for path in found]
        if others := self._unread():
            names = os.fsencode("\0".join(others))
            pieces.append(Piece(_OTHERS, hashlib.blake2b(names, digest_size=16).hexdigest()))
        return pieces

    def _unread(self) -> list[str]:
        """The archives below the folder that are no shards, unless it is said which ones are."""
        if self.config.shards != _SHARDS:
            return []
        shards = {path for pattern in _SHARDS for path in self.root.glob(pattern)}
        names = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path not in shards)
        return sorted(name for name in names if _ARCHIVE.fullmatch(name) and not companion(name))

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        if piece.name == _OTHERS:
            for name in self._unread():
                yield LeftOut(name, f"other file: shards end with {', '.join(one[4:] for one in _SHARDS)}")
            return
        names: dict[str, list[str]] = {}
        again: dict[str, list[str]] = {}
        odd: list[str] = []

        def wanted(name: str) -> bool:
            key, ending = _split(name)
            if companion(name):
                return False
            held = names.setdefault(key, [])
            if key in again or ending in held:  # whose caption would come to whose picture?
                again.setdefault(key, []).append(ending)
                return False
            held.append(ending)
            return ending in ("txt", "json")

        texts: dict[str, dict[str, bytes]] = {}
        for name, data in _members(self.root / piece.name, wanted, odd):
            key, ending = _split(name)
            texts.setdefault(key, {})[ending] = data[:_MOST_TEXT]
        for name in odd:
            yield LeftOut(f"{piece.name}/{name}", "not a file: a link or a device, which tar holds without its content")
        for key, endings in again.items():
            yield LeftOut(f"{piece.name}/{key}", f"duplicate key: it comes again, with {endings[:8]}; the first stays")
        for key, endings in names.items():
            id_ = f"{piece.name}/{key}"
            try:
                yield self._record(id_, key, endings, texts.get(key, {}), piece)
            except DataError as error:
                yield LeftOut(id_, fault_reason(error))

    def _record(
        self, id_: str, key: str, endings: list[str], texts: dict[str, bytes], piece: Piece
    ) -> Record | LeftOut:
        target = next((ending for ending in _TARGETS if ending in endings), None)
        described = Fields({}, id_)
        if "json" in texts:  # img2dataset writes what a table has no value for as NaN
            described = Fields(parse(texts["json"], f"{id_}.json", nan_is_null=True), f"{id_}.json")
        if described.content.get("status", "success") != "success":
            return LeftOut(id_, f"not downloaded: {described.content['status']}")
        if target is None:
            return LeftOut(id_, f"no picture or clip: {sorted(endings)[:8]}")
        try:
            caption = texts.get("txt", b"").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise SampleFault("unreadable caption", f"{id_}.txt is not UTF-8") from error
        if not caption and any(described.content.get(name) for name in self.config.captions):
            caption = described.caption(*self.config.captions)
        extra = len(endings) - 1 - len(texts)
        named = self.config.source_video
        video = described.text(named).strip() or None if named is not None and named in described else None
        content = {"file": piece.name, "key": key, "target": target, "caption": caption, "extra": extra, "video": video}
        return Record(id_, content, uncaptioned=uncaptioned(caption))

    def make(self, records: Sequence[Record], tables: Tables, notes: Notes) -> Iterator[RawSample | LeftOut]:
        """See `source.Source`."""
        wanted = {f"{record.payload['key']}.{record.payload['target']}": record for record in records}
        names = set(wanted)
        for name, data in _members(self.root / records[0].payload["file"], lambda name: _folded(name) in names):
            record = wanted.pop(_folded(name), None)
            if record is None:
                continue
            content = record.payload
            if content["extra"]:
                notes.add("members of other kinds", content["extra"])
            clip = content["target"] in VIDEO_EXTENSIONS
            try:
                with of_sample(record.id):
                    target = clip_of(data, name) if clip else picture_of(data, name)
                    sample = sample_of(record.id, self.corpus, content["caption"], target, [], [], {}, content["video"])
            except DataError as error:
                yield LeftOut(record.id, fault_reason(error))
                continue
            yield sample


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member, as webdataset splits them: at the first dot after the folders."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _folded(name: str) -> str:
    return ".".join(_split(name))


def _members(path: Path, wanted: Callable[[str], bool], odd: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the members that are wanted, in order; the names of those that are neither files nor folders
    are added to `odd`. Raises DataError for a shard that is cut or damaged."""
    try:
        with contextlib.ExitStack() as opened:
            stream: Any = _Counted(_unpacked(path, opened))  # of a file, tarfile only reads
            # names that are no UTF-8 stay names
            archive: Any = opened.enter_context(
                tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, encoding="utf-8", errors="backslashreplace")
            )
            for member in archive:
                if member.isreg() and wanted(member.name) and (file := archive.extractfile(member)) is not None:
                    yield member.name, file.read()
                elif odd is not None and not member.isreg() and not member.isdir():
                    odd.append(member.name)
                archive.members = []  # of large shards, all headers would be held
            stream.check_end(archive.offset)
    except DataError:
        raise
    except Exception as error:  # of tarfile and the decompressors, each with types of its own
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is cut short or damaged ({type(error).__name__}: {text}): download it again"
        ) from error


class _Header(tarfile.TarInfo):
    """A header that is damaged is an error: tarfile takes it for the end of the archive, and loses what follows."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Header":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf).strip(b"\0"):
                raise ValueError(f"a header that is none: {error}") from error
            raise  # the end


def _unpacked(path: Path, opened: contextlib.ExitStack) -> IO[bytes]:
    import pyarrow as pa

    file = opened.enter_context(path.open("rb"))
    head = file.read(4)
    kind = next((kind for start, kind in _PACKED.items() if head.startswith(start)), None)
    if kind is None:
        file.seek(0)
        return file
    stream: Any = opened.enter_context(pa.input_stream(str(path), compression=kind))
    return stream


class _Counted:
    """A stream that knows where its last byte is that is not zero: tarfile takes an archive that was cut between
    members for whole, and does not see a second one that was joined to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.size, self.last = stream, 0, 0

    def read(self, size: int = -1) -> bytes:
        data = bytes(self.stream.read(size))
        if held := len(data.rstrip(b"\0")):
            self.last = self.size + held
        self.size += len(data)
        return data

    def check_end(self, end: int) -> None:
        """Raises ValueError where the archive's end, whose place this is, is not there, or more follows it."""
        while self.read(1 << 20):
            pass
        if self.size < end + tarfile.BLOCKSIZE:
            raise ValueError("it has no end of archive")
        if self.last > end:
            raise ValueError("more follows the end of the archive, as where several were joined")
