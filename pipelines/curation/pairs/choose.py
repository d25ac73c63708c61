"""Which candidates become reference pictures of a sample: the rule of cross pairs, a function of what was found.

1. A subject's first pictures are the references that the sample has of it or, where it has none, what was found in the
   frame with the most of the subjects of its word. Of two subjects that are one thing the second is left out.
2. In each other frame what was found of a word is assigned to the subjects of that word: one to each, so that their
   similarities have the greatest sum. In frames of other clips of the video, whose captions name things in other words,
   it is what was found of the words' head noun: "a man in a red shirt" and "the man who speaks".
3. What is too unlike the subject's pictures is another subject, what is too alike one of them is a near-duplicate.
4. Of what is left, pictures from other clips come first, then the most similar ones, until a subject has enough; a
   multimodal model may decline each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from domainshuttle.pipelines.corpora.masks import decode_rle, overlap
from domainshuttle.pipelines.corpora.words import FROM_WORDS, head_noun
from domainshuttle.pipelines.curation.pairs.candidates import Candidate, Found, subjects_of
from domainshuttle.pipelines.curation.pairs.config import PairConfig
from domainshuttle.pipelines.quarantine import SampleFault
from domainshuttle.pipelines.sample import Reference, SampleInfo, Subject

PAIR_DINO, PAIR_CLIP, PAIR_QUALITY = "pair_dino", "pair_clip", "pair_quality"
"""Scores of a sample: the least of its pairs."""

Judge = Callable[[str, bytes, bytes], tuple[str, float]]
"""Looks at two pictures of a word's subject: why they are no pair ('' where they are one), and how good one of 4."""


@dataclass(eq=False)
class Outcome:
    """What became of a candidate: `reference` is the name of the picture that it became, `rejected` why it is none."""

    candidate: Candidate
    place: int
    """Its place among the candidates of its clip."""
    clip: str = ""
    """The key of the other clip that it is of; '' for the sample's own."""
    name: str = ""
    """The name of that clip's candidates."""
    subject: int | None = None
    reference: str = ""
    rejected: str = ""
    dino: float | None = None
    clip_similarity: float | None = None

    def trace(self) -> dict[str, Any]:
        """It as plain JSON."""
        one = self.candidate
        numbers = {
            "detection": one.detection, "mask_score": one.mask_score, "area": one.area, "dino": self.dino,
            "clip_similarity": self.clip_similarity,
        }  # fmt: skip
        return {
            "of": self.name, "at": self.place, **({"clip": self.clip} if self.clip else {}), "place": one.place,
            "frame": one.frame, "word": one.word, "box": [round(side, 1) for side in one.box],
            **{name: round(value, 4) for name, value in numbers.items() if value is not None},
            **({} if self.subject is None else {"subject": self.subject}),
            **({"reference": self.reference} if self.reference else {"rejected": self.rejected}),
        }  # fmt: skip


@dataclass
class Chosen:
    """What a sample is with its pairs: its description, the new pictures by name, and what became of candidates."""

    info: SampleInfo
    files: dict[str, bytes]
    outcomes: list[Outcome]
    pairs: int
    """Pictures that were added to a subject's first."""
    missing: list[str]
    """Words of subjects that have no picture, or too few."""


@dataclass(eq=False)
class _Shown:
    """A subject and its pictures."""

    subject: Subject
    pictures: list[Outcome] = field(default_factory=list)
    kept: list[Outcome] = field(default_factory=list)
    """Those that the sample had."""
    similarities: list[tuple[float, float, float | None]] = field(default_factory=list)
    """By DINOv2, by CLIP and by the judge, of pictures that were added."""

    @property
    def all(self) -> list[Outcome]:
        return self.kept + self.pictures

    def likeness(self, one: Candidate, of: Literal["dino", "clip"]) -> float:
        """The greatest similarity to one of its pictures."""
        return max(float(getattr(other.candidate, of) @ getattr(one, of)) for other in self.all)


def choose(
    info: SampleInfo,
    own: Found,
    others: Sequence[Found],
    config: PairConfig,
    judge: Judge | None = None,
    files: dict[str, Any] | None = None,
) -> Chosen:
    """The references of a sample, of its own candidates and those of other clips of its video; `files` are its members,
    of which a judge sees the references. Raises SampleFault where no subject has a picture."""
    subjects = [_Shown(subject) for subject in subjects_of(info, config.words)]
    heads = {_head(shown.subject.word) for shown in subjects}
    outcomes = _outcomes(own, "", config)
    for other in others:
        outcomes += [one for one in _outcomes(other, other.key, config) if _head(one.candidate.word) in heads]
    for one in outcomes:
        if one.candidate.place == "reference" and not one.clip:
            shown = subjects[info.references[one.candidate.frame].subject]
            one.subject, one.reference = shown.subject.id, info.references[one.candidate.frame].file
            shown.kept.append(one)
    open_ = [one for one in outcomes if not one.reference and not one.rejected]
    for word in dict.fromkeys(shown.subject.word for shown in subjects):
        same = [shown for shown in subjects if shown.subject.word == word]
        _anchor(same, [one for one in open_ if one.candidate.word == word and not one.clip])
    _leave_out_doubles(subjects, config.same_overlap)
    for clips, kind in ((False, _word), (True, _head)):
        for named in dict.fromkeys(kind(shown.subject.word) for shown in subjects):
            same = [shown for shown in subjects if kind(shown.subject.word) == named and shown.all]
            left = [
                one for one in open_
                if bool(one.clip) is clips and kind(one.candidate.word) == named and not one.rejected
            ]  # fmt: skip
            for frame in _by_frame(left).values():
                _assign(same, frame, config)
    for shown in subjects:
        _take(
            shown, [one for one in open_ if one.subject == shown.subject.id and not one.rejected], config, judge, files
        )
    return _finished(info, subjects, outcomes, config)


