"""DINO-I and CLIP-I: does the video show the references' subjects?

Each subject is cut out of 16 frames and of its references (`subjects`), and compared by the cosine of the vectors of
DINOv2 or CLIP, on a white square. A frame without the subject counts 0; the mean is over frames, then over subjects.
The share of frames in which subjects were found stands beside every value.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.platform.evaluation.metrics.metric import Direction, Metric, Needs, Score, Trial, Work
from domainshuttle.platform.evaluation.metrics.subjects import (
    SubjectChoices,
    SubjectFinder,
    SubjectMatch,
    match_subjects,
    shown_places,
)


class SubjectSimilarity(Metric[SubjectChoices]):
    """What DINO-I and CLIP-I share."""

    role: ClassVar[Literal["dino", "clip"]]
    code_version = 1
    expects: ClassVar[Mapping[Trial, Direction]] = {
        "other_reference": "falls", "still_reference": "ceiling", "half_without_subject": "halves", "shuffled": "same",
        "no_references": "falls",
    }  # fmt: skip

    def expectations(self) -> Mapping[Trial, Direction]:
        halves = self.config.not_found == "zero"
        return {trial: wanted for trial, wanted in self.expects.items() if halves or wanted != "halves"}

    def needs(self) -> Needs:
        return Needs(gpus=0.25)

    def measure(self, work: Work) -> Score:
        if not work.case.references:
            return Score("missing", reason="the case has no reference")
        detector, segmenter, folder = map(self.model_folder, self.uses)
        embedder = self.models.once((self.role, folder), lambda: Embedder(folder, self.role, self.models.device))
        finder = SubjectFinder(detector, segmenter, self.config, self.models)
        matches = match_subjects(work, finder, embedder, self.config, self.models)
        if not matches:
            return Score("missing", reason="the case has backgrounds alone, which are left out")
        values = [_value(one, self.config) for one in matches]
        rates = [np.isfinite(one.similarity).mean() for one in matches if one.word]
        details = {"subjects": [_details(one, value) for one, value in zip(matches, values, strict=True)]}
        counted = [value for value in values if value is not None]
        beside = {"detection_rate": float(np.mean(rates))} if rates else {}
        if not counted:
            return Score("missing", reason="no subject was found in any frame", beside=beside, details=details)
        return Score("measured", float(np.mean(counted)), beside=beside, details=details)


class DinoSimilarity(SubjectSimilarity):
    """Of looks: DINOv2's CLS token."""

    name = "dino_i"
    title = "DINO-I"
    source = "the paper; cut-outs as in MSRVTT-Personalization"
    role: ClassVar = "dino"
    uses = ("detector", "segmenter", "dino")


class ClipSimilarity(SubjectSimilarity):
    """Of what things are: CLIP's image embedding."""

    name = "clip_i"
    title = "CLIP-I"
    source = "the paper; cut-outs as in MSRVTT-Personalization"
    role: ClassVar = "clip"
    uses = ("detector", "segmenter", "clip")


def _value(match: SubjectMatch, choices: SubjectChoices) -> float | None:
    """The mean over frames; None where no frame counts."""
    similarity = match.similarity
    if choices.not_found == "zero":
        return float(np.nan_to_num(similarity).mean())
    seen = similarity[np.isfinite(similarity)]
    return float(seen.mean()) if len(seen) else None


def _details(match: SubjectMatch, value: float | None) -> dict[str, Any]:
    return {
        "subject": match.subject,
        "word": match.word,
        "value": value,
        "reference_found": match.reference_found,
        "frames": [None if np.isnan(one) else round(float(one), 6) for one in match.similarity],
        "boxes": [None if box is None else [round(side, 1) for side in box] for box in match.boxes],
        "outlines": {  # of the frames that the report shows
            str(place): outline
            for place in shown_places(len(match.boxes))
            if (outline := (match.outlines or [""] * len(match.boxes))[place])
        },
    }
