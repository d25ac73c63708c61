"""Damage of pictures: what a checksum or the decoder tells of it is heard, whichever way a picture is decoded.

Run: python -m pytest tests/pipelines/media/test_damaged_pictures.py
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from icc import profile
from media_files import scene
from PIL import Image, ImageCms, ImageOps

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media import colours, conversions
from domainshuttle.pipelines.media.conversions import noted_conversions
from domainshuttle.pipelines.media.decode import decode_image

PICTURE = Image.fromarray(scene(0, 120, 160))
TURNED = Image.Exif()
TURNED[0x0112] = 6
PROFILE = profile(colours.ColourSpace(colours._OTHERS[12], 1.8))


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    data = io.BytesIO()
    image = PICTURE.quantize(64) if mode == "P" else PICTURE.convert(mode)
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    return data[:33] + chunk(kind, content) + data[33:]


PNGS: dict[str, Callable[[], bytes]] = {
    "RGB": lambda: saved("PNG"),
    "not compressed": lambda: saved("PNG", compress_level=0),
    "palette": lambda: saved("PNG", "P"),
    "transparent": lambda: saved("PNG", "RGBA"),
    "grey": lambda: saved("PNG", "L"),
    "gamma": lambda: with_chunk(saved("PNG", compress_level=0), b"gAMA", struct.pack(">I", 100_000)),
    "profile": lambda: saved("PNG", icc_profile=PROFILE),
    "turned": lambda: saved("PNG", exif=TURNED.tobytes()),
}


@pytest.mark.parametrize("which", PNGS)
def test_any_changed_byte_of_a_png_is_refused(which: str) -> None:
    """Each chunk has a checksum, so of its bytes none can change unseen."""
    whole, random = PNGS[which](), np.random.default_rng(0)
    decode_image(whole)
    for position in random.integers(8, len(whole), 60):
        data = bytearray(whole)
        data[position] ^= 1 << int(random.integers(0, 8))
        with pytest.raises(DataError):
            decode_image(bytes(data))
    for size in (len(whole) - 1, len(whole) - 12, len(whole) - 13, len(whole) // 2):
        with pytest.raises(DataError):
            decode_image(whole[:size])
    assert np.array_equal(decode_image(whole + b"what tools append"), decode_image(whole))


JPEGS: dict[str, Callable[[], bytes]] = {
    "turned": lambda: saved("JPEG", exif=TURNED.tobytes()),
    "profile": lambda: saved("JPEG", icc_profile=PROFILE),
    "grey profile": lambda: saved("JPEG", "L", icc_profile=PROFILE),
    "CMYK": lambda: saved("JPEG", "CMYK"),
    "progressive": lambda: saved("JPEG", progressive=True, exif=TURNED.tobytes()),
}


@pytest.mark.parametrize("which", JPEGS)
def test_what_libjpeg_says_of_damage_is_heard_of_jpegs_that_are_converted_too(which: str) -> None:
    """Against libjpeg-turbo's own words, in strict mode."""
    whole, random, refused = JPEGS[which](), np.random.default_rng(0), 0
    start = whole.rindex(b"\xff\xda") + 16 if which != "progressive" else whole.index(b"\xff\xda") + 16
    for _ in range(30):
        data, position = bytearray(whole), int(random.integers(start, len(whole) - 20))
        data[position : position + 16] = random.integers(0, 256, 16, np.uint8).tobytes()
        form = "CMYK" if which == "CMYK" else "GRAY" if which.startswith("grey") else "RGB"
        try:
            simplejpeg.decode_jpeg(bytes(data), colorspace=form, strict=True)
        except ValueError:
            refused += 1
            with pytest.raises(DataError):
                decode_image(bytes(data))
        else:
            decode_image(bytes(data))
    assert refused >= 10


@pytest.mark.parametrize("which", ["turned", "profile", "CMYK", "progressive"])
def test_levels_of_converted_jpegs_are_pillows(which: str) -> None:
    data = JPEGS[which]()
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if which == "profile":
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(PROFILE)), ImageCms.createProfile("sRGB")
        ImageCms.profileToProfile(shown, source, target, inPlace=True)
    assert np.abs(decode_image(data).astype(int) - np.asarray(shown)).max() <= 3


def test_other_pictures_of_a_jpeg_are_counted() -> None:
    data = io.BytesIO()
    PICTURE.save(data, "MPO", save_all=True, append_images=[PICTURE.transpose(Image.Transpose.ROTATE_180)], quality=95)
    with noted_conversions() as found:
        shown = decode_image(data.getvalue())
    assert found == {conversions.ONE_PICTURE}
    assert np.abs(shown.astype(int) - np.asarray(PICTURE)).mean() < 3


@pytest.mark.parametrize("gamma", [1, 9_999, 1_000_001, 4_000_000_000])
def test_a_gamma_of_no_screen_is_refused(gamma: int) -> None:
    with pytest.raises(DataError, match=r"gAMA of .* is that of no screen"):
        decode_image(with_chunk(saved("PNG"), b"gAMA", struct.pack(">I", gamma)))
