"""What a tracking server missed is sent by hand: python -m pytest tests/platform/commands/test_flush.py"""

import socket
from pathlib import Path

import pytest

from domainshuttle.platform.commands.flush import flush_run
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.tracking.mlflow import MetricLogger, open_schedule
from domainshuttle.platform.tracking.queries import read_history, read_runs


def test_what_a_server_missed_is_sent_once_it_or_another_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{probe.getsockname()[1]}"
    run = Run.open(load_config("demo", [f"output={tmp_path}", f"tracking.uri={away}"]))
    assert flush_run(run.folder)  # never started
    tracker = open_schedule(away, "flushed", "a run", {"seed": 1}, {}, run.spool, timeout=1)
    run.write_ids(tracker.ids.to_dict())
    logger = MetricLogger(tracker.ids, "stage1", run.spool)
    logger.log(1, {"loss": 0.5})
    assert not logger.finish(timeout=1)
    assert not flush_run(run.folder, timeout=0.5)
    assert "Start the server" in capsys.readouterr().out

    other = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):
        assert flush_run(run.folder, other)
        assert "Nothing is left" in capsys.readouterr().out
        parent, child = read_runs(other, ["flushed"])
        assert (parent.name, child.name, child.status) == ("a run", "stage1", "FINISHED")
        assert read_history(other, child.id, "loss") == [(1, 0.5)]
    assert not flush_run(run.folder, timeout=0.5), "the run's own server has nothing yet"


def test_another_server_that_takes_nothing_does_not_have_it_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run's own server has acknowledged everything."""
    run = Run.open(load_config("demo", [f"output={tmp_path}"]))
    tracker = open_schedule(run.config.tracking_uri, "sent", "a run", {}, {}, run.spool)
    run.write_ids(tracker.ids.to_dict())
    assert tracker.finish()
    (tmp_path / "plain").write_text("no database" * 1000)
    for other in ("foo://host", f"sqlite:///{tmp_path}/plain"):
        assert not flush_run(run.folder, other, timeout=0.5)
        assert "did not take it" in capsys.readouterr().out
    (tmp_path / "moved").mkdir()
    (tmp_path / "mlflow.db").rename(tmp_path / "moved" / "mlflow.db")
    assert flush_run(run.folder, f"sqlite:///{tmp_path}/moved/mlflow.db")
    assert "Nothing is left" in capsys.readouterr().out
    assert [one.status for one in read_runs(f"sqlite:///{tmp_path}/moved/mlflow.db", ["sent"])] == ["FINISHED"]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        flush_run(tmp_path)
