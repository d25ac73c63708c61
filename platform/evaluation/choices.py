"""What would change the outcome: the open choices of the metrics, and the judges among themselves.

A metric with other choices (`metrics.variants`: another CLIP, another editor, another normalisation or rule for
missing subjects) is measured beside the one of the table. Here the models are ranked by each, and where a case has no
value also with it as the least and as the most: a winner that changes says that the choice decides, not the models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from domainshuttle.platform.evaluation.metrics.metric import Metric
from domainshuttle.platform.evaluation.results import ALL, Results
from domainshuttle.platform.evaluation.statistics import kendall, krippendorff_alpha, ranking


@dataclass(frozen=True)
class Choice:
    """The ranking of the models by a metric under one of its choices."""

    metric: str
    choice: str
    winner: str
    """The model with the highest mean; empty where none has a value."""
    ranking: tuple[str, ...]
    tau: float
    """Kendall's tau-b with the ranking of the table; NaN with less than two models."""
    changes: bool
    """Whether another model wins than in the table."""


def choices_of(results: Results) -> list[Choice]:
    """For each metric the table's ranking first, then those under other choices."""
    judged = [column.name for column in results.columns if column.judged]
    found = []
    for metric in results.metrics:
        if metric.variant or len(judged) < 2 or not results.cases_of(metric.label, ALL):
            continue
        base = {name: results.estimates[ALL, metric.label, name].mean for name in judged}
        others = {"as in the table": base}
        if any(results.estimates[ALL, metric.label, name].missing for name in judged):
            others["cases without a value as the least"] = {
                name: results.estimates[ALL, metric.label, name].worst for name in judged
            }
            others["cases without a value as the most"] = {
                name: results.estimates[ALL, metric.label, name].best for name in judged
            }
        for other in results.metrics:
            if other.variant and other.name == metric.name and results.cases_of(other.label, ALL):
                means = {name: results.estimates[ALL, other.label, name].mean for name in judged}
                others[f"{other.variant}: {differing_choices(metric, other)}"] = means
        if len(others) < 2:
            continue
        first = next(iter(ranking(base)), "")
        for choice, means in others.items():
            order = ranking(means)
            winner = next(iter(order), "")
            found.append(Choice(metric.title, choice, winner, tuple(order), kendall(base, means), winner != first))
    return found


def differing_choices(metric: Metric[Any], other: Metric[Any]) -> str:
    """The choices of `other` that are not those of `metric`."""
    ours, theirs = (one.decisions() for one in (metric, other))
    flat = [
        f"{key} {value}"
        for key, value in {**theirs.get("choices", {}), **theirs.get("weights", {})}.items()
        if {**ours.get("choices", {}), **ours.get("weights", {})}.get(key) != value
    ]
    return ", ".join(flat) or "the same choices"


@dataclass(frozen=True)
class JudgePair:
    """How much two judges of one question agree."""

    question: str
    first: str
    second: str
    items: int
    """Clips that both graded."""
    alpha: float
    """Krippendorff's, of the grades of a clip, as intervals."""
    tau: float
    """Kendall's tau-b of the models' rankings."""


def judges_of(results: Results) -> list[JudgePair]:
    """Each two judges that were asked one question."""
    by_question: dict[str, list[Metric[Any]]] = {}
    for metric in results.metrics:
        if (question := getattr(metric, "question", None)) is not None:
            by_question.setdefault(str(question), []).append(metric)
    found = []
    for question, metrics in by_question.items():
        for first, second in combinations(metrics, 2):
            grades = np.array([_grades(results, one) for one in (first, second)])
            both = ~np.isnan(grades).any(axis=0)
            means = [_means(results, one) for one in (first, second)]
            found.append(
                JudgePair(
                    question.replace("_", " "), title_of(first), title_of(second), int(both.sum()),
                    krippendorff_alpha(grades, "interval"), kendall(*means),
                )
            )  # fmt: skip
    return found


def title_of(metric: Metric[Any]) -> str:
    """A metric's name for people; two of one kind have different ones."""
    return f"{metric.title} ({metric.variant})" if metric.variant else metric.title


def _grades(results: Results, metric: Metric[Any]) -> list[float]:
    """A grade a clip, before any normalisation, in one order for all judges."""
    columns: Sequence[str] = [column.name for column in results.columns if column.judged]
    grades = []
    for case in results.cases:
        for column in columns:
            cell = results.cell(column, metric.label, case.id)
            scores = [one for one in cell.scores if one.value is not None] if cell else []
            raw = [one.beside.get("raw", one.value or 0.0) for one in scores]
            grades.append(float(np.mean(raw)) if raw else float("nan"))
    return grades


def _means(results: Results, metric: Metric[Any]) -> dict[str, float]:
    found = {}
    for column in results.columns:
        one = results.estimates.get((ALL, metric.label, column.name))
        if column.judged and one is not None:
            found[column.name] = one.mean
    return found
