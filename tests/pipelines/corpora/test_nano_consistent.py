"""Nano-Consistent-150K. Run: python -m pytest tests/pipelines/corpora/test_nano_consistent.py"""

from pathlib import Path

import pytest
from built import grey, made, reasons
from sources.nano_consistent import record, source

from domainshuttle.pipelines.corpora.nano_consistent import NanoConsistentConfig
from domainshuttle.pipelines.errors import DataError


def test_other_outputs_of_a_portrait_are_references_of_its_person(tmp_path: Path) -> None:
    records = [record(person, variant) for variant in ("sit", "run", "long_hair") for person in ("A_1", "B_1")]
    config = source(tmp_path / "root", records)
    result = made(config, tmp_path / "survey")
    assert len(result.samples) == 6 and not result.bad
    for sample in result:
        greys = [grey(sample.target), *(grey(sample.files[f"ref{number}.jpg"]) for number in (0, 1))]
        person = 20 if greys[1] == 20 else 120
        assert greys[1] == person and greys[0] in range(person + 1, person + 4)
        assert greys[2] in range(person + 1, person + 4) and greys[2] != greys[0]
        assert [(one.subject, one.origin) for one in sample.info.references] == [(0, "photo"), (0, "edited")]
        assert [(one.word, one.domain) for one in sample.info.subjects] == [("person", 0)]
        assert sample.info.scores["caption_is_instruction"] == 1
    # also where `folder` is the inner one, and with more or none of the others
    inner = config.model_copy(update={"folder": str(tmp_path / "root" / "Nano-150k"), "other_outputs": 5})
    assert [len(one.info.references) for one in made(inner, tmp_path / "more")] == [3] * 6
    alone = config.model_copy(update={"other_outputs": 0})
    assert [len(one.info.references) for one in made(alone, tmp_path / "none")] == [1] * 6


def test_dirty_records_are_left_out_by_reason(tmp_path: Path) -> None:
    records = [
        record("A_1", "sit"),
        record("A_1", "run", instruction=""),
        record("A_1", "run", input_images=[]),
        record("C_1", "sit"),
        record("A_1", "long_hair", input_images="x.jpg"),
        {"category": "x"},
    ]
    result = made(source(tmp_path / "root", records), tmp_path / "survey")
    assert result.tally.counts == {"empty instruction": 1, "no input picture": 1, "unknown form": 2}
    assert reasons(result.bad) == ["missing picture"] and len(result.samples) == 1
    assert "hairstyle_cleaned.jsonl at byte" in result.tally.examples["unknown form"][0]


def test_a_download_that_is_not_extracted_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "Nano-150k.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"run `tar -xf Nano-150k.tar.gz`"):
        made(NanoConsistentConfig(folder=str(tmp_path)), tmp_path / "survey")
