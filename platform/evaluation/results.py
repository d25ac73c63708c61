"""What an evaluation found: values by case, means with their intervals by split, and who is better than whom."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from math import isnan
from statistics import fmean
from typing import Any

import numpy as np

from domainshuttle.platform.evaluation.cases import SPLITS, EvaluationCase
from domainshuttle.platform.evaluation.config import EvaluationConfig
from domainshuttle.platform.evaluation.judges.pairs import PairJudge, PairResult
from domainshuttle.platform.evaluation.metrics.metric import Metric, Score
from domainshuttle.platform.evaluation.scoring import applies
from domainshuttle.platform.evaluation.sensitivity import Sensitivity, Verdict
from domainshuttle.platform.evaluation.statistics import Comparison, Estimate, Values, compare, estimates
from domainshuttle.platform.evaluation.store import ResultStore
from domainshuttle.platform.evaluation.videos import Clip, Column

ALL = "all"
"""The stratum of all cases."""


@dataclass(frozen=True)
class Cell:
    """What a metric found of a case in a column: a score a repeat."""

    scores: tuple[Score, ...]

    @cached_property
    def value(self) -> float:
        """The mean over repeats; NaN where none has a value."""
        values = [one.value for one in self.scores if one.value is not None]
        return fmean(values) if values else float("nan")

    @property
    def reason(self) -> str:
        """Why there is no value; empty where there is one."""
        if any(one.value is not None for one in self.scores):
            return ""
        return next((f"{one.state}: {one.reason}" for one in self.scores), "")


class Results:
    """The rows of an evaluation, as figures. `metrics` in the order of tables."""

    def __init__(
        self,
        config: EvaluationConfig,
        cases: Sequence[EvaluationCase],
        columns: Sequence[Column],
        clips: Sequence[Clip],
        metrics: Sequence[Metric[Any]],
        store: ResultStore,
        altered: ResultStore,
        pair_judge: PairJudge | None = None,
    ) -> None:
        self.config, self.cases, self.columns, self.metrics = config, list(cases), list(columns), list(metrics)
        self.clips: dict[tuple[str, str], list[Clip]] = {}
        for clip in clips:
            self.clips.setdefault((clip.column, clip.case), []).append(clip)
        self.pair_judge, self._every_clip = pair_judge, list(clips)
        self.tests = Sensitivity(config.sensitivity, cases, columns, clips, metrics, store, altered)
        self._measured = {metric.label: [case for case in cases if applies(metric, case)] for metric in metrics}
        self._cells: dict[tuple[str, str, str], Cell] = {}
        for metric in metrics:
            for case in self._measured[metric.label]:
                for column in columns:
                    scores = [
                        _score_of(case, clip, metric, store) for clip in self.clips.get((column.name, case.id), ())
                    ]
                    self._cells[column.name, metric.label, case.id] = Cell(tuple(scores))

    def cell(self, column: str, metric: str, case: str) -> Cell | None:
        """None where the metric is none of the case's."""
        return self._cells.get((column, metric, case))

    @cached_property
    def strata(self) -> list[str]:
        """All cases, and each split where there are several."""
        there = [split for split in SPLITS if any(case.split == split for case in self.cases)]
        return [ALL, *(there if len(there) > 1 else [])]

    def cases_of(self, metric: str, stratum: str) -> list[EvaluationCase]:
        """The cases of a stratum that a metric is measured on."""
        return [case for case in self._measured[metric] if stratum in (ALL, case.split)]

    def values(self, column: str, metric: str, stratum: str = ALL) -> Values:
        """The value of each case of a stratum; NaN where there is none."""
        return np.array(
            [self._cells[column, metric, case.id].value for case in self.cases_of(metric, stratum)], dtype=np.float64
        )

    @cached_property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        """By metric the least and the most value that any case of any column has."""
        known: dict[str, list[float]] = {metric.label: [] for metric in self.metrics}
        for (_, metric, _), cell in self._cells.items():
            if not isnan(cell.value):
                known[metric].append(cell.value)
        return {metric: (min(values), max(values)) if values else (0.0, 0.0) for metric, values in known.items()}

    @cached_property
    def estimates(self) -> dict[tuple[str, str, str], Estimate]:
        """By stratum, metric and column; of one that is void no more than how many cases have a value."""
        settings, found = self.config.statistics, {}
        for stratum in self.strata:
            for metric in self.metrics:
                if not self.cases_of(metric.label, stratum):
                    continue
                table = np.stack([self.values(column.name, metric.label, stratum) for column in self.columns])
                least, most = self._ranges[metric.label]
                rows = estimates(table, settings.confidence, settings.resamples, settings.seed, least, most)
                for column, one in zip(self.columns, rows, strict=True):
                    if (column.name, metric.label) in self.voids:
                        nan = float("nan")
                        one = replace(one, mean=nan, low=nan, high=nan, worst=nan, best=nan)
                    found[stratum, metric.label, column.name] = one
        return found

    @cached_property
    def comparisons(self) -> dict[tuple[str, str, str], dict[str, Comparison]]:
        """By stratum and two models, of each metric: how much more the first has; nothing where a value of the two is
        void. Controls are compared with theirs."""
        judged = [column.name for column in self.columns if column.judged]
        pairs = [*combinations(judged, 2), *((one.of, one.name) for one in self.columns if one.control)]
        settings = self.config.statistics
        found: dict[tuple[str, str, str], dict[str, Comparison]] = {}
        for stratum in self.strata:
            names = [metric.label for metric in self.metrics if self.cases_of(metric.label, stratum)]
            values = {
                (column.name, name): self.values(column.name, name, stratum)
                * (float("nan") if (column.name, name) in self.voids else 1.0)
                for column in self.columns for name in names
            }  # fmt: skip
            tables = {
                name: np.stack([values[left, name] - values[right, name] for left, right in pairs])
                for name in names if pairs
            }  # fmt: skip
            ranges = {name: self._ranges[name] for name in names}
            compared = compare(
                tables, ranges, settings.confidence, settings.resamples, settings.seed, settings.most_missing
            )
            for number, (left, right) in enumerate(pairs):
                found[stratum, left, right] = {name: compared[name][number] for name in names}
        return found

    @cached_property
    def voids(self) -> dict[tuple[str, str], str]:
        """By column and metric: why its scores may not be averaged."""
        found = {}
        for metric in self.metrics:
            for column in self.columns:
                scores = [
                    score for case in self.cases_of(metric.label, ALL)
                    for score in self._cells[column.name, metric.label, case.id].scores
                ]  # fmt: skip
                if scores and (why := metric.void(scores)):
                    found[column.name, metric.label] = why
        return found

    @cached_property
    def sensitivity(self) -> list[Verdict]:
        """What the tests say of the metrics."""
        return self.tests.verdicts()

    @cached_property
    def pairs(self) -> list[PairResult]:
        """Which of each two models a judge prefers; none where none was asked."""
        return [] if self.pair_judge is None else self.pair_judge.results(self.cases, self.columns, self._every_clip)

    def beside(self, column: str, metric: str, stratum: str = ALL) -> dict[str, float]:
        """The means of the numbers that stand beside a metric's value, over the cases of a stratum."""
        found: dict[str, list[float]] = {}
        for case in self.cases_of(metric, stratum):
            for score in self._cells[column, metric, case.id].scores:
                for name, value in score.beside.items():
                    found.setdefault(name, []).append(float(value))
        return {name: fmean(values) for name, values in found.items()}

    def failures(self) -> list[tuple[str, str, str, str]]:
        """Column, metric, case and reason of each value that is not there; of a case that has some of its clips' also
        of the others."""
        found = []
        for (column, metric, case), cell in self._cells.items():
            if isnan(cell.value):
                found.append((column, metric, case, cell.reason))
            else:
                found += [
                    (column, metric, case, f"clip {number} of {len(cell.scores)}: {one.state}: {one.reason}")
                    for number, one in enumerate(cell.scores, 1)
                    if one.value is None
                ]
        return found


