"""Looks for candidates of cross pairs: frames are decoded on CPUs; boxes, masks and similarities are found on GPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.corpora.masks import Mask, cut_out, encode_rle
from domainshuttle.pipelines.curation.detector import Detector, without_repeats
from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.pipelines.curation.pairs.candidates import (
    Candidate,
    CandidateStore,
    Found,
    Place,
    is_scene,
    name_of,
    subjects_of,
)
from domainshuttle.pipelines.curation.pairs.config import PairConfig
from domainshuttle.pipelines.curation.segmenter import Segmenter
from domainshuttle.pipelines.curation.stage import Passing, Step, Work
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexRow
from domainshuttle.pipelines.media.claims import reference_pixels
from domainshuttle.pipelines.media.cut import clip_file, frames_at
from domainshuttle.pipelines.media.decode import decode_image, encode_jpeg
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason, of_sample
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.values import ActorPool

SAMPLES_PER_PART = 8
"""Few, since decoded frames travel."""
_NONE = np.empty(0, np.float32)


def find_steps(config: PairConfig, pools: dict[str, ActorPool]) -> list[Step]:
    """The steps, for `FindJob`."""
    return [
        Step(Look, (config,), pools["decode"]),
        Step(Find, (config, _device(pools["find"])), pools["find"]),
        Step(Embed, (config, _device(pools["embed"])), pools["embed"]),
    ]


def _device(pool: ActorPool) -> str:
    return "cuda" if pool.gpus else "cpu"


@dataclass(frozen=True)
class FindJob:
    """Candidates of some rows of a corpus, in parts (`stage.PartsJob`)."""

    raw: CorpusSpec
    store: CandidateStore
    numbers: tuple[int, ...]

    @property
    def folder(self) -> Path:
        return self.store.folder

    @property
    def parts(self) -> int:
        return -(-len(self.numbers) // SAMPLES_PER_PART)

    def rows(self, index: Index, part: int) -> list[IndexRow]:
        return index.rows(self.numbers[part * SAMPLES_PER_PART : (part + 1) * SAMPLES_PER_PART])

    def write(self, part: int, passed: Passing) -> int:
        self.store.write([self._found(work) for _, work in passed.works])
        return len(passed.works) + len(passed.out)  # those whose description can't be read stay unfound

    def _found(self, work: Work) -> Found:
        fault = work.carried.get("fault", "")
        candidates = () if fault else tuple(work.carried["candidates"])
        return Found(name_of(work.row), work.row.key, work.info.video or "", candidates, fault)


@dataclass
class _Frames:
    """Some frames of a clip, or a picture as one."""

    place: Place
    numbers: list[int]
    pixels: list[Pixels]


def _each(works: list[Work], function: Callable[[Work], None]) -> None:
    """Calls `function` with each sample; what its bytes make it raise is noted of it, as nothing is left out here."""
    for work in works:
        if "fault" in work.carried:
            continue
        try:
            with of_sample(work.row.key):
                function(work)
        except DataError as error:
            work.carried = {"fault": fault_reason(error)}


class Look:
    """Decodes frames, evenly spread, and reference pictures."""

    def __init__(self, config: PairConfig) -> None:
        self.config = config

    def __call__(self, works: list[Work]) -> None:
        _each(works, self._look)

    def _look(self, work: Work) -> None:
        sample = work.sample()
        work.carried["frames"] = self._frames(sample)
        if self.config.references == "keep":
            work.carried["references"] = [reference_pixels(sample, n) for n in range(len(sample.info.references))]

    def _frames(self, sample: RawSample) -> _Frames:
        info = sample.info
        if info.source_clip is not None:  # the target is edited: subjects are as they were in what it was made of
            data = sample.files[info.source_clip]
            name = f"{sample.key}.{info.source_clip}"
            try:
                return self._clip("source", data, clip_file(data, name).frames, name)
            except DataError as error:
                raise SampleFault("undecodable source clip", str(error)) from error
        name = f"{sample.key}.{sample.target_extension}"
        try:
            if info.kind == "image":
                return _Frames("target", [0], [decode_image(sample.target, name)])
            return self._clip("target", sample.target, info.frames, name)
        except DataError as error:
            raise SampleFault("undecodable target", str(error)) from error

    def _clip(self, place: Place, data: Any, length: int, name: str) -> _Frames:
        count = min(self.config.frames, length)
        numbers = [(2 * number + 1) * length // (2 * count) for number in range(count)]
        found = frames_at(data, set(numbers), name)
        return _Frames(place, numbers, [found[number] for number in numbers])


@dataclass
class _Seen:
    """A candidate before it is embedded: what is known of it, and its pixels."""

    known: dict[str, Any]
    pixels: Pixels | None


class Find:
    """Finds boxes and masks, and cuts them out on white."""

    def __init__(self, config: PairConfig, device: str) -> None:
        self.config = config
        self.detector = Detector(config.models.detector, device)
        self.segmenter = Segmenter(config.models.segmenter, device)

    def __call__(self, works: list[Work]) -> None:
        _each(works, self._find)

    def _find(self, work: Work) -> None:
        frames: _Frames = work.carried.pop("frames")
        subjects = subjects_of(work.info, self.config.words)
        words = dict.fromkeys(subject.word for subject in subjects if not is_scene(subject))
        scenes = dict.fromkeys(subject.word for subject in subjects if is_scene(subject))
        boxes = {word: self.detector.find(frames.pixels, word, self.config.least_detection) for word in words}
        seen: list[_Seen] = []
        for place, (number, pixels) in enumerate(zip(frames.numbers, frames.pixels, strict=True)):
            covered = np.zeros(pixels.shape[:2], bool)
            asked = [
                (word, one)
                for word, found in boxes.items()
                for one in without_repeats(found[place], self.config.same_overlap)[: self.config.most_found]
            ]
            segments = self.segmenter.masks(pixels, [one.box for _, one in asked])
            for (word, one), segment in zip(asked, segments, strict=True):
                covered |= segment.mask
                cut = cut_out(pixels, segment.mask) if segment.mask.any() else None
                known = {"word": word, "box": one.box, "detection": one.score, "mask_score": segment.score}
                seen.append(_seen(known, frames.place, number, pixels, segment.mask, cut))
            for word in scenes:
                height, width = pixels.shape[:2]
                known = {"word": word, "box": (0.0, 0.0, width, height), "detection": 1.0, "mask_score": 1.0}
                left = np.where(covered[:, :, None], np.uint8(255), pixels)
                seen.append(_seen(known, frames.place, number, pixels, None, left))
        for number, picture in enumerate(work.carried.pop("references", [])):
            word = work.info.subjects[work.info.references[number].subject].word
            known = {"word": word, "box": (0.0, 0.0, picture.shape[1], picture.shape[0]), "detection": 1.0}
            seen.append(_seen({**known, "mask_score": 1.0}, "reference", number, picture, None, picture))
        work.carried["seen"] = seen


def _seen(
    known: dict[str, Any], place: Place, number: int, frame: Pixels, mask: Mask | None, pixels: Pixels | None
) -> _Seen:
    size = (frame.shape[0], frame.shape[1])
    counts = "" if mask is None else encode_rle(mask)
    area = 1.0 if mask is None else float(np.count_nonzero(mask) / mask.size)
    return _Seen({**known, "place": place, "frame": number, "size": size, "counts": counts, "area": area}, pixels)


class Embed:
    """Finds how the pictures look."""

    def __init__(self, config: PairConfig, device: str) -> None:
        self.dino = Embedder(config.models.dino, "dino", device)
        self.clip = Embedder(config.models.clip, "clip", device)

    def __call__(self, works: list[Work]) -> None:
        _each(works, self._embed)

    def _embed(self, work: Work) -> None:
        seen: list[_Seen] = work.carried.pop("seen")
        pictures = [one.pixels for one in seen if one.pixels is not None]
        vectors = iter(zip(self.dino.vectors(pictures), self.clip.vectors(pictures), strict=True))
        work.carried["candidates"] = [_candidate(one, *next(vectors)) if one.pixels is not None else _candidate(one)
                                      for one in seen]  # fmt: skip


def _candidate(one: _Seen, dino: Any = _NONE, clip: Any = _NONE) -> Candidate:
    pixels = one.pixels
    kept = b"" if pixels is None or one.known["place"] == "reference" else encode_jpeg(pixels)
    size = (0, 0) if pixels is None else (pixels.shape[0], pixels.shape[1])
    return Candidate(picture=kept, picture_size=size, dino=dino, clip=clip, **one.known)
