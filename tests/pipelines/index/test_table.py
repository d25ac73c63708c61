"""The index: round trip, digest, faults, filters. Run: pytest tests/pipelines/index/test_table.py"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index import table as index_module
from domainshuttle.pipelines.index.table import SCHEMA, Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import ORIGINS, Reference, SampleInfo, Subject, sample_id
from domainshuttle.pipelines.shards.tar import Member, ShardEntry, ShardWriter, read_members, sample_checksum

RAW = IndexMetadata(corpus="sprites", stage="raw")
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def rows(draw: st.DrawFn) -> list[IndexRow]:
    made = []
    for number in range(draw(st.integers(1, 12))):
        subjects = draw(st.lists(st.text(max_size=5), max_size=4))
        references = draw(st.lists(st.integers(0, len(subjects) - 1), max_size=5)) if subjects else []
        source, key = draw(st.sampled_from(["uno", "phantom"])), f"k{number}"
        made.append(
            IndexRow(
                source=source,
                shard=draw(st.sampled_from(["a-0.tar", "a-1.tar"])),
                key=key,
                sample_id=sample_id(source, key),
                members=tuple(
                    draw(st.lists(st.builds(Member, st.just("jpg"), st.integers(0, 2**40), st.integers(0, 99))))
                ),
                kind=draw(st.sampled_from(["image", "video"])),
                frames=draw(st.integers(1, 200)),
                height=draw(st.integers(1, 4000)),
                width=draw(st.integers(1, 4000)),
                fps=draw(st.none() | st.floats(1, 100)),
                bucket=draw(st.sampled_from(["1x64x64", "5x64x96"])),
                subjects=tuple(subjects),
                domains=tuple(draw(st.integers(-1, 4)) for _ in subjects),
                reference_subjects=tuple(references),
                reference_origins=tuple(draw(st.sampled_from(ORIGINS)) for _ in references),
                caption_length=draw(st.integers(0, 5000)),
                scores=draw(st.dictionaries(st.sampled_from(["aesthetic", "motion"]), FINITE)),
                checksum=draw(st.integers(0, 2**64 - 1)),
                text_tokens=draw(st.integers(0, 512)),
                caption_tokens=draw(st.integers(0, 9000)),
            )
        )
    return made


def make_row(number: int, **changes: object) -> IndexRow:
    info = SampleInfo(
        caption="x" * number,
        source="uno" if number % 2 else "musar",
        kind="video",
        fps=10,
        frames=1 + 4 * number,
        size=(64, 64),
        subjects=[Subject(id=n, word=("cat", "man")[n], domain=n) for n in range(1 + number % 2)],
        references=[
            Reference(file=f"ref{n}.jpg", subject=n % (1 + number % 2), origin="photo", size=(8, 8))
            for n in range(number % 4)
        ],
        scores={"aesthetic": number / 2} if number != 3 else {},
    )
    entry = ShardEntry("part-000000.tar", f"k{number}", (Member("json", 512 * number, 5),), number)
    return replace(IndexRow.of(entry, info, "5x64x64", number % 4), **changes)


def make_index(folder: Path, count: int = 10, metadata: IndexMetadata = RAW, **changes: object) -> Index:
    path = folder / metadata.corpus / "index.parquet"
    write_index(path, [make_row(number, **changes) for number in range(count)], metadata)
    return Index.load(path)


@settings(max_examples=40, deadline=None)
@given(rows())
def test_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, made: list[IndexRow]) -> None:
    folder = tmp_path_factory.mktemp("index")
    written = write_index(folder / "index.parquet", iter(made), RAW)
    index = Index.load(folder / "index.parquet")
    expected = [replace(row, corpus="sprites", folder=str(folder)) for row in made]
    assert index.rows(range(len(made))) == expected
    assert index.row(len(made) - 1) == expected[-1]
    assert index.rows([0, len(made) - 1, 0]) == [expected[0], expected[-1], expected[0]]
    assert index.parts == (written,) and index.digest == written.digest
    np.testing.assert_array_equal(index.column("sample_id"), [row.sample_id for row in made])
    codes, names = index.codes("bucket")
    assert [names[code] for code in codes] == [row.bucket for row in made] and names == sorted(names)


def test_the_digest_is_of_the_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_row(number) for number in range(10)]
    digest = write_index(tmp_path / "a.parquet", made, RAW).digest
    # written again as a table, in other chunks, dictionaries, compression and row groups, and read from elsewhere
    table = Index.load(tmp_path / "a.parquet").table
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 1), table.slice(4)])
    again = write_index(tmp_path / "elsewhere" / "b.parquet", pieces, RAW)
    assert again.digest == digest == Index.load(tmp_path / "elsewhere" / "b.parquet").digest
    rewritten = pq.ParquetFile(tmp_path / "a.parquet")
    held = rewritten.read().replace_schema_metadata(rewritten.metadata.metadata)
    pq.write_table(held, tmp_path / "c.parquet", compression="none", row_group_size=2, use_dictionary=False)
    assert Index.load(tmp_path / "c.parquet").digest == digest
    # every column counts, and so do order, corpus and encoders
    others = [
        write_index(tmp_path / "d.parquet", made[::-1], RAW).digest,
        write_index(tmp_path / "d.parquet", made, IndexMetadata(corpus="other", stage="raw")).digest,
        write_index(tmp_path / "d.parquet", made, RAW.model_copy(update={"encoders": {"vae": "x"}})).digest,
    ]
    for change in (
        {"shard": "z-0.tar"}, {"key": "z"}, {"sample_id": 1}, {"members": (Member("json", 1, 5),)}, {"frames": 9},
        {"fps": None}, {"fps": 0.0}, {"bucket": "1x64x64"}, {"domains": (4,)}, {"scores": {"aesthetic": 9.0}},
        {"checksum": 77}, {"text_tokens": 99},
    ):  # fmt: skip
        others.append(write_index(tmp_path / "d.parquet", [replace(made[0], **change), *made[1:]], RAW).digest)
    others.append(write_index(tmp_path / "d.parquet", made, RAW.model_copy(update={"fps": 16.0})).digest)
    assert len({digest, *others}) == 17
    # blocks are an implementation's matter only as long as all are cut alike
    monkeypatch.setattr(index_module, "ROWS_PER_BLOCK", 4)
    blocked = write_index(tmp_path / "e.parquet", made, RAW).digest
    assert write_index(tmp_path / "e.parquet", pieces, RAW).digest == blocked
    assert pq.ParquetFile(tmp_path / "e.parquet").num_row_groups == 3


def test_an_index_made_while_writing_reads_the_samples(tmp_path: Path) -> None:
    info = SampleInfo(caption="a", source="uno", kind="image", frames=1, size=(9, 9), subjects=[], references=[])
    with ShardWriter(tmp_path, "part", 3000) as writer:
        for number in range(6):
            writer.write(f"k{number}", {"json": info.to_json(), "jpg": bytes([number]) * 500})
    write_index(tmp_path / "index.parquet", [IndexRow.of(entry, info, "1x16x16") for entry in writer.entries], RAW)
    index = Index.load(tmp_path / "index.parquet")
    for number, row in enumerate(index.rows(range(6))):
        members = read_members(row.folder, row.shard, row.members)
        assert members["jpg"] == bytes([number]) * 500
        assert sample_checksum(members) == row.checksum
        assert row.sample_id == sample_id("uno", f"k{number}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bucket": "5x64"}, "frames x height x width"),
        ({"domains": ()}, "subjects and domains differ"),
        ({"subjects": ("a",), "domains": (5,)}, "a domain outside"),
        ({"reference_subjects": (4,), "reference_origins": ("photo",)}, "reference to subject 4"),
        ({"reference_subjects": (0, 0), "reference_origins": ("photo",)}, "differ in length"),
        ({"sample_id": 3}, "come twice"),
        ({"shard": None}, "shard is missing"),
    ],
)
def test_wrong_rows_are_refused_and_the_old_index_stays(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    index = make_index(tmp_path)
    with pytest.raises(DataError, match=expected):
        make_index(tmp_path, **changes)
    folder = tmp_path / "sprites"
    assert [path.name for path in folder.iterdir()] == ["index.parquet"]
    assert Index.load(folder / "index.parquet").digest == index.digest


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        make_index(tmp_path, count=0)
    with pytest.raises(DataError, match="without"):
        write_index(tmp_path / "i.parquet", pa.table({"key": ["a"]}), RAW)


def test_files_that_are_no_whole_index_are_refused(tmp_path: Path) -> None:
    make_index(tmp_path)
    path = tmp_path / "sprites" / "index.parquet"
    data = path.read_bytes()
    with pytest.raises(DataError, match="can't be read"):
        Index.load(tmp_path / "missing.parquet")
    for cut in (0, 4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match="can't be read"):
            Index.load(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match="no index"):
        Index.load(path)
    write_index(path, [make_row(1)], RAW)
    table = pq.read_table(path)
    held = pq.ParquetFile(path).metadata.metadata
    column = table.column_names.index("caption_length")
    changed = table.set_column(column, "caption_length", pa.array([999], pa.int32())).replace_schema_metadata(held)
    pq.write_table(changed, path)
    with pytest.raises(DataError, match="not those it was written with"):
        Index.load(path)
    other = IndexMetadata(corpus="a", stage="raw", format_version=99).model_dump_json().encode()
    pq.write_table(table.replace_schema_metadata({**held, index_module.METADATA_KEY: other}), path)
    with pytest.raises(DataError, match="format version 99"):
        Index.load(path)


def test_a_flipped_bit_in_a_page_is_found_also_in_a_partial_load(tmp_path: Path) -> None:
    make_index(tmp_path, count=500)
    path = tmp_path / "sprites" / "index.parquet"
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(SCHEMA.names.index("sample_id"))
    start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    data[start + chunk.total_compressed_size - 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="can't be read"):
        Index.load(path, ["source", "bucket", "sample_id"])


def test_columns_can_be_left_out_and_are_named_when_missed(tmp_path: Path) -> None:
    whole = make_index(tmp_path)
    index = Index.load(tmp_path / "sprites" / "index.parquet", ["source", "bucket", "frames"])
    assert index.digest == whole.digest and len(index) == 10
    assert index.filter("frames > 20").digest == whole.filter("frames > 20").digest != whole.digest
    for use in (lambda: index.row(0), lambda: index.column("key"), lambda: index.filter("scores.q > 1"), index.summary):
        with pytest.raises(DataError, match=r"without|no column|not loaded"):
            use()
    with pytest.raises(DataError, match="different columns"):
        Index.concat([whole, index])


def test_several_corpora_in_one_index_keep_their_folders(tmp_path: Path) -> None:
    first = make_index(tmp_path, 4)
    second_path = tmp_path / "other" / "index.parquet"
    made = [replace(make_row(n), source="opens2v", sample_id=sample_id("opens2v", f"k{n}")) for n in range(3)]
    write_index(second_path, made, RAW.model_copy(update={"corpus": "other"}))
    second = Index.load(second_path)
    both = Index.concat([first, second])
    assert len(both) == 7
    assert both.rows([0, 4, 6]) == [first.row(0), second.row(0), second.row(2)]
    assert {row.folder for row in both.rows(range(7))} == {str(tmp_path / "sprites"), str(tmp_path / "other")}
    assert both.codes("source")[1] == ["musar", "opens2v", "uno"]
    assert both.digest == Index.concat([first, second]).digest != Index.concat([second, first]).digest
    assert Index.concat([first]) is first
    with pytest.raises(DataError, match="come twice"):
        Index.concat([first, first])
    for change in ({"stage": "encoded"}, {"encoders": {"vae": "other weights"}}):
        metadata = IndexMetadata(corpus="cache", stage="raw").model_copy(update=change)
        write_index(tmp_path / "x.parquet", made, metadata)
        with pytest.raises(DataError, match="differ in"):
            Index.concat([first, Index.load(tmp_path / "x.parquet")])
    with pytest.raises(DataError, match="at least one"):
        Index.concat([])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("frames > 20", lambda r: r.frames > 20),
        ("9 <= frames < 21", lambda r: 9 <= r.frames < 21),
        ("source == 'uno' and references >= 2", lambda r: r.source == "uno" and len(r.reference_subjects) >= 2),
        ("source in ('uno',) or key == 'k0'", lambda r: r.source == "uno" or r.key == "k0"),
        ("key not in ['k1', 'k2']", lambda r: r.key not in ("k1", "k2")),
        ("seconds >= 1.7", lambda r: r.frames / 10 >= 1.7),
        ("scores.aesthetic > 1", lambda r: r.scores.get("aesthetic", 0) > 1),
        ("scores['aesthetic'] / 2 + 1 > 2 * 1.2", lambda r: r.scores.get("aesthetic", 0) / 2 + 1 > 2.4),
        ("not scores.aesthetic > 1", lambda r: not r.scores.get("aesthetic", 9) > 1),
        ("'object' in domains", lambda r: 1 in r.domains),
        ("1 not in domains", lambda r: 1 not in r.domains),
        ("'man' in subjects and subject_count == 2", lambda r: "man" in r.subjects),
        ("'photo' in reference_origins", lambda r: len(r.reference_origins) > 0),
        ("height * width > -1", lambda r: True),
        ("height >= 64 and width < 100 and caption_length >= 4", lambda r: r.caption_length >= 4),
        ("text_tokens > 1 and text_tokens <= 512", lambda r: r.text_tokens > 1),
        ("references == 3 and 1.3 < seconds <= 3", lambda r: len(r.reference_subjects) == 3 and 13 < r.frames <= 30),
    ],
)
def test_filters(tmp_path: Path, text: str, kept: object) -> None:
    index = make_index(tmp_path)
    expected = [row for row in index.rows(range(10)) if kept(row)]  # type: ignore[operator]
    filtered = index.filter(text)
    assert filtered.rows(range(len(filtered))) == expected
    assert (filtered.digest == index.digest) == (len(expected) == 10)


def test_a_pyarrow_expression_filters_too(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    assert index.filter(pc.field("frames") > 20).digest == index.filter("frames > 20").digest


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch hacked')",
        "frames.__class__ == 1",
        "[frames for frames in (1,)]",
        "(lambda: 1)() == 1",
        "frames",
        "frame > 3",
        "scores.aesthetics > 3",
        "'robot' in domains",
        "frames > 'x'",
        "frames >",
        "frames is 3",
        "subjects == 'cat'",
        "not " * 5000 + "frames > 1",
        "",
    ],
)
def test_what_is_no_filter_is_refused_and_never_run(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="filter"):
        make_index(tmp_path).filter(text)


def test_rows_outside_are_errors(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    for number in (-1, 10):
        with pytest.raises(DataError, match="of an index of 10"):
            index.row(number)


def test_summary_counts(tmp_path: Path) -> None:
    summary = make_index(tmp_path).summary()
    assert summary["samples"] == 10 and summary["bytes"] == 50 and summary["corpora"] == ["sprites"]
    assert summary["source"] == {"musar": 5, "uno": 5}
    assert summary["references"] == {"0": 3, "1": 3, "2": 2, "3": 2}
    assert summary["domains"] == {"human": 10, "object": 5}
    assert summary["origins"] == {"photo": 13}
    assert summary["seconds"]["max"] == pytest.approx(3.7)
    assert summary["caption_length"]["median"] == 4.5
    assert summary["text_tokens"] == {"min": 0, "p05": 0, "median": 1, "p95": 3, "max": 3}
    assert summary["subjects"] == {"1": 5, "2": 5}
    # rows 1 and 9 have one picture of one of two subjects, 5 too; 3 and 7 have two of one and one of the other
    assert summary["single_picture_subjects"] == 5
    assert "text_tokens" not in make_index(tmp_path, text_tokens=0).summary()
