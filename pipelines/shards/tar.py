"""Shards: WebDataset tars that appear whole or not at all, and their samples read in place by offset.

A shard is an uncompressed tar of regular files `key.extension`, the members of one sample side by side. webdataset
writes it, and each member's offset is noted, so that the index is made without a second read; the reader maps shards
into memory and hands out views. Tars of others are taken in by `scan`.
"""

import contextlib
import hashlib
import mmap
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import KEY_PATTERN, LABELS_MEMBER, Buffer, check_extension, check_key
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.files import read_ranges
from domainshuttle.pipelines.storage.uri import is_remote, join

if TYPE_CHECKING:
    from webdataset import TarWriter

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBER_BYTES = 8**11 - 1  # what the plain (ustar) header can hold
_BUFFER = 1 << 20  # of a shard that is written


LABELS_FOLDER = "labels"
"""The folder, in a raw corpus's, of the shards that hold what was labelled of its samples."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: its extension ('ref0.jpg'), and where its `size` bytes begin in the sample's shard, or in
    another one of the corpus's folder (`shard`, 'labels/name.tar'), where labels lie apart from what they are of."""

    extension: str
    offset: int
    size: int
    shard: str = ""

    @property
    def name(self) -> str:
        """What an index calls it: 'ref0.jpg', or 'labels.json@labels/name.tar'."""
        return f"{self.extension}@{self.shard}" if self.shard else self.extension

    @classmethod
    def of(cls, name: str, offset: int, size: int) -> "Member":
        """The member that an index calls so."""
        extension, _, shard = name.partition("@")
        return cls(extension, offset, size, shard)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One sample of a shard; `checksum` is `sample_checksum` of its members."""

    shard: str
    key: str
    members: tuple[Member, ...]
    checksum: int


def sample_checksum(members: Mapping[str, Buffer]) -> int:
    """An unsigned 64-bit checksum of a sample's members, whatever their order: of extensions, sizes and bytes."""
    return checksum_of({name: member_digest(name, len(data), [data]) for name, data in members.items()})


def checksum_of(digests: Mapping[str, bytes]) -> int:
    """A sample's checksum of its members' digests. Labels come on top of what the sample had without them."""
    built = combined_checksum(digest for name, digest in digests.items() if name != LABELS_MEMBER)
    return labelled_checksum(built, digests[LABELS_MEMBER]) if LABELS_MEMBER in digests else built


def labelled_checksum(built: int, labels: bytes) -> int:
    """The checksum of a sample that had `built`, with labels of this digest: its other files need not be read."""
    return combined_checksum([built.to_bytes(8, "little"), labels])


