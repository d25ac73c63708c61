"""Clips as they come from a source: what they are, single frames of them, and parts that are cut out.

A clip of which all is wanted keeps its bytes. Only what is cut, in time or in its frames, is encoded again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import numpy as np

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.media.clips import timed_rate
from domainshuttle.pipelines.media.decode import encode_frames, opened_clip, sampled_frames, shown_frames
from domainshuttle.pipelines.media.file_types import clip_format
from domainshuttle.pipelines.sample import Buffer


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of a frame, in pixels: `left` to `right` and `top` to `bottom`, the ends left out."""

    left: int
    right: int
    top: int
    bottom: int

    def of(self, frame: Pixels) -> Pixels:
        """[h,w,3] of a frame. Raises DataError where it is not within it."""
        height, width = frame.shape[:2]
        if not (0 <= self.left < self.right <= width and 0 <= self.top < self.bottom <= height):
            raise DataError(f"{self} is not within a frame of {width}x{height}")
        return frame[self.top : self.bottom, self.left : self.right]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    def even(self) -> "Crop":
        """The largest part of it of even height and width, as H.264 wants."""
        height, width = self.size
        return Crop(self.left, self.right - width % 2, self.top, self.bottom - height % 2)


@dataclass(frozen=True, slots=True)
class ClipFile:
    """A clip's bytes and what `key.json` says of it: `size` is (height, width) as it is looked at."""

    data: Buffer
    extension: str
    frames: int
    fps: float
    size: tuple[int, int]


def clip_file(data: Buffer, name: str) -> ClipFile:
    """A clip as it is. Raises DataError for what is none, for one frame alone, and where its first frame can't be
    shown."""
    with opened_clip(data, name) as clip:  # once: to open it costs as much as to decode some frames
        sampled_frames(clip, 1, None, None)
        clip.read_rest()
        count, (height, width) = len(clip.stamps), clip.size
        rate = clip.stream.average_rate or clip.stream.guessed_rate
        if matroska := clip_format(data, name) == "matroska":  # which says no mean, but how long a frame lasts
            rate = timed_rate(clip.stamps, clip.stream.time_base, rate)
        hidden = clip.stream.codec_context.name == "vp8"  # whose packets may be of no frame
    if hidden:
        with opened_clip(data, name) as clip:
            count = sum(1 for _ in clip.frames())
    if count < 2 or not rate:
        raise DataError(f"{name}: {counted(count, 'frame')} at {rate} a second {'is' if count == 1 else 'are'} no clip")
    extension = "mkv" if matroska else "mp4"
    return ClipFile(data, extension, count, float(Fraction(rate)), (height, width))


def frames_at(data: Buffer, numbers: set[int], name: str) -> dict[int, Pixels]:
    """Single frames [h,w,3] by their number. Raises DataError where the clip ends before the last."""
    found = {}
    with opened_clip(data, name) as clip:
        for number, frame in enumerate(islice(shown_frames(clip), max(numbers) + 1)):
            if number in numbers:
                found[number] = frame
    if missing := numbers - set(found):
        raise DataError(f"{name}: frame {min(missing)} is asked for, and it has fewer")
    return found


def cut_clip(data: Buffer, start: int, stop: int, crop: Crop | None, fps: float, name: str) -> ClipFile:
    """Frames `start` to `stop` - 1 of a clip, each cut to `crop`, as a new one (H.264) of `fps` frames a second.

    Odd heights and widths lose their last row and column. Raises DataError where the clip ends before.
    """
    count = 0

    def wanted() -> Iterator[Pixels]:
        nonlocal count
        for frame in frames:
            if (frame.shape[0], frame.shape[1]) != shown:
                raise DataError(f"{name}: its frames are not all of one size")
            yield np.ascontiguousarray(box.of(frame))
            count += 1

    with opened_clip(data, name) as clip:
        every = islice(shown_frames(clip), start, stop)
        first = next(every, None)
        if first is None:
            raise DataError(f"{name}: frames {start} to {stop} are asked for, and it has no more than {start}")
        shown = (first.shape[0], first.shape[1])
        box = (crop or Crop(0, shown[1], 0, shown[0])).even()
        frames = _before(first, every)
        made = encode_frames(wanted(), box.size, fps)
    if count != stop - start:
        raise DataError(f"{name}: frames {start} to {stop} are asked for, and it has {start + count}")
    return ClipFile(made, "mp4", count, fps, box.size)


def _before(first: Pixels, rest: Iterator[Pixels]) -> Iterator[Pixels]:
    yield first
    yield from rest
