"""What the driver does when an error ends its run: python -m pytest tests/platform/driver/test_end.py"""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.platform.checkpoint.store import CheckpointError
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver import driver, schedule_loop
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.lock import RunLock


def test_the_end_of_a_run_on_a_full_disk_is_told_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Books and tracking can't be written then; hooks and the command's message do not depend on them."""
    told = tmp_path / "told.json"
    hook = {"command": ["sh", "-c", f"cat > {told}"], "on": ["failed"]}
    places = [f"output={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    run = Run.open(load_config("demo", [*places, f"tracking.hooks={json.dumps([hook])}"]))
    Ledger(run.ledger_path).start(2, "base", 0)

    class Full:
        """A schedule under which the disk becomes full."""

        def __init__(self, *_: Any) -> None:
            pass

        def train(self, *_: Any) -> None:
            monkeypatch.setattr(Journal, "append", no_room)
            raise CheckpointError("stage base: 3 checkpoints in a row could not be written")

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(schedule_loop, "Schedule", Full)
    monkeypatch.setattr(driver, "open_schedule", lambda *_, **__: no_server(run))
    with RunLock(run.folder) as lock, pytest.raises(CheckpointError, match="3 checkpoints in a row"):
        driver.run_training(run, lock, False, None, "auto")
    message = json.loads(told.read_text())
    assert message["event"] == "failed" and "3 checkpoints in a row" in message["text"]
    assert run.read_end()["how"] == "failed"


def no_server(run: Run) -> driver.Tracker:
    """A tracker whose server is away: all that it is told waits in the spool."""
    return driver.Tracker(driver.RunIds("http://127.0.0.1:9", "x", "x"), run.spool, timeout=0.1)
