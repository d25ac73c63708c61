"""Statistics against closed forms, brute force and scipy. Run: pytest tests/platform/evaluation/test_statistics.py"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from domainshuttle.platform.evaluation.statistics import (
    compare,
    estimate,
    estimates,
    holm,
    kendall,
    krippendorff_alpha,
    ranking,
    sign_flip_p,
    smallest_difference,
)


def test_an_interval_is_that_of_scipy_and_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    values = rng.gamma(2.0, 1.0, 30)  # skewed, where BCa and percentiles differ
    one = estimate(values, resamples=2000, seed=4)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(4))
    assert (one.low, one.high) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)
    for count in range(8, 40):  # grades, and hits and misses: many resamples have the mean of the cases
        for values in (np.arange(count) % 3 % 2 * 1.0, np.arange(count) % 4 * 1.0):
            one, thirds = estimates(np.stack([values, values / 3]), resamples=2000, seed=4)
            theirs = stats.bootstrap((values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(4))
            assert (one.low, one.high) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-9)
            assert (thirds.low, thirds.high) == pytest.approx((one.low / 3, one.high / 3))
    values = rng.gamma(2.0, 1.0, 30)
    one = estimate(values, resamples=2000, seed=4)
    percentile = np.quantile(rng.choice(values, (2000, 30)).mean(axis=1), [0.025, 0.975])
    assert abs(one.high - percentile[1]) > 1e-3
    samples = rng.normal(3.0, 1.0, (200, 40))
    covered = sum(one.low <= 3.0 <= one.high for one in estimates(samples, resamples=500))
    assert 0.88 <= covered / 200 <= 0.99


def test_the_half_width_at_110_cases_is_that_of_the_normal_form() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.15, 110)
    one = estimate(values)
    expected = 1.96 * values.std(ddof=1) / math.sqrt(110)
    assert (one.high - one.low) / 2 == pytest.approx(expected, rel=0.06)
    assert smallest_difference(0.15, 110) == pytest.approx(0.040, abs=5e-4)
    assert smallest_difference(0.25, 110) == pytest.approx(0.067, abs=5e-4)


def test_missing_cases_are_counted_and_bounded_and_never_a_zero() -> None:
    one = estimate(np.array([0.4, np.nan, 0.6, np.nan]), least=0.0, most=1.0)
    assert (one.mean, one.cases, one.missing) == (0.5, 2, 2)
    assert (one.worst, one.best) == (0.25, 0.75)
    nothing = estimate(np.array([np.nan, np.nan]))
    assert math.isnan(nothing.mean) and nothing.missing == 2
    alone = estimate(np.array([0.7]))
    assert alone.mean == 0.7 and math.isnan(alone.low)
    rounded = estimate(np.arange(9) + 0.3 - np.arange(9))  # equal but for rounding
    assert (rounded.low, rounded.high) == pytest.approx((0.3, 0.3))
    same = estimate(np.full(9, 0.3))
    assert (same.low, same.high) == pytest.approx((0.3, 0.3))


def test_rows_are_as_they_are_alone() -> None:
    table = np.random.default_rng(2).random((4, 12))
    table[1, 3] = np.nan
    together = estimates(table, resamples=300, seed=1)
    alone = [estimate(row, resamples=300, seed=1) for row in table]
    for left, right in zip(together, alone, strict=True):
        assert (left.mean, left.low, left.high) == pytest.approx((right.mean, right.low, right.high))


@pytest.mark.parametrize("count", [2, 5, 9])
def test_the_sign_flip_test_is_that_of_all_flips(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.4, 1, count)
    observed = abs(differences.mean())
    flips = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=count)]
    expected = np.mean([abs(one) >= observed - 1e-12 for one in flips])
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_the_sign_flip_test_of_many_cases_is_near_the_t_test() -> None:
    differences = np.random.default_rng(3).normal(0.04, 0.15, 110)
    assert sign_flip_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert sign_flip_p(np.zeros(10)) == 1.0
    assert math.isnan(sign_flip_p(np.array([0.3])))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, number in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
            if p_values[number] * (len(p_values) - rank) > level:
                break
            rejected.add(number)
        assert {n for n, p in enumerate(adjusted) if p <= level} == rejected


def test_better_is_said_only_where_the_interval_says_it() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(0.5, 0.15, 110)
    ours = {"clear": base + 0.05 + rng.normal(0, 0.05, 110), "equal": base + rng.normal(0, 0.05, 110)}
    theirs = {"clear": base, "equal": base}
    ranges = {"clear": (0.0, 1.0), "equal": (0.0, 1.0)}
    both = {name: np.stack([ours[name] - theirs[name], theirs[name] - ours[name]]) for name in ours}
    found = compare(both, ranges, resamples=2000)
    assert [one.verdict for one in found["clear"]] == [1, -1]
    assert [one.verdict for one in found["equal"]] == [0, 0]
    assert found["clear"][0].adjusted == pytest.approx(2 * found["clear"][0].p)
    half = ours["clear"].copy()
    half[:40] = np.nan  # so many are missing that the difference may be of either sign
    (partly,) = compare({"clear": (half - base)[None]}, ranges, resamples=2000)["clear"]
    assert (partly.verdict, partly.difference.cases, partly.difference.missing) == (0, 70, 40)
    assert partly.difference.worst < 0 < partly.difference.low


def test_agreement_against_published_and_counted_values() -> None:
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), example C: nominal 0.743, interval 0.849
    n = np.nan
    ratings = np.array(
        [[1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
         [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n]]
    )  # fmt: skip
    assert krippendorff_alpha(ratings, "nominal") == pytest.approx(0.743, abs=1e-3)
    assert krippendorff_alpha(ratings, "interval") == pytest.approx(0.849, abs=1e-3)
    assert math.isnan(krippendorff_alpha(np.array([[3.0, 3.0], [3.0, 3.0]])))
    left, right = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 3.0, "c": 2.0}
    assert kendall(left, right) == pytest.approx(1 / 3)
    assert ranking({"a": 0.2, "b": float("nan"), "c": 0.9}) == ["c", "a"]
