"""Measuring: what is missing of the rows of an evaluation is computed, each video decoded once for all its metrics."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.errors import DataError, counted, one_line
from domainshuttle.pipelines.media.decode import decode_image
from domainshuttle.pipelines.ray_tasks import each_by_actors
from domainshuttle.platform.console import progress, say
from domainshuttle.platform.evaluation.cases import EvaluationCase
from domainshuttle.platform.evaluation.config import ScoringPool
from domainshuttle.platform.evaluation.metrics.config import MetricsConfig
from domainshuttle.platform.evaluation.metrics.metric import (
    Metric,
    MetricCase,
    Models,
    Reference,
    Score,
    Video,
    Work,
)
from domainshuttle.platform.evaluation.stages import stages_of
from domainshuttle.platform.evaluation.store import ResultStore, Row
from domainshuttle.platform.evaluation.videos import Clip

_WORKS = 4
"""Videos that a worker holds at once: a metric that asks an endpoint works at them together."""


@dataclass(frozen=True)
class _Task:
    """A video to measure, and the metrics by their digest."""

    case: EvaluationCase
    path: Path
    video: str
    metrics: tuple[str, ...]


def metric_case(case: EvaluationCase) -> MetricCase:
    """What metrics see of a case, its pictures decoded. Raises DataError for one that can't be."""
    return MetricCase(
        case.id,
        case.prompt,
        tuple(
            Reference(
                decode_image(one.path.read_bytes(), one.path.name),
                one.label,
                one.subject,
                one.domain >= 0 and DOMAINS[one.domain] == "background",
                DOMAINS[one.domain] if one.domain >= 0 else "",
                one.edit_prompt,
            )
            for one in case.references
        ),
        case.split,
    )


def applies(metric: Metric[Any], case: EvaluationCase) -> bool:
    """Whether a metric is one of a case's, which needs no picture to be decoded."""
    return metric.applies(MetricCase(case.id, case.prompt, (), case.split))


def score_missing(
    cases: Sequence[EvaluationCase],
    clips: Sequence[Clip],
    config: MetricsConfig,
    store: ResultStore,
    pool: ScoringPool | None,
    folder: Path,
    again: bool = False,
) -> int:
    """Computes the rows of clips that are not in the store; returns how many. Raises what a metric's `check` does, and
    StorageError where an endpoint or a store is away: what was measured stays."""
    metrics = config.build()
    by_id = {case.id: case for case in cases}
    tasks, seen = [], set()
    for clip in clips:
        case = by_id[clip.case]
        if not clip.sha256 or (case.digest, clip.sha256) in seen:
            continue
        seen.add((case.digest, clip.sha256))
        keys = [(case.digest, clip.sha256, metric.digest) for metric in metrics if applies(metric, case)]
        if wanted := store.missing(keys, again):
            tasks.append(_Task(case, clip.path, clip.sha256, tuple(metric for _, _, metric in wanted)))
    if not tasks:
        return 0
    digests = {digest for task in tasks for digest in task.metrics}
    wanted_metrics = [metric for metric in metrics if metric.digest in digests]
    for metric in wanted_metrics:
        metric.check()
    failed: list[Row] = []
    done, count = 0, sum(len(task.metrics) for task in tasks)
    with progress("Measuring", "values") as show:
        show(0, count)
        for stage in stages_of(wanted_metrics, pool):
            chosen = [replace(task, metrics=of) for task in tasks if (of := stage.of(task.metrics))]
            batches = [chosen[start : start + _WORKS] for start in range(0, len(chosen), _WORKS)]
            for batch, rows in each_by_actors(_Scorer, (config, folder), batches, stage.pool):
                if isinstance(rows, Exception):
                    reason = f"the worker that measured it died each time: {one_line(rows)}"
                    names = {metric.digest: metric.label for metric in metrics}
                    rows = [_failed(task, digest, names[digest], reason) for task in batch for digest in task.metrics]
                store.add(rows)
                failed += [row for row in rows if row.score.state == "failed"]
                done += len(rows)
                show(done, count)
    _say_failures(failed)
    return done


def _say_failures(rows: Iterable[Row]) -> None:
    """Says how many values each metric failed to give, and the reason of most."""
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        reasons.setdefault(row.name, Counter())[row.score.reason] += 1
    for name, kinds in reasons.items():
        ((reason, _),) = kinds.most_common(1)
        say(f"{name}: {counted(kinds.total(), 'value')} failed, such as: {reason}")


def device_of_process() -> str:
    """Where a worker's models run: on the GPU that Ray gave it, where it did."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Scorer:
    """Measures with metrics whose models are loaded once."""

    def __init__(self, config: MetricsConfig, folder: Path) -> None:
        models = Models(device_of_process(), folder)
        self.metrics = {metric.digest: metric for metric in config.build(models)}

    def __call__(self, tasks: list[_Task]) -> list[Row]:
        rows: list[Row] = []
        works: list[tuple[_Task, Work]] = []
        for task in tasks:
            try:
                works.append((task, Work(metric_case(task.case), Video.read(task.path))))
            except DataError as error:
                reason = one_line(error)
                rows += [_failed(task, one, self.metrics[one].label, reason) for one in task.metrics]
        for digest, metric in self.metrics.items():
            chosen = [(task, work) for task, work in works if digest in task.metrics]
            began = time.perf_counter()
            for (task, _), score in zip(chosen, metric.score_all([work for _, work in chosen]), strict=True):
                now = time.perf_counter()
                rows.append(Row(task.case.digest, task.video, digest, metric.label, score, now - began))
                began = now
        return rows


def _failed(task: _Task, digest: str, name: str, reason: str) -> Row:
    return Row(task.case.digest, task.video, digest, name, Score("failed", reason=reason))
