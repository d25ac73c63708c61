"""Scanning: the samples of tars that others wrote, by offset and with checksums, and what is wrong with the rest.

Each header and size is checked before it is used. A tar that was cut, which `tarfile`, webdataset and Ray Data may read
as one with fewer samples, has a fault here; a declared size is never allocated; no member is written anywhere, opened
or unpickled. A fault costs what it touches: a member with an odd name its sample, a cut what comes after it. Files that
systems and tools leave beside others are counted and ignored (`companions`).
"""

import os
import tarfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.quarantine import SampleFault, fault_kind
from domainshuttle.pipelines.sample import EXTENSION_PATTERN, KEY_PATTERN
from domainshuttle.pipelines.shards.companions import companion, is_index_name
from domainshuttle.pipelines.shards.tar import (
    BLOCK,
    Member,
    ShardEntry,
    check_shard_name,
    combined_checksum,
    member_digest,
)
from domainshuttle.pipelines.storage.files import open_file
from domainshuttle.pipelines.storage.uri import name_of

_PIECE = 1 << 20
_BUFFER = 8 << 20  # of a store's file, which is read from its beginning to its end
_MOST_EXTENDED = 1 << 20  # bytes of a header that extends the next one: long names, not data
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_SKIPPED = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
_MORE_HOLES, _MORE_HOLES_AGAIN = 482, 504
"""Where a sparse file's header, and a further block of it, says that another one follows."""
_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_LINK = "is a link: pack what it leads to (tar --dereference --hard-dereference)"
_NO_FILES = {
    tarfile.LNKTYPE: _LINK,
    tarfile.SYMTYPE: _LINK,
    tarfile.GNUTYPE_SPARSE: "is stored as a sparse file, with holes: pack the shard again, not with `tar --sparse`",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample that is left out, or with an empty `key` a fault of the whole shard. `reason` is 'kind: detail'."""

    shard: str
    key: str
    reason: str

    @property
    def kind(self) -> str:
        return fault_kind(self.reason)


def scan_shard(path: str | Path) -> Iterator[ShardEntry | Fault]:
    """The samples of a tar in order, with checksums, and its faults where they lie; see `scan_contents`."""
    return (found if isinstance(found, Fault) else found[0] for found in scan_contents(path))


def scan_contents(
    path: str | Path, extensions: Container[str] = (), most: int = 0, companions: Counter[str] | None = None
) -> Iterator[tuple[ShardEntry, dict[str, bytes]] | Fault]:
    """The samples of a tar in order, with checksums, and its faults where they lie; reads the file once.

    With each sample come the bytes of its members of these extensions, but for those of more than `most` bytes.
    `companions` counts, by the pattern of their names, the files of the tar that are no samples' and are ignored.

    A sample is the members of one key that stand together. Left out, with a fault that names them, are: names that are
    not `key.extension` in the safe form, what is not a regular file, and a key that came before (the first stays).
    Where the tar ends too early, or a header is corrupt, the scan ends with a fault of the shard. The sample before it
    is given with the members that are whole: only its description can say whether there were more.

    Raises DataError where the file is not called `name.tar`; a file that can't be read is a fault. Raises
    StorageError where a store fails.
    """
    shard = check_shard_name(name_of(path))
    companions = Counter() if companions is None else companions
    empty = True
    try:
        with open_file(path, buffer=_BUFFER) as file:
            for found in _samples(file, shard, extensions, most, companions):
                if isinstance(found, _Sample) and found.is_index():
                    companions["index .json"] += 1
                    continue
                empty = False
                yield found.finished(shard) if isinstance(found, _Sample) else found
    except SampleFault as fault:
        yield Fault(shard, "", str(fault))
        return
    except StorageError:
        raise
    except (DataError, OSError, MemoryError) as error:
        yield Fault(shard, "", f"unreadable shard: {error}")
        return
    if empty:
        yield Fault(shard, "", "empty shard: holds no samples; remove it or copy it again")


@dataclass
class _Sample:
    """The members of a key as they come; `fault` condemns the sample."""

    key: str
    fault: str
    members: dict[str, Member] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)

    def is_index(self) -> bool:
        """Whether it is another loader's index: a JSON file of such a name, beside which nothing has its key."""
        return not self.fault and [*self.members] == ["json"] and is_index_name(self.key)

    def read(self, file: BinaryIO, header: "_Header", extension: str, keep: bool) -> None:
        """Adds a member: its place, its digest and, where they are to be kept, its bytes. Raises SampleFault."""
        self.members[extension] = Member(extension, header.offset, header.size)
        pieces: Iterable[bytes] = _pieces(file, header)
        if keep:
            pieces = [*pieces]
            self.contents[extension] = b"".join(pieces)
        self.digests.append(member_digest(extension, header.size, pieces))

    def finished(self, shard: str) -> tuple[ShardEntry, dict[str, bytes]] | Fault:
        if self.fault:
            return Fault(shard, self.key, self.fault)
        checksum = combined_checksum(self.digests)
        return ShardEntry(shard, self.key, tuple(self.members.values()), checksum), self.contents


@dataclass(frozen=True, slots=True)
class _Header:
    """One member as its header declares it; its data begin at `offset`."""

    name: str
    type: bytes
    offset: int
    size: int


def _samples(
    file: BinaryIO, shard: str, extensions: Container[str], most: int, companions: Counter[str]
) -> Iterator[_Sample | Fault]:
    """Samples and faults; raises SampleFault where the tar can't be followed further, after all that came before."""
    size = file.seek(0, os.SEEK_END)
    seen: set[str] = set()
    sample: _Sample | None = None
    stray = ""
    broken: SampleFault | None = None
    try:
        for header in _headers(file, size):
            if header.type == tarfile.DIRTYPE and header.name in (".", "./"):  # as `tar -C folder .` begins
                continue
            stem, key, extension, fault = _named(header)
            if pattern := companion(header.name):  # belongs to no sample, so it breaks none
                companions[pattern] += 1
                _require_whole(header, size)
                continue
            if key is None:
                if stem != stray:
                    yield Fault(shard, stem, fault)
                stray = stem
                _require_whole(header, size)
                continue
            if sample is None or key != sample.key or extension in sample.members:
                if sample is not None:
                    yield sample
                again = f"duplicate key: {key!r} comes again in {shard}; the first stays" if key in seen else ""
                sample = _Sample(key, again)
                seen.add(key)
            sample.fault = sample.fault or fault
            try:
                _require_whole(header, size)
                if not fault:
                    sample.read(file, header, extension, keep=extension in extensions and header.size <= most)
            except SampleFault as cut:
                sample.fault = sample.fault or str(cut)
                raise
    except SampleFault as end:
        broken = end
    if sample is not None:
        yield sample
    if broken is not None:
        raise broken


def _require_whole(header: _Header, size: int) -> None:
    """Raises SampleFault for a member whose data the file of `size` bytes does not hold."""
    if header.offset + header.size > size:
        raise SampleFault(
            "cut shard",
            f"member {shown(header.name)} declares {header.size} bytes, the file ends {size - header.offset} bytes "
            "after its header; copy the shard again",
        )


def _named(header: _Header) -> tuple[str, str | None, str, str]:
    """Of a member: its name's stem for people, its key (None: belongs to no sample), its extension, its fault."""
    folder, slash, base = header.name.removeprefix("./").rpartition("/")  # `tar -C folder .` writes ./key.jpg
    name, dot, extension = base.partition(".")
    stem = shown(f"{folder}{slash}{name}") or shown(header.name)
    if header.type == tarfile.DIRTYPE:
        return (
            stem,
            None,
            "",
            (f"unsafe name: member {shown(header.name)!r} is a folder: pack the files that are meant, without folders"),
        )
    if folder or slash or not KEY_PATTERN.fullmatch(name):
        return stem, None, "", (
            f"unsafe name: member {shown(header.name)!r}: expected key.extension without folders, the key 1 to 80 of "
            "A-Z a-z 0-9 _ - with a letter or digit first; pack the shard again with such names"
        )  # fmt: skip
    if not dot or not EXTENSION_PATTERN.fullmatch(extension):
        return stem, name, extension, (
            f"unsafe name: member {shown(header.name)!r}: expected an extension of 1 to 19 lower-case letters and "
            "digits, such as 'jpg' or 'ref0.jpg'; pack the shard again with such names"
        )  # fmt: skip
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = header.type.decode("latin-1")
        what = _NO_FILES.get(header.type, f"has tar type {kind!r}: pack the shard again without it")
        return stem, name, extension, f"not a file: member {shown(header.name)!r} {what}"
    return stem, name, extension, ""


def shown(name: str) -> str:
    """A name of any bytes as at most 120 printable ASCII characters."""
    return name[:120].encode("ascii", "backslashreplace").decode()


def _headers(file: BinaryIO, size: int) -> Iterator[_Header]:
    """The members' headers, up to the end of the archive. Raises SampleFault on a cut or corrupt one.

    Not tarfile's loop: that takes a cut or broken later header for the end of the archive, and reads as much as a
    header of a long name declares.
    """
    position, name, length, sparse = 0, "", -1, False
    while True:
        block = _at(file, BLOCK, position)
        if len(block) < BLOCK:
            raise SampleFault("cut shard", f"the file ends at byte {size} without an end of archive; copy it again")
        if not block.strip(b"\0"):
            _check_end(file, position, size)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise SampleFault("corrupt shard", f"no tar header at byte {position} ({error}); copy it again") from error
        offset = position + BLOCK
        if header.size < 0 or (header.type in _EXTENDED + _SKIPPED and header.size > _MOST_EXTENDED):
            raise SampleFault(
                "corrupt shard", f"the header at byte {position} declares {header.size} bytes; copy it again"
            )
        if header.type in _EXTENDED + _SKIPPED:
            content = _at(file, header.size, offset)
            if len(content) < header.size:
                raise SampleFault("cut shard", f"the file ends at byte {size} inside a header; copy it again")
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif header.type in _EXTENDED:
                name, length, sparse = _pax(content, position)
            position = offset + _padded(header.size)
            continue
        more = header.type == tarfile.GNUTYPE_SPARSE and block[_MORE_HOLES]
        while more:  # further blocks of the header say where the holes are
            block = _at(file, BLOCK, offset)
            if len(block) < BLOCK:
                raise SampleFault("cut shard", f"the file ends at byte {size} inside a header; copy it again")
            offset, more = offset + BLOCK, block[_MORE_HOLES_AGAIN]
        data = 0 if header.type in _WITHOUT_DATA else header.size if length < 0 else length
        kind = tarfile.GNUTYPE_SPARSE if sparse else header.type
        yield _Header(name or header.name, kind, offset, data)
        position, name, length, sparse = offset + _padded(data), "", -1, False


def _at(file: BinaryIO, size: int, position: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _pax(content: bytes, position: int) -> tuple[str, int, bool]:
    """The name ('' for none) and the size (-1 for none) that an extended header gives to the next member, and whether
    it is sparse."""
    name, length, sparse = "", -1, False
    try:
        while content:
            digits, _, _ = content.partition(b" ")
            key, equals, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
            if int(digits) <= len(digits) or not equals:
                raise ValueError("an odd record")
            sparse = sparse or key.startswith(b"GNU.sparse")
            if key == b"GNU.sparse.name" or (key == b"path" and not (sparse and name)):
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                length = int(value)
            content = content[int(digits) :]
        if length < -1:
            raise ValueError("a negative size")
    except ValueError as error:
        raise SampleFault(
            "corrupt shard", f"the extended header at byte {position} can't be read ({error}); pack the shard again"
        ) from error
    return name, length, sparse


def _pieces(file: BinaryIO, header: _Header) -> Iterator[bytes]:
    position, end = header.offset, header.offset + header.size
    while position < end:
        piece = _at(file, min(_PIECE, end - position), position)
        if not piece:
            raise SampleFault("cut shard", f"ends inside member {shown(header.name)!r}; copy it again")
        position += len(piece)
        yield piece


def _check_end(file: BinaryIO, position: int, size: int) -> None:
    """The end is two blocks of zeros, and nothing but zeros after them."""
    if size < position + 2 * BLOCK:
        raise SampleFault("cut shard", f"the file ends at byte {size} within the end of archive; copy it again")
    while piece := _at(file, _PIECE, position):
        if piece.strip(b"\0"):
            raise SampleFault(
                "corrupt shard",
                f"data follow the end of archive at byte {position}: a header was overwritten by zeros, or tars were "
                "joined with cat; write the samples into one archive",
            )
        position += len(piece)


def _padded(size: int) -> int:
    return size + -size % BLOCK
