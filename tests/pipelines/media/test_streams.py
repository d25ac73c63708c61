"""Which stream, which part and which frames of a clip are taken, and that damage is heard, against the definitions and
the FFmpeg program.

Run: python -m pytest tests/pipelines/media/test_streams.py
"""

import io
import shutil
import struct
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media import colours
from domainshuttle.pipelines.media.clips import Clip, timed_rate
from domainshuttle.pipelines.media.cut import clip_file
from domainshuttle.pipelines.media.decode import Pixels, decode_video

GREYS = 5
DEFAULT, NONE = Disposition.default, Disposition(0)


def grey(number: int, size: tuple[int, int] = (48, 64)) -> av.VideoFrame:
    """Frame `number`, known by its grey."""
    return av.VideoFrame.from_ndarray(np.full((*size, 3), 10 + GREYS * number, np.uint8), format="rgb24")


def numbers(clip: Pixels) -> list[int]:
    return [round((float(frame.mean()) - 10) / GREYS) for frame in clip]


def clip(durations: list[int], container: str = "mp4", bframes: int = 0) -> bytes:
    """A clip whose frame i is shown for so many 48ths of a second, the last one too."""
    buffer, clock = io.BytesIO(), Fraction(1, 48)
    with av.open(buffer, mode="w", format=container) as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": "2", "threads": "1", "bf": str(bframes)})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = stream.time_base = clock
        at, packets = 0, []
        for number, duration in enumerate(durations):
            frame = grey(number)
            frame.pts, frame.time_base = at, clock
            at += duration
            packets += stream.encode(frame)
        # in the order in which they are stored: MP4 knows when each is decoded, and when the whole ends
        for packet, duration in zip([*packets, *stream.encode()], durations, strict=True):
            packet.duration = duration
            out.mux(packet)
    return buffer.getvalue()


def shown_at(durations: list[int], fps: int) -> list[int]:
    """The frame at each time k / fps before the end: the definition."""
    ends = np.cumsum(durations)
    return [
        int(np.searchsorted(ends, Fraction(48 * k, fps), side="right")) for k in range(-(-int(ends[-1]) * fps // 48))
    ]


HELD: list[list[int]] = [[2] * 23 + [96], [1, 2, 3, 4, 5, 50]]


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize(("durations", "bframes"), [(HELD[0], 0), (HELD[0], 2), (HELD[1], 0)])
def test_the_last_frame_lasts_as_long_as_the_clip_says(container: str, durations: list[int], bframes: int) -> None:
    if container == "matroska" and bframes:
        pytest.skip("FFmpeg's muxer writes durations only for frames in their order")
    found, expected = numbers(decode_all(clip(durations, container, bframes), 16.0)), shown_at(durations, 16)
    # Matroska has whole milliseconds, so the end may be a millisecond before or after the time of a frame
    slack = 1 if container == "matroska" else 0
    assert abs(len(found) - len(expected)) <= slack
    shared = min(len(found), len(expected))
    assert slack or found == expected
    assert found[-1] == expected[-1] and sum(a != b for a, b in zip(found, expected[:shared], strict=False)) <= slack


@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("bframes", [0, 2])
def test_a_frame_in_the_middle_lasts_as_long_as_the_clip_says(container: str, bframes: int) -> None:
    durations = [2] * 8 + [30] + [2] * 8
    assert numbers(decode_all(clip(durations, container, bframes), 16.0)) == shown_at(durations, 16)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("durations", [[2] * 20 + [40] * 5, [40] * 5 + [2] * 20, [2, 3] * 12, [2] * 24])
def test_frames_over_rate_are_the_seconds_of_a_clip(container: str, durations: list[int]) -> None:
    """Also where the rate varies, and Matroska says 24 for all of them."""
    found = clip_file(clip(durations, container), "clip")
    assert found.frames == len(durations)
    assert abs(found.frames / found.fps - sum(durations) / 48) <= max(durations) / 48
    assert set(durations) != {2} or found.fps == 24.0
    assert timed_rate([0, None, 80], Fraction(1, 1000), Fraction(24)) == 24


def decode_all(data: bytes, fps: float | None = None) -> Pixels:
    """As many frames as there are."""
    with pytest.raises(DataError, match="the bucket needs 999") as found:
        decode_video(data, 999, fps)
    return decode_video(data, int(str(found.value).split(" frames at ")[0].split()[-1]), fps)


def edited(data: bytes, entries: list[tuple[int, int, int]]) -> bytes:
    """An MP4 with another edit list: each entry plays so many ticks of the movie's clock, from a tick of the track's
    (-1: nothing), at a rate (65536 is 1)."""
    assert data.index(b"mdat") < data.index(b"moov")  # so that no offset moves
    old = data.index(b"edts") - 4
    size = int.from_bytes(data[old : old + 4], "big")
    body = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">Iii", *entry) for entry in entries)
    elst = struct.pack(">I4s", 8 + len(body), b"elst") + body
    box = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    made = bytearray(data[:old] + box + data[old + size :])
    for kind in (b"trak", b"moov"):
        start = made.index(kind) - 4
        made[start : start + 4] = (int.from_bytes(made[start : start + 4], "big") + len(box) - size).to_bytes(4, "big")
    return bytes(made)


