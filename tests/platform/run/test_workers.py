"""Signs of life of workers, and their logs. Run: python -m pytest tests/platform/run/test_workers.py"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from domainshuttle.platform.commands import logs
from domainshuttle.platform.commands.logs import print_logs
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.workers import (
    WorkerSign,
    attempts,
    beat_seconds,
    innermost,
    node_names,
    nodes_load,
    read_workers,
    training_stack,
)

WORKER = """
import logging, os, sys
from pathlib import Path
from domainshuttle.platform.config.loading import read_config
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.workers import WorkerSign

run = Run(read_config(Path(sys.argv[1]) / "config.yaml"))
print("before")
with WorkerSign(run, 2, 1, 4, "ab" * 28) as sign:
    sign.follow(lambda: ("stage1", 7, "computing"))
    print("printed")
    os.system("echo from a child")
    logging.getLogger("domainshuttle.x").info("one of ours")
    logging.getLogger("others").warning("of a library")
    raise OSError("s3://key:hunter2@bucket is full")
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path}"]))


def test_what_a_worker_prints_is_in_its_log_and_its_end_is_known(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", WORKER, str(run.folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1 and process.stdout == "before\n"
    (worker,) = read_workers(run, 2)
    assert (worker.rank, worker.world_size, worker.segment, worker.step, worker.doing) == (
        1,
        4,
        "stage1",
        7,
        "computing",
    )
    assert worker.ended is not None and worker.ended.startswith("OSError") and "hunter2" not in worker.ended
    assert abs(worker.beat - time.time()) < 60 and worker.host and worker.pid != os.getpid()
    assert f"process {worker.pid}" in worker.name and "step 7 of stage1, computing; OSError" in worker.place
    print_logs(run.folder, rank=1)
    shown = capsys.readouterr().out.splitlines()
    assert "printed" in shown and "from a child" in shown and "before" not in shown
    dated = [line for line in shown if line.startswith(time.strftime("%Y-"))]
    assert [line.split(" ", 2)[2] for line in dated] == [
        "INFO domainshuttle.x: one of ours", "WARNING others: of a library",
    ]  # fmt: skip
    assert "Traceback (most recent call last):" in shown


def test_a_worker_that_is_stopped_falls_silent_and_one_that_works_does_not(run: Run) -> None:
    steps = iter(range(10**6))
    with WorkerSign(run, 1, 0, 1, "node") as sign:
        first = read_workers(run, 1)[0]
        assert (first.doing, first.ended) == ("starting", None)
        sign.follow(lambda: ("base", next(steps), "computing"))
        deadline = time.monotonic() + 60
        while (now := read_workers(run, 1)[0]).step < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert now.beat > first.beat and now.since == now.beat
    assert read_workers(run, 1)[0].ended == "ended"
    last = read_workers(run, 1)[0].beat
    time.sleep(1.5 * beat_seconds(1))
    assert read_workers(run, 1)[0].beat == last


def test_a_shared_disk_gets_as_many_signs_of_any_number_of_workers() -> None:
    for world_size in (1, 64, 1024, 4096):
        assert world_size / beat_seconds(world_size) <= 32 or beat_seconds(world_size) == 2.0


def test_a_damaged_sign_is_left_out(run: Run) -> None:
    for rank, content in enumerate(["", "{", json.dumps({"rank": 2}), "[]"]):
        path = run.worker_path(1, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert read_workers(run, 1) == [] and attempts(run) == [1]


def test_a_log_that_is_not_there_names_those_that_are(run: Run) -> None:
    with pytest.raises(ConfigError, match="no worker has started yet"):
        print_logs(run.folder)
    for attempt, ranks in ((1, [0]), (2, [0, 1, 2, 5])):
        for rank in ranks:
            path = run.worker_log_path(attempt, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    with pytest.raises(ConfigError, match=r"rank 3 in attempt 2 .*it has ranks 0-2, 5"):
        print_logs(run.folder, rank=3)
    with pytest.raises(ConfigError, match=r"attempt 9 .*there are attempts 1-2"):
        print_logs(run.folder, attempt=9)


def test_a_log_is_followed_from_before_the_first_workers_over_restarts_to_the_runs_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "_PAUSE", 0.02)
    begun, ended = threading.Event(), threading.Event()

    def lives(_: Run) -> bool:
        begun.set()
        return not ended.is_set()

    def train() -> None:
        begun.wait(10)
        for attempt in (1, 2, 3):
            run.worker_path(attempt, 0).parent.mkdir(parents=True)  # the driver's, before there are workers
            time.sleep(0.1)
            path = run.worker_log_path(attempt, 0)
            path.parent.mkdir(parents=True)
            with path.open("w") as file:
                for step in (1, 2):
                    file.write(f"attempt {attempt}, step {step}\n")
                    file.flush()
                    time.sleep(0.1)
        ended.set()

    monkeypatch.setattr(logs, "driver_lives", lives)
    training = threading.Thread(target=train)
    training.start()
    print_logs(run.folder, follow=True)
    training.join(10)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"attempt {attempt}, step {step}" for attempt in (1, 2, 3) for step in (1, 2)]
    assert shown.err.splitlines() == ["Attempt 2:", "Attempt 3:"]
    ended.clear()
    print_logs(run.folder, attempt=1, follow=True)  # to which nothing comes any more
    assert capsys.readouterr().out.splitlines() == ["attempt 1, step 1", "attempt 1, step 2"]


def test_the_stack_of_the_thread_that_trains_is_found_among_all(tmp_path: Path) -> None:
    """Ray Train runs a worker's function beside the main thread, which waits for calls."""
    code = "def read_shard():\n    begun.set()\n    gate.wait()\ndef _work():\n    read_shard()\n"
    names = {"gate": threading.Event(), "begun": threading.Event()}
    exec(compile(code, "/somewhere/driver/worker_group.py", "exec"), names)
    thread = threading.Thread(target=names["_work"], daemon=True)
    thread.start()
    names["begun"].wait()
    path = tmp_path / "stacks.txt"
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    names["gate"].set()
    stack = training_stack(path.read_text())
    assert "in read_shard" in stack and "in test_the_stack" not in stack
    assert innermost(stack).startswith("wait, threading")
    assert "in test_the_stack" in training_stack(path.read_text().replace("in _work", "in another"))
    assert innermost("") == ""


def test_the_load_of_every_node_is_told_by_its_first_worker(run: Run) -> None:
    for rank, load in ((0, 10.0), (1, None), (2, 30.0)):
        measure = None if load is None else lambda value=load: {"system/cpu_utilization_percentage": value}
        with WorkerSign(run, 1, rank, 3, "node", node_rank=rank // 2, measure=measure):
            pass
    assert nodes_load(run, 1) == {
        "system/node_0/cpu_utilization_percentage": 10.0, "system/node_1/cpu_utilization_percentage": 30.0
    }  # fmt: skip
    machine = f"{socket.gethostname()} (Ray's node node)"
    assert node_names(run, 1) == f"0: {machine}, 1: {machine}"
    with WorkerSign(run, 1, 1, 3, "other", node_rank=0):  # two of Ray's nodes on one machine, which has one address
        pass
    both = f"{socket.gethostname()} (Ray's node node, Ray's node other)"
    assert node_names(run, 1) == f"0: {both}, 1: {machine}"
