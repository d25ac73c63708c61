"""Tracking: .venv/bin/python -m pytest tests/platform/tracking/test_mlflow.py (with a real server: -m slow)."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import parse_qs

import pytest

from domainshuttle.platform.config.schema import absolute_uri
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.tracking import mlflow as tracking
from domainshuttle.platform.tracking import outbox
from domainshuttle.platform.tracking import queries as records
from domainshuttle.platform.tracking.mlflow import MetricLogger, RunIds, Tracker, flush_spool, open_schedule


@pytest.fixture
def black_hole(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that accepts connections and never answers, for which the sender waits 0.5 s here."""
    monkeypatch.setattr(outbox.reachable, "__defaults__", (0.5,))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def schedule(store: str, experiment: str, folder: Path, ids: RunIds | None = None, **params: object) -> Tracker:
    return open_schedule(store, experiment, "a run", params, {"git_commit": "abc"}, folder / "spool", ids=ids)


def log_steps(logger: MetricLogger, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        logger.log(step, {"loss": offset + 1 / step, "loss/flow": offset + 2 / step})


def steps_of(store: str, run_id: str, key: str = "loss") -> list[int]:
    return [step for step, _ in records.read_history(store, run_id, key)]


def move(ids: RunIds, uri: str) -> RunIds:
    return RunIds.from_dict(ids.to_dict(), uri)


def test_a_schedule_is_a_parent_with_a_child_a_segment(store: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1\n")
    params = {f"key{number}": number for number in range(250)} | {"long": "x" * 9000}
    tracker = open_schedule(store, "structure", "a run", params, {"cluster": "desk"}, tmp_path / "spool", [config])
    assert tracker.open_segment("stage2/high", {"learning_rate": 1e-4})
    assert tracker.log_dataset("sprites", "d" * 64, "/data/sprites.parquet", 1200, segment="stage2/high")
    logger = MetricLogger(tracker.ids, "stage2/high", tmp_path / "spool")
    log_steps(logger, range(1, 31))
    logger.tag({"note": "first"})
    logger.artifact(config, "files")
    assert logger.finish()
    assert tracker.finish()

    parent, child = records.read_runs(store, ["structure"])
    assert (parent.id, child.id) == (tracker.ids.parent, tracker.ids.segments["stage2/high"])
    assert (parent.name, child.name, child.parent) == ("a run", "stage2/high", parent.id)
    assert (parent.status, child.status) == ("FINISHED", "FINISHED")
    assert len(parent.params) == 251 and parent.params["key249"] == "249" and len(parent.params["long"]) == 6000
    assert parent.tags["cluster"] == "desk" and child.tags["note"] == "first"
    assert child.metrics == {"loss": 1 / 30, "loss/flow": 2 / 30} and child.steps == {"loss": 30, "loss/flow": 30}
    assert steps_of(store, child.id) == list(range(1, 31))
    client = tracking.connect(store)
    assert [file.path for file in client.list_artifacts(parent.id)] == ["config.yaml"]
    # as people meet them in MLflow's pages
    assert client.get_run(child.id).info.run_name == "a run / stage2/high"
    experiment = client.get_experiment_by_name("structure")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"#/experiments/{experiment.experiment_id}/runs/{parent.id}?workflowType=machine_learning"
    assert page in (tracking.page_of(tracker.ids) or "")
    served = tracking.page_of(RunIds.from_dict(tracker.ids.to_dict(), "https://me:pw@host/mlflow/"))
    assert served == f"https://host/mlflow/{page}"
    assert [file.path for file in client.list_artifacts(child.id, "files")] == ["files/config.yaml"]
    (entry,) = client.get_run(child.id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("sprites", "d" * 36)
    assert json.loads(entry.dataset.profile) == {"num_rows": 1200}


def test_runs_have_a_page_of_one_or_of_their_curves_or_of_a_table() -> None:
    uri = "https://me:pw@host/mlflow"
    one = tracking.page_of_runs(uri, {"r1": "7"})
    assert one == "https://host/mlflow/#/experiments/7/runs/r1?workflowType=machine_learning"
    curves = tracking.page_of_runs(uri, {"r1": "7", "r2": "7"}) or ""
    assert curves.startswith("https://host/mlflow/#/experiments/7/runs?") and "workflowType" in curves
    query = parse_qs(curves.partition("?")[2])
    assert query["compareRunsMode"] == ["CHART"] and query["searchFilter"] == ["attributes.run_id IN ('r1','r2')"]
    query = parse_qs((tracking.page_of_runs(uri, {"r1": "7", "r2": "8"}) or "").partition("?")[2])
    assert (json.loads(query["runs"][0]), json.loads(query["experiments"][0])) == (["r1", "r2"], ["7", "8"])


def test_a_restart_goes_on_in_the_same_runs_without_doubled_points(store: str, tmp_path: Path) -> None:
    tracker = schedule(store, "restart", tmp_path, steps=100, lr=0.1)
    tracker.open_segment("stage1")
    logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool", start_step=0, system_every=0.02)
    log_steps(logger, range(1, 58))
    time.sleep(0.2)
    assert logger.fail(RuntimeError("a worker died"))
    failed_parent, failed_child = records.read_runs(store, ["restart"])
    assert (failed_parent.status, failed_child.status) == ("FAILED", "FAILED")
    assert failed_child.tags["error"] == failed_parent.tags["error"] == "RuntimeError: a worker died"
    assert not any(tag.startswith("resumed.") for tag in failed_child.tags)

    saved = json.loads(json.dumps(tracker.ids.to_dict()))
    again = schedule(store, "restart", tmp_path, RunIds.from_dict(saved), steps=200, lr=0.1)
    logger = MetricLogger(again.ids, "stage1", tmp_path / "spool", start_step=40, system_every=0.02)
    log_steps(logger, range(41, 81), offset=5)
    time.sleep(0.2)
    assert logger.close()
    parent, child = records.read_runs(store, ["restart"])
    assert (parent.id, child.id) == (failed_parent.id, failed_child.id)
    assert (parent.status, child.status) == ("RUNNING", "RUNNING")
    assert parent.params["steps"] == "100" and parent.tags["changed.steps"] == "200" and "changed.lr" not in parent.tags
    assert "41 to 57" in child.tags["resumed.40"]
    points = records.read_history(store, child.id, "loss")
    assert [step for step, _ in points] == list(range(1, 81))
    assert dict(points)[57] == 1 / 57 and dict(points)[58] == 5 + 1 / 58  # the first points stay, new ones follow
    system = steps_of(store, child.id, "system/process_memory_gigabytes")
    assert system == list(range(len(system))) and len(system) > 10  # numbered on across the restart

    schedule(store, "restart", tmp_path, again.ids, steps=100, lr=0.1)
    assert records.read_runs(store, ["restart"])[0].tags["changed.steps"] == "100"


def test_a_run_whose_workers_start_again_is_running_whatever_they_said_of_their_end(store: str, tmp_path: Path) -> None:
    tracker = schedule(store, "again", tmp_path)
    tracker.open_segment("stage1")
    logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool")
    time.sleep(0.005)  # what is said in one millisecond has no order
    assert logger.fail("RuntimeError: connection closed by peer")
    assert {run.status for run in records.read_runs(store, ["again"])} == {"FAILED"}
    time.sleep(0.005)
    tracker.open_segment("stage1")
    for run in records.read_runs(store, ["again"]):
        assert run.status == "RUNNING" and "error" not in run.tags and "closed" in run.tags["error.recovered"]


def test_a_worker_that_was_killed_is_marked_as_failed_by_the_driver(store: str, tmp_path: Path) -> None:
    tracker = schedule(store, "killed", tmp_path)
    tracker.open_segment("stage1")
    tracker.finish(segment="stage1")
    tracker.open_segment("stage2")
    left = Journal(tmp_path / "spool" / "segment-stage2.jsonl")  # what the worker wrote last and could not send
    left.append([outbox.metrics_event(7, {"loss": 0.5})])
    assert tracker.fail(RuntimeError("rank 1 was killed"))
    runs = {run.name: run for run in records.read_runs(store, ["killed"])}
    assert {name: run.status for name, run in runs.items()} == {
        "a run": "FAILED",
        "stage1": "FINISHED",
        "stage2": "FAILED",
    }
    assert runs["a run"].tags["error"] == runs["stage2"].tags["error"] == "RuntimeError: rank 1 was killed"
    assert runs["stage2"].metrics == {"loss": 0.5} and "error" not in runs["stage1"].tags

    again = schedule(store, "killed", tmp_path, tracker.ids)
    again.open_segment("stage2")
    logger = MetricLogger(again.ids, "stage2", tmp_path / "spool")
    assert logger.fail("ValueError: the cause")
    assert again.fail(RuntimeError("the workers ended"))
    runs = {run.name: run for run in records.read_runs(store, ["killed"])}
    assert runs["stage2"].tags["error"] == "ValueError: the cause"  # what the worker said itself is kept


def test_a_stage_that_other_workers_were_to_go_on_with_has_the_schedules_end(store: str, tmp_path: Path) -> None:
    """As one that went back to a checkpoint: whether it diverged, or was stopped, only the driver knows."""
    for number, (end, state) in enumerate([("fail", "FAILED"), ("finish", "KILLED")]):
        tracker = schedule(store, f"left-{number}", tmp_path / end)
        tracker.open_segment("stage1")
        assert MetricLogger(tracker.ids, "stage1", tmp_path / end / "spool").close()
        assert tracker.fail("it diverged") if end == "fail" else tracker.finish("KILLED")
        assert {run.status for run in records.read_runs(store, [f"left-{number}"])} == {state}


@pytest.mark.parametrize("late", [False, True])
def test_the_schedules_run_has_each_steps_curve_once_whenever_it_is_sent(
    late: bool, store: str, tmp_path: Path, refused: str
) -> None:
    """Also where the workers are started again, the spools come in another order, or the run was deleted."""
    ids = RunIds(refused if late else store, f"curve-{late}", "a run")
    for segment, offset, start, last, reached in (("s1", 0, 0, 6, 0), ("s2", 6, 0, 8, 0), ("s2", 6, 5, 10, 9)):
        logger = MetricLogger(ids, segment, tmp_path / "spool", start, reached=reached)
        for step in range(start + 1, last + 1):
            logger.log(step, {"learning_rate": step}, (offset + step, {"learning_rate": step}))
        assert logger.close() is not late
    Tracker(ids, tmp_path / "spool", timeout=5).log({"learning_rate": 99.0}, 3, "s2", last=True)
    ids = move(ids, store)
    for segment in ("s2", "s1"):
        assert tracking._Sender(ids, tmp_path / "spool", segment).drain()

    def curve() -> list[tuple[int, float]]:
        return records.read_history(store, ids.parent or "", "learning_rate")

    whole = [(step, float(step)) for step in range(1, 7)] + [(6 + step, float(step)) for step in range(1, 11)]
    assert curve() == whole
    s2 = next(run for run in records.read_runs(store, [ids.experiment]) if run.name == "s2")
    assert (s2.metrics["learning_rate"], s2.steps["learning_rate"]) == (99.0, 10)
    # step 9 was begun and not logged
    assert s2.tags["resumed.5"].startswith("steps 6 to 9 are computed again")

    tracking.connect(store).delete_run(ids.parent or "")
    assert flush_spool(ids, tmp_path / "spool") == 0
    for segment in ("s1", "s2"):
        Tracker(ids, tmp_path / "spool").tag({"again": 1}, segment)
    assert curve() == whole


@pytest.mark.parametrize("server", ["refused", "black_hole"])
def test_a_dead_server_never_delays_and_gets_everything_later(
    server: str, store: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    uri = request.getfixturevalue(server)
    began = time.monotonic()
    tracker = open_schedule(uri, f"dead-{server}", "a run", {"seed": 1}, {}, tmp_path / "spool", timeout=1.0)
    assert time.monotonic() - began < 1.5
    assert tracker.ids.parent is None
    logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool", send_every=0.01)
    time.sleep(0.1)  # the sender is now stuck in the server
    began = time.monotonic()
    log_steps(logger, range(1, 201))
    assert time.monotonic() - began < 0.5
    began = time.monotonic()
    assert not logger.fail("disk full", timeout=0.5)
    assert time.monotonic() - began < 1.0

    ids = move(tracker.ids, store)
    assert flush_spool(ids, tmp_path / "spool") == 0
    parent, child = records.read_runs(store, [f"dead-{server}"])
    assert (parent.id, child.id) == (ids.parent, ids.segments["stage1"])
    assert (parent.params, parent.status, child.tags["error"]) == ({"seed": "1"}, "FAILED", "disk full")
    assert steps_of(store, child.id) == list(range(1, 201))
    assert flush_spool(ids, tmp_path / "spool") == 0  # nothing is sent twice
    assert steps_of(store, child.id) == list(range(1, 201))
    warnings = [record.message for record in caplog.records if "does not answer" in record.message]
    # one a sender, not one a try: of both runs, and of what sends the left-overs of each at the start
    assert 1 <= len(warnings) <= 4


def test_events_survive_a_sigkill_while_the_server_hangs(store: str, tmp_path: Path, black_hole: str) -> None:
    tracker = Tracker(RunIds(black_hole, "killed", "a run"), tmp_path / "spool")
    code = f"""
import json, os, signal, time
from domainshuttle.platform.tracking.mlflow import MetricLogger, RunIds
logger = MetricLogger(RunIds(**json.loads({json.dumps(tracker.ids.to_dict())!r})), "stage1", {str(tmp_path / "spool")!r}, send_every=0.01)
for step in range(1, 51):
    logger.log(step, {{"loss": 1.0 * step}})
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with (tmp_path / "spool" / "segment-stage1.jsonl").open("ab") as file:
        file.write(b'{"kind": "metrics", "step": 51, "val')  # and a line torn by the kill
    ids = move(tracker.ids, store)
    logger = MetricLogger(ids, "stage1", tmp_path / "spool", start_step=45)
    log_steps(logger, range(46, 61))
    assert logger.close(20)
    assert steps_of(store, ids.segments["stage1"]) == list(range(1, 61))


def test_an_answer_that_is_lost_doubles_nothing(store: str, tmp_path: Path) -> None:
    tracker = Tracker(RunIds(store, "answers", "a run"), tmp_path / "spool")
    assert tracker.open_segment("stage1")
    logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool", send_every=0.05)
    send = logger._sender.client.log_batch
    lost = []

    def log_batch(*arguments: object, **named: object) -> None:
        send(*arguments, **named)
        if len(lost) < 2:
            lost.append(arguments)
            raise ConnectionResetError("the store has taken it, but its answer is lost")

    logger._sender.client.log_batch = log_batch
    log_steps(logger, range(1, 101))
    assert logger.close(20)
    assert len(lost) == 2
    run = tracker.ids.segments["stage1"]
    assert steps_of(store, run) == list(range(1, 101))
    assert Counter(steps_of(store, run, "loss/flow")).most_common(1)[0][1] == 1


def test_a_lost_spool_is_no_reason_to_send_points_again(store: str, tmp_path: Path) -> None:
    tracker = schedule(store, "other-node", tmp_path)
    for folder, steps in (("node1", range(1, 21)), ("node2", range(11, 31))):
        logger = MetricLogger(tracker.ids, "stage1", tmp_path / folder)
        log_steps(logger, steps)
        assert logger.close()
    assert steps_of(store, tracker.ids.segments["stage1"]) == list(range(1, 31))


def test_a_deleted_run_is_continued_by_a_new_one_with_the_whole_history(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = schedule(store, "deleted", tmp_path, seed=1)
    logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool", send_every=0.05)
    log_steps(logger, range(1, 11))
    deadline = time.monotonic() + 10
    while "stage1" not in tracker.ids.segments and time.monotonic() < deadline:
        time.sleep(0.05)
    old_parent, old_child = tracker.ids.parent, tracker.ids.segments["stage1"]
    client = tracking.connect(store)
    client.delete_run(old_child)  # while the worker logs
    client.delete_run(old_parent)
    log_steps(logger, range(11, 21))
    assert logger.finish()

    again = schedule(store, "deleted", tmp_path, RunIds.from_dict(tracker.ids.to_dict()), seed=1)
    parent, child = records.read_runs(store, ["deleted"])
    assert {parent.id, child.id}.isdisjoint({old_parent, old_child})
    assert (parent.tags["continues"], child.tags["continues"]) == (old_parent, old_child)
    assert child.parent == parent.id == again.ids.parent
    assert parent.params == {"seed": "1"} and child.status == "FINISHED"
    assert steps_of(store, child.id) == list(range(1, 21))
    assert f"the run {old_child} is gone, {child.id} continues it" in caplog.text

    # ids of a checkpoint older than the deletion lead to the new runs, not to third ones
    stale = RunIds.from_dict({**again.ids.to_dict(), "parent": old_parent, "segments": {"stage1": old_child}})
    assert schedule(store, "deleted", tmp_path, stale, seed=1).ids.parent == parent.id
    assert len(records.read_runs(store, ["deleted"])) == 2


def test_a_deleted_experiment_is_restored(store: str, tmp_path: Path) -> None:
    first = schedule(store, "gone", tmp_path)
    client = tracking.connect(store)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    assert schedule(store, "gone", tmp_path, first.ids).ids.parent == first.ids.parent
    assert [run.id for run in records.read_runs(store, ["gone"])] == [first.ids.parent]


def test_driver_and_worker_never_create_a_run_twice(store: str, tmp_path: Path) -> None:
    ids = RunIds(store, "race", "a run")
    names = ["stage1", "stage2"] * 3
    threads = [
        threading.Thread(target=Tracker(move(ids, store), tmp_path / "spool").open_segment, args=(name,))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flush_spool(ids, tmp_path / "spool") == 0
    runs = records.read_runs(store, ["race"])
    assert sorted(run.name for run in runs) == ["a run", "stage1", "stage2"]
    assert {run.parent for run in runs if run.parent} == {run.id for run in runs if run.name == "a run"}


def test_gpus_are_among_the_system_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml(ModuleType):
        """The few calls of the real library that are used, as if there were two GPUs."""

        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetCount = staticmethod(lambda: 2)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
        nvmlDeviceGetMemoryInfo = staticmethod(lambda gpu: SimpleNamespace(used=20 * gpu, total=80))
        nvmlDeviceGetUtilizationRates = staticmethod(lambda gpu: SimpleNamespace(gpu=97 + gpu))

    without = outbox.system_metrics()
    assert without["system/process_memory_gigabytes"] > 0.01
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    gpus = {key: value for key, value in outbox.system_metrics().items() if key not in without}
    assert gpus == {
        "system/gpu_0_utilization_percentage": 97,
        "system/gpu_0_memory_usage_percentage": 0,
        "system/gpu_1_utilization_percentage": 98,
        "system/gpu_1_memory_usage_percentage": 25,
    }


def test_odd_values_do_not_block_what_follows(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = schedule(store, "odd", tmp_path)
    logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool")
    logger.artifact(tmp_path / "never written.png")
    logger.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "loss/by source: α, β!": 1.0})
    logger._writer.put({"kind": "metrics", "time": 1, "step": 2, "values": {"bad\nname": 1.0, "loss": 2.0}})
    logger.log(3, {"loss": 3.0})
    for damaged in ({}, {"kind": "tags"}, {"kind": "metrics", "time": 1, "step": "x", "values": {"loss": 1}}):
        logger._writer.put(damaged)
    logger.log(4, {"loss": 4.0})
    with pytest.raises(TypeError):
        logger.log(4, {"loss": None})  # type: ignore[dict-item]
    assert logger.close()
    run = tracker.ids.segments["stage1"]
    assert steps_of(store, run) == [1, 2, 3, 4]
    assert steps_of(store, run, "grad_norm") == [1]
    assert "never written.png" in caplog.text and "skipped" in caplog.text


def test_secrets_reach_neither_files_nor_logs(
    store: str, refused: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    uri = refused.replace("http://", "http://anna:hunter2@")
    params = {"tracking.uri": uri, "store.password": "hunter2", "data": "s3://key:hunter2@bucket/x", "tokens": 512}
    tracker = open_schedule(uri, "secret", "a run", params, {}, tmp_path / "spool", timeout=2)
    logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool", send_every=0.01)
    logger.fail(ValueError(f"no connection to {uri}/api"), timeout=1)
    with pytest.raises(ConnectionError) as raised:
        records.read_runs(uri, ["secret"])
    (tmp_path / "ids.json").write_text(json.dumps(tracker.ids.to_dict()))
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "no connection to http://***@" in written and '"tokens": "512"' in written
    assert tracker.ids.tracking_uri == uri  # the client does have it
    assert "hunter2" not in written + caplog.text + str(raised.value) + repr(tracker.ids)


def test_sqlite_paths_do_not_move_with_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"
    with pytest.raises(LookupError, match="there is no store"):
        records.read_runs("sqlite:///absent.db", ["x"])
    assert not (tmp_path / "absent.db").exists()


def test_an_unknown_experiment_names_those_there_are(store: str, tmp_path: Path) -> None:
    schedule(store, "known", tmp_path)
    with pytest.raises(LookupError, match=r"no experiment 'knwon'.*known"):
        records.read_runs(store, ["knwon"])


def test_mlflow_is_imported_only_when_it_is_needed() -> None:
    code = (
        "import sys, domainshuttle.platform.commands.compare; "
        "sys.exit(bool({'mlflow', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Server:
    """MLflow's server in a process that can be killed and started again on the same port and store.

    `mlflow server` runs the same application behind uvicorn, but takes up to 20 s to start on two busy cores.
    """

    def __init__(self, folder: Path, store: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.store, self.uri = folder, store, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {
            "_MLFLOW_SERVER_FILE_STORE": self.store,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": f"{self.folder}/artifacts",
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        }
        command = [sys.executable, "-c", f"from mlflow.server import app; app.run(port={self.port})"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while not outbox.reachable(self.uri) and time.monotonic() < deadline:
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.mark.slow
def test_a_real_server_killed_in_the_middle_has_everything_in_the_end(store: str, tmp_path: Path) -> None:
    server = Server(tmp_path, store)
    try:
        server.start()
        picture = tmp_path / "grid.png"
        picture.write_bytes(b"not really a picture")
        tracker = open_schedule(server.uri, "served", "a run", {"seed": 1}, {}, tmp_path / "spool")
        logger = MetricLogger(tracker.ids, "stage1", tmp_path / "spool", send_every=0.1)
        log_steps(logger, range(1, 101))
        deadline = time.monotonic() + 20
        while "stage1" not in tracker.ids.segments and time.monotonic() < deadline:
            time.sleep(0.1)
        server.kill()
        began = time.monotonic()
        log_steps(logger, range(101, 301))
        assert time.monotonic() - began < 0.5
        logger.artifact(picture, "samples")
        time.sleep(0.5)
        server.start()
        assert logger.finish(timeout=40)
        assert tracker.finish()
        parent, child = records.read_runs(server.uri, ["served"])
        assert (parent.status, child.status, child.parent) == ("FINISHED", "FINISHED", parent.id)
        assert steps_of(server.uri, child.id) == list(range(1, 301))
        assert (tmp_path / "spool" / "segment-stage1.jsonl").exists()
        assert list((tmp_path / "artifacts").glob(f"**/{child.id}/**/samples/grid.png"))
    finally:
        server.kill()
