"""Pictures and clips: bytes to arrays and back, resizing to a bucket.

Arrays are uint8 sRGB, [height, width, 3] for pictures and [frames, height, width, 3] for clips, as they are meant to be
looked at: docs/corpus.md has a table of what is obeyed and what is refused. Anything that can't be decoded, or not
rightly, raises `DataError` with the reason, so that a bad sample becomes a row of the quarantine table; whatever a
decoder raises of a file's bytes is such a reason, since their errors are as many as their formats' corners.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np
import simplejpeg
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, features

from domainshuttle.model import pictures
from domainshuttle.model.pictures import Pixels, resized
from domainshuttle.pipelines.buckets import Bucket, checked_rate, cover_geometry
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.media import colours, conversions
from domainshuttle.pipelines.media.clips import Clip, heard_decoder
from domainshuttle.pipelines.media.container_tags import check_whole
from domainshuttle.pipelines.media.conversions import note
from domainshuttle.pipelines.media.file_types import clip_format, picture_format
from domainshuttle.pipelines.media.picture_tags import GREY, RGB, PngTags, check_png, jpeg_is_plain, png_tags
from domainshuttle.pipelines.sample import Buffer

__all__ = [
    "RULES",
    "TRANSFORM",
    "Pixels",
    "decode_image",
    "decode_video",
    "encode_frames",
    "encode_jpeg",
    "encode_mp4",
    "fit_reference",
    "fit_target",
    "opened_clip",
    "sampled_frames",
    "shown_frames",
]

RULES = (
    "as shown: upright, square pixels, sRGB, on white; target: cover and centre crop, sampled by time; references, "
    "single ones with a view: contain on white; v6"
)
"""What is done to pixels before they are encoded."""

_DECODERS = "; ".join(
    (
        f"av {av.__version__}",
        *(f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libswscale")),
        f"Pillow {Image.__version__}",
        *(f"{name} {features.version(name)}" for name in ("littlecms2", "jpg", "webp")),
        f"simplejpeg {simplejpeg.__version__}",
    )
)

TRANSFORM = f"{RULES}; {_DECODERS}"
"""The rules, and what carries them out with its version: encoded corpora name it, and only equal ones are mixed."""

MAX_PIXELS = 64_000_000
"""A picture, or a frame, that declares more is refused before it is decoded (decompression bombs)."""
MAX_CLIP_PIXELS = 2_000_000_000
"""Of all frames of a clip that are kept, at their full size: 81 of 6144x3456, or 964 of 1080p."""
MAX_DECODED_PIXELS = 20_000_000_000
"""Of all frames that are decoded for them."""


def encode_jpeg(picture: Pixels, quality: int = 92) -> bytes:
    """[h,w,3] uint8 to JPEG bytes, chroma not subsampled."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(picture), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def encode_mp4(clip: Pixels, fps: float, crf: int = 16) -> bytes:
    """[F,h,w,3] uint8 to an H.264 MP4 (yuv420p, so height and width must be even): the same bytes for the same frames.

    The colours are BT.709's in limited range, and the file says so, since players guess where it does not.
    """
    return encode_frames(clip, (clip.shape[1], clip.shape[2]), fps, crf)


def encode_frames(frames: Iterable[Pixels], size: tuple[int, int], fps: float, crf: int = 16) -> bytes:
    """Frames [h,w,3] of `size` (height, width), of which one is held at a time, to what `encode_mp4` makes of them."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        coder = stream.codec_context
        coder.color_primaries, coder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        coder.colorspace, coder.color_range = _AVCOL_SPC_BT709, ColorRange.MPEG
        # Threads decide where a picture is cut into slices. The macroblock tree, which spreads bits over frames, reads
        # memory that was never written in x264's AVX-512 code, so other bytes come out from time to time.
        stream.options = {"crf": str(crf), "preset": "fast", "threads": "1", "mbtree": "0"}
        colours = VideoReformatter()
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(
                stream.encode(
                    colours.reformat(
                        rgb,
                        format="yuv420p",
                        dst_colorspace=Colorspace.ITU709,
                        dst_color_range=ColorRange.MPEG,
                        threads=1,
                    )
                )
            )
        container.mux(stream.encode())
    return buffer.getvalue()


_AVCOL_SPC_BT709 = 1
"""The matrix as FFmpeg numbers it; `Colorspace` has swscale's numbers."""


