"""Faults of what a run depends on, given to whole runs: the tracking server, the disk, the store, the cluster, data.

Faults of its own processes are in test_faults.py.
Run: python -m pytest -m nightly tests/platform/driver/test_outside_faults.py
"""

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty_s3 import serve_s3
from running import (
    MlflowServer,
    balanced,
    cli,
    losses,
    poisoned,
    run_of,
    same_weights,
    skip_stage1,
    start,
    wait_for_step,
    weights,
    workers_of,
)

from domainshuttle.pipelines.storage import files as storage
from domainshuttle.platform.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.sample_audit import audit_samples, read_consumed
from domainshuttle.platform.run.workers import attempts, read_workers
from domainshuttle.platform.tracking.mlflow import connect
from domainshuttle.platform.tracking.queries import read_history, read_runs

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


# The tracking server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    yield server
    server.kill()


@contextlib.contextmanager
def paused(workers: Sequence[psutil.Process]) -> Iterator[None]:
    """These workers stand still, so that a run of seconds does not end meanwhile."""
    for worker in workers:
        worker.suspend()
    yield
    for worker in workers:
        if worker.is_running():
            worker.resume()


def all_but_rank_0(run: Run) -> list[psutil.Process]:
    """The workers that do not tell MLflow: while they stand still no step is made, and rank 0 goes on telling."""
    return [psutil.Process(worker.pid) for worker in read_workers(run, attempts(run)[-1]) if worker.rank]


def points(uri: str, experiment: str, stage: str, key: str = "loss") -> list[tuple[int, float]]:
    records = {record.name: record for record in read_runs(uri, [experiment])}
    return read_history(uri, records[stage].id, key) if stage in records else []


def wait_for_point(uri: str, experiment: str, stage: str, step: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with contextlib.suppress(LookupError, ConnectionError):
            if any(found >= step for found, _ in points(uri, experiment, stage)):
                return
        time.sleep(0.5)
    raise AssertionError(f"step {step} did not reach {uri}")


def test_a_tracking_server_that_is_away_at_the_start_in_the_middle_and_at_the_end(
    tiny: Path, unbroken: tuple[RunConfig, str], server: MlflowServer
) -> None:
    config, run, more = run_of(tiny, "comes-and-goes", f"tracking.uri={server.uri}", "stages.stage2.steps=100")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 10)  # without a server
    with paused(all_but_rank_0(run)):
        server.start()
        wait_for_point(server.uri, config.name, "stage2", 10)
        reached = run.read_progress()["step"]
        server.kill()
    wait_for_step(process, run, "stage2", reached + 10)
    with paused(all_but_rank_0(run)):
        server.start()
        wait_for_point(server.uri, config.name, "stage2", reached + 5)
        assert run.read_progress()["step"] < 100
        server.kill()
    assert process.wait(timeout=200) == 0  # its end is without a server
    balanced(config)

    server.start()
    assert "Nothing is left" in cli("flush", run.folder)
    found = read_runs(server.uri, [config.name])
    assert sorted(record.name for record in found) == ["comes-and-goes", "stage2"]
    assert {record.status for record in found} == {"FINISHED"}
    assert [step for step, _ in points(server.uri, config.name, "stage2")] == list(range(1, 101))
    # where it was away the steps took as long as where it was there
    seconds = dict(points(server.uri, config.name, "stage2", "step_seconds"))
    away = [seconds[step] for step in range(2, 10)] + [seconds[step] for step in range(reached + 2, reached + 10)]
    assert statistics.median(away) < 2 * statistics.median(seconds.values())
    assert "Nothing is left" in cli("flush", run.folder)  # and sends nothing twice
    assert [step for step, _ in points(server.uri, config.name, "stage2")] == list(range(1, 101))


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(500)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_tracking_server_that_never_answers(
    tiny: Path, unbroken: tuple[RunConfig, str], black_hole: str, tmp_path: Path, cluster_variables: dict[str, str]
) -> None:
    config, run, more = run_of(tiny, "black-hole", f"tracking.uri={black_hole}")
    skip_stage1(run, unbroken[0])
    printed = cli("train", tiny, *more, **cluster_variables)
    assert f"domainshuttle flush {run.folder}" in printed
    same_weights(config, unbroken[0])
    balanced(config)
    assert "Nothing is left" not in cli("flush", run.folder, "--timeout", 3, expect=1)
    other = f"sqlite:///{tmp_path}/mlflow.db"
    assert "Nothing is left" in cli("flush", run.folder, "--uri", other)
    assert points(other, config.name, "stage2") == losses(unbroken[0], "stage2")
    seconds, usual = (
        dict(points(uri, name, "stage2", "step_seconds"))
        for uri, name in ((other, config.name), (unbroken[0].tracking_uri, "tiny"))
    )
    assert statistics.median(seconds.values()) < 2 * statistics.median(usual.values())


