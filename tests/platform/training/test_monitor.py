"""The monitor of one rank: every second in one category, metrics, journals that outlive kills and full disks.

Run: python -m pytest tests/platform/training/test_monitor.py
"""

import errno
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from domainshuttle.cluster.monitoring.metrics import METRICS
from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.objective import LossOutput
from domainshuttle.model.spec import ModelSpec
from domainshuttle.pipelines.loading.reader import MicroBatch
from domainshuttle.platform.checkpoint.async_writer import Saved
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.engine.zero3 import StepResult
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.run.ledger import CATEGORIES, Ledger
from domainshuttle.platform.run.sample_audit import read_consumed
from domainshuttle.platform.run.segments import End, StartPoint, WorkerJob
from domainshuttle.platform.tracking.outbox import segment_journal
from domainshuttle.platform.training import monitor as module
from domainshuttle.platform.training.loss_metrics import PAIR_KINDS
from domainshuttle.platform.training.mfu import Utilization, evenness, peak_flops
from domainshuttle.platform.training.monitor import Monitor
from domainshuttle.platform.training.rank_rates import MatrixProbe, RankRates
from domainshuttle.platform.training.stopwatch import Lap, Timeline


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Clock:
    """A clock that moves when it is told to, from now on: processes have really started."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Log:
    """What would go to MLflow."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.of_schedule: list[tuple[int, dict[str, float]]] = []
        self.files: list[tuple[Path, str]] = []
        self.ended: str | None = None

    def log(self, step: int, metrics: dict[str, float], schedule: tuple[int, dict[str, float]] | None = None) -> None:
        self.points.append((step, dict(metrics)))
        if schedule is not None:
            self.of_schedule.append(schedule)

    def artifact(self, path: Path, to: str) -> None:
        self.files.append((path, to))

    def tag(self, tags: dict[str, Any]) -> None:
        pass

    def finish(self, status: str, timeout: float = 0.0) -> bool:
        self.ended = status
        return True

    def close(self, timeout: float = 0.0) -> bool:
        self.ended = "open"
        return True

    def fail(self, error: str, timeout: float = 0.0) -> bool:
        self.ended = f"FAILED: {error}"
        return True


def monitor_of(
    run: Run, clock: Clock, asked: float, first_step: int = 0, attempt: int = 1, nodes: list[str] | None = None
) -> Monitor:
    """A monitor of the run's stage 2, whose workers were asked for at a time."""
    start = StartPoint("stage2", first_step, None, attempt)
    ids = {"tracking_uri": "", "experiment": "x", "name": "x", "segments": {}}
    job = WorkerJob({}, 1, (start,), {}, ids, {"command": asked - 1, "asked": asked})
    return Monitor(run, run.segment("stage2"), job, start, lambda: nodes or [], clock=clock)


class Kept:
    """A monitor of the demo's stage 2, on a clock, with its log."""

    def __init__(self, folder: Path, clock: Clock, every: int = 4, first_step: int = 0) -> None:
        self.clock = clock
        config = load_config("demo", [f"output={folder}", f"tracking.every={every}"])
        self.run = Run.open(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "MetricLogger", Log)
            self.monitor = monitor_of(self.run, clock, clock.now, first_step, next(_ATTEMPTS))
        log = self.monitor.logger
        assert isinstance(log, Log)
        self.log: Log = log
        self.done = first_step

    def step(self, seconds: float = 0.0, saves: tuple[Saved, ...] = ()) -> None:
        self.clock.now += seconds
        self.monitor.step(self.done, StepResult(1.0, False), saves)
        self.done += 1

    def summary(self) -> Any:
        return Ledger(self.run.ledger_path, self.clock).summary()


_ATTEMPTS = itertools.count(1)


def test_a_timeline_has_no_gaps_and_no_overlaps() -> None:
    clock = Clock()
    began = clock.now
    timeline = Timeline("productive", clock)
    lap = Lap(timeline)
    clock.now += 3
    with timeline.measure("checkpointing"):
        clock.now += 2
        with pytest.raises(OSError), timeline.measure("sampling"):
            clock.now += 5
            raise OSError("full")
        clock.now += 1
    assert {k: round(v, 3) for k, v in lap.take().items()} == {"productive": 3, "checkpointing": 3, "sampling": 5}
    clock.now += 4
    assert lap.take()["productive"] == pytest.approx(4)
    assert sum(lap.take().values()) == 0
    assert sum(timeline.totals().values()) == pytest.approx(clock.now - began)
    clock.now -= 100  # it was set back
    assert min(lap.take().values()) == 0


