"""Subjects in videos: found by their word with Grounding DINO, cut out with SAM 2, and assigned to the references.

DINO-I and CLIP-I share it, so that each video is searched once. The paper says no more than that subjects are segmented
and compared: each of its rules is a choice here (`SubjectChoices`).
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import linear_sum_assignment

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.corpora.masks import decode_rle, encode_rle
from domainshuttle.pipelines.curation.detector import Box, Detection, Detector, without_repeats
from domainshuttle.pipelines.curation.embedder import Embedder, Vectors
from domainshuttle.pipelines.curation.segmenter import Segmenter
from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.evaluation.metrics.choices import SubjectChoices
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Reference, Work


@dataclass(frozen=True)
class CutOut:
    """A subject in a picture: its box, the detector's and the segmenter's confidence, and its pixels [h,w,3]."""

    box: Box
    score: float
    mask_score: float
    pixels: Pixels
    outline: str = ""
    """Its mask, made smaller (`outline_of`)."""


@dataclass(frozen=True)
class SubjectMatch:
    """How one subject (or background) was found in the frames: similarity [frames], NaN where it was not."""

    subject: int
    word: str
    """What was looked for; empty: the whole frame was compared."""
    similarity: NDArray[np.float64]
    boxes: list[Box | None]
    reference_found: bool
    """Whether its references were compared as they should be: cut out, where that is wanted."""
    outlines: list[str] = field(default_factory=list)
    """The mask of each frame, as `outline_of` gives it; empty where there is none."""


class SubjectFinder:
    """Cut-outs of what a word names."""

    def __init__(self, detector: str, segmenter: str, choices: SubjectChoices, models: Models) -> None:
        self.key = (
            detector, segmenter, choices.least_box, choices.least_mask, choices.most_overlap, choices.background_fill,
        )  # fmt: skip
        """What decides its cut-outs."""
        self.choices = choices
        device = models.device
        self.detector = models.once(("detector", detector), lambda: Detector(detector, device))
        self.segmenter = models.once(("segmenter", segmenter), lambda: Segmenter(segmenter, device))

    def find(self, frames: list[Pixels], word: str) -> list[list[CutOut]]:
        """What a word names in each frame, the surest first."""
        found = self.detector.find(frames, word, self.choices.least_box)
        return [self._cut(frame, boxes) for frame, boxes in zip(frames, found, strict=True)]

    def _cut(self, frame: Pixels, found: list[Detection]) -> list[CutOut]:
        kept = without_repeats(found, self.choices.most_overlap)
        masks = self.segmenter.masks(frame, [one.box for one in kept])
        cut = []
        for one, segment in zip(kept, masks, strict=True):
            if segment.score >= self.choices.least_mask and segment.mask.any():
                pixels = self._pixels(frame, one.box, segment.mask)
                cut.append(CutOut(one.box, one.score, segment.score, pixels, outline_of(segment.mask)))
        return cut

    def _pixels(self, frame: Pixels, box: Box, mask: NDArray[np.bool_]) -> Pixels:
        left, top = (int(np.floor(side)) for side in box[:2])
        right, bottom = (int(np.ceil(side)) for side in box[2:])
        pixels = frame[top:bottom, left:right].copy()
        if self.choices.background_fill == "white":
            pixels[~mask[top:bottom, left:right]] = 255
        return pixels


_OUTLINE_SIDE = 192
"""Pixels of the longer side of a mask that is kept for people to see."""
_SHOWN = 4


def outline_of(mask: NDArray[np.bool_]) -> str:
    """A mask [h,w] as `HxW:` and COCO's run lengths, made smaller where it is large: what a report draws."""
    height, width = mask.shape
    scale = min(1.0, _OUTLINE_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 127
    return f"{size[1]}x{size[0]}:{encode_rle(small)}"


def mask_of(outline: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask [height,width] of an outline. Raises DataError for a text that is none."""
    size, _, counts = outline.partition(":")
    rows, _, columns = size.partition("x")
    if not rows.isdecimal() or not columns.isdecimal():
        raise DataError(f"the outline {outline[:40]!r} does not say its size")
    small = decode_rle(counts, int(rows), int(columns))
    large = Image.fromarray(small.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(large) > 127


def shown_places(count: int) -> list[int]:
    """Which of the frames that a metric looked at a report shows."""
    return np.unique(np.linspace(0, count - 1, min(_SHOWN, count)).round().astype(int)).tolist()


def match_subjects(
    work: Work, finder: SubjectFinder, embedder: Embedder, choices: SubjectChoices, models: Models
) -> list[SubjectMatch]:
    """Each subject and background of a case in its video, compared by an embedder's vectors."""
    frames = work.frames(choices.frames)
    case, matches = work.case, list[SubjectMatch]()
    whole: Vectors | None = None
    by_word: defaultdict[str, list[int]] = defaultdict(list)
    for number, references in case.subjects.items():
        by_word[_word(references)].append(number)
    backgrounds = [one for one in case.references if one.background and choices.backgrounds == "whole_frame"]
    if backgrounds or "" in by_word:
        whole = embedder.vectors(frames)
    for word, numbers in by_word.items():
        wanted = [_reference_vectors(case, number, word, finder, embedder, choices, models) for number in numbers]
        if not word:  # nothing to look for: the frame as it is
            assert whole is not None
            matches += [
                SubjectMatch(number, word, _similar(whole, vectors, choices), [None] * len(frames), found)
                for number, (vectors, found) in zip(numbers, wanted, strict=True)
            ]
            continue
        cut = work.once(("cut_outs", *finder.key, choices.frames, word), partial(finder.find, frames, word))
        matches += _assigned(cut, numbers, word, wanted, embedder, choices)
    for one in backgrounds:
        assert whole is not None
        vectors = embedder.vectors([one.picture])
        similarity = _similar(whole, vectors, choices)
        matches.append(SubjectMatch(one.subject, "", similarity, [None] * len(frames), True))
    return matches


def _word(references: list[Reference]) -> str:
    return next((" ".join(one.word.lower().split()) for one in references if one.word.strip()), "")


def _assigned(
    cut: list[list[CutOut]],
    numbers: list[int],
    word: str,
    wanted: list[tuple[Vectors, bool]],
    embedder: Embedder,
    choices: SubjectChoices,
) -> list[SubjectMatch]:
    """The subjects of one word: in each frame no two of them are the same cut-out, and their similarities have the
    largest sum."""
    similarity = np.full((len(numbers), len(cut)), np.nan)
    boxes: list[list[Box | None]] = [[None] * len(cut) for _ in numbers]
    outlines = [[""] * len(cut) for _ in numbers]
    chosen = [found if choices.candidates == "all" else found[: len(numbers)] for found in cut]
    vectors = embedder.vectors([one.pixels for found in chosen for one in found])
    start = 0
    for frame, found in enumerate(chosen):
        if not found:
            continue
        table = np.stack([_similar(vectors[start : start + len(found)], own, choices) for own, _ in wanted])
        start += len(found)
        for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
            similarity[row, frame] = table[row, column]
            boxes[row][frame] = found[column].box
            outlines[row][frame] = found[column].outline
    return [
        SubjectMatch(number, word, similarity[row], boxes[row], wanted[row][1], outlines[row])
        for row, number in enumerate(numbers)
    ]


def _reference_vectors(
    case: MetricCase,
    number: int,
    word: str,
    finder: SubjectFinder,
    embedder: Embedder,
    choices: SubjectChoices,
    models: Models,
) -> tuple[Vectors, bool]:
    """The vectors of a subject's references, and whether each was cut out where that is wanted."""
    pictures, every = list[Pixels](), True
    for one in case.subjects[number]:
        picture = one.picture
        if choices.reference == "cut_out" and word:
            (found,) = models.once(("reference", one.digest, word, *finder.key), partial(finder.find, [picture], word))
            every &= bool(found)
            picture = found[0].pixels if found else picture
        pictures.append(picture)
    return embedder.vectors(pictures), every


def _similar(frames: Vectors, references: Vectors, choices: SubjectChoices) -> NDArray[np.float64]:
    """Of each frame's vector to the references of one subject, [frames]."""
    table = frames.astype(np.float64) @ references.T.astype(np.float64)
    return table.max(axis=1) if choices.references == "max" else table.mean(axis=1)
