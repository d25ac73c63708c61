"""What ended a worker group, in plain words, and when a run is given up.

Run: python -m pytest tests/platform/driver/test_restarts.py
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.preemption import PreemptionInfo

from domainshuttle.cluster.local import ClusterError
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import TooManyBadError
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.plan.step_plan import KNOWN_VERSIONS, ORDER_VERSION
from domainshuttle.pipelines.sample import SampleInfo
from domainshuttle.pipelines.shards.tar import Member, ShardEntry
from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.resume import IncompatibleError
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.driver import group_size as sizes_module
from domainshuttle.platform.driver import worker_group
from domainshuttle.platform.driver.group_size import group_size, settled_size
from domainshuttle.platform.driver.restarts import FaultsInARow, explain
from domainshuttle.platform.driver.schedule_loop import DivergedError, Schedule, WorkersFailedError
from domainshuttle.platform.driver.worker_group import WorkerGroup
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Attempt, Ledger
from domainshuttle.platform.run.segments import End, SegmentEnd, StartPoint, WorkerJob
from domainshuttle.platform.tracking.outbox import segment_journal, tell_error

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:3344")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path}", "cluster.max_failures=2"]))


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def schedule(run: Run, shown: list[str]) -> Schedule:
    tracker: Any = SimpleNamespace(open_segment=lambda name: True)  # else what ends a group is told to the spool
    return Schedule(run, tracker, lambda: None, shown.append)


def save(run: Run, step: int, segment: str = "base") -> None:
    store = CheckpointStore.of(run.config)
    write_manifest(store.place, TrainingState(segment, step, 1, 2, "d", {}, {}, {}), str(Name(segment, step)), {})


def died(text: str = "The actor died unexpectedly before finishing this task.") -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("worker 1 failed its health check", RayActorError("ab12", text))


def of_workers(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("a worker died", dict(enumerate(failures)))


def fault(schedule: Schedule, error: Exception) -> None:
    """What ended workers of the first stage, which made no step and left nothing."""
    schedule._handle_fault(error, WorkerJob({}, 1, (StartPoint("base", 0, None, 1),), {}, {}, {}))


def tags(run: Run, segment: str = "base") -> dict[str, str]:
    lines, _ = segment_journal(run.spool, segment).read()
    return {name: text for line in lines if line["kind"] == "tags" for name, text in line["values"].items()}


def test_the_cause_is_not_what_the_others_see_of_it() -> None:
    assert explain(of_workers(LOST, ValueError("the batch is empty"))).what == (
        "worker 1 failed: ValueError: the batch is empty"
    )
    assert explain(of_workers(LOST, died(), ValueError("x"))).what == "worker 1 died: it was killed, or crashed"
    assert explain(of_workers(LOST)).what.startswith("worker 0 failed: RuntimeError: ")
    assert explain(of_workers()).what == "the workers ended, and none said why"


NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


def test_no_room_after_a_failed_start_counts_and_names_what_failed_first(schedule: Schedule, shown: list[str]) -> None:
    fault(schedule, NO_ROOM)
    assert "fault" not in shown[-1].partition(". Ray's")[0]  # others may hold it: nothing has failed
    fault(schedule, ControllerError(ValueError("a bug in the set-up")))
    fault(schedule, NO_ROOM)
    assert "no room for the workers, most likely since" in shown[-1]
    assert "ValueError: a bug in the set-up" in shown[-1] and "fault 2 of at most 2" in shown[-1]
    with pytest.raises(WorkersFailedError, match="a bug in the set-up"):
        fault(schedule, NO_ROOM)


@pytest.mark.parametrize(
    "before",
    [
        of_workers(died()),
        ControllerError(WorkerGroupStartupFailedError("at least one")),
        of_workers(died("The actor died because its node has died. Node Id: 77")),
    ],
)
def test_no_room_after_other_faults_is_waited_for(schedule: Schedule, before: Exception) -> None:
    if isinstance(before, ControllerError):
        before.controller_failure.__cause__ = NodeDiedError("the node has died")
    fault(schedule, before)
    for _ in range(5):
        fault(schedule, NO_ROOM)


def followed(
    run: Run, schedule: Schedule, monkeypatch: pytest.MonkeyPatch, work: Callable[[Attempt], None], *segments: str
) -> list[str]:
    """The segments that a driver opens while it follows a group of workers, of which rank 0 does `work`."""
    opened: list[str] = []

    def fit() -> SimpleNamespace:
        attempt = Ledger(run.ledger_path).start(1, segments[0], 0)
        work(attempt)
        attempt.end("regrouped")
        return SimpleNamespace(return_value=None)

    monkeypatch.setattr(worker_group, "ray_trainer", lambda *_, **__: SimpleNamespace(fit=fit))
    monkeypatch.setattr(schedule, "_open", lambda segment: opened.append(segment.name))
    job = WorkerJob({}, 7, tuple(StartPoint(one, 0, None, 77) for one in segments), {}, {}, {})
    group = WorkerGroup(run, job, 1)
    schedule._follow(group, job)
    assert group.error is None
    return list(dict.fromkeys(opened))


def test_only_segments_that_these_workers_are_at_are_opened(
    run: Run, schedule: Schedule, monkeypatch: pytest.MonkeyPatch, shown: list[str]
) -> None:
    """What rank 0 of an earlier group wrote is there until that of this one writes: its stage is not begun again."""

    def wrote(segment: str, attempt: int) -> None:
        line = {"segment": segment, "step": 3, "steps": 9, "first_step": 0, "attempt": attempt, "state": "training"}
        run.progress_path.write_text(json.dumps(line))

    def work(attempt: Attempt) -> None:
        time.sleep(0.7)
        wrote("stage1", 77)
        time.sleep(0.7)
        wrote("stage2", 77)

    wrote("base", 76)
    assert followed(run, schedule, monkeypatch, work, "stage1", "stage2") == ["stage1", "stage2"]
    wrote("stage2", 76)
    schedule._handle_fault(of_workers(died()), WorkerJob({}, 8, (StartPoint("base", 0, None, 78),), {}, {}, {}))
    assert shown[-1].startswith("Stage base: ")


def test_workers_at_work_are_asked_to_end_when_more_would_fit(
    tmp_path: Path, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(load_config("demo", [f"output={tmp_path}", "cluster.resize_seconds=0.1"]))
    asked: list[bool] = []

    def work(attempt: Attempt) -> None:
        deadline = time.monotonic() + 10
        while not run.regroup_path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        asked.append(run.regroup_path.exists())

    schedule = Schedule(run, cast(Any, None), lambda: None, shown.append)
    monkeypatch.setattr(schedule, "_size", lambda segment, held=0: held + 1)
    followed(run, schedule, monkeypatch, work, "base")
    assert asked == [True]
    assert shown == ["Stage base: there is room for 2 workers; a checkpoint, then they start"]


@pytest.mark.nightly
def test_the_room_of_a_start_that_failed_is_free_for_the_next(
    run: Run, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ray.available_resources()["CPU"]
    right = worker_group.ProcessGroup
    monkeypatch.setattr(worker_group, "ProcessGroup", lambda backend, **more: right("no-such-backend", **more))
    job = WorkerJob(run.config.model_dump(mode="json"), 1, (), {}, {}, {"command": 0.0, "asked": 0.0})
    group = WorkerGroup(run, job, 2)
    for _ in group.running():
        pass
    assert isinstance(group.error, ControllerError)
    assert "no-such-backend" in explain(group.error).what
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0.0) < free:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ActorDiedError(), "Ray Train's controller died: it was killed, or crashed"),
        (
            of_workers(
                RayTaskError(
                    "train",
                    "traceback",
                    RayActorError("ab", "The actor died.\n\tclass_name: SplitCoordinator\n\tpid: 4711\nkilled"),
                ).as_instanceof_cause()
            ),
            "Ray Data's coordinator died (process 4711): it was killed, or crashed",
        ),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "there was no room for the workers"),
        (ControllerError(WorkerGroupStartupFailedError("at least one")), "a worker died while they started"),
        (
            of_workers(WorkerHealthCheckFailedError("x", NodeDiedError("the node has died"))),
            "the node of worker 0 is gone",
        ),
        (
            of_workers(died("The actor died because its node has died. Node Id: 77")),
            "the node of worker 0 is gone",
        ),
        (ControllerError(ValueError("a bug")), "Ray Train's controller failed: ValueError: a bug"),
    ],
)
def test_each_end_has_a_line_in_plain_words(error: Exception, what: str) -> None:
    assert explain(error).what == what


MEMORY = """1 worker was killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 4a8f) \
was 22.92GB used / 24.00GB limit (0.955)
OOM kill reason: Memory usage 24609000000B exceeded threshold of 24480000000B (95.0% of 25769803776B limit)
Selected to kill: (Actor(baf79da3): job ID=01000000, lease ID=00ef, task name=RayTrainWorker.__init__, required \
resources={CPU: 0.1}, pid=27457, actual memory used=9.40GB, worker ID=cab0e73b)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
27457\t9.40\tray::RayTrainWorker.eat
23194\t0.47\tpython
"""


def test_a_node_without_memory_is_said_with_what_helps() -> None:
    """In the words of Ray 2.60, which the test below has from Ray itself."""
    said = explain(of_workers(LOST, WorkerHealthCheckFailedError("x", OutOfMemoryError(MEMORY)))).what
    assert said.startswith(
        "the node ran out of memory (22.9 of 24.0 GB were used; the largest process, ray::RayTrainWorker, held 9.4 GB)"
        ", and Ray ended worker 1: lower micro_batch"
    )
    controller = OutOfMemoryError(MEMORY.replace("RayTrainWorker.__init__", "TrainController.__init__"))
    assert "and Ray ended Ray Train's controller: lower" in explain(controller).what
    assert explain(controller).counted


@pytest.mark.nightly
def test_ray_itself_says_so_when_it_ends_a_worker_for_want_of_memory() -> None:
    code = """
