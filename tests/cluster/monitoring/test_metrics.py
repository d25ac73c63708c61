"""A run's metrics stay: Ray's nodes forget a gauge that is not set again. Run: python -m pytest
tests/cluster/monitoring/test_metrics.py"""

import time
from collections.abc import Callable

import pytest
import ray
import ray.util.metrics

from domainshuttle.cluster.monitoring import metrics
from domainshuttle.cluster.monitoring.metrics import RunMetrics

Sets = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Sets:
    found: Sets = []

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.keys
            found.append((self.name, value, tags))

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    monkeypatch.setattr(metrics, "AGAIN_SECONDS", 0.01)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_newest_values_are_set_again_until_the_metrics_are_closed(sets: Sets) -> None:
    one = RunMetrics(run="r", segment="stage1", rank="0")
    one.set({"loss": 2.0, "mfu": None, "step_time": 7.0})
    one.set({"loss": 1.0})
    one.set({"evaluation_score": 0.5}, metric="DINO-I")
    del sets[:]
    wait_for(lambda: len(sets) >= 9)
    stage = {"run": "r", "segment": "stage1"}
    assert sets[:9].count(("domainshuttle_loss", 1.0, stage)) == 3
    assert sets[:9].count(("domainshuttle_step_time", 7.0, {"run": "r"})) == 3
    assert sets[:9].count(("domainshuttle_evaluation_score", 0.5, {**stage, "metric": "DINO-I"})) == 3
    one.close()
    one.set({"loss": 3.0})
    del sets[:]
    time.sleep(0.1)
    assert not sets


def test_ray_forgets_a_gauge_later_than_it_is_set_again() -> None:
    from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

    seconds = OpenTelemetryMetricRecorder._resolve_gauge_ttl_seconds(None)
    assert seconds / 2 > metrics.AGAIN_SECONDS
