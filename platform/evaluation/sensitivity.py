"""Sensitivity tests: does a metric measure what its name says? They run with every evaluation.

Each takes real cases and videos of the evaluation and alters one thing: the references are those of another case, the
frames are shuffled, half of them lose the subject. A metric says beforehand what must happen to its value
(`Metric.expectations`); one that does something else is flagged in the report. Tests use the real clips where there are
any, since a model that shows no subject is not the metric's fault, and else the videos of the first model.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter
from scipy.stats import binomtest

from domainshuttle.model.pictures import Pixels, fit_reference
from domainshuttle.pipelines.errors import DataError, counted, one_line
from domainshuttle.pipelines.media.decode import encode_mp4, opened_clip, shown_frames
from domainshuttle.pipelines.ray_tasks import each_by_actors
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import progress
from domainshuttle.platform.evaluation.cases import EvaluationCase
from domainshuttle.platform.evaluation.config import ScoringPool, SensitivitySettings
from domainshuttle.platform.evaluation.metrics.config import MetricsConfig
from domainshuttle.platform.evaluation.metrics.metric import (
    Direction,
    Metric,
    MetricCase,
    Models,
    Reference,
    Score,
    Trial,
    Video,
    Work,
)
from domainshuttle.platform.evaluation.scoring import applies, device_of_process, metric_case
from domainshuttle.platform.evaluation.stages import Stage, stages_of
from domainshuttle.platform.evaluation.store import ResultStore, Row, RowKey
from domainshuttle.platform.evaluation.videos import REAL, Clip, Column

_VERSION = 1
"""Of the alterations: it rises whenever one of them gives other pixels."""
_OF_TWO: frozenset[Trial] = frozenset({"other_reference", "other_prompt"})
"""Tests that take something from another case."""


@dataclass(frozen=True)
class Verdict:
    """What a test says of a metric."""

    metric: str
    trial: Trial
    expected: Direction
    state: Literal["passed", "failed", "undecided"]
    cases: int
    own: float
    """Mean of the cases as they are."""
    altered: float
    """Mean of the same cases altered."""
    hits: float
    """Share of cases that did what was expected; ties count half."""
    auc: float
    """Chance that a case as it is has more than an altered one, any two of them."""
    reason: str


@dataclass(frozen=True)
class _Task:
    """A case and its video, with the tests to make of it: metrics by test."""

    case: EvaluationCase
    partner: EvaluationCase | None
    path: Path
    video: str
    trials: Mapping[Trial, tuple[str, ...]]


def _only(task: _Task, stage: Stage) -> _Task:
    """What of a task is a stage's."""
    return replace(task, trials={trial: of for trial, metrics in task.trials.items() if (of := stage.of(metrics))})


def choose_column(columns: Sequence[Column], settings: SensitivitySettings) -> Column | None:
    """Whose videos the tests take; None where there is none. Raises ConfigError where those that are wanted are not
    there."""
    named = {column.name: column for column in columns}
    if settings.column and settings.column not in named:
        there = ", ".join(named)
        raise ConfigError(f"sensitivity.column={settings.column}: there is no model of that name, there are: {there}")
    judged = (column for column in columns if column.judged)
    return named.get(settings.column or REAL, next(judged, None))


