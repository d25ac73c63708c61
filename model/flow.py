"""Flow matching: z_t = (1 - t) z_0 + t e, velocity e - z_0, with t drawn and shifted as in Wan (paper, section 3.1).

Noise and timestep of a sample are functions of (run seed, sample id, step) alone. A counter-based generator of integer
tensor operations makes them, so that a batch needs no loop, and rank, batch composition and device do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from domainshuttle.model.splitmix64 import GAMMA, mixed, mixed_int

TimestepDistribution = Literal["uniform", "logit_normal"]

_NOISE, _TIMESTEP = 1, 2  # separate streams of one sample and step


@dataclass(frozen=True)
class FlowConfig:
    """How timesteps are drawn.

    Attributes:
        shift: s of t' = s t / (1 + (s - 1) t); Wan uses 5 at 480p and 12 at 720p and for Wan2.2.
        distribution: of t before the shift.
        low: smallest shifted t' that is drawn; the high-noise expert of Wan2.2 starts at 0.875.
        high: end of the range of t'; the low-noise expert of Wan2.2 ends below 0.875.

    Raises:
        ValueError: when a value is out of range.
    """

    shift: float = 5.0
    distribution: TimestepDistribution = "uniform"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"flow shift is {self.shift}; it must be above 0 (1 is no shift, Wan uses 5 or 12)")
        if self.distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"timestep distribution is {self.distribution!r}; use 'uniform' or 'logit_normal'")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"timestep range {self.low}..{self.high} must satisfy 0 <= low < high <= 1")


def _keys(run_seed: int, sample_ids: Tensor, step: int, stream: int) -> Tensor:
    """A well-mixed int64 [b] that differs for every seed, sample, step and stream."""
    salt = mixed_int(mixed_int(mixed_int(run_seed) + step * 4 + stream))
    return mixed(mixed(sample_ids + GAMMA) ^ salt)


def sample_noise(
    run_seed: int,
    sample_ids: Tensor,
    step: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise e that depends, sample by sample, on (run_seed, sample id, step) only.

    Args:
        run_seed: seed of the run.
        sample_ids: [b] int64.
        step: optimiser step (or, in evaluation, any counter).
        shape: of one sample, e.g. (16, f, h, w), or of the whole result, when it starts with b and has five sizes.
        dtype: of the result; the noise is made in float32.
        device: of the result; default that of ``sample_ids``.

    Returns:
        [b, *shape].
    """
    b = sample_ids.shape[0]
    shape = tuple(shape)
    if len(shape) == 5:
        if shape[0] != b:
            raise ValueError(f"noise of shape {list(shape)} for {b} sample ids: the first size must be {b}")
        shape = shape[1:]
    count = math.prod(shape)
    device = torch.device(device) if device is not None else sample_ids.device
    keys = _keys(run_seed, sample_ids.to(device), step, _NOISE)
    counter = torch.arange(1, (count + 1) // 2 + 1, device=device)
    bits = mixed(keys[:, None] + counter * GAMMA)  # b count/2
    # Box-Muller: 64 random bits make two normal deviates; half a unit keeps the logarithm finite.
    radius = (((bits >> 32) & (2**32 - 1)).float() + 0.5).mul_(2.0**-32).clamp_(max=1.0).log_().mul_(-2).sqrt_()
    angle = (bits & (2**32 - 1)).float().mul_(2 * math.pi * 2.0**-32)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]
    return normal.reshape(b, *shape).to(dtype)


def sample_timesteps(
    run_seed: int,
    sample_ids: Tensor,
    step: int,
    *,
    shift: float,
    distribution: TimestepDistribution = "uniform",
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Shifted timesteps t' [b] float32 in [low, high), one for each (run_seed, sample id, step).

    The distribution of t is cut to the range that the shift maps onto [low, high], so an expert sees exactly the share
    of the whole model's distribution that lies in its range.
    """
    bits = mixed(_keys(run_seed, sample_ids, step, _TIMESTEP))
    uniform = (((bits >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53
    first, last = (_cumulative(unshift(t, shift), distribution) for t in (low, high))
    t = first + (last - first) * uniform
    if distribution == "logit_normal":
        t = torch.special.ndtri(t).sigmoid()
    t = shift * t / (1 + (shift - 1) * t)
    # Rounding to float32 may reach the end of the range, which belongs to the next expert.
    end = float(np.nextafter(np.float32(high), np.float32(0))) if high < 1 else 1.0
    return t.float().clamp(low, end)


def unshift(t: float, shift: float) -> float:
    """Timestep that the shift maps to ``t``."""
    return t / (shift - (shift - 1) * t)


def _cumulative(t: float, distribution: TimestepDistribution) -> float:
    """Probability that a timestep before the shift is below ``t``."""
    if distribution == "uniform" or t in (0.0, 1.0):
        return t
    return 0.5 * (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2)))


def interpolate(z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Noisy latents z_t = (1 - t) z_0 + t e, for t [b] and tensors [b, ...]."""
    t = t.view(-1, *(1,) * (z0.ndim - 1))
    return torch.lerp(z0, noise, t.to(z0.dtype))


def velocity(z0: Tensor, noise: Tensor) -> Tensor:
    """What the network predicts: e - z_0."""
    return noise - z0


def sampling_schedule(steps: int, shift: float) -> Tensor:
    """Shifted timesteps [steps + 1], float32, from 1 to 0: the times at which a sampler evaluates, and the end.

    Raises:
        ValueError: when ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"a sampling schedule of {steps} steps: use at least 1")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()
