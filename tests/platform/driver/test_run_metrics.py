"""What the driver tells Prometheus of a run: python -m pytest tests/platform/driver/test_run_metrics.py"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.cluster.monitoring.metrics import METRICS
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver import run_metrics
from domainshuttle.platform.run.folder import Run

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