def _word(word: str) -> str:
    return word


def _head(word: str) -> str:
    return head_noun(word) or word


def _outcomes(found: Found, clip: str, config: PairConfig) -> list[Outcome]:
    """The candidates of a clip, with the reason of those that are not good enough whoever they are."""
    outcomes = [Outcome(one, place, clip, found.name) for place, one in enumerate(found.candidates)]
    outcomes = [one for one in outcomes if not clip or one.candidate.place == "target"]
    for one in outcomes:
        if one.candidate.place != "reference":
            one.rejected = _fault(one.candidate, config)
    return outcomes


def _fault(one: Candidate, config: PairConfig) -> str:
    if not one.counts:  # all of a frame that subjects leave
        return ""
    if not one.picture or one.area < config.least_area:
        return f"small: {one.area:.1%} of the frame, least_area is {config.least_area:.1%}"
    if one.area > config.most_area:
        return f"large: {one.area:.1%} of the frame, most_area is {config.most_area:.1%}"
    if one.mask_score < config.least_mask:
        return f"uncertain mask: {one.mask_score:.2f}, least_mask is {config.least_mask:g}"
    if min(one.picture_size) < config.least_side:
        height, width = one.picture_size
        return f"few pixels: {width}x{height}, least_side is {config.least_side}"
    return ""


def _by_frame(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], list[Outcome]]:
    frames: dict[tuple[str, int], list[Outcome]] = {}
    for one in outcomes:
        frames.setdefault((one.name, one.candidate.frame), []).append(one)
    return frames


def _anchor(same: list[_Shown], found: list[Outcome]) -> None:
    """Gives each subject of a word that has no picture one of the frame that has the most of them."""
    frames = _by_frame(found)
    if not frames or all(shown.kept for shown in same):
        return

    def rank(frame: tuple[str, int]) -> tuple[float, float, int]:
        scores = sorted((one.candidate.detection for one in frames[frame]), reverse=True)[: len(same)]
        return -len(scores), -sum(scores), frame[1]

    instances = frames[min(frames, key=rank)]
    known = [shown for shown in same if shown.kept]
    for _, place in _matched(known, instances):
        instances[place].subject = -1  # it is one of those that have pictures
    free = sorted((one for one in instances if one.subject is None), key=lambda one: -one.candidate.detection)
    for one in instances:
        one.subject = None
    bare = [shown for shown in same if not shown.kept]
    for shown, one in zip(bare, sorted(free[: len(bare)], key=lambda one: one.candidate.box), strict=False):
        one.subject = shown.subject.id
        shown.pictures.append(one)


def _matched(subjects: Sequence[_Shown], instances: Sequence[Outcome]) -> list[tuple[int, int]]:
    """Pairs (subject, instance), one to each, so that their similarities have the greatest sum."""
    if not subjects or not instances:
        return []
    likeness = np.array([[shown.likeness(one.candidate, "dino") for one in instances] for shown in subjects])
    rows, columns = linear_sum_assignment(-likeness)
    return [*zip(rows.tolist(), columns.tolist(), strict=True)]


def _leave_out_doubles(subjects: list[_Shown], most: float) -> None:
    """Of subjects that were found as one thing in one frame only the first keeps its picture."""
    first = [shown for shown in subjects if shown.pictures]
    masks: dict[int, Any] = {}
    for number, shown in enumerate(first):
        (one,) = shown.pictures
        for other in (before.pictures[0] for before in first[:number] if before.pictures):
            a, b = one.candidate, other.candidate
            if bool(a.counts) != bool(b.counts) or (a.frame, a.place) != (b.frame, b.place):
                continue
            for two in (a, b) if a.counts else ():
                masks.setdefault(id(two), decode_rle(two.counts, *two.size))
            if not a.counts or overlap(masks[id(a)], masks[id(b)]) > most:  # all of a frame is one scene
                one.rejected, shown.pictures = f"same thing as another subject: {b.word!r}", []
                break


