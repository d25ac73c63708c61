"""The ledger: what became of every device-hour of a run, in a file that only grows and outlives every crash.

`ledger.jsonl` lies beside the checkpoints. Each attempt (one start of the worker group) appends a `start` line,
`progress` lines and, if something is left to write it, an `end` line. A line carries the seconds since the one before
by what they went to, and is synced to the disk off the caller's thread. One torn by a crash is passed over.

Steps are only productive while they are preserved: when a later attempt, or a rollback, goes on from step 40 of a
segment that had reached step 57, the seconds of steps 41 to 57 move from productive to lost. Nobody has to say so: the
summary sees it in the recorded ranges of steps. Time that nobody attributed is `other`; time between the last line of a
killed attempt and the driver's notice is lost. The parts always add up to what was used. The unit is the device-hour:
seconds times devices, a device being a GPU or, where there is none, a worker.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainshuttle.platform.spool import Journal, JournalWriter

logger = logging.getLogger(__name__)

_Range = tuple[str, int, int, float]  # segment, first and last step, productive hours between them

CATEGORIES = ("productive", "lost", "starting", "waiting", "checkpointing", "other")


@dataclass(frozen=True)
class LedgerSummary:
    """Device-hours of all attempts so far. `used` is the sum of the six parts; `budget` is None if there is none."""

    used: float
    productive: float
    lost: float
    starting: float
    waiting: float
    checkpointing: float
    other: float
    attempts: int
    budget: float | None = None

    @property
    def goodput(self) -> float:
        """Productive time that was preserved / all time; 1 before anything was used."""
        return self.productive / self.used if self.used > 0 else 1.0

    @property
    def left(self) -> float | None:
        """Device-hours left of the budget, negative when overspent."""
        return None if self.budget is None else self.budget - self.used

    @property
    def spent(self) -> bool:
        """Whether there is a budget and it is used up."""
        return self.left is not None and self.left <= 0

    def metrics(self) -> dict[str, float]:
        """The values to track, by the names of the metrics."""
        values = {"gpu_hours/used": self.used, "gpu_hours/productive": self.productive, "gpu_hours/lost": self.lost}
        return values if self.budget is None else {**values, "gpu_hours/budget": self.budget}


class Attempt:
    """One start of the worker group, as it accounts for itself; made by `Ledger.start`, in one process of the group."""

    def __init__(self, ledger: Ledger, devices: int, segment: str, step: int, began: float | None) -> None:
        self.id = uuid.uuid4().hex[:12]
        self._clock = ledger.clock
        self._devices, self._segment, self._step, self._reached = devices, segment, step, step
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._last = self._clock() if began is None else began
        self._lines, self._ended = 0, False
        self._seconds["starting"] = max(0.0, self._clock() - self._last)
        ledger.journal.append([self._line("start")], sync=True)  # at once: an attempt that dies early was one too
        self._writer = JournalWriter(ledger.journal, sync=True)

    def add(self, category: str, seconds: float) -> None:
        """Adds seconds of the training thread to a category; what nobody adds becomes `other`. Raises ValueError."""
        if category not in CATEGORIES:
            raise ValueError(f"ledger category {category!r}: expected one of {', '.join(CATEGORIES)}")
        self._seconds[category] += max(0.0, seconds)

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Adds the time of the block, also of one that raises, to a category."""
        began = self._clock()
        try:
            yield
        finally:
            self.add(category, self._clock() - began)

    def progress(self, step: int, every: float = 0.0) -> None:
        """Notes that `step` is done; writes a line when the last one is `every` seconds old.

        Write one (`every` 0) whenever a checkpoint is whole: what a killed attempt had not written counts as lost.
        """
        self._reached = step
        if self._clock() - self._last >= every:
            self._writer.put(self._line("progress"))

    def enter(self, segment: str, step: int) -> None:
        """Goes on at `step` of the next segment, or of this one after a rollback, which loses what was beyond it."""
        self._writer.put(self._line("progress"))
        self._segment, self._step, self._reached = segment, step, step
        self._writer.put(self._line("enter"))

    def end(self, reason: str, timeout: float = 5.0) -> bool:
        """Writes the last line, once, with a reason in a few words; True if it is on the disk in `timeout` seconds."""
        if not self._ended:
            self._ended = True
            self._writer.put({**self._line("end"), "reason": reason})
        return self._writer.close(timeout)

    def hours_since_last_line(self) -> float:
        """Device-hours that no line tells of yet."""
        return max(0.0, self._clock() - self._last) * self._devices / 3600

    def _line(self, kind: str) -> dict[str, Any]:
        """The line of what happened since the last one; begins the next."""
        now = self._clock()
        self._seconds["other"] += max(0.0, now - self._last - sum(self._seconds.values()))
        line = {
            "kind": kind,
            "attempt": self.id,
            "line": self._lines,
            "time": now,
            "devices": self._devices,
            "segment": self._segment,
            "steps": [self._step, self._reached],
            "seconds": {key: round(value, 6) for key, value in self._seconds.items() if value},
        }
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._last, self._step, self._lines = now, self._reached, self._lines + 1
        return line


