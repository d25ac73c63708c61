"""Where a run is, in a small file that rank 0 replaces: for people, and for the driver how the workers ended."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class ProgressFile:
    """Writes a run's `progress.json`. A full disk is warned about, once until there is room, and ends nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._full = False

    def write(self, content: dict[str, Any], last: bool = False) -> None:
        """Replaces what was there; `last` says how it ended, for which there is room where the last one was."""
        text, partial = json.dumps(content), self.path.with_suffix(".partial")
        with self.suppressed():
            try:
                partial.write_text(text)
                partial.rename(self.path)
            except OSError:
                if not last:
                    raise
                with self.path.open("r+") as file:
                    file.write(text)
                    file.truncate()

    @contextlib.contextmanager
    def suppressed(self) -> Iterator[None]:
        """What only people read is no reason to end a step."""
        try:
            yield
            self._full = False
        except OSError as error:
            if not self._full:
                logger.warning("where the run is can not be written: %s", error)
            self._full = True
