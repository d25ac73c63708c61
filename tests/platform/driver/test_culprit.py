"""Who ended a worker group, of those that it took along. Run: python -m pytest tests/platform/driver/test_culprit.py"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver.culprit import Evidence
from domainshuttle.platform.driver.restarts import explain
from domainshuttle.platform.driver.schedule_loop import Schedule, WorkersFailedError
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import StartPoint, WorkerJob
from domainshuttle.platform.run.workers import WorkerState
from domainshuttle.platform.training import end_of_step
from domainshuttle.platform.training.loss_metrics import LossMetrics
from domainshuttle.platform.training.rank_rates import RankRates, compare_ranks

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:3344")
NOW = time.time()

HANGING = """
import faulthandler, sys, time
import torch.distributed as dist

def read_shard():
    time.sleep(60)

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
faulthandler.dump_traceback_later(3, exit=True, file=open(sys.argv[3], "a"))
if sys.argv[2] == "1":
    read_shard()
dist.barrier()
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path / 'runs'}", "cluster.max_failures=9"]))


def sign(run: Run, rank: int, age: float = 0.0, **more: Any) -> WorkerState:
    log = str(run.worker_log_path(1, rank).relative_to(run.folder))
    state = WorkerState(rank, 3, f"host{rank}", "n", 100 + rank, log, NOW - 500, NOW - age, "stage2", 57, "computing")
    state = WorkerState(**{**asdict(state), **more})
    path = run.worker_path(1, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(state)))
    return state


def of_workers(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("workers ended", {int(rank[1:]): error for rank, error in failures.items()})


def died(pid: int) -> WorkerHealthCheckFailedError:
    error = RayActorError("ab12", f"The actor died unexpectedly.\n\tclass_name: RayTrainWorker\n\tpid: {pid}")
    return WorkerHealthCheckFailedError("a worker failed its health check", error)


def test_a_killed_worker_is_named_when_only_the_others_errors_are_told(run: Run) -> None:
    """Ray ends the group when the first one, which lost its connection, has raised."""
    sign(run, 0, ended="RuntimeError: Connection closed by peer")
    sign(run, 1, age=6)
    sign(run, 2, ended="RuntimeError: Connection closed by peer")
    said = explain(of_workers(r0=LOST, r2=LOST), Evidence.of(run, 1)).what
    assert said.startswith("worker 1 (process 101 on host1) died: it was killed, or crashed; its log: ")
    assert said.endswith("logs/attempt-0001/rank00001.log")


def test_of_several_silent_workers_the_first_is_named_or_none_alone(run: Run) -> None:
    sign(run, 0, ended="RuntimeError: Connection closed by peer")
    sign(run, 1, age=6)
    sign(run, 2, age=1)  # ended by Ray with the group
    assert explain(of_workers(r0=LOST), Evidence.of(run, 1)).what.startswith("worker 1 (process 101 on host1) died")
    sign(run, 2, age=5.5)
    assert explain(of_workers(r0=LOST), Evidence.of(run, 1)).what.startswith(
        "worker 1 (process 101 on host1) or worker 2 (process 102 on host2) died"
    )


def test_who_died_or_failed_is_named_with_its_process_machine_and_log(run: Run) -> None:
    for rank in range(3):
        sign(run, rank)
    said = explain(of_workers(r0=LOST, r1=died(101)), Evidence.of(run, 1)).what
    assert said.startswith("worker 1 (process 101 on host1) died: it was killed, or crashed; its log: ")
    said = explain(of_workers(r0=LOST, r2=ValueError("the batch is empty")), Evidence.of(run, 1)).what
    assert said.startswith("worker 2 (process 102 on host2) failed: ValueError: the batch is empty; its log: ")


def other_died(name: str, why: str = "its worker process has died. Worker exit type: SYSTEM_ERROR") -> Exception:
    """What a worker raises that asked another of Ray's processes."""
    text = f"The actor died unexpectedly before finishing this task.\n\tclass_name: {name}\n\tpid: 4711\n"
    error = RayActorError("ab12", f"{text}The actor is dead because {why}")
    return RayTaskError("train", "traceback", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("SplitCoordinator", "Ray Data's coordinator"),
        ("SynchronizationActor", "Ray Train's barrier of the workers"),
        ("SomethingNew", "Ray's SomethingNew"),
    ],
)
def test_no_worker_is_blamed_for_the_death_of_another_process(run: Run, name: str, who: str) -> None:
    for rank in range(3):
        sign(run, rank, ended="ActorDiedError: The actor died unexpectedly")
    said = explain(of_workers(r0=other_died(name), r1=LOST, r2=other_died(name)), Evidence.of(run, 1)).what
    assert said == f"{who} died (process 4711): it was killed, or crashed"  # and no worker's log is its