import os, psutil
memory = psutil.virtual_memory()
os.environ["RAY_memory_usage_threshold"] = str(round(1 - memory.available / memory.total + 0.06, 3))
os.environ["RAY_memory_monitor_refresh_ms"] = "200"
import ray
ray.init(address="local", include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0.1)
class RayTrainWorker:
    def eat(self):
        held = []
        while True:
            held.append(b"x" * 200_000_000)

try:
    ray.get(RayTrainWorker.remote().eat.remote(), timeout=120)
except Exception as error:
    from ray.train import WorkerGroupError
    from domainshuttle.platform.driver.restarts import explain
    print(explain(WorkerGroupError("x", {0: error})).what)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True).stdout
    assert re.search(
        r"the node ran out of memory \([\d.]+ of [\d.]+ GB were used; the largest process, ray::\w+, held", said
    )
    assert "and Ray ended worker 0: lower micro_batch" in said


def test_a_death_while_they_start_is_a_fault_like_another() -> None:
    startup = WorkerGroupStartupFailedError("at least one worker failed")
    startup.__cause__ = RayActorError()
    fault = explain(ControllerError(startup))
    assert fault.what == "a worker died while they started (a worker died: it was killed, or crashed)"
    assert fault.counted


def test_what_nobody_can_help_is_not_counted(schedule: Schedule) -> None:
    taken = RayActorError("ab", "preempted", preempted=True)
    for _ in range(5):
        fault(schedule, ControllerError(WorkerGroupStartupTimeoutError(2)))
        fault(schedule, of_workers(WorkerHealthCheckFailedError("x", taken)))
        fault(schedule, PreemptionError(PreemptionInfo(None, {"node": [0]})))


