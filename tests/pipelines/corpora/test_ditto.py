"""Ditto-1M. Run: python -m pytest tests/pipelines/corpora/test_ditto.py"""

from pathlib import Path

import pytest
from built import grey, made, reasons
from sources.ditto import record, source

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import RawSample


def test_the_edited_clip_is_the_target_and_source_frames_are_references(tmp_path: Path) -> None:
    captions = [{"path": "videos/a.mp4", "caption": "A street."}, {"path": "b.mp4", "caption": "B"}]
    config = source(tmp_path / "root", [record(), record("local/a_2.mp4")], captions)
    styled, local = made(config, tmp_path / "survey")
    assert bytes(styled.target) == (tmp_path / "root" / "videos" / "global_style1" / "a_1.mp4").read_bytes()
    assert styled.info.caption == "A street. Make it a comic." and styled.info.scores["caption_is_instruction"] == 1
    assert [abs(grey(styled.files[f"ref{n}.jpg"]) - level) <= 2 for n, level in enumerate((20, 70))] == [True, True]
    assert [(one.subject, one.origin) for one in styled.info.references] == [(0, "edited")] * 2
    assert [sample.info.subjects[0].domain for sample in (styled, local)] == [2, 4]
    plain = made(config.model_copy(update={"captions": None, "source_frames": 1}), tmp_path / "plain").samples[0]
    assert plain.info.caption == "Make it a comic." and len(plain.info.references) == 1


def test_the_source_clip_lies_beside_the_edited_one_where_pairs_are_cut_out_of_it(tmp_path: Path) -> None:
    config = source(tmp_path / "root", [record()], []).model_copy(update={"source_clip": True, "source_frames": 0})
    (sample,) = made(config, tmp_path / "survey")
    assert sample.info.source_clip == "source.mp4" and not sample.info.subjects and not sample.info.references
    assert bytes(sample.files["source.mp4"]) == (tmp_path / "root" / "videos" / "source" / "a.mp4").read_bytes()
    again = RawSample.from_members(sample.key, sample.members())
    assert again.info == sample.info and bytes(again.target) == bytes(sample.target)


def test_dirty_records_are_left_out_by_reason(tmp_path: Path) -> None:
    records = [
        record(), record("local/a_2.mp4", instruction=" "), record("local/lost.mp4"),
        record("local/a_2.mp4", source_path="source/b.mp4"), {"source_path": "x"}, record("../x.mp4"),
    ]  # fmt: skip
    config = source(tmp_path / "root", records, [{"path": "z.mp4", "caption": "Z"}])
    result = made(config, tmp_path / "survey")
    assert result.tally.counts == {"empty instruction": 1, "unknown form": 1}
    assert reasons(result.bad) == ["missing clip", "missing source clip", "unsafe name"]
    assert result.samples[0].info.caption == "Make it a comic."
    assert result.notes.counts == {"source clips without a caption": 1}


def test_archives_that_are_not_extracted_are_one_message(tmp_path: Path) -> None:
    config = source(tmp_path / "root", [record()], [])
    videos = tmp_path / "root" / "videos" / "global_freeform1"
    videos.mkdir()
    for letters in ("aa", "ab", "ad"):
        (videos / f"global_freeform1.tar.gz.{letters}").write_bytes(b"x")
    with pytest.raises(DataError, match=r"split archive global_freeform1.tar.gz the pieces ac are missing"):
        made(config, tmp_path / "survey")
    (videos / "global_freeform1.tar.gz.ac").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cat global_freeform1.tar.gz\* \| tar -xz"):
        made(config, tmp_path / "survey")
