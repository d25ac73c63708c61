"""The whole schedule on 64 to 1,024 simulated ranks, with failures at published rates, in minutes.

Real are the driver's schedule with its starts, faults and decisions, checkpoints with the files and notes of every
rank, their manifests, retention and choice, the ledger, progress, the workers' signs of life, the step plan, the audit
of samples, and the tracking with MLflow. Simulated are the workers, which compute nothing, and the clock. A failure
strikes at a random moment, also within a start or while a checkpoint is written. At the end nothing may be lost or
repeated, and the ledger's goodput is compared with what `plan` predicts in closed form (platform/planning/goodput.py).

    python benchmarks/simulation.py                      # 64, 256 and 1,024 ranks, both experts, 14,000 steps each
    python benchmarks/simulation.py --ranks 1024 --between-failures 1.0 --steps 3000
"""

import argparse
import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import SampleInfo
from domainshuttle.pipelines.shards.tar import Member, ShardEntry
from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer
from domainshuttle.platform.checkpoint.backend import FileEntry
from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.resume import AUTO
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.driver.run_metrics import DriverMetrics
from domainshuttle.platform.driver.schedule_loop import Schedule
from domainshuttle.platform.planning.goodput import Reliability
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import ProgressFile, Run
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.run.ledger import Attempt, Ledger
from domainshuttle.platform.run.sample_audit import SampleAudit, audit_samples
from domainshuttle.platform.run.segments import End, Segment, SegmentEnd, WorkerJob
from domainshuttle.platform.run.weights_digest import sizes_digest
from domainshuttle.platform.run.workers import WorkerState
from domainshuttle.platform.tracking.mlflow import MetricLogger, RunIds, open_schedule

MEAN_HOURS, OF_DEVICES = 7.9, 1024
"""Hours between failures of so many GPUs."""
MOST_AUDITED = 300_000
"""Samples that are audited one by one; of more, steps are."""
SAMPLES = 5_000


@dataclass
class Clock:
    """Simulated seconds since 1970."""

    now: float = 1.8e9

    def __call__(self) -> float:
        return self.now


@dataclass
class Costs:
    """What the real parts took, in seconds of this process's processor, by part."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, part: str, seconds: float) -> None:
        """Counts a call."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.calls[part] = self.calls.get(part, 0) + 1

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts what is done within."""
        began = time.process_time()
        try:
            yield
        finally:
            self.add(part, time.process_time() - began)

    def each(self) -> dict[str, float]:
        """Seconds of a call."""
        return {part: seconds / self.calls[part] for part, seconds in self.seconds.items()}


_PUBLISHED = Reliability(3600 * MEAN_HOURS, start=180.0, detect=30.0, stall=1.0, write=20.0)


@dataclass(frozen=True)
class World:
    """What the simulated workers are, in simulated seconds."""

    ranks: int
    step_seconds: float = 23.0
    reliability: Reliability = _PUBLISHED
    seed: int = 0

    @classmethod
    def of(cls, ranks: int, hours: float = MEAN_HOURS, seed: int = 0) -> "World":
        """With `hours` between failures of 1,024 ranks, and as many times more as there are fewer."""
        world = cls(ranks, seed=seed)
        return replace(
            world, reliability=replace(world.reliability, between_failures=3600 * hours * OF_DEVICES / ranks)
        )


@dataclass
class Result:
    """What came of a simulated schedule."""

    world: World
    steps: int
    failures: int
    starts: int
    unfinished: int
    """Checkpoints that a failure struck while they were written."""
    goodput: float
    predicted: float
    audit: SampleAudit | None
    history: dict[str, list[int]]
    """Of each segment, the attempt whose work each step is, in the end; -1: nobody's."""
    costs: Costs
    days: float
    wall: float

    @property
    def whole(self) -> bool:
        """Whether each planned step, and each sample of it, was trained exactly once."""
        steps = all(owner >= 0 for owners in self.history.values() for owner in owners)
        return steps and (self.audit is None or (not self.audit.lost and not self.audit.repeated))


