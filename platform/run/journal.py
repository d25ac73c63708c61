"""Journals: files of JSON lines that survive a crash, threads that write them, and a run's notices to people."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from domainshuttle.pipelines.storage.atomic import atomic_file

logger = logging.getLogger(__name__)


class Journal:
    """Lines of JSON in a file that is only appended to. A line is whole or skipped, whenever its writer died."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def append(self, records: Iterable[Mapping[str, Any]], sync: bool = False) -> None:
        """Appends at once; `sync` waits until the disk has it. Raises OSError, for a full disk for example."""
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        if not data:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            with contextlib.suppress(OSError):  # released by closing; not every file system has locks
                lock_descriptor(file.fileno(), poll_interval=0.001)
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a torn line must not swallow this one
                    data = b"\n" + data
            whole = written = file.seek(0, os.SEEK_END)
            try:
                while data:
                    count = file.write(data)
                    data, written = data[count:], written + count
            except OSError:
                with contextlib.suppress(OSError):  # half a line helps nobody, and all are tried again
                    if file.seek(0, os.SEEK_END) == written:
                        file.truncate(whole)
                raise
            if sync:
                os.fsync(file.fileno())

    def read(self, offset: int = 0, lines: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """The whole records from byte `offset`, of at most `lines` lines, and the offset to go on from."""
        records: list[dict[str, Any]] = []
        if not self.path.exists():
            return records, offset
        with self.path.open("rb") as file:
            file.seek(offset)
            while lines is None or lines > 0:
                line = file.readline()
                if not line.endswith(b"\n"):  # the end, or a line that is still being written
                    break
                offset += len(line)
                lines = None if lines is None else lines - 1
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        records.append(record)
        return records, offset

    def bookmark(self) -> dict[str, Any]:
        """What the journal's reader saved of how far it has got; at first, and where that is damaged, {"offset": 0}."""
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self.path.with_suffix(".read.json").read_text())
            if isinstance(state, dict) and isinstance(state.get("offset"), int):
                return state
        return {"offset": 0}

    def set_bookmark(self, state: Mapping[str, Any]) -> None:
        """Saves `state`, which has the `offset` to go on from, in a file beside the journal; never half."""
        with atomic_file(self.path.with_suffix(".read.json"), sync=False) as aside:
            aside.write_text(json.dumps(state))

    def size(self) -> int:
        """Bytes of the file; none where there is none."""
        return self.path.stat().st_size if self.path.exists() else 0

    def unread(self) -> int:
        """Bytes behind the bookmark."""
        return max(0, self.size() - self.bookmark()["offset"])


class JournalWriter:
    """Appends to a journal from a thread of its own, so that a slow or full disk never stops the caller.

    Records that could not be written wait in memory and are tried again each second, with those after them, and at
    last when the writer is closed. A record may then be in the file twice, so readers must know records by something in
    them.
    """

    def __init__(self, journal: Journal, sync: bool, limit: int = 20_000) -> None:
        self._journal, self._sync, self._limit = journal, sync, limit
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(limit)
        self._closed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, record: Mapping[str, Any]) -> None:
        """Queues a record and returns at once. When `limit` wait for a disk that hangs, it is dropped and counted."""
        try:
            if self._closed:
                raise queue.Full
            self._queue.put_nowait(record)
        except queue.Full:  # losing a point is better than losing GPU-hours
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("%s is closed or its disk hangs: records are dropped", self._journal.path)

    def close(self, timeout: float = 5.0) -> bool:
        """Waits up to `timeout` seconds until all that was put is in the file, and ends the thread; True when it is."""
        deadline = time.monotonic() + timeout
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            with contextlib.suppress(queue.Full):  # wakes a thread that waits for records
                self._queue.put_nowait(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        waiting: list[Mapping[str, Any]] = []
        failing = False
        while waiting or not (self._closed and self._queue.empty()):
            with contextlib.suppress(queue.Empty):
                record = self._queue.get(timeout=1.0 if waiting else None)
                while record is not None:
                    waiting.append(record)
                    record = self._queue.get_nowait() if len(waiting) < self._limit else None
            try:
                self._journal.append(waiting, self._sync)
                waiting, failing = [], False
            except OSError as error:
                if not failing:  # once, not each second that the disk stays full
                    logger.warning("%s can not be written, records wait in memory: %s", self._journal.path, error)
                failing = True


SKIPPED, FAILED, MOVED, WAITING = "skipped", "failed", "moved", "waiting"


class Notices:
    """What the driver has to say to people about a run: shown once, and kept in a file of the run."""

    def __init__(self, path: Path, echo: Callable[[str], None]) -> None:
        self._journal, self._echo = Journal(path), echo
        self._given: dict[tuple[str, str, str], None] = {}

    def add(self, segment: str, kind: str, text: str, **more: str) -> None:
        """Shows and keeps a line about a segment; `kind` is `skipped`, of a checkpoint, or of workers `failed`, `moved`
        (they start again for another reason than a fault) or `waiting`. What this driver has said already, word for
        word, is not said again: of checkpoints at all, of workers until others start. `more` is kept beside it, for
        programs."""
        if (segment, kind, text) in self._given:
            return
        self._given[segment, kind, text] = None
        self._echo(text)
        with contextlib.suppress(OSError):  # of a full disk: people have seen it
            self._journal.append([{"segment": segment, "kind": kind, "text": text, "time": time.time(), **more}])

    def other_workers(self) -> None:
        """From now on what is said of workers is of others than before."""
        self._given = {key: None for key in self._given if key[1] == SKIPPED}

    def given(self, segment: str, kind: str) -> list[str]:
        """The texts of a kind about a segment."""
        return [text for of, what, text in self._given if (of, what) == (segment, kind)]
