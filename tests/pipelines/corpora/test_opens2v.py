"""OpenS2V-5M. Run: python -m pytest tests/pipelines/corpora/test_opens2v.py

The records in ../shared/media are real; where they are absent, those tests are skipped. The made ones are in the same
form.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import MEDIA, made
from sources.opens2v import clip, entry, source

from domainshuttle.pipelines.corpora.opens2v import OpenS2VConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import decode_image, decode_video, encode_jpeg

NEXUS = MEDIA / "opens2v_nexus" / "data_process" / "demo_result"
OLDER = MEDIA / "opens2v_nexus_2025-05" / "data_process" / "demo_result"
real = pytest.mark.skipif(not NEXUS.is_dir(), reason="needs ../shared/media")
CUT = {"jsons": "step5/merge_final_json/*.json", "videos": "step0/videos/{part}/{path}"}


@real
def test_the_real_records_have_the_golden_subjects(tmp_path: Path) -> None:
    result = made(OpenS2VConfig(folder=str(NEXUS), **CUT), tmp_path)
    assert not result.bad and not result.tally.counts
    subjects = [[subject.word for subject in sample.info.subjects] for sample in result]
    assert subjects == [["person", "green grass", "grassy area"], *[["person", "park", "grassy area"]] * 2]
    assert result.notes.counts["masks of a subject that had one"] == 4 + 2 + 2
    for sample in result:
        assert [subject.domain for subject in sample.info.subjects] == [0, 3, 3]
        assert (sample.info.frames, sample.info.size, len(sample.info.references)) == (95, (720, 1280), 3)
        # all of the clip is wanted, so its bytes are kept
        part = next(folder for folder in ("dataset1_cluster", "dataset1") if sample.key.startswith(f"{folder}_"))
        assert bytes(sample.target) == (NEXUS / f"step0/videos/{part}/gm1252760410-365677148_part2.mp4").read_bytes()
        assert sample.info.caption.startswith("The video features three individuals")


@real
def test_the_real_pairs_give_second_pictures(tmp_path: Path) -> None:
    merged, folder = "step6/cross-frames-pairs/cross_frames_pairs.json", "step6/cross-frames-pairs/final_output"
    background = "step5/final_output/{part}/foreground/{key}.png"
    one = made(OpenS2VConfig(folder=str(NEXUS), pairs=merged, backgrounds=background, **CUT), tmp_path / "merged")
    other = made(OpenS2VConfig(folder=str(NEXUS), pairs=folder, backgrounds=background, **CUT), tmp_path / "folder")
    assert [sample.members() for sample in one] == [sample.members() for sample in other]
    assert not one.bad
    for sample in one:
        origins = [(reference.subject, reference.origin) for reference in sample.info.references]
        assert origins == [(0, "same_clip"), (0, "other_clip"), (1, "same_clip"), (1, "other_clip"),
                           (2, "same_clip"), (2, "other_clip"), (1, "edited")]  # fmt: skip
        # the partner's picture of the person is of the same person
        own, partner = (decode_image(sample.files[f"ref{number}.jpg"]) for number in (0, 1))
        assert np.abs(np.array(own.shape) - partner.shape).max() < 20


@real
def test_records_of_may_2025_have_pictures_by_gpt_image(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "jsons").symlink_to(OLDER / "step5" / "merge_final_json")
    (root / "step0").symlink_to(NEXUS / "step0")
    (root / "frames").symlink_to(NEXUS / "step6" / "gpt-frames-pairs")
    config = OpenS2VConfig(folder=str(root), jsons="jsons/*.json", videos=CUT["videos"], frames="frames/{key}")
    (sample,) = made(config, tmp_path / "survey").samples
    edited = [one for one in sample.info.references if one.origin == "edited"]
    words = [sample.info.subjects[one.subject].word for one in edited]
    assert len(edited) >= 2 and "grassy area" in words
    assert sample.files[edited[0].file] == (root / "frames" / sample_key(root) / "0_woman.png").read_bytes()


def sample_key(root: Path) -> str:
    return next(iter(json.loads((root / "jsons" / "dataset1.json").read_text())))


def test_a_clip_is_cut_in_time_and_in_its_frames(tmp_path: Path) -> None:
    result = made(source(tmp_path / "root", {"a_part1": entry()}), tmp_path / "survey")
    (sample,) = result
    assert (sample.info.frames, sample.info.size, sample.info.fps) == (9, (64, 96), 8.0)
    pixels = decode_video(sample.target, 9).astype(int)
    assert np.abs(pixels - clip()[2:11, 4:68, 8:104]).mean() < 3
    person, dog = (decode_image(sample.files[f"ref{number}.jpg"]).astype(int) for number in (0, 1))
    assert person.shape == (40, 40, 3) and dog.shape == (34, 46, 3)
    assert np.abs(person - clip()[2, 4:44, 8:48]).mean() < 4
    assert [subject.domain for subject in sample.info.subjects] == [0, 1]


def test_dirty_entries_are_left_out_by_reason(tmp_path: Path) -> None:
    def broken(change: Any) -> dict[str, Any]:
        change(content := copy.deepcopy(entry()))
        return content

    entries = {
        "good": entry(),
        "mute": entry(face_cap_qwen=" "),
        "short": entry(face_cut=[0, 40], crop=[0, 112, 0, 72]),
        "lost": entry(path="b.mp4"),
        "outside": entry(path="../../x.mp4"),
        "backwards": entry(face_cut=[9, 3]),
        "unframed": broken(lambda one: one["annotation"]["mask_annotation"].clear()),
        "plain": broken(lambda one: one["annotation"]["ann_frame_data"]["annotations"].clear()),
        "torn": broken(lambda one: one["annotation"]["mask_annotation"]["2"]["1"].update(counts="#" * 9)),
    }
    result = made(source(tmp_path / "root", entries), tmp_path / "survey")
    assert result.tally.counts == {"empty caption": 1, "bad cut": 1, "no mask": 1, "no subject": 1}
    assert {one.id: one.reason.partition(":")[0] for one in result.bad} == {
        "total_part1/short": "short clip",
        "total_part1/lost": "missing clip",
        "total_part1/outside": "unsafe name",
    }
    kept = {sample.key: [subject.word for subject in sample.info.subjects] for sample in result}
    assert [*kept.values()] == [["person", "dog"], ["dog"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.pop("metadata"),
        lambda one: one["metadata"].update(face_cut="2-11"),
        lambda one: one["metadata"].update(crop=[1, 2, 3]),
        lambda one: one["metadata"].pop("path"),
        lambda one: one["annotation"]["ann_frame_data"].update(box_format="xywh"),
        lambda one: one["annotation"]["mask_map"]["1"].update(class_name="cat"),
        lambda one: one["annotation"]["mask_annotation"]["2"]["2"].update(counts=[5, 7]),
        lambda one: one.update(annotation=[]),
    ],
)
def test_other_forms_name_the_record(tmp_path: Path, change: Any) -> None:
    change(odd := entry())
    result = made(source(tmp_path / "root", {"odd_part1": odd}), tmp_path / "survey")
    assert result.tally.counts == {"unknown form": 1} and not result.samples
    assert "total_part1/odd_part1" in result.tally.examples["unknown form"][0]


def test_pictures_of_wrong_folders_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        made(OpenS2VConfig(folder=str(tmp_path / "nothing")), tmp_path / "a")
    config = source(tmp_path / "root", {"a_part1": entry()})
    with pytest.raises(DataError, match=r"gpt is missing"):
        made(OpenS2VConfig(folder=config.folder, frames="gpt/{key}"), tmp_path / "b")
    with pytest.raises(DataError, match="`pairs` names"):
        made(OpenS2VConfig(folder=config.folder, pairs="pairs.json"), tmp_path / "c")
    videos = tmp_path / "root" / "Videos" / "total_part1"
    (videos / "deep" / "a.mp4").unlink()
    (videos / "a.mp4").write_bytes(encode_jpeg(clip()[0]))
    (bad,) = made(config, tmp_path / "d").bad
    assert bad.reason.startswith("unreadable clip")


def test_a_part_that_is_not_extracted_is_one_message_with_the_piece_that_is_missing(tmp_path: Path) -> None:
    config = source(tmp_path / "root", {"a_part1": entry()})
    part = tmp_path / "root" / "Videos" / "total_part2"
    part.mkdir()
    for number in (0, 1, 3):
        (part / f"total_part2.tar.split.00{number}").write_bytes(b"x")
    with pytest.raises(DataError, match=r"of the split archive total_part2\.tar\.split the pieces 002 are"):
        made(config, tmp_path / "survey")
    (part / "total_part2.tar.split.002").write_bytes(b"x")
    with pytest.raises(DataError, match=r"run `cat total_part2\.tar\.split\* \| tar -x` in it"):
        made(config, tmp_path / "survey")
    (part / "b.mp4").write_bytes(b"x")  # extracted, and the archives are still there
    assert len(made(config, tmp_path / "survey").samples) == 1
