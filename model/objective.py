"""The training loss: flow matching and cross-pair consistency, L = L_FM + w L_C (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig, interpolate, sample_noise, sample_timesteps, velocity

CrossPairTarget = Literal["stop_gradient", "snapshot"]


@dataclass(frozen=True)
class LossOutput:
    """Loss of a micro-batch; the parts are detached and per sample, for logs by timestep, domain and source."""

    loss: Tensor
    """Scalar float32 to call ``backward`` on."""
    flow: Tensor
    """[b] flow-matching loss of each sample."""
    cross_pair: Tensor | None
    """[b] cross-pair loss of each sample before its weight; None when it was not computed."""
    timesteps: Tensor
    """[b] t in [0, 1]."""


def training_loss(
    model: Callable[..., Any],
    batch: TrainingBatch,
    *,
    run_seed: int,
    step: int,
    flow: FlowConfig,
    cross_pair_weight: float,
    cross_pair_target: CrossPairTarget = "stop_gradient",
    snapshot_model: Callable[..., Any] | None = None,
) -> LossOutput:
    """Loss of one micro-batch.

    L_FM is the mean squared error of the predicted velocity. L_C is the mean squared difference to the prediction for
    the same z_t, t and text with the paired references, made without gradients and without stored activations: in the
    same call, by a model that ``predicts_pairs``, else before the forward with gradients.

    Args:
        model: a ``DomainShuttleTransformer3DModel`` or anything called like it, such as a ``DeepSpeedEngine``.
        batch: samples of one bucket, on the model's device.
        run_seed: seeds noise and timesteps together with the sample ids and ``step``.
        step: optimiser step.
        flow: distribution of timesteps.
        cross_pair_weight: w, 0.1 in the paper; 0 skips the second forward.
        cross_pair_target: ``stop_gradient`` takes the current weights, ``snapshot`` those of ``snapshot_model``.
        snapshot_model: the weights at the start of the stage, for ``snapshot``.

    Raises:
        ValueError: when the cross-pair loss is asked for and its references or its snapshot are missing.
    """
    with_pairs = cross_pair_weight > 0
    if with_pairs and not batch.has_pairs:
        raise ValueError(
            f"cross_pair_weight is {cross_pair_weight}, but the batch has no paired references: "
            "load pairs, or set the weight to 0"
        )
    if with_pairs and cross_pair_target == "snapshot" and snapshot_model is None:
        raise ValueError("cross_pair_target is 'snapshot', but snapshot_model is None: pass the stage's first weights")
    latents = batch.latents.float()
    noise = sample_noise(run_seed, batch.sample_ids, step, latents.shape[1:], device=latents.device)
    t = sample_timesteps(
        run_seed,
        batch.sample_ids,
        step,
        shift=flow.shift,
        distribution=flow.distribution,
        low=flow.low,
        high=flow.high,
    ).to(latents.device)
    noisy, timestep = interpolate(latents, noise, t), 1000 * t

    given, pair = batch.reference_inputs(), batch.reference_inputs(paired=True)
    target = snapshot_model if cross_pair_target == "snapshot" and snapshot_model is not None else model
    consistent = None
    if with_pairs and target is model and getattr(model, "predicts_pairs", False):
        together = {f"paired_{name}": value for name, value in pair.items()}
        prediction, consistent = model(noisy, timestep, batch.text, **given, **together, return_dict=False)
    else:
        if with_pairs:
            with torch.no_grad():
                (consistent,) = target(noisy, timestep, batch.text, **pair, return_dict=False)
        (prediction,) = model(noisy, timestep, batch.text, **given, return_dict=False)
    flow_loss = _squared_error(prediction, velocity(latents, noise))
    loss = flow_loss.mean()
    cross_pair = None
    if consistent is not None:
        cross_pair = _squared_error(prediction, consistent)
        loss = loss + cross_pair_weight * cross_pair.mean()
        cross_pair = cross_pair.detach()
    return LossOutput(loss=loss, flow=flow_loss.detach(), cross_pair=cross_pair, timesteps=t)


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error [b] over all but the first dimension, in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
