"""Phantom-Data: clips, and boxes of the same subjects in other clips of the same videos. Format: docs/datasets.md.

The dataset is metadata alone. Its clips are cut out of YouTube videos, which is done beforehand, or here where whole
videos are given. Boxes are those of a frame that was made smaller, to 768 pixels at its longer side; some lie partly
outside, for reasons that nobody has found: these are clamped and counted, and left out where much is cut.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.corpora.downloads import found_files, media_folder
from domainshuttle.pipelines.corpora.files import Picture, Shown, clip_of, drawn_picture, read_media, sample_of
from domainshuttle.pipelines.corpora.json_records import parse
from domainshuttle.pipelines.corpora.parquet_rows import parquet_columns, parquet_rows, require_columns
from domainshuttle.pipelines.corpora.source import (
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
from domainshuttle.pipelines.corpora.words import FROM_WORDS, HUMAN, domain_of
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.media.cut import ClipFile, cut_clip, frames_at
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.values import Real, Share

CANVAS = 768
"""Pixels of the longer side of the frame that boxes are of; smaller ones are not enlarged."""
_MOST_MISSING = 0.05
"""Of a clip, that may be after the end of its video: times are rounded, and copies of a video end a little apart."""
_VID = re.compile(r"(?P<uuid>.+)_(?P<start>\d+(?:\.\d+)?)_(?P<stop>\d+(?:\.\d+)?)")


class PhantomDataConfig(SourceConfig):
    """Clips of Phantom-Data. `{vid}` stands for a clip's name, `{uuid}` for its video's."""

    builder: Literal["phantom-data"] = "phantom-data"
    metadata: str = Field("*multi_ref_merged_filtered*.parquet", description="below `folder`")
    clips: str = Field("videos/{vid}.mp4", description="clips that were cut already")
    videos: str | None = Field(None, description="whole videos to cut them out of, such as sources/{uuid}.mp4")
    most_cut: Share = Field(0.3, description="of a box, that may lie outside of its frame")
    least_score: Real = Field(0.0, ge=0, le=1, description="of a reference")


class PhantomDataSource(FolderSource[PhantomDataConfig], RecordSource):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        found = found_files(self.root, [self.config.metadata], "Parquet files of pairs")
        for path in found:
            named = "vid" if "vid" in parquet_columns(path) else "video_id"
            require_columns(path, (named, "video_caption", "cross_pair"))
        folders = [self.config.clips, *([self.config.videos] if self.config.videos else [])]
        if not any((self.root / template.partition("{")[0]).is_dir() for template in folders):
            media_folder(self.root, self.config.clips.partition("{")[0].rstrip("/"))
        return [Piece.of(path, self.root) for path in found]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        path = self.root / piece.name
        named = "vid" if "vid" in parquet_columns(path) else "video_id"
        for number, row in enumerate(parquet_rows(path, (named, "video_caption", "cross_pair"), 1024)):
            where = f"{piece.name} row {number}"
            try:
                yield self._record(Fields(row, where), named)
            except DataError as error:
                yield LeftOut(where, fault_reason(error))

    def _record(self, fields: Fields, named: str) -> Record | LeftOut:
        id_ = fields.text(named)
        caption = fields.caption("video_caption")
        try:
            pairs = parse(fields.text("cross_pair").encode(), f"{id_}: cross_pair")
        except DataError as error:
            raise SampleFault("broken pair", str(error)) from error
        phrases = [
            _phrase(phrase, Fields(pair, f"{id_}: {phrase}")) for phrase, pair in Fields(pairs, id_).content.items()
        ]
        kept = [one for one in phrases if one["score"] is None or one["score"] >= self.config.least_score]
        if not kept:
            return LeftOut(id_, "low score" if phrases else "no subject")
        return Record(id_, {"caption": caption, "phrases": kept}, uncaptioned=uncaptioned(caption))

    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        target = self._clip(record.id)
        described: list[tuple[str, int]] = []
        shown: list[Shown] = []
        scores: dict[str, float] = {}
        for phrase in record.payload["phrases"]:
            pictures: list[Shown] = []
            for origin, boxes in (("other_clip", phrase["references"]), ("same_clip", phrase["targets"])):
                for box in boxes[:1]:
                    try:
                        picture = self._crop(
                            box, target if origin == "same_clip" and box["vid"] == record.id else None, notes
                        )
                    except DataError as error:
                        notes.add(f"boxes that are left out: {fault_reason(error).partition(':')[0]}")
                        continue
                    pictures.append(Shown(len(described), origin, picture))  # type: ignore[arg-type]
            if not pictures:
                continue
            shown += pictures
            person = phrase["class"] == "person"
            described.append((phrase["word"], HUMAN if person else domain_of(phrase["word"])))
            if phrase["score"] is not None:
                scores[f"reference_{len(described) - 1}"] = phrase["score"]
        if not described:
            raise SampleFault("no reference", f"{record.id}: none of its boxes could be cut out")
        match = _VID.fullmatch(record.id)
        return sample_of(
            record.id,
            self.corpus,
            record.payload["caption"],
            target,
            described,
            shown,
            {**scores, FROM_WORDS: 1.0},
            match["uuid"] if match else None,
        )

    def _clip(self, vid: str) -> ClipFile:
        """A clip: as it was cut beforehand or, where it was not, cut out of its video."""
        name = self.config.clips.format(vid=vid, uuid=vid)
        match = _VID.fullmatch(vid)
        if self.config.videos is None or (self.root / name).is_file() or match is None:
            return clip_of(read_media(self.root, name, "clip"), name)
        name = self.config.videos.format(vid=vid, uuid=match["uuid"])
        whole = clip_of(read_media(self.root, name, "video"), name)
        start, stop = (round(float(match[end]) * whole.fps) for end in ("start", "stop"))
        if stop - whole.frames > max(1, (stop - start) * _MOST_MISSING):
            raise SampleFault(
                "short clip", f"{name} has {counted(whole.frames, 'frame')}, {vid} is of {start} to {stop}"
            )
        return cut_clip(whole.data, start, min(stop, whole.frames), None, whole.fps, f"{name} for {vid}")

    def _crop(self, box: dict[str, Any], clip: ClipFile | None, notes: Notes) -> Picture:
        clip = clip or self._clip(box["vid"])
        number = min(int(clip.frames * box["at"]), clip.frames - 1)
        (frame,) = frames_at(clip.data, {number}, box["vid"]).values()
        placed = place_box(box["box"], (frame.shape[0], frame.shape[1]))
        if placed.cut > self.config.most_cut:
            raise SampleFault("box outside of its frame", f"{box['vid']}: {placed.cut:.0%} of {box['box']}")
        if placed.cut > 0:
            notes.add("boxes that were clamped")
        return drawn_picture(placed.of(frame))


@dataclass(frozen=True)
class PlacedBox:
    """A box in a frame's own pixels, and the share of it that lay outside."""

    left: int
    top: int
    right: int
    bottom: int
    cut: float

    def of(self, frame: Pixels) -> Pixels:
        return frame[self.top : self.bottom, self.left : self.right]


