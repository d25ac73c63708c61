"""The mapped index: the joint index of a feed in one uncompressed Arrow file, which all processes of a node map.

Loaded, ten million rows are gigabytes in each rank. Mapped, they are pages of one file that the kernel shares, and a
rank touches those of its samples. The first process of a node makes the file in a cache folder of its user, from the
Parquet files, while the others wait; a file that is not exactly the one that was made is made again.
"""

import contextlib
import fcntl
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.digest import combined_digest
from domainshuttle.pipelines.index.selection import selected_digest, selected_rows
from domainshuttle.pipelines.index.table import (
    FORMAT_VERSION,
    PLACES,
    SCHEMA,
    Index,
    IndexMetadata,
    check_unique,
    read_metadata,
    reading_index,
    upgraded,
)
from domainshuttle.pipelines.storage.files import open_parquet, writing
from domainshuttle.pipelines.storage.uri import Location, absolute, parent

ROWS_PER_BATCH = 1 << 19
"""Rows of a record batch: what the process that makes the file holds at once."""
LAYOUT_VERSION = 1
UNUSED_SECONDS = 21 * 24 * 3600
"""A file that no process has opened for so long is removed."""

_NAMED = tuple(field.name for field in SCHEMA if pa.types.is_dictionary(field.type))
_SCHEMA = pa.schema([*SCHEMA, *(pa.field(name, pa.dictionary(pa.int32(), pa.string())) for name in PLACES)])


