"""What each row of an ablation adds to the row before it: paired differences over the same held-out cases.

A case's value is the mean over the seeds that a row was trained with, so that cases stay the unit. The interval of the
differences says what other cases would give; it says nothing of other seeds, of which there are few: a row is called
better only where the interval, the sign-flip test with Holm over the metrics, and each seed by itself agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from domainshuttle.platform.evaluation.statistics import Comparison, Values, compare

Measured = Mapping[str, Mapping[str, Values]]
"""Of a row: by run (one a seed) and metric, a value a case, all in one order; NaN where there is none."""


@dataclass(frozen=True)
class Step:
    """What a row has more than the row before, by one metric."""

    before: str
    row: str
    metric: str
    comparison: Comparison
    by_seed: tuple[float, ...]
    """The mean difference of each seed by itself."""

    @property
    def verdict(self) -> int:
        """1: more, -1: less, shown by the cases and by each seed; 0: not shown."""
        said = self.comparison.verdict
        return said if said and all(np.sign(one) == said for one in self.by_seed) else 0

    @property
    def text(self) -> str:
        """The verdict for people."""
        if self.verdict:
            return "more" if self.verdict > 0 else "less"
        return "the seeds disagree" if self.comparison.verdict else "no difference shown"


def steps_of(rows: Mapping[str, Measured], seed: int = 0) -> list[Step]:
    """Each row against the one before it, in their order, by every metric that both have.

    Runs of two rows are paired by their place: each is a list of the same seeds.
    """
    found = []
    for (before, old), (row, new) in pairwise(rows.items()):
        runs = list(zip(new.values(), old.values(), strict=True))
        shared = [name for name in next(iter(new.values())) if all(name in one for pair in runs for one in pair)]
        every = {name: [one[name] - other[name] for one, other in runs] for name in shared}
        # such as of an evaluation that was made before the metric
        differences = {name: parts for name, parts in every.items() if not np.isnan(_mean(parts)).all()}
        names = list(differences)
        tables = {name: _mean(parts)[None] for name, parts in differences.items()}
        ranges = {name: _range([one[name] for pair in runs for one in pair]) for name in names}
        compared = compare(tables, ranges, seed=seed)
        found += [
            Step(before, row, name, compared[name][0], tuple(float(np.nanmean(one)) for one in differences[name]))
            for name in names
        ]
    return found


def _mean(parts: Sequence[Values]) -> Values:
    """The mean over seeds of each case; NaN where a seed has none."""
    return np.stack(parts).mean(axis=0)


def _range(values: Sequence[Values]) -> tuple[float, float]:
    every = np.concatenate(values)
    known = every[~np.isnan(every)]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