def test_faults_are_counted_between_checkpoints(run: Run, schedule: Schedule, shown: list[str]) -> None:
    for step in range(1, 5):  # more than the two that may come in a row
        fault(schedule, of_workers(died()))
        fault(schedule, ActorDiedError())
        save(run, step)
    for _ in range(2):
        fault(schedule, of_workers(RuntimeError("CUDA error: an illegal access")))
    with pytest.raises(WorkersFailedError, match=r"fault 3 in a row.*cluster.max_failures is 2.*fault-0011.txt") as end:
        fault(schedule, of_workers(died()))
    assert "worker 0 died" in str(end.value)
    assert any("start again (fault 2 of at most 2 in a row without a newer checkpoint)" in line for line in shown)
    assert "illegal access" in run.report_path(10).read_text()


def test_only_a_newer_checkpoint_of_the_same_segment_is_progress(run: Run) -> None:
    save(run, 5)
    save(run, 6)
    store = CheckpointStore.of(run.config)
    faults = FaultsInARow(store, "base")
    assert faults.add() == 1
    store.clear("base-step00000006")  # as if it were damaged
    assert faults.add() == 2
    save(run, 7, "stage2")
    assert faults.add() == 3
    save(run, 7)
    assert faults.add() == 1


@pytest.mark.parametrize(
    "error", [ConfigError("no such base"), IncompatibleError("other weights"), TooManyBadError("12 of 500")]
)
def test_what_does_not_go_away_ends_the_run_at_once(schedule: Schedule, error: Exception) -> None:
    for raised in (error, RayTaskError("configure", "traceback", error).as_instanceof_cause()):
        with pytest.raises(type(error), match=f"^{error}$"):
            fault(schedule, of_workers(LOST, raised))


