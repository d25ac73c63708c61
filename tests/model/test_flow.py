"""Timesteps, noise and schedules. Run: pytest tests/model/test_flow.py"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.model.flow import (
    FlowConfig,
    interpolate,
    sample_noise,
    sample_timesteps,
    sampling_schedule,
    unshift,
    velocity,
)

IDS = torch.randint(-(2**62), 2**62, (40_000,), generator=torch.Generator().manual_seed(0))


@given(
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 10**9),
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6, unique=True),
    count=st.integers(1, 33),
)
@settings(max_examples=40, deadline=None)
def test_noise_of_a_sample_does_not_depend_on_its_batch(seed: int, step: int, ids: list[int], count: int) -> None:
    together = sample_noise(seed, torch.tensor(ids), step, (2, count))
    times = sample_timesteps(seed, torch.tensor(ids), step, shift=5.0)
    for i, sample_id in enumerate(ids):
        alone = sample_noise(seed, torch.tensor([sample_id]), step, (2, count))
        assert torch.equal(alone[0], together[i])
        assert torch.equal(sample_timesteps(seed, torch.tensor([sample_id]), step, shift=5.0)[0], times[i])
    assert torch.isfinite(together).all()


def test_noise_is_pinned() -> None:
    """A resumed run must draw the noise of the run it resumes, also under a later version of this code."""
    noise = sample_noise(7, torch.tensor([123456789, -5]), 42, (3,))
    expected = torch.tensor([[-0.2911986, -0.54693, 0.710293], [-0.2316515, -1.494015, -0.5465826]])
    torch.testing.assert_close(noise, expected, atol=1e-6, rtol=0)


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    ids = IDS[:64]
    noise = sample_noise(0, ids, 3, (16, 4, 16, 16)).double()
    flat = noise.flatten()
    n = flat.numel()
    assert abs(flat.mean()) < 5 / math.sqrt(n)
    assert abs(flat.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((flat**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((flat**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert 4.5 < flat.abs().max() < 7
    others = {
        "next step": sample_noise(0, ids, 4, (16, 4, 16, 16)),
        "other seed": sample_noise(1, ids, 3, (16, 4, 16, 16)),
        "neighbouring id": sample_noise(0, ids + 1, 3, (16, 4, 16, 16)),
        "neighbouring element": noise.flatten(1).roll(1, 1),
        "other half of the pair": noise.flatten(1).roll(8192, 1),
        "neighbouring sample": noise.roll(1, 0),
    }
    for name, other in others.items():
        assert abs((flat * other.double().flatten()).mean()) < 5 / math.sqrt(n), name


def test_noise_takes_either_shape_and_dtype() -> None:
    ids = IDS[:3]
    one = sample_noise(0, ids, 0, (16, 2, 4, 4))
    assert torch.equal(one, sample_noise(0, ids, 0, (3, 16, 2, 4, 4)))
    assert sample_noise(0, ids, 0, (16, 2, 4, 4), dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="first size must be 3"):
        sample_noise(0, ids, 0, (2, 16, 2, 4, 4))


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.875, 1.0), (0.0, 0.875)])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_timesteps_follow_the_cut_distribution(shift: float, distribution: str, low: float, high: float) -> None:
    times = sample_timesteps(0, IDS, 5, shift=shift, distribution=distribution, low=low, high=high)
    assert times.dtype == torch.float32
    assert times.min() >= low
    assert times.max() < high or high == 1

    def cumulative(t: float) -> float:
        t = unshift(t, shift)
        if distribution == "uniform" or t in (0.0, 1.0):
            return t
        return 0.5 * (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2)))

    # Kolmogorov-Smirnov: the empirical and the intended distribution differ by less than 1.95 / sqrt(n) (p = 0.001)
    times = times.double().sort().values
    span = cumulative(high) - cumulative(low)
    intended = torch.tensor([(cumulative(float(t)) - cumulative(low)) / span for t in times])
    empirical = (torch.arange(len(times)) + 0.5) / len(times)
    assert (intended - empirical).abs().max() < 1.95 / math.sqrt(len(times))


def test_timesteps_and_noise_are_independent() -> None:
    times = sample_timesteps(0, IDS, 5, shift=1.0).double() - 0.5
    noise = sample_noise(0, IDS, 5, (1,)).double()[:, 0]
    assert abs((times * noise).mean()) < 5 * math.sqrt(1 / 12 / len(IDS))


def test_interpolation_and_velocity() -> None:
    z0, noise = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 2, 4, 4)
    t = torch.tensor([0.25, 1.0])
    noisy = interpolate(z0, noise, t)
    torch.testing.assert_close(noisy[0], 0.75 * z0[0] + 0.25 * noise[0])
    assert torch.equal(noisy[1], noise[1])
    # one Euler step of the true velocity from t to 0 gives z_0
    torch.testing.assert_close(noisy - t.view(2, 1, 1, 1, 1) * velocity(z0, noise), z0, atol=1e-5, rtol=0)


@given(steps=st.integers(1, 100), shift=st.floats(0.1, 20))
def test_schedule_falls_from_one_to_zero(steps: int, shift: float) -> None:
    schedule = sampling_schedule(steps, shift)
    assert schedule.shape == (steps + 1,)
    assert schedule[0] == 1
    assert schedule[-1] == 0
    assert (schedule.diff() < 0).all()


def test_schedule_is_wans() -> None:
    torch.testing.assert_close(sampling_schedule(4, 5.0), torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shift": 0.0}, "shift is 0.0"),
        ({"distribution": "normal"}, "'normal'; use 'uniform' or 'logit_normal'"),
        ({"low": 0.9, "high": 0.875}, "0.9..0.875"),
    ],
)
def test_bad_configuration(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**values)
    with pytest.raises(ValueError, match="0 steps"):
        sampling_schedule(0, 5.0)
