"""What cross pairs were made of, for people to look at: boxes and masks on frames, and what was cut out of them.

It is drawn of what the stage left behind: its trace, its candidates, and the corpora before and after it. What is not
there any more is said instead of drawn.
"""

import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.corpora.masks import decode_rle
from domainshuttle.pipelines.curation.pairs.candidates import STORE_NAME, Candidate, Candidates, CandidateStore
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.folder import beside
from domainshuttle.pipelines.index.parts import INDEX_NAME, REPORT_NAME, TRACE_NAME
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.media.cut import frames_at
from domainshuttle.pipelines.media.decode import decode_image, encode_jpeg
from domainshuttle.pipelines.quarantine import fault_kind
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.storage.files import exists, read_bytes
from domainshuttle.pipelines.storage.uri import Location, is_remote, join, local_path, parent

COLOURS = (
    (214, 69, 65),
    (31, 119, 180),
    (44, 140, 76),
    (148, 86, 190),
    (220, 130, 20),
    (20, 150, 160),
    (120, 120, 120),
)
"""Of subjects, by their ids; the last one of what is of none."""
_FRAME, _CUT = 520, 150
"""Pixels of the longer side of a frame and of what was cut out, on the page."""
_MOST_FRAMES, _MOST_REJECTED = 6, 12
_MOST_CAPTION = 400
"""Characters, on the page."""


@dataclass(frozen=True)
class Shown:
    """A picture with the texts beside it."""

    label: str
    note: str
    jpeg: bytes


@dataclass
class PairedSample:
    """What is shown of a sample."""

    key: str
    caption: str
    left_out: str = ""
    frames: list[Shown] = field(default_factory=list)
    taken: list[Shown] = field(default_factory=list)
    rejected: list[Shown] = field(default_factory=list)
    unseen: int = 0
    """How many more were rejected."""
    missing: str = ""
    """What can't be drawn, and why."""


@dataclass(frozen=True)
class PairReport:
    """What `data pair` left beside an index."""

    report: dict[str, Any]
    folder: Path

    @property
    def rejected(self) -> dict[str, int]:
        """Candidates by the reason for which they are no pictures."""
        start = "candidates rejected: "
        notes: Mapping[str, int] = self.report["notes"]
        return {name.removeprefix(start): count for name, count in notes.items() if name.startswith(start)}

    def traces(self, wanted: frozenset[str] | None = None) -> Iterator[dict[str, Any]]:
        """The lines of its trace, or those of some keys."""
        path = self.folder / TRACE_NAME
        if not path.exists():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                # keys are plain, and a line begins with its own
                if (
                    wanted is None
                    or json.loads(line[: line.index(",")] + "}" if "," in line else line)["key"] in wanted
                ):
                    yield json.loads(line)


def read_pair_report(index: Location) -> PairReport | None:
    """The report of the cross pairs that an index is of; None where it is of something else."""
    place = beside(index, REPORT_NAME)
    if is_remote(place) or not exists(place):
        return None
    report = json.loads(read_bytes(place))
    return PairReport(report, local_path(parent(place))) if report.get("stage") == "pair" else None


def similarities(found: PairReport, most: int = 20_000) -> tuple[list[float], list[float]]:
    """By DINOv2, of candidates that became pictures and of those that did not: of the first so many samples."""
    taken: list[float] = []
    rejected: list[float] = []
    for number, trace in enumerate(found.traces()):
        if number == most:
            break
        for one in trace.get("candidates", ()):
            if "dino" in one:
                (taken if "reference" in one else rejected).append(one["dino"])
    return taken, rejected


def paired_samples(
    found: PairReport, index: Index, keys: Sequence[str], left_out: Mapping[str, str]
) -> list[PairedSample]:
    """What is shown of the samples of these keys, also of such as are left out, with the reason."""
    traces = {trace["key"]: trace for trace in found.traces(frozenset(keys))}
    stores = [*(found.folder / STORE_NAME).glob("*")] if (found.folder / STORE_NAME).is_dir() else []
    candidates = CandidateStore(stores[0]).open() if len(stores) == 1 else None
    before = _before(found)
    places = {key: number for number, key in enumerate(index.column("key").tolist())}
    shown = []
    for key in keys:
        row = index.row(places[key]) if key in places else None
        sample, fault = None, ""
        try:
            if before is not None and key in before[1]:
                sample = read_raw_sample(before[0].row(before[1][key]))
            elif row is not None:
                sample = read_raw_sample(row)
        except DataError as error:
            fault = str(error)
        caption = textwrap.shorten(sample.info.caption, _MOST_CAPTION, placeholder=" …") if sample else ""
        one = PairedSample(key, caption, left_out.get(key, ""), missing=fault)
        _fill(one, traces.get(key, {}).get("candidates", []), candidates, sample)
        shown.append(one)
    return shown


def _before(found: PairReport) -> tuple[Index, dict[str, int]] | None:
    """The corpus that the pairs were made of, and the places of its keys; None where it is not there any more."""
    place = join(found.report.get("from_folder", ""), INDEX_NAME)
    try:
        index = Index.load(place, verify=False)
    except (DataError, OSError):
        return None
    return index, {key: number for number, key in enumerate(index.column("key").tolist())}