class Sensitivity:
    """The tests of an evaluation's metrics, on the videos of one column."""

    def __init__(
        self,
        settings: SensitivitySettings,
        cases: Sequence[EvaluationCase],
        columns: Sequence[Column],
        clips: Sequence[Clip],
        metrics: Sequence[Metric[Any]],
        store: ResultStore,
        altered: ResultStore,
    ) -> None:
        self.settings, self.metrics, self.store = settings, list(metrics), store
        self.altered = altered
        """Rows of altered cases, apart from those of the evaluation."""
        self.column = choose_column(columns, settings)
        self._columns = list(columns)
        self._cases = {case.id: case for case in cases}
        self._clips = {(clip.column, clip.case): clip for clip in clips if clip.repeat == 0 and clip.sha256}

    def measure(self, config: MetricsConfig, folder: Path, pool: ScoringPool | None, again: bool = False) -> int:
        """Computes the rows that are missing, and `again` those that failed; returns how many. Raises what scoring
        does."""
        tasks, count = list(self._tasks(again)), 0
        total = sum(len(metrics) for task in tasks for metrics in task.trials.values())
        if not tasks:
            return 0
        digests = {one for task in tasks for metrics in task.trials.values() for one in metrics}
        labels = {metric.digest: metric.label for metric in self.metrics}
        with progress("Testing the metrics", "values") as show:
            show(0, total)
            for stage in stages_of([metric for metric in self.metrics if metric.digest in digests], pool):
                chosen = [task for one in tasks if (task := _only(one, stage)).trials]
                for task, rows in each_by_actors(_Tester, (config, folder, self.settings), chosen, stage.pool):
                    if isinstance(rows, Exception):
                        reason = f"the worker that measured it died each time: {one_line(rows)}"
                        rows = [
                            Row(*_key(task.case, task.partner, task.video, trial, digest, self.settings),
                                labels[digest], Score("failed", reason=reason))
                            for trial, digests in task.trials.items() for digest in digests
                        ]  # fmt: skip
                    self.altered.add(rows)
                    count += len(rows)
                    show(count, total)
        return count

    def verdicts(self) -> list[Verdict]:
        """What the rows say, for each metric and test."""
        found = []
        for metric in self.metrics:
            for trial, expected in metric.expectations().items():
                pairs = self._floors(metric) if trial == "no_references" else self._pairs(metric, trial)
                own, altered = np.array(pairs, np.float64).reshape(-1, 2).T
                found.append(judge_trial(metric.label, trial, expected, own, altered, self.settings))
        return found

    def _chosen(self, metric: Metric[Any]) -> list[tuple[EvaluationCase, Clip]]:
        """The cases that a metric is tested on: the same whatever else there is."""
        if self.column is None:
            return []
        there = [
            (case, clip)
            for case in self._cases.values()
            if applies(metric, case) and (clip := self._clips.get((self.column.name, case.id))) is not None
        ]
        return sorted(there, key=lambda one: one[0].digest)[: self.settings.cases]

    @cached_property
    def _partners(self) -> dict[str, EvaluationCase]:
        """Of a case by its id the case after it of its split, with references: of the same words where there is one."""
        found, words = {}, {one.id: set(one.labels) - {""} for one in self._cases.values()}
        for split in {one.split for one in self._cases.values()}:
            ring = sorted((one for one in self._cases.values() if one.split == split), key=lambda one: one.digest)
            for place, case in enumerate(ring):
                after = [one for one in ring[place + 1 :] + ring[:place] if one.references]
                alike = (one for one in after if words[one.id] & words[case.id])
                if after:
                    found[case.id] = next(alike, after[0])
        return found

    def _tasks(self, again: bool) -> Iterator[_Task]:
        wanted: dict[str, tuple[EvaluationCase, Clip, dict[Trial, list[str]]]] = {}
        for metric in self.metrics:
            for case, clip in self._chosen(metric):
                for trial in metric.expectations():
                    if trial == "no_references" or (trial in _OF_TWO and case.id not in self._partners):
                        continue
                    key = _key(case, self._partners.get(case.id), clip.sha256, trial, metric.digest, self.settings)
                    if self.altered.missing([key], again):
                        of_case = wanted.setdefault(case.id, (case, clip, {}))
                        of_case[2].setdefault(trial, []).append(metric.digest)
        for case, clip, trials in wanted.values():
            fixed: dict[Trial, tuple[str, ...]] = {trial: tuple(digests) for trial, digests in trials.items()}
            yield _Task(case, self._partners.get(case.id), clip.path, clip.sha256, fixed)

    def _pairs(self, metric: Metric[Any], trial: Trial) -> list[tuple[float, float]]:
        """The value of each case as it is, and altered; of those that have both."""
        pairs = []
        for case, clip in self._chosen(metric):
            own = self.store.get((case.digest, clip.sha256, metric.digest))
            key = _key(case, self._partners.get(case.id), clip.sha256, trial, metric.digest, self.settings)
            altered = self.altered.get(key)
            if own and altered and own.score.value is not None and altered.score.value is not None:
                pairs.append((own.score.value, altered.score.value))
        return pairs

    def _floors(self, metric: Metric[Any]) -> list[tuple[float, float]]:
        """The values of a model's videos, and of its videos that were made without references."""
        floor = next((one for one in self._columns if one.control == "none"), None)
        pairs = []
        for case in self._cases.values() if floor else ():
            assert floor is not None
            clips = self._clips.get((floor.of, case.id)), self._clips.get((floor.name, case.id))
            rows = [self.store.get((case.digest, clip.sha256, metric.digest)) for clip in clips if clip]
            values = [row.score.value for row in rows if row and row.score.value is not None]
            if len(values) == 2:
                pairs.append((values[0], values[1]))
        return pairs