def decode_image(data: Buffer, name: str = "image", out: Pixels | None = None) -> Pixels:
    """JPEG, PNG or WebP bytes to [h,w,3] uint8 as they are meant to be looked at: turned upright, sRGB, on white where
    they are transparent.

    `out`, contiguous, is where the picture goes, such as its place in a batch: a JPEG is decoded straight into it,
    which saves a page fault every 4 KiB of fresh memory, and the copy.

    Raises DataError when the bytes are no such picture, are cut short, declare more than 64 million pixels, have
    colours or pixels that can't be shown rightly, or are of another size than `out`.
    """
    if out is not None and not out.flags.c_contiguous:
        raise ValueError("decode_image needs memory without gaps")
    kind = picture_format(data, name)
    try:
        if kind != "JPEG" or (pixels := _decode_plain_jpeg(data, name, out)) is None:
            pixels = _decode_with_pillow(data, kind, name)
        if out is None or pixels is out:
            return pixels
        _check_same_size(pixels.shape, out, name)
        out[...] = pixels
        return out
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{name}: not a readable {kind} picture ({_reason(error)})") from error


def _decode_plain_jpeg(data: Buffer, name: str, out: Pixels | None) -> Pixels | None:
    """[h,w,3] by libjpeg-turbo, in `out` where that is given; None for a JPEG that is to be turned or converted, and
    where the binding does not know the chroma sampling, as of some rare ones."""
    if not jpeg_is_plain(data, name) and not _only_noted(data, name):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except (KeyError, ValueError):
        return None
    _check_size(width, height, name)
    if out is not None:
        _check_same_size((height, width, 3), out, name)
    # strict: a truncated picture is an error, not half a picture with grey below
    pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=out)
    return pixels if out is None else out