def test_mlflow_runs_that_are_deleted_in_the_middle_are_continued(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "deleted")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 2)
    with paused(all_but_rank_0(run)):
        wait_for_point(config.tracking_uri, config.name, "stage2", 2)
        old = {record.name: record.id for record in read_runs(config.tracking_uri, [config.name])}
        client = connect(config.tracking_uri)
        for name in ("stage2", config.name):
            client.delete_run(old[name])
    assert run.read_progress()["step"] < 24
    assert process.wait(timeout=200) == 0
    new = {record.name: record for record in read_runs(config.tracking_uri, [config.name])}
    assert set(new) == set(old)
    assert {name: record.tags.get("continues") for name, record in new.items()} == old
    assert new["stage2"].parent == new[config.name].id
    assert {record.status for record in new.values()} == {"FINISHED"}
    assert losses(config, "stage2") == losses(unbroken[0], "stage2")
    same_weights(config, unbroken[0])


# The disk and the store


def limit_files(process: subprocess.Popen[bytes], size: int) -> None:
    """From now on no file of the workers may grow beyond `size`: what a full disk looks like to them."""
    for worker in workers_of(process):
        worker.rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))


def wait_for_checkpoint(process: subprocess.Popen[bytes], config: RunConfig) -> None:
    while CheckpointStore.of(config).newest("stage2") is None:
        assert process.poll() is None
        time.sleep(0.05)


def whole_steps(config: RunConfig) -> list[int]:
    """The steps of stage 2 of which there is a whole checkpoint."""
    found = [found for _, found in CheckpointStore.of(config).list(checksums=True) if isinstance(found, Checkpoint)]
    return [checkpoint.state.step for checkpoint in found if checkpoint.state.segment == "stage2"]


def test_checkpoints_that_cannot_be_written_leave_the_old_one_and_are_made_up_for(
    tiny: Path, unbroken: tuple[RunConfig, str]
) -> None:
    config, run, more = run_of(tiny, "no-room", "checkpoint.keep=50", "checkpoint.max_failed=20")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_checkpoint(process, config)
    limit_files(process, 50_000)  # a rank's shard has 82 kB
    before, since = whole_steps(config), run.read_progress()["step"]
    wait_for_step(process, run, "stage2", since + 10)
    assert whole_steps(config)[:1] == before[:1]
    limit_files(process, psutil.RLIM_INFINITY)
    assert process.wait(timeout=300) == 0
    same_weights(config, unbroken[0])
    balanced(config)
    steps = set(whole_steps(config))
    assert {*before, 24} <= steps
    assert not steps & {step for step in range(since + 1, since + 8) if step % 3 == 0}
    assert losses(config, "stage2") == losses(unbroken[0], "stage2")
    assert points(config.tracking_uri, config.name, "stage2", "failed_checkpoints")[-1][1] >= 2
    assert Ledger(run.ledger_path).summary().attempts == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_with_its_reason_and_it_goes_on_when_there_is_room(
    tiny: Path, unbroken: tuple[RunConfig, str], small_disk: Path
) -> None:
    config, run, more = run_of(tiny, "full", f"checkpoint.store={small_disk}", "checkpoint.max_failed=2")
    skip_stage1(run, unbroken[0])
    filler = small_disk / "filler"
    process = start(tiny, *more, log=run.folder / "printed")
    wait_for_checkpoint(process, config)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    before = whole_steps(config)
    assert process.wait(timeout=200) == 2
    printed = " ".join((run.folder / "printed").read_text().split())
    assert "2 checkpoints in a row could not be written" in printed
    assert "free some" in printed
    assert "Traceback" not in printed
    assert whole_steps(config) == before
    assert Ledger(run.ledger_path).summary().attempts == 1, "workers that start again would find the disk as full"
    filler.unlink()
    cli("train", tiny, *more)
    same_weights(config, unbroken[0])
    balanced(config)
    assert losses(config, "stage2") == losses(unbroken[0], "stage2")