def test_a_death_after_everything_is_finished_ends_nothing(run: Run, schedule: Schedule, shown: list[str]) -> None:
    for segment in run.segments():
        (segment.weights / "config.json").parent.mkdir(parents=True, exist_ok=True)
        (segment.weights / "config.json").write_text("{}")
        segment.finish(segment.stage.steps)
    fault(schedule, of_workers(died()))
    assert shown == ["The workers died after everything was finished: worker 0 died: it was killed, or crashed"]


def test_an_error_of_the_driver_is_no_fault_of_the_workers(schedule: Schedule) -> None:
    with pytest.raises(KeyError):
        fault(schedule, KeyError("ours"))


def test_any_ranks_error_is_in_the_spool_before_it_dies(run: Run) -> None:
    tell_error(run, "stage1", 5, "OSError: s3://key:hunter2@bucket does not answer")
    assert "hunter2" not in tags(run, "stage1")["error.rank5"]
    assert "does not answer" in tags(run, "stage1")["error.rank5"]


def test_each_restart_has_a_tag_and_ends_the_attempt_in_the_ledger(run: Run, schedule: Schedule) -> None:
    ledger = Ledger(run.ledger_path)
    fault(schedule, of_workers(died()))
    assert tags(run) == {}  # there was no attempt yet
    save(run, 1)
    for last in (7, 9):
        attempt = ledger.start(2, "base", 4)
        attempt.progress(last)
        attempt._writer.close()
        fault(schedule, of_workers(LOST, ValueError(f"bad {last}")))
        assert Ledger(run.ledger_path).attempts()[-1].reason == f"worker 1 failed: ValueError: bad {last}"
    assert tags(run) == {
        "restart.1": "worker 1 failed: ValueError: bad 7 (step 7 was reached)",
        "restart.2": "worker 1 failed: ValueError: bad 9 (step 9 was reached)",
    }
    # a start that fails before the workers' first line takes no other's reason away
    save(run, 2)
    schedule._attempts_before = len(ledger.attempts())
    fault(schedule, ControllerError(ValueError("a bug in the set-up")))
    assert tags(run)["restart.2"].startswith("worker 1 failed: ValueError: bad 9")


