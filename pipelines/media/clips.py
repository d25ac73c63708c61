"""Clips: which stream is meant, which frames are sound, and how each is shown."""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import av.filter
import av.logging
import numpy as np
from av.codec.context import Flags
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from domainshuttle.model.pictures import Pixels, to_srgb, upright_on_white
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media import colours, conversions
from domainshuttle.pipelines.media.container_tags import CleanAperture, ContainerTags, Crop, matroska_tags, mp4_tags
from domainshuttle.pipelines.media.conversions import note
from domainshuttle.pipelines.sample import Buffer

RATE_TOLERANCE = 0.01
"""How far a claimed rate may be from the file's, as a part of it: 30 for 29.97 is taken, 25 for 24 is not. A bucket of
81 frames, sampled by either, ends less than a frame apart."""

_NO_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
_RGB, _UNSPECIFIED = 0, 2
_MATRICES = {1, _UNSPECIFIED, 4, 5, 6, 7, 9}
"""Of H.273, those that swscale knows; unspecified is BT.601's, as FFmpeg takes it."""
_FAST_FORMATS = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p"}
"""Formats for which swscale has code that is ten times as fast: it repeats samples of colour and interpolates none, as
FFmpeg does where nothing else is asked for. Beside edges between saturated colours that is twenty levels apart."""
_FAST = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT
_PRECISE = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
_HARMLESS = ("SEI type", "unable to decode APP fields")
"""What decoders call errors though no picture is touched: messages beside the frames that they can't read."""
_OF_THE_START = "mmco: unref short failure"
"""What H.264's decoder says, before it shows a first frame, of a clip that was cut out of another without encoding: its
first pictures let go of ones that stayed behind, and those that need them are not shown."""
_OF_HDR = {SideData.MASTERING_DISPLAY_METADATA, SideData.CONTENT_LIGHT_LEVEL, SideData.DYNAMIC_HDR_PLUS}
_BT2020, _HDR_TRANSFERS = 9, (16, 18)
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_SWSCALE_WHITE = 65283
"""What swscale makes white of other than RGB of 16 bits when it goes to 16 bits."""


def _unnamed(number: int) -> Any:
    """A note that FFmpeg has a number for and PyAV no name, such as the EXIF of a frame: without it, none of the
    frame's notes would be given."""
    member: Any = object.__new__(SideData)
    member._name_, member._value_ = f"number {number}", number
    return member


SideData._missing_ = _unnamed  # type: ignore[assignment]
logging.getLogger("libav").addHandler(logging.NullHandler())  # what is heard here is not for the terminal
_TURN = 0.017
"""Sine of one degree: as far as FFmpeg takes a turn for a right one."""


def chosen_stream(container: InputContainer, name: str) -> av.VideoStream:
    """The video stream that players show: no cover picture or preview; the default one; of several the largest.

    Raises DataError where there is none, or none that can be decoded.
    """
    every = container.streams.video
    if not every:
        raise DataError(f"{name}: not a readable clip: it has no video stream")
    streams = [stream for stream in every if not stream.disposition & _NO_PICTURES]
    if not streams:
        raise DataError(f"{name}: not a readable clip: its only video stream is a cover picture")
    if len(streams) > 1:
        note(conversions.ONE_STREAM)
    streams = [stream for stream in streams if stream.disposition & Disposition.default] or streams
    chosen = max(
        streams, key=lambda stream: (stream.width * stream.height if stream.codec_context else 0, -stream.index)
    )
    if chosen.codec_context is None:
        raise DataError(f"{name}: not a readable clip: there is no decoder for its video stream")
    return chosen


