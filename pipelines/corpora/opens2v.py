"""OpenS2V-5M: clips with masks of their subjects, and pictures of them from other clips and from GPT-Image.

Format, and what of it could be verified: docs/datasets.md. One physical subject appears under several words (person,
woman, individual), so masks that overlap are one subject. Boxes of stuff ("grassy area") can be badly wrong, so
subjects are cut out by their masks.
"""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import check_download, found_files, media_folder
from domainshuttle.pipelines.corpora.files import (
    Picture,
    Shown,
    clip_of,
    drawn_picture,
    read_media,
    read_picture,
    sample_of,
)
from domainshuttle.pipelines.corpora.json_records import json_records, parse, read_at
from domainshuttle.pipelines.corpora.masks import Candidate, covered_share, cut_out, decode_rle, without_duplicates
from domainshuttle.pipelines.corpora.source import (
    SAMPLES,
    Fields,
    FolderSource,
    LeftOut,
    Notes,
    Piece,
    Record,
    RecordSource,
    SourceConfig,
    Tables,
    uncaptioned,
    unknown_form,
)
from domainshuttle.pipelines.corpora.words import BACKGROUND, FROM_WORDS, domain_of
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.cut import ClipFile, Crop, cut_clip, frames_at
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.values import Real, Share, Whole

_PAIRS = "pairs"
_CAPTIONS = ("face_cap_qwen", "face_cap_glm", "face_cap_Aria")


class OpenS2VConfig(SourceConfig):
    """Clips of OpenS2V-5M. Paths are below `folder`; `{part}`, `{path}` and `{key}` stand for those of a record."""

    builder: Literal["opens2v"] = "opens2v"
    jsons: str = Field("Jsons/mask_and_bbox_High-Quality/*.json", description="regular pairs: one file a part")
    videos: str = Field(
        "Videos/{part}/{path}", description="clips; elsewhere below the part's folder they are found too"
    )
    pairs: str | None = Field(
        None, description="cross-frame pairs: the merged file, or the folder of one file a cluster"
    )
    frames: str | None = Field(None, description="GPT-frame pairs: a record's folder, such as gpt-frames/{key}")
    backgrounds: str | None = Field(None, description="frames without subjects, such as Background/{part}/{key}.png")
    least_aesthetic: Real = Field(4.5, ge=0, le=10, description="of a mask's crop")
    least_area: Share = Field(1 / 32, description="of a frame that a subject's mask covers")
    most_overlap: Share = Field(0.8, description="intersection over union above which two masks are one subject")
    most_subjects: Whole = Field(6, ge=1, le=127, description="of a clip; those of the highest aesthetic score")
    least_text_similarity: Real = Field(0.6, ge=0, le=2, description="of a cross-frame pair")
    least_image_similarity: Real = Field(0.6, ge=0, le=2, description="of a cross-frame pair")
    most_image_similarity: Real = Field(
        2.0, ge=0, le=2, description="of a cross-frame pair; lower it to leave out near-duplicates"
    )


