"""Labels of a raw corpus: descriptions that hold instead of those that its samples were built with.

They lie apart from the shards, in `labels/` of the corpus's folder, so that a new caption copies no clip: small shards
with a `key.labels.json` a sample, and for each unit of samples a note, written last, with the rows of the index as they
are with labels. The corpus's index names these members beside those of the sample's own shard, so that whoever reads
the sample by it has the labels: encoding, training on raw shards, verifying, the next stage. What a sample is keyed by
is its content: a label counts for the sample of that name with that checksum, whatever else of the corpus changes.

The index without labels is kept as `labels/built.parquet`. Building and indexing write the index anew without labels,
and `put_labels` puts them in again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.folder import BUILT_INDEX_NAME
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import (
    SCHEMA,
    Index,
    IndexMetadata,
    IndexRow,
    read_metadata,
    rows_table,
    with_place,
    write_index,
)
from domainshuttle.pipelines.sample import LABELS_MEMBER, SampleInfo
from domainshuttle.pipelines.shards.tar import LABELS_FOLDER, Member, labelled_checksum, member_digest
from domainshuttle.pipelines.storage.files import delete, exists, list_dated, open_parquet, read_bytes, writing
from domainshuttle.pipelines.storage.uri import Location, join, redacted

NOTE_SUFFIX = ".note.parquet"
_COLUMNS = ("members", "subjects", "domains", "caption_length", "scores", "checksum")
"""What labels change of a row."""
_KEY = b"domainshuttle.labels"
_NOTE_SCHEMA = pa.schema([*SCHEMA, ("built_checksum", pa.uint64()), ("trace", pa.string())])
_VERSION = 1
_AT_ONCE = 16


@dataclass(frozen=True)
class LabelNote:
    """Of a unit that is labelled: its samples' rows with labels, what happened to all of its samples (`counts`), and
    those that have no label or another's, as (key, reason)."""

    name: str
    settings: str
    table: pa.Table
    counts: Mapping[str, int]
    failed: Sequence[Mapping[str, str]]

    @property
    def shards(self) -> set[str]:
        """The shards of its labels."""
        names = (Member.of(one["name"], 0, 0) for row in self.table.column("members").to_pylist() for one in row)
        return {member.shard for member in names if member.shard}


def labelled_row(row: IndexRow, info: SampleInfo, member: Member) -> IndexRow:
    """A row of an index without labels as it is with this description, whose bytes lie at `member`."""
    data = info.to_json()
    return replace(
        row,
        members=(*row.members, member),
        subjects=tuple(subject.word for subject in info.subjects),
        domains=tuple(subject.domain for subject in info.subjects),
        caption_length=info.caption_length,
        scores=dict(info.scores),
        checksum=labelled_checksum(row.checksum, member_digest(LABELS_MEMBER, len(data), [data])),
    )


def built_index(folder: Location) -> Index:
    """The index of a raw corpus as it is without labels; it is kept from now on. Raises DataError, StorageError."""
    place, kept = join(folder, INDEX_NAME), join(folder, BUILT_INDEX_NAME)
    metadata = read_metadata(place)
    if metadata.stage != "raw":
        raise DataError(f"{redacted(place)}: an encoded corpus: labels are of raw ones. Give the folder of the raw one")
    if not metadata.labels:
        index = Index.load(place)
        write_index(kept, index.table.select(SCHEMA.names), metadata)
        return index
    if not exists(kept):
        raise DataError(
            f"{redacted(place)} has labels, and {BUILT_INDEX_NAME}, the index without them, is missing: copy it too, "
            "or make the index again (domainshuttle data build, or data index)"
        )
    return load_built(folder)


def load_built(folder: Location) -> Index:
    """The kept index without labels, unverified."""
    index = Index.load(join(folder, BUILT_INDEX_NAME), verify=False)
    metadata = index.parts[0]
    table = with_place(index.table.select(SCHEMA.names), metadata.corpus, str(folder))
    return Index(table, index.parts, index.digest)


def write_label_note(
    folder: Location,
    name: str,
    settings: str,
    made: Sequence[tuple[IndexRow, IndexRow, Mapping[str, Any]]],
    counts: Mapping[str, int],
    failed: Sequence[Mapping[str, str]],
) -> None:
    """Notes that a unit is labelled. `made`: the row without labels, the one with them, and what was noted of it."""
    table = rows_table([row for _, row, _ in made])
    table = table.append_column("built_checksum", pa.array([built.checksum for built, *_ in made], pa.uint64()))
    traces = [json.dumps(trace, ensure_ascii=False, sort_keys=True) for *_, trace in made]
    table = table.append_column("trace", pa.array(traces, pa.string()))
    said = {"version": _VERSION, "settings": settings, "counts": dict(counts), "failed": [*failed]}
    place = _note_place(folder, name)
    with writing(place) as file, pq.ParquetWriter(file, _NOTE_SCHEMA, compression="zstd") as writer:
        writer.write_table(table.cast(_NOTE_SCHEMA))
        writer.add_key_value_metadata({_KEY: json.dumps(said, sort_keys=True, ensure_ascii=False).encode()})


