"""What tests of whole runs share: the commands of a user, and looks at what a run left."""

import contextlib
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
from safetensors.numpy import load_file

from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.shards.tensors import tensor_views
from domainshuttle.platform.cli import main
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.console import console, errors
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.sample_audit import audit_samples
from domainshuttle.platform.tracking.outbox import reachable
from domainshuttle.platform.tracking.queries import read_history, read_runs

CLI = [sys.executable, "-m", "domainshuttle.platform.cli"]


def environment(**more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean | {"OMP_NUM_THREADS": "1", "PATH": path, "COLUMNS": "160"} | more


def cli(*arguments: object, expect: int = 0, **env: str) -> str:
    run = subprocess.run(
        [*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=600, env=environment(**env), check=False
    )
    assert run.returncode == expect, f"{arguments}: {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout + run.stderr


def in_process(*arguments: object, expect: int = 0) -> str:
    """As `cli`, but here, where the imports are done: for verbs that connect to no cluster."""
    output = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", ["domainshuttle", *map(str, arguments)]),
        mock.patch.object(console, "_width", 160),
        mock.patch.object(errors, "_width", 160),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    printed = output.getvalue()
    assert code == expect, f"{arguments}: {code}\n{printed[-3000:]}"
    return printed


def weights(config: RunConfig, stage: str) -> dict[str, np.ndarray]:
    return load_file(Run(config).segment(stage).weights / "diffusion_pytorch_model.safetensors")


def losses(config: RunConfig, stage: str) -> list[tuple[int, float]]:
    records = {record.name: record for record in read_runs(config.tracking_uri, [config.tracking.experiment])}
    return read_history(config.tracking_uri, records[stage].id, "loss")


def wait_for_step(process: subprocess.Popen[bytes], run: Run, stage: str, step: int) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        state = run.read_progress()
        if state and state["segment"] == stage and state["step"] >= step and state["state"] == "training":
            return
        time.sleep(0.05)
    raise AssertionError(f"stage {stage} did not reach step {step}; the driver's code is {process.poll()}")


STARTED: list[subprocess.Popen[bytes]] = []
"""Drivers of the test that runs; what a failed one leaves of them is ended after it (conftest.py)."""


def start(config: Path, *arguments: str, log: Path | None = None, **env: str) -> subprocess.Popen[bytes]:
    """A driver in the background; what it prints goes to `log` where that is given."""
    with contextlib.ExitStack() as files:
        out = files.enter_context(log.open("w")) if log else None
        command = [*CLI, "train", str(config), *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment(**env))
    STARTED.append(process)
    return process


def submit_job(address: str, env: dict[str, str], log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`ray job submit`, which follows the job; again while the dashboard answers and its agent is not up yet."""
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--address", address, *arguments]
    deadline = time.monotonic() + 60
    while True:
        with log.open("w") as out:
            job = subprocess.Popen(command, stdout=out, stderr=out, env=env | {"PYTHONUNBUFFERED": "1"})
        STARTED.append(job)
        while job.poll() is None and "submitted successfully" not in log.read_text():
            time.sleep(0.1)
        if not job.poll() or "No available agent" not in log.read_text() or time.monotonic() > deadline:
            return job
        time.sleep(1)


def end_started() -> None:
    """Ends what still runs of the drivers, with all that they started."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()


def processes_of(process: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """The processes of a driver's own cluster whose titles have a name."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone, or a zombie
            if name in child.name() or name in " ".join(child.cmdline()):
                found.append(child)
    return found


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Ray Train workers that a driver's own cluster runs."""
    return processes_of(process, "RayTrainWorker")


def run_of(tiny: Path, name: str, *more: str) -> tuple[RunConfig, Run, list[str]]:
    """A run of the tiny configuration under another name, and the arguments that make it so."""
    overrides = [f"name={name}", f"tracking.experiment={name}", "cluster.max_failures=3", *more]
    config = load_config(str(tiny), overrides)
    return config, Run(config), [part for override in overrides for part in ("--set", override)]


def skip_stage1(run: Run, whole: RunConfig) -> None:
    """Gives a run the finished first stage of another, for a test of the second."""
    for part in ("weights", "consumed"):
        shutil.copytree(Run(whole).folder / part, run.folder / part, ignore=shutil.ignore_patterns("stage2*"))


def balanced(config: RunConfig) -> None:
    books = audit_samples(config)
    assert (books.lost, books.repeated) == (0, 0)
    assert books.trained + books.skipped == books.planned


def same_weights(ours: RunConfig, theirs: RunConfig, stage: str = "stage2") -> None:
    left, right = weights(ours, stage), weights(theirs, stage)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@contextlib.contextmanager
def poisoned(config: RunConfig, value: float) -> Iterator[str]:
    """One clip whose latents all have a value for the block: finite, so that the loader takes them. Yields its name."""
    as_bfloat16 = struct.pack("<f", value)[2:]

    def all_alike(member: bytes) -> bytes:
        body = bytes(tensor_views(memoryview(member))["target"].buffer)
        return member.replace(body, as_bfloat16 * (len(body) // 2), 1)

    with _changed(config, all_alike) as name:
        yield name


@contextlib.contextmanager
def unreadable(config: RunConfig) -> Iterator[str]:
    """One clip that no loader can read for the block. Yields its name."""
    with _changed(config, lambda member: b"\xff" * len(member)) as name:
        yield name


@contextlib.contextmanager
def _changed(config: RunConfig, change: Callable[[bytes], bytes]) -> Iterator[str]:
    index = Index.load(config.corpus("clips", "encoded").folder + "/" + INDEX_NAME)
    row = index.row(5)
    member = next(member for member in row.members if member.extension == "safetensors")
    shard = Path(row.folder) / row.shard
    whole = shard.read_bytes()
    end = member.offset + member.size
    shard.write_bytes(whole[: member.offset] + change(whole[member.offset : end]) + whole[end:])
    try:
        yield f"{row.source}/{row.key}"
    finally:
        shard.write_bytes(whole)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """`mlflow server` on a port of its own, which can be taken away and brought back; its sqlite store stays."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment(MLFLOW_DISABLE_TELEMETRY="true"),
            )
        deadline = time.monotonic() + 300
        while not reachable(self.uri):
            assert time.monotonic() < deadline and self.process.poll() is None, self.folder / "server.log"
            time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        """To the server and all its processes."""
        assert self.process
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None
