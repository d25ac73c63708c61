"""The schedule on the driver: worker group after worker group, until all is trained or a stop is asked for.

Each start is decided here once, for weights and data alike: at the newest whole checkpoint, with the largest number of
workers that fits the cluster then. Whatever ends a group, a fault, a roll-back, more room, a node that is about to go,
is followed by the next start.
"""

import contextlib
import dataclasses
import functools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from domainshuttle.pipelines.errors import UserFacingError, counted
from domainshuttle.pipelines.plan.step_plan import ORDER_VERSION
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.checkpoint.resume import AUTO, NONE, adopt_stages, begin, choose_start, require_fit
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore
from domainshuttle.platform.config.schema import ConfigError, HookEvent, differences
from domainshuttle.platform.driver.culprit import Evidence
from domainshuttle.platform.driver.group_size import group_size, settled_size
from domainshuttle.platform.driver.restarts import Fault, FaultsInARow, after_failed_start, explain, is_fault, node_list
from domainshuttle.platform.driver.worker_group import WorkerGroup
from domainshuttle.platform.engine.hub import resolve_all
from domainshuttle.platform.engine.model_size import model_size
from domainshuttle.platform.engine.trained_parameters import TrainedParameters, trained_of
from domainshuttle.platform.run.data import make_feed, require_same_encoders, require_unchanged
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import FAILED, MOVED, SKIPPED, WAITING, Notices
from domainshuttle.platform.run.ledger import ALLOWANCE, Ledger
from domainshuttle.platform.run.segments import End, Segment, SegmentEnd, StartPoint, WorkerJob
from domainshuttle.platform.run.weights_digest import sizes_digest
from domainshuttle.platform.run.workers import attempts
from domainshuttle.platform.tracking.mlflow import Tracker
from domainshuttle.platform.tracking.outbox import tag_segment
from domainshuttle.platform.tracking.training_steps import HOURS_TAG, OWN_HOURS

Outcome = Literal["finished", "stopped", "budget spent"]

WAITING_SECONDS = 120.0
"""How long no worker is at its work before people are told."""


class DivergedError(UserFacingError, RuntimeError):
    """The loss went wrong, and going back did not help."""


class WorkersFailedError(UserFacingError, RuntimeError):
    """The workers died too often between two checkpoints. `hung`: at last since they hung."""

    hung = False


