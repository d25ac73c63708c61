"""Locks on files, by the kernel: a dead holder's is free at once on its own machine."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[bool]:
    """Holds a lock file, among processes and threads, for the block; yields False when another holder keeps it for more
    than `wait` seconds.

    On a file system without locks it yields True: that there is one holder is then the caller's care. The file stays.
    Raises OSError where it can't be opened.
    """
    # no existence of a file in the lock's place: one of a dead machine would stay
    lock = FileLock(path, timeout=wait, poll_interval=0.02, thread_local=False, fallback_to_soft=False)
    held = True
    try:
        lock.acquire()
    except Timeout:
        held = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield held
    finally:
        lock.release()
