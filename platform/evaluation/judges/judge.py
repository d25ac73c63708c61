"""CD-Score and Qwen-Score: a vision-language model grades each frame against each reference, 1 to 5.

Shown are the reference, one frame and the caption; the answer is a number and nothing else. A case's raw score is the
mean over references, frames and repeats. An answer is one of three: a grade, a refusal, or unparsable: the last two are
counted and never a low grade, and where they are too many of all, the metric is void for the model.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from domainshuttle.pipelines.endpoints.client import Answer, ChatClient, Question
from domainshuttle.pipelines.media.decode import Pixels, encode_jpeg
from domainshuttle.platform.evaluation.judges.digits import expected_grade
from domainshuttle.platform.evaluation.judges.prompts import QUESTIONS, Grade, QuestionName
from domainshuttle.platform.evaluation.metrics.choices import JudgeChoices
from domainshuttle.platform.evaluation.metrics.metric import (
    Direction,
    Metric,
    MetricCase,
    Models,
    Needs,
    Reference,
    Score,
    State,
    Trial,
    Work,
    frame_numbers,
)
from domainshuttle.platform.evaluation.metrics.weights import MetricModels

_CASES_AT_ONCE = 4
"""Cases that are asked about together, so that an endpoint is not idle while the last answers of one are awaited."""
_QUALITY = 95
"""Of the JPEGs that are sent."""


class JudgeScore(Metric[JudgeChoices]):
    """One question of one judge."""

    source = "the paper's rubric in words of our own (evaluation/judges/prompts.py)"
    code_version = 2

    def __init__(
        self, config: JudgeChoices, models: Models | None = None, folders: MetricModels | None = None,
        question: QuestionName = "cross_domain",
    ) -> None:  # fmt: skip
        super().__init__(config, models, folders)
        self.question, self.prompt = question, QUESTIONS[question]
        if question != "cross_domain":
            self.name = f"{self.name}.{question}"
            self.title = f"{self.title.removesuffix('-Score')} {question.replace('_', ' ')}"
            self.source = "ours: the rubric's 1 mixes two opposite failures"

    @classmethod
    def every(cls, config: JudgeChoices, models: Models, folders: MetricModels) -> list[Self]:
        """A metric for each of its questions."""
        return [cls(config, models, folders, question) for question in QUESTIONS if question in config.questions]

    def expectations(self) -> Mapping[Trial, Direction]:
        found: dict[Trial, Direction] = {"shuffled": "same"}
        if self.question in ("cross_domain", "subject_kept"):
            found |= {"other_reference": "falls", "no_references": "falls"}
        if self.question in ("cross_domain", "domain_reached"):
            found["still_reference"] = "falls"
        if self.question == "subject_kept":
            found["still_reference"] = "ceiling"
        return found

    def needs(self) -> Needs:
        return Needs(endpoint=self.config.endpoint.url)

    def check(self) -> None:
        self.config.endpoint.key()

    def decisions(self) -> dict[str, Any]:
        endpoint = self.config.endpoint
        choices = self.config.model_dump(mode="json", exclude={"cases", "endpoint", "questions", "most_failed"})
        return {
            **super().decisions(),
            "choices": choices,
            "judge": {
                "model": endpoint.model, "temperature": endpoint.temperature, "seed": endpoint.seed,
                "logprobs": endpoint.logprobs, "answers": endpoint.answers, "json_form": endpoint.json_form,
            },
            "prompt": self.prompt.id,
            "jpeg": _QUALITY,
        }  # fmt: skip

    def client(self) -> ChatClient:
        """The endpoint's one client in this process: all its metrics share the limits of rate and cost."""
        folder = self.models.folder
        if folder is None:
            raise ValueError("a judge needs the folder of the evaluation, where its answers are kept: Models(folder=)")
        endpoint = self.config.endpoint
        return self.models.once(
            ("endpoint", endpoint.model_dump_json()), lambda: ChatClient(endpoint, folder / "answers")
        )

    def measure(self, work: Work) -> Score:
        references = [one for one in work.case.references if not one.background]
        if not references:
            return Score("missing", reason="the case has no reference of a subject")
        numbers = sorted({*frame_numbers(len(work.video.frames), self.config.frames).tolist()})
        asked = [
            (place, number, repeat)
            for place in range(len(references))
            for number in numbers
            for repeat in range(self.config.repeats)
        ]
        shown = {number: self._picture(work, number) for number in numbers}
        questions = (
            self._question(work.case, references[place], shown[number], repeat) for place, number, repeat in asked
        )
        rows = [
            {"reference": place, "frame": number, "repeat": repeat, **_row(answer)}
            for (place, number, repeat), answer in zip(asked, self.client().ask_all(questions), strict=True)
        ]
        return self._score(rows)

    def score_all(self, works: Iterable[Work]) -> Iterator[Score]:
        waiting: deque[Future[Score]] = deque()
        with ThreadPoolExecutor(_CASES_AT_ONCE, "judge") as pool:
            for work in works:
                waiting.append(pool.submit(self.score, work))
                if len(waiting) > _CASES_AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def void(self, scores: Iterable[Score]) -> str:
        counts = Counter[str]()
        for one in scores:
            counts.update(one.details.get("answers", {}))
        failed, asked = counts["refused"] + counts["bad_answer"], counts.total()
        if asked and failed / asked > self.config.most_failed:
            return (
                f"{failed} of {asked} answers are none ({counts['refused']} refused, {counts['bad_answer']} odd): "
                f"more than most_failed={self.config.most_failed:g}"
            )
        return ""

    def _score(self, rows: list[dict[str, Any]]) -> Score:
        counts = dict(Counter(row["state"] for row in rows))
        details = {"answers": counts, "asked": rows}
        grades = [row["grade"] for row in rows if row["state"] == "answered"]
        if not grades:
            refused = counts.get("refused", 0)
            reason = next(row["reason"] for row in rows if row["state"] != "answered")
            state: State = "refused" if refused * 2 >= len(rows) else "failed"
            return Score(state, reason=f"no answer of {len(rows)} is a grade, such as: {reason}", details=details)
        mean = float(np.mean(grades))
        value = (mean - 1) / 4 if self.config.normalise == "from_0" else mean / 5
        beside = {"raw": mean, "answered": len(grades) / len(rows)}
        return Score("measured", value, beside=beside, details=details)

    def _picture(self, work: Work, number: int) -> bytes:
        side = self.config.most_side
        return work.once(("jpeg", number, side), lambda: picture_bytes(work.video.frames[number], side))

    def _question(self, case: MetricCase, reference: Reference, frame: bytes, repeat: int) -> Question:
        side = self.config.most_side
        shown = self.models.once(("jpeg", reference.digest, side), lambda: picture_bytes(reference.picture, side))
        text = self.prompt.filled(case.prompt, reference.word, reference.domain)
        return Question(self.prompt.id, self.prompt.system, text, Grade, (shown, frame), repeat)


class CDScore(JudgeScore):
    """The paper's judge is GPT-5.2."""

    name = "cd_score"
    title = "CD-Score"


class QwenScore(JudgeScore):
    """The paper's judge is Qwen3-VL-8B-Instruct."""

    name = "qwen_score"
    title = "Qwen-Score"


def picture_bytes(picture: Pixels, most_side: int) -> bytes:
    """A JPEG of a picture [h,w,3], made smaller where its longer side is above `most_side`."""
    from PIL import Image

    height, width = picture.shape[:2]
    if (longer := max(height, width)) > most_side:
        size = max(1, round(width * most_side / longer)), max(1, round(height * most_side / longer))
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    return encode_jpeg(picture, _QUALITY)


def _row(answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"state": answer.state, "raw": answer.raw, "answer": answer.digest}
    if answer.state != "answered":
        return {**row, "reason": answer.reason}
    expected = expected_grade(answer.raw, answer.logprobs)
    return {**row, "said": answer.value.score, "grade": float(answer.value.score if expected is None else expected)}