def test_what_the_workers_found_bad_is_skipped_by_the_next_start(tmp_path: Path, shown: list[str]) -> None:
    """The driver hears it from them, and reads no file of theirs, which another machine may show it late."""
    run = Run.open(load_config("demo", [f"output={tmp_path}", "guard.most_rollbacks=1"]))
    schedule = Schedule(run, cast(Any, None), lambda: None, shown.append)
    assert schedule._handle_end(SegmentEnd(End.ROLLED_BACK, "base", 5, bad=(4, 5))) is None
    assert run.skipped("base") == [[4, 5]] and schedule._skipped(run.segment("base")) == {4, 5}
    assert shown == [f"Stage base went back, and now skips what was bad: steps 4, 5 (samples in {run.folder}/dropped)"]
    with pytest.raises(DivergedError, match=r"went back to a checkpoint 2 times, the last time for step 9: look at"):
        schedule._handle_end(SegmentEnd(End.ROLLED_BACK, "base", 9, bad=(9,)))
    assert run.skipped("base") == [[4, 5], [9]]
    alone = Schedule(Run.open(load_config("demo", [f"output={tmp_path}/b", "guard.most_rollbacks=0"])), cast(Any, None),
                     lambda: None, shown.append)  # fmt: skip
    with pytest.raises(DivergedError, match="went back to a checkpoint 1 time, the last"):
        alone._handle_end(SegmentEnd(End.ROLLED_BACK, "base", 9, bad=(9,)))


def test_starts_are_in_order_also_where_another_machines_clock_was_ahead(run: Run, schedule: Schedule) -> None:
    """Of two attempts at a step the later one counts, in the audit of samples too."""
    assert schedule._next_attempt() > time.time_ns() - 10**9
    ahead = time.time_ns() + 600 * 10**9
    run.progress_path.write_text(json.dumps({"segment": "base", "attempt": ahead}))
    assert schedule._next_attempt() == ahead + 1


def test_only_the_first_start_of_a_command_counts_what_the_command_took(schedule: Schedule) -> None:
    """Hours later another start of the workers waits for nothing of it."""
    first, later = schedule._times(), schedule._times()
    assert list(first) == ["command", "asked"] and first["command"] <= first["asked"]
    assert list(later) == ["asked"] and later["asked"] >= first["asked"]


def test_a_restart_says_which_checkpoint_it_skips(run: Run, schedule: Schedule, shown: list[str]) -> None:
    class Tags:
        def __init__(self) -> None:
            self.seen: list[tuple[dict[str, str], str]] = []

        def tag(self, tags: dict[str, str], segment: str) -> None:
            self.seen.append((tags, segment))

    tracker: Any = Tags()
    schedule._tracker = tracker
    segment, store = run.segment("base"), CheckpointStore.of(run.config)
    for step in (5, 6):
        state = TrainingState("base", step, 1, 2, run.config.digest(), {}, {}, {})
        write_manifest(store.place, state, str(Name("base", step)), {})
    newest = schedule._choose(segment, "auto")
    assert newest is not None and newest.state.step == 6 and shown == []
    (newest.folder / "state.json").write_text("{}")
    older = schedule._choose(segment, "auto")
    assert older is not None and older.state.step == 5
    assert len(shown) == 1 and "base-step00000006" in shown[0] and "state.json has 2 bytes" in shown[0]
    assert tracker.seen == [({"checkpoints.skipped": shown[0]}, "base")]


def everywhere_free(monkeypatch: pytest.MonkeyPatch, resources: dict[str, float]) -> None:
    """Nobody uses these of each node."""
    names = [node["NodeID"] for node in sizes_module.ray.nodes()]
    monkeypatch.setattr(sizes_module, "available_resources_per_node", lambda: dict.fromkeys(names, resources))


@pytest.mark.parametrize(("room", "size"), [(9, 8), (8, 8), (7, 4), (4, 4), (3, 4), (100, 16)])
def test_an_elastic_group_takes_the_largest_size_that_shares_the_batch(
    room: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "NodeID": f"node-{n}", "Resources": {"CPU": 3.0}} for n in range(room)]  # a worker each
    gone = {"Alive": False, "NodeID": "gone", "Resources": {"CPU": 300.0}}
    leaving = {"Alive": True, "NodeID": "leaving", "Resources": {"CPU": 300.0}}
    monkeypatch.setattr(sizes_module.ray, "nodes", lambda: [*nodes, gone, leaving])
    everywhere_free(monkeypatch, {"CPU": 3.0})
    assert group_size([4, 8, 16], {"CPU": 2.0}, {"leaving"}) == size


