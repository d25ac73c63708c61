"""`domainshuttle runs` and `stop`. Run: python -m pytest tests/platform/commands/test_runs.py"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import CLI, environment, in_process

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.run.folder import Run

DRIVER = """
import sys, time
from pathlib import Path
from domainshuttle.platform.run.lock import RunLock
with RunLock(Path(sys.argv[1]), print):
    print("at work", flush=True)
    while not Path(sys.argv[1], "stop").exists():
        time.sleep(0.1)
"""


def a_run(tmp_path: Path, name: str) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path}", f"name={name}"]))


def test_runs_are_listed_the_last_heard_of_first(tmp_path: Path) -> None:
    a_run(tmp_path, "quiet")
    old, new = a_run(tmp_path, "old"), a_run(tmp_path, "new")
    for run, step, age in ((old, 57, 9000.0), (new, 9, 60.0)):
        content = {"segment": "base", "step": step, "steps": 220, "first_step": 0, "attempt": 1, "state": "stopped"}
        run.progress_path.write_text(json.dumps({**content, "time": time.time() - age, "metrics": {"loss": 0.25}}))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.yaml").write_text("name: [")
    shown = in_process("runs", tmp_path)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["new", "old", "quiet"]
    assert rows[1] == ["old", "stopped", "base", "57 of 220", "0.2500", "0.000", "100%", "2 h 30 min ago"]
    assert rows[2][1:4] == ["not begun", "base", "0 of 220"]
    assert f"Left out: {tmp_path / 'odd'}" in shown
    assert "no run in" in in_process("runs", tmp_path / "odd", expect=2)
    shutil.copytree(old.folder, tmp_path / "old copy")
    assert "│ old copy (run old) │" in in_process("runs", tmp_path)


def test_a_run_is_stopped_through_its_folder(tmp_path: Path) -> None:
    run = a_run(tmp_path, "one")
    assert "run one is not at work" in in_process("stop", run.folder, expect=2)
    command = [sys.executable, "-c", DRIVER, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "at work\n"
        stopped = subprocess.run(
            [*CLI, "stop", str(run.folder)], capture_output=True, text=True, timeout=120, env=environment(), check=False
        )
        assert stopped.returncode == 0, stopped.stderr
        assert driver.wait(60) == 0
    assert "Stopped one after no step" in stopped.stdout
    assert f"domainshuttle train {run.config_path}" in stopped.stdout


def test_a_run_that_ended_in_another_way_is_not_called_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lives = a_run(tmp_path, "one"), iter([True, True, False, False, False])
    monkeypatch.setattr("domainshuttle.platform.commands.runs.driver_lives", lambda run: next(lives))
    monkeypatch.setattr("domainshuttle.platform.commands.runs._PAUSE", 0.0)
    run.worker_path(1, 0).parent.mkdir(parents=True)
    run.note_end("diverged", ValueError("its loss is not finite"))
    assert "one ended meanwhile: diverged, because: its loss is not finite" in in_process("stop", run.folder, expect=1)


@pytest.mark.parametrize("word", ["runs", "stop", "logs", "status"])
def test_help_teaches(word: str) -> None:
    assert "OUTPUT" in in_process(word, "--help")
