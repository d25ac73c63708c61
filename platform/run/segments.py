"""Segments: the stages of a run, or the experts in them, and where a start of the workers begins in one."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.schema import ExpertSection, FlowSection, StageSection
from domainshuttle.platform.run.weights_digest import DIGEST_NAME, folder_digest

if TYPE_CHECKING:
    from domainshuttle.pipelines.loading.ray_source import Blocks

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
        return int(noted.read_text()) if noted.exists() else self.stage.steps

    def end_at(self, steps: int) -> None:
        """Notes after how many steps it ends."""
        self.weights.mkdir(parents=True, exist_ok=True)
        write_bytes(self.weights / STEPS_NAME, str(steps).encode())

    def finish(self, steps: int) -> None:
        """Notes that the exported weights are whole, after so many steps; the digest, written last, says so."""
        self.end_at(steps)
        write_bytes(self.weights / DIGEST_NAME, folder_digest(self.weights).encode())

    def begin_anew(self) -> None:
        """Forgets after how many steps it ended before, when it is to be trained again."""
        if not self.finished:
            (self.weights / STEPS_NAME).unlink(missing_ok=True)


def learning_rate(stage: StageSection, step: int) -> float:
    """The rate of step `step`: linear warm-up, then constant or a cosine to `final_learning_rate`."""
    warm = min(1.0, (step + 1) / stage.warmup_steps) if stage.warmup_steps else 1.0
    if stage.final_learning_rate is None:
        return stage.learning_rate * warm
    along = min(1.0, step / stage.steps)
    span = stage.learning_rate - stage.final_learning_rate
    return warm * (stage.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * along)))


@dataclass(frozen=True)
class Shard:
    """What a rank is given at a start of the worker group: its micro-batches, and where they begin."""

    blocks: "Blocks | tuple[()]"
    """None are left when all steps are done and only the weights are missing."""
    first_step: int
    checkpoint: str | None
    attempt: int
    """Grows with every start: where two attempts made the same step, the later one counts."""
    passed_over: frozenset[int] = frozenset()
    """Steps that are not trained on, since they made the run diverge."""
