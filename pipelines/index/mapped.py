"""The mapped index: the rows of each corpus in an uncompressed Arrow file, which all processes of a node map.

Loaded, ten million rows are gigabytes in each rank. Mapped, they are pages of files that the kernel shares, and a rank
touches those of its samples. The first process of a node that needs a corpus makes its file in a cache folder of its
user, from the Parquet file, while the others wait; a file that is not exactly the one that was made is made again.
"""

import contextlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.digest import combined_digest
from domainshuttle.pipelines.index.selection import selected_digest, selected_rows
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import (
    FORMAT_VERSION,
    SCHEMA,
    Index,
    IndexMetadata,
    check_unique,
    read_metadata,
    reading_index,
    upgraded,
    with_place,
)
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.files import open_parquet
from domainshuttle.pipelines.storage.locks import locked
from domainshuttle.pipelines.storage.private_folder import private_folder
from domainshuttle.pipelines.storage.uri import Location, absolute, parent

ROWS_PER_BATCH = 1 << 19
"""Rows of a record batch: what the process that makes a file holds at once."""
LAYOUT_VERSION = 2
UNUSED_SECONDS = 21 * 24 * 3600
"""A file that no process has opened for so long is removed."""
_LOCK_SECONDS = 3600.0

_NAMED = tuple(field.name for field in SCHEMA if pa.types.is_dictionary(field.type))


def mapped_index(shares: Sequence[CorpusShare], folder: Path | None = None) -> Index:
    """What `Index.concat` of these corpora's index files would be, unverified, of the rows that their filters leave,
    mapped from files that the node's processes share; `folder` holds such files.

    Raises DataError as `Index.load`, `Index.concat` and `selected_rows` do, StorageError where a store or the node's
    disk fails.
    """
    places = [absolute(share.index) for share in shares]
    parts = [read_metadata(place) for place in places]
    # of no rows: refuses corpora that do not fit together, and knows the joint digest
    empty = SCHEMA.empty_table().select(["bucket"])
    joint = Index.concat(
        [Index(empty, (part,), selected_digest(part, one.where)) for part, one in zip(parts, shares, strict=True)]
    )
    folder = cache_folder() if folder is None else folder
    with _explaining(folder), locked(folder / "lock", _LOCK_SECONDS) as held:
        if not held:
            raise StorageError(f"another process has held {folder / 'lock'} for an hour: end it, or set TMPDIR")
        tables = [
            with_place(_corpus(folder, place, part, one.where), part.corpus, str(parent(place)))
            for place, part, one in zip(places, parts, shares, strict=True)
        ]
        table = pa.concat_tables(tables)
        if len(parts) > 1:  # once a node, as sorting millions of ids takes a rank more memory than all else here
            checked = folder / f"{combined_digest('unique', joint.digest)}.json"
            if not checked.exists():
                check_unique(table.column("sample_id").to_numpy(), f"corpora {[part.corpus for part in parts]}")
            checked.touch()
    return Index(table, joint.parts, joint.digest)


def _corpus(folder: Path, place: Location, part: IndexMetadata, where: str | None) -> pa.Table:
    """The rows of an index file that a filter leaves, mapped from their file, which is made where it is not there."""
    name = combined_digest(f"{LAYOUT_VERSION}.{FORMAT_VERSION}", part.corpus, selected_digest(part, where))
    path = folder / f"{name}.arrow"
    note = path.with_suffix(".json")
    table = _mapped(path, note)
    if table is None:
        _remove_unused(folder)
        _make(path, place, part, where)
        with atomic_file(note) as aside:
            aside.write_text(json.dumps(_state(path)))
        table = _mapped(path, note)
    if table is None:
        raise StorageError(f"{path} was changed as soon as it was made: nobody else may write to {folder}")
    os.utime(note)  # by which it is known when the file was last used
    return table


