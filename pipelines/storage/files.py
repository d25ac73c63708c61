"""Storage: reading and writing at places, which are local paths or URIs of stores such as S3.

Reads of a store are coalesced, retried while the failure is one that passes, and bounded in time; no lock is held
during a request. Two kinds of failure are kept apart: a store that is down or refuses is a `StorageError`, which ends
the work and blames no sample, and an object that is missing or too short is a `DataError`, as it is on a disk.

pyarrow and not s3fs: it is installed anyway, makes one request of one range, reads without Python's lock or an event
loop (5.5 MB from loopback: 6 ms of CPU against 12), and says in its errors what failed.
"""

import contextlib
import io
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from domainshuttle.pipelines.errors import DataError, MissingError
from domainshuttle.pipelines.sample import Buffer
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.filesystems import opened
from domainshuttle.pipelines.storage.retry import Limits, Word, explained, is_missing, is_unclear, retried
from domainshuttle.pipelines.storage.uri import (
    Location,
    is_remote,
    local_path,
    redacted,
)

LIMITS = Limits()
GAP = 1 << 20
"""Bytes between two ranges that are read along rather than asked for apart."""
MOST = 64 << 20
"""Bytes of one request: what a failure makes one read again."""
_MOST_OPEN = 1024
_PIECE = 8 << 20


def read_bytes(place: Location) -> bytes:
    """The whole content of a place. Raises MissingError (a DataError) where there is none, StorageError."""
    if not is_remote(place):
        try:
            return local_path(place).read_bytes()
        except FileNotFoundError as error:
            raise _missing(place) from error
    return _read(place, 0, _look(str(place)))


def _missing(place: Location) -> MissingError:
    return MissingError(f"{redacted(place)} is missing: copy it again, or correct its place")


