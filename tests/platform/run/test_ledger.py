"""The ledger: .venv/bin/python -m pytest tests/platform/run/test_ledger.py"""

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

from domainshuttle.platform.run.journal import Journal, JournalWriter
from domainshuttle.platform.run.ledger import ALLOWANCE, CATEGORIES, Attempt, Ledger, LedgerSummary


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


def spend(attempt: Attempt, clock: Clock, category: str, seconds: float) -> None:
    """Time passes, and goes to a category."""
    clock.now += seconds
    attempt.add(category, seconds)


def total(summary: LedgerSummary) -> float:
    return sum(getattr(summary, category) for category in CATEGORIES)


def test_hours_by_what_they_went_to(ledger: Ledger, clock: Clock) -> None:
    attempt = ledger.start(devices=4, segment="stage1", step=0, began=clock.now - 36)
    for category, seconds in {"starting": 36, "waiting": 18, "checkpointing": 9, "productive": 720}.items():
        spend(attempt, clock, category, seconds)
    clock.now += 117  # nobody says what this was
    spend(attempt, clock, "sampling", 20)
    attempt.progress(10)
    assert attempt.end("finished")
    summary = ledger.summary(budget_gpu_hours=2.0)
    assert summary.starting == pytest.approx(4 * (36 + 36) / 3600)
    assert summary.waiting == pytest.approx(4 * 18 / 3600)
    assert summary.checkpointing == pytest.approx(4 * 9 / 3600)
    assert summary.productive == pytest.approx(4 * 720 / 3600)
    assert summary.other == pytest.approx(4 * 117 / 3600)
    assert summary.used == pytest.approx(4 * (36 + 920) / 3600) == total(summary)
    assert (summary.lost, summary.attempts) == (0, 1)
    assert summary.sampling == pytest.approx(4 * 20 / 3600)
    assert summary.goodput == pytest.approx(720 / 956)
    assert summary.left == pytest.approx(2.0 - summary.used)
    assert not summary.spent and ledger.summary(1.0).spent and not ledger.summary().spent
    assert summary.metrics() == {
        **{f"gpu_hours/{category}": getattr(summary, category) for category in CATEGORIES},
        "gpu_hours/used": summary.used,
        "gpu_hours/budget": 2.0,
    }
    assert "gpu_hours/budget" not in ledger.summary().metrics()


def test_steps_that_are_done_again_are_lost(ledger: Ledger, clock: Clock) -> None:
    first = ledger.start(2, "stage1", 0)
    for step in (30, 57):  # 30 steps of 2 s, 27 of 4 s
        spend(first, clock, "productive", 60 if step == 30 else 108)
        first.progress(step)
    first.end("a worker died")
    second = ledger.start(2, "stage1", 40)
    summary = ledger.summary()
    assert summary.lost == pytest.approx(2 * 17 * 4 / 3600)  # steps 41 to 57
    assert summary.productive == pytest.approx(2 * (60 + 10 * 4) / 3600)
    spend(second, clock, "productive", 40)
    second.progress(50)
    second.end("stopped")
    ledger.start(2, "stage2", 0).end("stopped")  # another segment's steps are other steps
    assert ledger.summary().lost == summary.lost
    ledger.start(2, "stage1", 20).end("stopped")  # back beyond both
    summary = ledger.summary()
    assert summary.productive == pytest.approx(2 * 20 * 2 / 3600)
    assert summary.used == pytest.approx(2 * 208 / 3600) == pytest.approx(total(summary))
    assert summary.attempts == 4


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


def test_late_lines_of_a_replaced_attempt_count_for_nothing(ledger: Ledger, clock: Clock) -> None:
    old = ledger.start(1, "stage1", 0)
    spend(old, clock, "productive", 40)
    old.progress(40)
    clock.now += 17
    time.sleep(0.2)  # its line is on the disk
    new = ledger.start(1, "stage1", 40)
    spend(new, clock, "productive", 10)
    new.progress(50)
    assert new.end("stopped")
    old.progress(57)  # a worker that hung and does not know that it was replaced
    assert old.end("too late")
    for reader in (ledger, Ledger(ledger.journal.path, clock)):
        summary = reader.summary()
        assert (summary.lost, summary.productive) == (pytest.approx(17 / 3600), pytest.approx(50 / 3600))
        assert summary.used == pytest.approx(67 / 3600)


