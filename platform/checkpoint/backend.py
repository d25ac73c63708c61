"""Where checkpoints lie: files under one folder or URI, each of them there whole or not at all.

On a local or shared file system a file appears by a rename after it was synced to the disk; an object store shows an
object when its upload is complete. Nothing above this module asks which of the two it is.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NotRequired, TypedDict

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.storage import files as storage
from domainshuttle.pipelines.storage.atomic import atomic_file, sync_folder
from domainshuttle.pipelines.storage.uri import absolute, is_remote, join, redacted

STORE_FAULTS = (OSError, DataError)
"""What reading and writing files may raise when disk, network or store fail, or the location is none."""


_PIECE = 64 << 20


class FileEntry(TypedDict):
    """A file of a checkpoint, as its manifest lists it."""

    size: int
    checksum: str
    rank: NotRequired[int]
    """Which rank wrote it; none: it belongs to all."""


class CheckpointDir:
    """The files under `root`, by names with slashes relative to it."""

    def __init__(self, root: str | Path) -> None:
        self.remote = is_remote(root)
        self.root = str(absolute(root))

    def where(self, name: str) -> str:
        """The path or URI of a file or folder."""
        return join(self.root, name) if name else self.root

    def redacted(self, name: str = "") -> str:
        """The same for messages: without access keys."""
        return redacted(self.where(name))

    def local(self, name: str) -> Path:
        return Path(self.root) / name

    def listing(self, folder: str = "") -> dict[str, int]:
        """Every file under a folder: its name relative to the root, and its bytes. Empty when there is no folder."""
        if self.remote:
            files = storage.list_files(self.where(folder))
            return {f"{folder}/{name}" if folder else name: size for name, size in files}
        sizes: dict[str, int] = {}
        for parent, _, names in os.walk(self.local(folder)):
            for name in names:
                path = Path(parent) / name
                with contextlib.suppress(FileNotFoundError):  # taken away since the folder was read
                    sizes[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return sizes

    def top(self) -> set[str]:
        """What lies directly under the root: files, and folders with something in them. Of a file system nothing else
        is looked at, however many files checkpoints of many ranks have."""
        if self.remote:
            return {file.partition("/")[0] for file in self.listing()}
        found = set()
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # taken away since the folder was read
                    if not entry.is_dir() or any(os.scandir(entry.path)):
                        found.add(entry.name)
        return found

    def read(self, name: str) -> bytes:
        return storage.read_bytes(self.where(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file; when this returns, it outlives a loss of power."""
        storage.write_bytes(self.where(name), content)

    def take(self, path: Path, name: str) -> None:
        """Brings in a local file, which is gone afterwards. On one file system it is renamed, not copied."""
        if self.remote:
            storage.write_file(path, self.where(name))
            path.unlink()
            return
        target = self.local(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(target)

    def settle(self, names: Iterable[str]) -> None:
        """Makes the names of files that were taken in, and of their folders, outlive a loss of power."""
        if not self.remote:
            folders = {parent for name in names for parent in PurePosixPath(name).parents}
            for folder in folders:
                sync_folder(self.local(str(folder)))

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to a local path, where it appears whole."""
        with (
            storage.open_file(self.where(name)) as source,
            atomic_file(path, sync=False) as aside,
            aside.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, _PIECE)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it; nothing to do when there is none."""
        if self.remote:
            storage.delete(self.where(name))
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda file: storage.delete(self.where(file)), self.listing(name)))
            return
        path = self.local(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """What can still be written; None where a store has no such bound."""
        return storage.free_bytes(self.root)


def describe(path: Path) -> FileEntry:
    """Size and checksum (BLAKE2b, 128 bits) of a local file."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while chunk := file.read(_PIECE):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "checksum": digest.hexdigest()}


def describe_all(paths: list[Path]) -> list[FileEntry]:
    """The same of many files, several at a time: hashing leaves the interpreter free."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(describe, paths))