class OpenS2VSource(FolderSource[OpenS2VConfig], RecordSource):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        config = self.config
        found = found_files(self.root, [config.jsons], "JSON files of regular pairs")
        for template in (config.videos, config.frames, config.backgrounds):
            if template is not None:
                media_folder(self.root, template.partition("{")[0].rstrip("/"))
        merged = []
        if config.pairs is not None:
            place = self.root / config.pairs
            if not place.exists():
                raise DataError(
                    f"{place} is missing: `pairs` names the merged file of cross-frame pairs, or their folder"
                )
            merged = [Piece.of(check_download(place), self.root, _PAIRS)] if place.is_file() else []
        return [*(Piece.of(path, self.root) for path in found), *merged]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        part = Path(piece.name).stem
        for located in json_records(self.root / piece.name):
            place = {"file": piece.name, "offset": located.offset, "size": len(located.data)}
            if piece.role == _PAIRS:
                yield Record(located.key, place)
                continue
            id_ = f"{part}/{located.key}"
            try:
                entry = _Entry(located.parse(id_), id_, part)
                found = False
                for annotation in entry.annotations():  # to the last, since this checks their form
                    found = found or self._good(*annotation)
                if not found:
                    raise SampleFault("no subject", f"{id_}: none is large and good enough")
            except DataError as error:
                yield LeftOut(id_, fault_reason(error))
                continue
            yield Record(id_, place, located.key, uncaptioned(entry.caption))

    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        entry = self._entry(record)
        data = self._video(entry)
        name = f"{record.id}: {entry.path}"
        whole = clip_of(data, name)
        target = _target(whole, entry, name)
        subjects = self._subjects(entry, notes)
        if not subjects:
            raise SampleFault("no subject", f"{record.id}: no mask could be read")
        (frame,) = frames_at(data, {entry.annotated}, name).values()
        frame = entry.crop.of(frame) if entry.crop else frame
        pairs, drawn = self._pairs(entry, tables, notes), self._drawn(entry)
        shown, described = [], []
        for number, subject in enumerate(subjects):
            background = any(word in entry.backgrounds for word in subject.words)
            described.append((subject.word, domain_of(subject.word, background)))
            shown.append(Shown(number, "same_clip", drawn_picture(cut_out(frame, subject.mask))))
            if picture := self._partner(entry, subject, pairs, tables, notes):
                shown.append(Shown(number, "other_clip", picture))
            if word := next((word for word in subject.words if word in drawn), None):
                shown.append(Shown(number, "edited", read_picture(self.root, drawn.pop(word))))
        empty = next((number for number, (_, domain) in enumerate(described) if domain == BACKGROUND), None)
        if empty is not None and (picture := self._background(entry)):
            shown.append(Shown(empty, "edited", picture))
        notes.add("subjects", len(subjects))
        scores = {**entry.scores, FROM_WORDS: 1.0}
        return sample_of(record.id, self.corpus, entry.caption, target, described, shown, scores, entry.cluster)

    def _entry(self, record: Record) -> "_Entry":
        return _Entry(self._content(record), record.id, record.id.rpartition("/")[0])

    def _content(self, record: Record) -> Any:
        place = record.payload
        return parse(read_at(self.root / place["file"], place["offset"], place["size"]), record.id)

    def _good(self, _: str, word: str, score: float | None, counts: str, size: tuple[int, int]) -> bool:
        """Whether an annotation is of a subject that is large and good enough."""
        if score is None or score < self.config.least_aesthetic:
            return False
        try:
            return covered_share(counts, *size) >= self.config.least_area
        except DataError:
            return False

    def _subjects(self, entry: "_Entry", notes: Notes) -> list[Candidate]:
        candidates = []
        for id_, word, score, counts, size in entry.annotations():
            if self._good(id_, word, score, counts, size):
                candidates.append(Candidate(id_, word, decode_rle(counts, *size), score or 0.0))
        kept = without_duplicates(candidates, self.config.most_overlap)
        notes.add("masks of a subject that had one", len(candidates) - len(kept))
        best = sorted(kept, key=lambda one: -one.score)[: self.config.most_subjects]
        return [one for one in kept if any(one is other for other in best)]

    def _video(self, entry: "_Entry") -> bytes:
        name = self.config.videos.format(part=entry.part, path=entry.path, key=entry.key)
        if not (self.root / name).is_file():
            folder = self.root / self.config.videos.partition("{path}")[0].format(part=entry.part, key=entry.key)
            if found := _names_below(folder).get(Path(entry.path).name):
                name = os.path.relpath(found, self.root)
        return read_media(self.root, name, "clip")

    def _pairs(self, entry: "_Entry", tables: Tables, notes: Notes) -> list[Fields]:
        """The cross-frame pairs of an entry, in whichever direction they are listed."""
        if self.config.pairs is None:
            return []
        place = self.root / self.config.pairs
        if place.is_file():
            record = tables.find(_PAIRS, entry.cluster)
            content = [] if record is None else self._content(record)
        else:
            path = place / f"{entry.cluster}.json"
            content = parse(path.read_bytes(), str(path)) if path.is_file() else []
        if not isinstance(content, list):
            raise unknown_form(f"pairs of {entry.cluster}", "no list")
        return [Fields(row, f"pairs of {entry.cluster}, row {number}") for number, row in enumerate(content)]

    def _partner(
        self, entry: "_Entry", subject: Candidate, pairs: list[Fields], tables: Tables, notes: Notes
    ) -> Picture | None:
        """A picture of a subject from another clip: of the pairs that are similar enough the most similar one."""
        config = self.config
        found = []
        for row in pairs:
            if row.number("text_similarity") < config.least_text_similarity:
                continue
            if not config.least_image_similarity < row.number("image_similarity") <= config.most_image_similarity:
                continue
            for own, other in (("cur", "aft"), ("aft", "cur")):
                if row.text(f"{own}_id") in (entry.id, entry.key) and _is_of(row, own, subject):
                    partner = row.text(f"{other}_id")
                    if partner not in (entry.id, entry.key):
                        found.append((-row.number("image_similarity"), partner, row, other))
        for _, partner, row, side in sorted(found, key=lambda one: one[:2]):
            record = tables.find(SAMPLES, partner) or tables.find(SAMPLES, f"{entry.part}/{partner}")
            record = record or next(iter(tables.group(SAMPLES, partner)), None)
            if record is None or record.id == entry.id:
                continue  # it was left out itself
            try:
                picture = self._cut_of(self._entry(record), entry, row, side)
            except DataError as error:
                notes.add(f"cross-frame pairs without a picture: {fault_reason(error).partition(':')[0]}")
                continue
            if picture is not None:
                notes.add("cross-frame pairs used")
                return picture
        return None

    def _cut_of(self, partner: "_Entry", entry: "_Entry", row: Fields, side: str) -> Picture | None:
        """A pair's subject, cut out of the partner's frame; None where that is the entry's own frame."""
        if (partner.part, partner.path, partner.annotated) == (entry.part, entry.path, entry.annotated):
            return None
        for id_, word, _, counts, size in partner.annotations():
            same = id_ == row.text(f"{side}_class_id") if f"{side}_class_id" in row else True
            if same and word == row.text(f"{side}_class_name"):
                (frame,) = frames_at(self._video(partner), {partner.annotated}, partner.id).values()
                frame = partner.crop.of(frame) if partner.crop else frame
                return drawn_picture(cut_out(frame, decode_rle(counts, *size)))
        return None

    def _drawn(self, entry: "_Entry") -> dict[str, str]:
        """The GPT-Image pictures of an entry's subjects: word -> path below the source's folder."""
        if self.config.frames is None:
            return {}
        folder = self.root / self.config.frames.format(part=entry.part, key=entry.key)
        found: dict[str, str] = {}
        for path in sorted(folder.glob("*_*.png"), key=lambda path: path.name):
            if match := re.fullmatch(r"\d+_(.+)\.png", path.name):
                found.setdefault(match[1].replace("_", " "), path.relative_to(self.root).as_posix())
        return found

    def _background(self, entry: "_Entry") -> Picture | None:
        if self.config.backgrounds is None:
            return None
        name = self.config.backgrounds.format(part=entry.part, key=entry.key)
        return read_picture(self.root, name) if (self.root / name).is_file() else None


