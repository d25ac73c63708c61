"""Writing checkpoints while training goes on.

A save stops the training for a copy of the state in memory, no longer. A thread of each rank then writes that rank's
files into the store and leaves a note, `rank-00000.json`, with their checksums; rank 0's thread waits for all notes,
adds `state.json` and, last, `manifest.json`, and removes what need not be kept. The threads speak through the store
alone: collectives belong to the training, on the main thread, and there the ranks agree on what came of a save when
the next one begins.
"""

import contextlib
import dataclasses
import json
import logging
import queue
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.errors import counted
from domainshuttle.pipelines.storage import files as storage
from domainshuttle.platform.checkpoint.backend import STORE_FAULTS, FileEntry, describe_all
from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.retention import Retention
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.config.schema import CheckpointSection

Write = Callable[[Path], None]
"""Writes files of a rank, of a state copied before, into a folder; called on another thread."""

SPARE = 1.1
"""How much more than the files of the checkpoint before must be free."""

logger = logging.getLogger(__name__)


class SavesFailedError(CheckpointError):
    """So many saves in a row have failed that the run must end; on all ranks alike."""


@dataclass(frozen=True)
class Begun:
    """What the training waited for in a save, in seconds."""

    started: bool
    """False when the save was given up at once: the store was not reached, or too little was free."""
    waited: float
    """For the save before to end."""
    copied: float
    """For the copy of the state."""


@dataclass(frozen=True)
class Saved:
    """A save that has ended."""

    step: int
    name: str
    fault: str | None
    """Why there is no checkpoint; None: it is whole."""
    size: int = 0
    """Bytes of all ranks."""
    seconds: float = 0.0
    """From the copy of the state to the manifest; training went on meanwhile."""


class _Job:
    """A save under way on a rank."""

    def __init__(self, name: str, attempt: str, state: TrainingState, grace_seconds: float) -> None:
        self.name, self.attempt, self.state = name, attempt, state
        self.began = time.monotonic()
        self.deadline = self.began + grace_seconds
        self.written = threading.Event()
        """This rank's part is in the store, or `fault` says why it is not."""
        self.fault: str | None = None
        self.concluded = threading.Event()
        """On rank 0: `result` says what came of the whole save."""
        self.result: Saved | None = None
        self._given_up = threading.Event()
        self._reason = ""

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def give_up(self, reason: str) -> None:
        self._reason = reason
        self._given_up.set()

    def pause(self, seconds: float = 0.0) -> None:
        """Waits; raises CheckpointError as soon as the save is given up."""
        if self._given_up.wait(seconds):
            raise CheckpointError(self._reason)

    def conclude(self, fault: str | None, size: int = 0) -> Saved:
        self.result = self.ended(fault, size)
        self.concluded.set()
        return self.result

    def ended(self, fault: str | None, size: int = 0) -> Saved:
        return Saved(self.state.step, self.name, fault, size, time.monotonic() - self.began)


