"""The survey of a source: its records, written to the disk piece by piece, drawn from, and looked up by name.

A piece's survey is an Arrow file that appears whole or not at all, so a survey that was stopped goes on with the pieces
that are missing. Records are read from the mapped files: what a task holds in memory are the few that it asks for.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from domainshuttle.pipelines.corpora.source import (
    SAMPLES,
    UNKNOWN_FORM,
    LeftOut,
    Piece,
    Record,
    Source,
    draw,
    name_hash,
)
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.quarantine import fault_kind
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.files import write_bytes

EXAMPLES = 20
"""Records that a report names of each reason."""
_SAME_NAME = "same name"
_BATCH = 4096
_SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("payload", pa.string()), ("group", pa.string()),
        ("draw", pa.uint64()), ("id_hash", pa.uint64()), ("group_hash", pa.uint64()),
    ]
)  # fmt: skip
_FIRST_SEEN = 50
"""Records after which a piece of which most are of an unknown form is given up."""

Rows = NDArray[np.int64]
"""Rows of records, [n,2]: the piece's number and the place in it."""


@dataclass
class Tally:
    """What was left out: how many by reason, and the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, left: LeftOut) -> None:
        kind = fault_kind(left.reason)
        self.counts[kind] += 1
        if len(named := self.examples.setdefault(kind, [])) < EXAMPLES:
            example = f"{left.id}: {left.reason}" if left.reason != kind else left.id
            named.append(example.encode(errors="backslashreplace").decode())  # names of files may be no UTF-8

    def join(self, other: "Tally") -> None:
        self.counts.update(other.counts)
        for kind, named in other.examples.items():
            own = self.examples.setdefault(kind, [])
            own.extend(named[: EXAMPLES - len(own)])


@dataclass(frozen=True)
class Survey:
    """The survey of a source's pieces in a folder. Cheap to send to a task: it holds names alone."""

    folder: Path
    pieces: tuple[Piece, ...]

    def missing(self) -> list[int]:
        """The pieces that are not surveyed."""
        return [number for number in range(len(self.pieces)) if not self._tally(number).exists()]

    def take(self, number: int, source: Source) -> int:
        """Surveys one piece; returns how many records it has. Raises DataError where the piece can't be read, or most
        of its first records are of an unknown form."""
        tally, count = Tally(), 0
        with (
            atomic_file(self._records(number)) as aside,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as writer,
        ):
            for batch in _batches(source.survey(self.pieces[number]), tally, source.keeps_uncaptioned):
                rows = _rows(batch, source.seed, tally)
                writer.write_batch(rows)
                count += len(rows)
                _check_form(self.pieces[number], tally, count)
        _check_form(self.pieces[number], tally, count)
        content = {"records": count, "counts": tally.counts, "examples": tally.examples}
        write_bytes(self._tally(number), json.dumps(content).encode())
        return count

    def tally(self, role: str = SAMPLES) -> Tally:
        """What was left out of the pieces of a role."""
        whole = Tally()
        for number in self.numbers(role):
            content = json.loads(self._tally(number).read_text())
            whole.join(Tally(Counter(content["counts"]), content["examples"]))
        return whole

    def numbers(self, role: str) -> list[int]:
        """The pieces of a role."""
        return [number for number, piece in enumerate(self.pieces) if piece.role == role]

    def select(self, wanted: int | None) -> tuple[Rows, int, Tally]:
        """The rows of the records that are drawn, in their order; how many there are to draw from; and those that had
        the name of an earlier one."""
        numbers = self.numbers(SAMPLES)
        columns = [self._table(number).column("draw").to_numpy() for number in numbers]
        sizes = [len(column) for column in columns]
        draws = np.concatenate(columns) if columns else np.empty(0, np.uint64)
        places = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.empty(0, np.int64)
        rows = np.stack([np.repeat(np.array(numbers, np.int64), sizes), places], 1)
        _, first = np.unique(draws, return_index=True)
        kept = np.sort(first[:wanted])  # by draw, of which one has the first place
        again = np.delete(np.arange(len(draws)), first)
        named = [record.id for record in self.records(rows[again[:EXAMPLES]])]
        repeated = Tally(Counter({_SAME_NAME: len(again)}), {_SAME_NAME: named}) if named else Tally()
        return rows[kept].astype(np.int64), len(first), repeated

    def records(self, rows: Rows) -> Iterator[Record]:
        """The records of rows."""
        for number, place in rows.tolist():
            yield self._record(self._table(number), place)

    def write_tables(self) -> None:
        """Writes, for each role, where each name is found; afterwards `find` and `group` may be asked."""
        for role in {piece.role for piece in self.pieces}:
            numbers = self.numbers(role)
            tables = [self._table(number) for number in numbers]
            places = [
                (np.int64(n) << 40) + np.arange(len(t), dtype=np.int64) for n, t in zip(numbers, tables, strict=True)
            ]
            every = np.concatenate(places) if places else np.empty(0, np.int64)
            for column in ("id_hash", "group_hash"):
                hashes = np.concatenate([t.column(column).to_numpy() for t in tables] or [np.empty(0, np.uint64)])
                order = np.argsort(hashes, kind="stable")
                with atomic_file(self._names(role, column)) as aside, aside.open("wb") as file:
                    np.save(file, np.stack([hashes[order], every[order].view(np.uint64)]))

    def find(self, role: str, name: str) -> Record | None:
        """See `source.Tables`."""
        return next((record for record in self._named(role, "id_hash", name) if record.id == name), None)

    def group(self, role: str, name: str) -> list[Record]:
        """See `source.Tables`."""
        return [record for record in self._named(role, "group_hash", name) if record.group == name]

    def _named(self, role: str, column: str, name: str) -> Iterator[Record]:
        path = self._names(role, column)
        if not path.exists():
            return
        hashes, places = self._open_names.setdefault(path, np.load(path, mmap_mode="r"))
        wanted = np.uint64(name_hash(name))
        first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
        for place in places[first:last].tolist():
            yield self._record(self._table(place >> 40), place & ((1 << 40) - 1))

    def _record(self, table: pa.Table, place: int) -> Record:
        row = table.slice(place, 1).to_pylist()[0]
        return Record(row["id"], json.loads(row["payload"]), row["group"])

    def _table(self, number: int) -> pa.Table:
        if number not in self._open_tables:
            self._open_tables[number] = pa.ipc.open_file(pa.memory_map(str(self._records(number)))).read_all()
        return self._open_tables[number]

    @cached_property
    def _open_tables(self) -> dict[int, pa.Table]:
        return {}

    @cached_property
    def _open_names(self) -> dict[Path, Any]:
        return {}

    def __reduce__(self) -> tuple[type["Survey"], tuple[Path, tuple[Piece, ...]]]:
        return type(self), (self.folder, self.pieces)

    def _records(self, number: int) -> Path:
        return self.folder / f"piece-{number:06d}.arrow"

    def _tally(self, number: int) -> Path:
        return self.folder / f"piece-{number:06d}.json"

    def _names(self, role: str, column: str) -> Path:
        return self.folder / f"{role}-{column}.npy"


