"""Files and folders that appear whole or not at all: written aside, synced to the disk, then renamed.

What is unfinished lies beside its place as `.NAME.MACHINE-N.partial`, which its writer holds locked while it lives. So
writers of one place never share one, and what a dead one left is taken by the machine's next writer of that place.
Readers pass over names that begin with a dot.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

# Of the machine's name, which can be too long for a file's: not every shared file system locks across machines.
_MACHINE = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """An empty file to write, which is at `path` when the block ends; where the block raises, `path` is as it was.

    It has the mode that the umask leaves, and its folder is made where there is none. `sync`: it outlives a loss of
    power. Raises OSError, for a full disk for example, and before the block for what is no file, such as a device: a
    rename would take it from the machine. The place of a link is taken too, and what it pointed to stays as it was.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EEXIST, "there is something that is no file: name another path", str(path))
    with _reserved(path) as aside:
        try:
            yield aside
            if sync:
                _sync(aside)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    if sync:
        _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which is at `path` when the block ends; where the block raises, `path` is as it was.

    It takes the place of a folder that is there, and outlives a loss of power. Raises OSError, before the block for a
    mount point, which can't be replaced.
    """
    path = Path(os.path.realpath(path))  # a link to a folder on another disk goes on pointing there
    if os.path.ismount(path):  # Path.is_mount raises where another writer removes it meanwhile
        raise OSError(errno.EBUSY, "a mount point can't be replaced: name a folder in it", str(path))
    with _reserved(path) as reserved:
        aside, former = reserved.with_suffix(".new.partial"), reserved.with_suffix(".old.partial")
        if former.exists() and not path.exists():  # a writer died between the two renames
            former.rename(path)
        _remove(aside, former)
        try:
            aside.mkdir()
            yield aside
            sync_tree(aside)
            _exchange(aside, path, former)
            sync_folder(path.parent)
            _remove(former)
        finally:
            _remove(aside)
            reserved.unlink(missing_ok=True)


def _exchange(aside: Path, path: Path, former: Path) -> None:
    """Renames the folder `aside` to `path`, and what may be there to `former`."""
    while True:
        if path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another writer was faster
                path.rename(former)
        try:
            aside.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if former.exists():
                    former.rename(path)
                raise
            _remove(former)  # another writer came between, whose folder is the newer one


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Make the files of a folder, at any depth, and their names outlive a loss of power."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if stat.S_ISREG(os.lstat(path := Path(parent, name)).st_mode):
                _sync(path)
        _sync(Path(parent))


def sync_folder(folder: Path) -> None:
    """Make what was made or renamed in a folder outlive a loss of power."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reserved(path: Path) -> Iterator[Path]:
    """An empty file beside `path` that no other live writer has; who renames or removes it does so within the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        aside = path.with_name(f".{path.name}.{_MACHINE}-{number}.partial")
        try:
            descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError:
            if not os.path.lexists(aside):
                raise
            continue  # another user's
        try:
            try:
                if not lock_descriptor(descriptor, blocking=False) or not _is_at(descriptor, aside):
                    continue
                os.ftruncate(descriptor, 0)
            except OSError:  # a file system without locks: a name that nobody takes again
                aside.unlink(missing_ok=True)
                aside = path.with_name(f".{path.name}.{_MACHINE}-{uuid.uuid4().hex[:12]}.partial")
                aside.touch()
            yield aside
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file that was opened is still at the path, and was not renamed or removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
