"""The watchdog: a worker that makes no step for too long says where it hangs, and dies so that its group restarts.

A hanging rank (a lost collective, a dead disk, a deadlock) stops all others inside a collective without an error. The
watchdog is a thread of the interpreter's own C code, so it also fires while Python is stuck in a call.
"""

import faulthandler
from pathlib import Path


class Watchdog:
    """Ends the process when `alive` was not called for `seconds`, and writes the stacks of all threads to `path`."""

    def __init__(self, seconds: float, path: Path) -> None:
        self.seconds = seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def alive(self) -> None:
        """Says that the worker is getting on; call it at least once a step."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Looks away, until `alive` is called again: what comes now has a limit of its own."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Ends the watch."""
        self.pause()
        self._file.close()