def clocks(data: bytes) -> tuple[int, int]:
    """Ticks a second of the movie and of its track."""
    movie, media = data.index(b"mvhd") + 4, data.index(b"mdhd") + 4
    return int.from_bytes(data[movie + 12 : movie + 16], "big"), int.from_bytes(data[media + 12 : media + 16], "big")


@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize(("first", "count"), [(0, 24), (5, 10), (7, 17)])
def test_an_edit_list_says_which_part_is_shown(bframes: int, first: int, count: int) -> None:
    data = clip([2] * 24, bframes=bframes)
    movie, media = clocks(data)
    with av.open(io.BytesIO(data)) as container:
        delay = 0 if not bframes else -min(packet.dts or 0 for packet in container.demux(video=0) if packet.size)
    part = edited(data, [(count * movie // 24, first * media // 24 + delay, 1 << 16)])
    assert numbers(decode_all(part)) == list(range(first, first + count))
    late = edited(data, [(movie // 2, -1, 1 << 16), (count * movie // 24, first * media // 24 + delay, 1 << 16)])
    assert numbers(decode_all(late, 24.0)) == list(range(first, first + count))


def test_an_edit_list_of_another_speed_is_refused() -> None:
    data = clip([2] * 24)
    movie, _ = clocks(data)
    for rate in (0, 1 << 15, 1 << 17):
        with pytest.raises(DataError, match="at another speed"):
            decode_video(edited(data, [(movie, 0, rate)]), 5)


def two_streams(container: str, first: Disposition, second: Disposition, sizes: tuple[int, int] = (48, 96)) -> bytes:
    """A stream of frames 1, and one of frames 20, each of a height."""
    buffer = io.BytesIO()
    with av.open(
        buffer, mode="w", format=container, options={"default_mode": "passthrough"} if container == "matroska" else {}
    ) as out:
        streams: list[VideoStream] = []
        for height, disposition in zip(sizes, (first, second), strict=True):
            stream = out.add_stream("libx264", rate=24, options={"crf": "2", "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for _ in range(6):
            for stream, number in zip(streams, (1, 20), strict=True):
                out.mux(stream.encode(grey(number, (stream.height, 64))))
        for stream in streams:
            out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("first", "second", "sizes", "expected"),
    [
        (DEFAULT, NONE, (48, 96), 1),
        (NONE, DEFAULT, (48, 96), 20),
        (NONE, DEFAULT, (96, 48), 20),
        (DEFAULT, DEFAULT, (48, 96), 20),
        (DEFAULT, DEFAULT, (96, 48), 1),
        (DEFAULT, DEFAULT, (48, 48), 1),
    ],
)
def test_the_default_stream_is_taken_and_of_several_the_largest(
    first: Disposition, second: Disposition, sizes: tuple[int, int], expected: int
) -> None:
    for container in ("matroska", "mp4"):
        data = two_streams(container, first, second, sizes)
        assert numbers(decode_video(data, 5)) == [expected] * 5, container


@pytest.mark.parametrize("enabled", [True, False])
def test_a_cover_picture_that_comes_first_is_no_clip(enabled: bool) -> None:
    """As taggers put it: into the movie's user data, which here stands before its track."""
    data, picture = clip([2] * 8), io.BytesIO()
    Image.new("RGB", (320, 320), (255, 0, 0)).save(picture, "PNG")

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    cover = box(b"covr", box(b"data", struct.pack(">II", 14, 0) + picture.getvalue()))
    handler = box(b"hdlr", struct.pack(">II4s4s", 0, 0, b"mdir", b"appl") + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", cover)))
    moov = data.index(b"moov") - 4
    made = bytearray(data)
    made[moov : moov + 4] = (int.from_bytes(data[moov : moov + 4], "big") + len(tags)).to_bytes(4, "big")
    if not enabled:  # so that the clip is not the default
        flags = made.index(b"tkhd") + 7
        made[flags] &= 0xFE
    made[moov + 8 : moov + 8] = tags
    with av.open(io.BytesIO(bytes(made))) as container:
        kinds = [bool(stream.disposition & Disposition.attached_pic) for stream in container.streams.video]
        assert kinds == [True, False]
    found = decode_video(bytes(made), 8)
    assert found.shape == (8, 48, 64, 3) and numbers(found) == list(range(8))


def moving(codec: str, form: str, container: str, **options: str) -> bytes:
    """24 frames in which everything moves, so that damage shows."""
    blocks = np.random.default_rng(0).integers(0, 256, (20, 22, 3), np.uint8)
    scene = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=container) as out:
        stream = out.add_stream(codec, rate=24, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 128, 96, form
        for k in range(24):
            frame = np.ascontiguousarray(scene[2 * k : 2 * k + 96, k : k + 128])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def damaged(data: bytes, seed: int) -> bytes:
    """24 bytes in each of three packets are others; sizes, container and timestamps stay sound."""
    with av.open(io.BytesIO(data)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size > 200]
    noise, made = np.random.default_rng(seed), bytearray(data)
    for number in noise.choice(len(packets), min(3, len(packets)), replace=False):
        pos, size = packets[number]
        start = pos + int(noise.integers(size // 4, size - 24))
        made[start : start + 24] = noise.integers(0, 256, 24, np.uint8).tobytes()
    return bytes(made)


def ffmpegs_errors(path: Path) -> Iterator[str]:
    """What the FFmpeg program says of a clip's decoding as an error."""
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-err_detect", "crccheck", "-i", str(path), "-f", "null", "-"]
    yield from subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()


@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("mp4", {"movflags": "faststart"}),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("matroska", {}),
        ("matroska", {"live": "1"}),
    ],
    ids=["mp4", "fragments", "matroska", "live"],
)
def test_a_file_that_is_cut_is_no_shorter_clip(container: str, options: dict[str, str], tmp_path: Path) -> None:
    """Frame by frame it decodes without a fault, as far as it goes."""
    path = tmp_path / "clip"
    with av.open(str(path), mode="w", format=container, options=options) as out:
        stream = out.add_stream("libx264", rate=24, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("aac", rate=8000)
        for number in range(48):
            out.mux(stream.encode(grey(number % 24)))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 333), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 8000
            out.mux(sound.encode(samples))
        out.mux(stream.encode())
        out.mux(sound.encode())
    whole = path.read_bytes()
    with av.open(str(path)) as opened:
        last = max(packet.pos + packet.size for packet in opened.demux() if packet.size)
    assert clip_file(whole + bytes(99), "clip").frames == 48
    for size in (last * 4 // 5, last - 1):
        with pytest.raises(DataError, match=rf"clip: damaged: it is cut at byte {size}, and its .* goes on to byte"):
            clip_file(whole[:size], "clip")


def test_a_clip_that_was_cut_out_without_encoding_is_not_damaged() -> None:
    """Of a stream whose parts lean on each other (open GOPs), from a key frame on: players show all that is whole."""
    buffer, made = io.BytesIO(), io.BytesIO()
    options = {"crf": "10", "threads": "1", "bf": "3", "g": "24", "refs": "3", "x264-params": "open-gop=1"}
    blocks = np.kron(np.random.default_rng(0).integers(0, 256, (20, 36, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(buffer, mode="w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        for k in range(96):
            frame = np.ascontiguousarray(blocks[k // 4 : k // 4 + 128, k : k + 192])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    whole = decode_video(buffer.getvalue(), 96)
    with av.open(io.BytesIO(buffer.getvalue())) as source, av.open(made, mode="w", format="mp4") as out:
        copy = out.add_stream_from_template(source.streams.video[0])
        keys = 0
        for packet in source.demux(video=0):
            keys += packet.is_keyframe
            if keys > 1 and packet.size:
                packet.stream = copy
                out.mux(packet)
    with av.open(io.BytesIO(made.getvalue())) as opened:
        assert sum(1 for _ in opened.demux(video=0)) > 60
    found = decode_all(made.getvalue())
    assert len(found) > 60 and np.array_equal(found, whole[-len(found) :])


@pytest.mark.parametrize("container", ["mov", "matroska"])
def test_exif_of_frames_is_obeyed(container: str) -> None:
    """As cameras write it into Motion JPEG; PyAV has no name for it."""
    exif, pictures = Image.Exif(), []
    exif[0x0112] = 6
    halves = Image.fromarray(np.repeat([[10, 200]], 48, 0).repeat(32, 1).astype(np.uint8)).convert("RGB")
    for _ in range(4):
        one = io.BytesIO()
        halves.save(one, "JPEG", exif=exif)
        pictures.append(one.getvalue())
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=container) as out:
        stream = out.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, data in enumerate(pictures):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 24)
            out.mux(packet)
    found = decode_video(buffer.getvalue(), 3)[2]
    assert found.shape == (64, 48, 3) and found[:20].mean() < 30 and found[-20:].mean() > 180


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the FFmpeg program")
@pytest.mark.parametrize(
    ("codec", "form", "container", "options", "heard"),
    [
        ("libx264", "yuv420p", "mp4", {}, 2),
        ("libx265", "yuv420p", "mp4", {"x265-params": "hash=1:log-level=none"}, 4),
        ("mpeg4", "yuv420p", "mp4", {}, 2),
        ("ffv1", "yuv420p", "matroska", {"slicecrc": "1", "level": "3"}, 4),
        ("mjpeg", "yuvj420p", "mov", {}, 1),
        ("png", "rgb24", "mov", {}, 4),
    ],
)
def test_damage_that_ffmpeg_reports_is_refused(
    codec: str, form: str, container: str, options: dict[str, str], heard: int, tmp_path: Path
) -> None:
    whole = moving(codec, form, container, **options)
    sound, refused = decode_video(whole, 24), 0
    for seed in range(4):
        data = damaged(whole, seed)
        (tmp_path / "clip").write_bytes(data)
        said = list(ffmpegs_errors(tmp_path / "clip"))
        try:
            found = decode_video(data, 24)
        except DataError as error:
            assert "damaged" in str(error) or "not a readable clip" in str(error)
            refused += 1
        else:
            assert not said or np.array_equal(found, sound), (seed, said)
    assert refused >= heard


@pytest.mark.parametrize("heard", [True, False])
def test_a_frame_that_the_decoder_marks_as_corrupt_is_refused(heard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's own mark, on a clip whose key frame is half zeros; also where the decoder says nothing beside it."""
    if not heard:
        monkeypatch.setattr(Clip, "_check_said", lambda _: None)
    whole = moving("libx264", "yuv420p", "mp4")
    with av.open(io.BytesIO(whole)) as container:
        pos, size = next((p.pos, p.size) for p in container.demux(video=0) if p.size)
    data = whole[: pos + size // 2] + bytes(size - size // 2) + whole[pos + size :]
    with av.open(io.BytesIO(data)) as container:
        assert any(frame.is_corrupt for frame in container.decode(video=0))
    with pytest.raises(DataError, match="damaged"):
        decode_video(data, 24)
    with pytest.raises(DataError, match="damaged"):
        decode_video(data, 1)


CARDS = np.array([[200, 50, 50], [50, 200, 50], [50, 50, 200], [200, 200, 50], [128, 128, 128], [20, 20, 20]])


def hdr(transfer: int) -> bytes:
    """CARDS beside each other as BT.2020 of 10 bits in limited range, by the definitions in float64."""
    level = CARDS / 255
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    wide = np.clip(light @ np.linalg.inv(colours._to_bt709(colours._OTHERS[9])).T, 0, None)
    if transfer == 16:  # SDR white at 203 cd/m2
        power = (wide * 203 / 10000) ** (2610 / 16384)
        coded = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    else:  # at a signal of 75 %
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = wide * (np.exp((0.75 - c) / a) + b) / 12
        coded = np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)
    red, blue = 0.2627, 0.0593
    luma = coded @ [red, 1 - red - blue, blue]
    planes = (
        64 + 876 * luma,
        512 + 896 * (coded[:, 2] - luma) / (2 * (1 - blue)),
        512 + 896 * (coded[:, 0] - luma) / (2 * (1 - red)),
    )
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64 * len(CARDS), 64, "yuv444p10le"
        coder = stream.codec_context
        coder.color_primaries, coder.color_trc, coder.colorspace, coder.color_range = 9, transfer, 9, 1
        for _ in range(3):
            frame = av.VideoFrame(64 * len(CARDS), 64, "yuv444p10le")
            for plane, values in zip(frame.planes, planes, strict=True):
                row = np.repeat(np.rint(values), 64).astype("<u2")
                padded = np.zeros((64, plane.line_size // 2), "<u2")
                padded[:, : len(row)] = row
                plane.update(padded.tobytes())
            frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range = 9, transfer, 9, 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_clips_are_brought_to_sdr(transfer: int) -> None:
    found = decode_video(hdr(transfer), 2)[1].astype(int)
    shown = np.array([found[32, 64 * number + 32] for number in range(len(CARDS))])
    assert np.abs(shown - CARDS).max() <= 3
