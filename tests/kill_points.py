"""A command that is killed at one of its changes of files, each of which can be chosen.

It runs in a forked child, which sends itself SIGKILL just before its n-th change below a folder: a file opened for
writing, renamed, removed, a folder made or removed. So all places where a kill leaves other files are found by
counting, which is more than killing at random moments finds.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset  # noqa: F401  (it brings torch, which each child would import again)

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
NEVER = 1 << 30


def run_until(point: int, work: Callable[[], Any], below: Path) -> bool:
    """Runs `work` in a child that is killed before its change number `point`, from 0; returns whether it came to its
    end. Raises AssertionError where it raised instead."""
    child = os.fork()
    if not child:
        code = 1
        try:
            _kill_at(point, str(below))
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "it raised: see its traceback"
    return True


def _kill_at(point: int, below: str) -> None:
    left = point

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        # names relative to an open folder, as rmtree removes them, come without their folder
        if not isinstance(path, str | os.PathLike) or (Path(path).is_absolute() and not str(path).startswith(below)):
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(seen)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a corpus's folder that readers see."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
