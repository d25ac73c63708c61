"""The units of an encoded corpus: what is encoded together, written together, and kept together.

A unit is up to so many samples of one raw shard, in the order of the raw index. Its name has a digest of all that
decides its shards: the samples' ids, checksums and buckets, the rate, the encoders' weights and the transform. So a
unit whose shards are there is never made again, whatever else of the corpus changes, and a corpus that grew in steps
has the shards and the index of one that was encoded at once.

Beside the shards, in `.parts/`, each unit has a note, written last: its rows of the index, and for each sample the
checksum of its raw sample and a digest of what decided its latents. By these, samples whose unit has changed are copied
from former shards, whole or but for their captions.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.parts import WORK_NAME
from domainshuttle.pipelines.index.table import SCHEMA, Index, IndexRow, rows_table
from domainshuttle.pipelines.quarantine import BadSample
from domainshuttle.pipelines.shards.tar import Member, read_members, sample_checksum
from domainshuttle.pipelines.shards.tensors import EncodedSample
from domainshuttle.pipelines.storage.files import open_parquet, writing
from domainshuttle.pipelines.storage.uri import Location, join

SHARD_PATTERN = re.compile(r"(.+-\d{4,}-[0-9a-f]{12}|part-\d{6})-\d{6}\.tar")
"""Names of shards that encoding makes, and made until November 2026."""
NOTE_SUFFIX = ".unit.parquet"
_VERSION = 1
_NOTE_KEY = b"domainshuttle.unit"
_NOTE_SCHEMA = pa.schema(
    [*SCHEMA, ("raw_checksum", pa.uint64()), ("pixels", pa.binary()), ("converted", pa.list_(pa.string()))]
)
_AT_ONCE = 16


@dataclass(frozen=True)
class Recipe:
    """What decides encoded samples beside the raw ones: the encoders as the index names them, and the clips' rate."""

    encoders: Mapping[str, str]
    fps: float | None

    def pixels(self, bucket: str) -> list[Any]:
        """Of the latents of a bucket. Encoders are known by their weights, wherever they lie; tiles count where they
        are used."""
        shape = parse_bucket(bucket)
        tiles = self.encoders.get("tiles", "")
        above = re.search(r"above (\d+) pixels", tiles)
        used = tiles if above and shape.height * shape.width > int(above[1]) else ""
        weights = self.encoders.get("video", "").rpartition(":")[2]
        return [weights, self.encoders.get("transform", ""), used, self.fps, bucket]

    @property
    def text(self) -> str:
        """Of the text states."""
        return ":".join(self.encoders.get("text", "").rsplit(":", 2)[-2:])

    def changes(self, before: "Recipe", buckets: Iterable[str]) -> list[str]:
        """What is another than `before`, for people; nothing where samples of both may stand in one corpus."""
        names = sorted({*self.encoders, *before.encoders} - {"video_files", "text_files"})
        differing = {"text"} if self.text != before.text else set()
        if any(self.pixels(bucket) != before.pixels(bucket) for bucket in buckets):
            differing |= {name for name in names if name != "text"}
        said = {name: (before.encoders.get(name), self.encoders.get(name)) for name in names if name in differing}
        if "video" in said and self.pixels("1x16x16")[0] == before.pixels("1x16x16")[0]:
            del said["video"]
        found = [f"{name} was {was}, now {now}" for name, (was, now) in said.items() if was != now]
        return found + ([f"fps was {before.fps}, now {self.fps}"] if self.fps != before.fps else [])


@dataclass(frozen=True)
class Unit:
    """`name` is its note's and the beginning of its shards' names; `rows` the numbers of its samples in the raw
    index."""

    name: str
    rows: np.ndarray


@dataclass(frozen=True)
class Note:
    """What a unit's note says: its rows as a table, what of it is bad, and by which recipe it was made."""

    name: str
    table: pa.Table
    bad: tuple[BadSample, ...]
    recipe: Recipe
    former: bool = False
    """Of the format until November 2026."""

    @property
    def shards(self) -> set[str]:
        return set(self.table.column("shard").unique().to_pylist())

    def converted(self) -> list[BadSample]:
        """What was done to the pixels of its samples, a row each."""
        names = ("source", "shard", "key", "converted")
        columns = zip(*(self.table.column(name).to_pylist() for name in names), strict=True)
        return [BadSample(source, shard, key, one) for source, shard, key, all_ in columns for one in all_ or ()]


def cut_units(raw: Index, recipe: Recipe, samples_per_unit: int, shard_bytes: int) -> list[Unit]:
    """The units of the samples of a raw index, in its order."""
    if not len(raw):
        return []
    codes, shards = raw.codes("shard")
    bucket_codes, buckets = raw.codes("bucket")
    rules = [recipe.pixels(bucket) for bucket in buckets]
    head = json.dumps([_VERSION, recipe.text, samples_per_unit, shard_bytes]).encode()
    ids = raw.table.column("sample_id").to_numpy()
    checksums = raw.table.column("checksum").to_numpy()
    units, counts = [], dict.fromkeys(range(len(shards)), 0)
    order = np.arange(len(raw))
    for run in np.split(order, np.flatnonzero(np.diff(codes)) + 1):
        shard = int(codes[run[0]])
        stem = shards[shard].removesuffix(".tar")
        for start in range(0, len(run), samples_per_unit):
            rows = run[start : start + samples_per_unit]
            digest = hashlib.blake2b(head + stem.encode(), digest_size=6)
            digest.update(ids[rows].tobytes() + checksums[rows].tobytes())
            digest.update(json.dumps([rules[code] for code in bucket_codes[rows].tolist()]).encode())
            units.append(Unit(f"{stem[:40]}-{counts[shard]:04d}-{digest.hexdigest()}", rows))
            counts[shard] += 1
    return units


