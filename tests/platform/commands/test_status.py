"""What `domainshuttle status` says of a run, also of one that is damaged, dead, or ends by its hours.

Run: python -m pytest tests/platform/commands/test_status.py
"""

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.platform.commands.status import driver_lives, print_status, status_record
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.console import console
from domainshuttle.platform.run.eta import remaining, span
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import FAILED, MOVED, WAITING, Notices
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.lock import RunLock
from domainshuttle.platform.run.workers import WorkerState


def a_run(tmp_path: Path, *overrides: str) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path}", *overrides]))


def progress(run: Run, segment: str, step: int, age: float = 3.0, **more: Any) -> None:
    content = {"segment": segment, "step": step, "steps": 0, "first_step": 0, "attempt": 1, "state": "training"}
    content |= {"time": time.time() - age, "metrics": {"loss": 0.25}, "recent_step_seconds": 2.0, **more}
    run.progress_path.write_text(json.dumps(content))


def workers(run: Run, attempt: int, *beats: float, **more: Any) -> None:
    """Signs of life of an attempt's workers; `beats`: how many seconds ago each left one."""
    for rank, age in enumerate(beats):
        path, now = run.worker_path(attempt, rank), time.time()
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {"segment": "base", "step": 40, "doing": "computing", "since": now - age, "started": now} | more
        state = WorkerState(rank, len(beats), "host7", "n" * 8, 4000 + rank, "logs/x.log", beat=now - age, **known)
        path.write_text(json.dumps(asdict(state)))


def an_attempt(run: Run, segment: str, first: int, last: int, seconds: float, reason: str | None = "stopped") -> None:
    now = [time.time() - 10_000 + first]
    attempt = Ledger(run.ledger_path, lambda: now[0]).start(2, segment, first, began=now[0] - 16)
    attempt.add("productive", seconds - 6)
    attempt.add("sampling", 5)
    now[0] += seconds
    attempt.progress(last)
    if reason is not None:
        attempt.end(reason)
    attempt._writer.close()


