"""Pictures and clips: when frames are sampled, what a view does to a picture, what is refused.

Run: python -m pytest tests/pipelines/media/test_decode.py
"""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.augment import AugmentedView, apply_view, augmented_view
from domainshuttle.pipelines.media.decode import Pixels, _sampled, decode_video, encode_mp4

ROOT = Path(__file__).resolve().parents[3]
GREYS = 5
"""Grey levels between the numbers of two frames: what H.264 at this quality never mistakes."""


def numbered_clip(
    times: list[Fraction], rate: Fraction | None, container: str = "mp4", time_base: Fraction = Fraction(1, 90000)
) -> bytes:
    """A clip whose frame i, shown from times[i] seconds on, is grey 5 i; `rate` is what the container says."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=container) as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = time_base
        stream.options = {"crf": "2", "threads": "1"}
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 + GREYS * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / time_base), time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def numbers(clip: Pixels) -> list[int]:
    """The number that each frame shows."""
    return [round((float(frame.mean()) - 10) / GREYS) for frame in clip]


def shown_at(times: list[Fraction], fps: Fraction, count: int) -> list[int]:
    """The last frame that begins at or before k / fps: the definition itself, in exact fractions."""
    return [max(i for i, time in enumerate(times) if time <= k / fps) for k in range(count)]


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(12), Fraction(16)])
@pytest.mark.parametrize("start", [0, Fraction(1, 3)])
def test_sampled_frames_are_those_shown_at_each_time(rate: Fraction, start: Fraction) -> None:
    times = [i / rate for i in range(40)]
    clip = numbered_clip([start + time for time in times], rate)
    count = -(-40 * 16 * rate.denominator // rate.numerator)  # the times k / 16 before the last frame's end
    assert numbers(decode_video(clip, count, 16.0)) == shown_at(times, Fraction(16), count)
    with pytest.raises(DataError, match=f"{count} frames at 16 fps could be read; the bucket needs {count + 1}"):
        decode_video(clip, count + 1, 16.0)
    assert numbers(decode_video(clip, 40)) == list(range(40))


def test_a_rate_of_broadcast_is_meant_exactly() -> None:
    times = [i / Fraction(24) for i in range(45)]
    found = numbers(decode_video(numbered_clip(times, Fraction(24)), 44, 23.976))
    assert found == shown_at(times, Fraction(24000, 1001), 44)


def test_a_variable_rate_is_sampled_by_time() -> None:
    lengths = [3, 1, 1, 7, 2, 2, 1, 12, 1, 3, 5]
    times = [Fraction(sum(lengths[:i]), 48) for i in range(len(lengths))]
    clip = numbered_clip(times, Fraction(24))
    assert numbers(decode_video(clip, 12, 16.0)) == shown_at(times, Fraction(16), 12)


def test_timestamps_in_whole_milliseconds_do_not_shift_frames() -> None:
    """Matroska rounds 1/24 s up to 42 ms; the frame still is the one for that time."""
    times = [i / Fraction(24) for i in range(40)]
    clip = numbered_clip(times, Fraction(24), "matroska", Fraction(1, 1000))
    assert numbers(decode_video(clip, 40, 24.0)) == list(range(40))
    assert numbers(decode_video(clip, 26, 16.0)) == shown_at(times, Fraction(16), 26)


def test_a_stream_without_timestamps_is_sampled_by_its_rate() -> None:
    """A bare H.264 stream: no container, so no times and no rate but what decoders assume, 25 a second. Such a file is
    refused as a whole; a container's stream may be the same."""
    times = [i / Fraction(25) for i in range(30)]
    clip = numbered_clip(times, Fraction(25), "h264")
    with av.open(io.BytesIO(clip)) as container:
        stream = container.streams.video[0]
        frames = [one.to_ndarray(format="rgb24") for one in _sampled(container.decode(stream), stream, 12.5)]
    assert numbers(np.stack(frames)) == shown_at(times, Fraction(25, 2), 15)
    with pytest.raises(DataError, match=r"expected MP4, .*it is a bare H.264 or H.265 stream"):
        decode_video(clip, 15, 12.5)


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_clip_cut_short_is_refused(keep: float) -> None:
    rng = np.random.default_rng(0)
    clip = encode_mp4(rng.integers(0, 256, (20, 32, 32, 3), np.uint8), 8.0)
    assert decode_video(clip, 20).shape == (20, 32, 32, 3)
    with pytest.raises(DataError, match=r"cut short\.mp4"):
        decode_video(clip[: int(len(clip) * keep)], 20, name="cut short.mp4")


def test_a_real_clip_with_tags_that_are_no_utf8_is_read() -> None:
    folder = ROOT.parent / "shared" / "media" / "opens2v_nexus"
    found = sorted(folder.rglob("*part2.mp4"))
    if not found:
        pytest.skip("the test media are not here")
    data = found[0].read_bytes()
    clip = decode_video(data, 9, 16.0)
    assert clip.shape == (9, 720, 1280, 3)
    every = decode_video(data, 16)
    assert np.array_equal(clip, every[[int(k * 30000 / 1001 / 16) for k in range(9)]])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(20, 90), st.integers(20, 90))
def test_a_view_is_cut_mirrored_and_recoloured(seed: int, height: int, width: int) -> None:
    """Against the definitions in floating point; Pillow cuts to whole levels after each of the three steps."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    view = augmented_view(seed, 0, 5, 1)
    found = apply_view(picture, view)
    top, left = round(view.crop[0] * height), round(view.crop[1] * width)
    bottom, right = top + round(view.crop[2] * height), left + round(view.crop[3] * width)
    part = picture[top:bottom, left:right].astype(np.float64)
    part = part[:, ::-1] if view.flip else part
    luma = np.array([0.299, 0.587, 0.114])
    part = np.clip(part * view.brightness, 0, 255)
    part = np.clip((part @ luma).mean() * (1 - view.contrast) + part * view.contrast, 0, 255)
    part = np.clip((part @ luma)[..., None] * (1 - view.saturation) + part * view.saturation, 0, 255)
    assert found.shape == part.shape
    assert np.abs(found - part).max() <= 4
    assert abs((found - part).mean()) < 2


def test_a_view_that_changes_nothing_gives_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8)
    assert np.array_equal(apply_view(picture, AugmentedView((0, 0, 1, 1), False, 1, 1, 1)), picture)
    mirrored = apply_view(picture, AugmentedView((0.5, 0.25, 0.5, 0.5), True, 1, 1, 1))
    assert np.array_equal(mirrored, picture[16:32, 4:12][:, ::-1])