def note_place(folder: Location, name: str) -> Location:
    """Where the note of a unit lies."""
    return join(folder, f"{WORK_NAME}/{name}{NOTE_SUFFIX}")


def write_note(
    folder: Location,
    name: str,
    made: Sequence[tuple[IndexRow, IndexRow, EncodedSample]],
    bad: Sequence[BadSample],
    recipe: Recipe,
) -> None:
    """Notes that a unit's shards are whole. `made`: the raw row, the encoded row and the sample, of each."""
    table = rows_table([row for _, row, _ in made])
    for column, values in (
        ("raw_checksum", [raw.checksum for raw, _, _ in made]),
        ("pixels", [sample.pixels for _, _, sample in made]),
        ("converted", [list(sample.converted) for _, _, sample in made]),
    ):
        table = table.append_column(column, pa.array(values, _NOTE_SCHEMA.field(column).type))
    said = {
        "version": _VERSION,
        "bad": [asdict(one) for one in bad],
        "encoders": dict(recipe.encoders),
        "fps": recipe.fps,
    }
    with writing(note_place(folder, name)) as file, pq.ParquetWriter(file, _NOTE_SCHEMA, compression="zstd") as writer:
        writer.write_table(table.cast(_NOTE_SCHEMA))
        writer.add_key_value_metadata({_NOTE_KEY: json.dumps(said, sort_keys=True).encode()})


def read_note(folder: Location, name: str) -> Note | None:
    """The note of a unit; None where it is not whole, or of another version."""
    try:
        file = open_parquet(note_place(folder, name))
        said = json.loads(file.metadata.metadata[_NOTE_KEY])
        if said["version"] != _VERSION:
            return None
        table = file.read().replace_schema_metadata(None)
        return Note(name, table, tuple(BadSample(**one) for one in said["bad"]), Recipe(said["encoders"], said["fps"]))
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, DataError):
        return None


def read_notes(folder: Location, names: Iterable[str], shards: Mapping[str, int]) -> dict[str, Note]:
    """The notes that are whole and whose shards are too; `shards`: those that are there, with their bytes."""
    names = list(names)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(partial(read_note, folder), names)
        return {note.name: note for note in found if note is not None and _there(note, shards)}


def _there(note: Note, shards: Mapping[str, int]) -> bool:
    ends: dict[str, int] = {}
    for shard, members in zip(
        note.table.column("shard").to_pylist(), note.table.column("members").to_pylist(), strict=True
    ):
        ends[shard] = max(ends.get(shard, 0), *(one["offset"] + one["size"] for one in members))
    return all(shards.get(shard, -1) >= end for shard, end in ends.items())


@dataclass(frozen=True)
class Before:
    """A sample as it was encoded before: where it lies, and what decided it."""

    folder: str
    shard: str
    key: str
    members: tuple[Member, ...]
    checksum: int
    raw_checksum: int
    pixels: bytes
    converted: tuple[str, ...]
    same_rules: bool
    """Whether latents are made as they were: the encoder, the transform, the bucket, the rate."""
    same_text: bool
    """Whether text states are made as they were."""

    def whole(self, raw_checksum: int) -> bool:
        """Whether the encoded sample of a raw one is this."""
        return self.same_rules and self.same_text and raw_checksum == self.raw_checksum

    def same_pixels(self, raw_checksum: int, pixels: bytes) -> bool:
        """Whether the latents of a raw sample are this one's."""
        return self.same_rules and (raw_checksum == self.raw_checksum or pixels == self.pixels)

    def read(self) -> EncodedSample | None:
        """The sample; None where it is gone or damaged, as it can be made again. Raises StorageError."""
        if not self.same_rules:
            return None
        try:
            members = read_members(self.folder, self.shard, self.members)
            if sample_checksum(members) != self.checksum:
                return None
            found = EncodedSample.from_members(self.key, members)
        except DataError:
            return None
        return replace(found, converted=self.converted, pixels=self.pixels)


@dataclass
class Former:
    """The samples that units which are wanted no more have, by their ids."""

    folder: Location
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._places: dict[int, tuple[int, int]] = {}
        for number, note in enumerate(self.notes):
            for row, one in enumerate(note.table.column("sample_id").to_pylist()):
                self._places[one] = number, row

    def of(self, rows: Sequence[IndexRow], recipe: Recipe) -> dict[int, Before]:
        """Those of some raw samples that are to be encoded by a recipe."""
        found = {}
        for raw in rows:
            if (place := self._places.get(raw.sample_id)) is None:
                continue
            note = self.notes[place[0]]
            (row,) = note.table.slice(place[1], 1).to_pylist()
            members = tuple(Member(one["name"], one["offset"], one["size"]) for one in row["members"])
            found[raw.sample_id] = Before(
                str(self.folder),
                row["shard"],
                row["key"],
                members,
                row["checksum"],
                row["raw_checksum"],
                row["pixels"],
                tuple(row["converted"]),
                note.recipe.pixels(row["bucket"]) == recipe.pixels(raw.bucket),
                note.recipe.text == recipe.text,
            )
        return found
