"""The account of one rank: every second in one category, metrics, journals that outlive kills and full disks.

Run: python -m pytest tests/platform/test_account.py
"""

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from domainshuttle.platform import account as module
from domainshuttle.platform.account import Account
from domainshuttle.platform.checkpoint_writer import Saved
from domainshuttle.platform.config import load_config
from domainshuttle.platform.engine import StepResult
from domainshuttle.platform.ledger import CATEGORIES, Ledger
from domainshuttle.platform.schedule import Run
from domainshuttle.platform.timeline import Lap, Timeline


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
        self.files: list[tuple[Path, str]] = []
        self.ended: str | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.points.append((step, dict(metrics)))

    def artifact(self, path: Path, to: str) -> None:
        self.files.append((path, to))

    def finish(self, status: str, timeout: float = 0.0) -> bool:
        self.ended = status
        return True

    def fail(self, error: str, timeout: float = 0.0) -> bool:
        self.ended = f"FAILED: {error}"
        return True


class Kept:
    """An account of the demo's stage 2, on a clock, with its log."""

    def __init__(self, folder: Path, clock: Clock, every: int = 4, first_step: int = 0) -> None:
        self.clock = clock
        config = load_config("demo", [f"output={folder}", f"tracking.every={every}"])
        self.run = Run.open(config)
        start = {"command": clock.now, "asked": clock.now}
        ids = {"tracking_uri": "", "experiment": "x", "name": "x", "segments": {}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "MetricLogger", Log)
            segment = self.run.segment("stage2")
            self.account = Account(self.run, segment, ids, first_step, next(_ATTEMPTS), start, lambda: False, clock)
        log = self.account.logger
        assert isinstance(log, Log)
        self.log: Log = log
        self.done = first_step

    def step(self, seconds: float = 0.0, saves: tuple[Saved, ...] = ()) -> None:
        self.clock.now += seconds
        self.account.step(self.done, StepResult(1.0, False), saves)
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
    st.sampled_from(["finished", "stopped", "RuntimeError: x"]),
)
def test_the_parts_add_up_to_the_wall_clock_whatever_is_interleaved(
    actions: list[tuple[str, float]], imports: float, build: float, every: int, reason: str
) -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        began = clock.now
        kept = Kept(Path(folder), clock, every)
        account, expected = kept.account, dict.fromkeys(CATEGORIES, 0.0)
        clock.now += build
        expected["starting"] += build
        account.begin()
        for action, value in actions:
            if action == "step":
                kept.step(value)
                expected["productive"] += value
            elif action == "saved":
                account.saved([Saved(kept.done, "x", None if value else "full")])
            elif action == "nothing":
                clock.now += value
                expected["productive"] += value
            else:
                category = {"wait": "waiting", "save": "checkpointing", "export": "checkpointing"}.get(
                    action, "sampling"
                )
                block = account.checkpointing() if action == "save" else account.measure(category)
                with block:
                    clock.now += value
                expected[category] += value
        account.close(kept.done, reason)
        summary = kept.summary()
        assert summary.used * 3600 == pytest.approx(clock.now - began, abs=0.01)
        for category in CATEGORIES:
            assert getattr(summary, category) * 3600 == pytest.approx(expected[category], abs=0.01), category


def test_a_save_between_two_logs_makes_no_time(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Clock(), every=10)
    kept.account.begin()
    for _ in range(5):
        kept.step(100)
    kept.step(saves=(Saved(5, "x", None),))  # which writes a line
    for _ in range(4):
        kept.step(100)
    kept.step(100)  # after the last log
    kept.account.close(kept.done, "stopped")
    summary = kept.summary()
    assert (summary.used * 3600, summary.other) == (pytest.approx(1000, abs=0.1), pytest.approx(0, abs=1e-4))
    assert summary.productive * 3600 == pytest.approx(1000, abs=0.1)


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
    ids = {"tracking_uri": "", "experiment": "x", "name": "x", "segments": {}}
    start = {"command": asked - 1, "asked": asked}
    account = Account(run, run.segment("stage2"), ids, 0, 1, start, lambda: False, clock)
    clock.now += 10
    account.begin()
    account.close(0, "stopped")
    assert Ledger(run.ledger_path, clock).summary().starting * 3600 == pytest.approx(26, abs=0.01)