SECONDS = st.floats(0.0, 400.0).map(lambda seconds: round(seconds, 3))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["step", "wait", "save", "sample", "export", "nothing"]), SECONDS),
        st.tuples(st.just("saved"), st.booleans()),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    ACTIONS,
    SECONDS,
    SECONDS,
    st.sampled_from([1, 3, 1000]),
    st.sampled_from([End.FINISHED, End.STOPPED, End.UNSAVED, None]),
)
def test_the_parts_add_up_to_the_wall_clock_whatever_is_interleaved(
    actions: list[tuple[str, float]], imports: float, build: float, every: int, end: End | None
) -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        began = clock.now
        kept = Kept(Path(folder), clock, every)
        monitor, expected = kept.monitor, dict.fromkeys(CATEGORIES, 0.0)
        clock.now += build
        expected["starting"] += build
        monitor.begin()
        for action, value in actions:
            if action == "step":
                kept.step(value)
                expected["productive"] += value
            elif action == "saved":
                monitor.saved([Saved(kept.done, "x", None if value else "full")])
            elif action == "nothing":
                clock.now += value
                expected["productive"] += value
            else:
                category = {"wait": "waiting", "save": "checkpointing", "export": "checkpointing"}.get(
                    action, "sampling"
                )
                block = monitor.checkpointing() if action == "save" else monitor.measure(category)
                with block:
                    clock.now += value
                expected[category] += value
        if end is None:
            monitor.fail(RuntimeError("x"))
        else:
            monitor.close(kept.done, end)
        summary = kept.summary()
        assert summary.used * 3600 == pytest.approx(clock.now - began, abs=0.01)
        for category in CATEGORIES:
            assert getattr(summary, category) * 3600 == pytest.approx(expected[category], abs=0.01), category


def test_a_save_between_two_logs_makes_no_time(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock(), every=10)
    kept.monitor.begin()
    for _ in range(5):
        kept.step(100)
    kept.step(saves=(Saved(5, "x", None),))  # which writes a line
    for _ in range(4):
        kept.step(100)
    kept.step(100)  # after the last log
    kept.monitor.close(kept.done, End.STOPPED)
    summary = kept.summary()
    assert (summary.used * 3600, summary.other) == (pytest.approx(1000, abs=0.1), pytest.approx(0, abs=1e-4))
    assert summary.productive * 3600 == pytest.approx(1000, abs=0.1)


@pytest.mark.parametrize("ended", ["at the planned end", "by a stop", "at a log that is due"])
def test_what_steps_before_a_skipped_one_gave_is_logged(tmp_path: Path, ended: str) -> None:
    """The last step of a stage, or the one of a stop, may be one that is not trained on."""
    kept = Kept(tmp_path, Clock(), every=4)
    planned = kept.run.segment("stage2").stage.duration.planned_steps
    kept.monitor.begin()
    kept.done = {"at the planned end": planned - 2, "by a stop": 5, "at a log that is due": 6}[ended]
    micro_batch(kept, kept.done, ["a"], 0.5)
    kept.step(2.0)
    logged = len(kept.log.points)
    if ended == "by a stop":
        kept.run.stop_path.touch()
    part = MicroBatch(kept.done, 0, TrainingBatch.fake(1), ["b"], Counter())
    assert bool(kept.monitor.skipped(kept.done, iter([part])).stop) == (ended == "by a stop")
    assert kept.monitor.look()[1] == kept.done + 1
    ((step, values),) = kept.log.points[logged:]
    assert step == kept.done + 1 and values["loss"] == pytest.approx(0.5) and values["step_seconds"] == 2.0
    kept.monitor.skipped(kept.done + 3, iter([part]))  # nothing was trained since
    assert len(kept.log.points) == logged + 1
    assert len(Journal(kept.run.starts_path).read()[0]) == 1


