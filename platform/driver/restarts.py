"""What ended a worker group, in plain words, and how many faults were counted.

Whatever it was, a worker, a node, or one of Ray's own processes, it is one kind of event: the run goes back to its
newest complete checkpoint and goes on, until too many faults came in a row without a newer checkpoint between them.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from domainshuttle.pipelines.errors import TooManyBadError, UserFacingError
from domainshuttle.platform.checkpoint.backend import STORE_FAULTS
from domainshuttle.platform.checkpoint.resume import IncompatibleError
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.driver.culprit import Evidence
from domainshuttle.platform.run.workers import DeviceMemoryError

FINAL = (ConfigError, IncompatibleError, TooManyBadError, ImportError)
"""Errors that starting the workers again does not mend."""
_MISTAKES = (UserFacingError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)
"""Errors that most likely come again, but not for certain: not those of devices and connections."""


@dataclass(frozen=True)
class Fault:
    """What ended a worker group."""

    what: str
    """What died and why, and what to do about it: one line."""
    report: str
    """Ray's own words, of many lines."""
    final: BaseException | None = None
    """An error that another start would meet again."""
    counted: bool = True
    """Whether it counts as a failure: nodes that were taken away and groups that found no room do not."""
    mistake: str = ""
    """An error of a kind that is in the code or the settings, in its words; empty where it was something else."""
    of: Literal["work", "start", "room"] = "work"
    """What it ended: workers at their work, their start, or the wait for room."""
    hung: bool = False
    """Whether workers made no step for too long."""


def node_list(ids: Sequence[str]) -> str:
    """Nodes of Ray for people: `node 3f2a9c01`, `nodes 3f2a9c01, 77aa0b1c`."""
    return f"node{'' if len(ids) == 1 else 's'} {', '.join(one[:8] for one in ids)}"


class FaultsInARow:
    """Counts the faults of a segment between which no checkpoint became whole.

    A count of the whole run would end a segment of days at its fourth fault.
    """

    def __init__(self, store: CheckpointStore, segment: str) -> None:
        self._store, self._segment = store, segment
        self.count, self._newest = 0, 0.0
        self._newest = self._written()

    def add(self) -> int:
        """Counts a fault; returns how many there were in a row."""
        written = self._written()
        if written > self._newest:
            self._newest, self.count = written, 0
        self.count += 1
        return self.count

    def _written(self) -> float:
        """When the newest checkpoint became whole; as long as the store does not answer, what was known before."""
        try:
            times = [self._newest]
            for name in self._store.names(self._segment):
                with contextlib.suppress(CheckpointError):
                    times.append(self._store.read(str(name), checksums=False).written)
            return max(times)
        except STORE_FAULTS:
            return self._newest


def explain(error: BaseException, evidence: Evidence | None = None) -> Fault:
    """The fault behind what Ray Train raised, by its cause: what others saw of that is in the report alone.

    `evidence` is what the workers left, if they left anything.
    """
    report = f"{type(error).__name__}: {error}"
    if isinstance(error, WorkerGroupError):
        return _of_workers(error.worker_failures, report, evidence)
    if isinstance(error, PreemptionError):
        nodes = node_list(list(error.preemption_info.preempted_node_ids))
        return Fault(f"taken away before the workers had ended: {nodes}", report, counted=False)
    if isinstance(error, ControllerError):
        inner = _innermost(error.controller_failure)
        name = type(error.controller_failure).__name__
        if name in ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"):
            return Fault("there was no room for the workers", report, counted=False, of="room")
        if name == "WorkerGroupStartupFailedError":
            # Ray often tells no more than that
            why = "" if inner is error.controller_failure else f" ({_words(inner, 'a worker')})"
            return Fault(f"a worker died while they started{why}", report, of="start")
        return Fault(_words(inner, "Ray Train's controller"), report, of="start")
    if isinstance(error, RayActorError):
        return Fault(_words(error, "Ray Train's controller"), report)
    return Fault(_words(_innermost(error), "Ray"), report)


def after_failed_start(fault: Fault, before: Fault | None) -> Fault:
    """A fault that follows on `before`: no room right after a start that failed is most likely still held by that
    start's workers, so it is counted, and the first cause named. Where a node is gone, the room went with it."""
    if fault.of != "room" or before is None or before.of != "start" or _NODE_GONE.search(before.what):
        return fault
    first = before.what.partition(_AFTER)[2] or before.what
    return replace(fault, what=f"{fault.what}{_AFTER}{first}", counted=True, of="start")


_AFTER = ", most likely since those of an earlier start still hold it, which failed: "
_NODE_GONE = re.compile(r"\bnode of .* is gone")


