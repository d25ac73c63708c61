"""What MP4, QuickTime and Matroska say of a clip that PyAV does not tell: its crop, speed, Dolby Vision and end."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import Buffer


@dataclass(frozen=True)
class Crop:
    """Rows and columns that are not shown."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


@dataclass(frozen=True)
class CleanAperture:
    """The part of an MP4's picture that is shown: its size, and its centre's distance from that of the picture."""

    width: Fraction
    height: Fraction
    right: Fraction
    down: Fraction

    def crop(self, height: int, width: int) -> Crop:
        """Of a picture of that size; negative where the aperture is larger than it."""
        left = round((width - self.width) / 2 + self.right)
        top = round((height - self.height) / 2 + self.down)
        return Crop(top, height - top - round(self.height), left, width - left - round(self.width))


@dataclass(frozen=True)
class ContainerTags:
    """Of one video track."""

    aperture: CleanAperture | Crop | None = None
    aspect: Fraction | None = None
    """How wide a pixel is for its height, where the size of the track says it of the part that is shown; FFmpeg takes
    it as that of the whole picture."""
    other_speed: bool = False
    """Whether an edit plays a part at another speed, or stands still."""
    dolby_vision: int | None = None
    """The profile, where decoders that do not know Dolby Vision show its pictures in wrong colours."""
    several_shapes: bool = False
    """Whether the track has parts with another crop, or another shape of pixels."""


def mp4_tags(data: Buffer, track: int) -> ContainerTags:
    """Of the track with that number."""
    view = memoryview(data).cast("B")
    for trak in _inside(view, (b"moov", b"trak")):
        headers = [head for kind, head in _boxes(trak) if kind == b"tkhd"]
        if not headers or _track_number(headers[0]) != track:
            continue
        aperture, aspect, profile = None, None, None
        shapes = set()
        for entry in _sample_entries(trak):
            inner = list(_boxes(entry[78:]))
            shapes.add(tuple(sorted((kind, bytes(content)) for kind, content in inner if kind in (b"clap", b"pasp"))))
            for kind, content in inner:
                if kind == b"clap" and len(content) >= 32:
                    aperture = _clean_aperture(content)
                elif kind in _DOLBY_BOXES:
                    profile = _dolby_alone(content)
            if aperture and all(kind != b"pasp" for kind, _ in inner):
                aspect = _aspect_of_track(headers[0], aperture, struct.unpack_from(">HH", entry, 24))
        other_speed = any(rate != 1 << 16 for edits in _inside(trak, (b"edts", b"elst")) for rate in _edit_rates(edits))
        return ContainerTags(aperture, aspect, other_speed, profile, len(shapes) > 1)
    return ContainerTags()


def check_whole(data: Buffer, kind: str, name: str) -> None:
    """Raises DataError for a file that ends before what its container says, as where a download broke off: what is
    left of it decodes, as a shorter clip."""
    view = memoryview(data).cast("B")
    for part, end in _mp4s_parts(view) if kind == "mov" else _matroskas_parts(view):
        if end > len(view):
            raise DataError(f"{name}: damaged: it is cut at byte {len(view)}, and its {part} goes on to byte {end}")


def _mp4s_parts(view: memoryview) -> Iterator[tuple[str, int]]:
    """The boxes without which there is no clip, or less of it, and where each ends."""
    for kind, _, end in _placed_boxes(view):
        if kind in (b"moov", b"moof", b"mdat"):
            yield kind.decode(), end


def _matroskas_parts(view: memoryview) -> Iterator[tuple[str, int]]:
    """The parts of a file that lie one after another, and where each ends: its segment or, where that has no length,
    as of a live stream, what is in it; and so for its clusters."""
    starts = [0]
    while starts:
        for number, start, end in _placed_elements(view, starts.pop()):
            if end is not None:
                yield "segment" if number == _SEGMENT else f"element {number:X}", end
            elif number in (_SEGMENT, _CLUSTER):
                starts.append(start)
            if number == _SEGMENT:
                break


def matroska_tags(data: Buffer, number: int) -> ContainerTags:
    """Of the video track at that place among the video tracks."""
    view, seen = memoryview(data).cast("B"), 0
    for kind, segment in _elements(view):
        if kind != _SEGMENT:
            continue
        for kind, tracks in _elements(segment):
            if kind != 0x1654AE6B:
                continue
            for kind, entry in _elements(tracks):
                fields = dict(_elements(entry)) if kind == 0xAE else {}
                if 0xE0 not in fields or int.from_bytes(fields.get(0x83, b"\1"), "big") != 1:
                    continue
                if seen == number:
                    video = {field: int.from_bytes(value[:8], "big") for field, value in _elements(fields[0xE0])}
                    crop = Crop(*(video.get(field, 0) for field in (0x54BB, 0x54AA, 0x54CC, 0x54DD)))
                    profile = _matroskas_dolby(entry)
                    return ContainerTags(crop if crop != Crop() else None, dolby_vision=profile)
                seen += 1
            return ContainerTags()
    return ContainerTags()


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_DOLBY_BOXES = (b"dvcC", b"dvvC", b"dvwC")
_DOLBY_ALONE, _DOLBY_BY_COMPATIBILITY = 5, 10
"""The profile whose pictures are only Dolby Vision's, and the first of those that say what else they are."""


