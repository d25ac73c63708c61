"""What is done to pixels beside decoding is counted: each kind where it is done, and none where nothing is.

Run: python -m pytest tests/pipelines/media/test_noted_conversions.py
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_files import ALPHA, CODECS, Codec, Traits, clip, picture, scene
from PIL import Image

from domainshuttle.model.encoders import load_text_encoder, load_video_encoder
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.encoding.sample_encoder import encode_rows
from domainshuttle.pipelines.index.parts import CONVERTED_NAME
from domainshuttle.pipelines.index.table import IndexRow
from domainshuttle.pipelines.media import conversions as done
from domainshuttle.pipelines.media.conversions import note, noted_conversions
from domainshuttle.pipelines.media.decode import decode_image, decode_video
from domainshuttle.pipelines.quarantine import BadSample
from domainshuttle.pipelines.sample import RawSample, SampleInfo
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.platform.commands.data_index import print_converted

FRAMES = np.stack([scene(2 * number) for number in range(6)])
NAMED = Traits(matrix=1, full=False)
BY_LABEL = {codec.label: codec for codec in [*CODECS, *ALPHA]}
H264 = BY_LABEL["libx264-yuv420p-mp4"]


def of_clip(data: bytes) -> set[str]:
    with noted_conversions() as found:
        decode_video(data, 2)
    return found


def of_picture(data: bytes) -> set[str]:
    with noted_conversions() as found:
        decode_image(data)
    return found


@pytest.mark.parametrize(
    ("codec", "traits", "expected"),
    [
        (H264, NAMED, set()),
        (H264, Traits(), {done.GUESSED}),
        (H264, replace(NAMED, matrix=2), {done.GUESSED}),
        (H264, replace(NAMED, aspect=Fraction(2)), {done.SQUARED}),
        (H264, replace(NAMED, orientation=(0, 1, -1, 0)), {done.TURNED}),
        (H264, replace(NAMED, orientation=(-1, 0, 0, 1)), {done.TURNED}),
        (H264, replace(NAMED, orientation=(-1, 0, 0, -1)), {done.TURNED}),
        (H264, replace(NAMED, interlaced=True), {done.DEINTERLACED}),
        (BY_LABEL["libx264-yuv420p10le-mp4"], NAMED, {done.DEPTH}),
        (BY_LABEL["png-rgb24-mov"], Traits(), set()),
        (BY_LABEL["ffv1-gray-matroska"], Traits(full=True), set()),
        (BY_LABEL["png-rgba-mov"], Traits(), {done.ON_WHITE}),
        (BY_LABEL["ffv1-yuva420p-matroska"], NAMED, {done.ON_WHITE}),
    ],
)
def test_clips(codec: Codec, traits: Traits, expected: set[str]) -> None:
    alpha = np.full((*FRAMES.shape[:3], 1), 200, np.uint8)
    frames = np.concatenate([FRAMES, alpha], axis=-1) if codec in ALPHA else FRAMES
    assert of_clip(clip(codec, traits, frames)) == expected


def saved(kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        *((lambda kind=kind: saved(kind), set()) for kind in ("JPEG", "PNG", "WEBP")),
        (lambda: picture("JPEG", "RGB", False, 6), {done.TURNED}),
        (lambda: picture("PNG", "RGB", True, 1), {done.PROFILE}),
        (lambda: picture("WEBP", "RGBA", True, 3), {done.PROFILE, done.ON_WHITE, done.TURNED}),
        (lambda: picture("JPEG", "CMYK", False, 1), {done.GUESSED}),
        (lambda: picture("PNG", "I;16", False, 1), {done.DEPTH}),
        (lambda: picture("PNG", "PA", False, 1), {done.ON_WHITE}),
        (
            lambda: saved("WEBP", save_all=True, append_images=[Image.fromarray(FRAMES[3])], lossless=True),
            {done.ONE_PICTURE, done.ON_WHITE},  # of an animation Pillow gives RGBA
        ),
    ],
)
def test_pictures(make: Callable[[], bytes], expected: set[str]) -> None:
    assert of_picture(make()) == expected


def test_each_block_has_its_own_set() -> None:
    note("nobody listens")
    with noted_conversions() as outer:
        with noted_conversions() as inner:
            note("in")
        note("out")
    assert (outer, inner) == ({"out"}, {"in"})


def test_encoding_lists_and_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = picture("PNG", "RGB", True, 6)
    files = {"plain": saved("PNG"), "turned": turned, "profile": picture("PNG", "RGB", True, 1)}
    with ShardWriter(tmp_path / "raw", "a", 1 << 20) as writer:
        infos = {}
        for key, data in files.items():
            infos[key] = SampleInfo(
                caption="", source="s", kind="image", frames=1, size=decode_image(data).shape[:2],
                subjects=[], references=[],
            )  # fmt: skip
            writer.write(key, RawSample(key, infos[key], {"png": data}).members())
    bucket = parse_bucket("1x32x32")
    rows = [
        replace(IndexRow.of(entry, infos[entry.key], bucket), folder=str(tmp_path / "raw"), corpus="c")
        for entry in writer.entries
    ]
    encoded = list(encode_rows(rows, load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48)))
    found = {row.key: sample.converted for row, sample in encoded if not isinstance(sample, Exception)}
    assert found == {"plain": (), "turned": (done.PROFILE, done.TURNED), "profile": (done.PROFILE,)}
    lines = [BadSample("s", "a.tar", key, one) for key, of_key in found.items() for one in of_key]
    index = tmp_path / "index.parquet"
    index.with_name(CONVERTED_NAME).write_text("".join(json.dumps(asdict(one)) + "\n" for one in lines))
    print_converted(index)
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"2 {done.PROFILE}, 1 {done.TURNED}")
    index.with_name(CONVERTED_NAME).unlink()
    print_converted(index)
    assert not capsys.readouterr().out