class MappedIndex(Index):
    """An index whose table is a mapped file of several record batches."""

    def _taken(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        # batch by batch: a table's `take` first makes one chunk of each nested column, which would read all of them
        batches, starts = self._batches
        batch = np.searchsorted(starts, numbers, side="right") - 1
        order = np.argsort(batch, kind="stable")
        found: list[dict[str, Any]] = [{}] * len(numbers)
        for places in np.split(order, np.flatnonzero(np.diff(batch[order])) + 1):
            if len(places):
                of = batch[places[0]]
                rows = batches[of].take(pa.array(numbers[places] - starts[of])).to_pylist()
                for place, row in zip(places.tolist(), rows, strict=True):
                    found[place] = row
        return found

    @cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """The record batches, and the number of each one's first row."""
        batches = self.table.to_batches()
        return batches, np.cumsum([0, *(len(batch) for batch in batches)])[:-1]


def mapped_index(places: Sequence[Location], folder: Path | None = None, where: Sequence[str | None] = ()) -> Index:
    """What `Index.concat` of these index files would be, unverified, with its rows mapped from a file that the node's
    processes share; `folder` holds such files. `where` has the filter of each file's rows (None: all), or nothing.

    Raises DataError as `Index.load`, `Index.concat` and `selected_rows` do, StorageError where a store or the node's
    disk fails.
    """
    places = [absolute(place) for place in places]
    parts = [read_metadata(place) for place in places]
    filters = [*where] or [None] * len(places)
    # of no rows: refuses corpora that do not fit together, and knows the joint digest
    empty = SCHEMA.empty_table().select(["bucket"])
    joint = Index.concat(
        [Index(empty, (part,), selected_digest(part, one)) for part, one in zip(parts, filters, strict=True)]
    )
    versions = f"{LAYOUT_VERSION}.{FORMAT_VERSION}"
    name = combined_digest(versions, *map(str, places), joint.digest)
    folder = cache_folder() if folder is None else folder
    with _explaining(folder), _locked(folder / f"{name}.lock") as lock:
        path = folder / f"{name}.arrow"
        table = _mapped(path, lock)
        if table is None:
            _remove_unused(folder)
            rows = _make(path, places, parts, filters)
            _note(lock, _state(path) | {"rows": rows})
            table = _mapped(path, lock)
        os.utime(lock)  # by which it is known when the file was last used
    if table is None:
        raise StorageError(f"{path} was changed as soon as it was made: nobody else may write to {folder}")
    return MappedIndex(table, joint.parts, joint.digest)


def cache_folder() -> Path:
    """The folder of this user's mapped files in the node's temporary folder, which nobody else can write to.

    Raises StorageError where it is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"domainshuttle-{os.getuid()}"
    with _explaining(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StorageError(
            f"{folder} is not a folder of this user alone (mode 0700), so what is in it can't be trusted: remove it, "
            "or set TMPDIR to another folder"
        )
    return folder


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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Holds a lock, among the node's processes and threads, until the block ends; gives the lock file's descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):  # whoever had it before removed it
                continue
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _state(path: Path) -> dict[str, int]:
    """What changes whenever a file is written to, cut or replaced; of the change time nobody can say otherwise."""
    status = path.stat()
    return {"inode": status.st_ino, "size": status.st_size, "changed_ns": status.st_ctime_ns}


def _note(lock: int, made: dict[str, int]) -> None:
    """Notes in the lock file which file was made."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(made).encode(), 0)


def _mapped(path: Path, lock: int) -> pa.Table | None:
    """The file's rows, mapped; None where it is not there, or not the one that was made, unchanged and readable."""
    try:
        noted = json.loads(os.pread(lock, 1000, 0))
        if noted != _state(path) | {"rows": noted["rows"]}:
            return None
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # else the kernel reads megabytes around each page, which no sample of the plan's random order asks for
        pages.madvise(mmap.MADV_RANDOM)
        table = pa.ipc.open_file(pa.py_buffer(pages)).read_all()
        table.validate()
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        return None
    return table if table.schema == _SCHEMA and len(table) == noted["rows"] else None


def _make(path: Path, places: Sequence[Location], parts: Sequence[IndexMetadata], filters: Sequence[str | None]) -> int:
    """Writes the file, whole or not at all; returns how many rows it has."""
    for left in path.parent.glob(f".{path.name}.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    names = _names(places)
    ids: list[np.ndarray] = []
    with writing(path) as aside:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for place, part, where in zip(places, parts, filters, strict=True):
                for table in _tables(place, where):
                    batch = _batch(table, part.corpus, str(parent(place)), names)
                    ids.append(batch.column("sample_id").to_numpy().copy())
                    writer.write_batch(batch)
        if len(parts) > 1:
            check_unique(np.concatenate(ids), f"corpora {[part.corpus for part in parts]}")
        if [read_metadata(place) for place in places] != [*parts]:  # whose digests name the file
            raise DataError("an index was written anew while it was read: run the same command again")
    return sum(map(len, ids))


def _names(places: Sequence[Location]) -> dict[str, pa.Array]:
    """The names of each dictionary column over all files: an Arrow file has one dictionary a column."""
    found: dict[str, dict[str, None]] = {name: {} for name in _SCHEMA.names if name in (*_NAMED, *PLACES)}
    for place in places:
        table = Index.load(place, _NAMED, verify=False).table
        for name, known in found.items():
            known.update(dict.fromkeys(pc.unique(table.column(name)).to_pylist()))
    return {name: pa.array(list(known), pa.string()) for name, known in found.items()}


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


def _batch(table: pa.Table, corpus: str, folder: str, names: dict[str, pa.Array]) -> pa.RecordBatch:
    """A record batch of the rows, with the columns of PLACES, and with these names as dictionaries."""
    columns = []
    for field in SCHEMA:
        column = table.column(field.name)
        if field.name in names:
            column = pa.chunked_array(
                [
                    pa.DictionaryArray.from_arrays(
                        pc.index_in(chunk.dictionary, names[field.name]).take(chunk.indices), names[field.name]
                    )
                    for chunk in column.chunks
                ]
            )
        columns.append(column.combine_chunks())
    for name, value in zip(PLACES, (corpus, folder), strict=True):
        code = pc.index_in(pa.scalar(value), names[name]).as_py()
        columns.append(pa.DictionaryArray.from_arrays(np.full(len(table), code, np.int32), names[name]))
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _remove_unused(folder: Path) -> None:
    """Removes files that no process has opened for UNUSED_SECONDS; those that map one keep it."""
    for lock in folder.glob("*.lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime < UNUSED_SECONDS:
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for old in [*folder.glob(f".{lock.stem}.*.partial"), lock.with_suffix(".arrow"), lock]:
                    old.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