def _assign(same: list[_Shown], instances: list[Outcome], config: PairConfig) -> None:
    """Says of which subject each of a frame's instances is, or that it is of none."""
    taken = [one for shown in same for one in shown.pictures if one.name == instances[0].name
             and one.candidate.frame == instances[0].candidate.frame]  # fmt: skip
    here = [shown for shown in same if not any(one in taken for one in shown.pictures)]
    free = [one for one in instances if one not in taken]
    if not free:
        return
    for number, place in _matched(here, free):
        shown, one = here[number], free[place]
        one.subject = shown.subject.id
        one.dino = shown.likeness(one.candidate, "dino")
        one.clip_similarity = shown.likeness(one.candidate, "clip")
        if one.dino < config.least_dino:
            one.rejected = f"another subject: DINOv2 {one.dino:.2f}, least_dino is {config.least_dino:g}"
        elif one.clip_similarity < config.least_clip:
            one.rejected = f"another kind of thing: CLIP {one.clip_similarity:.2f}, least_clip is {config.least_clip:g}"
    for one in free:
        if one.subject is None:
            one.rejected = "one more of its word: the others fit the subjects better" if same else "subject not chosen"


def _take(
    shown: _Shown,
    found: list[Outcome],
    config: PairConfig,
    judge: Judge | None,
    files: dict[str, Any] | None,
) -> None:
    """Adds the best of a subject's candidates to its pictures, until it has enough."""
    found = [one for one in found if one not in shown.pictures]
    for one in sorted(found, key=lambda one: (not one.clip, -(one.dino or 0.0), one.clip, one.candidate.frame)):
        alike = shown.likeness(one.candidate, "dino")
        if alike > config.most_dino:
            one.rejected = f"near-duplicate: DINOv2 {alike:.3f}, most_dino is {config.most_dino:g}"
        elif len(shown.all) >= config.pictures:
            one.rejected = f"not needed: its subject has {config.pictures} pictures"
        else:
            fault, quality = "", None
            if judge is not None:
                fault, quality = judge(shown.subject.word, _picture(shown.all[0], files), one.candidate.picture)
            one.rejected = fault
            if not fault:
                shown.pictures.append(one)
                shown.similarities.append((one.dino or 0.0, one.clip_similarity or 0.0, quality))


def _picture(one: Outcome, files: dict[str, Any] | None) -> bytes:
    return bytes((files or {})[one.reference]) if one.candidate.place == "reference" else one.candidate.picture


_ORIGIN: dict[str, Literal["same_clip", "edited"]] = {"target": "same_clip", "source": "edited"}


def _finished(info: SampleInfo, subjects: list[_Shown], outcomes: list[Outcome], config: PairConfig) -> Chosen:
    good = [shown for shown in subjects if len(shown.all) >= config.least_pictures]
    missing = [shown.subject.word for shown in subjects if shown not in good]
    for shown in subjects:
        for one in shown.pictures if shown not in good else []:
            one.rejected = f"few pictures: {len(shown.all)} of its subject, least_pictures is {config.least_pictures}"
    if not good:
        asked = ", ".join(repr(word) for word in missing[:6])
        raise NoSubject(
            f"none of {asked} has {config.least_pictures} pictures"
            if asked
            else "it names none, and no words are asked",
            [one.trace() for one in outcomes],
        )
    used = [int(one.reference[3:].partition(".")[0]) for shown in good for one in shown.kept]
    number = max(used, default=-1) + 1
    files: dict[str, bytes] = {}
    references = []
    for new, shown in enumerate(good):
        for one in shown.kept:
            old = info.references[one.candidate.frame]
            references.append(old.model_copy(update={"subject": new}))
        for one in shown.pictures:
            name, number = f"ref{number}.jpg", number + 1
            origin = "other_clip" if one.clip else _ORIGIN[one.candidate.place]
            references.append(Reference(file=name, subject=new, origin=origin, size=one.candidate.picture_size))
            files[name], one.reference = one.candidate.picture, name
    similarities = [row for shown in good for row in shown.similarities]
    scores = dict(info.scores)
    for name, column in zip((PAIR_DINO, PAIR_CLIP, PAIR_QUALITY), zip(*similarities, strict=True), strict=False):
        if None not in column:
            scores[name] = round(min(column), 4)
    if not info.subjects:
        scores[FROM_WORDS] = 1.0
    made = info.model_copy(
        update={
            "subjects": [shown.subject.model_copy(update={"id": new}) for new, shown in enumerate(good)],
            "references": references,
            "scores": scores,
            "source_clip": None,
        }
    )
    return Chosen(SampleInfo.model_validate(made.model_dump()), files, outcomes, len(similarities), missing)


class NoSubject(SampleFault):
    """No subject of a sample has a picture; `trace` says what became of the candidates."""

    def __init__(self, detail: str, trace: list[dict[str, Any]] | None = None) -> None:
        super().__init__("no subject", detail)
        self.trace = trace or []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.detail, self.trace)
