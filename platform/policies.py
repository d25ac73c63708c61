"""How Ray Train decides about failures and sizes of the worker group.

Ray loads this module into its controller, so nothing here imports torch. Ray has no public interface for either
decision: this follows its own classes of version 2.60, which pyproject.toml pins.
"""

import contextlib
from collections.abc import Collection
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from domainshuttle.pipelines.sample import TooManyBadError
from domainshuttle.platform.checkpoint import CheckpointError, CheckpointStore
from domainshuttle.platform.checkpoint_files import STORE_FAULTS
from domainshuttle.platform.config import ConfigError
from domainshuttle.platform.notices import FAILED, Notices
from domainshuttle.platform.restarts import cause, tell_restart
from domainshuttle.platform.resume import IncompatibleError
from domainshuttle.platform.schedule import Run

FINAL = (ConfigError, IncompatibleError, TooManyBadError)
"""Errors that starting the workers again does not mend."""


class FailuresInARow(DefaultFailurePolicy):
    """Gives a segment up after `most` failures between which no checkpoint became whole.

    Ray's own count is of a whole fit, so that a segment of days would end at its fourth fault. Preemptions and starts
    that found no room are not counted, as Ray does it. An error that will not go away ends the fit at once.
    """

    def __init__(self, run: Run, segment: str, most: int) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self._store, self._segment, self._most = CheckpointStore.of(run.config), segment, most
        self._run, self._notices = run, Notices(run.notices_path)
        self._in_a_row, self._newest = 0, 0.0
        self._newest = self._written()

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether the workers start again; the tracking and the ledger are told why."""
        decision, error = self._decide(training_failed_error), training_failed_error
        if decision is FailureDecision.RETRY:
            failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
            reason = cause(failures) if failures else f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            tell_restart(self._run, self._segment, reason)
        return decision

    def _decide(self, error: TrainingFailedError) -> FailureDecision:
        if failed_start(error):
            return FailureDecision.RAISE  # `Fit` starts again, with another controller
        if not isinstance(error, WorkerGroupError) or _is_preemption_failure(error):
            return super().make_decision(error)
        if final_error(error):
            return FailureDecision.RAISE
        written = self._written()
        if written > self._newest:
            self._newest, self._in_a_row = written, 0
        self._in_a_row += 1
        left = self._most - self._in_a_row
        self._notices.add(
            self._segment,
            FAILED,
            f"Stage {self._segment}: the workers failed ({cause(error.worker_failures)}); "
            + (
                f"they start again. Failure {self._in_a_row} in a row without a newer checkpoint, at most {self._most}"
                if left >= 0
                else f"failure {self._in_a_row} in a row without a newer checkpoint, and cluster.max_failures is "
                f"{self._most}"
            ),
        )
        return FailureDecision.RETRY if left >= 0 else FailureDecision.RAISE

    def _written(self) -> float:
        """When the newest checkpoint became whole; as long as the store does not answer, what was known before."""
        try:
            times = [self._newest]
            for name in self._store.names(self._segment):
                with contextlib.suppress(CheckpointError):
                    times.append(self._store.read(str(name), checksums=False).written)
            return max(times)
        except STORE_FAULTS:
            return self._newest


class DividingSizes(ElasticScalingPolicy):
    """An elastic group that only has sizes by which the global batch can be shared."""

    def __init__(self, scaling_config: Any, sizes: Collection[int]) -> None:
        super().__init__(scaling_config)
        self._sizes = sorted(sizes)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= room), default=0)


def failed_start(error: BaseException) -> BaseException | None:
    """What a worker died of, or lost another by, before it came to train, if that is what ended a fit.

    Ray's controller would give the run up for some of these, and try others again while it keeps the placement group of
    the workers it could not start, so that there is never room: only another controller can start again.
    """
    found: BaseException | None = error.controller_failure if isinstance(error, ControllerError) else None
    if isinstance(found, WorkerGroupStartupFailedError):
        return found.__cause__ or found
    return found if isinstance(found, RayActorError | RayTaskError) else None


def final_error(error: BaseException) -> BaseException | None:
    """The error among those of the workers that starting again does not mend, if there is one."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        found: BaseException | None = failure.cause if isinstance(failure, RayTaskError) else failure
        while found is not None:
            if isinstance(found, FINAL):
                return found
            found = found.__cause__
    return None