class _Entry:
    """One clip's entry. Raises DataError for a form that is not known, and for what can't be a sample."""

    def __init__(self, content: Any, id_: str, part: str) -> None:
        fields = Fields(content, id_)
        metadata, annotation = fields.fields("metadata"), fields.fields("annotation")
        self.id, self.part = id_, part
        self.key = id_.removeprefix(f"{part}/")
        self.path = metadata.text("path")
        self.caption = _caption(metadata)
        cut = metadata.numbers("face_cut" if "face_cut" in metadata else "cut", 2)
        self.start, self.stop = int(cut[0]), int(cut[1])
        if not 0 <= self.start < self.stop:
            raise SampleFault("bad cut", f"{id_}: frames {self.start} to {self.stop}")
        self.crop: Crop | None = None
        if "crop" in metadata:
            left, right, top, bottom = (int(side) for side in metadata.numbers("crop", 4))
            self.crop = Crop(left, right, top, bottom)
        self.scores = {name: metadata.number(name) for name in ("aesthetic", "motion", "tech") if name in metadata}
        tags = fields.fields("word_tags") if "word_tags" in fields else None
        self.backgrounds = set(tags.texts("background")) if tags is not None and "background" in tags else set()
        frame = annotation.fields("ann_frame_data")
        self.annotated = frame.whole("ann_frame_idx") if "ann_frame_idx" in frame else self.start
        form = frame.text("box_format") if "box_format" in frame else "xyxy"
        if form != "xyxy":
            raise unknown_form(id_, f"box_format {form!r}: expected xyxy")
        self._annotations = [Fields(one, f"{id_}: annotations") for one in frame.items("annotations")]
        self._map = annotation.fields("mask_map")
        masks = annotation.fields("mask_annotation")
        if str(self.annotated) not in masks:
            raise SampleFault("no mask", f"{id_}: none of frame {self.annotated}")
        self._masks = masks.fields(str(self.annotated))

    @property
    def cluster(self) -> str:
        """The name of the clips that were cut out of the same video."""
        for mark in ("_segment", "_part"):
            if mark in self.key:
                return self.key.partition(mark)[0]
        return self.key

    def annotations(self) -> Iterator[tuple[str, str, float | None, str, tuple[int, int]]]:
        """Id, word, aesthetic score (None where there is none), run lengths and (height, width) of each mask."""
        for number, one in enumerate(self._annotations, 1):
            id_ = str(number)
            if id_ not in self._masks:
                continue
            word = one.text("class_name")
            if id_ in self._map and (named := self._map.fields(id_).text("class_name")) != word:
                raise unknown_form(self.id, f"mask {id_} is of {named!r} in mask_map and of {word!r} in annotations")
            mask = self._masks.fields(id_)
            height, width = mask.numbers("size", 2)
            score = one.number("aes_score") if "aes_score" in one else None
            yield id_, word, score, mask.text("counts"), (int(height), int(width))


