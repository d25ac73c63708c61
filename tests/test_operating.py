"""The operator's night of docs/operating.md: its commands as they stand, and that status, MLflow and codes agree.

Run: python -m pytest -m nightly tests/test_operating.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from operating_night import DOCS, steps_of

NIGHT = Path(__file__).parent / "operating_night.py"
SPACES = ["unshare", "-rnpf", "--mount-proc"]
FIRST = ["bash", "-c", '"$@"; exit $?', "first"]
"""The first process of a space must take what orphans leave: `ray job stop` waits until a job's command is gone."""


def night(folder: Path) -> dict[str, object]:
    """The run of the page."""
    content = yaml.safe_load(TINY.format(folder=folder))
    content["stages"][1]["steps"] = 400
    return content | {
        "name": "night", "output": "runs", "data": "data",
        "sampling": {"every": 20, "cases": 3, "cpus": 0.5, "timeout": 15},
        "guard": {"hang_seconds": 40, "spike_factor": 1.5, "rollback_after": 2, "most_rollbacks": 1},
        "checkpoint": {"every": 20, "keep": 3},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5, "max_failures": 3},
        "tracking": {"experiment": "night", "every": 2, "uri": "http://127.0.0.1:5000", "hooks": [
            {"command": ["sh", "-c", "jq -r '.event + \": \" + .text' >> " + str(folder / "pager.txt")]}]},
    }  # fmt: skip


def test_the_page_has_commands_with_what_they_wait_for_and_their_codes() -> None:
    steps = steps_of(DOCS.read_text())
    assert len(steps) > 20 and {code for _, _, code in steps} == {0, 1, 2}
    assert ("attempt 2", "domainshuttle status runs/night | head -7", 0) in steps


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_night_goes_as_the_page_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    if subprocess.run([*SPACES, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine gives no namespaces")
    folder = tmp_path_factory.mktemp("n")
    (folder / "night.yaml").write_text(yaml.safe_dump(night(folder), sort_keys=False))
    command = [*SPACES, *FIRST, sys.executable, str(NIGHT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [line for line in lines if line["code"] != line["expected"] or line["late"]]
    assert not wrong, json.dumps(wrong, indent=1)
    apart = [line for line in lines for run in ("night", "wild") if not line.get(run, {"agree": True}).get("agree")]
    assert not apart, json.dumps(apart, indent=1)
    stopped = next(line["text"] for line in lines if "tail -4 job.log" in line["command"])
    assert "Exit code 3: stopped" in stopped and stopped.endswith("code 3"), stopped
    told = (folder / "pager.txt").read_text()
    assert "hung: night: " in told and "restarted: night: " in told and "diverged: wild: " in told