def printed(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(console, "width", 220)
    print_status(run.folder)
    return capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", '{"segment": "ba'])
def test_a_progress_that_is_cut_is_no_crash(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    run.progress_path.write_text(content)
    assert "not begun" in printed(run, capsys, monkeypatch)


def test_each_attempt_has_a_line_and_its_parts_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    an_attempt(run, "base", 0, 57, 100, "RuntimeError: [/gloo/pair.cc:537] a worker died")
    an_attempt(run, "base", 40, 80, 50, None)
    shown = printed(run, capsys, monkeypatch)
    died = next(line for line in shown.splitlines() if "a worker died" in line)
    cells = [cell.strip() for cell in died.replace("│", "|").split("|")][1:-1]
    assert cells[:3] == ["base", "0-57", "2"]
    used, *parts = map(float, cells[4:-1])
    assert used == pytest.approx(116, abs=0.1)
    assert sum(parts) == pytest.approx(used, abs=0.5)
    assert parts[1] == pytest.approx(94 * 17 / 57, abs=0.1)  # lost: what the second one did again
    assert any("40-80" in line and "no last line" in line for line in shown.splitlines())
    hours = next(line for line in shown.splitlines() if line.startswith("Device-hours"))
    used, *parts = [float(value) for value in re.findall(r" (\d+\.\d+)", hours)][:8]
    assert sum(parts) == pytest.approx(used, abs=0.005)
    assert "other" in hours and "sampling" in hours


def test_a_dead_driver_is_called_so_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    progress(run, "base", 40, age=7200)
    workers(run, 1, 0.0)
    with RunLock(run.folder):
        assert driver_lives(run)
        living = printed(run, capsys, monkeypatch)
        holder = (run.folder / "driver.json").read_text()
    assert "training" in living and "probably dead" not in living
    (run.folder / "driver.json").write_text(json.dumps({**json.loads(holder), "pid": 2**22 - 3}))
    for dead in (True, False):  # killed, and gone with an error
        shown = printed(run, capsys, monkeypatch)
        assert "probably dead" in shown
        assert "Last update 2 h ago" in shown
        assert f"Next: domainshuttle train {run.config_path}" in shown
        if dead:
            (run.folder / "driver.json").unlink()
    elsewhere = {**json.loads(holder), "host": "another"}
    (run.folder / "driver.json").write_text(json.dumps({**elsewhere, "beat": time.time() - 5}))
    assert driver_lives(run)
    (run.folder / "driver.json").write_text(json.dumps({**elsewhere, "beat": time.time() - 500}))
    assert not driver_lives(run)


def test_what_is_left_of_stage_and_schedule_or_that_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path, "stages.base.steps=100", "stages.stage1.steps=300", "stages.stage2.steps=50")
    progress(run, "base", 40)
    ledger = Ledger(run.ledger_path)
    left = remaining(run, run.read_progress(), ledger)
    assert (left.stage, left.known, left.unknown) == (pytest.approx(120), pytest.approx(120), ("stage1", "stage2"))
    with RunLock(run.folder):
        shown = printed(run, capsys, monkeypatch)
    assert "Stage base: about 2 min left; of the whole schedule at least 2 min" in shown
    assert "how long stage1, stage2 will take is not known" in shown
    progress(run, "base", 40, recent_step_seconds=None)
    assert remaining(run, run.read_progress(), ledger).stage is None
    # stages that were trained on before have shown what a step takes
    an_attempt(run, "stage1", 0, 100, 500)
    an_attempt(run, "stage2", 0, 25, 50)
    progress(run, "base", 40)
    left = remaining(run, run.read_progress(), Ledger(run.ledger_path))
    assert left.known == pytest.approx(120 + 200 * 4.99 + 25 * 49 / 25, rel=0.01)
    assert left.unknown == ()


def test_a_stage_that_its_hours_end_has_an_end_in_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hours = (
        "{name: base, mixture: {sprites-images: 1}, gpu_hours: 2, global_batch: 4, micro_batch: 2, trained: ['*']}"
    )
    run = a_run(tmp_path, f"stages=[{by_hours}]")
    an_attempt(run, "base", 0, 57, 1800 - 16, None)
    progress(run, "base", 57)
    with RunLock(run.folder):
        shown = printed(run, capsys, monkeypatch)
    assert "1000000" not in shown
    assert "57 of those in 2 device-hours" in shown
    assert "about 30 min left" in shown  # one hour of two devices


def test_a_sample_is_in_quarantine_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    for rank, keys in ((0, "aba"), (1, "bc")):
        with run.quarantine_path("base", rank).open("w") as file:
            file.writelines(json.dumps({"source": "s", "shard": "x.tar", "key": k, "reason": "r"}) + "\n" for k in keys)
            file.write('{"source": "s", "sh')
    for step in (7, 8, 7):
        with run.dropped_path("base", 0).open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    shown = printed(run, capsys, monkeypatch)
    assert "3 samples in quarantine" in shown
    assert "2 steps of base were dropped" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (600, "10 min"), (3600, "1 h"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert span(seconds) == text


def shown_at(run: Run, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(console, "width", width)
    monkeypatch.setenv("COLUMNS", str(width))
    print_status(run.folder)
    return capsys.readouterr().out


ERROR = (
    "RuntimeError: [bold]x[/] \x1b[31m名前 "
    + "a word " * 40
    + "\n  File <here>\n  File <there>\nOSError: [Errno 28] full"
)


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_all_of_it_is_there_at_any_width(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    an_attempt(run, "base", 0, 57, 100, ERROR)
    an_attempt(run, "stage1", 40, 80, 50, "finished")
    progress(run, "base", 57, metrics={"loss": 0.25, "loss/flow": 0.2, "loss/cross_pair": 0.5})
    shown = shown_at(run, width, capsys, monkeypatch)
    folder = str(run.folder)
    assert all(len(line) <= width or " " not in line.strip() or folder in line for line in shown.splitlines())
    together = " ".join(shown.replace("│", " ").split())
    for needed in ("0.2500 (flow 0.2000, cross_pair 0.5000)", "0-57", "40-80", "checkpointing", "sampling", "finished"):
        assert needed in together
    assert "\x1b" not in shown and "…" not in shown
    ended = "RuntimeError: [bold]x[/] \\x1b[31m名前 " + "a word " * 40 + "[2 more lines] OSError: [Errno 28] full"
    assert ended in together
    assert folder in shown  # in one piece


@pytest.mark.parametrize(
    "content",
    ["[]", "7", '{"step": 3}', '{"segment": "renamed", "step": 3, "state": "training", "time": 1, "metrics": {}}',
     '{"segment": "base", "step": "3", "state": "training", "time": 1, "metrics": {}}',
     '{"segment": "base", "step": 3, "state": "training", "time": 1, "metrics": {"loss": [1]}}'],
)  # fmt: skip
def test_a_progress_of_another_version_is_left_out_with_a_word(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    run.progress_path.write_text(content)
    (run.folder / "quarantine" / "base.rank00000.jsonl").write_text('[1]\n{"source": "s"}\n')
    shown = printed(run, capsys, monkeypatch)
    assert f"{run.progress_path} is left out" in shown
    assert "not begun" in shown and "Device-hours: used" in shown and "1 sample in quarantine" in shown


def test_earlier_attempts_are_counted_not_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    for number in range(23):
        an_attempt(run, "base", 100 * number, 100 * number + 10, 36)  # 36 s and 16 s before them, on two devices
    shown = printed(run, capsys, monkeypatch)
    assert sum("base" in line and "-" in line and "│" in line for line in shown.splitlines()) == 20
    assert f"3 earlier attempts used 0.087 device-hours: see {run.ledger_path}" in shown


def test_a_worker_that_others_wait_for_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, metrics = a_run(tmp_path), {"loss": 0.25, "speed/slowest_rank": 3.0, "speed/slowest_rank_lag_s": 0.5}
    for more, expected in (
        ({"metrics": metrics}, "A step takes 2 s; worker 3 is the last, by 0.5 s a step."),
        ({"metrics": {**metrics, "speed/slowest_rank_lag_s": 0.01}}, "all workers are equally fast"),
        ({"ranks": {"slowest_rank": 5, "slowest_share": 0.7}}, "worker 5 computes at 70% of the others' rate"),
        ({}, "A step takes 2 s.\n"),
        (
            {"metrics": {"tokens/s/device": 9876.5, "mfu": 0.3812, "data_wait_fraction": 0.004}},
            "A step takes 2 s (9,876 tokens/s a device, MFU 38.1%, 0.4% of the time waiting for data).",
        ),
    ):
        progress(run, "base", 40, **more)
        with RunLock(run.folder):
            assert expected in printed(run, capsys, monkeypatch)


def state_of(run: Run) -> tuple[str, str]:
    record = status_record(run.folder)
    return record["state"], record["why"]


def stage_state(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the table of stages says of the first one."""
    rows = [line for line in printed(run, capsys, monkeypatch).splitlines() if line.startswith("│")]
    return rows[0].split("│")[2].strip()


def test_what_a_run_does_is_that_of_its_driver_and_why_is_its_newest_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    echo = "RuntimeError: [gloo] Connection closed by peer"
    notices = Notices(run.notices_path, lambda text: None)
    notices.add("base", FAILED, "an old fault, of the driver before")
    workers(run, 1, 0.0, 0.0)  # which its workers survive in their files
    time.sleep(0.02)
    with RunLock(run.folder):
        holder = json.loads((run.folder / "driver.json").read_text())
        monkeypatch.setattr("domainshuttle.platform.commands.status.driver_lives", lambda run: True)
        (run.folder / "driver.json").write_text(json.dumps({**holder, "started": time.time()}))
        progress(run, "base", 40, state=echo)
        assert state_of(run) == ("starting", "") and status_record(run.folder)["workers"] == []
        assert stage_state(run, capsys, monkeypatch) == "starting"
        notices.add("base", WAITING, "no room")
        assert state_of(run) == ("starting", "no room")
        workers(run, 2, 0.0, 0.0, segment="")
        assert state_of(run) == ("starting", "no room")
        workers(run, 2, 0.0, 0.0)
        assert state_of(run) == ("training", "")
        assert stage_state(run, capsys, monkeypatch) == "training"
        workers(run, 2, 0.0, ended="ended")
        assert state_of(run) == ("ending", "")
        workers(run, 2, 0.0, 0.0)
        notices.add("base", FAILED, "worker 1 died")
        assert state_of(run) == ("starting again (attempt 3)", "worker 1 died"), "its files still call it alive"
        assert stage_state(run, capsys, monkeypatch) == "starting again"
        workers(run, 3, 0.0, segment="")
        assert state_of(run) == ("starting again (attempt 3)", "worker 1 died")
        workers(run, 3, 0.0, 0.0)
        assert state_of(run)[0] == "training"
        notices.add("base", MOVED, "there is room for 4")
        assert state_of(run) == ("starting again (attempt 4)", "there is room for 4")


def test_a_worker_that_falls_silent_or_a_step_that_does_not_end_is_said_before_anything_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path, "guard.hang_seconds=600")
    progress(run, "base", 40, recent_step_seconds=2.0)
    monkeypatch.setattr("domainshuttle.platform.commands.status.driver_lives", lambda run: True)
    workers(run, 1, 1.0, 8.0)
    assert state_of(run)[0] == "training"
    workers(run, 1, 1.0, 32.0)
    word, why = state_of(run)
    assert word == "waiting for worker 1" and "worker 1 (process 4001 on host7)" in why and "31 s" in why
    assert "10 min without a step" in why
    assert "Now: waiting for worker 1, because: " in printed(run, capsys, monkeypatch)
    workers(run, 1, 1.0, 1.0, since=time.time() - 100)
    word, why = state_of(run)
    assert word == "making no step" and "for 2 min no worker" in why and f"domainshuttle stacks {run.folder}" in why
    workers(run, 1, 1.0, 1.0, since=time.time() - 100, doing="checkpointing")
    assert state_of(run)[0] == "saving"
    progress(run, "base", 40, recent_step_seconds=30.0)
    workers(run, 1, 1.0, 1.0, since=time.time() - 100)
    assert state_of(run)[0] == "training", "steps take long here"


@pytest.mark.parametrize("last", ["training", "finished", "rolled back", "regrouped", "preempted", "OSError: full"])
def test_a_run_whose_driver_was_killed_between_two_groups_of_workers_is_not_finished(tmp_path: Path, last: str) -> None:
    run = a_run(tmp_path)
    workers(run, 1, 500.0, started=time.time() - 600)
    progress(run, "base", 40, state=last)
    word, why = state_of(run)
    assert word == "probably dead" and why.startswith("its driver recorded no result")
    assert ("OSError: full" in why) == (last == "OSError: full")
    assert status_record(run.folder)["next"] == run.train_command


def test_a_part_of_the_schedule_that_is_finished_is_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    base = run.segment("base")
    base.weights.mkdir(parents=True)
    base.finish(40)
    progress(run, "base", 40, state="finished")
    run.note_end("finished")  # by train --stage base
    assert state_of(run) == ("stopped", "the stage that was asked for is finished; left: stage1, stage2")
    shown = printed(run, capsys, monkeypatch)
    assert f"Last update 3 s ago. Next: {run.train_command}" in shown


def test_a_run_that_its_driver_gave_up_is_not_called_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    workers(run, 1, 500.0, started=time.time() - 600)
    progress(run, "base", 40)  # its workers were killed and said no last word
    run.note_end("failed", ValueError("fault 4 in a row"))
    shown = printed(run, capsys, monkeypatch)
    assert "Now: failed, because: fault 4 in a row" in shown
    assert "dead" not in shown and f"Next: {run.train_command}" in shown


def test_an_attempt_ended_by_its_cause_and_not_by_what_rank_0_saw_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, echo = a_run(tmp_path), "RuntimeError: [gloo] closed by peer"
    for first in (0, 20_000, 40_000):
        an_attempt(run, "base", first, first + 57, 100, echo)
    line = {"segment": "base", "kind": FAILED, "text": "worker 1 died. It starts again", "cause": "worker 1 died"}
    run.notices_path.write_text(json.dumps({**line, "time": time.time() - 10_000 + 20_120}) + "\n")
    monkeypatch.setattr(console, "width", 80)
    print_status(run.folder)
    shown = re.findall(r"^ *.*\bended +(\S.*)$", capsys.readouterr().out, re.MULTILINE)
    assert shown == [echo, "worker 1 died", echo]


def test_how_a_run_ended_is_what_its_stage_says_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    workers(run, 1, 500.0, started=time.time() - 600)
    for how, state in (("failed", "RuntimeError: [gloo] closed"), ("diverged", "rolled back"), ("stopped", "stopped")):
        progress(run, "base", 40, state=state)
        run.note_end(how, ValueError("the cause") if how != "stopped" else None)
        assert state_of(run) == (how, "" if how == "stopped" else "the cause")
        assert stage_state(run, capsys, monkeypatch) == how


@pytest.mark.parametrize("change", [{"time": None}, {"time": "x"}, {"text": None}, {"text": 3}])
def test_a_damaged_line_of_a_file_of_the_run_does_not_hide_its_status(
    tmp_path: Path, change: dict[str, object]
) -> None:
    run = a_run(tmp_path)
    an_attempt(run, "base", 0, 57, 100, "fault")
    line = {"segment": "base", "kind": FAILED, "text": "worker 1 died", "cause": "worker 1 died", "time": time.time()}
    run.notices_path.write_text(json.dumps({**line, **change}) + "\n")
    run.dropped_path("base", 0).write_text('{"reason": "x"}\n')
    run.end_path.write_text('{"how": "failed"}')
    print_status(run.folder)
    assert status_record(run.folder)["notices"] == []


def test_an_emptied_ledger_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    an_attempt(run, "base", 0, 57, 100)
    run.progress_path.write_text(json.dumps({"segment": "base", "step": 57, "steps": 220, "state": "stopped",
                                             "time": time.time(), "metrics": {}}))  # fmt: skip
    print_status(run.folder)
    assert "no attempt that can be read" not in capsys.readouterr().out
    run.ledger_path.write_bytes(b"")
    print_status(run.folder)
    assert "ledger.jsonl has no attempt that can be read, though steps were made" in capsys.readouterr().out
