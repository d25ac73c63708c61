"""Ray's own processes die while a run trains, and the run ends with the bits of an unbroken one.

Run: python -m pytest -m nightly tests/platform/driver/test_ray_processes.py
"""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from running import balanced, cli, processes_of, run_of, same_weights, skip_stage1, start, wait_for_step

from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import FAILED

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]

ENDS_THE_GROUP = ("TrainController", "SplitCoordinator", "SynchronizationActor", "RayTrainWorker")
WHO = (
    r"Ray Train's controller died \(process \d+\)",
    r"Ray Data's coordinator died \(process \d+\)",
    r"Ray Train's barrier of the workers died \(process \d+\)",
    r"worker [01] \(process \d+ on \S+\) died",
)
BESIDE = ("_StatsActor", "Autoscaling", "PlacementGroupCleaner")
"""Those that a run does not need while it trains; some live on some versions and clusters alone."""


def kill(process: subprocess.Popen[bytes], name: str) -> bool:
    found = processes_of(process, name)
    for one in found:
        one.kill()
    return bool(found)


def test_each_of_rays_processes_may_die(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    # a rank plans its first 256 steps itself and then takes blocks of 32, some of them ahead: what hands them out must
    # have more to hand out when it is killed
    settings = ("stages.stage2.steps=700", "stages.stage2.micro_batch=4")
    whole, whole_run, more = run_of(tiny, "long", *settings)
    skip_stage1(whole_run, unbroken[0])
    cli("train", tiny, *more)
    config, run, more = run_of(tiny, "ray-dies", *settings, "cluster.max_failures=1")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more, log=(log := run.folder / "log.txt"))
    attempt = wait_for_attempt(process, run, 0, log)
    for name in ENDS_THE_GROUP:
        assert kill(process, name), f"there is no {name}: {log.read_text()}"
        attempt = wait_for_attempt(process, run, attempt, log)
    killed = [name for name in BESIDE if kill(process, name)]
    assert killed
    assert process.wait(timeout=600) == 0, log.read_text()
    same_weights(config, whole)
    balanced(config)
    text = " ".join(log.read_text().split())
    assert "Traceback" not in text
    told = [line["text"] for line in map(json.loads, run.notices_path.open()) if line["kind"] == FAILED]
    assert len(told) == len(WHO)
    for said, who in zip(told, WHO, strict=True):
        assert re.search(f"^Stage stage2: {who}: it was killed, or crashed", said), text[-4000:]
    assert "DatasetManager" not in text  # the plan is streamed by rank 0
    assert len(list((run.folder / "faults").glob("*.txt"))) == len(ENDS_THE_GROUP)


def wait_for_attempt(process: subprocess.Popen[bytes], run: Run, before: int, log: Path) -> int:
    """Until the attempt after `before` has saved a checkpoint of its own, so that faults are not in a row; which it
    is."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        state = run.read_progress()
        if state.get("state") == "training" and state["attempt"] > before:
            wait_for_step(process, run, "stage2", state["first_step"] + 5)
            return int(state["attempt"])
        time.sleep(0.1)
    raise AssertionError(f"no attempt began: {log.read_text()}")
