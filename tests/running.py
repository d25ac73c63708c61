"""What tests of whole runs share: the commands of a user, and looks at what a run left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file

from domainshuttle.platform.config import RunConfig
from domainshuttle.platform.records import read_history, read_runs
from domainshuttle.platform.schedule import Run

CLI = [sys.executable, "-m", "domainshuttle.platform.cli"]


def environment(**more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean | {"OMP_NUM_THREADS": "1", "PATH": path, "COLUMNS": "160"} | more


def cli(*arguments: object, expect: int = 0) -> str:
    run = subprocess.run(
        [*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment(), check=False
    )
    assert run.returncode == expect, f"{arguments}: {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout + run.stderr


def weights(config: RunConfig, stage: str) -> dict[str, np.ndarray]:
    return load_file(Run(config).segment(stage).weights / "diffusion_pytorch_model.safetensors")


def losses(config: RunConfig, stage: str) -> list[tuple[int, float]]:
    records = {record.name: record for record in read_runs(config.tracking_uri, [config.tracking.experiment])}
    return read_history(config.tracking_uri, records[stage].id, "loss")


def wait_for_step(process: subprocess.Popen[bytes], run: Run, stage: str, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        state = run.read_progress()
        if state and state["segment"] == stage and state["step"] >= step and state["state"] == "training":
            return
        time.sleep(0.05)
    raise AssertionError(f"stage {stage} did not reach step {step}")


def start(config: Path, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*CLI, "train", str(config), *arguments], start_new_session=True, env=environment(**env))


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Ray Train workers that a driver's own cluster runs."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in child.name() or "RayTrainWorker" in " ".join(child.cmdline())
    ]
