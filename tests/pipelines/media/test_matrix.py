"""Codecs, containers and traits of clips, and formats, modes and traits of pictures, each with each: what is decoded is
what the FFmpeg program shows, and what Pillow and Little CMS make of it.

The program is another version of FFmpeg than PyAV's, and another way: it turns, scales and converts by its own filters.
Where it is not there, PyAV's filters stand in.

Run: python -m pytest tests/pipelines/media/test_matrix.py (all of it: -m "nightly or not nightly")
"""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest
from media_files import (
    ALPHA,
    CODECS,
    HEIGHT,
    IDENTITY,
    INTERLACED,
    MODES,
    ORIENTATIONS,
    SCENE,
    WIDTH,
    Codec,
    Traits,
    clip,
    picture,
    scene,
)
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from domainshuttle.pipelines.media.decode import decode_image, decode_video

FFMPEG = shutil.which("ffmpeg")


def filters(traits: Traits, form: str) -> list[tuple[str, str]]:
    """What makes whole pictures with square pixels, as FFmpeg's manual says: names and options of filters."""
    steps = [("bwdif", "mode=send_frame")] if traits.interlaced else []
    if traits.aspect != 1:
        across, down = r"if(gte(sar\,1)\,round(iw*sar)\,iw)", r"if(gte(sar\,1)\,ih\,round(ih/sar))"
        steps.append(("scale", f"w={across}:h={down}:flags=lanczos+accurate_rnd+full_chroma_int"))
    return [*steps, ("format", form)]


def ffmpegs(data: bytes, traits: Traits, codec: Codec, folder: Path, channels: int) -> NDArray[Any]:
    """The third frame [h,w,channels] as the program shows it."""
    (folder / "clip").write_bytes(data)
    kind = "rgba" if channels == 4 else "rgb24"
    decoder = ["-c:v", codec.name] if channels == 4 and "vpx" in codec.name else []
    graph = ",".join(f"{name}={options}" for name, options in filters(traits, kind))
    command = [
        FFMPEG or "ffmpeg", "-v", "error", "-threads", "1", *decoder, "-i", str(folder / "clip"), "-vf", graph,
        "-sws_flags", "bilinear+accurate_rnd+full_chroma_int", "-f", "image2pipe", "-c:v", "png", "-frames:v", "3", "-",
    ]  # fmt: skip
    pictures = subprocess.run(command, capture_output=True, check=True).stdout
    last = pictures.rindex(b"\x89PNG\r\n\x1a\n")
    return np.asarray(Image.open(io.BytesIO(pictures[last:])).convert("RGBA" if channels == 4 else "RGB"))


