"""Pairs: which of two models' videos carries a reference better? Each is asked in both orders.

Shown are the reference, a frame of the one video, the same frame of the other, and the caption. A verdict that depends
on the order is a tie. A case's preference is the mean of its verdicts, 1 for the first model, -1 for the second; a
model wins a case whose preference is on its side, and a sign test over the cases that somebody wins says whether more
than chance is in it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from domainshuttle.pipelines.endpoints.client import Answer, ChatClient, Question
from domainshuttle.pipelines.errors import DataError, one_line
from domainshuttle.platform.console import progress
from domainshuttle.platform.evaluation.cases import EvaluationCase
from domainshuttle.platform.evaluation.judges.judge import picture_bytes
from domainshuttle.platform.evaluation.judges.prompts import PAIR, Preference
from domainshuttle.platform.evaluation.metrics.choices import PairChoices
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Score, Video, frame_numbers
from domainshuttle.platform.evaluation.scoring import metric_case
from domainshuttle.platform.evaluation.store import ResultStore, Row, RowKey
from domainshuttle.platform.evaluation.videos import Clip, Column

_CASES_AT_ONCE = 4
_CODE_VERSION = 1


@dataclass(frozen=True)
class PairResult:
    """How often each of two models is preferred."""

    left: str
    right: str
    cases: int
    wins: int
    """Cases that the left model wins."""
    losses: int
    ties: int
    preference: float
    """Mean over cases, 1 to -1."""
    order_dependent: float
    """Share of the questions whose verdict depended on the order."""
    missing: int
    p: float
    """Of a two-sided sign test over the cases that are won."""


class PairJudge:
    """Compares the videos of each two models, with answers and rows that are kept."""

    def __init__(self, choices: PairChoices, folder: Path) -> None:
        self.choices, self.folder = choices, folder
        self.store = ResultStore(folder / "pairs")

    @property
    def digest(self) -> str:
        """Of all that decides a verdict."""
        endpoint = self.choices.endpoint
        decisions = {
            "code": _CODE_VERSION, "prompt": PAIR.id,
            "choices": self.choices.model_dump(mode="json", exclude={"endpoint", "cases"}),
            "model": endpoint.model, "temperature": endpoint.temperature, "seed": endpoint.seed,
            "answers": endpoint.answers, "json_form": endpoint.json_form,
        }  # fmt: skip
        return hashlib.blake2b(json.dumps(decisions, sort_keys=True).encode(), digest_size=16).hexdigest()

    def measure(
        self, cases: Sequence[EvaluationCase], columns: Sequence[Column], clips: Sequence[Clip], again: bool = False
    ) -> int:
        """Asks what is missing, and `again` what failed; returns how many cases were compared. Raises EndpointError,
        CostLimitError."""
        wanted = [
            (case, left, right)
            for case, left, right in self._pairs(cases, columns, clips)
            if self.store.missing([self._key(case, left, right)], again)
        ]
        if not wanted:
            return 0
        with (
            ChatClient(self.choices.endpoint, self.folder / "answers") as client,
            ThreadPoolExecutor(_CASES_AT_ONCE, "pairs") as pool,
            progress("Comparing pairs", "cases") as show,
        ):
            show(0, len(wanted))
            for start in range(0, len(wanted), _CASES_AT_ONCE):
                batch = wanted[start : start + _CASES_AT_ONCE]
                self.store.add(pool.map(lambda one: self._row(client, *one), batch))
                show(start + len(batch), len(wanted))
        return len(wanted)

    def results(
        self, cases: Sequence[EvaluationCase], columns: Sequence[Column], clips: Sequence[Clip]
    ) -> list[PairResult]:
        """What the rows say of each two models of which any case is compared; a case without a row is missing."""
        found: dict[tuple[str, str], list[Score]] = {}
        for case, left, right in self._pairs(cases, columns, clips):
            row = self.store.get(self._key(case, left, right))
            if row is not None:
                found.setdefault((left.column, right.column), []).append(row.score)
        whole = sum(self._chosen(case) for case in cases)
        return [summed(left, right, scores, whole) for (left, right), scores in found.items()]

    def _chosen(self, case: EvaluationCase) -> bool:
        wanted = self.choices.cases
        return wanted == "all" or case.cross_domain == (wanted == "cross_domain")

    def _pairs(
        self, cases: Sequence[EvaluationCase], columns: Sequence[Column], clips: Sequence[Clip]
    ) -> Iterator[tuple[EvaluationCase, Clip, Clip]]:
        by_place = {(clip.column, clip.case): clip for clip in clips if clip.repeat == 0 and clip.sha256}
        for left, right in combinations([column.name for column in columns if column.judged], 2):
            for case in filter(self._chosen, cases):
                one, other = by_place.get((left, case.id)), by_place.get((right, case.id))
                if one is not None and other is not None:
                    yield case, one, other

    def _key(self, case: EvaluationCase, left: Clip, right: Clip) -> RowKey:
        return case.digest, f"{left.sha256}+{right.sha256}", self.digest

    def _row(self, client: ChatClient, case: EvaluationCase, left: Clip, right: Clip) -> Row:
        try:
            shown = metric_case(case)
            score = compare(client, self.choices, shown, Video.read(left.path), Video.read(right.path))
        except DataError as error:
            score = Score("failed", reason=one_line(error))
        return Row(*self._key(case, left, right), "pairs", score)


def compare(client: ChatClient, choices: PairChoices, case: MetricCase, left: Video, right: Video) -> Score:
    """The preference of a case: 1 where `left` is better in every question, -1 where `right` is."""
    references = [one for one in case.references if not one.background]
    if not references:
        return Score("missing", reason="the case has no reference of a subject")
    side = choices.most_side
    shown = [
        [picture_bytes(video.frames[number], side) for number in frame_numbers(len(video.frames), choices.frames)]
        for video in (left, right)
    ]
    asked = [
        (place, frame, repeat)
        for place in range(len(references))
        for frame in range(choices.frames)
        for repeat in range(choices.repeats)
    ]
    pictures = [picture_bytes(one.picture, side) for one in references]

    def questions() -> Iterator[Question]:
        for place, frame, repeat in asked:
            one = references[place]
            text = PAIR.filled(case.prompt, one.word, one.domain)
            for first, second in ((0, 1), (1, 0)):
                both = pictures[place], shown[first][frame], shown[second][frame]
                yield Question(PAIR.id, PAIR.system, text, Preference, both, repeat)

    answers = list(client.ask_all(questions()))
    rows: list[dict[str, Any]] = []
    for (place, frame, repeat), forward, backward in zip(asked, answers[::2], answers[1::2], strict=True):
        verdict, dependent = verdict_of(forward, backward)
        rows.append(
            {"reference": place, "frame": frame, "repeat": repeat, "verdict": verdict, "order_dependent": dependent,
             "raw": [forward.raw, backward.raw], "answers": [forward.digest, backward.digest]}
        )  # fmt: skip
    details = {"answers": dict(Counter(answer.state for answer in answers)), "asked": rows}
    verdicts = [row["verdict"] for row in rows if row["verdict"] is not None]
    if not verdicts:
        reason = next(answer.reason for answer in answers if answer.state != "answered")
        return Score("failed", reason=f"no question was answered in both orders, such as: {reason}", details=details)
    dependent_share = sum(row["order_dependent"] for row in rows if row["verdict"] is not None) / len(verdicts)
    return Score("measured", float(np.mean(verdicts)), beside={"order_dependent": dependent_share}, details=details)


def verdict_of(forward: Answer, backward: Answer) -> tuple[int | None, bool]:
    """1 for the first video, -1 for the second, 0 for a tie, None where one order has no answer; and whether the
    verdict depends on the order."""
    if forward.state != "answered" or backward.state != "answered":
        return None, False
    sides = {"first": 1, "second": -1, "neither": 0}
    one, other = sides[forward.value.better], -sides[backward.value.better]
    return (one, False) if one == other else (0, True)


def summed(left: str, right: str, scores: Sequence[Score], whole: int) -> PairResult:
    """The cases of two models counted, of `whole` that there are."""
    values = np.array([one.value for one in scores if one.value is not None])
    wins, losses = int((values > 1e-9).sum()), int((values < -1e-9).sum())
    p = float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0
    dependent = [one.beside["order_dependent"] for one in scores if "order_dependent" in one.beside]
    return PairResult(
        left, right, len(values), wins, losses, len(values) - wins - losses,
        float(values.mean()) if len(values) else 0.0, float(np.mean(dependent)) if dependent else 0.0,
        whole - len(values), p,
    )  # fmt: skip
