"""Segments: the stages of a run, or the experts in them; where a start begins in one, and how it ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.plan.step_plan import ORDER_VERSION
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.schema import ConfigError, ExpertSection, FlowSection, StageSection
from domainshuttle.platform.run.weights_digest import DIGEST_NAME, Fingerprints, folder_digest
from domainshuttle.platform.run.weights_origin import WeightsOrigin

STEPS_NAME = "steps.txt"


@dataclass(frozen=True)
class Segment:
    """One stage of a run's schedule or, with experts, one expert in it."""

    number: int
    stage: StageSection
    expert: ExpertSection | None
    seed: int
    """Seeds the plan, noise and timesteps: of the run's seed and the segment's number."""
    weights: Path
    """Where its weights are, or will be, exported as a diffusers folder."""
    origin: str | None
    """Weights to begin with: the folder of this expert's segment before, or its base; None: a new model."""

    @property
    def name(self) -> str:
        return self.stage.name if self.expert is None else f"{self.stage.name}-{self.expert.name}"

    @property
    def flow(self) -> FlowSection:
        """The stage's timesteps, in the expert's range."""
        if self.expert is None:
            return self.stage.flow
        return self.stage.flow.model_copy(update={"low": self.expert.low, "high": self.expert.high})

    @property
    def averaged_weights(self) -> Path:
        """Where the moving average of its weights is, if one is kept: what generates best."""
        return self.weights.with_name(f"{self.weights.name}-ema")

    @property
    def finished(self) -> bool:
        return (self.weights / DIGEST_NAME).exists()

    @property
    def last_step(self) -> int:
        """How many steps it has, or had: a stage that its GPU-hours end may be finished before its bound.

        Noted without weights, they were lost, and its last checkpoint has them: they are exported again, not trained.
        """
        noted = self.weights / STEPS_NAME
        return read_number(noted) if noted.exists() else self.stage.duration.planned_steps

    def end_at(self, steps: int) -> None:
        """Notes after how many steps it ends."""
        self.weights.mkdir(parents=True, exist_ok=True)
        write_bytes(self.weights / STEPS_NAME, str(steps).encode())

    def finish(self, steps: int, fingerprints: Fingerprints | None = None) -> None:
        """Notes that the exported weights are whole, after so many steps; the digest, written last, says so."""
        self.end_at(steps)
        for folder in (self.averaged_weights, self.weights):
            if folder.exists():
                digest = folder_digest(folder)
                write_bytes(folder / DIGEST_NAME, digest.encode())
                if fingerprints is not None:
                    fingerprints.remember(folder, digest)

    def begin_anew(self) -> None:
        """Forgets after how many steps it ended before, when it is to be trained again."""
        if not self.finished:
            (self.weights / STEPS_NAME).unlink(missing_ok=True)


def read_number(path: Path) -> int:
    """The whole number that a file of the run holds; raises ConfigError where it is damaged."""
    try:
        return int(path.read_text())
    except ValueError as error:  # Unicode's is one
        raise ConfigError(
            f"{path} is damaged: expected a whole number in it ({error}): bring it back from a copy of the run"
        ) from error


def learning_rate(stage: StageSection, step: int) -> float:
    """The rate of step `step`: linear warm-up, then constant or a cosine to `final_learning_rate`."""
    warm = min(1.0, (step + 1) / stage.warmup_steps) if stage.warmup_steps else 1.0
    if stage.final_learning_rate is None:
        return stage.learning_rate * warm
    along = min(1.0, step / stage.duration.planned_steps)
    span = stage.learning_rate - stage.final_learning_rate
    return warm * (stage.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * along)))


@dataclass(frozen=True)
class StartPoint:
    """Where a start of the workers begins in a segment: decided once, by the driver, for weights and data alike."""

    segment: str
    first_step: int
    """The first step to train: the order of the data is a pure function of it."""
    checkpoint: str | None
    """Path or URI of the checkpoint to restore; None: the segment's own beginning."""
    attempt: int
    """Grows with every start: where two attempts made the same step, the later one counts."""
    skipped: frozenset[int] = frozenset()
    """Steps that are not trained on, since they made the run diverge."""
    order: int = ORDER_VERSION
    """The version of the data order: the checkpoint's own."""

    def last_trained(self, last_step: int) -> int | None:
        """The last step before `last_step` that is trained on, or was before this start; None: there is none."""
        return next((step for step in reversed(range(last_step)) if step not in self.skipped), None)

    def first_planned(self, last_step: int) -> int:
        """The first step whose samples are read: of a segment with nothing left but bad steps the last good one."""
        last = self.last_trained(last_step)
        return self.first_step if last is None or self.first_step >= last_step else min(self.first_step, last)


@dataclass(frozen=True)
class WorkerJob:
    """What the driver tells every worker of a group."""

    config: dict[str, Any]
    """The run's configuration, JSON-ready."""
    attempt: int
    """Counts the starts of a worker group in this run, from 1."""
    starts: tuple[StartPoint, ...]
    """The segments to train, one after the other."""
    origins: Mapping[str, WeightsOrigin]
    """Of each segment: the weights that it begins with, as they were when the driver started."""
    mlflow: Mapping[str, Any]
    """The ids of the MLflow runs (tracking/mlflow.py)."""
    times: Mapping[str, float]
    """When the workers were `asked` for, and of the first ones the `command` started, in seconds since 1970."""


class End(StrEnum):
    """How the workers ended a segment, by themselves and together."""

    FINISHED = "finished"
    STOPPED = "stopped"
    BUDGET_SPENT = "budget spent"
    ROLLED_BACK = "rolled back"
    """The loss went wrong: the run goes back to a checkpoint and skips the steps that were bad."""
    DIVERGED = "diverged"
    """The last update left weights whose loss is not good."""
    REGROUPED = "regrouped"
    """There is room for more workers."""
    PREEMPTED = "preempted"
    """A node of the group is about to go."""
    UNSAVED = "unsaved"
    """Checkpoints could not be written any more."""


@dataclass(frozen=True)
class SegmentEnd:
    """What rank 0 returns to the driver, through Ray Train."""

    kind: End
    segment: str
    step: int
    """Steps done."""
    reason: str = ""
    asked: End | None = None
    """Why the group ends after a segment that is finished, if it was asked to."""
    nodes: tuple[str, ...] = ()
    """Ray's ids of the nodes that are about to go."""
    bad: tuple[int, ...] = ()
    """Of a roll-back, the steps that the next start skips."""
