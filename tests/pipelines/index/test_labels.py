"""Labels beside shards, and the index that names them. Run: python -m pytest tests/pipelines/index/test_labels.py"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from label_corpora import raw_sample, rows_of, write_corpus

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.folder import BUILT_INDEX_NAME, list_folder
from domainshuttle.pipelines.index.labels import (
    built_index,
    labelled_row,
    put_labels,
    read_label_notes,
    remove_other_labels,
    write_label_note,
)
from domainshuttle.pipelines.index.samples import read_info, read_raw_sample, read_verified_sample
from domainshuttle.pipelines.index.table import Index, read_metadata
from domainshuttle.pipelines.index.verify import _verify_shard
from domainshuttle.pipelines.sample import LABELS_MEMBER, Label, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import Member, ShardWriter, shard_of


def relabelled(info: SampleInfo, caption: str) -> SampleInfo:
    subjects = [*info.subjects, Subject(id=len(info.subjects), word="hat", domain=2)]
    label = Label(by="endpoint", state="labelled", model="m", prompt="p", answer="a")
    return info.model_copy(
        update={"caption": caption, "subjects": subjects, "scores": {"new": 1.5}, "labels": {"caption": label}}
    )


def put(folder: Path, chosen: list[int], name: str = "unit", settings: str = "s") -> dict[str, SampleInfo]:
    """Labels for some samples of a corpus, in its index; returns what they say now."""
    built = built_index(folder)
    rows, said = built.rows(chosen), {}
    with ShardWriter(folder / "labels", name, 1 << 20) as writer:
        for row in rows:
            said[row.key] = relabelled(read_info(row), f"A caption of {row.key}")
            writer.write(row.key, {LABELS_MEMBER: said[row.key].to_json()})
    made = []
    for row, entry in zip(rows, writer.entries, strict=True):
        (own,) = entry.members
        member = Member(LABELS_MEMBER, own.offset, own.size, f"labels/{entry.shard}")
        made.append((row, labelled_row(row, said[row.key], member), {}))
    write_label_note(folder, name, settings, made, {"caption": len(made)}, [])
    metadata, count = put_labels(folder, built, read_label_notes(folder).values(), settings)
    assert metadata.labels == settings and count >= len(chosen)
    return said


def faults(folder: Path) -> list[str]:
    """What verifying the corpus finds, with every sample decoded."""
    index = Index.load(folder / "index.parquet")
    found = []
    for shard in index.codes("shard")[1]:
        numbers = [n for n, row in enumerate(rows_of(folder)) if row.shard == shard]
        table = index.table.take(numbers)
        bad, _ = _verify_shard(table, index.parts[0], str(folder), np.ones(len(numbers), bool), True)
        found += [one.reason for one in bad]
    return found


@given(st.sets(st.integers(0, 11), min_size=1), st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_who_reads_by_the_index_has_the_labels_and_the_shards_stay(
    tmp_path_factory: pytest.TempPathFactory, chosen: set[int], order: random.Random
) -> None:
    folder = write_corpus(tmp_path_factory.mktemp("raw"), map(raw_sample, range(12)))
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    unlabelled = {row.key: read_raw_sample(row) for row in rows_of(folder)}
    said = put(folder, order.sample(sorted(chosen), len(chosen)))
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before
    for number, row in enumerate(rows_of(folder)):
        sample, _ = read_verified_sample(row)
        plain = unlabelled[row.key]
        assert sample.info == read_info(row) == said.get(row.key, plain.info)
        assert {name: bytes(data) for name, data in sample.files.items()} == plain.files
        assert (number in chosen) == (row.key in said) == any(member.shard for member in row.members)
        assert row.domains == tuple(one.domain for one in sample.info.subjects)
        assert row.caption_length == len(sample.info.caption) and row.scores == sample.info.scores
    assert faults(folder) == []
    assert not list_folder(folder).skipped  # labels are ours


def test_the_index_without_labels_is_kept_and_comes_back(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(6)))
    first = Index.load(folder / "index.parquet")
    put(folder, [0, 3])
    assert read_metadata(folder / "index.parquet").labels == "s"
    again = built_index(folder)
    assert again.digest == first.digest and again.rows(range(6)) == first.rows(range(6))
    (folder / BUILT_INDEX_NAME).unlink()
    with pytest.raises(DataError, match=r"built\.parquet, the index without them, is missing"):
        built_index(folder)


def test_a_sample_that_changed_does_not_take_its_old_label(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(4)))
    put(folder, [0, 1, 2, 3])
    for path in folder.glob("*.tar"):
        path.unlink()
    write_corpus(folder, [raw_sample(0), raw_sample(1, "another command"), raw_sample(3)])
    _, count = put_labels(folder, built_index(folder), read_label_notes(folder).values(), "s")
    assert count == 2
    captions = {row.key: read_info(row).caption for row in rows_of(folder)}
    assert captions == {"s0": "A caption of s0", "s1": "another command", "s3": "A caption of s3"}


def test_damage_of_labels_is_seen(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(3)))
    put(folder, [1])
    (shard,) = (folder / "labels").glob("*.tar")
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"A caption of s1", b"B caption of s1"))
    assert [reason.partition(":")[0] for reason in faults(folder)] == ["checksum differs"]
    shard.write_bytes(whole[:700])
    assert [reason.partition(":")[0] for reason in faults(folder)] == ["outside shard"]
    assert read_label_notes(folder) == {}  # what is cut short counts for nothing
    shard.unlink()
    assert [reason.partition(":")[0] for reason in faults(folder)] == ["outside shard"]


def test_labels_of_other_units_are_removed_and_those_that_hold_stay(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(4)))
    put(folder, [0], "old")
    put(folder, [0, 2], "new")
    keep = {name: note for name, note in read_label_notes(folder).items() if name == "new"}
    put_labels(folder, built_index(folder), keep.values(), "s")
    remove_other_labels(folder, keep)
    assert [path.name for path in sorted((folder / "labels").glob("*.tar"))] == ["new-000000.tar"]
    assert faults(folder) == []


@pytest.mark.parametrize(
    "shard", ["../x.tar", "/labels/x.tar", "labels/../x.tar", "other/x.tar", "labels/x", "labels/"]
)
def test_a_member_leads_nowhere_else(shard: str) -> None:
    member = Member("json", 0, 1, shard)
    assert Member.of(member.name, 0, 1) == member
    with pytest.raises(DataError, match="shard name"):
        shard_of("own-000000.tar", member)
    assert replace(member, shard="").name == "json"