def _score_of(case: EvaluationCase, clip: Clip, metric: Metric[Any], store: ResultStore) -> Score:
    if clip.failure:
        return Score("failed", reason=clip.failure)
    row = store.get((case.digest, clip.sha256, metric.digest))
    return row.score if row is not None else Score("failed", reason="not measured yet: run the evaluation again")


def summary(results: Results) -> dict[str, Any]:
    """All figures, JSON-ready."""
    from domainshuttle.platform.evaluation.statistics import as_plain

    return as_plain(
        {
            "name": results.config.name,
            "cases": dict(Counter(case.split for case in results.cases)),
            "metrics": {
                one.label: {"digest": one.digest, **_plain(one.decisions()), "hub_commits": dict(one.commits())}
                for one in results.metrics
            },
            "means": [
                {"stratum": stratum, "metric": metric, "column": column, **asdict(one)}
                for (stratum, metric, column), one in results.estimates.items()
            ],
            "comparisons": [
                {
                    "stratum": stratum, "left": left, "right": right, "metric": metric, "p": one.p,
                    "adjusted": one.adjusted, "verdict": one.verdict, **asdict(one.difference),
                }
                for (stratum, left, right), by_metric in results.comparisons.items()
                for metric, one in by_metric.items()
            ],
            "sensitivity": [asdict(one) for one in results.sensitivity],
            "pairs": [asdict(one) for one in results.pairs],
            "void": [{"column": c, "metric": m, "why": why} for (c, m), why in results.voids.items()],
            "failures": [
                {"column": c, "metric": m, "case": case, "reason": reason}
                for c, m, case, reason in results.failures()
            ],
        }
    )  # fmt: skip


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return found
