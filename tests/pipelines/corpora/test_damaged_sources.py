"""Damage to the files of every source. Run: python -m pytest tests/pipelines/corpora/test_damaged_sources.py (-m
nightly: with hundreds of seeds)"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import Made, made
from mutations import damage_one
from sources import ditto, opens2v, phantom_data, uno
from sources.every import A_CAPTION, EVERY

from domainshuttle.pipelines.errors import DataError

MEDIA = (".jpg", ".png", ".mp4")


def accounted(name: str, seeds: range, tmp_path: Path) -> None:
    """With damage in one of its files, a source still gives both samples, or says what it does not give and why: by a
    count, in the report, or as one message."""
    whole = tmp_path / "whole"
    config = EVERY[name](whole, A_CAPTION)
    for seed in seeds:
        random = np.random.default_rng([seed, len(name)])
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole, root)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        described = [path for path in files if path.suffix not in MEDIA]
        path = damage_one(described if described and random.random() < 0.8 else files, random)
        try:
            result = made(config.model_copy(update={"folder": str(root)}), tmp_path / f"survey-{seed}")
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, (seed, error)
            continue
        # a source without a record is an error of the build
        assert not result.records or len(result.samples) == 2 or said(result) or at_a_line(path, whole, root), seed


def said(result: Made) -> bool:
    return bool(result.tally.counts or result.bad or result.notes.counts)


def at_a_line(path: Path, whole: Path, root: Path) -> bool:
    """Whether what is lost of lines can't be seen: some, all of each, are not there."""
    before = (whole / path.relative_to(root)).read_bytes().splitlines()
    return set(path.read_bytes().splitlines()) <= {*before, b""}


@pytest.mark.parametrize("name", EVERY)
def test_what_damage_takes_is_accounted_for(tmp_path: Path, name: str) -> None:
    accounted(name, range(3), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("name", EVERY)
def test_what_much_damage_takes_is_accounted_for(tmp_path: Path, name: str) -> None:
    accounted(name, range(3, 300), tmp_path)


VAST = 10**400
HALF = "half of a pair: \ud83d"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("uno", uno.pair(0, caption={"img_path2": HALF, "subject": ["bread"]})),
        ("uno", uno.pair(0, caption={"img_path2": "x", "subject": [HALF]})),
        ("uno", uno.pair(0, vlm_filter_cot={"score_final": VAST})),
        ("uno", uno.pair(0, img_path1="split1/" + "a" * 300 + ".png")),
        ("opens2v", opens2v.entry(aesthetic=VAST)),
        ("opens2v", opens2v.entry(face_cut=[0, VAST])),
        ("opens2v", opens2v.entry(path="b" * 300 + ".mp4")),
        ("opens2v", opens2v.entry(crop=[8, VAST, 4, 68])),
        ("ditto", ditto.record(instruction=HALF)),
        ("ditto", ditto.record("local/" + "c" * 300 + ".mp4")),
        ("phantom-data", phantom_data.pair(bbox_loc=[[0, 0, VAST, 30]])),
        ("phantom-data", phantom_data.pair(frame_idx=VAST)),
        ("phantom-data", phantom_data.pair(scores=VAST)),
    ],
)
def test_values_that_no_file_should_have_are_left_out_by_reason(tmp_path: Path, name: str, record: Any) -> None:
    config = EVERY[name](tmp_path / "root", A_CAPTION)
    made(config, tmp_path / "good")
    if name == "uno":
        path = tmp_path / "root" / "labels" / "split1.json"
        path.write_text(json.dumps([uno.pair(1), record]))
    elif name == "opens2v":
        path = tmp_path / "root" / "Jsons" / "mask_and_bbox_High-Quality" / "total_part1.json"
        path.write_text(json.dumps({"good": opens2v.entry(), "odd": record}))
    elif name == "ditto":
        path = tmp_path / "root" / "training_metadata" / "global_style.json"
        path.write_text(json.dumps([ditto.record(), record]))
    else:
        rows = [(phantom_data.A, "A man.", {"a man": phantom_data.pair()}), (phantom_data.B, "B", {"a man": record})]
        shutil.rmtree(tmp_path / "root")
        phantom_data.source(tmp_path / "root", rows)
    result = made(config, tmp_path / "survey")
    assert len(result.samples) == 1 and (result.tally.counts.total() + len(result.bad)) == 1
