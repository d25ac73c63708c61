"""A profile of a step, and stacks, of a worker that goes on: asked for through the run's folder.

Run: python -m pytest tests/platform/training/test_profiler.py
"""

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from domainshuttle.platform.commands.look import print_profile, print_stacks
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.lock import RunLock
from domainshuttle.platform.run.requests import answer, ask, read_answer, take, withdraw
from domainshuttle.platform.run.workers import WorkerSign
from domainshuttle.platform.training.profiler import StepProfiler


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path}"]))


def test_a_question_is_taken_once_by_whom_it_is_for_and_answered_once(run: Run) -> None:
    token = ask(run, "profile", 3)
    assert take(run, "profile", 2) is None and take(run, "stacks", 3) is None
    assert take(run, "profile", 3) == token and take(run, "profile", 3) is None
    assert read_answer(run, token) is None
    answer(run, token, {"step": 1})
    assert read_answer(run, token) == {"step": 1} and read_answer(run, token) is None
    ask(run, "stacks", 0)
    withdraw(run, "stacks", 0)
    assert take(run, "stacks", 0) is None


def test_one_whole_step_is_profiled_and_no_other(run: Run) -> None:
    questions = ["token"]
    profiler = StepProfiler(run, "base", 1, lambda: questions.pop() if questions else None)
    for done in range(1, 5):
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
        if done == 2:
            torch.linalg.inv(torch.eye(4))
        profiler.between_steps(done)
    found = read_answer(run, "token")
    assert found is not None and (found["step"], found["segment"]) == (2, "base")
    events = json.loads(gzip.decompress(Path(found["trace"]).read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("aten::mm") == 1 and any("inv" in str(name) for name in names)
    assert "aten::mm" in Path(found["table"]).read_text()


def test_what_goes_wrong_is_the_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.folder / "profiles").write_text("in the way")
    questions = ["first", "second"]
    profiler = StepProfiler(run, "base", 1, lambda: questions.pop(0) if questions else None)
    profiler.between_steps(1)
    profiler.between_steps(2)
    found = read_answer(run, "first")
    assert found is not None and "FileExistsError" in found["error"]
    profiler.close()
    found = read_answer(run, "second")
    assert found is not None and "ended before" in found["error"]
    assert not torch._C._autograd._profiler_enabled()


def test_a_worker_shows_its_stacks_while_it_works(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no worker of demo is at work"):
        print_stacks(run.folder)
    with RunLock(run.folder), WorkerSign(run, 1, 0, 1, "node") as sign:
        sign.follow(lambda: ("base", 3, "computing"))
        answered: list[bool] = []
        asking = threading.Thread(target=lambda: answered.append(print_stacks(run.folder, 0)))
        asking.start()
        asking.join()
        with pytest.raises(ConfigError, match="ranks 0 to 0"):
            print_stacks(run.folder, 4)
        with pytest.raises(ConfigError, match="made no whole step"):
            print_profile(run.folder, 0, 0.1)
    file = run.folder / "stacks" / "attempt-0001" / "rank00000.txt"
    assert answered == [True] and "test_a_worker_shows_its_stacks_while_it_works" in file.read_text()
    assert str(os.getpid()) in (run.folder / "workers/attempt-0001/rank00000.json").read_text()


def test_a_worker_that_is_stopped_does_not_answer_and_is_said_to(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run.folder), WorkerSign(run, 1, 0, 1, "node"):
        pass
    path = run.worker_path(1, 0)
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "ended": None, "beat": time.time() - 60}))
    with RunLock(run.folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("domainshuttle.platform.commands.look.beat_seconds", lambda size: -1.5)
        assert print_stacks(run.folder) is False