def test_only_nodes_of_the_labels_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, labels: dict[str, str]) -> dict[str, Any]:
        return {"Alive": True, "NodeID": name, "Resources": {"GPU": 8.0}, "Labels": {"zone": "a", **labels}}

    nodes = [node("one", {"pool": "trainers"}), node("two", {"pool": "encoders"}), node("three", {})]
    monkeypatch.setattr(sizes_module.ray, "nodes", lambda: nodes)
    everywhere_free(monkeypatch, {"GPU": 8.0})
    need = {"GPU": 1.0}
    assert group_size([8, 16, 24], need) == 24
    assert group_size([4, 8, 16, 24], need, labels={"pool": "trainers"}) == 8
    assert settled_size([4, 8, 16], need, (), lambda: None, labels={"pool": "trainers", "zone": "a"}) == 8
    assert group_size([4, 8], need, labels={"pool": "none"}) == 4
    # what is free elsewhere, or only in pieces that no worker fits, is no room
    free = {"one": {"GPU": 3.0}, "two": {"GPU": 8.0}, "three": {"GPU": 8.0}}
    monkeypatch.setattr(sizes_module, "available_resources_per_node", lambda: free)
    assert group_size(range(1, 25), need, labels={"pool": "trainers"}) == 3
    assert group_size(range(1, 25), need, held=2, labels={"pool": "trainers"}) == 5
    assert group_size(range(1, 25), {"GPU": 2.0}) == 1 + 4 + 4
    assert group_size(range(1, 25), need, {"three"}) == 3 + 8