class Schedule:
    """What is left of a run's schedule, or of one stage.

    `watch` is called about twice a second while workers train; `echo` shows a line, or a table, to people; `tell` is
    told of what the run's hooks may listen to (tracking/hooks.py). `workers` starts a worker group, and `clock` is what
    device-hours are counted by: a simulation has its own (benchmarks/simulation.py).
    """

    def __init__(
        self,
        run: Run,
        tracker: Tracker,
        watch: Callable[[], None],
        echo: Callable[[Any], None],
        tell: Callable[[Sequence[HookEvent], str], None] = lambda events, text: None,
        workers: Callable[[Run, WorkerJob, int], WorkerGroup] = WorkerGroup,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._tell, self._workers, self._clock = tell, workers, clock
        self.run, self._tracker, self._watch, self._echo = run, tracker, watch, echo
        self._config, self._digest = run.config, run.config.digest()
        self._ledger, self._store = Ledger(run.ledger_path, clock), CheckpointStore.of(run.config)
        self._notices = Notices(run.notices_path, echo)
        self._origins = resolve_all(run)
        self._faults: dict[str, FaultsInARow] = {}
        self._mistake = ""
        """The mistake that ended the last workers, where they had made no step."""
        self._fault: Fault | None = None
        """What ended the workers last."""
        self._command = {"command": psutil.Process().create_time()}
        self._attempts_before = 0
        """How many attempts the ledger had when the newest workers were asked for."""
        self._leaving: set[str] = set()
        self._opened: set[str] = set()
        self._told_finished: set[str] = set()
        self._selections: dict[str, TrainedParameters] = {}
        self._verified: Checkpoint | None = None

    def train(self, stage: str | None = None, resume: str = AUTO) -> Outcome:
        """Trains until all is finished, a stop is asked for or the budget is spent.

        `resume` says where the first unfinished segment starts (checkpoint/resume.py). Raises ConfigError for a stage
        whose weights to begin with are not there yet, CheckpointError, DivergedError, WorkersFailedError, and errors
        that starting again does not mend.
        """
        if (last := self._ledger.last_line()) is not None:
            heard = max(last, self.run.heard_from())
            self._ledger.end_open("its driver died", until=heard + ALLOWANCE)
        if resume not in (AUTO, NONE):
            adopted = adopt_stages(self.run, self._store, resume, self._echo)
            if adopted:
                self._tracker.tag({f"from.{name}": str(weights) for name, weights in adopted.items()})
        chosen = self.run.choose(stage)
        self._tell_finished(chosen)
        while left := [segment for segment in chosen if not segment.finished]:
            if self._ledger.summary(self._config.budget_gpu_hours).spent:
                return "budget spent"
            outcome, resume = self._start(left, resume), AUTO
            self._tell_finished(chosen)
            if outcome is not None and any(not segment.finished for segment in chosen):
                return outcome
        return "finished"

    def _tell_finished(self, segments: Sequence[Segment]) -> None:
        """Says of each segment that is finished where its weights are; once."""
        for segment in segments:
            if segment.finished and segment.name not in self._told_finished:
                self._told_finished.add(segment.name)
                self._echo(f"Stage {segment.name} is finished; its weights are in {segment.weights}")

    def _start(self, left: list[Segment], resume: str) -> Outcome | None:
        """One worker group, for as many of the segments as can follow each other in it; None: another may follow."""
        first = left[0]
        start = self._start_point(first, resume)
        self._open(first)
        if start.checkpoint and resume != AUTO:  # of a person's choice: the run's page says what it came from
            self._tracker.tag({f"from.{first.name}": start.checkpoint})
        size = self._size(first)
        starts = self._starts(start, left[1:], size)
        for one in starts:
            self.run.note_order(one.segment, one.order)
        self.run.regroup_path.unlink(missing_ok=True)
        self._attempts_before = len(self._ledger.attempts())
        attempt = max(attempts(self.run), default=0) + 1
        self.run.worker_path(attempt, 0).parent.mkdir(parents=True, exist_ok=True)
        job = WorkerJob(
            config=self._config.model_dump(mode="json"),
            attempt=attempt,
            starts=starts,
            origins=self._origins,
            mlflow=self._tracker.ids.to_dict(),
            times=self._times(),
        )
        self._notices.other_workers()
        group = self._workers(self.run, job, size)
        self._echo(
            f"Stage {first.name}: "
            + (f"goes on after step {start.first_step}" if start.checkpoint else "begins")
            + f", with {counted(group.size, 'worker')}"
        )
        self._follow(group, job)
        if group.error is not None:
            self._handle_fault(group.error, job)
            return None
        self._fault = None
        self._ledger.end_open("the workers ended without a last line")
        return "stopped" if group.end is None else self._handle_end(group.end)

    def _times(self) -> dict[str, float]:
        """When workers are asked for; of the first ones also when the command began, which their start waited for."""
        began, self._command = self._command, {}
        return {**began, "asked": self._clock()}

    def _starts(self, first: StartPoint, later: Sequence[Segment], size: int) -> tuple[StartPoint, ...]:
        """Where each segment of a group begins: the first where it was decided, each that can follow it at its own
        beginning."""
        starts = [first]
        for segment in later:
            if self._store.names(segment.name):
                break  # it has been trained before: where it starts is decided when its turn comes
            if size not in self._config.worker_sizes(segment.stage):
                break  # its batch is shared by another number of workers
            starts.append(StartPoint(segment.name, 0, None, first.attempt, self._skipped(segment), ORDER_VERSION))
        return tuple(starts)

    def _start_point(self, segment: Segment, resume: str = AUTO) -> StartPoint:
        """Where the workers begin: the one decision, checked against the configuration, the weights and the data."""
        self._require_origin(segment)
        feed = make_feed(self._config, segment)
        require_unchanged(feed, self.run.fingerprints)
        require_same_encoders(self._config, feed, self.run)
        origin = self._origins[segment.name].identified(self.run.fingerprints)
        checkpoint = self._choose(segment, resume)
        if checkpoint:
            feed = dataclasses.replace(feed, order=checkpoint.state.plan.get("order_version", feed.order))
            require_fit(checkpoint, segment, origin, sizes_digest(self._selected(segment).trained), feed)
            if checkpoint.state.config_digest != self._digest:
                before = checkpoint.state.config
                changes = differences(before, self._config.decisive()) if before else "it does not say which"
                self._echo(f"Checkpoint {checkpoint.name} was trained with another configuration: {changes}")
        begin(self._store, segment.name, resume, checkpoint, self._digest)
        if resume != AUTO:
            segment.begin_anew()
        first = checkpoint.state.step if checkpoint else 0
        start = StartPoint(
            segment.name,
            first,
            checkpoint.where if checkpoint else None,
            self._next_attempt(),
            self._skipped(segment),
            feed.order,
        )
        if first < segment.last_step and start.last_trained(segment.last_step) is None:
            raise DivergedError(f"stage {segment.name}: all of its steps were bad: {self._go_on(segment)}")
        return start

    def _next_attempt(self) -> int:
        """The number of a start: the time, but larger than that of the workers that wrote last, also where the clock of
        their driver's machine was ahead."""
        return max(time.time_ns(), int(self.run.read_progress().get("attempt", 0)) + 1)

    def _choose(self, segment: Segment, resume: str) -> Checkpoint | None:
        note = functools.partial(self._notices.add, segment.name, SKIPPED)
        try:
            chosen = choose_start(self._store, segment.name, resume, self._digest, note, self._verified)
            self._verified = chosen or self._verified
            return chosen
        finally:
            if texts := self._notices.given(segment.name, SKIPPED):
                self._tracker.tag({"checkpoints.skipped": "\n".join(texts)}, segment.name)

    def _skipped(self, segment: Segment) -> frozenset[int]:
        return frozenset(step for bad in self.run.skipped(segment.name) for step in bad)

    def _selected(self, segment: Segment) -> TrainedParameters:
        if segment.name not in self._selections:
            first = next(one for one in self.run.segments() if one.expert == segment.expert)
            size = model_size(self._config.model_of(segment.expert), self._origins[first.name])
            self._selections[segment.name] = trained_of(size, segment.stage.trained)
        return self._selections[segment.name]

    def _require_origin(self, segment: Segment) -> None:
        for other in self.run.segments():
            if segment.origin == str(other.weights) and not other.finished:
                raise ConfigError(
                    f"stage {segment.name!r} begins with the weights of {other.name!r}: train that one first"
                )

    def _open(self, segment: Segment) -> None:
        """Opens a segment's MLflow run, with its data, and shows what it trains; once."""
        if segment.name in self._opened:
            return
        self._tell_finished([self.run.segment(name) for name in self._opened])
        self._opened.add(segment.name)
        params = dataclasses.asdict(SegmentParams.of(segment))
        self._tracker.open_segment(segment.name, params=params, tags={HOURS_TAG: OWN_HOURS})
        for corpus, source, index_digest, samples in make_feed(self._config, segment).corpora():
            for run in (segment.name, None):  # the schedule's run has the data of all segments
                self._tracker.log_dataset(corpus, index_digest, source, samples, run)
        self.run.write_ids(self._tracker.ids.to_dict())
        self._echo(f"Stage {segment.name} {self._selected(segment)}")

    def _size(self, segment: Segment, held: int = 0) -> int:
        sizes = self._config.worker_sizes(segment.stage)
        if len(sizes) == 1:
            return sizes[0]  # Ray Train waits until there is room
        need, labels = self._config.worker_resources(), self._config.cluster.node_labels
        beside = self._config.encoder_resources()
        if not held:
            return settled_size(sizes, need, self._leaving, self._watch, labels=labels, beside=beside)
        return group_size(sizes, need, self._leaving, held, labels, beside)

    def _follow(self, group: WorkerGroup, job: WorkerJob) -> None:
        """Follows the workers to their end, segment after segment, and asks them to end when more would fit."""
        looked = time.monotonic()
        for _ in group.running():
            self._watch()
            segment = self.run.segment(segment_at(self.run.read_progress(), job))
            self._open(segment)
            if group.idle_seconds > WAITING_SECONDS:
                self._notices.add(segment.name, WAITING, f"Stage {segment.name}: {group.waits_for()}")
            if group.idle_seconds == 0 and time.monotonic() - looked > self._config.cluster.resize_seconds:
                looked = time.monotonic()
                if (size := self._size(segment, held=group.size)) > group.size and not self.run.regroup_path.exists():
                    text = f"Stage {segment.name}: there is room for {size} workers; a checkpoint, then they start"
                    with contextlib.suppress(OSError):  # of a full disk: asked again later, and training goes on
                        write_bytes(self.run.regroup_path, str(size).encode())
                        self._notices.add(segment.name, MOVED, text)

    def _handle_end(self, end: SegmentEnd) -> Outcome | None:
        """What follows from an end that all workers agreed on; None: another start. Raises what ends the run."""
        segment = self.run.segment(end.segment)
        self._leaving.update(end.nodes)
        if end.kind is End.UNSAVED:
            raise CheckpointError(f"stage {end.segment}: {end.reason}")
        if end.kind is End.DIVERGED:
            raise DivergedError(
                f"stage {end.segment}: the update of step {end.step} left weights whose loss is not finite, or far "
                f"above what it was before: {self._go_on(segment)}"
            )
        if end.kind is End.ROLLED_BACK:
            self.run.skip(segment.name, list(end.bad))
            self._refuse_to_go_in_circles(segment)
        if end.kind is End.PREEMPTED:
            nodes = node_list(end.nodes)
            text = f"Stage {end.segment}: about to go: {nodes}; step {end.step} is saved, the workers move"
            self._notices.add(segment.name, MOVED, text)
        if End.STOPPED in (end.kind, end.asked):
            return "stopped"
        return "budget spent" if End.BUDGET_SPENT in (end.kind, end.asked) else None

    def _refuse_to_go_in_circles(self, segment: Segment) -> None:
        """After a roll-back: says what is skipped. Raises DivergedError when there were too many."""
        rollbacks = self.run.skipped(segment.name)
        where = self.run.dropped_path(segment.name, 0).parent
        if len(rollbacks) > self._config.guard.most_rollbacks:
            raise DivergedError(
                f"stage {segment.name} went back to a checkpoint {counted(len(rollbacks), 'time')}, the last time for "
                f"{_listed(rollbacks[-1])}: look at the samples in {where}, and raise guard.spike_factor or "
                f"guard.most_rollbacks; or {self._go_on(segment)}"
            )
        text = (
            f"Stage {segment.name} went back, and now skips what was bad: {_listed(rollbacks[-1])} (samples in {where})"
        )
        self._notices.add(segment.name, MOVED, text)

    def _go_on(self, segment: Segment) -> str:
        """What helps a run that diverged."""
        stage = segment.stage
        return (
            "go on from an earlier checkpoint with a lower learning rate, as a run of its own: --set "
            f"name={self.run.next_name()} --set stages.{stage.name}.learning_rate={stage.learning_rate / 2:g} --resume "
            f"PATH; domainshuttle checkpoints {shlex.quote(str(self.run.folder))} lists them"
        )

    def _handle_fault(self, error: BaseException, job: WorkerJob) -> None:
        """Records what ended the workers of `job`. Returns where another start may follow, else raises."""
        if not is_fault(error):
            raise error
        fault = explain(error, Evidence.of(self.run, job.attempt))
        fault = self._fault = after_failed_start(fault, self._fault)
        state = self.run.read_progress()
        at = segment_at(state, job)
        segment = next((one for one in self.run.segments() if one.name == at and not one.finished), None)
        segment = segment or next((one for one in self.run.segments() if not one.finished), None)
        if segment is None:
            self._echo(f"The workers died after everything was finished: {fault.what}")
            return
        report = self._write_report(fault)
        self._record_restart(segment, fault)
        if isinstance(fault.final, ImportError):
            raise WorkersFailedError(
                f"stage {segment.name}: {fault.what}. A package is missing: install it on every node of the cluster. "
                f"Ray's report: {report}"
            ) from error
        if fault.final is not None:
            raise fault.final from error
        self._refuse_to_fail_alike(segment, fault, report, made_steps(state, job))
        most = self._config.cluster.max_failures
        if segment.name not in self._faults:  # each asks the store
            self._faults[segment.name] = FaultsInARow(self._store, segment.name)
        faults = self._faults[segment.name]
        count = faults.add() if fault.counted else faults.count
        tail = f"Ray's report: {report}"
        if fault.counted and count > most:
            failed = WorkersFailedError(
                f"stage {segment.name}: {fault.what}. That was fault {count} in a row without a newer checkpoint, and "
                f"cluster.max_failures is {most}. {tail}"
            )
            failed.hung = fault.hung
            raise failed from error
        counts = f" (fault {count} of at most {most} in a row without a newer checkpoint)" if fault.counted else ""
        text = f"Stage {segment.name}: {fault.what}. The workers start again{counts}. {tail}"
        self._notices.add(segment.name, FAILED, text, cause=fault.what)
        self._tracker.open_segment(segment.name)  # whose workers may have called it failed
        if fault.counted:
            self._tell(("hung", "restarted") if fault.hung else ("restarted",), text)

    def _refuse_to_fail_alike(self, segment: Segment, fault: Fault, report: str, stepped: bool) -> None:
        """Raises WorkersFailedError for a mistake in code or settings that ended two starts before their first step."""
        before, self._mistake = self._mistake, "" if stepped else fault.mistake
        if before and before == self._mistake:
            raise WorkersFailedError(
                f"stage {segment.name}: {fault.what}. The start before ended with the same words, so another one would "
                f"too. Ray's report: {report}"
            )

    def _write_report(self, fault: Fault) -> str:
        number = 1
        while (path := self.run.report_path(number)).exists():
            number += 1
        try:
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, fault.report.encode())
        except OSError as error:
            return f"it can't be written: {error}"
        return str(path)

    def _record_restart(self, segment: Segment, fault: Fault) -> None:
        """Ends the attempt in the ledger, and gives the segment's MLflow run the tag `restart.<n>` of its nth attempt;
        none where these workers never came to their first line."""
        self._ledger.end_open(fault.what)
        attempts = [one for one in self._ledger.attempts() if one.segment == segment.name and one.devices]
        if any(one in attempts for one in self._ledger.attempts()[self._attempts_before :]):
            text = f"{fault.what} (step {attempts[-1].last} was reached)"
            tag_segment(self.run, segment.name, f"restart.{len(attempts)}", text)


