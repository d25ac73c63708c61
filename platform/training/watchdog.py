"""The watchdog: a worker that makes no step for too long writes where it hangs, and ends so that its group restarts.

A hanging rank (a lost collective, a dead disk, a deadlock) stops all others inside a collective without an error. The
watchdog is a thread of the interpreter's own C code, so it also fires while Python is stuck in a call.
"""

import faulthandler
from pathlib import Path


class Watchdog:
    """Ends the process when it shows no sign of life for `seconds`, and writes the stacks of all threads to `path`.

    It begins at once. To build and restore, and for a save, a worker has `grace_seconds` instead.
    """

    def __init__(self, seconds: float, grace_seconds: float, path: Path) -> None:
        self.seconds, self.grace_seconds = seconds, grace_seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self.allow_grace()

    def alive(self) -> None:
        """Starts the time again; call it at least once a step."""
        self._arm(self.seconds)

    def allow_grace(self) -> None:
        """Gives what comes now, until `alive` is called, `grace_seconds`: it may take longer than a step."""
        self._arm(self.grace_seconds)

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def close(self) -> None:
        """Ends it."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
