"""WebDataset shards of others, as img2dataset and video2dataset write them: pictures and clips with captions.

`key.jpg` or `key.mp4`, with `key.txt`, `key.json` or both. Keys may be any, also with folders; members of other kinds
are counted and left. References are made by a later stage.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import found_files
from domainshuttle.pipelines.corpora.files import clip_of, picture_of, sample_of
from domainshuttle.pipelines.corpora.json_records import parse
from domainshuttle.pipelines.corpora.source import (
    Fields,
    LeftOut,
    Notes,
    Piece,
    Record,
    SourceConfig,
    Tables,
)
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason, of_sample
from domainshuttle.pipelines.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, RawSample
from domainshuttle.pipelines.shards.companions import companion

_TARGETS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)  # a clip may have a picture of itself beside it
_PACKED = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".tzst": "zstd", ".bz2": "bz2"}
_MOST_TEXT = 16 << 20


class WebDatasetConfig(SourceConfig):
    """Shards of pictures or clips with captions."""

    builder: Literal["webdataset"] = "webdataset"
    shards: list[str] = Field(
        ["**/*.tar", "**/*.tar.gz", "**/*.tgz", "**/*.tar.zst", "**/*.tzst", "**/*.tar.bz2"],
        min_length=1,
        description="below `folder`",
    )
    captions: list[str] = Field(
        ["caption", "text", "prompt"], description="fields of key.json, where there is no key.txt"
    )
    empty_captions: Literal["leave_out", "keep"] = Field("leave_out", description="keep: `data label` writes them")
    source_video: str | None = Field(
        None, description="field of key.json that names the video that a clip was cut out of, such as url"
    )


class WebDatasetSource:
    """See `source.Source`."""

    def __init__(self, config: WebDatasetConfig, corpus: str) -> None:
        self.config, self.corpus = config, corpus
        self.wanted, self.seed = config.samples, config.seed
        self.root = Path(config.folder)

    def pieces(self) -> list[Piece]:
        found = found_files(self.root, self.config.shards, "shards")
        return [Piece.of(path, self.root, in_order=True) for path in found]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        names: dict[str, list[str]] = {}

        def wanted(name: str) -> bool:
            key, ending = _split(name)
            if not companion(name):
                names.setdefault(key, []).append(ending)
            return ending in ("txt", "json")

        texts: dict[str, dict[str, bytes]] = {}
        for name, data in _members(self.root / piece.name, wanted):
            key, ending = _split(name)
            texts.setdefault(key, {})[ending] = data[:_MOST_TEXT]
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
        described = Fields(parse(texts["json"], f"{id_}.json"), f"{id_}.json") if "json" in texts else Fields({}, id_)
        if described.content.get("status", "success") != "success":
            return LeftOut(id_, f"not downloaded: {described.content['status']}")
        if target is None:
            return LeftOut(id_, f"no picture or clip: {sorted(endings)[:8]}")
        try:
            caption = texts.get("txt", b"").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise SampleFault("unreadable caption", f"{id_}.txt is not UTF-8") from error
        if not caption and any(described.content.get(name) for name in self.config.captions):
            caption = described.text(*self.config.captions).strip()
        if not caption and self.config.empty_captions == "leave_out":
            return LeftOut(id_, "empty caption")
        extra = len(endings) - 1 - len(texts)
        named = self.config.source_video
        video = described.text(named).strip() or None if named is not None and named in described else None
        content = {"file": piece.name, "key": key, "target": target, "caption": caption, "extra": extra, "video": video}
        return Record(id_, content)

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


def _members(path: Path, wanted: Any) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the members that are wanted, in order. Raises DataError for a shard that is cut or damaged."""
    from webdataset.tariterators import tar_file_iterator  # which brings torch

    try:
        with contextlib.ExitStack() as opened:
            stream = _Ended(_unpacked(path, opened))
            for member in tar_file_iterator(stream, skip_meta=None, select_files=wanted):
                yield member["fname"], member["data"]
            stream.check()
    except DataError:
        raise
    except Exception as error:  # of tarfile, the decompressors and webdataset, each with types of its own
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is cut short or damaged ({type(error).__name__}: {text}): download it again"
        ) from error


def _unpacked(path: Path, opened: contextlib.ExitStack) -> IO[bytes]:
    import pyarrow as pa

    kind = _PACKED.get(path.suffix.lower())
    if kind is None:
        return opened.enter_context(path.open("rb"))
    stream: Any = opened.enter_context(pa.input_stream(str(path), compression=kind))
    return stream


class _Ended:
    """A stream that knows whether the archive had an end: tarfile takes one that was cut between members for whole."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        data = bytes(self.stream.read(size))
        self.last = (self.last + data)[-512:] if len(data) < 512 else data[-512:]
        return data

    def check(self) -> None:
        while self.read(1 << 20):
            pass
        if len(self.last) < 512 or self.last.strip(b"\0"):
            raise ValueError("it has no end of archive")
