"""An encoded corpus as it is to be: which of its units are there already, and what its index is made of."""

import ast
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from domainshuttle.model.file_mode import save_tensors
from domainshuttle.pipelines.encoding.actor import Task
from domainshuttle.pipelines.encoding.throughput import Throughput
from domainshuttle.pipelines.encoding.units import (
    NOTE_SUFFIX,
    SHARD_PATTERN,
    Former,
    Note,
    Recipe,
    Unit,
    cut_units,
    note_place,
    read_notes,
)
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.parts import CONVERTED_NAME, EMPTY_CAPTION_NAME, INDEX_NAME, WORK_NAME
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import SCHEMA, Index, IndexMetadata, write_index
from domainshuttle.pipelines.quarantine import (
    QUARANTINE_NAME,
    BadSample,
    require_good,
)
from domainshuttle.pipelines.storage.files import delete, exists, list_dated, read_bytes, write_bytes
from domainshuttle.pipelines.storage.uri import join, redacted


@dataclass(frozen=True)
class EncodingJob:
    """One corpus to encode, from its raw form into its encoded one, each on a disk or in a store."""

    raw: CorpusSpec
    encoded: CorpusSpec
    where: str | None = None
    """The filter (`RowFilter`) of the raw samples that are encoded; None: all."""


@dataclass(frozen=True)
class Encoded:
    """An encoded corpus that is whole. `bad` samples are in quarantine, `left_out` by the filter. Against the index
    before: `new` samples, `changed` ones (of which the former copy is gone), `removed` and `unchanged` ones. Of this
    run: of how many samples the latents were `encoded`, only the `captions`, or nothing (`copied` to another shard)."""

    metadata: IndexMetadata
    bad: int
    left_out: int = 0
    new: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    encoded: int = 0
    captions: int = 0
    copied: int = 0
    throughput: Throughput | None = None