def test_a_kill_within_a_fit_is_paid_once(ledger: Ledger, clock: Clock) -> None:
    """The device-hours are those of the wall clock, however long the next attempt lasts."""
    asked = clock.now
    clock.now += 20  # the workers are placed
    killed = ledger.start(1, "stage1", 0, began=clock.now, since=asked)
    clock.now += 60
    killed.progress(10)
    assert killed._writer.close()  # and then it is killed
    clock.now += 24
    process = clock.now
    clock.now += 16  # imports
    second = Ledger(ledger.journal.path, clock).start(1, "stage1", 10, began=process, since=asked)
    clock.now += 36_000
    second.progress(1000)
    assert second._writer.close()
    driver = Ledger(ledger.journal.path, clock)
    assert driver.end_open("the workers ended without a last line") == 1
    summary = driver.summary()
    assert summary.used == pytest.approx((84 + 16 + 36_000) / 3600) == pytest.approx(total(summary))
    assert summary.lost == pytest.approx(24 / 3600)
    assert summary.starting == pytest.approx(16 / 3600)
    first, last = driver.attempts()
    assert (first.reason, last.reason) == ("the workers were started again", "the workers ended without a last line")
    assert sum(first.hours.values()) == pytest.approx(84 / 3600)


def test_ends_that_were_written_too_late_do_not_count_twice(ledger: Ledger, clock: Clock) -> None:
    """Ledgers of before: the end of a killed attempt came with the end of its whole fit."""
    killed = ledger.start(1, "stage1", 0)
    clock.now += 60
    killed.progress(10)
    assert killed._writer.close()
    last = ledger.journal.read()[0][-1]
    second = Ledger(ledger.journal.path.with_name("other.jsonl"), clock).start(1, "stage1", 10)
    clock.now += 3600
    second.end("finished")
    lines, _ = Journal(ledger.journal.path.with_name("other.jsonl")).read()
    end = {**last, "kind": "end", "line": 2, "time": clock.now, "seconds": {"lost": 3600.0}, "reason": "killed"}
    ledger.journal.append([*lines, end])
    assert ledger.summary().used == pytest.approx(3660 / 3600)


def test_the_night_after_a_drivers_death_costs_nothing(ledger: Ledger, clock: Clock) -> None:
    attempt = ledger.start(8, "stage1", 0)
    clock.now += 100
    attempt.progress(10)
    assert attempt._writer.close()  # the driver's machine goes away, and its workers with it
    heard = clock.now + 12
    clock.now += 10 * 3600
    driver = Ledger(ledger.journal.path, clock)
    assert driver.last_line() == pytest.approx(heard - 12)
    assert driver.end_open("its driver died", until=heard + ALLOWANCE) == 1
    assert driver.last_line() is None
    again = driver.start(8, "stage1", 10, began=clock.now, since=clock.now - 5)
    clock.now += 50
    again.end("stopped")
    summary = driver.summary()
    assert summary.lost == pytest.approx(8 * (12 + ALLOWANCE) / 3600)
    assert summary.used == pytest.approx(8 * (100 + 12 + ALLOWANCE + 50) / 3600)


def test_devices_that_wait_for_a_restart_are_lost(ledger: Ledger, clock: Clock) -> None:
    asked = clock.now - 10
    ledger.start(2, "stage1", 0, began=clock.now, since=asked).end("RuntimeError: connection closed by peer")
    clock.now += 9
    process = clock.now
    clock.now += 11
    second = ledger.start(2, "stage1", 0, began=process, since=asked)
    clock.now += 5
    second.end("finished")
    summary = ledger.summary()
    assert summary.lost == pytest.approx(2 * 9 / 3600)
    assert summary.starting == pytest.approx(2 * 11 / 3600)
    assert summary.used == pytest.approx(2 * 25 / 3600)


