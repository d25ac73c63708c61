"""Echo-4o-Image. Run: python -m pytest tests/pipelines/corpora/test_echo_4o.py"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built import grey, jpeg, made, reasons
from sources.echo_4o import TEXT, jsonl, record

from domainshuttle.pipelines.corpora.echo_4o import Echo4oConfig, named_subjects
from domainshuttle.pipelines.errors import DataError


def test_pictures_are_found_by_the_end_of_their_paths(tmp_path: Path) -> None:
    (sample,) = made(jsonl(tmp_path / "root", [record()]), tmp_path / "survey")
    assert [grey(sample.target), grey(sample.files["ref0.jpg"]), grey(sample.files["ref1.jpg"])] == [90, 10, 20]
    assert [(one.id, one.word) for one in sample.info.subjects] == [(0, "white cat"), (1, "tree")]
    assert sample.info.caption == TEXT


def test_rows_of_parquet_have_the_target_last(tmp_path: Path) -> None:
    rows = [{"image_list": [jpeg(10), jpeg(20), jpeg(90)], "instruction_list": [TEXT]},
            {"image_list": [jpeg(30)], "instruction_list": ["x"]},
            {"image_list": [jpeg(40), b"no picture"], "instruction_list": ["x"]},
            {"image_list": [jpeg(50), jpeg(60)], "instruction_list": [" "]},
            {"image_list": [jpeg(70), jpeg(80)], "instruction_list": ["A dog runs."]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part.parquet", row_group_size=2)
    result = made(Echo4oConfig(folder=str(tmp_path)), tmp_path / "survey")
    first, last = result
    assert [grey(first.target), grey(first.files["ref0.jpg"]), grey(first.files["ref1.jpg"])] == [90, 10, 20]
    assert grey(last.target) == 80 and [one.word for one in last.info.subjects] == ["subject"]
    assert reasons(result.bad) == ["unknown form", "unreadable picture"]
    assert result.tally.counts == {"empty instruction": 1}


def test_records_of_other_parts_and_dirty_ones_are_counted(tmp_path: Path) -> None:
    plain = {"task_type": "t2i", "instruction": "A cat.", "output_image": "/x/00000.jpg", "type": "T1"}
    records = [
        record(), plain, record(instruction=""), record(output_image="x/lost.jpg"),
        record(input_images=["../../etc/x.jpg"], output_image="00009.jpg"), {"image": "x"}, record(input_images="a"),
    ]  # fmt: skip
    config = jsonl(tmp_path / "root", records)
    result = made(config, tmp_path / "survey")
    assert result.tally.counts == {"no references": 1, "empty instruction": 1, "unknown form": 2}
    assert reasons(result.bad) == ["missing picture", "unsafe name"]
    config = jsonl(tmp_path / "two", [record()])
    (other := tmp_path / "two" / "Multi-Reference-Image" / "images" / "other").mkdir()
    (other / "00002.jpg").write_bytes(jpeg(5))
    (bad,) = [one for one in made(config, tmp_path / "again").bad if one.reason.startswith("ambiguous")]
    assert "00002.jpg may be" in bad.reason


def test_other_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="no column image_list, instruction_list: it has image"):
        made(Echo4oConfig(folder=str(tmp_path)), tmp_path / "survey")


def test_words_of_pictures() -> None:
    assert named_subjects("The man in image 2 waves to the old dog of figure 1.", 2) == ["old dog", "man"]
    assert named_subjects("Combine all of them.", 3) == ["subject"] * 3
    assert named_subjects("A car from the first image on the road in image 7.", 1) == ["car"]
