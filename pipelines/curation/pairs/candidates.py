"""Candidates of cross pairs: what was seen of subjects in frames, and where it is kept.

They are found once, which takes GPUs, and kept in Arrow files by the samples' content: other thresholds choose anew
among them, and of a corpus that grew only new samples are looked into. A file appears whole or not at all.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from domainshuttle.pipelines.corpora.words import BACKGROUND, domain_of
from domainshuttle.pipelines.index.parts import WORK_NAME
from domainshuttle.pipelines.index.table import Index, IndexRow
from domainshuttle.pipelines.sample import SampleInfo, Subject
from domainshuttle.pipelines.storage.atomic import atomic_file

if TYPE_CHECKING:  # it brings torch, which who chooses does not need
    from domainshuttle.pipelines.curation.detector import Box

STORE_NAME = f"{WORK_NAME}/candidates"
"""The folder of candidates, in that of the corpus that is made of them."""

Place = Literal["target", "source", "reference"]
"""Where something was seen: in the target, in the clip that the target was made of, or as a reference picture."""
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A subject in a frame.

    `frame` is the frame's number, of a reference its place in the sample. `counts` are the run lengths of its mask
    (none: the whole frame), `size` is the frame's (height, width), `area` the covered share of it, and `picture` what
    was cut out, as JPEG of `picture_size` (of a reference: none, the sample has it). `dino` and `clip` are unit vectors
    of how the picture looks; what has an empty mask has none.
    """

    word: str
    place: Place
    frame: int
    box: "Box"
    detection: float
    counts: str
    size: tuple[int, int]
    mask_score: float
    area: float
    picture: bytes
    picture_size: tuple[int, int]
    dino: Vector
    clip: Vector


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a sample: its key and its video, or why it could not be looked into."""

    name: str
    key: str
    video: str
    candidates: tuple[Candidate, ...] = ()
    fault: str = ""


_CANDIDATE = pa.struct(
    [
        ("word", pa.string()), ("place", pa.string()), ("frame", pa.int64()), ("box", pa.list_(pa.float32(), 4)),
        ("detection", pa.float32()), ("counts", pa.string()), ("size", pa.list_(pa.int32(), 2)),
        ("mask_score", pa.float32()), ("area", pa.float32()), ("picture", pa.binary()),
        ("picture_size", pa.list_(pa.int32(), 2)), ("dino", pa.list_(pa.float32())), ("clip", pa.list_(pa.float32())),
    ]
)  # fmt: skip
_SCHEMA = pa.schema(
    [
        ("name", pa.string()), ("key", pa.string()), ("video", pa.string()), ("fault", pa.string()),
        ("boxes", pa.int64()), ("scenes", pa.int64()), ("candidates", pa.large_list(_CANDIDATE)),
    ]
)  # fmt: skip


def subjects_of(info: SampleInfo, words: Sequence[str]) -> list[Subject]:
    """The subjects that are looked for: the sample's own or, where it has none, one of each of `words`."""
    asked = enumerate(dict.fromkeys(words))
    return info.subjects or [Subject(id=number, word=word, domain=domain_of(word)) for number, word in asked]


def is_scene(subject: Subject) -> bool:
    """Whether a subject is all of a frame that other subjects leave, so that no box is asked for."""
    return BACKGROUND in (subject.domain, domain_of(subject.word))


def name_of(row: IndexRow) -> str:
    """The name of a sample's candidates: of which sample it is and what its members hold."""
    return _name(row.sample_id, row.checksum)


def names_in(index: Index) -> list[str]:
    """`name_of` of all rows."""
    return [*map(_name, index.column("sample_id").tolist(), index.column("checksum").tolist())]


def _name(sample_id: int, checksum: int) -> str:
    return f"{sample_id & ((1 << 64) - 1):016x}{checksum:016x}"