class Workers:
    """A worker group without workers, in the place of `driver.worker_group.WorkerGroup`."""

    def __init__(self, run: Run, job: WorkerJob, size: int, simulation: "Simulation") -> None:
        self.size, self.idle_seconds = size, 0.0
        self.end: SegmentEnd | None = None
        self.error: BaseException | None = None
        self.run, self.job, self.simulation = run, job, simulation

    def waits_for(self) -> str:
        return "waiting for nothing"

    def running(self) -> Iterator[None]:
        simulation, clock = self.simulation, self.simulation.clock
        simulation.starts += 1
        simulation.note_workers(self.job.attempt, self.size)
        if not simulation.pass_time(simulation.world.reliability.start):
            yield from self._died(None)
            return
        first = True
        for start in self.job.starts:
            segment = self.run.segment(start.segment)
            ledger = Ledger(self.run.ledger_path, clock)
            asked = self.job.times["asked"] if first else None
            attempt = ledger.start(self.size, segment.name, start.first_step, asked, since=asked)
            first = False
            progress = ProgressFile(self.run.progress_path)
            done = start.first_step
            yield
            while done < segment.last_step:
                done += 1
                if not simulation.pass_time(simulation.world.step_seconds, attempt, "productive"):
                    yield from self._died(attempt)
                    return
                simulation.consumed(segment, done - 1, start.attempt, self.job.attempt)
                if done % 10 == 0 or done == segment.last_step:
                    attempt.progress(done, every=10.0)
                    progress.write(_progress(segment, done, start.first_step, start.attempt, clock()))
                    simulation.logged(segment, done, start.first_step)
                if done % self.run.config.checkpoint.every == 0 or done == segment.last_step:
                    if not simulation.pass_time(simulation.world.reliability.stall, attempt, "checkpointing"):
                        yield from self._died(attempt)
                        return
                    simulation.save(segment, done, ledger, attempt, last=done == segment.last_step)
                    yield
            simulation.write_weights(segment)
            attempt.end(End.FINISHED)
            simulation.end_log()
        self.end = SegmentEnd(End.FINISHED, segment.name, done)
        yield

    def _died(self, attempt: Attempt | None) -> Iterator[None]:
        """A rank is gone: its attempt says nothing more, and the others lose their connections."""
        simulation = self.simulation
        simulation.end_log()
        if attempt is not None:
            attempt._writer.close()  # what it had handed in reaches the disk
        simulation.clock.now += simulation.world.reliability.detect
        dead = int(simulation.random.integers(self.size))
        simulation.note_workers(self.job.attempt, self.size, dead)
        lost: Exception = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:3344")
        failures: dict[int, Exception] = dict.fromkeys(range(self.size), lost)
        failures[dead] = RayActorError("ab12", "The actor died unexpectedly before finishing this task.")
        self.error = WorkerGroupError(f"worker {dead} died", failures)
        yield


