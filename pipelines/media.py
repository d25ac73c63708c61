"""Pictures and clips: bytes to arrays and back, resizing to a bucket.

Arrays are uint8 RGB, [height, width, 3] for pictures and [frames, height, width, 3] for clips. Anything that can't
be decoded raises `DataError` with the reason, so that a bad sample becomes a row of the quarantine table.
"""

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from domainshuttle.pipelines.buckets import Bucket, contain_geometry, cover_geometry
from domainshuttle.pipelines.pairing import AugmentedView
from domainshuttle.pipelines.sample import Buffer, DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 64_000_000
"""A picture that declares more is refused before it is decoded (decompression bombs)."""


def encode_jpeg(picture: Pixels, quality: int = 92) -> bytes:
    """[h,w,3] uint8 to JPEG bytes, chroma not subsampled."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(picture), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def encode_mp4(clip: Pixels, fps: float, crf: int = 16) -> bytes:
    """[F,h,w,3] uint8 to an H.264 MP4 (yuv420p, so height and width must be even)."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        # one thread and no lookahead differences: the same frames always give the same bytes
        stream.options = {"crf": str(crf), "preset": "fast", "threads": "1"}
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_image(data: Buffer, name: str = "image") -> Pixels:
    """JPEG, PNG or WebP bytes to [h,w,3] uint8. Transparent pictures are laid on white.

    Raises DataError when the bytes are no picture, are cut short or declare more than 64 million pixels.
    """
    try:
        if bytes(data[:2]) == b"\xff\xd8":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width > MAX_PIXELS:
                raise DataError(f"{name}: declares {width}x{height} pixels; at most {MAX_PIXELS} are read")
            # strict: a truncated picture is an error, not half a picture with grey below
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(
                    f"{name}: declares {picture.width}x{picture.height} pixels; at most {MAX_PIXELS} are read"
                )
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
                return np.asarray(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"))
            return np.asarray(picture.convert("RGB"))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: not a readable JPEG, PNG or WebP picture ({error})") from error


def decode_video(data: Buffer, frames: int, fps: float | None = None, name: str = "video") -> Pixels:
    """The first `frames` frames of a clip, [frames,h,w,3] uint8, sampled at `fps` (None: every frame, in order).

    Frame k is the last one shown at time k / fps after the first, by the clip's timestamps, so a variable rate is
    sampled rightly. Raises DataError when the clip can't be decoded or is too short.
    """
    chosen: list[Pixels] = []
    try:
        # some stock footage has tags that are not UTF-8: they must not stop the decoding
        with av.open(io.BytesIO(data), mode="r", metadata_errors="replace") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for frame in _sampled(container.decode(stream), stream, fps):
                if frame.width * frame.height > MAX_PIXELS:
                    raise DataError(f"{name}: frames of {frame.width}x{frame.height} pixels are refused")
                chosen.append(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False))
                if len(chosen) == frames:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: not a readable clip ({error})") from error
    if len(chosen) < frames:
        rate = f"{fps:g} fps" if fps else "its own rate"
        raise DataError(f"{name}: {len(chosen)} frames at {rate} could be read; the bucket needs {frames}")
    return np.stack(chosen)


def _sampled(decoded: Iterator[av.VideoFrame], stream: av.VideoStream, fps: float | None) -> Iterator[av.VideoFrame]:
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
    while shown is not None and count * wanted + slack < begins + period:
        yield shown
        count += 1


_USUAL_RATE = Fraction(24)
"""Frames a second of a clip whose container says nothing of its rate."""


def fit_target(frames: Pixels, bucket: Bucket) -> Pixels:
    """[F,h,w,3] to the bucket's [F,H,W,3]: scaled to cover it, then cut from the centre."""
    size, (top, left, height, width) = cover_geometry((frames.shape[1], frames.shape[2]), bucket)
    corners = (left, top, left + width, top + height)
    return np.stack([np.asarray(_resize(frame, size).crop(corners)) for frame in frames])


def fit_reference(picture: Pixels, bucket: Bucket) -> Pixels:
    """[h,w,3] to the bucket's [H,W,3]: scaled to lie inside it, padded with white (as the release does)."""
    size, (top, left) = contain_geometry((picture.shape[0], picture.shape[1]), bucket)
    canvas = Image.new("RGB", (bucket.width, bucket.height), (255, 255, 255))
    canvas.paste(_resize(picture, size), (left, top))
    return np.asarray(canvas)


def apply_view(picture: Pixels, view: AugmentedView) -> Pixels:
    """[h,w,3] cut, mirrored and recoloured as `view` says: [h',w',3].

    Brightness multiplies; contrast scales the distance from the mean grey, saturation that from each pixel's own grey.
    """
    height, width, _ = picture.shape
    top, left = round(view.crop[0] * height), round(view.crop[1] * width)
    bottom, right = top + max(1, round(view.crop[2] * height)), left + max(1, round(view.crop[3] * width))
    image = Image.fromarray(picture[top:bottom, left:right])
    if view.flip:
        image = ImageOps.mirror(image)
    image = ImageEnhance.Brightness(image).enhance(view.brightness)
    image = ImageEnhance.Contrast(image).enhance(view.contrast)
    return np.asarray(ImageEnhance.Color(image).enhance(view.saturation))


def _resize(picture: Pixels, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(picture)
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.LANCZOS)
