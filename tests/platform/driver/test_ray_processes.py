"""Ray's own processes die while a run trains, and the run ends with the bits of an unbroken one.

Run: python -m pytest -m nightly tests/platform/driver/test_ray_processes.py
"""

import subprocess
import time
from pathlib import Path

import pytest
from running import balanced, cli, processes_of, run_of, same_weights, skip_stage1, start, wait_for_step

from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]

ENDS_THE_GROUP = ("TrainController", "SplitCoordinator", "SynchronizationActor", "RayTrainWorker")
BESIDE = ("_StatsActor", "Autoscaling", "PlacementGroupCleaner")
"""Those that a run does not need while it trains; some live on some versions and clusters alone."""


def kill(process: subprocess.Popen[bytes], name: str) -> bool:
    found = processes_of(process, name)
    for one in found:
        one.kill()
    return bool(found)


def test_each_of_rays_processes_may_die(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    # the plan is handed out hundreds of steps ahead: what hands it out must still be at work when it is killed
    steps = "stages.stage2.steps=1500"
    whole, whole_run, more = run_of(tiny, "long", steps)
    skip_stage1(whole_run, unbroken[0])
    cli("train", tiny, *more)
    config, run, more = run_of(tiny, "ray-dies", steps, "cluster.max_failures=1")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more, log=(log := run.folder / "log.txt"))
    for number, name in enumerate(ENDS_THE_GROUP, 1):
        wait_for_attempt(process, run, number, log)
        assert kill(process, name), f"there is no {name}: {log.read_text()}"
    wait_for_attempt(process, run, len(ENDS_THE_GROUP) + 1, log)
    killed = [name for name in BESIDE if kill(process, name)]
    assert killed
    assert process.wait(timeout=600) == 0, log.read_text()
    same_weights(config, whole)
    balanced(config)
    text = " ".join(log.read_text().split())
    assert "Traceback" not in text
    for who in ("Ray Train's controller died", "Ray Data's coordinator died", "worker 0 died"):
        assert who in text, text[-4000:]
    assert "DatasetManager" not in text  # the plan is streamed by rank 0
    assert len(list((run.folder / "faults").glob("*.txt"))) == len(ENDS_THE_GROUP)


def wait_for_attempt(process: subprocess.Popen[bytes], run: Run, number: int, log: Path) -> None:
    """Until the nth attempt has saved a checkpoint of its own, so that faults are not in a row."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        state = run.read_progress()
        if Ledger(run.ledger_path).summary().attempts >= number and state.get("state") == "training":
            wait_for_step(process, run, "stage2", state["first_step"] + 5)
            return
        time.sleep(0.1)
    raise AssertionError(f"attempt {number} did not begin: {log.read_text()}")