class Weather:
    """Faults of a proxy at random: of each request that is asked about, one in `every` meets one."""

    def __init__(self, every: int) -> None:
        self.every, self.dice, self.given = every, random.Random(7), 0

    def popleft(self) -> Any:
        if self.dice.randrange(self.every):
            return None
        self.given += 1
        return self.dice.choice([(503, "SlowDown"), (500, "InternalError"), "reset", 0.5])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A real S3 server behind the proxy that can fail."""
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with serve_s3() as proxy:
        yield proxy


def test_data_and_checkpoints_in_a_store_that_often_fails(
    tiny: Path, unbroken: tuple[RunConfig, str], bucket: Any
) -> None:
    whole, _ = unbroken
    for corpus in ("pictures", "clips"):
        folder = Path(whole.corpus(corpus, "encoded").folder)
        for path in folder.rglob("*"):
            if path.is_file():
                storage.write_file(path, bucket.uri(f"data/{corpus}/encoded/{path.relative_to(folder)}"))
    bucket.forget()
    weather = Weather(every=5)
    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        bucket.faults[method] = weather
    config, run, more = run_of(
        tiny, "bucket", f"data={bucket.uri('data')}", f"checkpoint.store={bucket.uri('runs')}",
        f"checkpoint.scratch={tiny.parent}/scratch",
    )  # fmt: skip
    skip_stage1(run, whole)
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 7)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 3
    stopped = CheckpointStore.of(config).newest("stage2")
    assert stopped is not None and 7 <= stopped.state.step < 24
    cli("train", tiny, *more)
    assert weather.given > 20
    same_weights(config, whole)
    balanced(config)
    assert audit_samples(config).recomputed == 0
    assert losses(config, "stage2") == losses(whole, "stage2")
    assert Ledger(run.ledger_path).summary().attempts == 2  # no fault cost a restart
    assert not list(run.folder.glob("quarantine/*.jsonl")) or not "".join(
        path.read_text() for path in run.folder.glob("quarantine/*.jsonl")
    ), "a store that fails says nothing of a sample"


# The workers, at the moments that are worst


def test_workers_killed_in_a_save_and_straight_after_a_step(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "bad-moments", "checkpoint.keep=50")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 1)
    partial = kill_in_a_save(process, run)
    first = run.read_progress()["attempt"]
    while run.read_progress()["attempt"] == first:
        assert process.poll() is None
        time.sleep(0.05)
    again = run.read_progress()["first_step"]
    assert again < partial, "the partial checkpoint was chosen"
    # straight after a step
    wait_for_step(process, run, "stage2", again + 1)
    workers_of(process)[0].kill()
    assert process.wait(timeout=300) == 0
    same_weights(config, unbroken[0])
    balanced(config)
    assert losses(config, "stage2") == losses(unbroken[0], "stage2")
    assert all(isinstance(found, Checkpoint) for _, found in CheckpointStore.of(config).list(checksums=True))


def kill_in_a_save(process: subprocess.Popen[bytes], run: Run) -> int:
    """Kills all workers while a checkpoint is being written; returns its step."""
    workers = workers_of(process)
    while process.poll() is None:
        partial = [f for f in run.checkpoints.glob("stage2-step*") if not (f / MANIFEST_NAME).exists()]
        if partial:
            for worker in workers:
                worker.suspend()
            if not (partial[0] / MANIFEST_NAME).exists():
                for worker in workers:
                    worker.kill()
                return int(partial[0].name.rsplit("step", 1)[1])
            for worker in workers:
                worker.resume()
        time.sleep(0.001)
    raise AssertionError("no save was seen before the run ended")


def test_ctrl_c_twice_ends_at_once_and_a_second_start_goes_on(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "ctrl-c-twice")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 5)
    with paused(workers_of(process)):  # so that there is no checkpoint after this step
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while not run.stop_path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    newest = CheckpointStore(run.checkpoints).newest("stage2")
    assert newest is not None and newest.state.step >= 3
    assert "goes on after step" in cli("train", tiny, *more)
    same_weights(config, unbroken[0])
    balanced(config)
    assert losses(config, "stage2") == losses(unbroken[0], "stage2")


# The cluster


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A Ray cluster on this machine: a head without workers, to which nodes with room for one worker are added."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def test_a_node_that_is_added_later_is_used(tiny: Path, unbroken: tuple[RunConfig, str], nodes: Any) -> None:
    nodes.add_node(num_cpus=2)
    config, run, more = run_of(
        tiny, "grown", "cluster.workers=[1, 2]", "cluster.cpus_per_worker=2", "cluster.resize_seconds=5",
        "stages.stage2.steps=120",
    )  # fmt: skip
    skip_stage1(run, unbroken[0])
    mode = {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]} if "RAY_AUTH_MODE" in os.environ else {}
    process = start(tiny, *more, RAY_ADDRESS=nodes.address, **mode)
    wait_for_step(process, run, "stage2", 5)
    nodes.add_node(num_cpus=2)
    assert process.wait(timeout=400) == 0
    balanced(config)
    consumed, _ = read_consumed(run, "stage2")
    ranks = {step: {r for s, _, r in consumed if s == step} for step in (0, 119)}
    assert ranks == {0: {0}, 119: {0, 1}}


# The data


def test_a_finite_spike_is_dropped_and_named(
    tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str]
) -> None:
    config, run, more = run_of(tiny, "spike", "stages.stage2.steps=12", "guard.window=4")
    skip_stage1(run, unbroken[0])
    with poisoned(config, 300.0) as sample:
        assert "Finished after" in cli("train", tiny, *more, **cluster_variables)
    lines = [json.loads(t) for p in run.dropped_path("stage2", 0).parent.glob("stage2*") for t in p.open()]
    spikes = {line["step"] for line in lines}
    assert {line["reason"] for line in lines} == {"spike"}
    assert all(line["loss"] > 100 for line in lines)
    # every step with the sample, once there were enough to say what is usual
    consumed, _ = read_consumed(run, "stage2")
    assert spikes == {step for (step, _, _), part in consumed.items() if sample in part.samples and step >= 4}
    assert len(spikes) >= 2
    assert sample in {name for line in lines for name in line["samples"]}
    assert points(config.tracking_uri, config.name, "stage2", "dropped_steps")[-1][1] == len(spikes)
    assert "of stage2 were dropped for their loss" in cli("status", run.folder)
    balanced(config)


def test_live_encoding_trains_the_same_weights(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, _, more = run_of(tiny, "live", "encoders.live={actors: 1, cpus: 0.5}")
    assert "Finished after" in cli("train", tiny, *more)
    for stage in ("stage1", "stage2"):
        same_weights(config, unbroken[0], stage)
        assert losses(config, stage) == losses(unbroken[0], stage)
    balanced(config)


# Two experts


def test_two_experts_are_segments_of_one_schedule(
    tiny: Path, tmp_path: Path, cluster_variables: dict[str, str]
) -> None:
    experts = "experts=[{name: high, low: 0.875}, {name: low, high: 0.875}]"
    config, run, more = run_of(tiny, "experts", experts, "stages.stage1.steps=2", "stages.stage2.steps=3")
    names = ["stage1-high", "stage1-low", "stage2-high", "stage2-low"]
    assert "train that one first" in cli("train", tiny, *more, "--stage", "stage2-low", expect=2, **cluster_variables)
    printed = cli("train", tiny, *more, "--stage", "stage1-low", **cluster_variables)
    assert "stage1-high, stage2-high, stage2-low" in printed
    alone = weights(config, "stage1-low")
    printed = cli("train", tiny, *more, **cluster_variables)
    assert "Stage stage1-low is finished" in printed
    assert [segment.name for segment in run.segments() if segment.finished] == names
    assert all((weights(config, "stage1-low")[name] == array).all() for name, array in alone.items())
    balanced(config)

    records = read_runs(config.tracking_uri, [config.name])
    parents = [record for record in records if record.parent is None]
    assert [record.name for record in parents] == ["experts"]
    assert sorted(record.name for record in records if record.parent == parents[0].id) == names
    assert {record.status for record in records} == {"FINISHED"}
    times = {
        name: {key for key in next(r for r in records if r.name == name).metrics if key.startswith("loss/flow/t_")}
        for name in names
    }
    assert times["stage2-high"] == {"loss/flow/t_0.75-1.00"}
    # each begins with its own expert's weights of the stage before, and leaves what it does not train
    for expert, other in (("high", "low"), ("low", "high")):
        before, after = weights(config, f"stage1-{expert}"), weights(config, f"stage2-{expert}")
        theirs = weights(config, f"stage1-{other}")
        frozen = "blocks.0.ffn.net.0.proj.weight"
        assert abs(after[frozen] - before[frozen]).max() <= 2**-8 * abs(before[frozen]).max()  # it went through bf16
        assert abs(after[frozen] - theirs[frozen]).max() > 2**-6 * abs(before[frozen]).max()

    exported = tmp_path / "exported"
    assert "Exported stage2" in cli("export", run.folder, exported)
    index = json.loads((exported / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875
    assert (exported / "transformer").is_dir() and (exported / "transformer_2").is_dir()
    assert "Exported stage1" in cli("export", run.folder, tmp_path / "first", "--stage", "stage1")
    size = ("--height", "32", "--width", "32", "--frames", "5", "--steps", "3", "--guidance", "2")
    printed = cli("generate", exported, "--prompt", "a star", "--out", tmp_path / "clips", *size)
    assert "Wrote 1 clip " in printed