@pytest.mark.parametrize("why", ["its owner has died", "all references to the actor were removed"])
def test_a_process_that_ended_with_a_worker_is_not_what_ended_the_group(run: Run, why: str) -> None:
    follows = other_died("SplitCoordinator", why)
    for rank in (1, 2):
        sign(run, rank, ended="ActorDiedError: The actor died unexpectedly")
    sign(run, 0, age=6)
    for errors in ({"r1": follows}, {"r1": follows, "r0": died(100)}):
        assert explain(of_workers(**errors), Evidence.of(run, 1)).what.startswith(
            "worker 0 (process 100 on host0) died: it was killed, or crashed; its log: "
        )
    mistake = ValueError("the batch is empty")
    for process in (follows, other_died("SplitCoordinator")):
        said = explain(of_workers(r1=process, r2=mistake), Evidence.of(run, 1)).what
        assert said.startswith("worker 2 (process 102 on host2) failed: ValueError: the batch is empty; its log: ")


def test_a_stopped_worker_is_named_by_its_silence(run: Run) -> None:
    sign(run, 0)
    sign(run, 1, age=40)
    sign(run, 2)
    path = run.hang_path("stage2", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        'Timeout (0:00:40)!\nThread 0x1 (most recent call first):\n  File "distributed_c10d.py", line 1 in f'
    )
    said = explain(of_workers(r0=died(100), r1=LOST), Evidence.of(run, 1)).what
    assert said.startswith(
        "worker 1 (process 101 on host1) sent no heartbeat for 40 s, after step 57 of stage2, computing: it was "
        "stopped, or its machine does not answer. The others waited for it; stacks: "
    )
    assert str(path.parent) in said


def test_stacks_of_an_earlier_attempt_accuse_nobody(run: Run) -> None:
    sign(run, 0, started=time.time() + 100)
    path = run.hang_path("stage2", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("Timeout (0:00:40)!\n")
    assert Evidence.of(run, 1).hang() is None


def test_a_worker_that_hangs_is_told_from_those_that_wait_for_it(run: Run, tmp_path: Path) -> None:
    """By real stacks: one rank sleeps in a function of its own, the other waits in a collective."""
    paths = [run.hang_path("stage2", rank) for rank in (0, 1)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    commands = [[sys.executable, "-c", HANGING, str(tmp_path / "meet"), str(rank), str(paths[rank])] for rank in (0, 1)]
    for process in [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]:
        assert process.wait(120) != 0
    for rank in (0, 1):
        sign(run, rank, world_size=2, doing="waiting for data" if rank else "computing")
    said = Evidence.of(run, 1).hang()
    assert said is not None and said.startswith(
        "worker 1 (process 101 on host1) hung in step 57 of stage2, waiting for data (in read_shard, <string>:6), and "
        "the others waited for it"
    )


@pytest.mark.parametrize("reads", [end_of_step._summed, RankRates.gathered, compare_ranks, LossMetrics.reduce])
def test_a_worker_that_reads_what_a_collective_made_on_a_gpu_waits_for_the_others(run: Run, reads: Any) -> None:
    """There the collective itself has returned: the stack ends in the function that reads its result."""
    for rank, place in ((0, reads.__code__), (1, (lambda: None).__code__)):
        sign(run, rank, world_size=2, doing="computing")
        path = run.hang_path("stage2", rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = f'  File "{place.co_filename}", line {place.co_firstlineno} in {place.co_name}'
        path.write_text(f"Timeout (0:00:40)!\nThread 0x1 (most recent call first):\n{frame}\n")
    said = Evidence.of(run, 1).hang()
    assert said is not None and said.startswith("worker 1 (process 101 on host1) hung in ")


def test_a_mistake_that_comes_again_before_the_first_step_ends_the_run(run: Run) -> None:
    shown: list[str] = []
    reopened: list[str] = []
    tracker: Any = SimpleNamespace(open_segment=reopened.append)
    schedule = Schedule(run, tracker, lambda: None, shown.append)

    def job(attempt: int) -> WorkerJob:
        return WorkerJob({}, attempt, (StartPoint("base", 0, None, attempt),), {}, {}, {})

    def fault(error: Exception, attempt: int, step: int = 0) -> None:
        run.progress_path.write_text(json.dumps({"segment": "base", "step": step, "first_step": 0, "attempt": attempt}))
        schedule._handle_fault(of_workers(r0=error), job(attempt))

    fault(ValueError("no such kernel"), 1)
    fault(ValueError("another one"), 2)
    fault(ValueError("another one"), 3, step=5)  # it came in the middle of training: not the same
    fault(ValueError("another one"), 4)
    with pytest.raises(WorkersFailedError, match="The start before ended with the same words"):
        fault(ValueError("another one"), 5)
    assert reopened == ["base"] * 4  # its run is no longer that of workers that failed


def test_a_missing_package_ends_the_run_at_once(run: Run) -> None:
    tracker: Any = None
    schedule = Schedule(run, tracker, lambda: None, lambda _: None)
    with pytest.raises(WorkersFailedError, match=r"no module named flash.*install it on every node"):
        schedule._handle_fault(
            of_workers(r0=ImportError("no module named flash")),
            WorkerJob({}, 1, (StartPoint("base", 0, None, 1),), {}, {}, {}),
        )
