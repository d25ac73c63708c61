"""What the driver tells Prometheus of a run: python -m pytest tests/platform/driver/test_run_metrics.py"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.cluster.monitoring.metrics import METRICS
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver import run_metrics
from domainshuttle.platform.driver.driver import track_hours
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger

Sets = dict[tuple[str, ...], float]


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> Sets:
    """The newest value by name and tags."""
    found: Sets = {}

    class Recorder:
        def __init__(self, **tags: str) -> None:
            self.tags = tags

        def set(self, values: Mapping[str, float | None], **tags: str) -> None:
            known = {**self.tags, **tags}
            for name, value in values.items():
                if value is not None:
                    found[(name, *(known[key] for key in ("run", *METRICS[name].tags)))] = value

    monkeypatch.setattr(run_metrics, "RunMetrics", Recorder)
    return found


def test_scores_are_metrics_by_segment_and_metric_the_newest_of_each(gauges: Sets, tmp_path: Path) -> None:
    now = [1e9]
    run = Run.open(load_config("demo", [f"output={tmp_path}"]))
    metrics = run_metrics.DriverMetrics(run, lambda: now[0])

    def look() -> dict[tuple[str, ...], Any]:
        now[0] += 60
        metrics.update()
        return {key[1:]: value for key, value in gauges.items() if key[0] == "evaluation_score"}

    assert look() == {}
    run.note_scores("stage1", 10, {"samples/DINO-I": 0.5, "samples/DINO-I_low": 0.4, "samples/DINO-I_cases": 8.0})
    assert look() == {("demo", "stage1", "samples/DINO-I"): 0.5}
    run.note_scores("stage1", 20, {"samples/DINO-I": 0.6})
    run.note_scores("stage2", 20, {"evaluation/DINO-I": 0.7, "evaluation/in_domain/AES": 5.5})
    expected = {
        ("demo", "stage1", "samples/DINO-I"): 0.6,
        ("demo", "stage2", "evaluation/DINO-I"): 0.7,
        ("demo", "stage2", "evaluation/in_domain/AES"): 5.5,
    }
    assert look() == expected
    gauges.clear()
    metrics = run_metrics.DriverMetrics(run, lambda: now[0])  # a driver that resumes tells them again
    assert look() == expected


def test_the_hours_of_stages_and_schedule_in_mlflow_are_the_ledgers_and_add_up(tmp_path: Path) -> None:
    """Also those between a stage's last logged step and its end, when the next stage is long at work."""
    run, now = Run.open(load_config("demo", [f"output={tmp_path}"])), [1e9]
    for segment, seconds in (("base", 100.0), ("base", 50.0), ("stage1", 30.0)):
        attempt = Ledger(run.ledger_path, lambda: now[0]).start(2, segment, 0)
        attempt.add("productive", seconds)
        now[0] += seconds
        attempt.progress(7)
        attempt.end("stopped")
    told: dict[str | None, tuple[float, int | None]] = {}

    class Tracker:
        def log(
            self, metrics: Mapping[str, float], step: int | None, segment: str | None = None, last: bool = False
        ) -> None:
            assert last
            told[segment] = metrics["gpu_hours/used"], step

        def artifact(self, path: Path) -> None:
            assert path == run.ledger_path

    summary = track_hours(run, Tracker())  # type: ignore[arg-type]
    assert {segment: step for segment, (_, step) in told.items()} == {
        "base": 7,
        "stage1": 7,
        None: run.step_in_schedule(run.segment("stage1"), 7),
    }
    assert told["base"][0] == pytest.approx(300 / 3600, rel=0.02) and told["stage1"][0] == pytest.approx(
        60 / 3600, rel=0.02
    )
    assert told[None][0] == summary.used == pytest.approx(told["base"][0] + told["stage1"][0])
