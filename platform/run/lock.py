"""The lock on a run's folder: one driver at a time writes its checkpoints, progress and spool.

Where the file system has locks (flock), the kernel gives a dead driver's lock back at once. Not every shared file
system has them, or has them across nodes, so the holder also says every few seconds in a file that it lives: whoever
wants the run from another node watches that file for a while, and takes over only when nothing moves. No clocks are
compared.
"""

import contextlib
import json
import shlex
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from domainshuttle.pipelines.errors import UserFacingError
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.pipelines.storage.locks import locked

LOCK_NAME, HOLDER_NAME = "driver.lock", "driver.json"

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
"""Without a beat for so long, the holder on another node is dead."""


class RunLockedError(UserFacingError, RuntimeError):
    """Another driver works at the run: which, and what to do about it."""


class RunLock:
    """Holds a run for this process, as a context manager. Raises RunLockedError when another driver has it.

    `say` is told when the holder is on another node and has to be watched first.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None] = lambda _: None,
        held: Callable[[Path, dict[str, Any]], str] | None = None,
    ) -> None:
        """`held` words the error, of the folder and of what the holder says of itself: by default of a run."""
        self.folder, self._say, self._held = folder, say, held or _held_run
        self._token = uuid.uuid4().hex
        self._taken_by: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._locks = contextlib.ExitStack()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as locks:
            if not locks.enter_context(locked(self.folder / LOCK_NAME)):
                raise RunLockedError(self._held(self.folder, self._holder() or {}))
            self._require_dead(self._holder())
            self._beat()
            self._locks = locks.pop_all()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join(2 * BEAT_SECONDS)
        if (self._holder() or {}).get("token") == self._token:
            with contextlib.suppress(OSError):
                (self.folder / HOLDER_NAME).unlink()
        self._locks.close()

    def check(self) -> None:
        """Raises RunLockedError when another driver took the run, since this one did not move for too long."""
        if self._taken_by is not None:
            raise RunLockedError(self._held(self.folder, self._taken_by))

    def _holder(self) -> dict[str, Any] | None:
        """What the holder says of itself; None where there is none, or it died before it could."""
        try:
            found: dict[str, Any] = json.loads((self.folder / HOLDER_NAME).read_text())
        except (OSError, ValueError):
            return None
        return found

    def _require_dead(self, holder: dict[str, Any] | None) -> None:
        """Raises RunLockedError when the holder lives."""
        if holder is None:
            return
        if holder["host"] == socket.gethostname():
            if _lives(holder["pid"], holder["started"]):
                raise RunLockedError(self._held(self.folder, holder))
            return
        self._say(
            f"{self.folder} was last held by {holder_named(holder)}: waiting {PATIENCE_SECONDS:g} s for a sign of life"
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE_SECONDS / 10))
            now = self._holder()
            if now is None:  # it has just ended
                return
            if now != holder:
                raise RunLockedError(self._held(self.folder, now))

    def _beat(self) -> None:
        process = psutil.Process()
        content = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "token": self._token,
            "beat": time.time(),
        }
        write_bytes(self.folder / HOLDER_NAME, json.dumps(content).encode())

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            holder = self._holder()
            if holder is not None and holder.get("token") != self._token:
                self._taken_by = holder
                return
            with contextlib.suppress(OSError):  # of a full disk: the lock of the kernel holds on
                self._beat()


def _lives(pid: int, started: float) -> bool:
    """Whether a process of this machine is still the one that started then."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.Error:
        return False


def holder_named(holder: dict[str, Any]) -> str:
    """Who holds a lock, by what it says of itself."""
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _held_run(folder: Path, holder: dict[str, Any]) -> str:
    return (
        f"the run in {folder} is being trained by {holder_named(holder)}. Look at it with `domainshuttle status "
        f"{shlex.quote(str(folder))}`; stop it with a checkpoint by `domainshuttle stop {shlex.quote(str(folder))}` "
        "and start again when it has ended; or train under a name of its own: --set name=NAME"
    )