def read_label_notes(folder: Location, names: Iterable[str] | None = None) -> dict[str, LabelNote]:
    """The notes that are whole and whose shards are there, of these units or of all."""
    files = list_dated(join(folder, LABELS_FOLDER))
    held = {f"{LABELS_FOLDER}/{name}": size for name, size, _ in files if name.endswith(".tar")}
    there = {name.removesuffix(NOTE_SUFFIX) for name, *_ in files if name.endswith(NOTE_SUFFIX)}
    wanted = sorted(there if names is None else there.intersection(names))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(partial(_read_note, folder), wanted)
        return {note.name: note for note in found if note is not None and _there(note, held)}


def put_labels(folder: Location, built: Index, notes: Iterable[LabelNote], settings: str) -> tuple[IndexMetadata, int]:
    """Writes the corpus's index with the labels of these notes, which were made by `settings`; returns what it says of
    itself, and how many of its samples have one."""
    table = built.table.select(SCHEMA.names)
    labels = pa.concat_tables([note.table.select([*SCHEMA.names, "built_checksum"]) for note in notes] or [_none()])
    labels = labels.unify_dictionaries().combine_chunks()
    ids, checksums = table.column("sample_id").to_numpy(), table.column("checksum").to_numpy()
    of, before = labels.column("sample_id").to_numpy(), labels.column("built_checksum").to_numpy()
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], of), max(len(ids) - 1, 0))
    rows = order[place] if len(ids) else place
    fits = (ids[rows] == of) & (checksums[rows] == before) if len(ids) else np.zeros(len(of), bool)
    taken = np.arange(len(table))
    taken[rows[fits]] = len(table) + np.flatnonzero(fits)
    for name in _COLUMNS:
        both = pa.chunked_array([*table.column(name).chunks, *labels.column(name).chunks])
        number = table.column_names.index(name)
        table = table.set_column(number, SCHEMA.field(name), both.combine_chunks().take(pa.array(taken)))
    metadata = built.parts[0].model_copy(update={"labels": settings, "digest": ""})
    return write_index(join(folder, INDEX_NAME), table, metadata), int(fits.sum())


def remove_other_labels(folder: Location, keep: Mapping[str, LabelNote]) -> None:
    """Removes labels of units that are wanted no more: notes first, since shards without one count for nothing."""
    place = join(folder, LABELS_FOLDER)
    shards = {shard for note in keep.values() for shard in note.shards}
    names = [name for name, *_ in list_dated(place)]
    for name in names:
        if name.endswith(NOTE_SUFFIX) and name.removesuffix(NOTE_SUFFIX) not in keep:
            delete(join(place, name))
    for name in names:
        if name.endswith(".tar") and f"{LABELS_FOLDER}/{name}" not in shards:
            delete(join(place, name))


def lost_labels(folder: Location) -> bool:
    """Whether a raw corpus has labels that its index does not name, as after a kill while it was indexed again."""
    return exists(join(folder, REPORT_PLACE)) and not read_metadata(join(folder, INDEX_NAME)).labels


def read_label_report(folder: Location) -> dict[str, Any]:
    """The report of how a corpus was labelled. Raises DataError where it was not."""
    content: dict[str, Any] = json.loads(read_bytes(join(folder, REPORT_PLACE)))
    return content


REPORT_PLACE = f"{LABELS_FOLDER}/report.json"
FAILED_PLACE = f"{LABELS_FOLDER}/failed.jsonl"


def _none() -> pa.Table:
    return _NOTE_SCHEMA.empty_table().select([*SCHEMA.names, "built_checksum"])


def _note_place(folder: Location, name: str) -> Location:
    return join(folder, f"{LABELS_FOLDER}/{name}{NOTE_SUFFIX}")


def _read_note(folder: Location, name: str) -> LabelNote | None:
    try:
        file = open_parquet(_note_place(folder, name))
        said = json.loads(file.metadata.metadata[_KEY])
        if said["version"] != _VERSION:
            return None
        table = file.read().replace_schema_metadata(None)
        return LabelNote(name, said["settings"], table, said["counts"], said["failed"])
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, DataError):
        return None


def _there(note: LabelNote, held: Mapping[str, int]) -> bool:
    ends: dict[str, int] = {}
    for row in note.table.column("members").to_pylist():
        for one in row:
            if shard := Member.of(one["name"], 0, 0).shard:
                ends[shard] = max(ends.get(shard, 0), one["offset"] + one["size"])
    return all(held.get(shard, -1) >= end for shard, end in ends.items())
