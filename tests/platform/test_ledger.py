"""The ledger: .venv/bin/python -m pytest tests/platform/test_ledger.py"""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.platform.ledger import CATEGORIES, Ledger, LedgerSummary
from domainshuttle.platform.spool import Journal, JournalWriter


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Ledger:
    return Ledger(tmp_path / "checkpoints" / "ledger.jsonl", clock)


def total(summary: LedgerSummary) -> float:
    return sum(getattr(summary, category) for category in CATEGORIES)


def test_hours_by_what_they_went_to(ledger: Ledger, clock: Clock) -> None:
    attempt = ledger.start(devices=4, segment="stage1", step=0, began=clock.now - 36)
    for category, seconds in {"starting": 36, "waiting": 18, "checkpointing": 9, "productive": 720}.items():
        with attempt.measure(category):
            clock.now += seconds
    clock.now += 117  # nobody says what this was
    attempt.progress(10)
    assert attempt.end("finished")
    summary = ledger.summary(budget_gpu_hours=2.0)
    assert summary.starting == pytest.approx(4 * (36 + 36) / 3600)
    assert summary.waiting == pytest.approx(4 * 18 / 3600)
    assert summary.checkpointing == pytest.approx(4 * 9 / 3600)
    assert summary.productive == pytest.approx(4 * 720 / 3600)
    assert summary.other == pytest.approx(4 * 117 / 3600)
    assert summary.used == pytest.approx(4 * (36 + 900) / 3600) == total(summary)
    assert (summary.lost, summary.attempts) == (0, 1)
    assert summary.goodput == pytest.approx(720 / 936)
    assert summary.left == pytest.approx(2.0 - summary.used)
    assert not summary.spent and ledger.summary(1.0).spent and not ledger.summary().spent
    assert summary.metrics() == {
        "gpu_hours/used": summary.used,
        "gpu_hours/productive": summary.productive,
        "gpu_hours/lost": 0.0,
        "gpu_hours/budget": 2.0,
    }
    assert "gpu_hours/budget" not in ledger.summary().metrics()


def test_steps_that_are_done_again_are_lost(ledger: Ledger, clock: Clock) -> None:
    first = ledger.start(2, "stage1", 0)
    for step in (30, 57):  # 30 steps of 2 s, 27 of 4 s
        with first.measure("productive"):
            clock.now += 60 if step == 30 else 108
        first.progress(step)
    first.end("a worker died")
    second = ledger.start(2, "stage1", 40)
    summary = ledger.summary()
    assert summary.lost == pytest.approx(2 * 17 * 4 / 3600)  # steps 41 to 57
    assert summary.productive == pytest.approx(2 * (60 + 10 * 4) / 3600)
    with second.measure("productive"):
        clock.now += 40
    second.progress(50)
    second.end("stopped")
    ledger.start(2, "stage2", 0).end("stopped")  # another segment's steps are other steps
    assert ledger.summary().lost == summary.lost
    ledger.start(2, "stage1", 20).end("stopped")  # back beyond both
    summary = ledger.summary()
    assert summary.productive == pytest.approx(2 * 20 * 2 / 3600)
    assert summary.used == pytest.approx(2 * 208 / 3600) == pytest.approx(total(summary))
    assert summary.attempts == 4


def test_a_rollback_inside_an_attempt_loses_what_was_beyond(ledger: Ledger, clock: Clock) -> None:
    attempt = ledger.start(1, "stage1", 0)
    for step in range(1, 31):
        with attempt.measure("productive"):
            clock.now += 10
        attempt.progress(step, every=70)  # so that the last of it is not written yet
    attempt.enter("stage1", 20)
    with attempt.measure("productive"):
        clock.now += 100
    attempt.progress(30)
    attempt.enter("stage2", 0)
    attempt.end("finished")
    summary = ledger.summary()
    assert summary.lost == pytest.approx(100 / 3600)
    assert summary.productive == pytest.approx(300 / 3600)


def test_the_time_of_a_step_that_never_ended_is_lost_when_it_starts_again(ledger: Ledger, clock: Clock) -> None:
    attempt = ledger.start(1, "stage1", 40)
    attempt.add("productive", 5)
    clock.now += 5
    attempt.end("killed in step 41")
    assert ledger.summary().productive == pytest.approx(5 / 3600)
    ledger.start(1, "stage1", 40).end("")
    assert ledger.summary().lost == pytest.approx(5 / 3600)


