"""The metrics of a run that Ray's nodes export for Prometheus: their names, here alone, and how they are set.

Ray calls them `ray_NAME` and adds labels of the node and the process. As a process has another id after each restart,
queries aggregate: `max by (run)`.
"""

import atexit
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "domainshuttle_"


@dataclass(frozen=True)
class Metric:
    """A gauge of a run."""

    text: str
    tags: tuple[str, ...]
    """Beside `run`."""


_SEGMENT, _RANK, _RUN, _SCORE = ("segment",), ("segment", "rank"), (), ("segment", "metric")

METRICS: dict[str, Metric] = {
    # of rank 0, for all ranks
    "loss": Metric("Loss, mean over the samples of the last logged steps.", _SEGMENT),
    "grad_norm": Metric("Norm of the gradient, before clipping.", _SEGMENT),
    "learning_rate": Metric("Learning rate.", _SEGMENT),
    "step_seconds": Metric("Seconds of a step.", _SEGMENT),
    "mfu": Metric("Share of the devices' arithmetic that the model uses.", _SEGMENT),
    "device_tokens_per_second": Metric("Tokens a second of a device.", _SEGMENT),
    "samples_per_second": Metric("Samples a second of all devices.", _SEGMENT),
    "data_wait_fraction": Metric("Share of rank 0's time that went into waiting for data.", _SEGMENT),
    "checkpoint_stall_seconds": Metric("Seconds in which a checkpoint held the last steps up.", _SEGMENT),
    "dropped_steps": Metric("Steps of the segment whose gradients were dropped.", _SEGMENT),
    "failed_checkpoints": Metric("Checkpoints of the segment that did not become whole.", _SEGMENT),
    "checkpoint_time": Metric("When the newest checkpoint became whole, or the workers started; Unix time.", _SEGMENT),
    "checkpoint_every_steps": Metric("Steps between checkpoints.", _SEGMENT),
    # of each rank
    "rank_wait_fraction": Metric("Share of a rank's own time that went into waiting for data.", _RANK),
    "rank_matmul_flops": Metric("FLOP/s of a rank's own matrix products, without waiting for other ranks.", _RANK),
    # of the driver
    "step": Metric("Steps of the segment that are done.", _SEGMENT),
    "planned_steps": Metric("Steps of the segment that are planned.", _SEGMENT),
    "step_time": Metric("When the last logged step was done, or the driver began; Unix time.", _RUN),
    "begin_time": Metric("When the driver began; Unix time.", _RUN),
    "workers": Metric("Workers of the newest start.", _RUN),
    "restarts": Metric("Starts of the workers after the first.", _RUN),
    "gpu_hours": Metric("Device-hours used.", _RUN),
    "gpu_hours_budget": Metric("Device-hours that the run may use.", _RUN),
    "goodput": Metric("Share of the device-hours that went into steps that count.", _RUN),
    "outbox_bytes": Metric("Bytes of metrics and files that wait for MLflow.", _RUN),
    "quarantined_samples": Metric("Samples that could not be read.", _RUN),
    "evaluation_score": Metric("Newest mean of a metric of generated clips, by the name that MLflow has.", _SCORE),
}


def series(name: str) -> str:
    """What Prometheus calls a metric. Raises KeyError for one that is none."""
    assert METRICS[name]
    return f"ray_{PREFIX}{name}"


AGAIN_SECONDS = 5.0
"""Ray's nodes forget a gauge that was not set for 20 s: the newest values are set again so often."""


class RunMetrics:
    """Sets the metrics of one process of a run, until it is closed. Without a connection to Ray it does nothing."""

    def __init__(self, **tags: str) -> None:
        """`tags` are run, segment and rank, as far as the process has them."""
        self._tags = tags
        self._gauges: dict[str, Any] = {}
        self._newest: dict[tuple[str, tuple[str, ...]], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, values: Mapping[str, float | None], **tags: str) -> None:
        """Sets metrics by their names; None: the value is not known. `tags` take the place of those of the process."""
        import ray

        if not ray.is_initialized() or self._closed.is_set():
            return
        known = {**self._tags, **tags}
        with self._lock:
            for name, value in values.items():
                if value is not None:
                    self._newest[name, tuple(known[key] for key in ("run", *METRICS[name].tags))] = float(value)
            self._set_newest()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="run-metrics", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def close(self) -> None:
        """From now on nothing is set: what was is forgotten soon."""
        self._closed.set()
        atexit.unregister(self.close)
        if self._thread is not None:
            self._thread.join(AGAIN_SECONDS)

    def _keep(self) -> None:
        import ray

        while not self._closed.wait(AGAIN_SECONDS):
            with self._lock:
                if ray.is_initialized():
                    self._set_newest()

    def _set_newest(self) -> None:
        from ray.util.metrics import Gauge

        for (name, tags), value in self._newest.items():
            keys = ("run", *METRICS[name].tags)
            if name not in self._gauges:
                self._gauges[name] = Gauge(PREFIX + name, METRICS[name].text, tag_keys=keys)
            self._gauges[name].set(value, dict(zip(keys, tags, strict=True)))
