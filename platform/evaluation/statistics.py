"""How sure a figure is, and when one model may be called better than another.

The unit is the case: frames, subjects, a judge's repeats and seeds are averaged inside it first, so that 110 cases
count as 110 whatever was done with each. Intervals are bias-corrected and accelerated bootstraps over the cases, pairs
of models are compared over the cases that both have a value for, and of a family of comparisons Holm's procedure keeps
the chance of any false one. A case without a value is never a 0: it is counted, and where there are many of them the
mean is said with the bounds that it would have if all of them were the worst or the best.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Values = NDArray[np.float64]
"""One a case, in one order; NaN where there is none."""


@dataclass(frozen=True)
class Estimate:
    """A mean over cases with its interval."""

    mean: float
    low: float
    """Of the confidence interval; NaN where one case, or none, has a value."""
    high: float
    cases: int
    """With a value."""
    missing: int
    """Without one."""
    worst: float
    """The mean if every missing case had the metric's least value, which `mean` is where none is missing."""
    best: float

    @property
    def share_missing(self) -> float:
        return self.missing / max(1, self.cases + self.missing)


@dataclass(frozen=True)
class Comparison:
    """How much more a model has than another, over the cases that both have."""

    difference: Estimate
    p: float
    """Of the paired sign-flip test that the difference is 0; NaN where it can't be computed."""
    adjusted: float
    """By Holm over the family of metrics of this pair."""
    verdict: int
    """1: more, and -1: less, where interval, adjusted p and worst-case bounds all say so; 0: not shown."""


def estimate(
    values: Values,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    least: float = 0.0,
    most: float = 1.0,
) -> Estimate:
    """The mean of the cases with a value, its BCa interval, and its bounds if the missing had `least` or `most`."""
    return estimates(values[None], confidence, resamples, seed, least, most)[0]


def estimates(
    table: NDArray[np.float64],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    least: float = 0.0,
    most: float = 1.0,
) -> list[Estimate]:
    """`estimate` of each row of [rows, cases]; rows with the same missing cases are resampled together."""
    found: dict[int, Estimate] = {}
    there = ~np.isnan(table)
    for rows in _alike(there):
        mask = there[rows[0]]
        values, missing = table[rows][:, mask], int((~mask).sum())
        lows, highs = _bca(values, confidence, resamples, seed)
        for row, one, low, high in zip(rows, values, lows, highs, strict=True):
            count = len(one)
            mean = float(one.mean()) if count else float("nan")
            total, whole = float(one.sum()), max(1, count + missing)
            bounds = [(total + missing * bound) / whole if missing else mean for bound in (least, most)]
            found[row] = Estimate(mean, float(low), float(high), count, missing, *bounds)
    return [found[row] for row in range(len(table))]


def _bca(values: NDArray[np.float64], confidence: float, resamples: int, seed: int) -> tuple[Values, Values]:
    """The intervals of the means of [rows, cases], as scipy.stats.bootstrap gives them of the same draws.

    All rows share the draws, so that the means of all resamples are one product of matrices: 2,000 rows of 220 cases
    take a second, and scipy's minutes.
    """
    rows, count = values.shape
    low, high = np.full(rows, np.nan), np.full(rows, np.nan)
    if count < 2:
        return low, high
    means = values.mean(axis=1)
    # values that are equal but for rounding are equal: their interval would be none
    varied = np.ptp(values, axis=1) > 1e-12 * np.abs(values).max(axis=1)
    low[~varied] = high[~varied] = means[~varied]  # nothing varies: the mean itself
    shares = _shares(count, resamples, seed)
    for chosen in _chunks(np.flatnonzero(varied), resamples):
        low[chosen], high[chosen] = _bca_of(values[chosen], np.sort(shares @ values[chosen].T, axis=0), confidence)
    return low, high


