"""The folder of this user in a node's temporary folder: copies that are made again where they are missing."""

import os
import tempfile
from pathlib import Path

from domainshuttle.pipelines.errors import StorageError


def private_folder(place: Path | None = None, instead: str = "set TMPDIR to another folder") -> Path:
    """The user's own folder in `place` (None: the system's temporary folder), which nobody else can read or write.

    Raises StorageError where it is somebody else's, or others could write to it, with `instead` as another way out;
    OSError where it can't be made.
    """
    folder = (place or Path(tempfile.gettempdir())) / f"domainshuttle-{os.getuid()}"
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise StorageError(
            f"{folder} is not a folder of this user alone (mode 0700), so what is in it can't be trusted: remove it, "
            f"or {instead}"
        )
    if status.st_mode & 0o077:  # others could read it, but not write
        folder.chmod(0o700)
    return folder
