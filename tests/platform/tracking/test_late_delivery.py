"""What is sent later looks as what was sent at once: python -m pytest tests/platform/tracking/test_late_delivery.py"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.tracking import mlflow as tracking
from domainshuttle.platform.tracking import outbox
from domainshuttle.platform.tracking import queries as records
from domainshuttle.platform.tracking.mlflow import RunIds, Tracker, flush_spool

Event = tuple[str | None, dict[str, Any]]


def history(seed: int) -> list[Event]:
    """The events of a schedule of two segments, some of whose attempts fail, with whose spool they are in."""
    draw = random.Random(seed)
    now = 1_700_000_000_000
    events: list[Event] = []

    def add(segment: str | None, status: str, error: str = "", **more: bool) -> None:
        nonlocal now
        now += draw.randrange(1_000, 90_000)
        events.append((segment, outbox.status_event(status, error, **more) | {"time": now}))

    for segment in ("base", "stage1"):
        for attempt in range(draw.randrange(1, 4)):
            add(None, "RUNNING")  # the driver begins
            add(segment, "RUNNING", parent=True)  # it opens the segment
            add(segment, "RUNNING", parent=True)  # and the worker comes
            events.append((segment, outbox.metrics_event(attempt, {"loss": 1.0}) | {"time": now + 1}))
            if draw.random() < 0.6:
                add(segment, "FAILED", f"{segment} {attempt}", parent=True)
                if draw.random() < 0.5:
                    add(None, "FAILED", f"driver {attempt}", parent=True)
                    add(segment, "FAILED", f"driver {attempt}", if_running=True)
        if draw.random() < 0.8:
            add(segment, "RUNNING", parent=True)
            add(segment, "FINISHED")
    add(None, draw.choice(["FINISHED", "KILLED", "FAILED"]), draw.choice(["", "the end"]))
    return events


def spool_of(folder: Path, events: list[Event]) -> None:
    for segment, event in events:
        outbox.segment_journal(folder, segment).append([event])


def shown(store: str, experiment: str) -> dict[str, tuple[Any, ...]]:
    runs = records.read_runs(store, [experiment])
    return {
        run.name: (run.status, run.start, run.end if run.status != "RUNNING" else None, run.tags.get("error"))
        for run in runs
    }


@pytest.mark.parametrize("seed", range(4))
def test_states_and_times_do_not_depend_on_when_and_in_which_order_spools_are_sent(
    seed: int, store: str, tmp_path: Path
) -> None:
    events = history(seed)
    at_once = RunIds(store, f"at-once-{seed}", "a run")
    for event in events:
        spool_of(tmp_path / "at-once", [event])
        assert flush_spool(at_once, tmp_path / "at-once") == 0
    expected = shown(store, f"at-once-{seed}")
    assert expected["a run"][0] != "RUNNING"
    assert all(end is None or end >= start for _, start, end, _ in expected.values())
    assert {name: run[1] for name, run in expected.items()} == {
        name: next(event["time"] for segment, event in events if segment == own) / 1000
        for name, own in (("a run", None), ("base", "base"), ("stage1", "stage1"))
    }

    for number, order in enumerate(([None, "base", "stage1"], ["stage1", "base", None], ["base", None, "stage1"])):
        late, folder = RunIds(store, f"late-{seed}-{number}", "a run"), tmp_path / str(number)
        spool_of(folder, events)
        for segment in order:
            assert tracking._Sender(late, folder, segment).drain()
        assert shown(store, f"late-{seed}-{number}") == expected, order


def test_the_drivers_last_word_holds_against_workers_whose_clocks_are_ahead(store: str, tmp_path: Path) -> None:
    ahead = 3_600_000
    events = [
        (segment, outbox.status_event(status, parent=parent) | {"time": time})
        for segment, status, parent, time in (
            (None, "RUNNING", False, 1_000),
            ("stage1", "RUNNING", True, 2_000 + ahead),
            ("stage1", "FINISHED", False, 3_000 + ahead),
            (None, "FINISHED", False, 4_000),
        )
    ]
    for number, order in enumerate(([None, "stage1"], ["stage1", None])):
        ids = RunIds(store, f"ahead-{number}", "a run")
        spool_of(tmp_path / str(number), events)
        for segment in order:
            assert tracking._Sender(ids, tmp_path / str(number), segment).drain()
        expected = {"a run": ("FINISHED", 1.0, 4.0, None), "stage1": ("FINISHED", 3602.0, 3603.0, None)}
        assert shown(store, f"ahead-{number}") == expected, order


@pytest.fixture
def shut(store: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An experiment whose artifacts have no place: a file lies where their folder would be."""
    plain = tmp_path / "plain"
    plain.write_text("a file")
    name = f"shut-{tmp_path.name}"
    tracking.connect(store).create_experiment(name, artifact_location=str(plain / "artifacts"))
    yield name, plain