def read_ranges(place: Location, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """The bytes of (offset, size) ranges, in their order, as read-only views. Thread-safe.

    Raises MissingError (a DataError) where there is no such object, DataError where it is too short, StorageError.
    """
    found: list[memoryview] = [memoryview(b"")] * len(ranges)
    for request in coalesce(ranges, GAP, MOST):
        data = memoryview(_read(place, request.offset, request.size))
        for number in request.ranges:
            start = ranges[number][0] - request.offset
            found[number] = data[start : start + ranges[number][1]]
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes that are asked for at once, and the numbers of the ranges that lie in them."""

    offset: int
    size: int
    ranges: tuple[int, ...]


def coalesce(ranges: Sequence[tuple[int, int]], gap: int, most: int) -> list[Request]:
    """Requests, by offset, that hold all (offset, size) ranges: neighbours at most `gap` bytes apart share one of at
    most `most` bytes. Only a range that is larger by itself makes a larger one."""
    requests: list[Request] = []
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        offset, size = ranges[number]
        if offset < 0 or size < 0:
            raise DataError(f"range of {size} bytes at byte {offset}: expected none below 0; index the shards again")
        last = requests[-1] if requests else None
        if last is not None and offset <= last.offset + last.size + gap:
            reach = max(last.size, offset + size - last.offset)
            if reach <= max(most, last.size):
                requests[-1] = Request(last.offset, reach, (*last.ranges, number))
                continue
        requests.append(Request(offset, size, (number,)))
    return requests


def _read(place: Location, offset: int, size: int) -> bytes:
    if not is_remote(place):
        return _read_local(local_path(place), offset, size)
    end = offset + size
    pieces = [_fetch(str(place), start, min(MOST, end - start)) for start in range(offset, end, MOST)]
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_local(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
            held = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise _missing(path) from error
    _check_within(str(path), offset, size, held)
    return data


def _check_within(place: str, offset: int, size: int, held: int) -> None:
    if offset + size > held:
        raise DataError(
            f"{place}: {size} bytes at byte {offset} are not within its {held}: it was cut short or replaced; copy it "
            "again"
        )


def _fetch(place: str, offset: int, size: int) -> bytes:
    """One request, and what it takes to have it answered in full."""

    def request() -> bytes:
        file = _open_files.open(place)
        _check_within(redacted(place), offset, size, file.size())
        try:
            data: bytes = file.read_at(size, offset)
        except OSError as error:
            if is_missing(error) or is_unclear(error):
                _open_files.forget(place)
            raise
        if len(data) < size:
            _open_files.forget(place)
            raise ConnectionError(f"{len(data)} of {size} bytes came")
        return data

    return retried(redacted(place), f"reading {size} bytes at byte {offset}", request, LIMITS, size)


def _look(place: str) -> int:
    """The size of an object, asked for anew, as it may have been written anew."""
    _open_files.forget(place)
    return int(retried(redacted(place), "opening it", lambda: _open_files.open(place).size(), LIMITS))


class _OpenFiles:
    """Objects whose size is known, so that a read is one request: the least recently used are forgotten."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, place: str) -> pa.NativeFile:
        with self._lock:
            if (file := self._files.get(place)) is not None:
                self._files.move_to_end(place)
                return file
        # outside the lock, for it asks the store: two threads may ask for the same object once
        filesystem, path = opened(place, LIMITS)
        file = filesystem.open_input_file(path)
        with self._lock:
            self._files[place] = file
            while len(self._files) > self.most:
                self._files.popitem(last=False)
        return file

    def forget(self, place: str) -> None:
        with self._lock:
            self._files.pop(place, None)


_open_files = _OpenFiles(_MOST_OPEN)


def open_file(place: Location, buffer: int = 0) -> BinaryIO:
    """A place as a file for reading; of a store, `buffer` bytes are asked for at once (0: what each read asks for).

    Raises MissingError (a DataError) where there is none, StorageError; the same while reading.
    """
    if not is_remote(place):
        try:
            return local_path(place).open("rb")
        except FileNotFoundError as error:
            raise _missing(place) from error
    file = _StoredFile(str(place), _look(str(place)))
    return io.BufferedReader(file, buffer) if buffer else file  # type: ignore[return-value]


class _StoredFile(io.RawIOBase):
    """A file of a store whose reads are `read_ranges`."""

    def __init__(self, place: str, size: int) -> None:
        self.place, self.size, self.position = place, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(start + offset, 0)
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        count = left if size is None or size < 0 else min(size, left)
        if not count:
            return b""
        data = _read(self.place, self.position, count)
        self.position += count
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_parquet(place: Location) -> pq.ParquetFile:
    """A Parquet file whose pages are checked: mapped, or of a store, where the columns that are read come in few large
    requests. Raises MissingError (a DataError), StorageError, and what pyarrow raises of a file that is none."""
    remote = is_remote(place)
    source = open_file(place) if remote else local_path(place)
    try:
        return pq.ParquetFile(source, memory_map=True, pre_buffer=remote, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise _missing(place) from error


def _ask(place: Location, doing: str) -> list[fs.FileInfo]:
    def request() -> list[fs.FileInfo]:
        filesystem, path = opened(place, LIMITS)
        return filesystem.get_file_info([path])

    return retried(redacted(place), doing, request, LIMITS)


def exists(place: Location) -> bool:
    """Whether there is a file or a folder. Raises StorageError."""
    if not is_remote(place):
        return local_path(place).exists()
    return _ask(place, "looking for it")[0].type != fs.FileType.NotFound


def size(place: Location) -> int:
    """Bytes of a file. Raises MissingError (a DataError) where there is none, StorageError."""
    if is_remote(place):
        (info,) = _ask(place, "asking for its size")
        if info.type == fs.FileType.File:
            return int(info.size)
    elif (path := local_path(place)).is_file():
        return path.stat().st_size
    raise _missing(place)


def list_files(place: Location) -> list[tuple[str, int]]:
    """The files under a folder, at any depth, as (name relative to it, bytes), by name; none where it is missing."""
    return [(name, size) for name, size, _ in list_dated(place, recursive=True)]


def list_dated(place: Location, recursive: bool = False) -> list[tuple[str, int, int]]:
    """The files in a folder, as (name relative to it, bytes, time of change in ns), by name; none where it misses."""
    if not is_remote(place):
        base = local_path(place)
        files = [(str(f.relative_to(base)), f.stat()) for f in base.glob("**/*" if recursive else "*") if f.is_file()]
        return sorted((name, status.st_size, status.st_mtime_ns) for name, status in files)

    def request() -> list[tuple[str, int, int]]:
        filesystem, path = opened(place, LIMITS)
        infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        return [(i.path[len(path) + 1 :], i.size, i.mtime_ns or 0) for i in infos if i.type == fs.FileType.File]

    return sorted(retried(redacted(place), "listing", request, LIMITS))


def write_bytes(place: Location, data: Buffer) -> None:
    """Write a place, whole or not at all, also through a power cut. Raises StorageError, for a disk OSError."""
    if not is_remote(place):
        with writing(place) as aside:
            aside.write_bytes(data)
        return

    def request() -> None:
        filesystem, path = opened(place, LIMITS)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    retried(redacted(place), f"writing {len(data)} bytes", request, LIMITS, len(data))
    _open_files.forget(str(place))


def write_file(source: Path, place: Location) -> None:
    """Copy a local file of any size to a place, in pieces; it appears when it is whole.

    In a store, pyarrow asks again for each piece rather than we for the file. Raises StorageError; where reading
    `source` fails, its OSError, and nothing is left at the place.
    """
    with source.open("rb") as file:
        if not is_remote(place):
            with writing(place) as aside, aside.open("wb") as copy:
                shutil.copyfileobj(file, copy, _PIECE)
            return
        began = time.monotonic()
        unread: OSError | None = None
        most = LIMITS.attempts * (LIMITS.connect_seconds + LIMITS.stall_seconds)
        word = Word(redacted(place), f"uploading {source}", most, source.stat().st_size, LIMITS)
        try:
            with word.told():
                filesystem, path = opened(place, LIMITS, LIMITS.attempts)
                with filesystem.open_output_stream(path) as stream:
                    while True:
                        try:
                            piece = file.read(_PIECE)
                        except OSError as error:
                            unread = error
                            break
                        if not piece:
                            break
                        stream.write(piece)
        except OSError as error:
            spent = time.monotonic() - began
            raise explained(redacted(place), f"uploading {source}", error, LIMITS.attempts, spent) from None
    _open_files.forget(str(place))
    if unread is not None:  # a stream that was begun can only be ended, which makes an object of what it has
        delete(place)
        raise unread


@contextlib.contextmanager
def writing(place: Location) -> Iterator[Path]:
    """A local file to write, which is at the place, whole and synced, when the block ends; nothing is where it raises.

    Raises StorageError, for a disk OSError.
    """
    if is_remote(place):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "file"
            write_file(Path(folder) / "file", place)
        return
    with atomic_file(local_path(place)) as aside:
        yield aside


def delete(place: Location) -> None:
    """Remove a file; that it is gone already is no error. Raises StorageError."""
    if not is_remote(place):
        local_path(place).unlink(missing_ok=True)
        return

    def request() -> None:
        filesystem, path = opened(place, LIMITS)
        filesystem.delete_file(path)

    with contextlib.suppress(MissingError):
        retried(redacted(place), "deleting it", request, LIMITS)
    _open_files.forget(str(place))


def free_bytes(place: Location) -> int | None:
    """Bytes that are free where a place is or will be; None for a store, which does not say."""
    if is_remote(place):
        return None
    path = local_path(place).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