def _of_workers(failures: Mapping[int, BaseException], report: str, evidence: Evidence | None) -> Fault:
    """Of several the one that most likely came first: a hang, a worker's death, an error of its own, the death of
    another process, then what was lost with others."""
    if not failures:
        return Fault("the workers ended, and none said why", report)
    found = [one for failure in failures.values() for one in _chain(failure) if isinstance(one, FINAL)]
    report += "".join(f"\n\nworker {rank}: {failure}" for rank, failure in failures.items())
    final = found[-1] if found else None
    if evidence and (hang := evidence.hang()) is not None:
        return Fault(hang, report, final, hung=True)
    rank, failure = min(failures.items(), key=lambda item: (_follows(item[1]), item[0]))
    inner = _innermost(failure)
    if evidence and _follows(failure) == _CONSEQUENCE and (dead := evidence.dead()):
        names = " or ".join(worker.name for worker in dead)
        return Fault(f"{names} died: it was killed, or crashed; {evidence.log(dead[0].rank)}", report, final)
    taken = isinstance(inner, RayActorError) and inner.preempted
    log = evidence.log(rank) if evidence and _other_process(inner) is None else ""
    what = _words(inner, evidence.name(rank) if evidence else f"worker {rank}") + (f"; {log}" if log else "")
    mistake = _last_line(inner) if any(isinstance(one, _MISTAKES) for one in _chain(failure)) else ""
    return Fault(what, report, final, counted=not taken, mistake=mistake)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from, also behind Ray's wrappers."""
    while error is not None:
        yield error
        wrapped = getattr(error, "health_check_failure", None)
        if wrapped is None and isinstance(error, RayTaskError):
            wrapped = error.cause
        error = wrapped if isinstance(wrapped, BaseException) else error.__cause__


def _innermost(error: BaseException) -> BaseException:
    """What Ray's wrappers hold: the death of an actor, or the error that was raised first."""
    found = error
    for one in _chain(error):
        found = one
        if isinstance(one, RayActorError | OutOfMemoryError | NodeDiedError) and not isinstance(one, RayTaskError):
            return one
    return found


_CONNECTION_LOST = re.compile(
    r"(?i)connection (closed|reset|refused)|closed by peer|gloo|NCCL|ProcessGroup|Broken pipe"
)
_ENDED_WITH_OTHERS = re.compile(r"owner has died|references to the actor were removed|killed by `ray\.kill`")
"""Why Ray ended an actor that had no fault of its own."""

_DEATH, _OWN_ERROR, _DEATH_OF_ANOTHER, _CONSEQUENCE = range(4)


def _follows(failure: BaseException) -> int:
    """What a worker's failure is: its process died, an error of its own, or what it saw of another's end."""
    inner = _innermost(failure)
    if isinstance(inner, RayActorError | OutOfMemoryError | NodeDiedError) and not isinstance(inner, RayTaskError):
        if _other_process(inner) is None:
            return _DEATH
        return _CONSEQUENCE if _ENDED_WITH_OTHERS.search(str(inner)) else _DEATH_OF_ANOTHER
    return _CONSEQUENCE if _CONNECTION_LOST.search(str(failure)) else _OWN_ERROR


_NAMES = {
    "TrainController": "Ray Train's controller",
    "SynchronizationActor": "Ray Train's barrier of the workers",
    "SplitCoordinator": "Ray Data's coordinator",
}
"""Processes without which workers can't go on, by the classes of their actors."""


def _other_process(error: BaseException) -> str | None:
    """Whose death Ray tells of, where that is no worker: another of its processes."""
    named = re.search(r"class_name: (?:ray::)?(\w+)", str(error))
    if named is None or named[1] == "RayTrainWorker":
        return None
    return _NAMES.get(named[1], f"Ray's {named[1]}")


def _words(error: BaseException, who: str) -> str:
    """A line that says what happened to `who`, and what helps."""
    text = str(error)
    if isinstance(error, DeviceMemoryError):
        return text
    who = _other_process(error) or who
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text or "out of memory" in text.lower():
        return _memory(text, who) if isinstance(error, RayError) else f"{who}: {_last_line(error)}"
    if isinstance(error, NodeDiedError) or "node has died" in text or "node was terminated" in text:
        return f"the node of {who} is gone"
    if isinstance(error, ActorDiedError | RayActorError) and not isinstance(error, RayTaskError):
        if isinstance(error, RayActorError) and error.actor_init_failed:
            return f"{who} could not start: {_last_line(error)}"
        process = re.search(r"pid: (\d+)", text)
        told = f" (process {process[1]})" if process and "process" not in who else ""
        return f"{who} died{told}: it was killed, or crashed"
    return f"{who} failed: {_last_line(error)}"


def _memory(report: str, who: str) -> str:
    """Of Ray's report on a node without memory: whom it ended, who held the most, and what helps."""
    if ended := re.search(r"task name=(\w+)", report):
        who = _NAMES.get(ended[1], who)
    parts = []
    if total := re.search(r"([\d.]+)\s*GB(?: used)?\s*/\s*([\d.]+)\s*GB", report):
        parts.append(f"{float(total[1]):.1f} of {float(total[2]):.1f} GB were used")
    if largest := re.search(r"MEM\(GB\)\s+COMMAND\s+\d+\s+([\d.]+)\s+(\S+)", report):
        parts.append(f"the largest process, {largest[2].partition('.')[0]}, held {float(largest[1]):.1f} GB")
    facts = f" ({'; '.join(parts)})" if parts else ""
    return (
        f"the node ran out of memory{facts}, and Ray ended {who}: lower micro_batch, recompute activations "
        "(engine.activations={mode: full}), or give the node fewer workers"
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    kind = type(error).__name__
    line = lines[-1] if lines else ""
    return line[:400] if line.startswith(kind) else f"{kind}: {line[:400]}"


def is_fault(error: BaseException) -> bool:
    """Whether an error is of the workers or of Ray, and not the driver's own."""
    return isinstance(error, TrainingFailedError | RayError)