def _only_noted(data: Buffer, name: str) -> bool:
    """Whether what a JPEG has beside its pixels, as cameras' have, leaves them as they are."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
        _check_size(picture.width, picture.height, name)
        if pictures.profile_of(picture) is not None or pictures.upright_turn(picture) is not None:
            return False
        return picture.mode in ("L", "RGB") and getattr(picture, "n_frames", 1) == 1


def _decode_with_pillow(data: Buffer, kind: str, name: str) -> Pixels:
    with Image.open(io.BytesIO(data), formats=[kind]) as picture:
        _check_size(picture.width, picture.height, name)
        if kind == "JPEG":
            return _decode_jpeg_levels(data, picture)
        if kind != "PNG":
            _note_conversions(picture, None)
            return np.asarray(pictures.as_shown(picture))
        check_png(data, name)
        tags = png_tags(data, name)
        _note_conversions(picture, tags)
        if tags.coded:
            picture.info.pop("icc_profile", None)
        if tags.colour_type == GREY and tags.hidden and tags.depth in (2, 4):
            # Pillow spreads the levels over 0..255, but not the one that is transparent
            picture.info["transparency"] *= 255 // ((1 << tags.depth) - 1)
        if tags.space is None and not (tags.depth == 16 and tags.colour_type == RGB and tags.hidden):
            return np.asarray(pictures.as_shown(picture))
        return _decode_png_levels(data, picture, tags)


def _decode_jpeg_levels(data: Buffer, picture: Image.Image) -> Pixels:
    """A JPEG that is turned or converted. Its levels come from libjpeg-turbo in strict mode, since Pillow passes over
    what libjpeg says of damage; of CMYK, which Adobe stores inverted, and of rare chroma samplings they are Pillow's.
    """
    _note_conversions(picture, None)
    try:
        simplejpeg.decode_jpeg_header(data)
    except (KeyError, ValueError):  # a sampling that the binding does not know
        return np.asarray(pictures.as_shown(picture))
    form = {"L": "GRAY", "CMYK": "CMYK"}.get(picture.mode, "RGB")
    levels: Pixels = simplejpeg.decode_jpeg(data, colorspace=form, strict=True)
    if form == "CMYK":
        return np.asarray(pictures.as_shown(picture))
    image = Image.fromarray(levels[..., 0] if form == "GRAY" else levels)
    image = pictures.to_srgb(image, pictures.profile_of(picture))
    return np.asarray(pictures.upright_on_white(image, None, pictures.upright_turn(picture)))


def _note_conversions(picture: Image.Image, tags: PngTags | None) -> None:
    profile = not (tags and tags.coded) and pictures.profile_of(picture) is not None
    space = tags.space if tags else None
    for conversion, done in (
        (conversions.TURNED, pictures.upright_turn(picture) is not None),
        (conversions.PROFILE, profile),
        (conversions.GUESSED, picture.mode == "CMYK" and not profile),
        (conversions.ON_WHITE, picture.has_transparency_data),
        (conversions.DEPTH, tags is not None and tags.depth > 8),
        (conversions.HDR, space is not None and space.curve in ("PQ", "HLG")),
        (conversions.WIDE, space is not None and space.curve not in ("PQ", "HLG")),
        (conversions.ONE_PICTURE, getattr(picture, "n_frames", 1) > 1),
    ):
        if done:
            note(conversion)


def _decode_png_levels(data: Buffer, picture: Image.Image, tags: PngTags) -> Pixels:
    """A PNG whose colours are not sRGB's, or whose transparent colour has 16 bits, of which Pillow keeps 8."""
    if tags.depth < 16:
        return np.asarray(pictures.as_shown(picture, lambda image: _converted(image, tags)))
    picture.load()  # checks what FFmpeg's decoder lets pass
    decoder = av.VideoCodecContext.create("png", "r")
    decoder.thread_count = 1
    frame = [*decoder.decode(av.Packet(bytes(data))), *decoder.decode(None)][0]
    levels: NDArray[Any] = VideoReformatter().reformat(frame, format="rgba64le", threads=1).to_ndarray()
    colour = levels[..., :3]
    shown = (colour >> 8).astype(np.uint8) if tags.space is None else colours.to_srgb(colour, tags.space)
    image = pictures.to_srgb(Image.fromarray(shown), None if tags.space else pictures.profile_of(picture))
    opacity = Image.fromarray((levels[..., 3] >> 8).astype(np.uint8))
    return np.asarray(pictures.upright_on_white(image, opacity, pictures.upright_turn(picture)))


def _converted(image: Image.Image, tags: PngTags) -> Image.Image:
    assert tags.space is not None
    return Image.fromarray(colours.to_srgb(np.asarray(image.convert("RGB")).astype(np.uint16) * 257, tags.space))


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: declares {width}x{height} pixels; at most {MAX_PIXELS} are read")


def _check_same_size(shape: tuple[int, ...], out: Pixels, name: str) -> None:
    if shape != out.shape:
        raise DataError(f"{name}: {shape[0]}x{shape[1]} pixels, expected {out.shape[0]}x{out.shape[1]}")