class Simulation:
    """One schedule of one world in a folder."""

    def __init__(self, config: RunConfig, world: World, tracked: bool = False) -> None:
        """`tracked`: with MLflow, of an sqlite store in the run's folder."""
        self.world, self.clock, self.costs = world, Clock(), Costs()
        self.random = np.random.default_rng([world.seed, world.ranks])
        self.failures = self.starts = self.unfinished = 0
        self.run = Run.open(config)
        self.history = {one.name: [-1] * one.last_step for one in self.run.segments()}
        self._next_failure = self.clock.now + self._draw()
        self._store = CheckpointStore.of(config)
        self._audited = sum(one.last_step * one.stage.global_batch for one in self.run.segments()) <= MOST_AUDITED
        self._lines: list[dict[str, Any]] = []
        self._saver: AsyncCheckpointer | None = None
        self._tracked, self._log = tracked, None
        self._metrics = DriverMetrics(self.run, self.clock)

    def train(self) -> Result:
        """Trains the whole schedule."""
        began, wall = self.clock.now, time.monotonic()
        config = self.run.config
        tracker: Any = NoTracking()
        if self._tracked:
            tracker = open_schedule(
                config.tracking_uri, config.tracking.experiment, config.name, config.flattened(), {}, self.run.spool
            )
        self.schedule = TimedSchedule(
            self.run, tracker, self._watch, lambda text: None,
            workers=lambda run, job, size: Workers(run, job, size, self), clock=self.clock,  # type: ignore[arg-type]
        )  # fmt: skip
        self.schedule.costs = self.costs
        outcome = self.schedule.train()
        assert outcome == "finished", outcome
        if self._tracked:
            tracker.finish()
        return self._result(time.monotonic() - wall, began)

    def _watch(self) -> None:
        with self.costs.of("a look of the driver"):
            self._metrics.update()

    def logged(self, segment: Segment, step: int, first_step: int) -> None:
        """Tracks a step's numbers, as rank 0 does."""
        if not self._tracked:
            return
        if self._log is None:
            ids = RunIds.from_dict(self.run.read_ids() or {}, self.run.config.tracking_uri)
            self._log = MetricLogger(ids, segment.name, self.run.spool, start_step=first_step)
        hours = Ledger(self.run.ledger_path).summary().metrics() if step % 1000 == 0 else {}
        self._log.log(step, {"loss": 1 / step, "step_seconds": self.world.step_seconds, **hours}, None)

    def end_log(self) -> None:
        """The process of rank 0 ends, or its segment does."""
        self._saver = None
        if self._log is not None:
            self._log.close(60.0)
            self._log = None

    def _draw(self) -> float:
        return float(self.random.exponential(self.world.reliability.between_failures))

    def pass_time(self, seconds: float, attempt: Attempt | None = None, category: str = "") -> bool:
        """Moves the clock; False where a rank fails before the end, which is where it then is."""
        if self.clock.now + seconds < self._next_failure:
            self.clock.now += seconds
            if attempt is not None:
                attempt.add(category, seconds)
            return True
        self.clock.now = self._next_failure
        self._next_failure = self.clock.now + self.world.reliability.detect + self._draw()
        self.failures += 1
        self._flush()
        return False

    # What workers leave

    def note_workers(self, attempt: int, size: int, dead: int | None = None) -> None:
        """The signs of life of all ranks; with `dead` their last words, but of that one."""
        folder = self.run.worker_path(attempt, 0).parent
        folder.mkdir(parents=True, exist_ok=True)
        state = WorkerState(0, size, "node", "n", 1, "log", self.clock.now, self.clock.now)
        for rank in range(size):
            ended = None if dead is None or rank == dead else "RuntimeError: connection closed"
            beat = self.clock.now - (60.0 if rank == dead else 0.0)
            own = replace(state, rank=rank, ended=ended, beat=beat, node_rank=rank // 8)
            (folder / f"rank{rank:05d}.json").write_text(json.dumps(asdict(own)))

    def consumed(self, segment: Segment, step: int, start: int, attempt: int) -> None:
        """A step was made."""
        self.history[segment.name][step] = attempt
        if self._audited:
            index, plan = self._feed(segment)
            samples = [f"{row.source}/{row.key}" for row in index.rows(plan[step].rows)]
            share = len(samples) // self.world.ranks
            self._lines += [
                {"segment": segment.name, "rank": rank, "step": step, "part": 0, "attempt": start,
                 "samples": samples[rank * share : (rank + 1) * share]}
                for rank in range(self.world.ranks)
            ]  # fmt: skip
            if len(self._lines) > 500_000:
                self._flush()

    def _feed(self, segment: Segment) -> tuple[Any, Any]:
        feed = make_feed(self.run.config, segment)
        return feed.index(), feed.plan()

    def _flush(self) -> None:
        """Brings the lines of consumed samples to the ranks' files."""
        by_file: dict[Path, list[dict[str, Any]]] = {}
        for line in self._lines:
            by_file.setdefault(self.run.consumed_path(line.pop("segment"), line.pop("rank")), []).append(line)
        for path, lines in by_file.items():
            Journal(path).append(lines)
        self._lines = []

    def save(self, segment: Segment, step: int, ledger: Ledger, attempt: Attempt, last: bool) -> None:
        """The checkpoint of a step, of the files of all ranks: whole, unless a failure strikes while it is written."""
        world, config = self.world, self.run.config
        name = str(Name(segment.name, step))
        if self._next_failure < self.clock.now + world.reliability.write and not last:
            self.unfinished += 1
            self._write_parts(name, "an attempt that died", int(self.random.integers(1, world.ranks)))
            return
        began = time.process_time()
        origin = self.schedule.origin(segment).identified(self.run.fingerprints)
        state = TrainingState(
            segment.name, step, segment.seed, world.ranks, config.digest(), make_feed(config, segment).plan().state(),
            ledger.snapshot(), {}, base=origin.identity, loss=1 / step, config=config.decisive(),
            trained=self.schedule.trained_digest(segment), origin=origin.place,
            finished={one.name: one.last_step for one in self.run.segments() if one.finished},
        )  # fmt: skip
        if self._saver is None:
            everyone = world.ranks
            self._saver = AsyncCheckpointer(self._store, config.checkpoint, 0, everyone, lambda mine: [mine] * everyone)
        self._saver.save(state, lambda: _write_part)
        job = self._saver._job
        assert job is not None, "the save was given up"
        written = time.thread_time()
        self._write_parts(name, job.attempt, world.ranks)
        parts = time.thread_time() - written
        self._saver.wait()  # what it took to write is passed by the clock while steps are made
        self.costs.add("a checkpoint: notes, manifest, removal", time.process_time() - began - parts)
        attempt.progress(step)

    def _write_parts(self, name: str, attempt: str, ranks: int) -> None:
        """The files and notes of ranks 1 and up, as `AsyncCheckpointer` leaves them."""
        folder = self._store.place.local(name)
        (folder / "zero").mkdir(parents=True, exist_ok=True)
        for rank in range(1, ranks):
            file = f"zero/rank-{rank:05d}-of-{self.world.ranks:05d}.safetensors"
            (folder / file).write_bytes(_PART)
            entry = FileEntry(size=len(_PART), checksum=_PART_DIGEST, rank=rank)
            note = {"attempt": attempt, "rank": rank, "host": "node", "files": {file: entry}, "seconds": 1.0}
            aside = folder / "note.part"  # a note is there whole or not at all
            aside.write_text(json.dumps(note))
            aside.replace(folder / f"rank-{rank:05d}.json")

    def write_weights(self, segment: Segment) -> None:
        """A finished segment's weights, which are what the next one begins with."""
        self._flush()
        segment.weights.mkdir(parents=True, exist_ok=True)
        (segment.weights / "config.json").write_text(json.dumps({"segment": segment.name}))
        segment.finish(segment.last_step, self.run.fingerprints)

    def _result(self, wall: float, began: float) -> Result:
        steps = sum(one.last_step for one in self.run.segments())
        summary = Ledger(self.run.ledger_path).summary()
        every = self.run.config.checkpoint.every
        audit = audit_samples(self.run.config) if self._audited else None
        return Result(
            self.world, steps, self.failures, self.starts, self.unfinished, summary.goodput,
            self.world.reliability.goodput(every * self.world.step_seconds), audit, self.history, self.costs,
            (self.clock.now - began) / 86400, wall,
        )  # fmt: skip


_PART = b"a rank's part"
_PART_DIGEST = hashlib.blake2b(_PART, digest_size=16).hexdigest()


def _write_part(folder: Path) -> None:
    (folder / "zero").mkdir(parents=True, exist_ok=True)
    (folder / "zero" / "rank-00000.safetensors").write_bytes(_PART)


def _progress(segment: Segment, step: int, first_step: int, attempt: int, now: float) -> dict[str, Any]:
    """As the monitor of rank 0 writes it."""
    return {
        "segment": segment.name, "step": step, "steps": segment.last_step, "first_step": first_step,
        "attempt": attempt, "state": "training", "time": now, "metrics": {},
    }  # fmt: skip


class NoTracking:
    """In the place of a tracker."""

    ids = RunIds("", "simulation", "simulation")

    def open_segment(self, name: str, params: Any = None, tags: Any = None) -> bool:
        return True

    def log_dataset(self, *_: Any) -> bool:
        return True

    def tag(self, tags: Any, segment: str | None = None) -> bool:
        return True


class TimedSchedule(Schedule):
    """The driver's schedule, whose decisions are timed."""

    costs: Costs

    def _start_point(self, segment: Segment, resume: str = AUTO) -> Any:
        with self.costs.of("where a start begins"):
            return super()._start_point(segment, resume)

    def _handle_fault(self, error: BaseException, job: WorkerJob) -> None:
        with self.costs.of("a fault"):
            super()._handle_fault(error, job)

    def origin(self, segment: Segment) -> Any:
        """The weights that a segment begins with."""
        return self._origins[segment.name]

    def trained_digest(self, segment: Segment) -> str:
        """Of the parameters that a segment trains."""
        return sizes_digest(self._selected(segment).trained)


def configuration(folder: Path, ranks: int, steps: int, every: int, experts: int = 2) -> RunConfig:
    """The paper's schedule, a seventh of the steps in stage 1, of a tiny network, with a batch of a sample a rank."""
    name, bucket = "clips", "1x64x64"
    first = max(1, steps // 7)
    stage = {"mixture": {name: 1}, "global_batch": ranks, "micro_batch": 1, "references": 0}
    content: dict[str, Any] = {
        "name": f"simulated-{ranks}", "data": str(folder / "data"), "output": str(folder / "runs"),
        "model": {"size": {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 48,
                           "text_dim": 16, "freq_dim": 32, "text_len": 8}},
        "encoders": {"text_len": 8},
        "corpora": {name: {"buckets": [bucket]}},
        "stages": [
            {**stage, "name": "stage1", "steps": first, "trained": ["blocks.*.attn1.*", "patch_embedding*"]},
            {**stage, "name": "stage2", "steps": steps - first, "trained": ["blocks.*.attn1.*"]},
        ],
        "cluster": {"workers": ranks, "gpus_per_worker": 0, "max_failures": 50},
        "checkpoint": {"every": every, "keep": 3, "keep_every": 10 * every},
        "tracking": {"experiment": "simulation"},
    }  # fmt: skip
    if experts == 2:
        content["experts"] = [{"name": "high", "low": 0.875}, {"name": "low", "high": 0.875}]
    config = RunConfig.model_validate(content)
    index = Path(config.corpus(name).index)
    if not index.exists():
        index.parent.mkdir(parents=True)
        entry = ShardEntry("a.tar", "", (Member("safetensors", 0, 1),), 0)
        info = SampleInfo(caption="x", source="s", kind="image", frames=1, size=(64, 64), subjects=[], references=[])
        rows = [IndexRow.of(replace(entry, key=f"{n}"), info, parse_bucket(bucket)) for n in range(SAMPLES)]
        write_index(index, rows, IndexMetadata(corpus=name, stage="encoded"))
    return config


def simulate(
    folder: Path, ranks: int, steps: int, every: int = 100, hours: float = MEAN_HOURS, seed: int = 0,
    experts: int = 2, tracked: bool = False,
) -> Result:  # fmt: skip
    """One schedule, of so many steps an expert, in a folder that is then removed."""
    try:
        return Simulation(
            configuration(folder, ranks, steps, every, experts), World.of(ranks, hours, seed), tracked
        ).train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=14_000, help="of an expert")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--between-failures", type=float, default=MEAN_HOURS, help="hours, of 1,024 ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tracking", action="store_true", help="without MLflow")
    parser.add_argument("--folder", type=Path, help="where runs lie while they are simulated; without it in memory")
    given = parser.parse_args()
    memory = Path("/dev/shm")
    rows = []
    for ranks in given.ranks:
        folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=given.folder or (memory if memory.is_dir() else None)))
        found = simulate(
            folder, ranks, given.steps, given.every, given.between_failures, given.seed, tracked=not given.no_tracking
        )
        rows.append(found)
        audited = "by sample" if found.audit is not None else "by step"
        print(
            f"{ranks:>5} ranks  {found.steps:,} steps  {found.failures} failures  {found.unfinished} torn checkpoints  "
            f"{'nothing lost or repeated' if found.whole else 'LOST OR REPEATED'} ({audited})  "
            f"goodput {found.goodput:.2%}, predicted {found.predicted:.2%}  "
            f"{found.days:.1f} days in {found.wall:.0f} s",
            flush=True,
        )
    print("\nProcessor seconds of a call, and how they grow with the ranks (1: linearly):")
    for part in rows[0].costs.seconds:
        each = [row.costs.each().get(part, math.nan) for row in rows]
        growth = [
            math.log(later / earlier) / math.log(two.world.ranks / one.world.ranks)
            for (earlier, later), (one, two) in zip(pairwise(each), pairwise(rows), strict=True)
        ]
        shown = ", ".join(f"{one.world.ranks}: {value:.3f}" for one, value in zip(rows, each, strict=True))
        print(f"  {part:<42} {shown}   exponents {', '.join(f'{one:.2f}' for one in growth)}")


if __name__ == "__main__":
    main()
