"""Goodput in closed form, against failures drawn one by one.

Run: python -m pytest tests/platform/planning/test_goodput.py
"""

from dataclasses import replace

import numpy as np
import pytest

from domainshuttle.platform.planning.goodput import Reliability

WORLD = Reliability(between_failures=7.9 * 3600, start=180.0, detect=30.0, stall=1.0, write=20.0)


def drawn(world: Reliability, interval: float, failures: int, seed: int = 0) -> float:
    """The share of the time of so many failures, event by event."""
    random = np.random.default_rng(seed)
    time = useful = 0.0
    for worked in random.exponential(world.between_failures, failures):
        # what a failure leaves: it strikes in the start, or after some checkpoints
        time += worked + world.detect
        working = worked - world.start
        if working > 0:
            whole = np.floor((working - world.write) / (interval + world.stall)) if working > world.write else 0
            useful += whole * interval
    return useful / time


@pytest.mark.parametrize("interval", [300.0, 2300.0, 20_000.0])
@pytest.mark.parametrize("faster", [1, 20])
def test_it_is_what_drawn_failures_give(interval: float, faster: int) -> None:
    world = replace(WORLD, between_failures=WORLD.between_failures / faster)
    expected = drawn(world, interval, 400_000)
    assert world.goodput(interval) == pytest.approx(expected, abs=0.003)


def test_few_failures_cost_half_an_interval_a_start_and_the_stalls() -> None:
    """To first order: the share of stalls, and of each failure what is done again, started and noticed."""
    world = replace(WORLD, between_failures=1e7)
    lost = (2300 / 2 + 20 + 180 + 30) / 1e7
    assert world.goodput(2300.0) == pytest.approx(2300 / 2301 - lost, abs=1e-6)


def test_the_best_interval_is_that_of_the_highest_goodput() -> None:
    for world in (WORLD, replace(WORLD, stall=30.0), replace(WORLD, between_failures=3600.0)):
        best = world.best_interval()
        around = [world.goodput(best * factor) for factor in (0.5, 0.9, 1.0, 1.1, 2.0)]
        assert max(around) == around[2]
        # Young's rule, where failures are rare
        assert best == pytest.approx((2 * world.stall * world.between_failures) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "world", [replace(WORLD, between_failures=0.05), replace(WORLD, write=1e11), replace(WORLD, start=1e9)]
)
def test_where_no_step_comes_to_count_it_is_nothing(world: Reliability) -> None:
    assert world.goodput(300.0) == 0.0
    assert world.best_interval() > 0
