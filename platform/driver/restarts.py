"""How Ray Train decides about failures and sizes of the worker group.

Ray loads this module into its controller, so nothing here imports torch. Ray has no public interface for either
decision: this follows its own classes of version 2.60, which pyproject.toml pins.
"""

import contextlib
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from domainshuttle.pipelines.errors import TooManyBadError
from domainshuttle.platform.checkpoint.backend import STORE_FAULTS
from domainshuttle.platform.checkpoint.resume import IncompatibleError
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import FAILED, Notices
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.tracking.outbox import tag_segment

logger = logging.getLogger(__name__)

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


def tell_restart(run: Run, segment: str, reason: str) -> None:
    """The tag `restart.<n>` of the segment, after its nth attempt, which ends here in the ledger if it has not yet."""
    try:
        ledger = Ledger(run.ledger_path)
        ledger.end_open(reason)
        attempts = [one for one in ledger.attempts() if one.segment == segment and one.devices]
    except OSError as error:
        logger.warning("the ledger can not be written: %s", error)
        return
    if attempts:  # none where the workers never came to their first line
        tag_segment(run, segment, f"restart.{len(attempts)}", f"{reason} (step {attempts[-1].last} was reached)")


def cause(failures: Mapping[int, BaseException]) -> str:
    """Rank and error that most likely came first: a death before an error, both before connections that were lost."""
    if not failures:
        return "no worker said why"
    rank, failure = min(failures.items(), key=lambda item: (_follows(item[1]), item[0]))
    return f"rank {rank}: {_describe(failure)}"


def _follows(failure: BaseException) -> int:
    """0: a process died; 1: an error of its own; 2: what the others see of either."""
    inner = getattr(failure, "health_check_failure", failure)
    if isinstance(inner, RayActorError) and not isinstance(inner, RayTaskError):
        return 0
    return 2 if _CONSEQUENCE.search(str(failure)) else 1


_CONSEQUENCE = re.compile(r"(?i)connection (closed|reset|refused)|closed by peer|gloo|NCCL|ProcessGroup|Broken pipe")


def _describe(failure: BaseException) -> str:
    inner = getattr(failure, "health_check_failure", failure)
    found = inner.cause if isinstance(inner, RayTaskError) else inner
    lines = [line.strip() for line in str(found).strip().splitlines() if line.strip()]
    kind = type(found).__name__
    # of an actor's death the first line says it; of an error with its traceback the last one
    line = (lines[0] if isinstance(inner, RayActorError) else lines[-1]) if lines else ""
    return f"{kind}: {line[:200]}"
