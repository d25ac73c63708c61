"""What processes beside the driver have to say to people: lines in a file of the run, which the driver shows.

Where the workers start again is decided in a process of Ray's, whose output nobody reads.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from domainshuttle.platform.spool import Journal

PASSED_OVER, FAILED, WAITING = "passed over", "failed", "waiting"


class Notices:
    """The notices of a run. Any process may `add`; `new` gives those since it was asked last, or since it was made."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)
        self._offset = path.stat().st_size if path.exists() else 0
        self._told: dict[tuple[str, str, str], None] = {}

    def add(self, segment: str, kind: str, text: str) -> None:
        """Notes a line about a segment; `kind` is `passed over`, of a checkpoint, `failed` or `waiting`, of workers."""
        self._journal.append([{"segment": segment, "kind": kind, "text": text, "time": time.time()}])

    def new(self) -> Iterator[tuple[str, str, str]]:
        """Segment, kind and text of each that is new; what is said again word for word is given once."""
        lines, self._offset = self._journal.read(self._offset)
        for line in lines:
            entry = (line["segment"], line["kind"], line["text"])
            if entry not in self._told:
                self._told[entry] = None
                yield entry

    def told(self, segment: str, kind: str) -> list[str]:
        """The texts that `new` has given."""
        return [text for of, what, text in self._told if (of, what) == (segment, kind)]