def test_artifacts_that_can_not_be_written_stop_nothing(
    shut: tuple[str, Path], store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment, plain = shut
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples" / "grid.png").write_bytes(b"a picture")
    (run / "config.yaml").write_text("seed: 1\n")
    tracker = tracking.open_schedule(store, experiment, "a run", {"seed": 1}, {}, run / "spool", [run / "config.yaml"])
    logger = tracking.MetricLogger(tracker.ids, "stage1", run / "spool", send_every=0.05)
    logger.log(1, {"loss": 2.0})
    logger.artifact(run / "samples", "samples")
    logger.log(2, {"loss": 1.0})
    assert logger.finish()
    assert tracker.log({"gpu_hours/used": 1.5})
    assert tracker.finish()
    schedule, stage = records.read_runs(store, [experiment])
    assert (schedule.status, stage.status) == ("FINISHED", "FINISHED")
    assert schedule.metrics == {"gpu_hours/used": 1.5} and stage.steps == {"loss": 2}
    assert "samples could not be written" in caplog.text and "config.yaml could not be written" in caplog.text
    assert set(outbox.failed_uploads(run / "spool")) == {"config.yaml", "samples"}

    began = time.monotonic()
    assert flush_spool(tracker.ids, run / "spool") == 0  # ends, and keeps them
    assert time.monotonic() - began < 30
    assert set(outbox.failed_uploads(run / "spool")) == {"config.yaml", "samples"}

    plain.unlink()
    moved = run.rename(tmp_path / "moved")  # they are found with the run
    assert flush_spool(tracker.ids, moved / "spool") == 0
    assert outbox.failed_uploads(moved / "spool") == {}
    assert records.list_artifacts(store, schedule.id) == ["config.yaml"]
    assert records.read_artifact(store, stage.id, "samples/grid.png") == b"a picture"


@pytest.mark.parametrize("fault", [ImportError("no boto3"), RuntimeError("odd"), PermissionError(13, "denied")])
def test_whatever_a_store_of_artifacts_raises_stops_nothing(
    fault: Exception, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise fault

    monkeypatch.setattr(tracking, "artifact_repository", refuses)
    tracker = Tracker(RunIds(store, f"refuses-{type(fault).__name__}", "a run"), tmp_path / "spool")
    (tmp_path / "a.txt").write_text("a")
    assert tracker.artifact(tmp_path / "a.txt")
    assert tracker.log({"loss": 1.0})
    assert tracker.finish()
    (run,) = records.read_runs(store, [tracker.ids.experiment])
    assert (run.status, run.metrics) == ("FINISHED", {"loss": 1.0})
    (reason,) = outbox.failed_uploads(tmp_path / "spool").values()
    assert str(fault) in reason


def test_a_slow_store_of_artifacts_holds_up_no_metric(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def log_artifact(self, *_: object) -> None:
            time.sleep(120)

    monkeypatch.setattr(tracking, "artifact_repository", lambda *_: Slow())
    tracker = Tracker(RunIds(store, "slow", "a run"), tmp_path / "spool")
    assert tracker.open_segment("stage1")
    (tmp_path / "a.txt").write_text("a")
    logger = tracking.MetricLogger(tracker.ids, "stage1", tmp_path / "spool", send_every=0.05)
    logger.artifact(tmp_path / "a.txt")
    deadline = time.monotonic() + 100  # far more than it takes: the upload outlasts it
    while not outbox.uploads_journal(logger._journal).unread() and time.monotonic() < deadline:
        time.sleep(0.05)
    logger.log(1, {"loss": 1.0})
    sent = Journal(tmp_path / "spool" / "segment-stage1.jsonl")
    while (sent.unread() or not records.read_runs(store, ["slow"])[1].metrics) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not logger.finish(timeout=3)  # the upload goes on
    assert records.read_runs(store, ["slow"])[1].metrics == {"loss": 1.0}


def test_points_that_are_too_much_for_one_request_go_in_several(store: str, tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException

    tracker = Tracker(RunIds(store, "narrow", "a run"), tmp_path / "spool")
    assert tracker.tag({"a": 1})
    sender = tracker._sender(None)
    send, sizes = sender.client.log_batch, []

    def log_batch(run_id: str, metrics: Any = (), **named: Any) -> None:
        if len(metrics) > 60:
            raise MlflowException("413 != 200: Request Entity Too Large")
        sizes.append(len(metrics))
        send(run_id, metrics, **named)

    sender.client.log_batch = log_batch  # type: ignore[method-assign]
    sender.journal.append([outbox.metrics_event(step, {"loss": 1.0}) for step in range(1, 251)])
    assert sender.drain()
    assert sum(sizes) == 250
    (run,) = records.read_runs(store, ["narrow"])
    assert [step for step, _ in records.read_history(store, run.id, "loss")] == list(range(1, 251))


def test_a_store_that_was_moved_with_its_artifacts_is_read_and_written_where_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (tmp_path / "grid.png").write_bytes(b"first")
    tracker = Tracker(RunIds(f"sqlite:///{old}/mlflow.db", "a b", "a run"), old / "run" / "spool", timeout=120)
    assert tracker.artifact(tmp_path / "grid.png", "samples")
    run = tracker.ids.parent or ""
    shutil.copytree(old, new)
    assert list(old.glob("mlartifacts/*/*/artifacts/samples/grid.png"))
    next(old.rglob("grid.png")).write_bytes(b"another, of the run that stayed")
    moved = f"sqlite:///{new}/mlflow.db"
    assert records.list_artifacts(moved, run) == ["samples/grid.png"]
    assert records.read_artifact(moved, run, "samples/grid.png") == b"first"
    again = Tracker(RunIds.from_dict(tracker.ids.to_dict(), moved), new / "run" / "spool", timeout=120)
    (tmp_path / "later.png").write_bytes(b"later")
    assert again.artifact(tmp_path / "later.png", "samples")
    assert records.list_artifacts(moved, run) == ["samples/grid.png", "samples/later.png"]
    assert not list(old.rglob("later.png"))