class AsyncCheckpointer:
    """Saves of one rank. All ranks call `save` and `wait` together, on the thread that trains.

    `gather` is a collective: it takes a rank's picklable value and returns those of all ranks, by rank.
    `estimated_bytes` is about what all ranks will write, for the check of free space before the first save.
    """

    def __init__(
        self,
        store: CheckpointStore,
        settings: CheckpointSection,
        rank: int,
        world_size: int,
        gather: Callable[[Any], Sequence[Any]],
        local_world_size: int = 1,
        estimated_bytes: int = 0,
    ) -> None:
        self.store, self.settings = store, settings
        self.rank, self.world_size, self.local_world_size = rank, world_size, local_world_size
        self._gather = gather
        self._retention = Retention(settings.keep, settings.keep_every, settings.keep_best)
        self._losses: dict[str, float | None] = {}
        self._retiring = threading.Lock()
        self._estimate = estimated_bytes
        self._lines: dict[str, int] = {}
        self._job: _Job | None = None
        self._late: _Job | None = None
        self._last: Saved | None = None
        self._thread: threading.Thread | None = None
        self._failed = 0
        self._ended: queue.SimpleQueue[Saved] = queue.SimpleQueue()
        # what a killed attempt left on this node; no rank saves before all are here
        shutil.rmtree(self._staging, ignore_errors=True)

    def save(self, state: TrainingState, *snapshots: Callable[[], Write]) -> Begun:
        """Begins a save; returns when the state is copied. Each snapshot copies a part and returns what writes it.

        Waits first for the save before, as there is memory for one copy. A save that fails, this one or the one
        before, is logged and made up for by the next; `checkpoint.max_failed` in a row raise SavesFailedError, on all
        ranks alike. The checkpoints before stay as they are in every case.
        """
        began = time.monotonic()
        self._settle()
        entries = self._gather(self._prepare(state))
        if problems := [problem for problem, _ in entries if problem]:
            failed = Saved(state.step, str(Name(state.segment, state.step)), "; ".join(problems))
            if self.rank == 0:
                self._ended.put(failed)
            self._count(failed)
            return Begun(False, time.monotonic() - began, 0.0)
        name, attempt, line = entries[0][1]
        waited = time.monotonic()
        writes = [snapshot() for snapshot in snapshots]
        copied = time.monotonic()
        self._job = job = _Job(name, attempt, dataclasses.replace(state, line=line), self.settings.timeout)
        self._thread = threading.Thread(target=self._run, args=(job, writes), name="checkpoint", daemon=True)
        self._thread.start()
        return Begun(True, waited - began, copied - waited)

    def wait(self) -> Saved | None:
        """Waits for the save under way, and for the removal of old ones: before a stop, and at a segment's end.

        Returns the last save, None when there was none; raises CheckpointError, on every rank, when it failed on any.
        """
        self._settle()
        if self._thread and self.rank == 0:
            self._thread.join(self.settings.timeout)
        if self._last and self._last.fault:
            raise CheckpointError(_failure(self._last))
        return self._last

    def ended(self) -> list[Saved]:
        """On rank 0, the saves that ended since the last call, whole or not. No collective, never waits."""
        ended = []
        with contextlib.suppress(queue.Empty):
            while True:
                ended.append(self._ended.get_nowait())
        return ended

    # On the thread that trains

    def _settle(self) -> None:
        """Waits for the save before and agrees on what came of it."""
        job, self._job = self._job, None
        if job is None:
            return
        # what a rank could not write it may not have been able to note in the store either, so the ranks ask each other
        if not job.written.wait(job.left()):
            self._late = job
            job.fault = f"rank {self.rank} was still writing after {self.settings.timeout:g} s"
        if fault := "; ".join(filter(None, self._gather(job.fault))):
            job.give_up(fault)
        if self.rank == 0 and not job.concluded.wait(job.left() + _LAST_FILES):
            self._late = job
        saved: Saved = self._gather(job.result or job.ended(fault or "rank 0 was still writing state and manifest"))[0]
        if saved.fault is None:
            self._estimate = saved.size
        self._count(saved)

    def _count(self, saved: Saved) -> None:
        """Counts failures in a row: of what all ranks agreed on, so that they all raise or none."""
        self._last = saved
        self._failed = self._failed + 1 if saved.fault else 0
        if saved.fault and self.rank == 0:
            logger.warning("%s (%d in a row)", _failure(saved), self._failed)
        if self._failed >= self.settings.max_failed:
            raise SavesFailedError(
                f"{counted(self._failed, 'checkpoint')} in a row could not be written, so the run ends; those before "
                "are intact. " + _failure(saved)
            )

    def _prepare(self, state: TrainingState) -> tuple[str | None, tuple[str, str, int]]:
        """What speaks against a save on this rank; and, of rank 0, where it goes."""
        plan = ("", "", 0)
        if self._late and not (self._late.concluded if self.rank == 0 else self._late.written).is_set():
            # it holds the copy of a state, and there is no memory for two
            return f"rank {self.rank} is still at work on the checkpoint of step {self._late.state.step}", plan
        try:
            if problem := self._too_full():
                return problem, plan
            if self.rank == 0:
                if state.segment not in self._lines:
                    self._lines[state.segment] = len(self.store.lines(state.segment)) - 1
                line = self._lines[state.segment]
                name = str(Name(state.segment, state.step, line))
                if self.store.place.listing(name):
                    self.store.clear(name)  # what a killed attempt, or damage, left of this step
                plan = (name, uuid.uuid4().hex, line)
        except (CheckpointError, *STORE_FAULTS) as error:
            return f"rank {self.rank}: {error}", plan
        return None, plan

    def _too_full(self) -> str | None:
        place, needed = self.store.place, int(self._estimate * SPARE)
        if place.remote:
            # a rank's files lie here until they are uploaded, beside those of the other ranks of the node
            needed = needed * self.local_world_size // self.world_size
            folder, remedy = str(self.store.scratch), "free some, or name a larger disk with checkpoint.scratch"
            free = storage.free_bytes(self.store.scratch)
        elif self.rank == 0:
            folder, free = place.redacted(), place.free_bytes()
            remedy = "free some, lower checkpoint.keep, or name a larger place with checkpoint.store"
        else:
            return None
        if free is None or free >= needed:
            return None
        return (
            f"rank {self.rank}: {folder} has {free / 2**30:.2f} GiB free, and a checkpoint takes "
            f"{needed / 2**30:.2f} GiB ({SPARE} times its size): {remedy}"
        )

    @property
    def _staging(self) -> Path:
        """Where this node's ranks write what is uploaded then."""
        return self.store.scratch / "staging"

    # On the thread that writes

    def _run(self, job: _Job, writes: list[Write]) -> None:
        note: dict[str, Any] = {"attempt": job.attempt, "rank": self.rank, "host": socket.gethostname()}
        try:
            note |= {"files": self._write_files(job, writes), "seconds": time.monotonic() - job.began}
        except Exception as error:  # whatever it is, it must reach the ranks, not end in a thread
            job.fault = note["fault"] = f"rank {self.rank}: {error or type(error).__name__}"
        writes.clear()  # the copy of the state
        try:
            self.store.place.write(f"{job.name}/{_note(self.rank)}", json.dumps(note).encode())
        except STORE_FAULTS as error:
            job.fault = job.fault or f"rank {self.rank}: {error}"
        job.written.set()
        if self.rank == 0:
            self._finish(job)

    def _write_files(self, job: _Job, writes: list[Write]) -> dict[str, FileEntry]:
        place = self.store.place
        # in the checkpoint's own folder, its files need only be renamed
        staging = (self._staging if place.remote else place.local(job.name)) / f".rank-{self.rank:05d}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            for write in writes:
                write(staging)
            paths = sorted(path for path in staging.rglob("*") if path.is_file())
            names = [path.relative_to(staging).as_posix() for path in paths]
            entries = describe_all(paths)
            job.pause()
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda path, name: place.take(path, f"{job.name}/{name}"), paths, names))
            place.settle(f"{job.name}/{name}" for name in names)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return {name: {**entry, "rank": self.rank} for name, entry in zip(names, entries, strict=True)}

    def _finish(self, job: _Job) -> None:
        try:
            files = self._collect(job)
            size = write_manifest(self.store.place, job.state, job.name, files)
        except Exception as error:  # as above
            saved = job.conclude(str(error) or type(error).__name__)
        else:
            saved = job.conclude(None, size)
        self._ended.put(saved)
        if saved.fault is None:
            written = Name(job.state.segment, job.state.step, job.state.line)
            try:
                with self._retiring:
                    self._losses.pop(job.name, None)  # of a damaged one that this replaced
                    self.store.retire(written, self._retention, self._losses)
            except STORE_FAULTS as error:
                logger.warning("old checkpoints could not be removed: %s", error)

    def _collect(self, job: _Job) -> dict[str, FileEntry]:
        """The files of all ranks, once all are there. Raises CheckpointError for a rank's fault or absence."""
        if job.fault:
            raise CheckpointError(job.fault)
        files: dict[str, FileEntry] = {}
        missing = set(range(self.world_size))
        wait = 0.02
        while True:
            there = self.store.place.listing(job.name)
            for rank in sorted(missing):
                if f"{job.name}/{_note(rank)}" not in there:
                    continue
                note = json.loads(self.store.place.read(f"{job.name}/{_note(rank)}"))
                if note["attempt"] != job.attempt:
                    continue
                if "fault" in note:
                    raise CheckpointError(note["fault"])
                if twice := files.keys() & note["files"].keys():
                    raise CheckpointError(f"rank {rank} wrote files that another rank wrote too: {sorted(twice)}")
                files |= note["files"]
                missing.discard(rank)
            unseen = [name for name, entry in files.items() if there.get(f"{job.name}/{name}") != entry["size"]]
            if not missing and not unseen:
                return files
            if not job.left():
                raise CheckpointError(_absent(sorted(missing), unseen, self.settings.timeout))
            job.pause(wait)
            wait = min(1.0, wait * 1.5)


def gather_objects(grace_seconds: float) -> Callable[[Any], Sequence[Any]]:
    """A `gather` over torch.distributed's ranks, which waits `grace_seconds`. All ranks make it together, once."""
    import torch.distributed as dist

    # on the CPU, so that it waits for nothing that a GPU has yet to do
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=grace_seconds))

    def gather(mine: Any) -> Sequence[Any]:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine, group=group)
        return every

    return gather


_LAST_FILES = 60.0
"""Seconds that state and manifest may take after the files of all ranks are there."""


def _note(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _absent(ranks: list[int], files: list[str], seconds: float) -> str:
    what = f"ranks {ranks} wrote nothing" if ranks else f"{files[:3]} can't be seen by rank 0"
    return (
        f"after {seconds:g} s {what}: if they are only slow, raise checkpoint.timeout; if they are on other nodes, "
        "checkpoints must lie where all nodes see them (checkpoint.store)"
    )


def _failure(saved: Saved) -> str:
    return f"checkpoint {saved.name} could not be written: {saved.fault}"