def segment_at(state: Mapping[str, Any], job: WorkerJob) -> str:
    """The segment that the workers of a job are at, when rank 0 wrote `state` last: before they wrote anything their
    first, whatever workers before them were at."""
    return str(state["segment"]) if _written_by(state, job) else job.starts[0].segment


def _written_by(state: Mapping[str, Any], job: WorkerJob) -> bool:
    return state.get("attempt") in {start.attempt for start in job.starts}


def _listed(steps: Sequence[int]) -> str:
    """Steps for people: `step 5`, `steps 5, 6`."""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def made_steps(state: Mapping[str, Any], job: WorkerJob) -> bool:
    """Whether the workers of a job have made a step, when rank 0 wrote `state` last."""
    return _written_by(state, job) and (
        state["segment"] != job.starts[0].segment or state["step"] > state["first_step"]
    )


@dataclass(frozen=True)
class SegmentParams:
    """What MLflow shows as the params of a segment's run."""

    stage: str
    number: int
    steps: int
    global_batch: int
    learning_rate: float
    trained: str
    mixture: str
    where: str
    cross_pair_weight: float

    @classmethod
    def of(cls, segment: Segment) -> "SegmentParams":
        stage = segment.stage
        return cls(
            stage=stage.name,
            number=segment.number,
            steps=stage.duration.planned_steps,
            global_batch=stage.global_batch,
            learning_rate=stage.learning_rate,
            trained=stage.described_trained,
            mixture=stage.described_mixture,
            where=", ".join(f"{name}: {text}" for name, text in stage.where.items()),
            cross_pair_weight=stage.loss.cross_pair_weight,
        )
