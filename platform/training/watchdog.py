"""The watchdog: a worker that makes no step for too long says where it hangs, and dies so that its group restarts.

A hanging rank (a lost collective, a dead disk, a deadlock) stops all others inside a collective without an error. The
watchdog is a thread of the interpreter's own C code, so it also fires while Python is stuck in a call.
"""

import faulthandler
from pathlib import Path


class Watchdog:
    """Ends the process when it shows no sign of life for `seconds`, and writes the stacks of all threads to `path`.

    It begins at once, and patiently: a worker has `patience` seconds to build and restore, and for a save.
    """

    def __init__(self, seconds: float, patience: float, path: Path) -> None:
        self.seconds, self.patience = seconds, patience
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self.be_patient()

    def alive(self) -> None:
        """Says that the worker is getting on; call it at least once a step."""
        self._arm(self.seconds)

    def be_patient(self) -> None:
        """Says that what comes now may take longer than a step, until `alive` is called again."""
        self._arm(self.patience)

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def close(self) -> None:
        """Ends the watch."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