@dataclass(frozen=True)
class CandidateStore:
    """Candidates in a folder."""

    folder: Path

    def write(self, found: Sequence[Found]) -> None:
        """Adds the candidates of some samples."""
        if not found:
            return
        named = hashlib.blake2b("".join(one.name for one in found).encode(), digest_size=12).hexdigest()
        table = pa.Table.from_pylist([_row(one) for one in found], _SCHEMA)
        with (
            atomic_file(self.folder / f"{named}.arrow") as aside,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as writer,
        ):
            writer.write_table(table)

    def gather(self, names: Iterable[str], video: str | None = None) -> "Candidates":
        """The candidates of the samples that are named, found in all files and noted for `open`. `video` is the pattern
        of keys that gives the video of samples that name none."""
        wanted, rows = frozenset(names), []
        files = sorted(path.name for path in self.folder.glob("*.arrow"))
        seen: set[str] = set()
        for number, file in enumerate(files):
            columns = _opened(self.folder / file).select(["name", "key", "video", "boxes", "scenes", "fault"])
            for place, row in enumerate(columns.to_pylist()):
                if row["name"] in wanted and row["name"] not in seen:
                    seen.add(row["name"])
                    if video and not row["video"]:
                        match = re.search(video, row["key"])
                        row["video"] = match[1] or "" if match else ""
                    rows.append({**row, "file": number, "place": place})
        table = pa.Table.from_pylist(rows, _PLACES).replace_schema_metadata({"files": json.dumps(files)})
        with (
            atomic_file(self.folder / _PLACES_NAME) as aside,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        return self.open()

    def open(self) -> "Candidates":
        """What was gathered last."""
        return Candidates(self.folder)


_PLACES_NAME = "places"
_PLACES = pa.schema(
    [
        ("name", pa.string()), ("key", pa.string()), ("video", pa.string()), ("boxes", pa.int64()),
        ("scenes", pa.int64()), ("fault", pa.string()), ("file", pa.int32()), ("place", pa.int32()),
    ]
)  # fmt: skip
_MOST_OPEN = 64


def _opened(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Candidates:
    """Candidates of the samples of one corpus: what is held in memory are their places. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        table = _opened(folder / _PLACES_NAME)
        files = json.loads(table.schema.metadata[b"files"])
        columns = {name: table.column(name).to_pylist() for name in _PLACES.names}
        self._at = dict(zip(columns["name"], zip(columns["file"], columns["place"], strict=True), strict=True))
        self._described = dict(zip(columns["name"], zip(columns["key"], columns["video"], strict=True), strict=True))
        self._table = lru_cache(_MOST_OPEN)(lambda number: _opened(folder / files[number]))
        self.boxes, self.scenes = sum(columns["boxes"]), sum(columns["scenes"])
        """How many boxes and how many scenes there are."""
        self.faults = [fault for fault in columns["fault"] if fault]
        """Of samples that could not be looked into."""

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def __len__(self) -> int:
        return len(self._at)

    def find(self, name: str) -> Found | None:
        """The candidates of a sample; None where nobody looked."""
        if (at := self._at.get(name)) is None:
            return None
        return _found(self._table(at[0]).slice(at[1], 1).to_pylist()[0])

    def beside(self, name: str, most: int) -> list[Found]:
        """Those of other clips of a sample's video, at most so many: the next ones by key, from the sample's on."""
        key, video = self._described[name]
        if not video or not most:
            return []
        clips = self._videos[video]
        here = clips.index((key, name))
        following = (clips[here + 1 :] + clips[:here])[:most]
        return [found for _, other in following if (found := self.find(other)) is not None]

    @cached_property
    def _videos(self) -> dict[str, list[tuple[str, str]]]:
        videos: dict[str, list[tuple[str, str]]] = {}
        for name, (key, video) in self._described.items():
            videos.setdefault(video, []).append((key, name))
        return {video: sorted(clips) for video, clips in videos.items()}


def _row(found: Found) -> dict[str, Any]:
    candidates = [{name: getattr(one, name) for name in Candidate.__slots__} for one in found.candidates]
    return {
        "name": found.name,
        "key": found.key,
        "video": found.video,
        "fault": found.fault,
        "boxes": sum(one.place != "reference" and bool(one.counts) for one in found.candidates),
        "scenes": sum(one.place != "reference" and not one.counts for one in found.candidates),
        "candidates": candidates,
    }


def _found(row: dict[str, Any]) -> Found:
    def candidate(content: dict[str, Any]) -> Candidate:
        tuples = {name: tuple(content[name]) for name in ("box", "size", "picture_size")}
        vectors = {name: np.array(content[name], np.float32) for name in ("dino", "clip")}
        return Candidate(**{**content, **tuples, **vectors})

    return Found(row["name"], row["key"], row["video"], tuple(map(candidate, row["candidates"])), row["fault"])
