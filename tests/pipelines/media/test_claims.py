"""What key.json claims of a sample's files is compared with the files wherever their pixels are used.

Run: python -m pytest tests/pipelines/media/test_claims.py
"""

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from domainshuttle.model.encoders import load_text_encoder, load_video_encoder
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.encoding.sample_encoder import decode_sample, encode_rows
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.loading.live import RawReader
from domainshuttle.pipelines.loading.reader import Drawn
from domainshuttle.pipelines.media.claims import reference_pixels, target_pixels
from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.pipelines.plan.feed import EncoderSources, Feed
from domainshuttle.pipelines.quarantine import SampleFault
from domainshuttle.pipelines.sample import RawSample, SampleInfo
from domainshuttle.pipelines.shards.tar import ShardWriter

SOURCES = EncoderSources("block-dct", "byte-umt5", 48)
CLIP = parse_bucket("5x32x32")


def picture(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def clip(frames: int = 9, fps: float = 24.0, size: tuple[int, int] = (48, 64)) -> bytes:
    return encode_mp4(np.zeros((frames, *size, 3), np.uint8), fps)


def matroska(stamps: list[int]) -> bytes:
    """A clip whose frames begin at these milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp in stamps:
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def video(data: bytes, ending: str = "mp4", **claims: Any) -> RawSample:
    base: dict[str, Any] = {"caption": "", "source": "s", "kind": "video", "fps": 24.0, "frames": 9, "size": (48, 64)}
    return RawSample("k", SampleInfo(**{**base, "subjects": [], "references": [], **claims}), {ending: data})


def image(size: tuple[int, int] = (48, 64), reference: tuple[int, int] = (40, 32)) -> RawSample:
    """A picture of 48x64 with a reference of 40x32, and what is claimed of both."""
    info = SampleInfo(
        caption="a cat", source="s", kind="image", frames=1, size=size,
        subjects=[{"id": 0, "word": "cat", "domain": 1}],  # type: ignore[list-item]
        references=[{"file": "ref0.png", "subject": 0, "origin": "photo", "size": reference}],  # type: ignore[list-item]
        scores={"q": 0.5},
    )  # fmt: skip
    return RawSample("k", info, {"png": picture(48, 64), "ref0.png": picture(40, 32)})


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        (video(clip()), None),
        (video(clip(), size=(64, 48)), "wrong size"),
        (video(clip(), frames=10), "wrong length"),
        (video(clip(), frames=8), "wrong length"),
        (video(clip(), frames=100_000), "wrong length"),
        (video(clip(), fps=25.0), "wrong rate"),
        (video(clip(), fps=12.0), "wrong rate"),
        (video(clip(), fps=None), None),
        (video(clip(fps=24000 / 1001), fps=23.976), None),
        (video(clip(fps=24000 / 1001), fps=24.0), None),
        (video(clip(fps=30000 / 1001), fps=30.0), None),
        (video(clip(fps=30000 / 1001), fps=29.97), None),
        (video(clip(fps=30000 / 1001), fps=29.0), "wrong rate"),
        (video(clip(fps=60), fps=30.0), "wrong rate"),
        # milliseconds are the clock of Matroska: 30 a second come at 0, 33, 67 ...
        (video(matroska([0, 33, 67, 100, 133]), "mkv", frames=5, fps=30.0), None),
        (video(matroska([0, 33, 67, 100, 133]), "mkv", frames=5, fps=25.0), "wrong rate"),
        (video(matroska([0, 30, 80, 120, 160, 200]), "mkv", frames=6, fps=25.0), None),  # a rate that varies
    ],
)
def test_clips(sample: RawSample, kind: str | None) -> None:
    if kind is None:
        assert target_pixels(sample, CLIP).shape == (5, 32, 32, 3)
        return
    with pytest.raises(SampleFault) as found:
        target_pixels(sample, CLIP)
    assert found.value.kind == kind and "k." in str(found.value) and "key.json says" in str(found.value)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_packets_that_show_no_frame_are_not_counted(codec: str) -> None:
    """VP8 stores frames that are only referred to as packets of their own."""
    buffer, random = io.BytesIO(), np.random.default_rng(0)
    moving = np.kron(random.integers(0, 256, (12, 16, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(buffer, mode="w", format="webm") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4"}
        for shift in range(40):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(moving, 2 * shift, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    claims = {"frames": 40, "size": (96, 128), "fps": 24.0}
    assert target_pixels(video(buffer.getvalue(), "webm", **claims), CLIP).shape == (5, 32, 32, 3)
    with pytest.raises(SampleFault, match=r"wrong length: k.webm: 40 frames, key.json says 41"):
        target_pixels(video(buffer.getvalue(), "webm", **{**claims, "frames": 41}), CLIP)


def test_pictures_and_references() -> None:
    assert target_pixels(image(), parse_bucket("1x48x64")).shape == (1, 48, 64, 3)
    with pytest.raises(SampleFault, match=r"wrong size: k.png: 48x64 pixels, key.json says 64x48"):
        target_pixels(image(size=(64, 48)), parse_bucket("1x64x48"))
    with pytest.raises(SampleFault, match=r"wrong size: k.ref0.png: 40x32 pixels, key.json says 32x40"):
        reference_pixels(image(reference=(32, 40)), 0)
    with pytest.raises(DataError, match="wrong size"):
        decode_sample(image(reference=(32, 40)), parse_bucket("1x48x64"))


def corpus(folder: Path, sample: RawSample, bucket: str, **changes: Any) -> Index:
    """One sample, and its index with a row that is changed."""
    with ShardWriter(folder, "a", 1 << 20) as writer:
        writer.write(sample.key, sample.members())
    row = replace(IndexRow.of(writer.entries[0], sample.info, bucket), **changes)
    write_index(folder / "index.parquet", [row], IndexMetadata(corpus="c", stage="raw"))
    return Index.load(folder / "index.parquet")


WRONG: list[tuple[RawSample, str, dict[str, Any], str]] = [
    (image(size=(64, 48)), "1x64x48", {}, "wrong size"),
    (image(reference=(32, 40)), "1x48x64", {}, "wrong size"),
    (video(clip(), frames=10), "5x32x32", {}, "wrong length"),
    (video(clip(), fps=16.0), "5x32x32", {}, "wrong rate"),
    (video(clip()), "5x32x32", {"fps": 16.0}, "index differs"),
    (image(), "1x48x64", {"height": 64, "width": 48}, "index differs"),
    (image(), "1x48x64", {"subjects": ("dog",)}, "index differs"),
    (image(), "1x48x64", {"domains": (0,)}, "index differs"),
    (image(), "1x48x64", {"reference_origins": ("edited",)}, "index differs"),
    (image(), "1x48x64", {"scores": {"q": 0.75}}, "index differs"),
]


@pytest.mark.parametrize(("sample", "bucket", "changes", "kind"), WRONG)
def test_encoding_and_live_encoding_refuse_what_differs(
    tmp_path: Path, sample: RawSample, bucket: str, changes: dict[str, Any], kind: str
) -> None:
    index = corpus(tmp_path, sample, bucket, **changes)
    row = index.row(0)
    ((_, found),) = encode_rows([row], load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48))
    assert isinstance(found, SampleFault) and found.kind == kind
    one = Feed((CorpusShare("c", str(tmp_path / "index.parquet"), 1.0),), 1, 1, 1, 48, 3, encoders=SOURCES)
    with pytest.raises(SampleFault, match=kind):
        RawReader(one, SOURCES, "cpu").read_one(Drawn(row, 0, one.pair(row, 0)))


def test_what_is_as_claimed_is_encoded(tmp_path: Path) -> None:
    index = corpus(tmp_path, image(), "1x48x64")
    assert read_raw_sample(index.row(0)).info == image().info
    ((_, found),) = encode_rows([index.row(0)], load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48))
    assert not isinstance(found, DataError), found


@pytest.mark.parametrize(("caption", "tokens"), [("a cat", 6), ("x" * 47, 48), ("x" * 48, 49), ("x" * 5000, 5001)])
def test_a_cut_caption_is_counted_in_the_sample_and_its_row(tmp_path: Path, caption: str, tokens: int) -> None:
    """byte-umt5 has a token a byte, and one for the end."""
    sample = image()
    sample = replace(sample, info=sample.info.model_copy(update={"caption": caption}))
    index = corpus(tmp_path, sample, "1x48x64")
    ((_, found),) = encode_rows([index.row(0)], load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48))
    assert not isinstance(found, DataError)
    again = type(found).from_members("k", found.members())  # as it is in its shard
    assert again.whole_caption_tokens == found.whole_caption_tokens == tokens
    assert len(again.text) == min(tokens, 48)
