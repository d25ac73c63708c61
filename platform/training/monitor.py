"""The monitor: what a worker notes of its own doing, samples consumed, metrics, time and progress."""

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from domainshuttle.cluster.monitoring.metrics import RunMetrics
from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.objective import LossOutput
from domainshuttle.pipelines.loading.reader import MicroBatch
from domainshuttle.platform.checkpoint.async_writer import Saved
from domainshuttle.platform.engine.zero3 import StepResult
from domainshuttle.platform.run.folder import ProgressFile, Run
from domainshuttle.platform.run.journal import Journal, JournalWriter
from domainshuttle.platform.run.ledger import Attempt, Ledger
from domainshuttle.platform.run.segments import End, Segment, SegmentEnd, StartPoint, WorkerJob, learning_rate
from domainshuttle.platform.run.workers import node_names, nodes_load
from domainshuttle.platform.tracking.mlflow import MetricLogger, RunIds
from domainshuttle.platform.tracking.outbox import tell_error
from domainshuttle.platform.training.collective_device import collective_device
from domainshuttle.platform.training.end_of_step import Agreement, EndOfStep
from domainshuttle.platform.training.loss_metrics import LossMetrics
from domainshuttle.platform.training.mfu import Utilization
from domainshuttle.platform.training.profiler import StepProfiler
from domainshuttle.platform.training.rank_rates import MatrixProbe, RankRates, SlowRanks, compare_ranks
from domainshuttle.platform.training.stopwatch import Lap, Timeline
from domainshuttle.platform.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Monitor:
    """What one rank notes in one attempt at a segment. Only rank 0 writes the ledger, the tracking and the progress.

    All ranks must call `agree` and `step` together. `preempted_nodes` is asked as `EndOfStep` says. `first` says that
    the worker has trained nothing before: what came before this process is then part of its start. `profile_wanted`
    gives a question for a profile.
    """

    def __init__(
        self,
        run: Run,
        segment: Segment,
        job: WorkerJob,
        start: StartPoint,
        preempted_nodes: Callable[[], Sequence[str]],
        first: bool = True,
        profile_wanted: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        config = run.config
        self.run, self.segment, self.first_step, self.number = run, segment, start.first_step, start.attempt
        self._ending = False
        """Whether all ranks end after this step: what is not logged yet then is."""
        self._keys: list[str] = []
        hangs = run.hang_path(segment.name, dist.get_rank())
        self.watchdog = Watchdog(config.guard.hang_seconds, config.grace_seconds, hangs)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0
        self._sharing = config.engine.sequence_parallel
        self._notes_samples = self.rank % self._sharing == 0
        """Not on the other ranks that compute the same samples: each is noted once."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.losses = LossMetrics(sorted(segment.stage.mixture), segment.stage.loss.cross_pair_weight, device)
        self._utilization: Utilization | None = None
        reached = run.reached_before(segment.name) if self.main else 0
        self._consumed = _journal(run.consumed_path(segment.name, self.rank))
        self._dropped_lines = cache(lambda: _journal(run.dropped_path(segment.name, self.rank)))
        self._failed_lines = cache(lambda: _journal(run.failed_checkpoints_path))
        # counted over all attempts
        self._dropped = run.dropped_steps(segment.name)
        failed = Journal(run.failed_checkpoints_path).read()[0]
        self._failed_saves = sum(line["segment"] == segment.name for line in failed)
        self._progress = ProgressFile(run.progress_path)
        self.done = start.first_step
        self.at: MicroBatch[TrainingBatch] | None = None
        """The micro-batch that is worked at; None while the next is loaded."""
        now = clock()
        process = psutil.Process().create_time()
        self._start = {**job.times, "process": process, "imports": now} if first else {"before": now}
        self._metrics = RunMetrics(run=config.name, segment=segment.name, rank=str(self.rank))
        self._probe = MatrixProbe(device)
        self._saved_at = time.time()
        self._slow_ranks = SlowRanks(_RECENT)
        self._profiler = StepProfiler(run, segment.name, self.rank, profile_wanted)
        self._due = config.tracking.every
        self._group = job.attempt
        self._steps = 0
        """That were trained since the last log."""
        self._grad_norm = 0.0
        """Of the newest of them."""
        self.last: dict[str, float] = {}
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self.ledger = Ledger(run.ledger_path, clock)
        self.attempt: Attempt | None = None
        self.logger: MetricLogger | None = None
        if self.main:
            # the devices are held from when the processes start, which Ray may have done in advance
            asked = job.times["asked"]
            began, since = (max(process, asked), asked) if first else (None, None)
            self.attempt = self.ledger.start(self.world_size, segment.name, self.done, began, since=since)
        account = (self.ledger, self.attempt) if self.attempt else None
        self._end_of_step = EndOfStep(run, segment, preempted_nodes, account)
        self._timeline = Timeline("starting", clock)
        self._interval, self._unwritten = Lap(self._timeline), Lap(self._timeline)
        if self.main:
            self.logger = MetricLogger(
                RunIds.from_dict(job.mlflow, config.tracking_uri),
                segment.name,
                run.spool,
                start_step=self.done,
                system_every=15.0,
                reached=reached,
                system=partial(nodes_load, run, job.attempt),
            )
            self._write_progress(self.done, "training")

    def look(self) -> tuple[str, int, str]:
        """The segment, the steps done and what is being done, for people; may be asked by any thread."""
        return self.segment.name, self.done, _DOING.get(self._timeline.category, self._timeline.category)

    def built(self, plan: Mapping[str, Any], utilization: Utilization) -> None:
        """Notes that model, engine and loader are there; what the plan is made of goes to the tracking at the end."""
        self._start["build"] = time.time()
        self._utilization = utilization
        if self.main:
            with self._progress.suppressed():
                path = self.run.plan_path(self.segment.name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(plan, indent=2))

    def begin(self) -> None:
        """Notes that the model is built and restored: the time until here was starting."""
        self._start["restore"] = time.time()
        logger.info("segment %s: built and restored, goes on after step %d", self.segment.name, self.done)
        if self.logger is not None:  # by now every worker has said where it is
            self.logger.tag({f"nodes.{self._group}": node_names(self.run, self._group)})
        self._timeline.switch("productive")  # what is neither waiting nor writing is the work itself
        self._restart_interval()
        self.watchdog.alive()

    def measure(self, category: str) -> contextlib.AbstractContextManager[None]:
        """The time of a block goes to a category of the ledger."""
        return self._timeline.measure(category)

    @contextlib.contextmanager
    def checkpointing(self) -> Iterator[None]:
        """The same for saves and exports, for which the watchdog allows more time: saves have a limit of their own."""
        self.watchdog.allow_grace()
        with self.measure("checkpointing"):
            yield
        self.watchdog.alive()

    def _tell(self, attempt: Attempt) -> Attempt:
        """The attempt, told where the time until now went: before every line of it."""
        for category, seconds in self._unwritten.take().items():
            attempt.add(category, seconds)
        return attempt

    def waited(self, batches: Iterator[MicroBatch[TrainingBatch]]) -> Iterator[MicroBatch[TrainingBatch]]:
        """The same micro-batches; the time until each is there counts as waiting for data."""
        while True:
            with self.measure("waiting"):
                self.at = None
                self.at = batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def micro_batch(self, micro: MicroBatch[TrainingBatch], loss: LossOutput) -> None:
        """Notes which samples a forward and backward pass was made of, and their losses."""
        self._consume(micro)
        if self._notes_samples:
            self.losses.add(micro.batch, loss, micro.pair_kinds, micro.cut_captions)
            self._keys += micro.keys
        if self._utilization:
            self._utilization.add(micro.batch)
        self._end_of_step.add(loss.loss)

    def skipped(self, step: int, parts: Iterator[MicroBatch[TrainingBatch]]) -> Agreement:
        """Notes the samples of a step that is not trained on, because it made the run diverge before; and agrees as at
        the end of any step."""
        for micro in parts:
            self._consume(micro, passed_over=True)  # the name that the files of earlier runs have
        self.watchdog.alive()
        self.done = step + 1
        if self.main:
            self._write_progress(self.done, "training")
        agreed = self.agree()
        if self._steps and self._interval_ends():
            self._end_interval(step)
        return agreed

    def _consume(self, micro: MicroBatch[TrainingBatch], **more: Any) -> None:
        if not self._notes_samples:
            return
        if micro.replaced:
            more["replaced"] = micro.replaced
        line = {"step": micro.step, "part": micro.part, "attempt": self.number, "samples": micro.keys, **more}
        self._consumed.put(line)

    def agree(self) -> Agreement:
        """One collective a step: the loss of all ranks, and whether they end after it."""
        agreed = self._end_of_step.agree()
        self._ending = bool(agreed.stop)
        return agreed

    def dropped(self, step: int, reason: str, loss: float) -> None:
        """Notes a step whose gradients were thrown away, with this rank's samples."""
        self._dropped.add(step)
        self.losses.drop()
        line = {"step": step, "attempt": self.number, "reason": reason, "loss": loss, "samples": self._keys}
        if self._notes_samples:
            self._dropped_lines().put(line)

    def roll_back(self, step: int, bad: Sequence[int]) -> SegmentEnd:
        """Ends the attempt: the driver is told to go back to a checkpoint and skip the bad steps."""
        if self.logger:  # of a segment's last step no later point would tell
            self.logger.log(step + 1, {"dropped_steps": float(len(self._dropped))})
        return replace(self.close(step, End.ROLLED_BACK), bad=tuple(bad))

    def step(self, step: int, result: StepResult, saves: Sequence[Saved]) -> None:
        """Notes that optimiser step `step` is done; logs when it is due. `saves` are checkpoints that ended."""
        self.watchdog.alive()
        if self.main and self._start:
            self._note_start()
        self.done = step + 1
        self._profiler.between_steps(self.done)
        self.saved(saves)
        self._steps += 1
        self._keys = []
        self.losses.keep()  # nothing, where it was dropped
        self._grad_norm = result.grad_norm
        if self._interval_ends():
            self._end_interval(step)

    def _interval_ends(self) -> bool:
        """Whether what is not logged yet is logged after the step that was done last."""
        return self._ending or self.done % self._due == 0 or self.done == self.segment.stage.duration.planned_steps

    def _end_interval(self, step: int) -> None:
        """Compares the ranks and, on rank 0, logs what the steps since the last log were; all ranks must call."""
        metrics = self.losses.reduce()
        seconds = self._interval.take()
        balance = self._utilization.balance() if self._utilization else {}
        ranks = compare_ranks(seconds, self._steps, self._end_of_step.take_waited())
        rates = self._own_rates(seconds)
        if not self.main:
            logger.info("%s step %d: %s", self.segment.name, step + 1, _shares(seconds, self._steps))
            self._restart_interval()
            return
        elapsed = max(sum(seconds.values()), 1e-9)
        self._recent.append((elapsed, self._steps))
        tokens = metrics.pop("tokens")
        samples = metrics.pop("samples")
        self.last = {
            **metrics,
            "grad_norm": self._grad_norm,
            "dropped_steps": float(len(self._dropped)),
            "learning_rate": learning_rate(self.segment.stage, step),
            "samples/s": samples / elapsed,
            "tokens/s/device": tokens / self._sharing / elapsed,
            "step_seconds": elapsed / self._steps,
            "data_wait_fraction": seconds.get("waiting", 0.0) / elapsed,
            "checkpoint_stall_seconds": seconds.get("checkpointing", 0.0),
            "failed_checkpoints": float(self._failed_saves),
            **(self._utilization.take(elapsed) if self._utilization else {}),
            **balance,
            **ranks,
        }
        if self.attempt and self.logger:
            self._log(step + 1, self._tell(self.attempt), self.logger)
        logger.info(
            "%s step %d: loss %.5f, gradient norm %.3g, learning rate %.3g, %s",
            self.segment.name,
            step + 1,
            self.last.get("loss", float("nan")),
            self._grad_norm,
            self.last["learning_rate"],
            _shares(seconds, self._steps),
        )
        self._export()
        self._write_progress(step + 1, "training", rates)
        self._restart_interval()

    def _log(self, steps: int, attempt: Attempt, log: MetricLogger) -> None:
        """Gives the tracking the numbers after so many steps, with the hours of the segment and of the schedule."""
        attempt.progress(steps, every=10.0)
        whole, own = self.ledger.summaries(self.segment.name, self.run.config.budget_gpu_hours)
        hours, mine, unwritten = whole.metrics(), own.metrics(), attempt.unwritten()
        for name, value in {**unwritten, "used": sum(unwritten.values())}.items():
            hours[f"gpu_hours/{name}"] += value
            mine[f"gpu_hours/{name}"] += value
        of_schedule = {name: value for name, value in self.last.items() if name in _OF_SCHEDULE}
        at = self.run.step_in_schedule(self.segment, steps)
        log.log(steps, {**self.last, **mine}, (at, {**of_schedule, **hours}))

    def _own_rates(self, seconds: Mapping[str, float]) -> RankRates:
        """How fast each rank is by itself, which it also exports; rank 0 names one that is slow for long."""
        wait = seconds.get("waiting", 0.0) / max(sum(seconds.values()), 1e-9)
        with self.measure("other"):
            flops = self._probe.rate()
        self._metrics.set({"rank_wait_fraction": wait, "rank_matmul_flops": flops})
        rates = RankRates.gathered(flops, wait, collective_device())
        if (found := self._slow_ranks.newly(rates)) and self.main:
            slow, share = found
            logger.warning("rank %d computes at %.0f%% of the median rank's rate: all others wait for it", slow, share)
        return rates

    def _export(self) -> None:
        """Gives Ray the numbers of the last interval, for Prometheus."""
        own = {ours: self.last.get(name) for ours, name in _EXPORTED.items()}
        more = {"checkpoint_time": self._saved_at, "checkpoint_every_steps": self.run.config.checkpoint.every}
        self._metrics.set({**own, **more})

    def _note_start(self) -> None:
        """Writes how long each part of this start took, up to the first step, in seconds."""
        times, self._start = {**self._start, "first_step": time.time()}, {}
        parts = {later: round(times[later] - times[earlier], 3) for earlier, later in pairwise(times)}
        line = {"segment": self.segment.name, "attempt": self.number, "time": time.time(), "seconds": parts}
        with self._progress.suppressed():
            Journal(self.run.starts_path).append([line])

    def _restart_interval(self) -> None:
        self._interval.take()
        self._end_of_step.take_waited()
        self._steps = 0

    def saved(self, ended: Sequence[Saved]) -> None:
        """Notes the checkpoints that became whole, or did not, since the last time."""
        for checkpoint in ended:
            if checkpoint.fault is not None:
                self._failed_saves += 1
                line = {"segment": self.segment.name, "step": checkpoint.step, "fault": checkpoint.fault}
                self._failed_lines().put({**line, "time": time.time()})
            else:
                self._saved_at = time.time()
            if self.attempt and checkpoint.fault is None:
                self._tell(self.attempt).progress(self.done)

    def ledger_snapshot(self) -> dict[str, Any]:
        """The ledger's account, to be kept in the checkpoint."""
        return self.ledger.snapshot() if self.main else {}

    def close(self, step: int, end: End | None, reason: str = "", asked: End | None = None) -> SegmentEnd:
        """Ends the attempt as all ranks have agreed, and returns what the driver is told.

        `reason` says more of a fault; `asked` why the group ends after a finished segment, if it was asked to.
        """
        assert end is not None, "a segment that is not finished ends for a reason"
        faulty = end in (End.UNSAVED, End.DIVERGED)
        self._end_lines()
        if self.attempt and faulty:
            self._tell(self.attempt).end(f"{end}: {reason}" if reason else end)
        self._timeline.switch("other")
        if self.logger:
            self._hand_in(self.logger)
            if faulty:
                self.logger.fail(reason or f"the weights after step {step + 1} are not good")
            else:
                self._end_run(self.logger, end)
        if self.attempt and not faulty:
            self._tell(self.attempt).end(end)
        if self.main:
            self._write_progress(step, end)
        return SegmentEnd(end, self.segment.name, step, reason, asked, self._end_of_step.nodes)

    @staticmethod
    def _end_run(log: MetricLogger, end: End) -> None:
        """Ends the segment's MLflow run, unless other workers follow: how those end, or do not begin, is its state."""
        if end in (End.ROLLED_BACK, End.REGROUPED, End.PREEMPTED):
            log.close(_LAST_WORDS)
        else:
            log.finish("FINISHED" if end is End.FINISHED else "KILLED", timeout=_LAST_WORDS)

    def fail(self, error: BaseException) -> None:
        """Ends the attempt of a rank that fails; what it writes is on the disk when this returns, as Ray may end this
        process any moment."""
        reason = f"{type(error).__name__}: {error}"
        self._end_lines()
        if self.attempt:
            self._tell(self.attempt).end(reason)
        else:
            tell_error(self.run, self.segment.name, self.rank, reason)
        self._timeline.switch("other")
        if self.logger:
            self._hand_in(self.logger)
            self.logger.fail(reason)
        if self.main:
            self._write_progress(self.done, reason)

    def _end_lines(self) -> None:
        self._profiler.close()
        self._metrics.close()
        self.watchdog.close()
        self._consumed.close()
        for lines in (self._dropped_lines, self._failed_lines):
            if lines.cache_info().currsize:
                lines().close()

    def _hand_in(self, log: MetricLogger) -> None:
        """Gives the tracking what a segment leaves beside numbers: its plan, and the samples that could not be read."""
        name = self.segment.name
        if self.run.plan_path(name).exists():
            log.artifact(self.run.plan_path(name), "plan")
        for path in sorted((self.run.folder / "quarantine").glob(f"{name}.rank*.jsonl")):
            if path.stat().st_size:
                log.artifact(path, "quarantine")

    def _write_progress(self, step: int, state: str, rates: RankRates | None = None) -> None:
        content = {
            "segment": self.segment.name,
            "step": step,
            "steps": self.segment.stage.duration.planned_steps,
            "first_step": self.first_step,
            "attempt": self.number,
            "state": state,
            "time": time.time(),
            "metrics": self.last,
        }
        if rates is not None:
            content["ranks"] = rates.record()
        if self._recent:
            seconds, steps = map(sum, zip(*self._recent, strict=True))
            content["recent_step_seconds"] = seconds / steps
        self._progress.write(content, last=state != "training")


def _shares(seconds: Mapping[str, float], steps: int) -> str:
    """What the steps of an interval took, for a log."""
    total = sum(seconds.values())
    parts = ", ".join(
        f"{_DOING.get(name, name)} {part / total:.0%}" for name, part in seconds.items() if part > 0.005 * total
    )
    return f"{total / steps:.3f} s a step ({parts})"


def _journal(path: Path) -> JournalWriter:
    # not synced: what is lost with the machine is done again
    return JournalWriter(Journal(path), sync=False)


_DOING = {"productive": "computing", "waiting": "waiting for data"}
"""What a worker does while its time goes to a category of the ledger."""

_OF_SCHEDULE = (
    "loss", "loss/flow", "loss/cross_pair", "grad_norm", "learning_rate", "samples/s", "tokens/s/device", "mfu",
    "rank_balance", "step_seconds", "data_wait_fraction", "checkpoint_stall_seconds", "memory/peak_gib",
    "speed/slowest_rank", "speed/slowest_rank_lag_s",
)  # fmt: skip
"""What the schedule's run shows too, on the schedule's own step."""

_EXPORTED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "step_seconds": "step_seconds",
    "mfu": "mfu",
    "device_tokens_per_second": "tokens/s/device",
    "samples_per_second": "samples/s",
    "data_wait_fraction": "data_wait_fraction",
    "checkpoint_stall_seconds": "checkpoint_stall_seconds",
    "dropped_steps": "dropped_steps",
    "failed_checkpoints": "failed_checkpoints",
}
"""Metrics for Prometheus (cluster/monitoring/metrics.py) and what they are called here."""

_LAST_WORDS = 5.0
"""Seconds for what the tracking server does not have yet; all workers wait. The driver sends the rest."""

_RECENT = 5
"""Logged intervals whose mean is the time of a step, for estimates."""