class Target:
    """What a corpus is to be: its units, which of them are there, and what there is beside them."""

    def __init__(self, job: EncodingJob, recipe: Recipe, samples_per_part: int, shard_bytes: int) -> None:
        self.job, self.recipe, self.folder = job, recipe, job.encoded.folder
        whole = Index.load(job.raw.index)
        self.raw = whole.filter(job.where) if job.where else whole
        if not len(self.raw):
            raise DataError(
                f"corpus {job.raw.name!r}: {job.where!r} leaves none of its {counted(len(whole), 'sample')}"
            )
        self.left_out = len(whole) - len(self.raw)
        self._all_ids = whole.table.column("sample_id").to_numpy()
        self.units = cut_units(self.raw, recipe, samples_per_part, shard_bytes)
        wanted = {unit.name for unit in self.units}
        there = {
            name.removesuffix(NOTE_SUFFIX)
            for name, *_ in list_dated(join(self.folder, WORK_NAME))
            if name.endswith(NOTE_SUFFIX)
        }
        self._has_notes, held = bool(there), self._shards()
        self.notes = read_notes(self.folder, sorted(there & wanted), held)
        notes = [*read_notes(self.folder, sorted(there - wanted), held).values(), *self._former_format(whole, held)]
        self.former = Former(self.folder, notes)
        self.before = Index.load(self.index_place) if exists(self.index_place) else None

    @property
    def index_place(self) -> str:
        return join(self.folder, INDEX_NAME)

    def missing(self) -> list[Unit]:
        """The units that are still to be made."""
        return [unit for unit in self.units if unit.name not in self.notes]

    def _shards(self) -> dict[str, int]:
        return {name: size for name, size, _ in list_dated(self.folder) if name.endswith(".tar")}

    def _former_format(self, whole: Index, held: Mapping[str, int]) -> Iterator[Note]:
        """The parts of a corpus that was encoded until November 2026, where they were made of these raw samples; those
        that are damaged can be made again."""
        if (recipe := self._former_recipe(whole)) is None:
            return
        checksums = dict(zip(self._all_ids.tolist(), whole.table.column("checksum").to_pylist(), strict=True))
        for name, *_ in list_dated(join(self.folder, WORK_NAME)):
            if not (name.startswith("part-") and name.endswith(".parquet")) or name.endswith(NOTE_SUFFIX):
                continue
            try:
                table = Index.load(join(self.folder, f"{WORK_NAME}/{name}"), verify=False).table.select(SCHEMA.names)
            except DataError:
                continue
            if not set(table.column("shard").unique().to_pylist()) <= held.keys():
                continue
            converted: dict[str, list[str]] = {}
            if exists(listed := join(self.folder, f"{WORK_NAME}/{name.removesuffix('.parquet')}.converted")):
                for line in read_bytes(listed).splitlines():
                    converted.setdefault((one := json.loads(line))["key"], []).append(one["reason"])
            ids, keys = table.column("sample_id").to_pylist(), table.column("key").to_pylist()
            table = table.append_column("raw_checksum", pa.array([checksums.get(one, 0) for one in ids], pa.uint64()))
            table = table.append_column("pixels", pa.array([b""] * len(ids), pa.binary()))
            noted = pa.array([converted.get(key, []) for key in keys], pa.list_(pa.string()))
            yield Note(name, table.append_column("converted", noted), (), recipe, former=True)

    def _former_recipe(self, whole: Index) -> Recipe | None:
        place = join(self.folder, f"{WORK_NAME}/recipe.json")
        if not exists(place):
            return None
        try:
            raw_digest, _, made_by = str(json.loads(read_bytes(place))["recipe"]).partition(" ")
            return Recipe(dict(ast.literal_eval(made_by)), whole.parts[0].fps) if raw_digest == whole.digest else None
        except (ValueError, SyntaxError, TypeError, KeyError):
            return None

    def require_wanted(self) -> None:
        """Raises DataError where a whole corpus, or much of it, would be removed that nobody asked to remove."""
        if self.before is None:
            return
        metadata, now = self.before.parts[0], Recipe(self.recipe.encoders, self.recipe.fps)
        buckets = {*self.before.codes("bucket")[1], *self.raw.codes("bucket")[1]}
        changed = now.changes(Recipe(metadata.encoders, metadata.fps), sorted(buckets))
        if changed:
            raise DataError(
                f"{redacted(self.folder)} is a whole encoded corpus, made by other encoders ({'; '.join(changed)}). "
                f"{_OVERWRITE}; what the change leaves as it is, such as latents where only `text` differs, is copied"
            )
        ids = self.before.table.column("sample_id").to_numpy()
        if not self._has_notes and not self.former.notes:
            raise DataError(
                f"{redacted(self.folder)} is a whole encoded corpus without notes ({WORK_NAME}/) that say of which raw "
                "samples it was made, or was encoded by an earlier version of other raw samples than those that are "
                f"there now: what is still right can't be told. Copy {WORK_NAME}/ of its origin too, or index the raw "
                f"samples of then and encode once, which converts it. Else: {_OVERWRITE}"
            )
        gone = ids[~np.isin(ids, self.raw.table.column("sample_id").to_numpy())]
        filtered = int(np.isin(gone, self._all_ids).sum())
        if filtered:
            is_, it = ("is", "it") if filtered == 1 else ("are", "them")
            raise DataError(
                f"{redacted(self.folder)}: {counted(filtered, 'sample')} that {is_} encoded would be removed, as "
                f"--where {self.job.where!r} leaves {it} out. {_OVERWRITE}"
            )
        own = dict(
            zip(
                self.raw.table.column("sample_id").to_pylist(), self.raw.table.column("bucket").to_pylist(), strict=True
            )
        )
        other = sum(
            own.get(one, bucket) != bucket
            for one, bucket in zip(ids.tolist(), self.before.table.column("bucket").to_pylist(), strict=True)
        )
        if 2 * (len(gone) + other) > len(ids):
            raise DataError(
                f"{redacted(self.folder)}: of {counted(len(ids), 'encoded sample')} {len(gone)} are not in the raw "
                f"corpus any more, and {other} have another bucket. {_OVERWRITE}"
            )

    def remove_useless(self) -> None:
        """Removes a former corpus of which nothing can be used, before its successor takes as much room."""
        rules = {json.dumps(self.recipe.pixels(bucket)) for bucket in self.raw.codes("bucket")[1]}
        for note in self.former.notes:
            buckets = note.table.column("bucket").unique().to_pylist()
            if any(json.dumps(note.recipe.pixels(bucket)) in rules for bucket in buckets):
                return
        if self.before is not None and not self.notes:
            delete(self.index_place)
            self.former = Former(self.folder)
            self._remove_others(set())

    def tasks(self, job: int, shard_bytes: int) -> Iterator[Task]:
        """The work that is left."""
        for unit in self.missing():
            rows = self.raw.rows(unit.rows)
            yield Task(job, self.folder, unit.name, rows, self.former.of(rows, self.recipe), self.recipe, shard_bytes)

    def finish(self, empty_caption: Tensor, most_bad: float, work: Counter[str], speed: Throughput | None) -> Encoded:
        """Makes the index and the tables of the units' notes, and removes what is wanted no more."""
        made = [unit.name for unit in self.missing()]
        self.notes |= read_notes(self.folder, made, self._shards())
        if lost := [unit.name for unit in self.missing()]:
            for name in lost:
                delete(note_place(self.folder, name))
            raise DataError(f"{redacted(self.folder)}: {counted(len(lost), 'unit')} not whole; run the command again")
        notes = [self.notes[unit.name] for unit in self.units]
        table = pa.concat_tables([note.table.select(SCHEMA.names) for note in notes]).unify_dictionaries()
        bad = [one for note in notes for one in note.bad]
        self._write_lines(QUARANTINE_NAME, bad, keep=True)
        folder, listed = redacted(self.folder), redacted(join(self.folder, QUARANTINE_NAME))
        require_good(folder, [one.reason for one in bad], len(table), most_bad, listed, _REPAIR)
        self._write_lines(CONVERTED_NAME, [one for note in notes for one in note.converted()], keep=False)
        with tempfile.TemporaryDirectory() as aside:
            save_tensors({"text": empty_caption}, Path(aside) / EMPTY_CAPTION_NAME)
            write_bytes(join(self.folder, EMPTY_CAPTION_NAME), (Path(aside) / EMPTY_CAPTION_NAME).read_bytes())
        encoders = dict(self.recipe.encoders)
        metadata = IndexMetadata(corpus=self.job.encoded.name, stage="encoded", encoders=encoders, fps=self.recipe.fps)
        metadata = write_index(self.index_place, table.combine_chunks(), metadata)
        self._remove_others({shard for note in notes for shard in note.shards})
        return Encoded(
            metadata,
            len(bad),
            self.left_out,
            **self._compared(table),
            encoded=work["encoded"],
            captions=work["captions"],
            copied=work["copied"],
            throughput=speed,
        )

    def _write_lines(self, name: str, rows: Sequence[BadSample], keep: bool) -> None:
        place = join(self.folder, name)
        if rows or keep:
            write_bytes(place, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())
        else:
            delete(place)

    def _compared(self, table: pa.Table) -> dict[str, int]:
        """How many samples are new, changed, removed and unchanged against the index before."""
        names = ("sample_id", "checksum")
        now = dict(zip(*(table.column(name).to_pylist() for name in names), strict=True))
        then: dict[int, int] = {}
        if self.before is not None:
            then = dict(zip(*(self.before.table.column(name).to_pylist() for name in names), strict=True))
        both = now.keys() & then.keys()
        changed = sum(now[one] != then[one] for one in both)
        return {
            "new": len(now) - len(both),
            "changed": changed,
            "removed": len(then) - len(both),
            "unchanged": len(both) - changed,
        }

    def _remove_others(self, shards: set[str]) -> None:
        """Removes shards that no unit has, then their notes: a note whose shards are gone counts for nothing."""
        for name, *_ in list_dated(self.folder):
            plain = name.removeprefix(".").partition(".tar.")[0] + ".tar" if name.startswith(".") else name
            if SHARD_PATTERN.fullmatch(plain) and name not in shards:
                delete(join(self.folder, name))
        wanted = {f"{unit.name}{NOTE_SUFFIX}" for unit in self.units}
        for name, *_ in list_dated(join(self.folder, WORK_NAME)):
            ours = name.endswith(NOTE_SUFFIX) or name.startswith("part-") or name == "recipe.json"
            if ours and name not in wanted:
                delete(join(self.folder, f"{WORK_NAME}/{name}"))


_OVERWRITE = (
    "Encoding removes it: say so (domainshuttle data encode CONFIG --overwrite), or keep it and encode into another "
    "`data` folder"
)
_REPAIR = "Repair their raw samples, index the raw corpus again (domainshuttle data index), and encode again"