def place_box(box: list[float], size: tuple[int, int]) -> PlacedBox:
    """A box (x0, y0, x1, y1) of the frame at CANVAS, in the frame itself of `size` (height, width). Raises SampleFault
    for an empty one."""
    height, width = size
    scale = max(1.0, max(size) / CANVAS)
    left, top, right, bottom = (side * scale for side in box)
    area = (right - left) * (bottom - top)
    inside = [
        min(max(left, 0), width),
        min(max(top, 0), height),
        min(max(right, 0), width),
        min(max(bottom, 0), height),
    ]
    within = (inside[2] - inside[0]) * (inside[3] - inside[1])
    if right <= left or bottom <= top:
        raise SampleFault("empty box", f"{box}")
    x0, y0, x1, y1 = (round(side) for side in inside)
    if x1 - x0 < 2 or y1 - y0 < 2:
        raise SampleFault("box outside of its frame" if within < area else "empty box", f"{box} in {width}x{height}")
    cut = 1 - within / area
    return PlacedBox(x0, y0, x1, y1, cut if cut > 0.01 else 0.0)  # a pixel over the edge is rounding


def _phrase(phrase: str, fields: Fields) -> dict[str, Any]:
    """A subject: its words, and where it is to be seen. The boxes of references are nested one level deeper."""
    targets = [_box(Fields(one, fields.where), nested=False) for one in fields.items("obj_from_tgt_video")]
    references = []
    for group in fields.items("refer_result"):
        if not isinstance(group, list):
            raise unknown_form(fields.where, "refer_result: expected a list of lists")
        references += [_box(Fields(one, fields.where), nested=True) for one in group]
    scored = [one["score"] for one in references if one["score"] is not None]
    return {"word": phrase.strip() or "subject", "class": next((one["class"] for one in targets if one["class"]), ""),
            "targets": targets, "references": references, "score": max(scored, default=None)}  # fmt: skip


def _box(fields: Fields, nested: bool) -> dict[str, Any]:
    box = fields.items("bbox_loc")
    if nested and len(box) == 1 and isinstance(box[0], list):
        box = box[0]
    box = Fields({"bbox_loc": box}, fields.where).numbers("bbox_loc", 4)
    at = fields.content.get("frame_idx")
    try:
        at = float(at) if isinstance(at, str | int | float) and not isinstance(at, bool) else -1.0
    except (ValueError, OverflowError):
        at = -1.0
    if not 0 <= at <= 1:
        raise unknown_form(fields.where, f"frame_idx is {fields.content.get('frame_idx')!r}: expected 0 to 1")
    score = fields.number("scores") if "scores" in fields else None
    named = fields.text("bbox_cls") if "bbox_cls" in fields else ""
    return {"vid": fields.text("vid"), "at": at, "box": box, "score": score, "class": named}
