"""What training changes of samples is counted rightly, against a count of the pixels and frames themselves.

Run: python -m pytest tests/pipelines/index/test_alterations.py
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.alterations import Alterations, count_alterations
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, rows_table, write_index
from domainshuttle.pipelines.media.decode import decode_video, encode_mp4, fit_target
from domainshuttle.pipelines.sample import SampleInfo
from domainshuttle.pipelines.shards.tar import Member, ShardEntry


def row(
    key: str, frames: int, size: tuple[int, int], fps: float | None, bucket: str, tokens: tuple[int, int] = (0, 0)
) -> IndexRow:
    kind = "image" if frames == 1 else "video"
    info = SampleInfo(
        caption="", source="s", kind=kind, fps=fps, frames=frames, size=size, subjects=[], references=[]
    )  # fmt: skip
    return IndexRow.of(ShardEntry("a.tar", key, (Member("json", 512, 2),), 1), info, bucket, *tokens)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 200), st.integers(8, 200)), bucket=st.sampled_from(["1x32x32", "1x48x80", "1x80x48"])
)
def test_sizes_are_counted_as_the_pixels_are_changed(size: tuple[int, int], bucket: str) -> None:
    """A picture of columns (or rows) of different levels: those at its edges that are still there after fitting."""
    found = count_alterations(rows_table([row("a", 1, size, None, bucket)]), None)
    wanted = parse_bucket(bucket)
    scale = max(wanted.height / size[0], wanted.width / size[1])
    assert found.enlarged == (scale > 1) and found.most_enlarged == pytest.approx(max(scale, 1), rel=0.02)
    visible = wanted.height * wanted.width / (size[0] * size[1] * scale**2)
    assert found.most_cropped == pytest.approx(1 - visible, abs=0.04)
    rising = np.linspace(0, 255, size[0])[:, None] + np.zeros(size)
    across = np.linspace(0, 255, size[1])[None] + np.zeros(size)
    spans = [
        np.ptp(fit_target(np.repeat(ramp[None, ..., None], 3, -1).astype(np.uint8), wanted)[0].astype(int))
        for ramp in (rising, across)
    ]
    if found.most_cropped > 0.1:
        assert min(spans) < 252
    if not found.cropped:
        assert min(spans) > 235


@pytest.mark.parametrize("own", [8.0, 12.0, 24.0, 30000 / 1001])
@pytest.mark.parametrize("sampled", [None, 8.0, 12.0, 24.0])
@pytest.mark.parametrize("frames", [13, 24, 40])
def test_clips_are_counted_as_their_frames_are_taken(own: float, sampled: float | None, frames: int) -> None:
    shown = np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 5 + 10, 32, 1).repeat(32, 2).repeat(3, 3)
    data = encode_mp4(shown, own, crf=2)
    with pytest.raises(DataError, match="the bucket needs 999") as ended:
        decode_video(data, 999, sampled)
    there = int(str(ended.value).split(" frames at ")[0].split()[-1])
    found = count_alterations(rows_table([row("a", frames, (32, 32), own, "5x32x32")]), sampled)
    assert found.shortened == (there > 5) and found.most_shortened == pytest.approx(max(0, 1 - 5 / there), abs=0.03)
    taken = [round((float(frame.mean()) - 10) / 5) for frame in decode_video(data, there, sampled)]
    assert found.thinned == (set(range(taken[-1] + 1)) != set(taken))
    assert found.repeated == (len(set(taken)) < len(taken))
    assert (found.enlarged, found.cropped, found.cut_captions) == (0, 0, 0)


def test_an_index_counts_all_of_its_samples(tmp_path: Path) -> None:
    rows = [
        row("small", 1, (16, 24), None, "1x32x32", (5, 5)),
        row("wide", 1, (32, 64), None, "1x32x32", (48, 60)),
        row("fits", 1, (64, 64), None, "1x32x32", (48, 49)),
        row("long", 50, (32, 32), 24.0, "5x32x32", (48, 0)),
        row("slow", 5, (32, 32), 8.0, "5x32x32", (3, 3)),
    ]
    expected = Alterations(
        samples=5, enlarged=1, most_enlarged=2.0, cropped=2, most_cropped=0.5, shortened=2,
        most_shortened=1 - 5 / 34, thinned=1, repeated=1, cut_captions=2,
    )  # fmt: skip
    write_index(tmp_path / "index.parquet", rows, IndexMetadata(corpus="c", stage="raw", fps=16.0))
    index = Index.load(tmp_path / "index.parquet")
    found = index.alterations()
    assert found == dataclasses.replace(expected, most_shortened=found.most_shortened)
    assert found.most_shortened == pytest.approx(expected.most_shortened, abs=0.01)
    assert found.sentences() == [
        "1 enlarged (up to 2 times)",
        "2 cropped (up to 50% of the area)",
        "2 shortened (up to 85% of the frames)",
        "1 with frames left out (their rate is higher)",
        "1 with frames repeated (their rate is lower)",
    ]
    others = [dataclasses.replace(one, sample_id=one.sample_id ^ 1) for one in rows]
    write_index(tmp_path / "other.parquet", others, IndexMetadata(corpus="d", stage="raw", fps=None))
    both = Index.concat([index, Index.load(tmp_path / "other.parquet")]).alterations()
    assert (both.samples, both.thinned, both.shortened, both.cropped) == (10, 1, 3, 4)
    assert Alterations(samples=7).sentences() == []
