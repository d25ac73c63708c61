"""What the workers of a run say of themselves: who each is, what it does, how it ended, and where its log is.

Each rank writes a small file, `workers/attempt-0003/rank00001.json`, every few seconds from a thread of its own: one
that hangs still says where, and one that is stopped or dead falls silent. The driver names the culprit of a fault by
these files, and `status` shows them. An attempt is one start of the worker group.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from domainshuttle.pipelines.errors import UserFacingError, mask_secrets, one_line
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.requests import answer, take

_LEAST_SECONDS, _RANKS_A_SECOND = 2.0, 32

SLOW = 1 / 1.15
"""Share of the median rank's rate below which a rank is called slow."""


def beat_seconds(world_size: int) -> float:
    """How often a worker writes its sign of life: a shared disk gets at most some dozens a second from all."""
    return max(_LEAST_SECONDS, world_size / _RANKS_A_SECOND)


class DeviceMemoryError(UserFacingError, RuntimeError):
    """A worker that ran out of memory: over which micro-batch, how much was used, and which settings help."""


@dataclass(frozen=True)
class WorkerState:
    """One worker, as its newest sign of life says. Times are in seconds since 1970."""

    rank: int
    world_size: int
    host: str
    node: str
    """Ray's id of the node."""
    pid: int
    log: str
    """Its log, in the run's folder."""
    started: float
    beat: float = 0.0
    segment: str = ""
    step: int = 0
    """Steps done."""
    doing: str = "starting"
    since: float = 0.0
    """When step and `doing` last changed."""
    ended: str | None = None
    """Its last words; None: it has said none."""
    node_rank: int = 0
    """Which of the group's nodes it is on, from 0."""
    load: Mapping[str, float] = field(default_factory=dict)
    """Of its node, by MLflow's names of system metrics; the first worker of each node measures it."""

    @property
    def name(self) -> str:
        """Rank, process and machine, for people."""
        return f"worker {self.rank} (process {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        """The step it was in and what it did there."""
        where = f"step {self.step} of {self.segment}, {self.doing}" if self.segment else self.doing
        return where if self.ended is None else f"{where}; {self.ended}"


@dataclass
class WorkerSign:
    """A worker's sign of life, as a context manager around its whole work.

    What the process prints meanwhile goes to its log, what libraries and a crash print below Python included: the file
    descriptors of output and errors lead there. An error's traceback is written there as well.
    """

    run: Run
    attempt: int
    rank: int
    world_size: int
    node: str
    node_rank: int = 0
    measure: Callable[[], Mapping[str, float]] | None = None
    """Says the load of its node."""
    _look: Callable[[], tuple[str, int, str]] | None = None
    _profile: str | None = None
    _closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        log = self.run.worker_log_path(self.attempt, self.rank)
        now = time.time()
        self._state = WorkerState(
            self.rank,
            self.world_size,
            socket.gethostname(),
            self.node,
            os.getpid(),
            str(log.relative_to(self.run.folder)),
            now,
            since=now,
            node_rank=self.node_rank,
        )
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_output_to(log))
        self._stack.enter_context(_dated_messages())
        self._write()
        self._thread = threading.Thread(target=self._beat, name="sign of life", daemon=True)
        self._thread.start()
        return self

    def profile_wanted(self) -> str | None:
        """The question for a profile of a step (requests.py), once."""
        wanted, self._profile = self._profile, None
        return wanted

    def follow(self, look: Callable[[], tuple[str, int, str]] | None) -> None:
        """From now on `look` says, from any thread, in which segment the worker is, how many steps it has done, and
        what it is doing."""
        self._look = look

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        if error is not None:
            traceback.print_exception(error)
        ended = "ended" if error is None else mask_secrets(f"{type(error).__name__}: {one_line(error)}")
        self._state = replace(self._state, ended=ended)
        self._write()
        self._stack.close()

    def _beat(self) -> None:
        while not self._closing.wait(beat_seconds(self.world_size)):
            self._write()
            self._profile = take(self.run, "profile", self.rank) or self._profile
            if (token := take(self.run, "stacks", self.rank)) is not None:
                self._write_stacks(token)

    def _write_stacks(self, token: str) -> None:
        """Writes the stacks of all threads, and answers who asked for them."""
        path = self.run.folder / "stacks" / f"attempt-{self.attempt:04d}" / f"rank{self.rank:05d}.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            answer(self.run, token, {"file": str(path)})

    def _write(self) -> None:
        now = time.time()
        if self._look is not None:
            segment, step, doing = self._look()
            before = self._state.segment, self._state.step, self._state.doing
            since = self._state.since if before == (segment, step, doing) else now
            self._state = replace(self._state, segment=segment, step=step, doing=doing, since=since)
        load = self.measure() if self.measure is not None else {}
        self._state = replace(self._state, beat=now, load=load)
        with contextlib.suppress(OSError):  # of a full disk; what only people read ends no training
            path = self.run.worker_path(self.attempt, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, sync=False) as aside:
                aside.write_text(json.dumps(asdict(self._state)))


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """While it lasts, what this process prints goes to `log`; nothing is changed where that can't be written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError:
        yield
        return
    before = [os.dup(number) for number in (1, 2)]
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            os.dup2(target, number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(target)


@contextlib.contextmanager
def _dated_messages() -> Iterator[None]:
    """While it lasts, messages of `logging` are printed with their time: all of ours, and others' warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, own = logging.getLogger(), logging.getLogger("domainshuttle")
    before = own.level, own.propagate
    root.addHandler(handler)
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False  # libraries add handlers of theirs, which would print ours again
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.removeHandler(handler)
        own.level, own.propagate = before


_ATTEMPT = re.compile(r"attempt-(\d+)")


def attempts(run: Run) -> list[int]:
    """The numbers of the starts of the worker group whose workers left a sign or a log, oldest first."""
    found = {
        int(match[1])
        for folder in (run.folder / "workers", run.folder / "logs")
        if folder.is_dir()
        for path in folder.iterdir()
        if (match := _ATTEMPT.fullmatch(path.name))
    }
    return sorted(found)


def read_workers(run: Run, attempt: int) -> list[WorkerState]:
    """The workers of an attempt by rank; one whose file can't be read is left out."""
    states = []
    for path in sorted(run.worker_path(attempt, 0).parent.glob("rank*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            content: dict[str, Any] = json.loads(path.read_text())
            states.append(WorkerState(**content))
    return states


_THREAD = re.compile(r"^(?:Current thread|Thread) .*\n", re.MULTILINE)
_WORK = re.compile(r"worker_group\.py\", line \d+ in _work$", re.MULTILINE)
"""In the stack of the thread that trains, which is not a worker's main thread."""
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')


def training_stack(report: str) -> str:
    """Of stacks that faulthandler wrote, of several times the newest, that of the thread that trains; without one the
    main thread's, which is the last."""
    stacks = _THREAD.split(report.rpartition("Timeout (")[2])
    return next((stack for stack in reversed(stacks) if _WORK.search(stack)), stacks[-1])


def innermost(stack: str) -> str:
    """Where a stack is, for people; empty where it has no frame."""
    found = _FRAME.search(stack)
    return f"{found[3]}, {Path(found[1]).name}:{found[2]}" if found else ""


def nodes_load(run: Run, attempt: int) -> dict[str, float]:
    """The load of every node of an attempt as it was measured last, by names that MLflow draws in a chart for all
    nodes: `system/node_0/cpu_utilization_percentage`."""
    return {
        name.replace("system/", f"system/node_{worker.node_rank}/", 1): value
        for worker in read_workers(run, attempt)
        for name, value in worker.load.items()
    }


def node_names(run: Run, attempt: int) -> str:
    """Which machine each node of `nodes_load` is: `0: host7 (Ray's node 3f2a9c01), 1: host8 (Ray's node 77aa0b1c)`.

    Ray Train counts machines, by their addresses: of several of Ray's nodes on one, each is named.
    """
    hosts: dict[int, str] = {}
    nodes: dict[int, list[str]] = {}
    for one in read_workers(run, attempt):
        hosts.setdefault(one.node_rank, one.host)
        name, known = f"Ray's node {one.node[:8]}", nodes.setdefault(one.node_rank, [])
        if name not in known:
            known.append(name)
    return ", ".join(f"{number}: {hosts[number]} ({', '.join(nodes[number])})" for number in sorted(nodes))