@functools.lru_cache(maxsize=8)
def _shares(count: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How much of each resample [resamples, cases] a case is: every metric and pair has the same draws."""
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    places = drawn + count * np.arange(resamples)[:, None]
    times = np.bincount(places.ravel(), minlength=resamples * count).reshape(resamples, count)
    return times.astype(np.float64) / count


@functools.lru_cache(maxsize=8)
def _signs(count: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """Signs to flip [flips, cases]: all where there are no more than `resamples`, else that many drawn ones."""
    if 2**count <= resamples:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (resamples, count))
    return 1.0 - 2.0 * bits.astype(np.float64)


def _bca_of(values: NDArray[np.float64], resampled: NDArray[np.float64], confidence: float) -> tuple[Values, Values]:
    """Efron's bias-corrected and accelerated interval; `resampled` are the sorted means [resamples, rows]."""
    count = len(resampled)
    means = values.mean(axis=1)
    # means that are equal but for rounding are equal, as many are of grades or of hits and misses
    rounding = 1e-12 * np.abs(values).max(axis=1)
    below, upto = (resampled < means - rounding).sum(axis=0), (resampled <= means + rounding).sum(axis=0)
    bias = special.ndtri((below + upto) / (2 * count))
    apart = values - means[:, None]
    acceleration = (apart**3).sum(axis=1) / (6 * (apart**2).sum(axis=1) ** 1.5)
    found = []
    for share in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + special.ndtri(share)
        place = special.ndtr(bias + shifted / (1 - acceleration * shifted)) * (count - 1)
        left = np.clip(np.floor(place).astype(int), 0, count - 1)
        right, columns = np.minimum(left + 1, count - 1), np.arange(len(means))
        found.append(resampled[left, columns] + (place - left) * (resampled[right, columns] - resampled[left, columns]))
    return found[0], found[1]


def _chunks(rows: NDArray[np.int64], resamples: int) -> Iterator[NDArray[np.int64]]:
    """Rows in groups whose resampled means fit into memory."""
    size = max(1, _MOST_AT_ONCE // resamples)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


_MOST_AT_ONCE = 10_000_000
"""Numbers that resampling holds at a time: 80 MB."""


def sign_flip_p(differences: Values, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p of paired differences under flips of their signs: exact where 2^n is at most `resamples`."""
    return float(sign_flip_ps(differences[None], resamples, seed)[0])


def sign_flip_ps(table: NDArray[np.float64], resamples: int = 9999, seed: int = 0) -> Values:
    """`sign_flip_p` of each row of [rows, cases]; rows with the same missing cases are flipped together."""
    found = np.full(len(table), np.nan)
    there = ~np.isnan(table)
    for rows in _alike(there):
        values = table[rows][:, there[rows[0]]]
        count = values.shape[1]
        if count < 2:
            continue
        exact, signs = 2**count <= resamples, _signs(count, resamples, seed)
        for chosen in _chunks(np.arange(len(rows)), len(signs)):
            sums = np.abs(values[chosen].sum(axis=1))
            flipped = np.abs(signs @ values[chosen].T)
            # sums that are equal but for rounding are equal
            more = (flipped >= sums - 1e-12 * np.abs(values[chosen]).sum(axis=1)).sum(axis=0)
            found[np.array(rows)[chosen]] = more / len(signs) if exact else (more + 1) / (len(signs) + 1)
    return found


def _alike(there: NDArray[np.bool_]) -> list[list[int]]:
    """Rows with the same cases, together."""
    groups: dict[bytes, list[int]] = {}
    for row, mask in enumerate(there):
        groups.setdefault(mask.tobytes(), []).append(row)
    return list(groups.values())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family, in its order; a NaN stays one and is no member."""
    adjusted = [float("nan")] * len(p_values)
    members = sorted((p, n) for n, p in enumerate(p_values) if not np.isnan(p))
    reached = 0.0
    for rank, (p, number) in enumerate(members):
        reached = max(reached, min(1.0, p * (len(members) - rank)))
        adjusted[number] = reached
    return adjusted


def compare(
    pairs: Mapping[str, NDArray[np.float64]],
    ranges: Mapping[str, tuple[float, float]],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    most_missing: float = 0.02,
) -> dict[str, list[Comparison]]:
    """Pairs of models by metric: `pairs` has of each metric the differences [pairs, cases], NaN where one of the two
    has no value, and `ranges` the least and most value of each metric. Holm's family is the metrics of a pair."""
    ps = {name: sign_flip_ps(table, resamples, seed) for name, table in pairs.items()}
    count = max((len(table) for table in pairs.values()), default=0)
    adjusted = [dict(zip(pairs, holm([float(ps[name][row]) for name in pairs]), strict=True)) for row in range(count)]
    found: dict[str, list[Comparison]] = {}
    for name, table in pairs.items():
        least, most = ranges[name]
        rows = estimates(table, confidence, resamples, seed, least - most, most - least)
        found[name] = [
            _compared(one, float(ps[name][row]), adjusted[row][name], confidence, most_missing)
            for row, one in enumerate(rows)
        ]
    return found


def _compared(one: Estimate, p: float, adjusted: float, confidence: float, most_missing: float) -> Comparison:
    bounds = [one.low, one.high]
    if one.share_missing > most_missing:
        bounds += [one.worst, one.best]
    shown = not np.isnan(adjusted) and adjusted < 1 - confidence and not np.isnan(one.low)
    verdict = int(min(bounds) > 0) - int(max(bounds) < 0) if shown else 0
    return Comparison(one, p, adjusted, verdict)


def ranking(means: Mapping[str, float]) -> list[str]:
    """Names from the highest mean to the lowest; those without one are left out."""
    return sorted((name for name, mean in means.items() if not np.isnan(mean)), key=lambda name: -means[name])


def kendall(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    """Kendall's tau-b between two rankings of the same models by their means; NaN with less than two in common."""
    names = [name for name in left if name in right and not np.isnan(left[name]) and not np.isnan(right[name])]
    if len(names) < 2:
        return float("nan")
    return float(stats.kendalltau([left[name] for name in names], [right[name] for name in names]).statistic)


Level = Literal["nominal", "ordinal", "interval", "ratio"]


def krippendorff_alpha(ratings: NDArray[np.float64], level: Level = "ordinal") -> float:
    """Agreement of raters: [raters, items] with NaN where one gave none; 1 is perfect, 0 is chance.

    NaN where no item has two ratings, or all ratings are one value.
    """
    import krippendorff

    rated = ratings[:, (~np.isnan(ratings)).sum(axis=0) >= 2]
    if not rated.size or len(np.unique(rated[~np.isnan(rated)])) < 2:
        return float("nan")
    return float(krippendorff.alpha(reliability_data=rated, level_of_measurement=level))


def smallest_difference(deviation: float, cases: int, confidence: float = 0.95, power: float = 0.8) -> float:
    """The difference of means that `cases` pairs, whose differences have a standard deviation, find with a power."""
    quantiles = stats.norm.ppf(1 - (1 - confidence) / 2) + stats.norm.ppf(power)
    return float(quantiles * deviation / np.sqrt(cases))


def as_plain(value: Any) -> Any:
    """JSON-ready, with None for NaN."""
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else float(value)
    if isinstance(value, dict):
        return {key: as_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(one) for one in value]
    return value