def pyavs(data: bytes, traits: Traits) -> NDArray[Any]:
    """The same by PyAV's filters, which do not turn."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        across, down = max(traits.aspect, Fraction(1)), max(1 / traits.aspect, Fraction(1))
        size = f"w={round(WIDTH * across)}:h={round(HEIGHT * down)}"  # graphs of PyAV do not know the aspect
        steps = [
            graph.add(name, f"{size}:{options.rpartition(':')[2]}" if name == "scale" else options)
            for name, options in filters(traits, "rgb24")
        ]
        graph.link_nodes(graph.add_buffer(template=stream), *steps, graph.add("buffersink")).configure()
        shown: list[av.VideoFrame] = []
        for frame in container.decode(stream):
            graph.vpush(frame)
            with contextlib.suppress(av.BlockingIOError):  # some filters look ahead
                shown.append(graph.vpull())
    return shown[2].to_ndarray(format="rgb24")


def with_aspect(data: bytes, aspect: Fraction, container: str, folder: Path) -> bytes:
    """A Matroska file that says the shape of its pixels itself, which PyAV does not write."""
    (folder / "plain").write_bytes(data)
    shape = f"{aspect.numerator * WIDTH}:{aspect.denominator * HEIGHT}"
    command = [
        FFMPEG or "",
        "-v",
        "error",
        "-y",
        "-i",
        "plain",
        "-c",
        "copy",
        "-aspect",
        shape,
        "-f",
        container,
        "wide",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "wide").read_bytes()


def check(codec: Codec, traits: Traits, folder: Path) -> None:
    moving = np.stack([scene(2 * number) for number in range(6)])
    if traits.interlaced:  # fields of two moments
        moving = np.stack([scene(4 * number) for number in range(12)])
        moving[::2, 1::2] = moving[1::2, 1::2]
        moving = moving[::2]
    data = clip(codec, traits, moving)
    in_matroska = traits.aspect != 1 and codec.container in ("matroska", "webm")
    if not FFMPEG and (traits.orientation != IDENTITY or in_matroska):
        pytest.skip("needs the FFmpeg program")
    if in_matroska:
        data = with_aspect(data, traits.aspect, codec.container, folder)
    expected = ffmpegs(data, traits, codec, folder, 3) if FFMPEG else pyavs(data, traits)
    found = decode_video(data, 3)[2]
    assert found.shape == expected.shape
    across, down = max(traits.aspect, Fraction(1)), max(1 / traits.aspect, Fraction(1))
    size = sorted((HEIGHT * down, WIDTH * across))  # Matroska says whole pixels
    assert all(abs(one - other) <= 1 for one, other in zip(sorted(found.shape[:2]), size, strict=True))
    error = np.abs(found.astype(int) - expected)
    whole = "444" in codec.form or codec.form in ("rgb24", "bgr0", "gbrp10le", "gray", "yuv422p10le")
    if whole and traits.aspect == 1 and not traits.interlaced:
        assert error.max() <= 1
    # else colours are interpolated, for which FFmpeg has a fast way and an exact one
    assert error.mean() < 1.8 and np.percentile(error, 99) <= 5, (error.mean(), error.max())


def turns(codec: Codec) -> bool:
    return codec.container in ("mp4", "mov")


def tells_colours(codec: Codec) -> bool:
    """Whether what the stream says of its matrix and range is kept, and may be other than one."""
    return (
        codec.form.startswith("yuv")
        and not codec.form.startswith("yuvj")
        and codec.name not in ("mpeg4", "libvpx", "png")
    )


def few() -> Iterator[tuple[Codec, Traits]]:
    """Each codec once, with traits in turn."""
    aspects = [Fraction(1), Fraction(2), Fraction(40, 33), Fraction(1, 2), Fraction(10, 11)]
    matrices, number = [1, 5, 6, 7, 9, 2, 4], 0
    for number, codec in enumerate(CODECS):
        yield (
            codec,
            Traits(
                aspect=aspects[number % 5],
                orientation=ORIENTATIONS[number % 8] if turns(codec) else IDENTITY,
                matrix=matrices[number % 7] if tells_colours(codec) else 2,
                full=[False, True][number % 2] if tells_colours(codec) else True if codec.form == "gray" else None,
            ),
        )
    for codec in INTERLACED[::3]:
        yield codec, Traits(interlaced=True)


def many() -> Iterator[tuple[Codec, Traits]]:
    for codec in CODECS:
        told = tells_colours(codec)
        for aspect, orientation in product(
            [Fraction(1), Fraction(2), Fraction(8, 9)], ORIENTATIONS if turns(codec) else [IDENTITY]
        ):
            yield codec, Traits(aspect, orientation, full=False if told else True if codec.form == "gray" else None)
        for matrix, full in product([1, 2, 4, 5, 6, 7, 9], [False, True]) if told else ():
            yield codec, Traits(matrix=matrix, full=full)
    for codec, aspect in product(INTERLACED, [Fraction(1), Fraction(16, 11)]):
        yield codec, Traits(aspect, interlaced=True)


def named(cases: Iterator[tuple[Codec, Traits]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0].label}-{case[1].label}", marks=marks) for case in cases]


@pytest.mark.parametrize(("codec", "traits"), [*named(few()), *named(many(), pytest.mark.nightly)])
def test_a_clip_is_shown_as_ffmpeg_shows_it(codec: Codec, traits: Traits, tmp_path: Path) -> None:
    check(codec, traits, tmp_path)


@pytest.mark.skipif(not FFMPEG, reason="needs the FFmpeg program")
@pytest.mark.parametrize("codec", ALPHA, ids=lambda codec: codec.label)
def test_a_transparent_clip_is_ffmpegs_on_white(codec: Codec, tmp_path: Path) -> None:
    opacity = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8)[:, None], (6, HEIGHT, WIDTH, 1))
    frames = np.concatenate([np.stack([SCENE] * 6), opacity], axis=-1)
    data = clip(
        codec, Traits(matrix=6 if "yuv" in codec.form else 2, full=False if "yuv" in codec.form else None), frames
    )
    shown = ffmpegs(data, Traits(), codec, tmp_path, 4).astype(float)
    assert np.ptp(shown[..., 3]) > 200
    share = shown[..., 3:] / 255
    expected = shown[..., :3] * share + 255 * (1 - share)
    error = np.abs(decode_video(data, 3)[2] - expected)
    assert error.mean() < 1.5 and np.percentile(error, 99) <= 6


@pytest.mark.skipif(not FFMPEG, reason="needs the FFmpeg program")
@pytest.mark.parametrize("primaries", [9, 12, 11])
def test_wide_primaries_are_what_zimg_makes_of_them(primaries: int, tmp_path: Path) -> None:
    """zimg, in FFmpeg's `zscale`, is another implementation of the conversion. Levels are sRGB's, as ours are taken."""
    if "zscale" not in subprocess.run([FFMPEG or "", "-v", "error", "-filters"], capture_output=True, text=True).stdout:
        pytest.skip("this FFmpeg has no zscale")
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv444p"
        coder = stream.codec_context
        coder.colorspace, coder.color_range, coder.color_primaries, coder.color_trc = 1, 1, primaries, 13
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(SCENE, format="rgb24")
            frame = frame.reformat(format="yuv444p", dst_colorspace=1, dst_color_range=1)
            frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = 1, 1, primaries, 13
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    (tmp_path / "clip").write_bytes(buffer.getvalue())
    names = {9: "2020", 11: "smpte431", 12: "smpte432"}
    graph = (
        f"zscale=min=709:rin=limited:pin={names[primaries]}:tin=iec61966-2-1:m=gbr:r=full:p={names[primaries]}:"
        "t=iec61966-2-1,format=gbrpf32le,zscale=t=linear:npl=100,zscale=p=709,zscale=t=iec61966-2-1,format=gbrp,format=rgb24"
    )
    command = [
        FFMPEG or "",
        "-v",
        "error",
        "-i",
        str(tmp_path / "clip"),
        "-vf",
        graph,
        "-frames:v",
        "1",
        "-f",
        "rawvideo",
        "-",
    ]
    shown = subprocess.run(command, capture_output=True, check=True).stdout
    expected = np.frombuffer(shown, np.uint8).reshape(HEIGHT, WIDTH, 3).astype(int)
    found = decode_video(buffer.getvalue(), 2)[1].astype(int)
    error = np.abs(found - expected)
    assert error.mean() < 1.5 and np.percentile(error, 99) <= 6, (error.mean(), error.max())
    assert np.abs(found - SCENE).mean() > 3


def shown_by_pillow(data: bytes) -> Image.Image:
    """Turned, with Little CMS's colours, on white: Pillow's own functions in their usual order."""
    image = Image.open(io.BytesIO(data))
    icc = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    transparent = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    opacity = image.convert("RGBA").getchannel("A") if transparent else Image.new("L", image.size, 255)
    flat = image.convert("RGBA").convert("RGB") if image.mode != "CMYK" else image.convert("RGB")
    if icc:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(flat, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None
        flat = converted
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(flat, mask=opacity)
    return white


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
@pytest.mark.parametrize("wide", [False, True])
def test_a_picture_is_shown_as_pillow_and_little_cms_show_it(kind: str, mode: str, wide: bool) -> None:
    if wide and mode == "CMYK":
        pytest.skip("a profile of RGB is none for CMYK, which is refused")
    for turned in range(1, 9):
        data = picture(kind, mode, wide, turned)
        expected = np.asarray(shown_by_pillow(data)).astype(int)
        found = decode_image(data)
        assert found.shape == expected.shape == ((HEIGHT, WIDTH, 3) if turned < 5 else (WIDTH, HEIGHT, 3))
        assert np.abs(found - expected).max() <= 3, turned


@pytest.mark.skipif(not FFMPEG, reason="needs the FFmpeg program")
@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "L"), ("JPEG", "RGB"), ("PNG", "L"), ("PNG", "RGB"), ("PNG", "P"), ("WEBP", "RGB")]
)
def test_a_plain_picture_is_shown_as_ffmpeg_shows_it(kind: str, mode: str, tmp_path: Path) -> None:
    data = picture(kind, mode, False, 1)
    (tmp_path / "picture").write_bytes(data)
    command = [FFMPEG or "", "-v", "error", "-i", str(tmp_path / "picture"), "-sws_flags",
               "bicubic+accurate_rnd+full_chroma_int", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, check=True).stdout
    expected = np.frombuffer(shown, np.uint8).reshape(HEIGHT, WIDTH, 3).astype(int)
    error = np.abs(decode_image(data) - expected)
    assert error.mean() < 1 and np.percentile(error, 99) <= 6
