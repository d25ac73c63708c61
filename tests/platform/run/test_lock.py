"""The lock on a run: one driver at a time, on this machine and across machines, and a dead one's is taken over.

Run: python -m pytest tests/platform/run/test_lock.py
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.platform.commands.corpus_lock import being_made
from domainshuttle.platform.run import lock
from domainshuttle.platform.run.lock import HOLDER_NAME, RunLock, RunLockedError

HOLDER = (
    "import sys, threading\n"
    "from pathlib import Path\n"
    "from domainshuttle.platform.run.lock import RunLock\n"
    "with RunLock(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    threading.Event().wait(60)\n"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another driver, that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.6)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has no locks."""

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_second_driver_is_told_who_holds_the_run_and_what_to_do(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(RunLockedError, match=rf"process {other.pid} on .*domainshuttle stop .*--set name="),
        RunLock(tmp_path),
    ):
        pass


def test_a_dead_drivers_lock_is_taken_over_at_once(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    began = time.monotonic()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / HOLDER_NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 3
    assert not (tmp_path / HOLDER_NAME).exists()


def test_without_locks_of_the_file_system_a_live_process_is_seen(
    tmp_path: Path, other: subprocess.Popen[str], without_flock: None
) -> None:
    with pytest.raises(RunLockedError, match=f"process {other.pid}"), RunLock(tmp_path):
        pass
    other.kill()
    other.wait()
    with RunLock(tmp_path) as held:
        held.check()


def elsewhere(folder: Path, beat: float) -> None:
    content = {"host": "node-7", "pid": 41, "started": 1.0, "token": "theirs", "beat": beat}
    (folder / HOLDER_NAME).write_text(json.dumps(content))


def test_a_holder_on_another_node_is_watched_and_taken_over_when_nothing_moves(tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path, 1.0)
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        pass
    assert "process 41 on node-7" in said[0]


def test_a_holder_on_another_node_that_moves_keeps_the_run(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, 1.0)

    def sleep(_: float) -> None:
        elsewhere(tmp_path, 2.0)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(RunLockedError, match="process 41 on node-7"), RunLock(tmp_path):
        pass
    assert json.loads((tmp_path / HOLDER_NAME).read_text())["token"] == "theirs"


def test_a_driver_that_stood_still_too_long_notices_that_it_lost_the_run(tmp_path: Path, quick: None) -> None:
    with RunLock(tmp_path) as held:
        elsewhere(tmp_path, 3.0)
        deadline = time.monotonic() + 10
        with pytest.raises(RunLockedError, match="node-7"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.05)
    assert (tmp_path / HOLDER_NAME).exists(), "the other's is left alone"


def test_a_corpus_is_made_by_one_command_at_a_time(tmp_path: Path) -> None:
    with being_made(tmp_path / "encoded"):
        with (
            pytest.raises(RunLockedError, match=rf"encoded is being made by process {os.getpid()} on .*: wait"),
            being_made(tmp_path / "encoded"),
        ):
            pass
        with being_made(tmp_path / "raw"):
            pass
    with being_made(tmp_path / "encoded"):
        pass
