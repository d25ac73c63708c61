"""The frame that builds corpora. Run: python -m pytest tests/pipelines/corpora/test_builder.py"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import made
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import CODECS, TURNED, Traits, clip, scene
from sources import phantom_data
from sources.every import A_CAPTION, EVERY

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora import builder
from domainshuttle.pipelines.corpora.builder import REPORT_NAME, build_corpus
from domainshuttle.pipelines.corpora.source import draw
from domainshuttle.pipelines.corpora.uno import UnoConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.media.decode import encode_jpeg

BUCKETS = [parse_bucket("1x32x32")]


def folder_of(root: Path, pairs: int, splits: int = 3) -> Path:
    """A source of UNO's form: of every tenth record the score is low, and of one the picture is missing."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "images" / "a.jpg").write_bytes(encode_jpeg(np.full((40, 40, 3), 9, np.uint8)))
    for number in range(pairs):
        (root / "images" / f"{number}.jpg").write_bytes(encode_jpeg(np.full((40, 40, 3), number, np.uint8)))
    (root / "images" / "5.jpg").unlink()
    records = [
        {"img_path1": "a.jpg", "img_path2": f"{number}.jpg",
         "caption": {"img_path1": "a", "img_path2": f"thing {number}", "subject": ["thing"]},
         "vlm_filter_cot": {"score_final": 2.0 if number % 10 == 9 else 4.0}}
        for number in range(pairs)
    ]  # fmt: skip
    for split in range(splits):
        (root / "labels" / f"split{split}.json").write_text(json.dumps(records[split::splits]))
    return root


def silent(done: int, total: int) -> None: ...


def build(root: Path, folder: Path, told: Any = silent, **changes: Any) -> dict[str, Any]:
    config = UnoConfig(folder=str(root), **changes)
    return build_corpus("mine", config, BUCKETS, folder, told, samples_per_part=8, most_bad=0.2).report


def contents(folder: Path) -> dict[str, bytes]:
    """What a corpus is, but for the report's folder name, which is where its source lies."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


@pytest.mark.usefixtures("ray_cluster")
def test_a_build_that_was_stopped_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    root, told = folder_of(tmp_path / "root", 40), []
    report = build(root, tmp_path / "whole", lambda *numbers: told.append(numbers), samples=30, seed=3)
    assert told[0] == (0, 30) and told[-1] == (30, 30)
    assert report["records"] == 40 and report["left_out"] == {"low score": 4} and report["not_drawn"] == 6
    assert report["samples"] + report["in_quarantine"] == report["selected"] == 30
    assert len(report["examples"]["low score"]) == 4
    whole = contents(tmp_path / "whole")
    assert json.loads(whole[REPORT_NAME]) == report

    build(root, tmp_path / "stopped", samples=30, seed=3)
    work = tmp_path / "stopped" / ".parts"
    kept = (tmp_path / "stopped" / "part-000000-000000.tar").stat().st_mtime_ns
    for lost in ("part-000001.done", "part-000003.done"):  # as where it was killed while it made these
        (work / lost).unlink()
    (tmp_path / "stopped" / "part-000001-000000.tar").unlink()
    (tmp_path / "stopped" / "part-000003-000000.tar").write_bytes(b"torn")
    (tmp_path / "stopped" / ".part-000003-000000.tar.x-0.partial").write_bytes(b"half")
    for survey in work.glob("survey-*"):
        (survey / "piece-000001.json").unlink()
    (tmp_path / "stopped" / "index.parquet").unlink()
    build(root, tmp_path / "stopped", silent, samples=30, seed=3)
    assert contents(tmp_path / "stopped") == whole
    assert (tmp_path / "stopped" / "part-000000-000000.tar").stat().st_mtime_ns == kept
    assert not list((tmp_path / "stopped").glob(".*.partial"))


@pytest.mark.usefixtures("ray_cluster")
def test_what_can_not_be_built_is_one_message(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "root", 12)
    report = build(root, tmp_path / "corpus")
    (bad,) = [json.loads(line) for line in (tmp_path / "corpus" / "quarantine.jsonl").read_text().splitlines()]
    assert bad["reason"].startswith("missing picture: 5.jpg") and report["in_quarantine"] == 1
    # a changed source is another corpus
    (root / "labels" / "split1.json").write_text("[]")
    assert build(root, tmp_path / "corpus")["records"] == 8
    assert len(Index.load(tmp_path / "corpus" / "index.parquet")) == report["samples"] - 4
    for path in (root / "labels").iterdir():
        path.write_text(json.dumps([one for one in json.loads(path.read_text()) if one["img_path2"] == "9.jpg"]))
    with pytest.raises(DataError, match=r"nothing to select: low score 1"):
        build(root, tmp_path / "none")
    (root / "labels" / "split1.json").write_text(json.dumps([{"other": 1}] * 3))
    with pytest.raises(DataError, match=r"no known form of this source, for example: labels/split1.json at byte 1"):
        build(root, tmp_path / "odd")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 36))
def test_the_selection_is_of_seed_and_names_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, wanted: int
) -> None:
    """However the records are spread over files and in whatever order: those with the least draws."""
    folder = tmp_path_factory.mktemp("sources")
    chosen = []
    for splits in (1, 4):
        root = folder_of(folder / str(splits), 40, splits)
        config = UnoConfig(folder=str(root), samples=wanted, seed=seed)
        chosen.append({record.id for record in made(config, folder / f"survey{splits}").records})
    names = [f"a.jpg+{number}.jpg" for number in range(40) if number % 10 != 9]
    expected = sorted(names, key=lambda name: draw(seed, name))[:wanted]
    assert chosen[0] == chosen[1] == set(expected)


def test_draws_are_even() -> None:
    """Of a thousand seeds, each of ten names is the first about as often."""
    first = Counter(min("abcdefghij", key=lambda name: draw(seed, name)) for seed in range(1000))
    assert min(first.values()) > 60 and max(first.values()) < 145


def test_what_is_done_to_pixels_that_are_cut_out_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference cut out of a clip is a picture of its own: that its clip was turned is not seen later."""
    monkeypatch.setattr(builder, "each_result", lambda function, work: ((one, function(*one)) for one in work))
    config = EVERY["phantom-data"](tmp_path / "root", A_CAPTION)
    frames = np.stack([scene(number, 48, 64) for number in range(10)])
    turned = clip(CODECS[0], Traits(orientation=TURNED, matrix=1, full=False), frames)
    (tmp_path / "root" / "videos" / f"{phantom_data.B}.mp4").write_bytes(turned)
    buckets = [parse_bucket("5x16x16")]
    report = build_corpus("mine", config, buckets, tmp_path / "built", silent, samples_per_part=1).report
    assert report["samples"] == 2 and report["notes"]["cut out, turned or mirrored"] == 2