def test_the_driver_ends_attempts_whose_workers_died(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    attempt = ledger.start(8, "stage1", 0)
    clock.now += 10
    attempt.progress(1)
    attempt._writer.close()  # and then the worker is killed
    clock.now += 30  # until the driver notices
    driver = Ledger(ledger.journal.path, clock)
    assert driver.end_open("SIGKILL") == 1
    assert driver.end_open("SIGKILL") == 0
    assert driver.summary().lost == pytest.approx(8 * 30 / 3600)
    assert driver.summary() == ledger.summary()
    assert driver.journal.read()[0][-1]["reason"] == "SIGKILL"


def test_a_late_line_of_a_dead_attempt_does_not_undo_the_loss(ledger: Ledger, clock: Clock) -> None:
    old = ledger.start(1, "stage1", 0)
    with old.measure("productive"):
        clock.now += 57
    new = ledger.start(1, "stage1", 40)
    with new.measure("productive"):
        clock.now += 10
    new.progress(50)
    assert new.end("stopped")
    old.progress(57)
    old.enter("stage1", 10)  # a worker that hung and does not know that it was replaced
    assert old.end("too late")
    summary = ledger.summary()
    assert summary.lost == pytest.approx(17 / 3600)
    assert summary.productive == pytest.approx(50 / 3600)


def test_any_torn_last_line_is_passed_over_and_the_next_one_whole(tmp_path: Path, clock: Clock) -> None:
    whole = Ledger(tmp_path / "whole.jsonl", clock)
    attempt = whole.start(1, "stage1", 0)
    clock.now += 3600
    attempt.progress(1)
    clock.now += 3600
    attempt.progress(2)
    attempt.end("stopped")
    data = whole.journal.path.read_bytes()
    lines = data.splitlines(keepends=True)
    before = len(b"".join(lines[:2]))
    for cut in range(before + 1, before + len(lines[2])):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:cut])
        torn = Ledger(path, clock)
        assert torn.summary().used == pytest.approx(1.0), cut
        torn.journal.append([json.loads(lines[2])], sync=True)
        assert torn.summary().used == pytest.approx(2.0), cut


def test_damage_in_the_middle_costs_only_that_line(ledger: Ledger, clock: Clock) -> None:
    for _ in range(3):
        attempt = ledger.start(1, "stage1", 0)
        clock.now += 3600
        attempt.end("stopped")
    lines = ledger.journal.path.read_text().splitlines()
    lines[3] = '{"kind": "end", "attempt": 7}'
    lines.insert(2, "\x00\x00 not JSON")
    lines.insert(0, "[1, 2]")
    ledger.journal.path.write_text("\n".join(lines) + "\n")
    summary = Ledger(ledger.journal.path, clock).summary()
    assert (summary.used, summary.attempts) == (pytest.approx(2.0), 3)