def timed_rate(stamps: list[int | None], tick: Fraction | None, said: Fraction | None) -> Fraction | None:
    """The mean rate of frames that begin at these ticks of so many seconds, or `said` where it is the same: timestamps
    are whole ticks, of which a short clip has few. `said` too where some have none, as in files that were AVI's."""
    known = [stamp for stamp in stamps if stamp is not None]
    if not known or len(known) < len(stamps) or not tick or max(known) == min(known):
        return said
    span = (max(known) - min(known)) * tick
    if said and abs(span - (len(known) - 1) / said) <= Fraction(RATE_TOLERANCE) * span + tick:
        return said
    return (len(known) - 1) / span


@contextmanager
def heard_decoder() -> Iterator[list[tuple[int, str, str]]]:
    """The list that FFmpeg's errors in this thread are added to, as (level, codec, message).

    Some decoders say only so that a checksum is wrong, or that they made a part of a picture up.
    """
    if (av.logging.get_level() or 0) < av.logging.ERROR:
        av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # the same damage in the next clip is an error again
    with av.logging.Capture() as said:
        yield said


@dataclass
class Clip:
    """A clip that is open, and what its frames are to be."""

    container: InputContainer
    stream: av.VideoStream
    tags: ContainerTags
    said: list[tuple[int, str, str]]
    name: str
    lasts: Fraction | None = None
    """Seconds of all packets that were read, where the container says how long each is shown."""
    size: tuple[int, int] = (0, 0)
    """Height and width as the clip is shown, with square pixels, once a frame was."""
    stamps: list[int | None] = field(default_factory=list)
    """When the frames of the packets that were read begin, in ticks of the stream."""
    _frames: int = 0
    _shape: Fraction | None = None
    """Of a pixel, as the decoder says it."""
    _notes: dict[SideData, bytes] | None = None
    _rotation: int = 0
    _reformatter: VideoReformatter = field(default_factory=VideoReformatter)
    _looks: dict[tuple[object, ...], "_Look"] = field(default_factory=dict)

    @classmethod
    def of(
        cls, container: InputContainer, data: Buffer, kind: str, said: list[tuple[int, str, str]], name: str
    ) -> "Clip":
        """The clip of a container of FFmpeg's format `kind`. Raises DataError for what can't be shown rightly."""
        stream = chosen_stream(container, name)
        stream.thread_type = "NONE"
        stream.thread_count = 1
        # else what a conformance window cuts at the left is shown where the rest would lie unaligned in memory
        stream.codec_context.flags |= Flags.unaligned
        stream.codec_context.options = {"err_detect": "crccheck"}
        if kind == "mov":
            tags = mp4_tags(data, stream.id)
        else:
            tags = matroska_tags(data, container.streams.video.index(stream))
        if tags.other_speed:
            raise DataError(f"{name}: its edit list plays a part at another speed, which is not done here")
        if tags.several_shapes:
            raise DataError(f"{name}: parts of its track have other crops or other shapes of pixels")
        if tags.dolby_vision is not None:
            raise DataError(
                f"{name}: Dolby Vision of profile {tags.dolby_vision}, whose colours only its own decoders know"
            )
        return cls(container, stream, tags, said, name, Fraction(0) if kind == "mov" else None)

    def frames(self) -> Iterator[av.VideoFrame]:
        """The frames in the order in which they are shown, none interlaced. Raises DataError at the first that the
        decoder marks as damaged, or after which it reports an error."""
        self.said.clear()  # what was said when the container was opened is of no frame
        return _progressive(self._sound())

    def _sound(self) -> Iterator[av.VideoFrame]:
        decoder = self._decoder()
        for packet in self.container.demux(self.stream):
            if decoder is not self.stream and self._notes is None:  # it does not know what the container says
                for frame in self.stream.decode(packet):
                    self._notes_of_all(frame)
            if packet.size and not packet.is_discard:
                self.stamps.append(packet.pts)
                if self.lasts is not None and packet.time_base:
                    self.lasts += (packet.duration or 0) * packet.time_base
            if packet.is_corrupt:
                raise DataError(f"{self.name}: damaged: a packet is cut or marked as corrupt")
            for frame in decoder.decode(packet):
                self._frames += 1
                if frame.is_corrupt:
                    raise DataError(f"{self.name}: damaged: the decoder marks frame {self._frames} as corrupt")
                if frame.interlaced_frame and self.stream.codec_context.name == "hevc":
                    raise DataError(f"{self.name}: H.265 whose frames are single fields, which are not put together")
                self._check_said()
                self._check_shape(decoder)
                yield frame
            self._check_said()
        if self._frames != len(self.stamps):
            self.lasts = None  # some packets are no frame, or half of one

    def _check_shape(self, decoder: av.VideoStream | VideoCodecContext) -> None:
        context = decoder.codec_context if isinstance(decoder, av.VideoStream) else decoder
        shape = context.sample_aspect_ratio or Fraction(1)
        if self._shape not in (None, shape):
            raise DataError(f"{self.name}: its pixels change their shape, from {self._shape} to {shape} times as wide")
        self._shape = shape

    def read_rest(self) -> None:
        """Reads the packets that are left, of which nothing is decoded, for their `stamps`."""
        for packet in self.container.demux(self.stream):
            if packet.size and not packet.is_discard:
                self.stamps.append(packet.pts)

    def _check_said(self) -> None:
        own = self.stream.codec_context.name
        for level, codec, message in self.said:
            harmless = _HARMLESS if self._frames else (*_HARMLESS, _OF_THE_START)
            if level > av.logging.ERROR or message.startswith(harmless):
                continue
            if codec in (own, _ALPHA_DECODERS.get(own)):
                raise DataError(
                    f"{self.name}: damaged after frame {self._frames}: {codec}: {' '.join(message.split())[:150]}"
                )
        self.said.clear()

    def _decoder(self) -> av.VideoStream | VideoCodecContext:
        """The stream itself, or, for VP8 and VP9 with transparency, the decoders that know it."""
        tags = {name.lower(): value for name, value in self.stream.metadata.items()}  # also as a tag, in capitals
        if tags.get("alpha_mode") != "1" or self.stream.codec_context.name not in _ALPHA_DECODERS:
            return self.stream
        decoder = VideoCodecContext.create(_ALPHA_DECODERS[self.stream.codec_context.name], "r")
        assert isinstance(decoder, VideoCodecContext)
        decoder.thread_count = 1
        for colour in ("color_primaries", "color_trc", "colorspace", "color_range"):  # of the container
            setattr(decoder, colour, getattr(self.stream.codec_context, colour))
        return decoder

    def show(self, frame: av.VideoFrame) -> tuple[Pixels, Fraction]:
        """A frame as it is to be looked at: [h,w,3], and how wide each of its pixels is for its height.

        Raises DataError for colours, turns and views that can't be shown rightly.
        """
        key = (frame.format.name, frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
        look = self._looks.get(key)
        if look is None:
            look = self._looks[key] = _Look.of(frame, self.name)
        pixels = look.pixels(frame, self._reformatter)
        notes = self._notes_of_all(frame)
        if profile := notes.get(SideData.ICC_PROFILE):
            pixels = np.asarray(to_srgb(Image.fromarray(pixels), profile))
            note(conversions.PROFILE)
        aspect = self.tags.aspect or self.stream.sample_aspect_ratio or Fraction(1)
        pixels = self._cropped(pixels)
        if matrix := notes.get(SideData.DISPLAYMATRIX):
            pixels, transposed = _turned(pixels, matrix, self.name)
            aspect = 1 / aspect if transposed else aspect
        if aspect != 1:
            note(conversions.SQUARED)
        return pixels, aspect

    def _notes_of_all(self, frame: av.VideoFrame) -> dict[SideData, bytes]:
        """What the first frame says beside its pixels. PyAV's table of it holds its frame until the garbage collector
        comes, so it is not asked of each; that the turn stays is seen without."""
        if self._notes is not None:
            # an SEI message, unlike a container's matrix, stands at key frames only and holds until the next one
            if frame.rotation not in (self._rotation, 0):
                raise DataError(f"{self.name}: frames turned by {self._rotation} and by {frame.rotation} degrees")
            return self._notes
        every = [(note.type, bytes(note)) for note in _notes(frame)]
        notes = dict(every)
        self._notes, self._rotation = notes, frame.rotation
        if len({content for kind, content in every if kind == SideData.DISPLAYMATRIX}) > 1:
            raise DataError(f"{self.name}: its container and its stream say different turns or mirrorings")
        if SideData.SPHERICAL in notes:
            raise DataError(f"{self.name}: a spherical clip: what of it is seen is not said")
        if _OF_HDR & notes.keys() and frame.color_trc == _UNSPECIFIED:
            raise DataError(f"{self.name}: it has HDR's metadata, and names no transfer function, such as PQ: tag it")
        stereo = notes.get(SideData.STEREO3D)
        if stereo and 0 < struct.unpack_from("i", stereo)[0] < 8:  # 8 is unspecified
            raise DataError(f"{self.name}: a stereoscopic clip: each frame holds the views of two eyes")
        return notes

    def _cropped(self, pixels: Pixels) -> Pixels:
        if self.tags.aperture is None:
            return pixels
        height, width, _ = pixels.shape
        crop = self.tags.aperture
        crop = crop.crop(height, width) if isinstance(crop, CleanAperture) else crop
        if (
            min(crop.top, crop.bottom, crop.left, crop.right) < 0
            or crop.top + crop.bottom >= height
            or (crop.left + crop.right >= width)
        ):
            raise DataError(f"{self.name}: its container crops {crop} of {height}x{width} pixels, which can't be")
        if crop != Crop():
            note(conversions.CROPPED)
        return pixels[crop.top : height - crop.bottom, crop.left : width - crop.right]


@dataclass(frozen=True)
class _Look:
    """How the coded values of a frame become sRGB."""

    flags: Interpolation
    format: str
    white: int
    """The level of white in that format."""
    space: colours.ColourSpace | None
    expand: bool
    """Grey in limited range, which swscale takes as full."""

    @classmethod
    def of(cls, frame: av.VideoFrame, name: str) -> "_Look":
        """Raises DataError for a matrix, range, transfer or primaries that can't be shown rightly."""
        kind, matrix = frame.format, frame.colorspace
        limited = frame.color_range == ColorRange.MPEG
        grey, mono = kind.name.startswith(("gray", "ya")), kind.name.startswith("mono")
        if kind.is_rgb or kind.has_palette:
            if limited:
                raise DataError(f"{name}: RGB in limited range, which FFmpeg takes as full")
        elif not grey and not mono and matrix not in _MATRICES:
            raise DataError(f"{name}: colour matrix {matrix} of H.273 is not read")
        elif (
            not grey
            and matrix == _UNSPECIFIED
            and (frame.color_primaries == _BT2020 or frame.color_trc in _HDR_TRANSFERS)
        ):
            raise DataError(f"{name}: it names wide or HDR's colours, and no matrix, which is not guessed: tag it")
        if grey and frame.color_range not in (ColorRange.MPEG, ColorRange.JPEG):
            raise DataError(f"{name}: grey frames that do not say whether their range is full or limited")
        space = colours.named(frame.color_primaries, frame.color_trc, name)
        alpha = kind.has_palette or any(component.is_alpha for component in kind.components)
        guessed = matrix == _UNSPECIFIED or frame.color_range not in (ColorRange.MPEG, ColorRange.JPEG)
        for conversion, done in (
            (conversions.GUESSED, guessed and not (kind.is_rgb or kind.has_palette or grey or mono)),
            (conversions.ON_WHITE, alpha),
            (conversions.DEPTH, max(component.bits for component in kind.components) > 8),
            (conversions.HDR, space is not None and space.curve in ("PQ", "HLG")),
            (conversions.WIDE, space is not None and space.curve not in ("PQ", "HLG")),
        ):
            if done:
                note(conversion)
        if space is None:
            flags = _FAST if kind.name in _FAST_FORMATS else _PRECISE
            return cls(flags, "rgba" if alpha else "rgb24", 255, None, grey and limited)
        if kind.is_rgb:
            white = 65535 if kind.components[0].bits > 8 else _SWSCALE_WHITE
            return cls(Interpolation.BILINEAR, "rgba64le" if alpha else "rgb48le", white, space, False)
        # not rgb48le, which swscale gets wrong with interpolated chroma
        return cls(_PRECISE, "gbrap16le" if alpha else "gbrp16le", _SWSCALE_WHITE, space, grey and limited)

    def pixels(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> Pixels:
        coded = reformatter.reformat(frame, format=self.format, interpolation=self.flags, threads=1)
        levels: NDArray[Any] = coded.to_ndarray()
        shown = levels[..., :3]
        if self.expand:
            black, most = self.white * 16 / 255, levels.dtype.type(self.white)
            spread = (shown - np.float32(black)) * np.float32(255 / 219)
            shown = np.clip(np.rint(spread), 0, most).astype(levels.dtype)
        if self.space is not None:
            if self.white != 65535:
                shown = np.minimum(shown * np.float32(65535 / self.white) + 0.5, 65535).astype(np.uint16)
            shown = colours.to_srgb(shown, self.space)
        if levels.shape[-1] == 3:
            return shown
        opacity = levels[..., 3] if self.space is None else (levels[..., 3] >> 8).astype(np.uint8)
        picture, mask = (Image.fromarray(np.ascontiguousarray(one)) for one in (shown, opacity))
        return np.asarray(upright_on_white(picture, mask, None))


def _notes(frame: av.VideoFrame) -> Iterator[Any]:
    """What PyAV declares as a mapping yields the notes themselves."""
    return iter(frame.side_data)


def _turned(pixels: Pixels, matrix: bytes, name: str) -> tuple[Pixels, bool]:
    """[h,w,3] by a display matrix, and whether height and width changed places."""
    a, b, _, c, d, *_ = struct.unpack("<9i" if len(matrix) == 36 else "<0i", matrix)
    across, down = (a * a + b * b) ** 0.5, (c * c + d * d) ** 0.5
    if not across or not down:
        return pixels, False
    if (a, d) != (abs(a), abs(d)) or max(abs(b) / across, abs(c) / down) >= _TURN:
        note(conversions.TURNED)
    if max(abs(b) / across, abs(c) / down) < _TURN:
        return pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1], False
    if max(abs(a) / across, abs(d) / down) < _TURN:
        return pixels.swapaxes(0, 1)[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1], True
    raise DataError(f"{name}: its display matrix turns it by other than right angles: {(a, b, c, d)}")


def _progressive(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The frames, those that are interlaced as whole pictures: FFmpeg's bwdif, one a frame, from the first such on."""
    for frame in frames:
        if frame.interlaced_frame:
            yield from _deinterlaced(frame, frames)
            return
        yield frame


def _deinterlaced(first: av.VideoFrame, rest: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    note(conversions.DEINTERLACED)
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=first.time_base)
    graph.link_nodes(
        source, graph.add("bwdif", mode="send_frame", parity="auto", deint="interlaced"), graph.add("buffersink")
    ).configure()
    tags = first.colorspace, first.color_range, first.color_primaries, first.color_trc
    for frame in _and(first, rest):
        graph.vpush(frame)
        yield from _pulled(graph, tags)
    graph.vpush(None)
    yield from _pulled(graph, tags)


def _and(first: av.VideoFrame, rest: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    yield first
    yield from rest


def _pulled(graph: av.filter.Graph, tags: tuple[int, int, int, int]) -> Iterator[av.VideoFrame]:
    while True:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = tags
        yield frame