def test_each_attempt_has_an_account_of_its_own(ledger: Ledger, clock: Clock) -> None:
    for first, last, reason in ((0, 57, "a worker died"), (40, 60, "stopped")):
        attempt = ledger.start(2, "stage1", first, began=clock.now - 3)
        spend(attempt, clock, "productive", last - first)
        attempt.progress(last)
        attempt.end(reason)
        clock.now += 1000
    died, stopped = ledger.attempts()
    assert (died.segment, died.first, died.last, died.devices, died.reason) == ("stage1", 0, 57, 2, "a worker died")
    assert (stopped.first, stopped.last, stopped.reason) == (40, 60, "stopped")
    assert died.hours["lost"] == pytest.approx(2 * 17 / 3600)  # what the second one did again
    assert stopped.hours["productive"] == pytest.approx(2 * 20 / 3600)
    assert stopped.began == pytest.approx(1_001_000 + 57 - 3)
    assert sum(sum(one.hours.values()) for one in ledger.attempts()) == pytest.approx(ledger.summary().used)
    other = Ledger(ledger.journal.path.with_name("other.jsonl"), clock)
    assert other.restore(json.loads(json.dumps(ledger.snapshot())))
    other.start(2, "stage1", 50).end("stopped")
    assert sum(sum(one.hours.values()) for one in other.attempts()) == pytest.approx(other.summary().used)
    assert other.attempts()[0].hours["lost"] == pytest.approx(2 * (17 + 10) / 3600)


def test_any_torn_last_line_is_skipped_and_the_next_one_whole(tmp_path: Path, clock: Clock) -> None:
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
from domainshuttle.platform.run.ledger import Ledger
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
    # and the time from the kill to the next start
    assert ledger.summary().lost == pytest.approx(10, abs=0.01)


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
        spend(attempt, clock, "productive", 360)
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


def test_a_file_that_may_not_grow_is_left_with_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = f"""
import resource
from domainshuttle.platform.run.journal import Journal
journal = Journal({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
written = 0
try:
    while True:
        journal.append([{{"line": written}}, {{"text": "x" * 99}}])
        written += 1
except OSError:
    assert open({str(path)!r}).read().endswith("\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append([{{"line": written}}, {{"text": "x" * 99}}])
print(written)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    records, _ = Journal(path).read()
    assert [record["line"] for record in records if "line" in record] == list(range(int(run.stdout) + 1))
    assert len(records) == 2 * (int(run.stdout) + 1) and int(run.stdout) > 3


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
        st.tuples(st.just("steps"), st.integers(1, 6), st.integers(1, 50)),
        st.tuples(st.just("time"), st.sampled_from(CATEGORIES), st.integers(1, 50)),
        st.tuples(st.just("idle"), st.integers(1, 50)),
        st.tuples(st.just("die"), st.integers(0, 50)),
        st.tuples(st.just("restart"), st.integers(0, 50), st.integers(0, 30), st.integers(0, 12)),
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
            elif action == "steps":
                for _ in range(values[0]):
                    spend(attempt, clock, "productive", values[1])
                    step += 1
                    attempt.progress(step)
                    steps.append((segment, step, devices * values[1]))
                    used += devices * values[1]
            elif action == "time":
                spend(attempt, clock, values[0], values[1])
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
            elif action == "restart":  # it dies, and nobody notices before the next one is there
                attempt.progress(step)
                attempt._writer.close()
                clock.now += values[0]
                used, lost = used + devices * values[0], lost + devices * values[0]
                began, step = clock.now, values[2]
                clock.now += values[1]
                used += devices * values[1]
                attempt = ledger.start(devices, segment, step, began=began, since=0.0)
                go_back()
            else:
                attempt.end("stopped")
                attempt = None
        if attempt is not None:
            attempt.end("stopped")
        for reader in (ledger, Ledger(ledger.journal.path, clock)):  # read bit by bit, and at once
            summary = reader.summary()
            assert summary.used * 3600 == pytest.approx(used, abs=1e-3)
            assert total(summary) == pytest.approx(summary.used, abs=1e-9)
            assert sum(sum(one.hours.values()) for one in reader.attempts()) == pytest.approx(summary.used, abs=1e-9)
            assert all(min(one.hours.values()) > -1e-9 for one in reader.attempts())
            assert summary.lost * 3600 == pytest.approx(lost, abs=1e-3)
            assert summary.productive * 3600 == pytest.approx(sum(entry[2] for entry in steps), abs=1e-3)
            assert min(getattr(summary, category) for category in CATEGORIES) > -1e-9
