"""Bytes that were altered at random: each is decoded or refused with DataError, and nothing else happens.

Run: python -m pytest tests/pipelines/media/test_fuzz.py (FUZZ=2000 for more of each)
"""

import io
import os
import random
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from domainshuttle.pipelines.buckets import choose_bucket, frames_at, parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import decode_image, decode_video, encode_jpeg, encode_mp4
from domainshuttle.pipelines.sample import Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tensors import EncodedSample

COUNT = int(os.environ.get("FUZZ", "60"))
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (24, 40, 3), np.uint8)
INFO = SampleInfo(
    caption="a cat — asleep", source="mine", kind="video", fps=8.0, frames=5, size=(32, 32),
    subjects=[Subject(id=0, word="cat", domain=1)],
    references=[Reference(file="ref0.jpg", subject=0, origin="photo", size=(9, 9))], scores={"aesthetic": 4.5},
)  # fmt: skip
ENCODED = EncodedSample(
    "k0", INFO, *(RNG.integers(0, 0x4000, (16, 2, 4, 4), np.uint16), [RNG.integers(0, 0x4000, (16, 4, 4), np.uint16)]),
    RNG.integers(0, 0x4000, (3, 8), np.uint16),
)  # fmt: skip
BUCKETS = [parse_bucket("5x32x32"), parse_bucket("1x32x32")]
NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"Infinity", b"1e-9", b"9" * 23, b"true", b"null", b"[]", b'"\\ud800"', b"{}")


def picture(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


def matroska() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 40, 24, "yuv420p"
        for _ in range(6):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(PICTURE, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def read_description(data: bytes) -> None:
    info = SampleInfo.from_json(data)
    choose_bucket(frames_at(info.frames, info.fps, 8.0), *info.size, BUCKETS)
    assert SampleInfo.from_json(info.to_json()) == info


CASES: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any]]] = {
    "jpeg": (lambda: encode_jpeg(PICTURE), decode_image),
    "jpeg with exif": (lambda: picture("JPEG"), decode_image),
    "png": (lambda: picture("PNG"), decode_image),
    "webp": (lambda: picture("WEBP"), decode_image),
    "mp4": (lambda: encode_mp4(np.stack([PICTURE] * 6), 8.0), lambda data: decode_video(data, 5, 8.0, fit=BUCKETS[0])),
    "matroska": (matroska, lambda data: decode_video(data, 5, 8.0)),
    "safetensors": (ENCODED.to_bytes, lambda data: EncodedSample.from_bytes("k0", INFO, data)),
    "json": (INFO.to_json, read_description),
}


def altered(data: bytes, draw: random.Random) -> bytes:
    """A few bits, bytes, or stretches of the file changed; or, where it is text, its numbers."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(changed))
        if draw.random() < 0.5:  # headers are where the traps are
            place = min(place, draw.randrange(200))
        kind = draw.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del changed[place : place + draw.choice((1, 4, 50))]
        elif kind == 3:
            changed[place:place] = draw.randbytes(draw.choice((1, 4, 50)))
        elif kind == 4:
            changed[place : place + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"))
        else:
            digits = [at for at, byte in enumerate(changed[:400]) if 48 <= byte < 58]
            if digits:
                place = draw.choice(digits)
                changed[place : place + 1] = draw.choice(NUMBERS)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


@pytest.mark.parametrize("name", CASES)
def test_altered_bytes_are_decoded_or_refused(name: str) -> None:
    make, decode = CASES[name]
    draw, data, refused = random.Random(name), make(), 0
    decode(data)
    for _ in range(COUNT * (10 if name in ("safetensors", "json") else 1)):
        broken = altered(data, draw)
        try:
            decode(broken)
        except DataError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{error!r} of {broken[:2000]!r}") from error
    assert refused > COUNT // 10