def member_digest(extension: str, size: int, pieces: Iterable[Buffer]) -> bytes:
    """A hash of one member, whose bytes may come in pieces."""
    digest = hashlib.blake2b(f"{extension}\0{size}\0".encode(), digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def combined_checksum(digests: Iterable[bytes]) -> int:
    """A checksum of digests, whatever their order."""
    return int.from_bytes(hashlib.blake2b(b"".join(sorted(digests)), digest_size=8).digest(), "little")


def check_shard_name(name: str) -> str:
    """Return `name` if it is a plain `*.tar` file name, else raise DataError (an index must not lead out of its
    folder)."""
    if not name.endswith(".tar") or not KEY_PATTERN.fullmatch(name[:-4]):
        raise DataError(
            f"shard name {name[:120]!r}: expected letters, digits, _ and - and then '.tar', without a folder"
        )
    return name


def shard_of(shard: str, member: Member) -> str:
    """The name, in a corpus's folder, of the shard in which a member of a sample of `shard` lies. Raises DataError for
    one that leads elsewhere."""
    if not member.shard:
        return check_shard_name(shard)
    folder, _, name = member.shard.rpartition("/")
    if folder != LABELS_FOLDER:
        raise DataError(f"shard name {member.shard[:120]!r}: expected one in {LABELS_FOLDER}/; index the shards again")
    check_shard_name(name)
    return member.shard


class ShardWriter:
    """Writes samples into `folder/prefix-000000.tar`, `-000001.tar` ..., each of at most `max_bytes` (or one sample).

    A shard is written under a temporary name, flushed to the disk and renamed; where the `with` block ends by an
    exception, the unfinished one is removed. The same samples give the same names and bytes. Parallel writers into one
    folder need a prefix each. `entries` lists the samples of finished shards, in order; `shards` their names.
    """

    def __init__(self, folder: str | Path, prefix: str, max_bytes: int) -> None:
        check_shard_name(f"{prefix}-000000.tar")
        if max_bytes < 1:
            raise DataError(f"max_bytes = {max_bytes} for shards {prefix!r}: expected a size in bytes, such as {10**9}")
        self.folder = Path(folder)
        self.prefix = prefix
        self.max_bytes = max_bytes
        self.entries: list[ShardEntry] = []
        self.shards: list[str] = []
        self._pending: list[ShardEntry] = []
        self._keys: set[str] = set()
        self._tar: TarWriter | None = None
        self._unfinished = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A prefix has one writer, so what is unfinished under it was left by one that was killed.
        for leftover in self.folder.glob(f".{self.prefix}-??????.tar.*.partial"):
            leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._unfinished.__exit__(kind, error, traceback)

    def write(self, key: str, members: Mapping[str, Buffer]) -> None:
        """Append one sample: extension -> bytes, `json` first and the others by name.

        Raises DataError on an unsafe key or extension, a key that was written before, no members, or a member over 8
        GiB.
        """
        check_key(key)
        if key in self._keys:
            raise DataError(f"key {key!r} was written before in shards {self.prefix!r}: expected each key once")
        if not members:
            raise DataError(f"sample {key!r} has no members: expected at least 'json' and one file")
        held = {name: data if isinstance(data, bytes) else memoryview(data).cast("B") for name, data in members.items()}
        for extension, data in held.items():
            check_extension(extension)
            if len(data) > MAX_MEMBER_BYTES:
                raise DataError(f"member {key}.{extension} is larger than {MAX_MEMBER_BYTES} bytes: split the clip")
        size = sum(BLOCK + _padded(len(data)) for data in held.values())
        if self._tar is not None and self._tar.tarstream.offset + size + 2 * BLOCK > self.max_bytes:
            self.finish()
        tar = self._tar if self._tar is not None else self._start()
        placed = []
        for extension in sorted(held, key=lambda extension: (extension != "json", extension)):
            tar.write({"__key__": key, extension: held[extension]})  # one by one, as it puts them in another order
            length = len(held[extension])
            placed.append(Member(extension, tar.tarstream.offset - _padded(length), length))
        self._keys.add(key)
        self._pending.append(ShardEntry(self._name, key, tuple(placed), sample_checksum(held)))

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{len(self.shards):06d}.tar"

    def _start(self) -> "TarWriter":
        from webdataset import TarWriter  # which brings torch: readers of shards go without

        aside = self._unfinished.enter_context(atomic_file(self.folder / self._name))
        file = self._unfinished.enter_context(aside.open("wb", buffering=_BUFFER))
        # no time, no user: the same samples give the same bytes
        tar = TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
        self._tar = self._unfinished.enter_context(tar)
        return self._tar

    def finish(self) -> None:
        """Ends the shard that is being written; what is written next begins another."""
        if self._tar is None:
            return
        self._tar = None
        self._unfinished.close()
        final = self.folder / self._name
        _open_shards.forget(final)
        _open_files.forget(final)
        self.shards.append(self._name)
        self.entries.extend(self._pending)
        self._pending = []


def _padded(size: int) -> int:
    return size + -size % BLOCK


class ShardCache:
    """Shards mapped into memory, the least recently used unmapped beyond `max_open`. Safe to share between threads.

    A view that was handed out keeps its own map alive, so unmapping never pulls data from under a reader.
    """

    def __init__(self, max_open: int = 128) -> None:
        self.max_open = max_open
        self._maps: OrderedDict[str, memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._maps)

    def forget(self, path: Path) -> None:
        """Drop a shard, because its file was replaced."""
        with self._lock:
            self._maps.pop(str(path), None)

    def read(self, folder: str | Path, shard: str, members: Iterable[Member]) -> dict[str, memoryview]:
        """The members' bytes as views, extension -> view; raises DataError where the shard is missing or too short."""
        own = self._map(os.path.join(folder, check_shard_name(shard)))  # noqa: PTH118 - a Path costs more than the read
        views = {}
        for member in members:
            whole = self._map(os.path.join(folder, shard_of(shard, member))) if member.shard else own  # noqa: PTH118
            if member.offset < 0 or member.size < 0 or member.offset + member.size > len(whole):
                raise DataError(
                    f"{folder}/{member.shard or shard}: member {member.extension!r} at byte {member.offset} with "
                    f"{member.size} bytes is not within the file's {len(whole)}: the shard was cut short or replaced; "
                    "copy it again"
                )
            views[member.extension] = whole[member.offset : member.offset + member.size]
        return views

    def _map(self, path: str) -> memoryview:
        with self._lock:
            whole = self._maps.get(path)
            if whole is not None:
                self._maps.move_to_end(path)
                return whole
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
            raise DataError(f"shard {path} can't be read ({error}): copy it again or index the folder again") from error
        with self._lock:
            self._maps[path] = whole
            while len(self._maps) > self.max_open:
                self._maps.popitem(last=False)
        return whole


# One cache a process: tasks that are handed rows by name must not each map the same shards again.
_open_shards = ShardCache()


def read_members(folder: str | Path, shard: str, members: Iterable[Member]) -> dict[str, memoryview]:
    """The bytes of one sample's members: extension -> read-only memoryview, of the mapped shard or, where the folder is
    a URI, of what was read from the store.

    Thread-safe; at most 128 shards stay open. Raises DataError where the shard is missing, misnamed or too short, and
    StorageError where a store fails.
    """
    if is_remote(folder):
        wanted, found = list(members), {}
        for name in dict.fromkeys(shard_of(shard, member) for member in wanted):
            own = [member for member in wanted if shard_of(shard, member) == name]
            ranges = [(member.offset, member.size) for member in own]
            for member, data in zip(own, read_ranges(join(folder, name), ranges), strict=True):
                found[member.extension] = data
        return found
    return _open_shards.read(folder, shard, members)


class MemberReader(Protocol):
    """One member of a shard, of which parts are read."""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` in the member on, fewer at its end."""
        ...

    def read_into(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fills each buffer from its offset in the member. Raises DataError where the shard was cut short."""
        ...


def open_member(folder: str | Path, shard: str, member: Member) -> MemberReader:
    """A member to read parts of: of the open shard or, where the folder is a URI, of its bytes, which are read at once.

    Thread-safe; at most 512 shards stay open. Raises DataError where the shard is missing or misnamed, and
    StorageError where a store fails.
    """
    if is_remote(folder):
        return _HeldMember(read_members(folder, shard, [member])[member.extension])
    path = os.path.join(folder, check_shard_name(shard))  # noqa: PTH118 - a Path costs more than the read
    return _LocalMember(path, _open_files.open(path), member)


@dataclass(frozen=True)
class _HeldMember:
    data: memoryview

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    def read_into(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        for offset, buffer in pieces:
            buffer[:] = self.data[offset : offset + len(buffer)]


@dataclass(frozen=True)
class _LocalMember:
    path: str
    file: FileIO
    """Kept open by whoever holds it, so the number is this file's until the read is done."""
    member: Member

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), min(size, self.member.size - offset), self.member.offset + offset)

    def read_into(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        run: list[memoryview] = []
        start = end = -1
        for offset, buffer in sorted(pieces, key=lambda piece: piece[0]):
            if offset != end:
                self._read_run(start, run)
                run, start, end = [], offset, offset
            run.append(buffer)
            end += len(buffer)
        self._read_run(start, run)

    def _read_run(self, start: int, buffers: list[memoryview]) -> None:
        """Neighbouring pieces by one call, or a few where the kernel gives less."""
        position = self.member.offset + start
        while buffers:
            count = os.preadv(self.file.fileno(), buffers, position)
            if not count:
                raise DataError(
                    f"{self.path}: member {self.member.extension!r} at byte {self.member.offset} with "
                    f"{self.member.size} bytes is not within the file's {os.fstat(self.file.fileno()).st_size}: the "
                    "shard was cut short or replaced; copy it again"
                )
            position += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][count:]


class _OpenFiles:
    """Shards that are open, the least recently used let go beyond `max_open`. Safe to share between threads."""

    def __init__(self, max_open: int = 512) -> None:
        self.max_open = max_open
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str) -> FileIO:
        with self._lock:
            if (file := self._files.get(path)) is not None:
                self._files.move_to_end(path)
                return file
        try:
            file = FileIO(path)
        except OSError as error:
            raise DataError(f"shard {path} can't be read ({error}): copy it again or index the folder again") from error
        with self._lock:
            self._files[path] = file
            while len(self._files) > self.max_open:
                self._files.popitem(last=False)
        return file

    def forget(self, path: Path) -> None:
        with self._lock:
            self._files.pop(str(path), None)


_open_files = _OpenFiles()