def judge_trial(
    metric: str, trial: Trial, expected: Direction, own: Any, altered: Any, settings: SensitivitySettings
) -> Verdict:
    """Whether the values [cases] of a metric did what is expected when the cases were altered."""
    count = len(own)
    if not count:
        nan = float("nan")
        why = "no case has both values"
        if trial == "no_references":
            why = "no clips without references: add `none` to controls"
        return Verdict(metric, trial, expected, "undecided", 0, nan, nan, nan, nan, why)
    means = float(own.mean()), float(altered.mean())
    gap = altered - own if expected == "ceiling" else own - altered
    wins = (gap > 1e-9).astype(float) + 0.5 * (np.abs(gap) <= 1e-9)
    table = own[:, None] - altered[None, :]
    auc = float(((table > 1e-9) + 0.5 * (np.abs(table) <= 1e-9)).mean())
    if expected == "same":
        moved = means[1] - means[0]
        hits, passed = float((np.abs(gap) <= settings.tolerance).mean()), abs(moved) <= settings.tolerance
        reason = f"the mean moved by {moved:+.4f}; at most {settings.tolerance:g} is the same"
    elif expected == "halves":
        ratio = means[1] / means[0] if means[0] > 1e-9 else float("nan")
        hits, passed = float(wins.mean()), abs(ratio - 0.5) <= settings.halves_within
        reason = f"{ratio:.2f} of the mean is left; 0.5 was expected, within {settings.halves_within:g}"
    else:
        if expected == "ceiling":  # an equal value is at the ceiling too
            wins = (gap >= -1e-9).astype(float)
        hits = float(wins.mean())
        p = float(binomtest(int(np.floor(wins.sum())), count, 0.5, alternative="greater").pvalue)
        passed = p < settings.level
        done = "reached the case's own value or more" if expected == "ceiling" else "fell"
        chance = f"= {p:.3f}" if p >= 0.0005 else "< 0.001"
        reason = f"{wins.sum():g} of {counted(count, 'case')} {done} (sign test p {chance})"
    if count < settings.least_cases:
        return Verdict(
            metric, trial, expected, "undecided", count, *means, hits, auc, f"only {counted(count, 'case')}; {reason}"
        )
    return Verdict(metric, trial, expected, "passed" if passed else "failed", count, *means, hits, auc, reason)


def altered_work(
    trial: Trial, work: Work, partner: MetricCase | None, settings: SensitivitySettings, edits: Sequence[Pixels] = ()
) -> Work | None:
    """A case and its video with one thing altered; None where the test can't be made of this case.

    `edits`: the edited references, for `still_edit`.
    """
    case, frames = work.case, work.video.frames
    random = np.random.default_rng(list(hashlib.sha256(f"{case.id}\0{trial}".encode()).digest()[:8]))
    if trial in _OF_TWO:
        if partner is None:
            return None
        if trial == "other_prompt":
            return Work(replace(case, prompt=partner.prompt), work.video)
        others = [one for one in partner.references if not one.background] or list(partner.references)
        if not others or not case.references:
            return None
        # what is looked for in the video stays, so that it is found and compared with another's picture
        swapped = tuple(
            one if one.background else _shown_as(one, others[number % len(others)])
            for number, one in enumerate(case.references)
        )
        return Work(replace(case, references=swapped), work.video)
    if trial in ("still_reference", "still_edit"):
        shown = [one.picture for one in case.references if not one.background] if trial == "still_reference" else edits
        return Work(case, _video(work.video, _still(list(shown), frames.shape))) if shown else None
    changed = {
        "shuffled": lambda: frames[_order(len(frames), random)],
        "blurred": lambda: _blurred(frames, settings.blur),
        "noisy": lambda: _noisy(frames, settings.noise, random),
        "half_without_subject": lambda: _without(frames),
        "recompressed": lambda: _coded_again(frames, work.video.fps, settings.crf),
    }[trial]()
    return Work(case, _video(work.video, changed))