def _reason(error: Exception) -> str:
    """A decoder's error for the quarantine table: its type says more than its text where that is not for people."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"


def decode_video(
    data: Buffer, frames: int, fps: float | None = None, name: str = "video", fit: Bucket | None = None
) -> Pixels:
    """The first `frames` frames of a clip as they are meant to be looked at, [frames,h,w,3] uint8, sampled at `fps`
    (None: every frame, in order).

    With `fit` each is brought to the bucket's size as soon as it is decoded, to what `fit_target` gives of them all, so
    that no more than one is held at its full size. Frame k is the last one shown at time k / fps after the first, by
    the clip's timestamps, so a variable rate is sampled rightly, and the last one lasts as long as the clip says.
    Raises DataError when the clip can't be decoded or shown rightly, is damaged, is too short, or has more pixels than
    MAX_CLIP_PIXELS (those that are kept) or MAX_DECODED_PIXELS (all up to the last).
    """
    with opened_clip(data, name) as clip:
        return sampled_frames(clip, frames, fps, fit)


def sampled_frames(clip: Clip, frames: int, fps: float | None, fit: Bucket | None) -> Pixels:
    """`decode_video` of a clip that is open."""
    checked_rate(fps, clip.name)
    _check_clip(clip.stream.width, clip.stream.height, frames, clip.name)
    decoded = _bounded(clip.frames(), clip.name)
    return _collect(_sampled(decoded, clip.stream, fps, clip), clip, frames, fps, fit)


@contextmanager
def opened_clip(data: Buffer, name: str = "video") -> Iterator[Clip]:
    """A clip to read. Whatever its bytes make the decoder raise within the block is a DataError with the reason."""
    kind = clip_format(data, name)
    check_whole(data, kind, name)
    try:
        # some stock footage has tags that are not UTF-8: they must not stop the decoding
        with (
            heard_decoder() as said,
            av.open(io.BytesIO(data), mode="r", format=kind, metadata_errors="replace") as container,
        ):
            yield Clip.of(container, data, kind, said, name)
    except av.FFmpegError as error:
        raise DataError(f"{name}: not a readable clip ({_reason(error)})") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{name}: not a readable clip ({_reason(error)})") from error


def shown_frames(clip: Clip) -> Iterator[Pixels]:
    """Every frame of a clip in order, [h,w,3] as it is meant to be looked at, with square pixels."""
    for frame in _bounded(clip.frames(), clip.name):
        _check_size(frame.width, frame.height, clip.name)
        pixels, aspect = clip.show(frame)
        size = _square((pixels.shape[0], pixels.shape[1]), aspect)
        _check_size(size[1], size[0], clip.name)
        yield pixels if pixels.shape[:2] == size else np.asarray(resized(pixels, size))


def _check_clip(width: int, height: int, frames: int, name: str) -> None:
    _check_size(width, height, name)
    if width * height * frames > MAX_CLIP_PIXELS:
        raise DataError(
            f"{name}: {frames} frames of {width}x{height} are {width * height * frames} pixels; at most "
            f"{MAX_CLIP_PIXELS} are read"
        )


def _bounded(decoded: Iterator[av.VideoFrame], name: str) -> Iterator[av.VideoFrame]:
    """The frames, up to MAX_DECODED_PIXELS: timestamps may be such that a clip has endless ones before the next wanted.

    Raises DataError beyond.
    """
    pixels = 0
    for frame in decoded:
        pixels += frame.width * frame.height
        if pixels > MAX_DECODED_PIXELS:
            raise DataError(f"{name}: more than {MAX_DECODED_PIXELS} pixels would have to be decoded")
        yield frame


def _collect(shown: Iterator[av.VideoFrame], clip: Clip, frames: int, fps: float | None, fit: Bucket | None) -> Pixels:
    """`frames` frames in one array, which is all that is held of them; raises DataError where there are fewer."""
    kept: Pixels | None = None
    count, name = 0, clip.name
    for frame in shown:
        if kept is None:
            # the container may have said another size
            _check_clip(frame.width, frame.height, frames, name)
            stored = frame.height, frame.width
        if (frame.height, frame.width) != stored:
            raise DataError(f"{name}: frames of {stored[1]}x{stored[0]} and of {frame.width}x{frame.height} pixels")
        pixels, aspect = clip.show(frame)
        size = _square((pixels.shape[0], pixels.shape[1]), aspect)
        if kept is None:
            clip.size = size
            _check_clip(size[1], size[0], frames, name)
            kept = np.empty((frames, *((fit.height, fit.width) if fit else size), 3), np.uint8)
        if fit is not None:
            kept[count] = _covered(pixels, fit, size)
        else:
            kept[count] = pixels if pixels.shape[:2] == size else np.asarray(resized(pixels, size))
        count += 1
        if count == frames:
            return kept
    rate = f"{fps:g} fps" if fps else "its own rate"
    raise DataError(f"{name}: {counted(count, 'frame')} at {rate} could be read; the bucket needs {frames}")


def _square(size: tuple[int, int], aspect: Fraction) -> tuple[int, int]:
    """The (height, width) of a picture whose pixels are `aspect` times as wide as high, in square ones: one side as it
    is, the other longer."""
    height, width = size
    return (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)


def _sampled(
    decoded: Iterator[av.VideoFrame], stream: av.VideoStream, fps: float | None, clip: Clip | None = None
) -> Iterator[av.VideoFrame]:
    """The frames shown at times 0, 1 / fps, 2 / fps ... after the first, until the last one's end."""
    if fps is None:
        yield from decoded
        return
    period = 1 / (stream.average_rate or stream.guessed_rate or _USUAL_RATE)
    wanted = 1 / Fraction(fps).limit_denominator(1001)
    # Timestamps are whole ticks: where a frame does not last a whole number of them, they are rounded, and a frame
    # that begins up to a tick after the wanted time may be the one that belongs to it.
    tick = stream.time_base
    slack = Fraction(0) if not tick or (period / tick).denominator == 1 else min(tick, period / 8)
    shown: av.VideoFrame | None = None
    begins, first, count = Fraction(0), None, 0
    for frame in decoded:
        stamp = None if frame.pts is None or not frame.time_base else frame.pts * frame.time_base
        if shown is None:
            first = stamp
        else:
            after = begins + period
            if stamp is not None and first is not None and stamp - first > begins:
                after = stamp - first
            while count * wanted + slack < after:
                yield shown
                count += 1
            begins = after
        shown = frame
    if shown is None:
        return
    lasts = shown.duration * shown.time_base if shown.duration and shown.time_base else period
    if (
        clip is not None and clip.lasts is not None
    ):  # frames that are stored in another order carry each other's durations
        lasts = max(lasts, clip.lasts - begins)
    if tick and abs(lasts - period) <= tick:
        lasts = period
    while count * wanted + slack < begins + lasts:
        yield shown
        count += 1


_USUAL_RATE = Fraction(24)
"""Frames a second of a clip whose container says nothing of its rate."""


def fit_target(frames: Pixels, bucket: Bucket) -> Pixels:
    """[F,h,w,3] to the bucket's [F,H,W,3]: scaled to cover it, then cut from the centre. Raises DataError for frames so
    narrow that this takes more than 64 million pixels."""
    return np.stack([_covered(frame, bucket, (frame.shape[0], frame.shape[1])) for frame in frames])


def _covered(frame: Pixels, bucket: Bucket, shown: tuple[int, int]) -> Pixels:
    """A frame that is `shown` as (height, width), its pixels being square or not."""
    size, (top, left, height, width) = cover_geometry(shown, bucket)
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"a target of {shown[0]}x{shown[1]} pixels would be {size[0]}x{size[1]} to cover {bucket}; at "
            f"most {MAX_PIXELS} pixels are made: it is too narrow"
        )
    return np.asarray(resized(frame, size).crop((left, top, left + width, top + height)))


def fit_reference(picture: Pixels, bucket: Bucket) -> Pixels:
    """[h,w,3] to the bucket's [H,W,3]: scaled to lie inside it, padded with white (as the release does)."""
    return pictures.fit_reference(picture, bucket.height, bucket.width)
