"""The pixels of a raw sample, where its files are what `key.json` claims of them.

A description that is wrong is not found by decoding alone: a bucket is chosen by its size and its frames, so a picture
whose height and width were exchanged is cut to the middle of its width. Every use of a sample's pixels goes through
here: encoding, live encoding, verifying and contact sheets.

Sizes and lengths must be those of the files, as they are shown. Rates may differ by RATE_TOLERANCE.
"""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import InputContainer

from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.media.clips import RATE_TOLERANCE, chosen_stream, timed_rate
from domainshuttle.pipelines.media.decode import Pixels, decode_image, fit_target, opened_clip, sampled_frames
from domainshuttle.pipelines.media.file_types import clip_format
from domainshuttle.pipelines.quarantine import SampleFault
from domainshuttle.pipelines.sample import Buffer, RawSample


def target_pixels(sample: RawSample, bucket: Bucket, fps: float | None = None) -> Pixels:
    """The target [F,H,W,3], a clip sampled at `fps`, decoded and fitted to the bucket.

    Raises SampleFault ('undecodable target', 'wrong size', 'wrong length', 'wrong rate').
    """
    info, name = sample.info, f"{sample.key}.{sample.target_extension}"
    try:
        if info.kind == "image":
            picture = decode_image(sample.target, name)
            size, fitted, packets = picture.shape[:2], None, None
        else:
            with opened_clip(sample.target, name) as clip:
                fitted = sampled_frames(clip, bucket.frames, fps, bucket)
                clip.read_rest()
                size, stream = clip.size, clip.stream
                packets = _Packets(clip.stamps, stream.time_base, stream.average_rate, stream.codec_context.name)
    except DataError as error:
        raise SampleFault("undecodable target", str(error)) from error
    _compare_size(name, size, info.size)
    if fitted is None or packets is None:
        return fit_target(picture[None], bucket)
    _compare_clip(name, sample.target, packets, info.frames, info.fps)
    return fitted


def reference_pixels(sample: RawSample, number: int) -> Pixels:
    """Reference `number` [h,w,3], at its own size. Raises SampleFault ('undecodable reference', 'wrong size')."""
    reference = sample.info.references[number]
    name = f"{sample.key}.{reference.file}"
    try:
        picture = decode_image(sample.files[reference.file], name)
    except DataError as error:
        raise SampleFault("undecodable reference", str(error)) from error
    _compare_size(name, picture.shape[:2], reference.size)
    return picture


def _compare_size(name: str, found: tuple[int, ...], said: tuple[int, int]) -> None:
    if found != said:
        raise SampleFault("wrong size", f"{name}: {found[0]}x{found[1]} pixels, key.json says {said[0]}x{said[1]}")


@dataclass(frozen=True)
class _Packets:
    """What the packets of a clip say of it: when their frames begin, in ticks of so many seconds, and its mean rate."""

    stamps: list[int | None]
    tick: Fraction | None
    mean: Fraction | None
    codec: str


def _compare_clip(name: str, data: Buffer, packets: _Packets, frames: int, fps: float | None) -> None:
    """Compares a clip's length and rate with its packets; it is decoded again only where they differ in number."""
    stamps, tick, mean = packets.stamps, packets.tick, packets.mean
    uncertain = packets.codec == "vp8"  # it has packets that are only referred to, and never shown
    if (uncertain or len(stamps) != frames) and (count := _count_frames(name, data, frames + 1)) != frames:
        found = f"more than {counted(frames, 'frame')}" if count > frames else counted(count, "frame")
        raise SampleFault("wrong length", f"{name}: {found}, key.json says {frames}")
    if fps is None:
        return
    said = Fraction(fps)
    if (timed := timed_rate(stamps, tick, said)) == said:
        return
    rates = [float(rate) for rate in (mean, timed) if rate]
    if not any(abs(fps - rate) <= RATE_TOLERANCE * rate for rate in rates):
        raise SampleFault(
            "wrong rate",
            f"{name}: {rates[-1]:.4g} frames a second, key.json says {fps:g}; {RATE_TOLERANCE:.0%} may differ",
        )


def _count_frames(name: str, data: Buffer, most: int) -> int:
    """How many frames decode, at most `most`: some packets are no frame, or half of one."""
    count = 0
    try:
        with _opened(name, data) as container:
            for _ in container.decode(chosen_stream(container, name)):
                count += 1
                if count == most:
                    break
    except av.FFmpegError:
        pass
    return count


def _opened(name: str, data: Buffer) -> InputContainer:
    return av.open(io.BytesIO(data), mode="r", format=clip_format(data, name), metadata_errors="replace")