def cache_folder() -> Path:
    """The folder of this user's mapped files on the node. Raises StorageError where it can't be made or trusted."""
    with _explaining(Path(tempfile.gettempdir())):
        return private_folder()


@contextlib.contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    try:
        yield
    except (DataError, StorageError):
        raise
    except OSError as error:
        raise StorageError(
            f"the index can't be mapped from {folder} ({error}): each node needs some 300 bytes a sample there; make "
            "room, or set TMPDIR to another folder"
        ) from error


def _state(path: Path) -> dict[str, int]:
    """What changes whenever a file is written to, cut or replaced; of the change time nobody can say otherwise."""
    status = path.stat()
    return {"inode": status.st_ino, "size": status.st_size, "changed_ns": status.st_ctime_ns}


def _mapped(path: Path, note: Path) -> pa.Table | None:
    """The file's rows, mapped; None where it is not there, or not the one that was made, unchanged and readable."""
    try:
        if json.loads(note.read_text()) != _state(path):
            return None
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # else the kernel reads megabytes around each page, which no sample of the plan's random order asks for
        pages.madvise(mmap.MADV_RANDOM)
        table = pa.ipc.open_file(pa.py_buffer(pages)).read_all()
        table.validate()
    except (OSError, ValueError, pa.ArrowException):
        return None
    return table if table.schema == SCHEMA else None


def _make(path: Path, place: Location, part: IndexMetadata, where: str | None) -> None:
    """Writes the file, whole or not at all."""
    names = _names(place)
    with atomic_file(path) as aside:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for table in _tables(place, where):
                writer.write_batch(_batch(table, names))
        if read_metadata(place) != part:  # whose digest names the file
            raise DataError("an index was written anew while it was read: run the same command again")


def _names(place: Location) -> dict[str, pa.Array]:
    """The names of each dictionary column over the whole index: an Arrow file has one dictionary a column."""
    table = Index.load(place, _NAMED, verify=False).table
    return {name: pc.unique(table.column(name)).cast(pa.string()) for name in _NAMED}


def _tables(place: Location, where: str | None) -> Iterator[pa.Table]:
    """The rows of an index file that a filter leaves, at most ROWS_PER_BATCH at a time."""
    mask, done = (selected_rows(place, where) if where else None), 0
    with reading_index(place):
        file = open_parquet(place)
    groups: list[int] = []
    for group in range(file.num_row_groups):
        groups.append(group)
        rows = sum(file.metadata.row_group(one).num_rows for one in groups)
        if rows >= ROWS_PER_BATCH or group == file.num_row_groups - 1:
            with reading_index(place):
                table = upgraded(file.read_row_groups(groups, columns=SCHEMA.names), SCHEMA.names, rows)
            if mask is not None:
                table = table.filter(mask[done : done + rows])
            yield from (table.slice(start, ROWS_PER_BATCH) for start in range(0, len(table), ROWS_PER_BATCH))
            groups, done = [], done + rows


def _batch(table: pa.Table, names: dict[str, pa.Array]) -> pa.RecordBatch:
    """A record batch of the rows, with these names as dictionaries."""
    columns = []
    for field in SCHEMA:
        column = table.column(field.name)
        if field.name in names:
            codes = pc.index_in(column.cast(pa.string()), names[field.name]).combine_chunks()
            columns.append(pa.DictionaryArray.from_arrays(codes, names[field.name]))
        else:
            columns.append(column.combine_chunks())
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _remove_unused(folder: Path) -> None:
    """Removes what killed processes left, and files that no process has opened for UNUSED_SECONDS; those that map one
    keep it."""
    for left in folder.glob(".*.partial"):  # under the lock nobody is writing
        left.unlink(missing_ok=True)
    for note in folder.glob("*.json"):
        with contextlib.suppress(OSError):
            if time.time() - note.stat().st_mtime >= UNUSED_SECONDS:
                note.with_suffix(".arrow").unlink(missing_ok=True)
                note.unlink()