def test_workers_leave_room_for_what_encodes_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With workers on every GPU the actor that encodes would never start, and they would wait for it for ever."""
    nodes = [
        {"Alive": True, "NodeID": name, "Resources": {"CPU": 8.0, "GPU": 4.0}, "Labels": {"pool": pool}}
        for name, pool in (("one", "trainers"), ("two", "trainers"), ("three", "encoders"))
    ]
    monkeypatch.setattr(sizes_module.ray, "nodes", lambda: nodes)
    everywhere_free(monkeypatch, {"CPU": 8.0, "GPU": 4.0})
    sizes, need = range(1, 17), {"CPU": 1.0, "GPU": 1.0}
    beside = {"CPU": 1.0, "GPU": 1.0}
    assert group_size(sizes, need) == 12
    assert group_size(sizes, need, beside=beside) == 11
    assert settled_size(sizes, need, (), lambda: None, beside=beside) == 11
    assert group_size(sizes, need, labels={"pool": "trainers"}, beside=beside) == 8, "it fits elsewhere"
    assert group_size(sizes, need, {"three"}, labels={"pool": "trainers"}, beside=beside) == 7
    assert group_size(sizes, need, beside={"CPU": 4.0}) == 12, "CPUs that no worker needs"
    # of a group at work the actor is there: it has taken what it needs
    everywhere_free(monkeypatch, {"CPU": 4.0, "GPU": 1.0})
    assert group_size(sizes, need, held=8, beside=beside) == 11
    assert group_size(sizes, need, held=9, beside=beside) == 11


def test_labels_that_no_node_has_are_refused_and_those_there_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"Alive": True, "NodeID": "one", "Resources": {"CPU": 8.0}, "Labels": {"pool": "trainers", "zone": "a"}}
    monkeypatch.setattr(sizes_module.ray, "nodes", lambda: [node])

    def asks(**more: Any) -> Any:
        return run.config.model_copy(update={"cluster": run.config.cluster.model_copy(update=more)})

    sizes_module.require_room(asks())
    sizes_module.require_room(asks(node_labels={"pool": "trainers"}))
    with pytest.raises(ClusterError, match=r"labels pool=trainer \(.* room for 0 workers.* nodes have pool=trainers\."):
        sizes_module.require_room(asks(node_labels={"pool": "trainer"}))
    with pytest.raises(ClusterError, match="of these labels the living nodes have none"):
        sizes_module.require_room(asks(node_labels={"tier": "a"}))
    # 16 CPUs are there, and no node has 9
    monkeypatch.setattr(sizes_module.ray, "nodes", lambda: [node, {**node, "NodeID": "two"}])
    with pytest.raises(ClusterError, match="room for 0 workers, and this needs 9 CPUs for each of 2 workers"):
        sizes_module.require_room(asks(cpus_per_worker=9.0))


def test_what_an_ended_group_still_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([0.0, 1.0, 2.0])
    node = {"Alive": True, "NodeID": "one", "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(sizes_module.ray, "nodes", lambda: [node])
    monkeypatch.setattr(sizes_module, "available_resources_per_node", lambda: {"one": {"CPU": next(free)}})
    assert settled_size([1, 2], {"CPU": 1.0}, (), lambda: None) == 2
    everywhere_free(monkeypatch, {"CPU": 1.0})
    assert settled_size([1, 2], {"CPU": 1.0}, (), lambda: None, seconds=0.0) == 1


def test_what_others_use_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeID": "one", "Resources": {"CPU": 16.0, "GPU": 8.0}}
    monkeypatch.setattr(sizes_module.ray, "nodes", lambda: [node])
    everywhere_free(monkeypatch, {"CPU": 12.0, "GPU": 2.0})
    need = {"CPU": 0.1, "GPU": 1.0}
    assert group_size(range(1, 9), need) == 2
    assert group_size(range(1, 9), need, held=4) == 6
    everywhere_free(monkeypatch, {"CPU": 0.3})
    assert group_size(range(1, 9), {"CPU": 0.1}) == 3  # in floating point 0.3 / 0.1 is below it


def test_rays_errors_are_those_of_a_training_that_failed() -> None:
    """What `fit` raises is read by its public types."""
    for kind in (WorkerGroupError, ControllerError, PreemptionError):
        assert issubclass(kind, TrainingFailedError)
    assert issubclass(ActorDiedError, ray.exceptions.RayError)


@pytest.mark.parametrize("version", KNOWN_VERSIONS)
def test_a_checkpoint_is_gone_on_from_in_the_data_order_that_it_began_with(version: int, tmp_path: Path) -> None:
    config = load_config("demo", [f"output={tmp_path}", f"data={tmp_path / 'data'}"])
    run, shown = Run.open(config), list[str]()
    segment = run.segment("stage1")
    index = Path(config.corpus("sprites-images").index)
    index.parent.mkdir(parents=True)
    entry = ShardEntry("a.tar", "", (Member("safetensors", 0, 1),), 0)
    info = SampleInfo(caption="x", source="s", kind="image", frames=1, size=(64, 64), subjects=[], references=[])
    rows = [IndexRow.of(replace(entry, key=f"{n}"), info, parse_bucket("1x64x64")) for n in range(200)]
    write_index(index, rows, IndexMetadata(corpus="sprites-images", stage="encoded"))
    assert run.order_version(segment.name) == ORDER_VERSION
    run.segment("base").finish(9)
    schedule = Schedule(run, cast(Any, None), lambda: None, shown.append)
    origin = schedule._origins["stage1"].identified(run.fingerprints).identity
    plan = make_feed(config, segment, version).plan().state()
    state = TrainingState("stage1", 5, segment.seed, 2, config.digest(), plan, {}, {}, base=origin)
    write_manifest(CheckpointStore.of(config).place, state, str(Name("stage1", 5)), {})
    start = schedule._start_point(segment)
    assert (start.first_step, start.order) == (5, version)
    assert schedule._start_point(segment, "none").order == ORDER_VERSION
    run.note_order(segment.name, start.order)
    assert run.order_version(segment.name) == version


def test_a_segment_that_began_before_orders_were_noted_has_the_first(run: Run) -> None:
    assert run.order_version("stage1") == ORDER_VERSION
    run.consumed_path("stage1", 0).touch()
    assert run.order_version("stage1") == 1
