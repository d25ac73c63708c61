"""MUSAR-Gen. Run: python -m pytest tests/pipelines/corpora/test_musar_gen.py"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built import grey, made, reasons
from sources.musar_gen import FIXED, row, source

from domainshuttle.pipelines.corpora.musar_gen import MusarGenConfig
from domainshuttle.pipelines.errors import DataError


def test_rows_become_pictures_with_two_references(tmp_path: Path) -> None:
    config = source(tmp_path / "root", [row(30 * number) for number in range(5)])
    result = made(config, tmp_path / "survey")
    assert [grey(sample.target) for sample in result] == [2, 32, 62, 92, 122]
    for sample in result:
        shade = grey(sample.target) - 2
        assert [grey(sample.files[f"ref{number}.jpg"]) for number in (0, 1)] == [shade, shade + 1]
        assert sample.info.caption == f"In the garden scene, the teapot and the chair are placed together {shade}."
        assert [(one.word, one.domain) for one in sample.info.subjects] == [("teapot", 1), ("chair", 1)]
        assert sample.info.size == (60, 56)
    some = made(config.model_copy(update={"samples": 2, "seed": 5}), tmp_path / "some")
    assert len(some.samples) == 2 and {one.key for one in some} < {one.key for one in result}


def test_dirty_rows_are_left_out_by_reason(tmp_path: Path) -> None:
    rows = [row(10), row(20, prompt=FIXED), row(30, cond_prompt_0=None), row(40, tgt_img={"bytes": b"x", "path": None}),
            row(50, cond_img_1=None)]  # fmt: skip
    result = made(source(tmp_path / "root", rows), tmp_path / "survey")
    assert result.tally.counts == {"empty caption": 1, "unknown form": 1}
    assert reasons(result.bad) == ["unknown form", "unreadable picture"]
    assert [grey(sample.target) for sample in result] == [12]


def test_wrong_files_are_one_message(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column cond_img_0"):
        made(MusarGenConfig(folder=str(tmp_path)), tmp_path / "survey")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a.parquet is no whole Parquet file"):
        made(MusarGenConfig(folder=str(tmp_path)), tmp_path / "survey")