def _fill(shown: PairedSample, trace: list[dict[str, Any]], store: Candidates | None, sample: RawSample | None) -> None:
    if not trace:
        shown.missing = shown.missing or "the stage noted nothing of it"
        return
    if store is None:
        shown.missing = f"boxes, masks and rejected crops are drawn from {STORE_NAME}, which is not there any more"
        return
    seen: list[tuple[dict[str, Any], Candidate]] = []
    for one in trace:
        candidates = store.find(one["of"])
        if candidates is not None and one["at"] < len(candidates.candidates):
            seen.append((one, candidates.candidates[one["at"]]))
    if sample is not None:
        shown.frames = [*_frames(seen, sample)]
    order: dict[str, int] = {}
    rejected = []
    for one, candidate in seen:
        picture = _cut(candidate, sample)
        if picture is None:
            continue
        if "reference" in one:
            shown.taken.append(_described(one, picture, one["reference"]))
        else:
            kind = fault_kind(one["rejected"])
            order[kind] = order.get(kind, 0) + 1
            rejected.append((order[kind], _described(one, picture, one["rejected"])))
    shown.taken.sort(key=lambda one: one.label)
    rejected.sort(key=lambda pair: pair[0])  # some of each reason first
    shown.rejected = [one for _, one in rejected[:_MOST_REJECTED]]
    shown.unseen = max(len(rejected) - _MOST_REJECTED, 0)


def _described(one: dict[str, Any], picture: Pixels, label: str) -> Shown:
    where = {"target": "frame", "source": "source clip, frame", "reference": "reference"}[one["place"]]
    parts = [one["word"], f"{where} {one['frame']}" + (f" of {one['clip']}" if "clip" in one else "")]
    for name, text in (("detection", "box"), ("mask_score", "mask"), ("dino", "DINOv2"), ("clip_similarity", "CLIP")):
        if name in one and one["place"] != "reference":
            parts.append(f"{text} {one[name]:.2f}")
    return Shown(label, ", ".join(parts), encode_jpeg(np.asarray(_small(Image.fromarray(picture), _CUT)), 85))


def _cut(candidate: Candidate, sample: RawSample | None) -> Pixels | None:
    try:
        if candidate.place != "reference":
            return decode_image(candidate.picture) if candidate.picture else None
        if sample is None or candidate.frame >= len(sample.info.references):
            return None
        return decode_image(sample.files[sample.info.references[candidate.frame].file])
    except (DataError, KeyError):
        return None


def _frames(seen: list[tuple[dict[str, Any], Candidate]], sample: RawSample) -> Iterator[Shown]:
    """The sample's own frames, with what was found in them."""
    own = [(one, found) for one, found in seen if "clip" not in one and found.place != "reference"]
    numbers = sorted({found.frame for _, found in own})[:_MOST_FRAMES]
    place = own[0][1].place if own else "target"
    try:
        if place == "source" and sample.info.source_clip is not None:
            frames = frames_at(sample.files[sample.info.source_clip], set(numbers), f"{sample.key}, source clip")
        elif sample.info.kind == "image":
            frames = {0: decode_image(sample.target)}
        else:
            frames = frames_at(sample.target, set(numbers), sample.key) if numbers else {}
    except DataError:
        return
    for number in numbers:
        if number in frames:
            inside = [(one, found) for one, found in own if found.frame == number]
            name = "source clip, frame" if place == "source" else "frame"
            taken = sum("reference" in one for one, _ in inside)
            yield Shown(f"{name} {number}", f"{len(inside)} found, {taken} taken", draw_frame(frames[number], inside))


def draw_frame(frame: Pixels, found: Sequence[tuple[Mapping[str, Any], Candidate]]) -> bytes:
    """A frame as JPEG, with masks and boxes of what became pictures, and thin boxes of what did not."""
    tinted = frame.astype(np.float32)
    for one, candidate in found:
        if "reference" in one and candidate.counts:
            mask = decode_rle(candidate.counts, *candidate.size)
            if mask.shape == frame.shape[:2]:
                tinted[mask] = 0.55 * tinted[mask] + 0.45 * np.array(_colour(one), np.float32)
    image = Image.fromarray(tinted.round().astype(np.uint8))
    scale = min(_FRAME / max(image.size), 1.0)
    image = _small(image, _FRAME)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for one, candidate in sorted(found, key=lambda pair: "reference" in pair[0]):
        if not candidate.counts:
            continue
        sides = [side * scale for side in candidate.box]
        taken = "reference" in one
        colour = _colour(one) if taken else COLOURS[-1]
        pen.rectangle(sides, outline=colour, width=3 if taken else 1)
        text = f"{candidate.word} {candidate.detection:.2f}" + (f" {one['reference']}" if taken else "")
        left, top = min(max(sides[0], 0), image.width - 8), max(sides[1] - 15, 0)
        if taken:
            pen.rectangle(pen.textbbox((left, top), text, font=font), fill=colour)
        pen.text((left, top), text, fill=(255, 255, 255) if taken else colour, font=font)
    made = io.BytesIO()
    image.save(made, "JPEG", quality=88)
    return made.getvalue()


def _colour(one: Mapping[str, Any]) -> tuple[int, int, int]:
    subject = one.get("subject")
    return COLOURS[-1] if subject is None else COLOURS[subject % (len(COLOURS) - 1)]


def _small(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
