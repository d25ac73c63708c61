"""Submission to a real cluster with a token: this tree is shipped, a second submit is refused, a stopped run goes on.

Run: python -m pytest tests/platform/driver/test_submission.py -m nightly
"""

import json
import subprocess
import time
from pathlib import Path

import pytest
from running import CLI, run_of

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


def test_a_run_is_submitted_once_stopped_and_goes_on(tiny: Path, users_cluster: tuple[str, dict[str, str]]) -> None:
    address, env = users_cluster
    _, run, overrides = run_of(tiny, "submitted", "stages.stage2.steps=60", "cluster.cpus_per_worker=0.25")

    def domainshuttle(*arguments: str, expect: int = 0) -> str:
        command = [*CLI, *arguments, "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
        assert done.returncode == expect, (done.returncode, done.stdout[-4000:], done.stderr[-3000:])
        return done.stdout + done.stderr

    deadline = time.monotonic() + 240
    while True:  # the dashboard answers before its agent is up
        submitted = subprocess.run([*CLI, "submit", str(tiny), *overrides, "--address", address], capture_output=True,
                                   text=True, timeout=200, env=env)  # fmt: skip
        if submitted.returncode == 0 or time.monotonic() > deadline:
            break
        time.sleep(3)
    assert submitted.returncode == 0, submitted.stderr
    refused = domainshuttle("submit", str(tiny), *overrides, expect=2)
    assert "submitted-1" in refused and "already" in refused
    while not (state := run.read_progress()) or state["step"] < 3 or state["segment"] != "stage2":
        listed = json.loads(domainshuttle("jobs", "--json"))
        assert listed[0]["status"] in ("PENDING", "RUNNING"), listed
        time.sleep(2)
    subprocess.run([*CLI, "stop", str(run.folder)], env=env, check=True, timeout=300)
    stopped = domainshuttle("jobs", "--follow", "submitted-1", expect=3)
    assert "Preflight:" in stopped and "trial steps" in stopped
    whole = domainshuttle("submit", str(tiny), *overrides, "--wait", "--no-preflight")
    assert "Submitted job submitted-2" in whole and "goes on after step" in whole
    first, second = json.loads(domainshuttle("jobs", "--json"))
    assert (first["id"], first["code"], second["id"], second["code"]) == ("submitted-2", 0, "submitted-1", 3)