def _caption(metadata: Fields) -> str:
    if "cap" in metadata and not any(name in metadata for name in _CAPTIONS):
        return next(iter(metadata.texts("cap")), "").strip()  # of the older form
    return metadata.caption(*_CAPTIONS)


def _target(whole: ClipFile, entry: _Entry, name: str) -> ClipFile:
    """The part of a clip that the entry is of; the file itself where that is all of it."""
    if entry.stop > whole.frames:
        raise SampleFault(
            "short clip", f"{name} has {whole.frames} frames, the entry is of {entry.start} to {entry.stop}"
        )
    height, width = whole.size
    full = entry.crop in (None, Crop(0, width, 0, height))
    if full and (entry.start, entry.stop) == (0, whole.frames):
        return whole
    return cut_clip(whole.data, entry.start, entry.stop, None if full else entry.crop, whole.fps, name)


def _is_of(row: Fields, side: str, subject: Candidate) -> bool:
    """Whether a side of a pair is this subject: by its mask or, in the older form, by its word."""
    if f"{side}_class_id" in row:
        return row.text(f"{side}_class_id") in subject.ids
    return row.text(f"{side}_class_name") in subject.words


@lru_cache(maxsize=64)
def _names_below(folder: Path) -> dict[str, str]:
    """The files below a folder by their own name, the first of each."""
    found: dict[str, str] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            found.setdefault(name, str(Path(parent) / name))
    return found