class Ledger:
    """The account of a run in the file `path`, which any number of processes may read and append to."""

    def __init__(self, path: Path | str, clock: Callable[[], float] = time.time) -> None:
        self.journal, self.clock = Journal(path), clock
        self._offset, self._attempts = 0, 0
        self._seen: set[tuple[str, int]] = set()
        self._open: dict[str, dict[str, Any]] = {}  # the last line of each attempt that has not ended
        self._hours = dict.fromkeys(CATEGORIES, 0.0)
        self._by_segment: dict[str, float] = {}
        self._ranges: list[_Range] = []
        self._newest = ""  # the attempt that started last
        self._entries: list[tuple[str, str, int]] = []  # attempt, segment and step of each start and enter
        self._begun: dict[str, int] = {}  # how many entries there were when an attempt had started

    def start(self, devices: int, segment: str, step: int, began: float | None = None) -> Attempt:
        """Begins an attempt on `devices` devices that goes on after `step` of `segment`.

        `began` is when its processes started, in seconds since 1970: the time since then is `starting`. Raises OSError
        when the ledger can not be written.
        """
        return Attempt(self, devices, segment, step, began)

    def end_open(self, reason: str) -> int:
        """Ends the attempts whose workers died without a last line, now: the time since their last line is lost.

        For the driver, when it notices a failure. Returns how many there were.
        """
        self._read()
        now = self.clock()
        ends = []
        for line in self._open.values():
            lost = max(0.0, now - line["time"])
            end = {"kind": "end", "line": line["line"] + 1, "time": now, "seconds": {"lost": lost}, "reason": reason}
            ends.append({**line, **end, "steps": [line["steps"][1]] * 2})
        self.journal.append(ends, sync=True)
        return len(ends)

    def summary(self, budget_gpu_hours: float | None = None) -> LedgerSummary:
        """The account of all whole lines; reads only those that are new since the last call."""
        self._read()
        return LedgerSummary(sum(self._hours.values()), **self._hours, attempts=self._attempts, budget=budget_gpu_hours)

    def segment_hours(self, segment: str) -> float:
        """Device-hours that the attempts at a segment used, whatever for."""
        self._read()
        return self._by_segment.get(segment, 0.0)

    def snapshot(self) -> dict[str, Any]:
        """The account as one small JSON-ready record, to be kept in a checkpoint."""
        self._read()
        steps: dict[str, tuple[int, int, float]] = {}
        for segment, first, last, hours in self._ranges:
            low, high, total = steps.get(segment, (first, last, 0.0))
            steps[segment] = (min(low, first), max(high, last), total + hours)
        ranges = [[segment, *entry] for segment, entry in steps.items()]
        return {
            "kind": "snapshot", "hours": dict(self._hours), "attempts": self._attempts, "ranges": ranges,
            "by_segment": dict(self._by_segment),
        }  # fmt: skip

    def restore(self, snapshot: Mapping[str, Any]) -> bool:
        """Begins the ledger with a checkpoint's snapshot if its file is gone or empty (on another disk); True if so."""
        self._read()
        if self._offset:
            return False
        self.journal.append([snapshot], sync=True)
        return True

    def _read(self) -> None:
        lines, self._offset = self.journal.read(self._offset)
        for line in lines:
            try:
                self._fold(line)
            except (KeyError, TypeError, ValueError, AttributeError):
                logger.warning("%s: a line that is not the ledger's is passed over", self.journal.path)

    def _fold(self, line: dict[str, Any]) -> None:
        if line["kind"] == "snapshot":
            self._attempts += line["attempts"]
            self._hours = {key: self._hours[key] + line["hours"][key] for key in CATEGORIES}
            self._ranges += [tuple(entry) for entry in line["ranges"]]
            for segment, hours in line["by_segment"].items():
                self._by_segment[segment] = self._by_segment.get(segment, 0.0) + hours
            return
        mark = (line["attempt"], line["line"])
        segment, (first, last) = line["segment"], line["steps"]
        hours = {key: line["seconds"].get(key, 0.0) * line["devices"] / 3600 for key in CATEGORIES}
        if mark in self._seen:
            return
        self._seen.add(mark)
        self._attempts += line["line"] == 0
        self._open[line["attempt"]] = line
        if line["kind"] == "end":
            del self._open[line["attempt"]]
        if line["kind"] == "start":
            self._newest = line["attempt"]
        if line["kind"] in ("start", "enter") and line["attempt"] == self._newest:
            self._ranges = self._preserved(self._ranges, segment, first)
            self._entries.append((line["attempt"], segment, first))
            self._begun.setdefault(line["attempt"], len(self._entries))
        for key, value in hours.items():
            self._hours[key] += value
        self._by_segment[segment] = self._by_segment.get(segment, 0.0) + sum(hours.values())
        if hours["productive"]:  # without a step that was finished, it is time of the next one
            done = [(segment, first, max(last, first + 1), hours["productive"])]
            for attempt, again, step in self._entries[self._begun.get(line["attempt"], 0) :]:
                if again == segment and attempt != line["attempt"]:  # a late line: the next attempt is at work already
                    done = self._preserved(done, segment, step)
            self._ranges += done

    def _preserved(self, ranges: list[_Range], segment: str, step: int) -> list[_Range]:
        """The ranges without what is beyond `step` of the segment: done again, it moves from productive to lost."""
        kept = []
        for name, first, last, hours in ranges:
            if name == segment and last > step:
                lost = hours * (last - max(first, step)) / (last - first)
                self._hours["productive"] -= lost
                self._hours["lost"] += lost
                last, hours = step, hours - lost
            if last > first:
                kept.append((name, first, last, hours))
        return kept