def _shown_as(one: Reference, other: Reference) -> Reference:
    return replace(one, picture=other.picture, edit_prompt=other.edit_prompt or one.edit_prompt)


def _video(video: Video, frames: Pixels) -> Video:
    return Video(frames, video.fps, hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest())


def _still(pictures: list[Pixels], shape: tuple[int, ...]) -> Pixels:
    """Pictures side by side on white, as often as there are frames."""
    count, height, width, _ = shape
    edges = np.linspace(0, width, len(pictures) + 1).astype(int)
    parts = [
        fit_reference(one, height, max(1, int(right - left)))
        for one, left, right in zip(pictures, edges[:-1], edges[1:], strict=True)
    ]
    return np.repeat(np.concatenate(parts, axis=1)[None, :, :width], count, axis=0)


def _order(count: int, random: np.random.Generator) -> Any:
    """An order that is not the one from first to last."""
    order = random.permutation(count)
    return order if count < 2 or (order != np.arange(count)).any() else np.roll(order, 1)


def _blurred(frames: Pixels, share: float) -> Pixels:
    radius = max(0.5, share * min(frames.shape[1:3]))
    return np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in frames])


def _noisy(frames: Pixels, deviation: float, random: np.random.Generator) -> Pixels:
    made = np.empty_like(frames)
    for number, frame in enumerate(frames):
        levels = frame + random.normal(0, deviation, frame.shape)
        made[number] = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return made


def _without(frames: Pixels) -> Pixels:
    """The second half of the frames in the mean colour of the video: nothing is to be found there."""
    made, half = frames.copy(), (len(frames) + 1) // 2
    made[half:] = np.rint(frames.reshape(-1, 3).mean(0)).astype(np.uint8)
    return made


def _coded_again(frames: Pixels, fps: float, crf: int) -> Pixels:
    """Through H.264 once more; a last odd row or column is left out, which its pixel format has not."""
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with opened_clip(encode_mp4(even, fps or 24.0, crf), "recompressed") as clip:
        return np.stack(list(shown_frames(clip)))


def _key(
    case: EvaluationCase, partner: EvaluationCase | None, video: str, trial: Trial, metric: str,
    settings: SensitivitySettings,
) -> RowKey:  # fmt: skip
    """Of an altered case's row: what was altered is part of the case's and the video's digest."""
    amounts = {"blurred": settings.blur, "noisy": settings.noise, "recompressed": settings.crf}.get(trial, "")
    other = partner.digest if partner is not None and trial in _OF_TWO else ""
    return f"{case.digest}+{trial}{amounts}.v{_VERSION}{other}", video, metric


class _Tester:
    """Measures altered cases with metrics whose models are loaded once."""

    def __init__(self, config: MetricsConfig, folder: Path, settings: SensitivitySettings) -> None:
        self.metrics = {metric.digest: metric for metric in config.build(Models(device_of_process(), folder))}
        self.settings = settings

    def __call__(self, task: _Task) -> list[Row]:
        try:
            work = Work(metric_case(task.case), Video.read(task.path))
            partner = metric_case(task.partner) if task.partner is not None else None
        except DataError as error:
            failed = Score("failed", reason=one_line(error))
            return [self._row(task, trial, one, failed) for trial, metrics in task.trials.items() for one in metrics]
        rows = []
        for trial, digests in task.trials.items():
            for digest in digests:
                rows.append(self._row(task, trial, digest, self._score(self.metrics[digest], trial, work, partner)))
        return rows

    def _score(self, metric: Metric[Any], trial: Trial, work: Work, partner: MetricCase | None) -> Score:
        def make() -> Work | None:
            edits = metric.edited_references(work.case) if trial == "still_edit" else ()
            return altered_work(trial, work, partner, self.settings, edits)

        key = ("altered", trial, metric.digest if trial == "still_edit" else "")
        altered = work.once(key, make)
        return metric.score(altered) if altered else Score("missing", reason="the test can't be made of this case")

    def _row(self, task: _Task, trial: Trial, digest: str, score: Score) -> Row:
        return Row(
            *_key(task.case, task.partner, task.video, trial, digest, self.settings), self.metrics[digest].label, score
        )
