"""What the driver tells Prometheus of a run: what no worker knows, or what must be known while there is none."""

import time
from collections.abc import Callable

from domainshuttle.cluster.monitoring.metrics import RunMetrics
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.workers import attempts, read_workers

EVERY_SECONDS = 10.0


class DriverMetrics:
    """Sets the run's metrics while its driver lives; `update` may be called as often as one likes."""

    def __init__(self, run: Run, clock: Callable[[], float] = time.time) -> None:
        self._run, self._clock, self._ledger = run, clock, Ledger(run.ledger_path)
        self._began, self._next = clock(), 0.0
        self._metrics = RunMetrics(run=run.config.name)
        self._scores, self._read = Journal(run.scores_path), 0

    def close(self) -> None:
        """The run is no longer this process's."""
        self._metrics.close()

    def update(self) -> None:
        """Reads the run's folder, at most every few seconds."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + EVERY_SECONDS
        run, budget = self._run, self._run.config.budget_gpu_hours
        state, hours = run.read_progress(), self._ledger.summary(budget)
        stepped = state.get("time", 0.0) if state.get("step", 0) > state.get("first_step", 0) else 0.0
        started = attempts(run)
        self._metrics.set(
            {
                "begin_time": self._began,
                "step_time": max(self._began, stepped),
                "restarts": max(len(started) - 1, 0),
                "workers": len(read_workers(run, max(started))) if started else 0,
                "gpu_hours": hours.used,
                "gpu_hours_budget": budget,
                "goodput": hours.goodput if hours.used else None,
                "outbox_bytes": run.unsent_bytes(),
                "quarantined_samples": run.quarantined(),
            }
        )
        lines, self._read = self._scores.read(self._read)
        for line in lines:
            for name, value in line["values"].items():
                self._metrics.set({"evaluation_score": value}, segment=line["segment"], metric=name)
        if state:
            self._metrics.set({"step": state["step"], "planned_steps": state["steps"]}, segment=state["segment"])
