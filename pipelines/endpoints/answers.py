"""What endpoints answered, kept for good: by a hash of what was asked, in files that are only appended to.

Each process writes a file of its own, so that none waits for another, also across machines. A line is one answer; a
line that a kill cut short is passed over. An answer that is kept is never asked for again, unless it is forgotten: then
a line says which one holds no more.
"""

import json
import os
import socket
import threading
import uuid
from collections.abc import Collection, Iterator
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
        self._states: dict[str, str] = {}
        lines = [line for path in sorted(folder.glob(f"*{_SUFFIX}")) for line in self._scan(path)]
        void = {(name, offset) for *_, content in lines for name, offset in content.get("void", ())}
        for path, offset, size, content in lines:
            self.spent += content.get("cost", 0.0)
            if "key" in content and (path.name, offset) not in void and content["key"] not in self._at:
                self._at[content["key"]] = path, offset, size
                self._states[content["key"]] = content["state"]

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
        line = json.dumps({"key": key, **answer, "cost": cost}).encode() + b"\n"
        with self._lock:
            self._at[key] = self._own, self._append(line), len(line)
            self._states[key] = answer.get("state", "")
            self.spent += cost

    def forget(self, states: Collection[str]) -> int:
        """Lets the answers of these states be asked for again, and returns how many they are. What they cost stays
        counted."""
        with self._lock:
            keys = [key for key, state in self._states.items() if state in states]
            if keys:
                void = [[self._at[key][0].name, self._at[key][1]] for key in keys]
                self._append(json.dumps({"void": void}).encode() + b"\n")
            for key in keys:
                del self._at[key], self._states[key]
        return len(keys)

    def _append(self, line: bytes) -> int:
        with self._own.open("ab") as file:
            offset = file.tell()
            file.write(line)
        return offset

    def _scan(self, path: Path) -> Iterator[tuple[Path, int, int, dict[str, Any]]]:
        """The whole lines of a file, without answers' texts: where each lies, and what it says."""
        offset = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                    if content is not None:
                        short = {name: content[name] for name in ("key", "cost", "void") if name in content}
                        if "key" in short:
                            short["cost"] = float(content["cost"])
                            short["state"] = str(content.get("state", ""))
                        yield path, offset, len(line), short
                except (ValueError, KeyError, TypeError):
                    pass  # a kill in the middle of a line, or a disk that was full
                offset += len(line)
