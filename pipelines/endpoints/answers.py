"""What endpoints answered, kept for good: by a hash of what was asked, in files that are only appended to.

Each process writes a file of its own, so that none waits for another, also across machines. A line is one answer; a
line that a kill cut short is passed over. An answer that is kept is never asked for again.
"""

import json
import os
import socket
import threading
import uuid
from pathlib import Path
from typing import Any

_SUFFIX = ".answers.jsonl"


class Answers:
    """The answers in a folder. Safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.spent = 0.0
        """What the answers in the folder had cost when it was opened, and those of this process since."""
        self._at: dict[str, tuple[Path, int, int]] = {}
        self._lock = threading.Lock()
        self._own = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            self._scan(path)

    def __len__(self) -> int:
        return len(self._at)

    def find(self, key: str) -> dict[str, Any] | None:
        """The answer that is kept of a question."""
        with self._lock:
            place = self._at.get(key)
        if place is None:
            return None
        path, offset, size = place
        with path.open("rb") as file:
            file.seek(offset)
            content: dict[str, Any] = json.loads(file.read(size))
        return content

    def keep(self, key: str, answer: dict[str, Any], cost: float) -> None:
        """Appends an answer, which outlives the process."""
        line = json.dumps({"key": key, **answer, "cost": cost}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            with self._own.open("ab") as file:
                offset = file.tell()
                file.write(line)
            self._at[key] = self._own, offset, len(line)
            self.spent += cost

    def _scan(self, path: Path) -> None:
        offset = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                    if content is not None:
                        self._at.setdefault(content["key"], (path, offset, len(line)))
                        self.spent += content["cost"]
                except (ValueError, KeyError, TypeError):
                    pass  # a kill in the middle of a line, or a disk that was full
                offset += len(line)
