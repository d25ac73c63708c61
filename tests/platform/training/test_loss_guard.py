"""The guard: which steps are dropped, when a run goes back, and that a restored guard judges alike.

Run: python -m pytest tests/platform/training/test_loss_guard.py
"""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainshuttle.platform.config.schema import GuardSection
from domainshuttle.platform.training.loss_guard import LossGuard

SECTION = GuardSection(spike_factor=3.0, window=4, rollback_after=3)


def test_a_loss_that_is_not_finite_is_bad_from_the_first_step() -> None:
    guard = LossGuard(SECTION)
    assert guard.judge(1e9) == "good"  # nothing is usual yet
    for loss in (math.nan, math.inf, -math.inf):
        assert guard.judge(loss) == "not finite"


def test_a_spike_is_measured_against_the_median_of_the_window() -> None:
    guard = LossGuard(SECTION)
    for loss in (1.0, 1.2, 0.8, 1.0):
        assert guard.judge(loss) == "good"
        guard.applied(loss)
    assert guard.judge(2.99) == "good"
    assert guard.judge(3.01) == "spike"
    for loss in (2.0, 2.0, 2.0):
        guard.applied(loss)
    assert guard.judge(3.01) == "good"
    assert LossGuard(GuardSection(spike_factor=None, window=1), {"usual": [1.0]}).judge(1e6) == "good"


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_a_stage_does_not_end_with_a_loss_far_above_its_first_one(steps: int) -> None:
    """Also where the steps since, of which there are few, or all that the window holds, were as bad."""
    guard = LossGuard(SECTION)
    guard.applied(0.01)  # of a black picture: how far a usual one lies above it says nothing
    for _ in range(steps):
        guard.applied(1e9)
    guard = LossGuard(SECTION, json.loads(json.dumps(guard.state())))
    assert guard.judge(1e9) == "good"
    assert guard.judge_weights(5.9) and not guard.judge_weights(6.1)  # three times what predicting nothing costs
    assert not guard.judge_weights(1e9) and not guard.judge_weights(math.nan)
    high = LossGuard(SECTION, {"usual": [], "first": 10.0})
    assert high.judge_weights(29.0) and not high.judge_weights(31.0)
    assert LossGuard(GuardSection(spike_factor=None), {"first": 0.1}).judge_weights(1e6)
    assert LossGuard(SECTION, {"usual": [1.0]}).judge_weights(1e6)  # of a checkpoint that does not say


def test_only_bad_steps_in_a_row_send_the_run_back() -> None:
    guard = LossGuard(SECTION)
    assert [guard.dropped(1), guard.dropped(2)] == [False, False]
    guard.applied(1.0)
    assert [guard.dropped(4), guard.dropped(5), guard.dropped(6)] == [False, False, True]
    assert guard.bad_in_a_row == [4, 5, 6]


@given(st.lists(st.one_of(st.floats(0.1, 100), st.just(math.nan)), max_size=40), st.integers(0, 40))
def test_a_restored_guard_judges_as_the_unbroken_one(losses: list[float], at: int) -> None:
    def run(guard: LossGuard, part: list[float], first: int) -> list[str]:
        verdicts = []
        for step, loss in enumerate(part, first):
            verdicts.append(guard.judge(loss))
            if verdicts[-1] == "good":
                guard.applied(loss)
            else:
                guard.dropped(step)
        return verdicts

    whole = run(LossGuard(SECTION), losses, 0)
    before = LossGuard(SECTION)
    first = run(before, losses[:at], 0)
    after = LossGuard(SECTION, json.loads(json.dumps(before.state())))
    assert first + run(after, losses[at:], at) == whole
    # the rule, said again without a window that slides
    good: list[float] = []
    for loss, verdict in zip(losses, whole, strict=True):
        spike = len(good) >= 4 and loss > 3 * statistics.median(good[-4:])
        assert verdict == ("not finite" if math.isnan(loss) else "spike" if spike else "good")
        good += [loss] if verdict == "good" else []


def test_one_noisy_step_does_not_move_what_checkpoints_are_compared_by() -> None:
    guard = LossGuard(SECTION)
    assert guard.median_loss() is None
    for loss in (1.0, 1.1, 0.9, 0.01):
        guard.applied(loss)
    assert guard.median_loss() == pytest.approx(0.95)
    guard.dropped(4)
    assert LossGuard(SECTION, guard.state()).median_loss() == guard.median_loss()


def test_a_rule_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="spike_factor"):
        GuardSection(spike_factor=0.5)
