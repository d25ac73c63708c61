"""Phantom-Data. Run: python -m pytest tests/pipelines/corpora/test_phantom_data.py"""

from pathlib import Path

import numpy as np
import pytest
from built import grey, made, mp4, reasons
from sources.phantom_data import UUID, A, B, pair, source

from domainshuttle.pipelines.corpora.phantom_data import place_box
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import decode_video
from domainshuttle.pipelines.quarantine import SampleFault


@pytest.mark.parametrize("named", ["video_id", "vid"])
def test_each_phrase_has_its_box_in_both_clips(tmp_path: Path, named: str) -> None:
    phrases = {"a man in a red shirt": pair(), "a dog": pair()}
    phrases["a dog"]["obj_from_tgt_video"][0]["bbox_cls"] = "dog"
    (sample,) = made(source(tmp_path / "root", [(A, "A man and a dog.", phrases)], named), tmp_path / "survey")
    assert bytes(sample.target) == (tmp_path / "root" / "videos" / f"{A}.mp4").read_bytes()
    assert [(one.word, one.domain) for one in sample.info.subjects] == [("a man in a red shirt", 0), ("a dog", 1)]
    origins = [(one.subject, one.origin, one.size) for one in sample.info.references]
    assert origins == [(0, "other_clip", (30, 20)), (0, "same_clip", (40, 32)),
                       (1, "other_clip", (30, 20)), (1, "same_clip", (40, 32))]  # fmt: skip
    # frame int(10 * 0.1) of the other clip, and int(10 * 0.5) of its own
    assert abs(grey(sample.files["ref0.jpg"]) - 110) <= 2 and abs(grey(sample.files["ref1.jpg"]) - 50) <= 2
    assert sample.info.scores["reference_0"] == 0.9


def test_clips_are_cut_out_of_whole_videos(tmp_path: Path) -> None:
    config = source(tmp_path / "root", [(B, "x", {"a man": pair(B, A)})])
    for path in (tmp_path / "root" / "videos").iterdir():
        path.unlink()
    (tmp_path / "root" / "whole").mkdir()
    (tmp_path / "root" / "whole" / f"{UUID}.mp4").write_bytes(mp4(0, frames=25))
    config = config.model_copy(update={"videos": "whole/{uuid}.mp4"})
    (sample,) = made(config, tmp_path / "survey")
    assert (sample.info.frames, sample.info.fps) == (10, 10.0)
    levels = decode_video(sample.target, 10).mean((1, 2, 3))
    np.testing.assert_allclose(levels, 150 + 10 * np.arange(10), atol=3)
    for frames, left in ((24, 9), (20, 0)):  # a download that is another cut of the video, or broke off
        (tmp_path / "root" / "whole" / f"{UUID}.mp4").write_bytes(mp4(0, frames=frames))
        result = made(config, tmp_path / f"survey{frames}")
        assert [one.info.frames for one in result] == [left] * bool(left)
        assert reasons(result.bad) == ["short clip"] * (not left)


def test_boxes_are_those_of_the_smaller_frame(tmp_path: Path) -> None:
    assert place_box([10, 20, 110, 220], (1080, 1920)).__dict__ == {
        "left": 25, "top": 50, "right": 275, "bottom": 550, "cut": 0.0,
    }  # fmt: skip
    assert place_box([10, 20, 110, 220], (480, 640)).right == 110  # never enlarged
    outside = place_box([700, 0, 800, 100], (432, 768))
    assert (outside.left, outside.right, outside.cut) == (700, 768, pytest.approx(0.32))
    for box in ([5, 5, 5, 9], [9, 9, 5, 5]):
        with pytest.raises(SampleFault, match="empty box"):
            place_box(box, (100, 100))
    with pytest.raises(SampleFault, match="outside of its frame"):
        place_box([200, 0, 300, 50], (100, 100))


def test_dirty_rows_are_left_out_by_reason(tmp_path: Path) -> None:
    rows = [
        (A, "good", {"a man": pair(bbox_loc=[[50, 0, 66, 30]])}),
        (B, "", {"a man": pair()}),
        ("c_0_1", "x", "{broken"),
        ("i_0_1", "x", '{"a man": {}, "a man": {}}'),
        ("j_0_1", "x", "[" * 100_000),
        ("d_0_1", "x", {}),
        ("e_0_1", "x", {"a man": pair("e_0_1")}),
        ("f_0_1", "x", {"a man": pair(frame_idx=1.5)}),
        ("g_0_1", "x", {"a man": pair(bbox_loc=[1, 2])}),
        ("h_0_1", "x", {"a man": []}),
    ]
    result = made(source(tmp_path / "root", rows), tmp_path / "survey")
    assert result.tally.counts == {"empty caption": 1, "broken pair": 3, "no subject": 1, "unknown form": 3}
    assert reasons(result.bad) == ["missing clip"]
    assert result.notes.counts["boxes that were clamped"] == 1
    # a lost reference leaves the target's own
    lost = made(source(tmp_path / "lost", [(A, "x", {"a man": pair(other="z_0_1")})]), tmp_path / "again")
    assert [one.origin for one in lost.samples[0].info.references] == ["same_clip"]
    assert lost.notes.counts == {"boxes that are left out: missing clip": 1}


def test_a_folder_without_clips_is_one_message(tmp_path: Path) -> None:
    config = source(tmp_path / "root", [(A, "x", {"a man": pair()})])
    with pytest.raises(DataError, match=r"clips is missing"):
        made(config.model_copy(update={"clips": "clips/{vid}.mp4"}), tmp_path / "survey")
    with pytest.raises(DataError, match=r"no Parquet files of pairs"):
        made(config.model_copy(update={"metadata": "*.pq"}), tmp_path / "survey")