def open_survey(work: Path, source: Source, recipe: str) -> Survey:
    """The survey of a source as it is now, in a folder of its own; what is left of surveys of other states is removed.

    `recipe` is all that it depends on beside the source's files.
    """
    pieces = tuple(source.pieces())
    state = json.dumps([recipe, [(piece.name, piece.stamp, piece.role) for piece in pieces]])
    folder = work / f"survey-{hashlib.blake2b(state.encode(), digest_size=8).hexdigest()}"
    for stale in work.glob("survey-*"):
        if stale != folder:
            shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    return Survey(folder, pieces)


def check_forms(tally: Tally, records: int, most_bad: float) -> None:
    """Raises DataError where more than `most_bad` of a source's records are of an unknown form, naming the first."""
    unknown = tally.counts[UNKNOWN_FORM]
    if unknown > most_bad * (records + tally.counts.total()):
        raise DataError(
            f"{unknown} of {counted(records + tally.counts.total(), 'record')} {'is' if unknown == 1 else 'are'} in no "
            f"known form of this source, for example: "
            f"{tally.examples[UNKNOWN_FORM][0]}. Compare the files with docs/datasets.md"
        )


def _check_form(piece: Piece, tally: Tally, good: int) -> None:
    unknown = tally.counts[UNKNOWN_FORM]
    if unknown >= _FIRST_SEEN and unknown > good:
        raise DataError(
            f"{piece.name}: most records are in no known form of this source, for example: "
            f"{tally.examples[UNKNOWN_FORM][0]}. Compare the files with docs/datasets.md"
        )


def _batches(found: Iterator[Record | LeftOut], tally: Tally, keeps_uncaptioned: bool) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for seen, one in enumerate(found, 1):
        if isinstance(one, Record) and one.uncaptioned and not keeps_uncaptioned:
            one = LeftOut(one.id, one.uncaptioned)
        if isinstance(one, LeftOut):
            tally.add(one)
        else:
            batch.append(one)
        if seen % _BATCH == 0 or seen == 2 * _FIRST_SEEN:
            yield batch
            batch = []
    yield batch


def _rows(records: Sequence[Record], seed: int, tally: Tally) -> pa.RecordBatch:
    """The records as rows; those with names that are no UTF-8, as files' may be, are left out."""
    try:
        return _as_arrow(records, seed)
    except UnicodeEncodeError:
        held = []
        for record in records:
            try:
                _as_arrow([record], seed)
            except UnicodeEncodeError:
                tally.add(LeftOut(record.id, "unsafe name: the name of a file or folder is not UTF-8: rename it"))
            else:
                held.append(record)
        return _as_arrow(held, seed)


def _as_arrow(records: Sequence[Record], seed: int) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        "id": [record.id for record in records],
        "payload": [json.dumps(record.payload, ensure_ascii=False) for record in records],
        "group": [record.group for record in records],
        "draw": [draw(seed, record.id) for record in records],
        "id_hash": [name_hash(record.id) for record in records],
        "group_hash": [name_hash(record.group) for record in records],
    }
    return pa.RecordBatch.from_pydict(columns, _SCHEMA)
