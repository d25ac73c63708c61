"""The model of a stage as it is trained: its engine and its loss, both as the run's configuration says."""

import contextlib

import torch

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import LossOutput, training_loss
from domainshuttle.platform.config.schema import ExpertSection, FlowSection, RunConfig, StageSection
from domainshuttle.platform.engine.initialization import blueprint
from domainshuttle.platform.engine.trained_parameters import select_trained
from domainshuttle.platform.engine.zero3 import Engine, frozen_copy, release
from domainshuttle.platform.run.weights_origin import WeightsOrigin


class StageModel:
    """A stage's network under ZeRO-3, with what its loss needs beside it.

    All ranks must build it, ask for its loss and close it together.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: StageSection,
        expert: ExpertSection | None,
        origin: WeightsOrigin,
        accumulation: int,
        *,
        seed: int,
        flow: FlowSection,
    ) -> None:
        """Builds it with the weights of ``origin``.

        Args:
            config: of the run.
            stage: which is trained.
            expert: whose weights are trained; None for a model without experts.
            origin: where the weights are, identified.
            accumulation: micro-batches of a step.
            seed: of noise and timesteps.
            flow: distribution of the timesteps.

        Raises:
            ConfigError: for weights that do not make the model, and settings that it or this device can't have.
        """
        section = config.model_of(expert)
        design = blueprint(section, origin)
        self.parameters = select_trained(design.outline, stage.trained)
        self.network_config = design.outline.config
        """What the network was built with, as diffusers saves it."""
        self._loss, self._seed, self._flow = stage.loss, seed, FlowConfig(**flow.model_dump())
        self._snapshot = None
        with contextlib.ExitStack() as made:
            if stage.loss.cross_pair_weight and stage.loss.cross_pair_target == "snapshot":
                self._snapshot = frozen_copy(blueprint(section, origin), config.engine)
                made.callback(release, self._snapshot)
            self.engine = Engine(design, stage, config.engine, accumulation)
            made.callback(self.engine.close)
            padded = stage.micro_batch > 1 and stage.references > 0
            self.engine.attention.require_masks(padded, f"stages.{stage.name}")
            self._made = made.pop_all()

    def loss(self, batch: TrainingBatch, step: int) -> LossOutput:
        """The training loss of a micro-batch, which is taken to the device."""
        return training_loss(
            self.engine,
            batch.to(self.engine.device, self.engine.dtype),
            run_seed=self._seed,
            step=step,
            flow=self._flow,
            cross_pair_weight=self._loss.cross_pair_weight,
            cross_pair_target=self._loss.cross_pair_target,
            snapshot_model=self._snapshot,
        )

    @torch.no_grad()
    def judged(self, batch: TrainingBatch, step: int) -> torch.Tensor:
        """The loss of a micro-batch without gradients; NaN where the weights are not finite.

        A micro-batch without references tells nothing of the weights that only references pass through.
        """
        loss = self.loss(batch, step).loss
        return loss if self.engine.weights_finite() else torch.full_like(loss, torch.nan)

    def close(self) -> None:
        """Gives the memory back, for the next model of this process; it can't be used any more."""
        self._made.close()
