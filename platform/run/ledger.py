"""The ledger: what became of every device-hour of a run, in a file that only grows and outlives every crash.

`ledger.jsonl` lies beside the checkpoints. Each attempt (one start of the worker group) appends a `start` line,
`progress` lines and, if something is left to write it, an `end` line. A line carries the seconds since the one before
by what they went to, and is synced to the disk off the caller's thread. One torn by a crash is skipped.

Steps are only productive while they are preserved: when a later attempt goes on from step 40 of a
segment that had reached step 57, the seconds of steps 41 to 57 move from productive to lost. Nobody has to say so: the
summary sees it in the recorded ranges of steps. Time that nobody attributed is `other`. The time after the last line of
a killed attempt is lost, until its death is noticed or the next one begins; no second counts in two attempts. The parts
always add up to what was used. The unit is the device-hour: seconds times devices, a device being a GPU or, where there
is none, a worker.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainshuttle.platform.run.journal import Journal, JournalWriter

logger = logging.getLogger(__name__)

_Range = tuple[str, int, int, float, str]  # segment, first and last step, productive hours between them, attempt

CATEGORIES = ("productive", "lost", "starting", "waiting", "checkpointing", "sampling", "other")

ALLOWANCE = 30.0
"""Seconds that the workers of a dead driver are taken to have lived on after the last sign of life."""


@dataclass(frozen=True)
class LedgerSummary:
    """Device-hours of all attempts so far. `used` is the sum of the seven parts; `budget` is None if there is none."""

    used: float
    productive: float
    lost: float
    starting: float
    waiting: float
    checkpointing: float
    sampling: float
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
        values = {f"gpu_hours/{name}": getattr(self, name) for name in ("used", *CATEGORIES)}
        return values if self.budget is None else {**values, "gpu_hours/budget": self.budget}


@dataclass
class AttemptRecord:
    """What the ledger tells of one attempt."""

    segment: str
    first: int
    """The step that it went on after."""
    last: int
    """The step that it reached."""
    devices: int
    began: float
    """Seconds since 1970, as is `seen`."""
    seen: float
    """The time of its last line."""
    reason: str | None = None
    """How it ended; None: it has not, as far as is known."""
    hours: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    """Device-hours by category; what a later attempt did again has moved to `lost`."""


class Attempt:
    """One start of the worker group, as it accounts for itself; made by `Ledger.start`, in one process of the group."""

    def __init__(
        self, ledger: Ledger, devices: int, segment: str, step: int, began: float | None, lost: float = 0.0
    ) -> None:
        """`lost` are seconds before `began` that no attempt had the devices for."""
        self.id = uuid.uuid4().hex[:12]
        self._ledger, self._clock = ledger, ledger.clock
        self._queued: list[dict[str, Any]] = []  # lines that the ledger may not have read yet
        self._devices, self._segment, self._step, self._reached = devices, segment, step, step
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._last = self._clock() if began is None else began
        self._lines, self._ended = 0, False
        self._seconds["starting"] = max(0.0, self._clock() - self._last)
        self._seconds["lost"], self._last = lost, self._last - lost
        self._writer = JournalWriter(ledger.journal, sync=True)
        line = self._line("start")
        try:
            ledger.journal.append([line], sync=True)  # at once: an attempt that dies early was one too
        except OSError:  # of a full disk, about which the writer warns
            self._writer.put(line)

    def add(self, category: str, seconds: float) -> None:
        """Adds seconds of the training thread to a category; what nobody adds becomes `other`. Raises ValueError."""
        if category not in CATEGORIES:
            raise ValueError(f"ledger category {category!r}: expected one of {', '.join(CATEGORIES)}")
        self._seconds[category] += max(0.0, seconds)

    def progress(self, step: int, every: float = 0.0) -> None:
        """Notes that `step` is done; writes a line when the last one is `every` seconds old.

        Write one (`every` 0) whenever a checkpoint is whole: what a killed attempt had not written counts as lost.
        """
        self._reached = step
        if self._clock() - self._last >= every:
            self._writer.put(self._line("progress"))

    def end(self, reason: str, timeout: float = 5.0) -> bool:
        """Writes the last line, once, with a reason in a few words; True if it is on the disk in `timeout` seconds."""
        if not self._ended:
            self._ended = True
            self._writer.put({**self._line("end"), "reason": reason})
        return self._writer.close(timeout)

    def hours_since_last_line(self) -> float:
        """Device-hours that no line tells of yet."""
        return max(0.0, self._clock() - self._last) * self._devices / 3600

    def unwritten(self) -> dict[str, float]:
        """Device-hours by category that the attempt was told of and that the ledger had not when it was last read."""
        self._queued = [line for line in self._queued if not self._ledger.has_read(self.id, line["line"])]
        told = [self._seconds, *(line["seconds"] for line in self._queued)]
        return {key: sum(seconds.get(key, 0.0) for seconds in told) * self._devices / 3600 for key in CATEGORIES}

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
        self._queued.append(line)
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
        self._newest, self._newest_began = "", 0.0  # the attempt that started last
        self._latest = 0.0  # time of the latest line
        self._records: dict[str, AttemptRecord] = {}
        self._entries: list[tuple[str, str, int]] = []  # attempt, segment and step of each start
        self._begun: dict[str, int] = {}  # how many entries there were when an attempt had started

    def start(
        self, devices: int, segment: str, step: int, began: float | None = None, since: float | None = None
    ) -> Attempt:
        """Begins an attempt on `devices` devices that goes on after `step` of `segment`, and ends those before it.

        `began` is when its processes started, in seconds since 1970: the time since then is `starting`. `since` is when
        the devices were first asked for: between an attempt that ended after that and this one they stood idle, which
        is lost. What can not be written, on a full disk, is written when there is room.
        """
        began = self.clock() if began is None else min(began, self.clock())
        try:
            self.end_open("the workers were started again", until=began)
        except OSError as error:
            logger.warning(
                "%s can not be written; the time since the last line is not counted: %s", self.journal.path, error
            )
        began, lost = max(began, self._latest), 0.0
        if since is not None and since < self._latest:
            lost = began - self._latest
        return Attempt(self, devices, segment, step, began, lost)

    def end_open(self, reason: str, until: float | None = None) -> int:
        """Ends an attempt whose workers died without a last line, now: the time since its last line is lost.

        For whoever notices a failure. `until`, in seconds since 1970, is when the devices were free again, if that was
        before now. Returns how many there were. Raises OSError.
        """
        self._read()
        now = self.clock() if until is None else min(until, self.clock())
        ends = []
        for line in self._open.values():
            lost = max(0.0, now - line["time"])
            end = {"kind": "end", "line": line["line"] + 1, "time": line["time"] + lost, "reason": reason}
            ends.append({**line, **end, "seconds": {"lost": lost}, "steps": [line["steps"][1]] * 2})
        self.journal.append(ends, sync=True)
        self._read()
        return len(ends)

    def last_line(self) -> float | None:
        """When the attempt that has not ended wrote last, in seconds since 1970; None where there is none."""
        self._read()
        return max((line["time"] for line in self._open.values()), default=None)

    def attempts(self) -> list[AttemptRecord]:
        """Each attempt by itself, oldest first. A first one without devices stands for what a checkpoint's snapshot
        told of those before. Their hours add up to the summary's."""
        self._read()
        return list(self._records.values())

    def summary(self, budget_gpu_hours: float | None = None) -> LedgerSummary:
        """The account of all whole lines; reads only those that are new since the last call."""
        self._read()
        return LedgerSummary(sum(self._hours.values()), **self._hours, attempts=self._attempts, budget=budget_gpu_hours)

    def segment_summary(self, segment: str) -> LedgerSummary:
        """The account of the attempts at one segment. What a checkpoint's snapshot told of it, without parts, is
        `other`."""
        self._read()
        return self._segment_summary(segment)

    def summaries(self, segment: str, budget_gpu_hours: float | None = None) -> tuple[LedgerSummary, LedgerSummary]:
        """The account of all lines and that of one segment, both of the same lines: others come at any moment."""
        return self.summary(budget_gpu_hours), self._segment_summary(segment)

    def _segment_summary(self, segment: str) -> LedgerSummary:
        mine = [one for one in self._records.values() if one.segment == segment]
        hours = {key: sum(one.hours[key] for one in mine) for key in CATEGORIES}
        hours["other"] += max(0.0, self._by_segment.get(segment, 0.0) - sum(hours.values()))
        return LedgerSummary(sum(hours.values()), **hours, attempts=len(mine))

    def segment_hours(self, segment: str) -> float:
        """Device-hours that the attempts at a segment used, whatever for."""
        self._read()
        return self._by_segment.get(segment, 0.0)

    def has_read(self, attempt: str, line: int) -> bool:
        """Whether a line of an attempt was there when the file was last read."""
        return (attempt, line) in self._seen

    def snapshot(self) -> dict[str, Any]:
        """The account as one small JSON-ready record, to be kept in a checkpoint."""
        self._read()
        steps: dict[str, tuple[int, int, float]] = {}
        for segment, first, last, hours, _ in self._ranges:
            low, high, total = steps.get(segment, (first, last, 0.0))
            steps[segment] = (min(low, first), max(high, last), total + hours)
        ranges = [[segment, *entry] for segment, entry in steps.items()]
        return {
            "kind": "snapshot", "hours": dict(self._hours), "attempts": self._attempts, "ranges": ranges,
            "by_segment": dict(self._by_segment),
        }  # fmt: skip

    def restore(self, snapshot: Mapping[str, Any]) -> bool:
        """Begins the ledger with a checkpoint's snapshot if its file is gone, or has nothing of it; True if so."""
        self._read()
        if self._records:
            return False
        self.journal.append([snapshot], sync=True)
        return True

    def _read(self) -> None:
        lines, self._offset = self.journal.read(self._offset)
        for line in lines:
            try:
                self._fold(line)
            except (KeyError, TypeError, ValueError, AttributeError):
                logger.warning("%s: a line that is not the ledger's is skipped", self.journal.path)

    def _fold(self, line: dict[str, Any]) -> None:
        if line["kind"] == "snapshot":
            self._fold_snapshot(line)
            return
        attempt, mark = line["attempt"], (line["attempt"], line["line"])
        segment, (first, last) = line["segment"], line["steps"]
        time, devices, reason = float(line["time"]), line["devices"], line.get("reason", "")
        seconds = {key: float(line["seconds"].get(key, 0.0)) for key in CATEGORIES}
        ended = attempt in self._records and self._records[attempt].reason is not None
        if mark in self._seen or ended:  # a worker that hung may not know that it was replaced
            return
        self._seen.add(mark)
        self._attempts += line["line"] == 0
        self._latest = max(self._latest, time)
        if line["kind"] == "start":
            self._open.clear()  # there is one group of workers at a time
            self._newest, self._newest_began = attempt, time - sum(seconds.values())
        elif attempt != self._newest:
            # the end of an attempt that died, noticed late: what the next one tells of is not its time any more
            began = time - sum(seconds.values())
            _take(seconds, max(0.0, time - max(began, self._newest_began)))
        if attempt == self._newest:
            self._open[attempt] = line
        if line["kind"] == "end":
            self._open.pop(attempt, None)
        if line["kind"] == "start":
            self._ranges = self._preserved(self._ranges, segment, first)
            self._entries.append((attempt, segment, first))
            self._begun.setdefault(attempt, len(self._entries))
        record = self._records.setdefault(
            attempt, AttemptRecord(segment, first, last, devices, time - sum(seconds.values()), time)
        )
        record.seen = time
        if segment == record.segment:
            record.last = max(record.last, last)
        if line["kind"] == "end":
            record.reason = reason
        hours = {key: value * devices / 3600 for key, value in seconds.items()}
        for key, value in hours.items():
            self._hours[key] += value
            record.hours[key] += value
        self._by_segment[segment] = self._by_segment.get(segment, 0.0) + sum(hours.values())
        if hours["productive"]:  # without a step that was finished, it is time of the next one
            done: list[_Range] = [(segment, first, max(last, first + 1), hours["productive"], attempt)]
            for other, again, step in self._entries[self._begun.get(attempt, 0) :]:
                if again == segment and other != attempt:  # a late line: the next attempt is at work already
                    done = self._preserved(done, segment, step)
            self._ranges += done

    def _fold_snapshot(self, line: dict[str, Any]) -> None:
        hours = {key: float(line["hours"].get(key, 0.0)) for key in CATEGORIES}
        self._attempts += line["attempts"]
        record = self._records.setdefault("", AttemptRecord("", 0, 0, 0, 0.0, 0.0, "before"))
        for key, value in hours.items():
            self._hours[key] += value
            record.hours[key] += value
        self._ranges += [(*entry[:4], "") for entry in line["ranges"]]
        for segment, used in line["by_segment"].items():
            self._by_segment[segment] = self._by_segment.get(segment, 0.0) + used

    def _preserved(self, ranges: list[_Range], segment: str, step: int) -> list[_Range]:
        """The ranges without what is beyond `step` of the segment: done again, it moves from productive to lost."""
        kept: list[_Range] = []
        for name, first, last, hours, attempt in ranges:
            if name == segment and last > step:
                lost = hours * (last - max(first, step)) / (last - first)
                for account in (self._hours, self._records[attempt].hours):
                    account["productive"] -= lost
                    account["lost"] += lost
                last, hours = step, hours - lost
            if last > first:
                kept.append((name, first, last, hours, attempt))
        return kept


def _take(seconds: dict[str, float], excess: float) -> None:
    """Takes `excess` seconds away, first from what says least."""
    for category in reversed(CATEGORIES):
        taken = min(excess, seconds[category])
        seconds[category] -= taken
        excess -= taken