def test_a_killed_process_keeps_every_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = f"""
import os, signal, time
from domainshuttle.platform.ledger import Ledger
attempt = Ledger({str(path)!r}).start(2, "stage1", 0)
for step in range(1, 21):
    attempt.add("productive", 3600)
    attempt.progress(step)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    ledger = Ledger(path)
    assert ledger.summary().productive == pytest.approx(40)
    ledger.start(2, "stage1", 15).end("stopped")
    assert ledger.summary().lost == pytest.approx(10)


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "ledger.jsonl"
    attempt = Ledger(path, clock).start(1, "stage1", 0)
    path.rename(tmp_path / "kept.jsonl")
    path.symlink_to("/dev/full")
    began = time.monotonic()
    for step in range(1, 4):
        clock.now += 3600
        attempt.progress(step)
    assert time.monotonic() - began < 0.1
    time.sleep(0.1)
    path.unlink()
    (tmp_path / "kept.jsonl").rename(path)  # there is room again
    attempt.end("stopped")
    assert Ledger(path, clock).summary().used == pytest.approx(3.0)


def test_a_line_that_was_written_twice_counts_once(ledger: Ledger, clock: Clock) -> None:
    attempt = ledger.start(1, "stage1", 0)
    clock.now += 3600
    attempt.end("stopped")
    ledger.journal.append(ledger.journal.read()[0])  # as after a disk was full in the middle of a write
    assert (ledger.summary().used, ledger.summary().attempts) == (pytest.approx(1.0), 1)
    assert ledger.end_open("") == 0


def test_a_checkpoint_brings_the_account_to_a_new_disk(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    attempt = ledger.start(1, "stage1", 0)
    for step in range(1, 11):
        with attempt.measure("productive"):
            clock.now += 360
        attempt.progress(step)
    attempt._writer.close()
    snapshot = json.loads(json.dumps(ledger.snapshot()))
    other = Ledger(tmp_path / "other" / "ledger.jsonl", clock)
    assert other.restore(snapshot)
    assert not other.restore(snapshot)
    assert not ledger.restore(snapshot)
    assert other.summary() == ledger.summary()
    other.start(1, "stage1", 5).end("stopped")
    assert other.summary().lost == pytest.approx(0.5)
    assert (other.summary().used, other.summary().attempts) == (pytest.approx(1.0), 2)


def test_writers_do_not_tear_each_other(tmp_path: Path) -> None:
    def write(number: int) -> None:
        journal = Journal(tmp_path / "journal.jsonl")
        for line in range(100):
            journal.append([{"writer": number, "line": line, "text": "x" * 500}])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records, _ = Journal(tmp_path / "journal.jsonl").read()
    found = {(record["writer"], record["line"]) for record in records}
    assert found == {(number, line) for number in range(4) for line in range(100)}


def test_a_disk_that_hangs_does_not_stop_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # writing to it now waits, as it does for a file server that is away
        writer = JournalWriter(Journal(path), sync=False, limit=10)
        began = time.monotonic()
        for number in range(100):
            writer.put({"number": number})
        assert not writer.close(timeout=0.2)
        assert time.monotonic() - began < 0.5
        assert writer.dropped >= 80
    assert writer.close(timeout=5)  # it is back: what was kept is written
    assert [record["number"] for record in Journal(path).read()[0]][:5] == [0, 1, 2, 3, 4]


def test_an_unknown_category_names_those_there_are(ledger: Ledger) -> None:
    attempt = ledger.start(1, "stage1", 0)
    with pytest.raises(ValueError, match=r"'productiv'.*productive, lost"):
        attempt.add("productiv", 1)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(1, 4), st.sampled_from(["a", "b"]), st.integers(0, 12)),
        st.tuples(st.just("enter"), st.sampled_from(["a", "b"]), st.integers(0, 12)),
        st.tuples(st.just("steps"), st.integers(1, 6), st.integers(1, 50)),
        st.tuples(st.just("time"), st.sampled_from(CATEGORIES), st.integers(1, 50)),
        st.tuples(st.just("idle"), st.integers(1, 50)),
        st.tuples(st.just("die"), st.integers(0, 50)),
        st.tuples(st.just("end")),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_the_parts_add_up_to_the_total_whatever_happens(actions: list[tuple]) -> None:
    """Against a model that keeps every single step and strikes out those that are done again."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl", clock)
        used = lost = 0.0
        steps: list[tuple[str, int, float]] = []  # segment, step, device-seconds
        attempt, devices, segment, step = None, 1, "a", 0

        def go_back() -> None:
            nonlocal steps, lost
            lost += sum(seconds for name, number, seconds in steps if name == segment and number > step)
            steps = [entry for entry in steps if entry[0] != segment or entry[1] <= step]

        for action, *values in actions:
            if action == "start":
                if attempt is not None:
                    attempt.end("replaced")
                devices, segment, step = values
                attempt = ledger.start(devices, segment, step)
                go_back()
            elif attempt is None:
                continue
            elif action == "enter":
                segment, step = values
                attempt.enter(segment, step)
                go_back()
            elif action == "steps":
                for _ in range(values[0]):
                    with attempt.measure("productive"):
                        clock.now += values[1]
                    step += 1
                    attempt.progress(step)
                    steps.append((segment, step, devices * values[1]))
                    used += devices * values[1]
            elif action == "time":
                with attempt.measure(values[0]):
                    clock.now += values[1]
                used += devices * values[1]
                lost += devices * values[1] if values[0] == "lost" else 0
                if values[0] == "productive":  # it belongs to the step that is under way
                    attempt.progress(step)
                    steps.append((segment, step + 1, devices * values[1]))
            elif action == "idle":
                clock.now += values[0]
                used += devices * values[0]
            elif action == "die":
                attempt.progress(step)
                attempt._writer.close()
                clock.now += values[0]
                assert ledger.end_open("killed") == 1
                used, lost = used + devices * values[0], lost + devices * values[0]
                attempt = None
            else:
                attempt.end("stopped")
                attempt = None
        if attempt is not None:
            attempt.end("stopped")
        for reader in (ledger, Ledger(ledger.journal.path, clock)):  # read bit by bit, and at once
            summary = reader.summary()
            assert summary.used * 3600 == pytest.approx(used, abs=1e-3)
            assert total(summary) == pytest.approx(summary.used, abs=1e-9)
            assert summary.lost * 3600 == pytest.approx(lost, abs=1e-3)
            assert summary.productive * 3600 == pytest.approx(sum(entry[2] for entry in steps), abs=1e-3)
            assert min(getattr(summary, category) for category in CATEGORIES) > -1e-9
