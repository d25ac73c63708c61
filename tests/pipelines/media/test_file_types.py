"""Which files are opened, by whose decoder, and how pictures of cameras and of 16 bits come out.

Run: python -m pytest tests/pipelines/media/test_file_types.py
"""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media import decode as media
from domainshuttle.pipelines.media.decode import Pixels, decode_image, decode_video, encode_jpeg, encode_mp4, fit_target

RNG = np.random.default_rng(0)
PICTURE = np.kron(RNG.integers(0, 256, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
CLIP = encode_mp4(np.stack([np.roll(PICTURE, 3 * number, axis=1) for number in range(6)]), 8.0)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_known_by_their_bytes(kind: str) -> None:
    data = saved(Image.fromarray(PICTURE), kind, **{} if kind == "PNG" else {"quality": 95})
    assert np.abs(decode_image(data, "named.tif").astype(int) - PICTURE).mean() < (1 if kind == "PNG" else 12)


def test_postscript_is_not_handed_to_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(secret) show\n%%EOF\n"
    with pytest.raises(DataError, match=r"k\.png: not a readable JPEG, PNG or WebP picture: it is PostScript"):
        decode_image(data, "k.png")
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "TGA", "ICO"])
def test_other_pictures_are_refused_by_name(kind: str) -> None:
    with pytest.raises(DataError, match=f"it is ({kind}|unknown)"):
        decode_image(saved(Image.fromarray(PICTURE), kind), "k.jpg")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ffconcat version 1.0\nfile {secret}\n", "an FFmpeg playlist"),
        ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n", "an HLS playlist"),
        ("<MPD></MPD>", "HTML or XML"),
        ("RIFF1234AVI LIST", "RIFF AVI"),
        ("", "empty"),
        ("\0" * 99, "zeros"),
    ],
)
def test_a_clip_that_names_another_file_does_not_open_it(text: str, found: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(CLIP)
    with pytest.raises(DataError, match=f"k.mp4: not a readable clip: expected MP4, .*it is {found}"):
        decode_video(text.format(secret=secret).encode(), 2, name="k.mp4")


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "webm"])
def test_clips_are_known_by_their_bytes(kind: str) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=kind) as out:
        stream = out.add_stream("libvpx" if kind == "webm" else "libx264", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(PICTURE, format="rgb24")))
        out.mux(stream.encode())
    assert decode_video(buffer.getvalue(), 4, name="named.avi").shape == (4, 48, 64, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turned", [1, 3])
def test_a_picture_is_decoded_into_its_place_in_a_batch(kind: str, turned: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    data = saved(Image.fromarray(PICTURE), kind, exif=exif.tobytes())
    batch = np.zeros((3, *PICTURE.shape), np.uint8)
    assert np.shares_memory(decode_image(data, out=batch[1]), batch)
    assert np.array_equal(batch[1], decode_image(data)) and not batch[0].any() and not batch[2].any()
    with pytest.raises(DataError, match=r"k.jpg: 48x64 pixels, expected 64x48"):
        decode_image(data, "k.jpg", out=np.zeros((64, 48, 3), np.uint8))
    with pytest.raises(ValueError, match="without gaps"):
        decode_image(data, out=np.zeros((48, 128, 3), np.uint8)[:, ::2])


@pytest.mark.parametrize("factors", [0x14, 0x42, 0x24])
def test_rare_samplings_of_colour_are_decoded_too(factors: int) -> None:
    """libjpeg-turbo's binding knows no name for them: it raises KeyError and ValueError."""
    data = bytearray(saved(Image.fromarray(PICTURE), "JPEG", subsampling=2))
    data[data.index(b"\xff\xc0") + 11] = factors
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(bytes(data)), expected)
    with pytest.raises(DataError, match="not a readable JPEG"):
        decode_image(bytes(data[: len(data) // 2]))


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_of_cameras_are_turned_upright(turned: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = turned
    options = {} if kind == "PNG" else {"quality": 95}
    data = saved(Image.fromarray(PICTURE), kind, exif=exif.tobytes(), **options)
    plain = decode_image(saved(Image.fromarray(PICTURE), kind, **options))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = decode_image(data)
    assert found.shape == ((64, 48, 3) if turned > 4 else (48, 64, 3))
    assert np.array_equal(found, upright_by_pillow(plain, turned))
    assert np.abs(found.astype(int) - np.asarray(expected.convert("RGB"))).mean() < 3


def upright_by_pillow(picture: Pixels, turned: int) -> Pixels:
    exif = Image.Exif()
    exif[0x0112] = turned
    image = Image.open(io.BytesIO(saved(Image.fromarray(picture), "PNG", exif=exif.tobytes())))
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 50])
def test_exif_that_is_broken_leaves_the_picture_as_it_is(exif: bytes) -> None:
    plain = encode_jpeg(PICTURE)
    segment = b"Exif\0\0" + exif
    data = plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]
    assert np.array_equal(decode_image(data), decode_image(plain))


def test_grey_of_16_bits_keeps_its_levels() -> None:
    levels = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    found = decode_image(saved(Image.fromarray(levels), "PNG"))
    assert found.shape == (48, 64, 3)
    assert np.abs(found - (levels / 257)[..., None]).max() <= 1
    hidden = decode_image(saved(Image.fromarray(levels), "PNG", transparency=int(levels[20, 20])))
    assert (hidden[20, 20] == 255).all() and np.array_equal(hidden[30:], found[30:])


@pytest.mark.parametrize("size", [(96, 64), (50, 90), (48, 64), (20, 30)])
@pytest.mark.parametrize("fps", [None, 4.0])
def test_frames_fitted_one_by_one_are_those_fitted_together(size: tuple[int, int], fps: float | None) -> None:
    bucket = parse_bucket("5x48x64")
    data = encode_mp4(RNG.integers(0, 256, (12, *size, 3), np.uint8), 8.0)
    expected = fit_target(decode_video(data, 5, fps), bucket)
    assert np.array_equal(decode_video(data, 5, fps, fit=bucket), expected)


def test_clips_of_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_CLIP_PIXELS", 6 * 48 * 64 - 1)
    assert len(decode_video(CLIP, 5)) == 5
    with pytest.raises(DataError, match="k: 6 frames of 64x48 are 18432 pixels; at most 18431 are read"):
        decode_video(CLIP, 6, name="k")
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(DataError, match="k: declares 64x48 pixels"):
        decode_video(CLIP, 2, name="k")
    monkeypatch.undo()
    monkeypatch.setattr(media, "MAX_DECODED_PIXELS", 3 * 48 * 64)
    with pytest.raises(DataError, match="more than 9216 pixels would have to be decoded"):
        decode_video(CLIP, 4, 8.0, name="k")


DECODING = r"""
import re, sys
from pathlib import Path
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.media.decode import decode_video
# not getrusage's, which begins with that of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
data, bucket = Path(sys.argv[1]).read_bytes(), parse_bucket("41x288x432")
decode_video(data, 1, fit=bucket)
before = peak()
print(decode_video(data, 41, fit=bucket).shape, peak() - before)
"""


def test_a_clip_holds_one_frame_of_its_full_size(tmp_path: Path) -> None:
    """41 frames of 1080p are 255 MB; fitted to their bucket 15 MB."""
    frames = np.zeros((41, 1080, 1920, 3), np.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(frames, 16.0))
    run = subprocess.run(
        [sys.executable, "-c", DECODING, str(tmp_path / "clip.mp4")], capture_output=True, text=True, check=True
    )
    shape, _, megabytes = run.stdout.strip().rpartition(" ")
    assert shape == "(41, 288, 432, 3)"
    assert 10 < float(megabytes) < 60


def test_a_line_of_pixels_does_not_fill_the_memory() -> None:
    with pytest.raises(DataError, match="a target of 4000x10 pixels would be 332800x832 to cover 1x480x832"):
        fit_target(np.zeros((1, 4000, 10, 3), np.uint8), parse_bucket("1x480x832"))


@pytest.mark.parametrize("fps", [0.0001, 1e-9, 1e6, float("nan")])
def test_rates_that_no_clip_has_are_refused(fps: float) -> None:
    with pytest.raises(DataError, match=r"a rate of .* frames a second; expected 0\.01 to 1000"):
        decode_video(CLIP, 5, fps)
