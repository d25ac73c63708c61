"""What metrics saw, as pictures for the report: the edited references, and frames with outlines of found subjects."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import encode_jpeg
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.platform.evaluation.metrics.metric import Score, Video, frame_numbers
from domainshuttle.platform.evaluation.metrics.subjects import mask_of, shown_places
from domainshuttle.platform.evaluation.videos import Clip

EDITS_NAME = "edits"
_NAMED_FROM = 120
"""Pixels of a frame's height from which a name on it hides little."""
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4")


def edited_pictures(out: Path, report: Path, scores: Iterable[Score]) -> list[str]:
    """Copies the edits that scores name into the report; their names there, each once."""
    found: dict[str, None] = {}
    for score in scores:
        for edit in score.details.get("edits") or ():
            if not isinstance(edit, Mapping) or edit.get("state") != "edited":
                continue
            source = out / EDITS_NAME / str(edit["digest"]) / "picture.png"
            name = f"{EDITS_NAME}/{edit['digest']}.png"
            if source.is_file():
                if not (report / name).exists():
                    (report / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, report / name)
                found[name] = None
    return list(found)


def found_subjects(report: Path, clip: Clip, score: Score) -> str:
    """Some frames of a clip with the outlines of what a metric took for its subjects; their name in the report, empty
    where the metric looked for none, or the clip can't be read."""
    subjects = [one for one in score.details.get("subjects") or () if isinstance(one, Mapping) and one.get("boxes")]
    if not subjects or not clip.sha256:
        return ""
    seen = hashlib.blake2b(json.dumps(subjects, sort_keys=True).encode(), digest_size=6).hexdigest()
    name = f"found/{clip.column}/{clip.case}-{clip.sha256[:12]}-{seen}.jpg"
    if not (report / name).exists():
        try:
            picture = _drawn(Video.read(clip.path), subjects)
        except DataError:
            return ""
        with atomic_file(report / name, sync=False) as aside:
            aside.write_bytes(encode_jpeg(picture, 85))
    return name


def _drawn(video: Video, subjects: list[Mapping[str, Any]]) -> np.ndarray:
    """Frames side by side, [h,w,3]: the outline of each subject's mask, else its box."""
    count = len(subjects[0]["boxes"])
    numbers = frame_numbers(len(video.frames), count)
    frames = []
    for place in shown_places(count):
        frame = Image.fromarray(video.frames[numbers[place]])
        for number, subject in enumerate(subjects):
            box = subject["boxes"][place] if place < len(subject["boxes"]) else None
            if box is None:
                continue
            colour = _COLOURS[number % len(_COLOURS)]
            left, top, right, bottom = (float(side) for side in box)
            if outline := (subject.get("outlines") or {}).get(str(place)):
                frame = _outlined(frame, mask_of(str(outline), frame.height, frame.width), colour)
                pen = ImageDraw.Draw(frame)
            else:
                pen = ImageDraw.Draw(frame)
                pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=3)
            if frame.height >= _NAMED_FROM:
                text = str(subject.get("word") or f"subject {number}")
                pen.text((left + 4, top + 3), text, fill=colour, stroke_width=2, stroke_fill="black")
        frames.append(np.asarray(frame))
    return np.concatenate(frames, axis=1)


def _outlined(frame: Image.Image, mask: NDArray[np.bool_], colour: str) -> Image.Image:
    """A frame with the edge of a mask, which has a dark line around it so that it is seen on any ground."""
    width = max(2, frame.height // 160)
    pixels = np.asarray(frame).copy()
    pixels[binary_dilation(mask, iterations=1) & ~mask] = 0
    pixels[mask & ~binary_erosion(mask, iterations=width)] = ImageColor.getrgb(colour)
    return Image.fromarray(pixels)