def _dolby_alone(content: memoryview) -> int | None:
    """The profile of a Dolby Vision configuration whose base layer is nothing that others show; None for others."""
    if len(content) < 5:
        return None
    profile, compatible = content[2] >> 1, content[4] >> 4
    alone = profile == _DOLBY_ALONE or (profile >= _DOLBY_BY_COMPATIBILITY and not compatible)
    return profile if alone else None


def _matroskas_dolby(entry: memoryview) -> int | None:
    """Of a track's entry, which has a configuration as MP4's boxes are in a BlockAdditionMapping."""
    for kind, mapping in _elements(entry):
        fields = dict(_elements(mapping)) if kind == 0x41E4 else {}
        if 0x41ED in fields and bytes(fields.get(0x41E7, b"")) in _DOLBY_BOXES:
            return _dolby_alone(fields[0x41ED])
    return None


def _aspect_of_track(header: memoryview, aperture: CleanAperture, coded: tuple[int, int]) -> Fraction | None:
    """The shape of a pixel by the size of the track, where that is not the size of the coded picture, (width, height);
    a difference of less than a pixel is none."""
    size = header[88:96] if header[:1] == b"\1" else header[76:84]
    if len(size) < 8:
        return None
    width, height = (Fraction(side, 1 << 16) for side in struct.unpack(">II", size))
    if not width or not height or (width, height) == coded:
        return None
    aspect = (width / height) / (aperture.width / aperture.height)
    return Fraction(1) if abs(aspect - 1) * max(aperture.width, aperture.height) < 1 else aspect


def _boxes(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of each box; what is cut off or has no sense ends it."""
    for kind, start, end in _placed_boxes(view):
        yield kind, view[start:end]


def _placed_boxes(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each box, and where its content begins and should end, which may be after the end of what there is."""
    position = 0
    while position + 8 <= len(view):
        size, head = int.from_bytes(view[position : position + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(view[position + 8 : position + 16], "big"), 16
        elif size == 0:
            size = len(view) - position
        if size < head:
            return
        yield bytes(view[position + 4 : position + 8]), position + head, position + size
        position += size


def _inside(view: memoryview, path: tuple[bytes, ...]) -> Iterator[memoryview]:
    for kind, content in _boxes(view):
        if kind == path[0]:
            yield from _inside(content, path[1:]) if len(path) > 1 else [content]


def _track_number(header: memoryview) -> int:
    start = 20 if header[:1] == b"\1" else 12
    return int.from_bytes(header[start : start + 4], "big")


def _sample_entries(trak: memoryview) -> Iterator[memoryview]:
    for descriptions in _inside(trak, (b"mdia", b"minf", b"stbl", b"stsd")):
        yield from (entry for _, entry in _boxes(descriptions[8:]))


def _clean_aperture(content: memoryview) -> CleanAperture | None:
    values = struct.unpack(">IIIIiIiI", content[:32])
    if not all(values[1::2]):
        return None
    return CleanAperture(*(Fraction(over, under) for over, under in zip(values[::2], values[1::2], strict=True)))


def _edit_rates(edits: memoryview) -> Iterator[int]:
    if len(edits) < 8:
        return
    entry = struct.Struct(">Qqi" if edits[0] == 1 else ">Iii")
    count = min(int.from_bytes(edits[4:8], "big"), (len(edits) - 8) // entry.size)
    for number in range(count):
        _, start, rate = entry.unpack_from(edits, 8 + number * entry.size)
        if start >= 0:  # else nothing is shown
            yield rate


def _elements(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each element of EBML; those of unknown length go to the end."""
    for number, start, end in _placed_elements(view):
        yield number, view[start:end]


def _placed_elements(view: memoryview, position: int = 0) -> Iterator[tuple[int, int, int | None]]:
    """Number of each element of EBML from a byte on, and where its content begins and should end, which may be after
    the end of what there is; None for one of unknown length, which is the last."""
    while position < len(view):
        first = view[position]
        length = 9 - first.bit_length()
        if length > 4 or position + length >= len(view):
            return
        number = int.from_bytes(view[position : position + length], "big")
        position += length
        first = view[position]
        length = 9 - first.bit_length()
        if length > 8 or position + length > len(view):
            return
        size = int.from_bytes(view[position : position + length], "big") & ((1 << 7 * length) - 1)
        position += length
        if size == (1 << 7 * length) - 1:
            yield number, position, None
            return
        yield number, position, position + size
        position += size