def test_the_devices_are_held_from_the_processes_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placing the workers and importing what they need is starting, not nothing."""

    class Process:
        def create_time(self) -> float:
            return clock.now - 16

    clock = Clock()
    monkeypatch.setattr(module.psutil, "Process", Process)
    asked = clock.now - 20
    config = load_config("demo", [f"output={tmp_path}"])
    run = Run.open(config)
    monkeypatch.setattr(module, "MetricLogger", Log)
    monitor = monitor_of(run, clock, asked)
    clock.now += 10
    monitor.begin()
    monitor.close(0, End.STOPPED)
    assert Ledger(run.ledger_path, clock).summary().starting * 3600 == pytest.approx(26, abs=0.01)


def micro_batch(
    kept: Kept, step: int, keys: list[str], loss: float = 1.0, kinds: dict[str, int] | None = None, cut: int = 0
) -> None:
    """A forward and backward pass, as the monitor sees it."""
    (source,) = kept.monitor.segment.stage.mixture
    batch = replace(TrainingBatch.fake(len(keys)), sources=(source,) * len(keys))
    each = torch.full((len(keys),), loss)
    output = LossOutput(torch.tensor(loss), each, None, torch.full((len(keys),), 0.5))
    kept.monitor.micro_batch(MicroBatch(step, 0, batch, keys, Counter(kinds or {}), cut_captions=cut), output)


class Disk:
    """The disk under journals and progress, which may be full."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.full = False
        append, write_text = Journal.append, Path.write_text
        patch.setattr(Journal, "append", lambda *values, **named: self._room() or append(*values, **named))
        patch.setattr(Path, "write_text", lambda *values, **named: self._room() or write_text(*values, **named))

    def _room(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_full_disk_ends_no_step_and_loses_no_line(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(tmp_path, Clock(), every=1)
    run, monitor = kept.run, kept.monitor
    monitor.begin()
    before = run.read_progress()
    disk.full = True
    for step in range(3):
        micro_batch(kept, step, [f"a{step}", f"b{step}"])
        monitor.dropped(step, "spike", 7.0)
        kept.step(1.0)
    time.sleep(2.5)
    assert run.read_progress() == before
    assert read_consumed(run, "stage2") == ({}, 0)
    disk.full = False
    micro_batch(kept, 3, ["a3", "b3"])
    kept.step(1.0)
    monitor.close(kept.done, End.STOPPED)
    consumed, again = read_consumed(run, "stage2")
    assert {step: part.samples for (step, _, _), part in consumed.items()} == {n: [f"a{n}", f"b{n}"] for n in range(4)}
    assert again == 0
    assert [line["step"] for line in Journal(run.dropped_path("stage2", 0)).read()[0]] == [0, 1, 2]
    assert run.read_progress()["state"] == "stopped"
    warnings = [message.split(" can not")[0] for message in caplog.messages if "can not be written" in message]
    assert len(warnings) == len(set(warnings))
    assert {"where the run is", str(run.consumed_path("stage2", 0))} <= set(warnings)


def test_a_line_torn_by_a_kill_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    first = Kept(tmp_path, Clock())
    micro_batch(first, 0, ["a0", "b0"])
    first.monitor.close(1, End.STOPPED)
    path = first.run.consumed_path("stage2", 0)
    with path.open("a") as file:
        file.write('{"step": 1, "part": 0, "attem')
    second = Kept(tmp_path, Clock(), first_step=1)
    micro_batch(second, 1, ["a1", "b1"])
    second.monitor.close(2, End.STOPPED)
    consumed, again = read_consumed(first.run, "stage2")
    assert {step: part.samples for (step, _, _), part in consumed.items()} == {0: ["a0", "b0"], 1: ["a1", "b1"]}
    assert again == 0


def test_an_attempt_begins_on_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    Kept(tmp_path, Clock()).run.progress_path.unlink()  # and is killed
    disk.full = True
    clock = Clock()
    run = Run(load_config("demo", [f"output={tmp_path}"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MetricLogger", Log)
        monitor = monitor_of(run, clock, clock.now, attempt=99)
    monitor.begin()
    clock.now += 10
    disk.full = False
    monitor.close(0, End.STOPPED)
    summary = Ledger(run.ledger_path, clock).summary()
    assert summary.attempts == 2
    assert summary.productive * 3600 == pytest.approx(10, abs=0.01)


def test_dropped_steps_are_not_in_the_mean_loss(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock(), every=3)
    kept.monitor.begin()
    for loss in (1.0, float("nan"), 3.0):
        micro_batch(kept, kept.done, ["a", "b"], loss, {"photo+photo": 1} if loss == loss else {"augmented": 5})
        if loss != loss:
            kept.monitor.dropped(kept.done, "not finite", loss)
        kept.step(2.0)
    ((step, metrics),) = kept.log.points
    assert step == 3
    assert metrics["loss"] == metrics["loss/flow"] == metrics["loss/flow/t_0.50-0.75"] == pytest.approx(2.0)
    assert metrics["pairs/photo+photo"] == 1.0
    assert "pairs/augmented" not in metrics
    assert metrics["samples/s"] == pytest.approx(1.0)  # they were work all the same
    assert metrics["dropped_steps"] == 1
    for _ in range(3):  # an interval of which nothing was kept
        micro_batch(kept, kept.done, ["a"], float("nan"))
        kept.monitor.dropped(kept.done, "not finite", float("nan"))
        kept.step(2.0)
    assert "loss" not in kept.log.points[-1][1]
    assert kept.log.points[-1][1]["dropped_steps"] == 4


def test_pairs_are_shares_of_all_ranks_in_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(tmp_path, Clock(), every=1)
    kept.monitor.begin()

    def with_another_rank(total: torch.Tensor) -> None:
        augmented = len(total) - 1 - len(PAIR_KINDS) + PAIR_KINDS.index("augmented")
        total[augmented] += 6

    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    for kinds in ({"augmented": 1, "edited+photo": 1}, {"photo+photo": 2}):
        micro_batch(kept, kept.done, ["a", "b"], 1.0, kinds)
        kept.step(1.0)
    first, second = ({k: v for k, v in point.items() if k.startswith("pairs/")} for _, point in kept.log.points)
    assert first == {"pairs/augmented": 7 / 8, "pairs/edited+photo": 1 / 8}
    assert second == {"pairs/augmented": 6 / 8, "pairs/photo+photo": 2 / 8}


def test_cut_captions_are_a_share_of_the_samples_in_the_interval(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock(), every=2)
    kept.monitor.begin()
    for cut in (1, 2, 0, 0):
        micro_batch(kept, kept.done, ["a", "b", "c", "d"], cut=cut)
        kept.step(1.0)
    first, second = (metrics for _, metrics in kept.log.points)
    assert first["cut_captions"] == 3 / 8 and "cut_captions" not in second


def test_a_roll_back_tells_what_was_dropped_at_once(tmp_path: Path) -> None:
    """Nothing may follow: of a segment's last step no other point would say that it was dropped."""
    kept = Kept(tmp_path, Clock(), every=5)
    kept.monitor.begin()
    micro_batch(kept, 0, ["a"], float("nan"))
    kept.monitor.dropped(0, "not finite", float("nan"))
    assert kept.monitor.roll_back(0, [0]).bad == (0,)
    assert kept.log.points == [(1, {"dropped_steps": 1.0})]


def test_counters_go_on_after_a_restart(tmp_path: Path) -> None:
    first = Kept(tmp_path, Clock(), every=1)
    first.monitor.begin()
    first.monitor.dropped(0, "spike", 9.0)
    first.step(1.0, (Saved(1, "x", "the disk is full"), Saved(1, "x", "the disk is full")))
    first.monitor.fail(RuntimeError("a worker died"))
    second = Kept(tmp_path, Clock(), every=1)
    second.monitor.begin()
    second.monitor.dropped(0, "spike", 9.0)  # the same again
    second.step(1.0)
    second.monitor.dropped(1, "spike", 9.0)
    second.step(1.0, (Saved(2, "x", "the disk is full"),))
    assert [point["dropped_steps"] for _, point in second.log.points] == [1, 2]
    assert [point["failed_checkpoints"] for _, point in second.log.points] == [2, 3]


def test_sampling_is_no_stall_of_a_checkpoint_and_the_hours_add_up(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock(), every=2)
    kept.monitor.begin()
    with kept.monitor.measure("sampling"):
        kept.clock.now += 50
    with kept.monitor.checkpointing():
        kept.clock.now += 3
    kept.step(4.0)
    kept.step(4.0)
    ((_, metrics),) = kept.log.points
    assert metrics["checkpoint_stall_seconds"] == pytest.approx(3)
    assert metrics["gpu_hours/sampling"] * 3600 == pytest.approx(50)
    assert metrics["gpu_hours/productive"] * 3600 == pytest.approx(8)
    assert sum(metrics[f"gpu_hours/{name}"] for name in CATEGORIES) == pytest.approx(metrics["gpu_hours/used"])


def test_utilization_is_the_models_flops_against_the_peak(tmp_path: Path) -> None:
    spec = ModelSpec.preset("tiny")
    batch = TrainingBatch.fake(2, frames=2, height=8, width=8, references=3, text_tokens=16)
    trained = ["blocks.*.attn1.*", "*_ref*"]
    used = Utilization(spec.transformer_config(), trained, peak=1e12)
    flops = spec.step_flops(
        (2, 8, 8), batch=2, references=3, paired_references=3, text_tokens=16, trained=trained, recompute=True
    ).model
    used.add(batch)
    used.add(batch)
    assert used.take(4.0) == {"mfu": pytest.approx(2 * flops / 4.0 / 1e12)}
    assert used.take(4.0) == {"mfu": 0.0}
    if peak_flops() is None:  # as on a CPU
        unknown = Utilization(spec.transformer_config(), trained)
        unknown.add(batch)
        assert unknown.take(4.0) == {}


def test_samples_of_ranks_that_share_them_are_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each has done its part of the arithmetic."""
    monkeypatch.setattr(module, "MetricLogger", Log)
    config = load_config("demo", [f"output={tmp_path}", "cluster.workers=4", "engine.sequence_parallel=2"])
    run, batch = Run.open(config), TrainingBatch.fake(2, frames=2, height=8, width=8, references=1, text_tokens=16)
    batch = replace(batch, sources=("sprites-videos",) * 2)
    loss = LossOutput(torch.tensor(1.0), torch.ones(2), None, torch.full((2,), 0.5))
    for rank in range(4):
        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        monitor = monitor_of(run, Clock(), time.time(), attempt=1)
        monitor.micro_batch(MicroBatch(0, 0, batch, [f"{rank // 2} a", f"{rank // 2} b"], Counter()), loss)
        monitor.dropped(0, "spike", 2.0)
        monitor.close(0, End.STOPPED)
    noted = [part.samples for part in read_consumed(run, "stage2")[0].values()]
    assert sorted(noted) == [["0 a", "0 b"], ["1 a", "1 b"]]
    spec = ModelSpec.preset("tiny").transformer_config()
    whole, shared = Utilization(spec, ["*"], peak=1e12), Utilization(spec, ["*"], peak=1e12, sharing=2)
    for one in (whole, shared):
        one.add(batch)
    assert shared.take(1.0)["mfu"] == pytest.approx(whole.take(1.0)["mfu"] / 2)


def test_the_balance_of_ranks_is_what_the_mean_is_of_the_longest(tmp_path: Path) -> None:
    assert evenness(np.array([[2.0, 4.0], [1.0, 4.0], [3.0, 1.0]])) == pytest.approx((2 + 3) / (3 + 4))
    kept = Kept(tmp_path, Clock(), every=1)
    utilization = Utilization(ModelSpec.preset("tiny").transformer_config(), ["*"])
    kept.monitor.built({}, utilization)
    kept.monitor.begin()
    utilization.add(TrainingBatch.fake(2, frames=2, height=8, width=8, references=3, text_tokens=16))
    kept.step(1.0)
    kept.step(1.0)
    assert [metrics.get("rank_balance") for _, metrics in kept.log.points] == [1.0, None]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("Tesla T4", None)],
)
def test_peaks_of_devices(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops() == peak


def test_plan_and_quarantine_are_handed_in_at_the_end(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock())
    utilization = Utilization(ModelSpec.preset("tiny").transformer_config(), ["*"])
    kept.monitor.built({"digest": "d", "steps_per_epoch": 3}, utilization)
    kept.monitor.begin()
    kept.run.quarantine_path("stage2", 0).write_text("")
    kept.run.quarantine_path("stage2", 1).write_text('{"key": "x"}\n')
    kept.monitor.close(0, End.FINISHED)
    assert [(path.name, to) for path, to in kept.log.files] == [
        ("stage2.json", "plan"),
        ("stage2.rank00001.jsonl", "quarantine"),
    ]
    assert json.loads(kept.log.files[0][0].read_text())["steps_per_epoch"] == 3


def test_another_ranks_error_reaches_the_spool(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock())
    monitor = kept.monitor
    monitor.main, monitor.rank, monitor.attempt, monitor.logger = False, 3, None, None
    monitor.fail(ValueError("the cause"))
    lines, _ = segment_journal(kept.run.spool, "stage2").read()
    assert [line["values"] for line in lines] == [{"error.rank3": "ValueError: the cause"}]


@pytest.mark.parametrize(
    ("end", "state"),
    [(End.ROLLED_BACK, "open"), (End.REGROUPED, "open"), (End.PREEMPTED, "open"), (End.STOPPED, "KILLED"),
     (End.FINISHED, "FINISHED")],
)  # fmt: skip
def test_a_stage_that_goes_on_is_not_ended(end: End, state: str, tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock())
    kept.monitor.begin()
    kept.monitor.close(0, end)
    assert kept.log.ended == state


def test_the_schedule_has_the_segments_curve_on_its_own_step_and_each_its_own_hours(tmp_path: Path) -> None:
    clock = Clock()
    run = Run.open(load_config("demo", [f"output={tmp_path}"]))
    before = Ledger(run.ledger_path, clock).start(1, "stage1", 0)
    clock.now += 100
    before.add("productive", 100)
    before.progress(400)
    before.end("finished")
    kept = Kept(tmp_path, clock, every=2)
    kept.monitor.begin()
    kept.step(5.0)
    kept.step(5.0)
    ((_, mine), (step, schedule)) = kept.log.points[0], kept.log.of_schedule[0]
    assert step == sum(one.duration.planned_steps for one in run.config.stages if one.name != "stage2") + 2
    assert schedule["learning_rate"] == mine["learning_rate"]
    assert mine["gpu_hours/used"] * 3600 == pytest.approx(10, abs=0.01)
    assert schedule["gpu_hours/used"] * 3600 == pytest.approx(110, abs=0.01)
    kept.monitor.close(kept.done, End.STOPPED)


def test_a_stop_between_two_logs_is_logged(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock(), every=10)
    kept.monitor.begin()
    for _ in range(3):
        kept.step(1.0)
    kept.run.stop_path.touch()
    kept.monitor.agree()
    kept.step(1.0)
    assert [step for step, _ in kept.log.points] == [4]


def test_what_was_reached_before_is_read_from_the_samples(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock())
    for step in range(57):
        micro_batch(kept, step, ["a"])
    kept.monitor.close(57, End.STOPPED)
    with kept.run.consumed_path("stage2", 0).open("a") as file:
        file.write('{"step": 99, "par')  # torn by a kill
    assert (kept.run.reached_before("stage2"), kept.run.reached_before("stage1")) == (57, 0)


def test_the_slowest_rank_and_the_one_that_waits_longest_are_named() -> None:
    rates = RankRates([5.0, 4.9, 3.0, 5.1], [0.0, 0.01, 0.0, 0.4])
    assert (rates.slowest, rates.longest_waiting) == (2, 3)
    assert rates.slowest_share == pytest.approx(3.0 / 4.95)
    assert rates.record() == {
        "slowest_rank": 2, "slowest_share": pytest.approx(0.606, abs=1e-3), "longest_wait_rank": 3, "longest_wait": 0.4
    }  # fmt: skip


def test_a_probe_measures_products_and_leaves_the_random_state() -> None:
    """Against the same product timed here: within a factor, since the machine is shared."""
    before = torch.get_rng_state()
    probe = MatrixProbe(torch.device("cpu"))
    measured = max(probe.rate() for _ in range(20))
    values = torch.randn(256, 256)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        values @ values
        times.append(time.perf_counter() - began)
    torch.set_rng_state(before)
    assert 0.2 < measured / (2 * 256**3 / min(times)) < 5
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_are_compared_at_each_logged_step_and_a_slow_one_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = RankRates([1e12, 1e12, 5e11, 1e12], [0.0, 0.0, 0.0, 0.2])
    monkeypatch.setattr(module.RankRates, "gathered", lambda *_: given)
    kept = Kept(tmp_path, Clock(), every=1)
    kept.monitor.begin()
    for _ in range(12):
        kept.step(1.0)
    assert kept.run.read_progress()["ranks"] == given.record()
    named = [record.getMessage() for record in caplog.records if "median rank" in record.getMessage()]
    assert named == ["rank 2 computes at 50% of the median rank's rate: all others wait for it"]


def test_what_is_exported_is_known_to_alerts_and_panels() -> None:
    assert set(module._EXPORTED) <= set(METRICS)
