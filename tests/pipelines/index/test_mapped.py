"""The mapped index: the rows of the loaded one, a file a corpus and node, never trusted unless it is the one made.

Run: python -m pytest tests/pipelines/index/test_mapped.py
"""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index import mapped as module
from domainshuttle.pipelines.index.mapped import cache_folder, mapped_index
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.pipelines.sample import sample_id
from domainshuttle.pipelines.shards.tar import Member

PROGRAM = """
import sys
from pathlib import Path
from domainshuttle.pipelines.index.mapped import mapped_index
from domainshuttle.pipelines.index.spec import CorpusShare
"""


def make_row(corpus: str, number: int) -> IndexRow:
    """A row of which every column says something, with lists of 0 to 3."""
    subjects = tuple(f"{corpus}{n}" for n in range(number % 4))
    references = tuple(n % len(subjects) for n in range(number % 5)) if subjects else ()
    return IndexRow(
        source=f"{corpus}-{number % 3}",
        shard=f"{corpus}-{number // 7}.tar",
        key=f"k{number}",
        sample_id=sample_id(corpus, f"k{number}"),
        members=tuple(Member(name, 512 * number, number) for name in ("json", "jpg", "ref0.jpg")[: 1 + number % 3]),
        kind="video" if number % 2 else "image",
        frames=1 + number,
        height=32,
        width=48,
        fps=number / 2 if number % 2 else None,
        bucket="5x32x32" if number % 2 else "1x32x32",
        subjects=subjects,
        domains=tuple(n % 5 for n in range(len(subjects))),
        reference_subjects=references,
        reference_origins=tuple("photo" for _ in references),
        caption_length=number,
        scores={"aesthetic": number / 3} if number % 4 else {},
        checksum=2**64 - 1 - number,
        text_tokens=number % 512,
    )


def write(folder: Path, corpus: str, count: int, rows_per_group: int = 65536, **metadata: object) -> str:
    path = folder / corpus / "index.parquet"
    described = IndexMetadata.model_validate({"corpus": corpus, "stage": "raw", **metadata})
    write_index(path, [make_row(corpus, number) for number in range(count)], described)
    if rows_per_group < count:
        held = pq.ParquetFile(path)
        table = held.read().replace_schema_metadata(held.metadata.metadata)
        pq.write_table(table, path, row_group_size=rows_per_group)
    return str(path)


def loaded(paths: list[str]) -> Index:
    return Index.concat([Index.load(path, verify=False) for path in paths])


def shares_of(
    paths: Sequence[str | Path], where: Sequence[str | None] = (), weights: float | None = None
) -> tuple[CorpusShare, ...]:
    filters = where or [None] * len(paths)
    return tuple(
        CorpusShare(Path(path).parent.name, str(path), weights, one) for path, one in zip(paths, filters, strict=True)
    )


def files(folder: Path, pattern: str = "*.arrow") -> list[Path]:
    return sorted(folder.glob(pattern))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache"


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    group=st.integers(1, 12),
    batch=st.integers(1, 20),
    data=st.data(),
)
def test_rows_are_those_of_the_loaded_index(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], group: int, batch: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mapped")
    paths = [write(folder, f"c{number}", count, group) for number, count in enumerate(counts)]
    expected = loaded(paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_PER_BATCH", batch)
        index = mapped_index(shares_of(paths), folder)
    assert (index.digest, index.parts, len(index)) == (expected.digest, expected.parts, sum(counts))
    assert index.rows(range(len(index))) == expected.rows(range(len(index)))
    numbers = data.draw(st.lists(st.integers(0, len(index) - 1), max_size=30))
    assert index.rows(numbers) == expected.rows(numbers)
    assert index.row(len(index) - 1) == expected.row(len(index) - 1)
    for name in ("source", "shard", "corpus", "folder", "bucket"):
        codes, names = index.codes(name)
        np.testing.assert_array_equal(codes, expected.codes(name)[0])
        assert names == expected.codes(name)[1]
    for name in ("sample_id", "frames", "key"):
        np.testing.assert_array_equal(index.column(name), expected.column(name))
    assert index.summary() == expected.summary()
    some = index.filter("frames > 3 and scores.aesthetic > 1") if max(counts) > 4 else index
    assert some.digest == (expected.filter("frames > 3 and scores.aesthetic > 1") if max(counts) > 4 else some).digest
    with pytest.raises(DataError, match="expected 0 to"):
        index.rows([len(index)])


def test_a_feed_maps_its_index_and_names_its_corpora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda: cache)
    paths = tuple(write(tmp_path, corpus, count) for corpus, count in (("a", 9), ("b", 20)))
    feed = Feed(shares_of(paths, weights=0.5), 0, 8, 4, 1, 1)
    assert feed.index().digest == loaded(list(paths)).digest and len(files(cache)) == 2
    held = [Index.load(path) for path in paths]
    assert list(feed.corpora()) == [
        ("a", str(tmp_path / "a"), held[0].digest, 9),
        ("b", str(tmp_path / "b"), held[1].digest, 20),
    ]
    rows = feed.plan()[3].rows
    assert feed.index().rows(rows) == loaded(list(paths)).rows(rows)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    least=st.integers(0, 8),
    group=st.integers(1, 12),
    batch=st.integers(1, 20),
)
def test_a_filter_leaves_the_rows_for_which_it_holds_and_no_others_are_planned(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], least: int, group: int, batch: int
) -> None:
    folder = tmp_path_factory.mktemp("where")
    names = [f"c{number}" for number in range(len(counts))]
    paths = tuple(write(folder, name, count, group) for name, count in zip(names, counts, strict=True))
    kept = [[n for n in range(count) if n % 4 and n / 3 >= least] for count in counts]
    where = (f"scores.aesthetic >= {least}", *[None] * (len(counts) - 1))
    feed = Feed(shares_of(paths, where, weights=1.0), 0, 4, 2, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_PER_BATCH", batch)
        patch.setattr(module, "cache_folder", lambda: folder)
        if not kept[0]:
            for look in (feed.index, feed.plan):
                with pytest.raises(DataError, match=r"leaves none of the \d+ samples of corpus 'c0'|has a score"):
                    look()
            return
        index = feed.index()
    expected = [make_row("c0", n) for n in kept[0]] + [
        make_row(name, n) for name, count in list(zip(names, counts, strict=True))[1:] for n in range(count)
    ]
    assert [row.sample_id for row in index.rows(range(len(index)))] == [row.sample_id for row in expected]
    # the plan counts the same rows, and refuses to go on with others
    plan, whole = feed.plan(), replace(feed, shares=shares_of(paths, weights=1.0)).plan()
    assert index.digest == plan.index_digest != whole.index_digest
    assert sum(one["samples"] for one in plan.describe()["sources"].values()) == len(expected)
    planned = {int(row) for step in range(2 * len(expected)) for row in plan[step].rows}
    assert planned == set(range(len(expected)))
    assert [count for *_, count in feed.corpora()] == [len(kept[0]), *counts[1:]]
    assert next(feed.corpora())[2] != Index.load(paths[0]).digest
    with pytest.raises(DataError, match="index_digest was"):
        plan.check(whole.state())


def test_a_filter_that_is_not_understood_says_what_there_is(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, "a", 5)
    for where, answer in (
        ("second > 1", r"no value 'second'; there are .*'caption_length'.*'seconds'"),
        ("scores.motion > 1", "no sample has a score 'motion'; there are .*aesthetic"),
        ("frames >", "can't be evaluated"),
    ):
        with pytest.raises(DataError, match=answer):
            mapped_index(shares_of([path], [where]), cache)
    assert files(cache) == []


def test_what_can_not_be_joined_is_refused_and_leaves_nothing_unfinished(tmp_path: Path, cache: Path) -> None:
    first = write(tmp_path, "a", 5)
    again = tmp_path / "again" / "index.parquet"
    write_index(again, [make_row("a", number) for number in range(3)], IndexMetadata(corpus="again", stage="raw"))
    with pytest.raises(DataError, match=r"corpora \['a', 'again'\]: 3 sample ids come twice"):
        mapped_index(shares_of([first, again]), cache)
    for change in ({"stage": "encoded"}, {"encoders": {"vae": "other weights"}}):
        with pytest.raises(DataError, match=f"differ in {next(iter(change))}"):
            mapped_index(shares_of([first, write(tmp_path, "b", 5, **change)]), cache)
    with pytest.raises(DataError, match="at least one"):
        mapped_index(shares_of([]), cache)
    with pytest.raises(DataError, match="can't be read"):
        mapped_index(shares_of([first, tmp_path / "none.parquet"]), cache)
    held = pq.ParquetFile(first)
    other = IndexMetadata(corpus="a", stage="raw", format_version=99).model_dump_json().encode()
    pq.write_table(held.read().replace_schema_metadata({b"domainshuttle.index": other}), first)
    with pytest.raises(DataError, match="format version 99"):
        mapped_index(shares_of([first]), cache)
    # each corpus by itself is whole: its file stays
    assert {path.suffix for path in cache.iterdir() if path.name != "lock"} == {".arrow", ".json"}
    assert not files(cache, ".*")


def test_a_damaged_parquet_file_is_named(tmp_path: Path, cache: Path) -> None:
    path = Path(write(tmp_path, "a", 500))
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(3)
    data = bytearray(path.read_bytes())
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"index .*index\.parquet can't be read"):
        mapped_index(shares_of([path]), cache)
    assert not files(cache) and not files(cache, ".*")


def test_the_file_is_made_once_and_another_for_another_index(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, "a", 50)
    first = mapped_index(shares_of([path]), cache)
    (made,) = files(cache)
    status = made.stat()
    assert mapped_index(shares_of([path]), cache).rows(range(50)) == first.rows(range(50))
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    write(tmp_path, "a", 51)
    assert len(mapped_index(shares_of([path]), cache)) == 51 and len(files(cache)) == 2
    assert len(first) == 50 and first.row(49).key == "k49"
    other = write(tmp_path / "elsewhere", "a", 51)  # the same content: the file serves both, each row has its folder
    assert mapped_index(shares_of([other]), cache).row(0).folder == str(tmp_path / "elsewhere" / "a")
    assert mapped_index(shares_of([path]), cache).row(0).folder == str(tmp_path / "a") and len(files(cache)) == 2
    both = [write(tmp_path, "b", 3), path]
    assert (
        mapped_index(shares_of(both), cache).row(0).corpus == "b"
        and mapped_index(shares_of(both[::-1]), cache).row(0).corpus == "a"
    )
    assert len(files(cache)) == 3  # whatever they are joined with


def test_samples_that_come_twice_are_looked_for_once_a_node_and_mixture(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    check = module.check_unique
    monkeypatch.setattr(module, "check_unique", lambda ids, where: (looked.append(len(ids)), check(ids, where)))
    paths = [write(tmp_path, corpus, count) for corpus, count in (("a", 9), ("b", 20))]
    for _ in range(3):
        mapped_index(shares_of(paths), cache)
    assert looked == [29]
    mapped_index(shares_of(paths, ["frames > 3", None]), cache)
    assert looked == [29, 26]
    again = tmp_path / "again" / "index.parquet"
    write_index(again, [make_row("a", number) for number in range(3)], IndexMetadata(corpus="again", stage="raw"))
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(DataError, match="3 sample ids come twice"):
            mapped_index(shares_of([paths[0], again]), cache)
    assert looked == [29, 26, 12, 12]


def damage_end(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def damage_half(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def damage_byte(path: Path) -> None:
    """One byte of a row, with the times as they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def damage_other(path: Path) -> None:
    """Another whole file in its place."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def damage_note(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def damage_state(path: Path) -> None:
    """A note of another file."""
    note = path.with_suffix(".json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"size": 51}))


@pytest.mark.parametrize(
    "damage", [damage_end, damage_half, damage_byte, damage_other, damage_note, damage_state, Path.unlink]
)
def test_a_file_that_is_not_the_one_that_was_made_is_made_again(
    tmp_path: Path, cache: Path, damage: Callable[[Path], None]
) -> None:
    path = write(tmp_path, "a", 50)
    expected = mapped_index(shares_of([path]), cache).rows(range(50))
    (made,) = files(cache)
    content, inode = made.read_bytes(), made.stat().st_ino
    damage(made)
    assert mapped_index(shares_of([path]), cache).rows(range(50)) == expected
    assert made.read_bytes() == content and [*files(cache), *files(cache, ".*")] == [made]
    assert made.stat().st_ino != inode or damage is Path.unlink or damage is damage_other


def test_an_index_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a", 50)
    names = module._names
    monkeypatch.setattr(module, "_names", lambda place: (write(tmp_path, "a", 60), names(place))[1])
    with pytest.raises(DataError, match="written anew while it was read"):
        mapped_index(shares_of([path]), cache)
    assert not files(cache) and not files(cache, ".*")
    monkeypatch.undo()
    assert len(mapped_index(shares_of([path]), cache)) == 60


def test_processes_and_threads_that_start_together_make_each_file_once(tmp_path: Path, cache: Path) -> None:
    paths = [write(tmp_path, corpus, 3000) for corpus in "ab"]
    notes = tmp_path / "notes"
    program = PROGRAM + textwrap.dedent("""
        import os
        from domainshuttle.pipelines.index import mapped as module
        make = module._make
        def noted(*arguments):
            with open(sys.argv[1], "a") as file:
                file.write(f"{os.getpid()}\\n")
            return make(*arguments)
        module._make = noted
        sys.stdin.readline()
        index = mapped_index([CorpusShare("", path) for path in sys.argv[3:]], Path(sys.argv[2]))
        print(index.digest, index.row(5999).key)
    """)
    command = [sys.executable, "-c", program, str(notes), str(cache), *paths]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [one.communicate("go\n", timeout=120)[0] for one in started]
    assert said == [f"{loaded(paths).digest} k2999\n"] * 3
    assert len(notes.read_text().splitlines()) == len(files(cache)) == 2
    more = write(tmp_path, "c", 500)
    with ThreadPoolExecutor(4) as pool:
        assert {len(one) for one in pool.map(lambda _: mapped_index(shares_of([more]), cache), range(8))} == {500}
    assert len(files(cache)) == 3


def test_what_a_killed_process_left_is_cleared(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, "a", 50)
    mapped_index(shares_of([path]), cache)
    (made,) = files(cache)
    left = made.with_name(f".{made.name}.1.2.partial")
    left.write_bytes(b"half")
    made.unlink()
    mapped_index(shares_of([path]), cache)
    assert [*files(cache), *files(cache, ".*")] == [made]


def test_files_that_nobody_uses_are_removed(tmp_path: Path, cache: Path) -> None:
    old, used = write(tmp_path, "a", 5), write(tmp_path, "b", 5)
    held = mapped_index(shares_of([old]), cache)
    mapped_index(shares_of([used]), cache)
    long_ago = time.time() - module.UNUSED_SECONDS - 60
    for note in files(cache, "*.json"):
        os.utime(note, (long_ago, long_ago))
    mapped_index(shares_of([used]), cache)  # used again
    assert len(files(cache)) == 2
    mapped_index(shares_of([write(tmp_path, "c", 5)]), cache)
    assert len(files(cache)) == len(files(cache, "*.json")) == 2
    assert held.rows([4]) == Index.load(old).rows([4])  # who maps it keeps it
    assert len(mapped_index(shares_of([old]), cache)) == 5 and len(files(cache)) == 3


def test_the_cache_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700 and cache_folder() == folder
    folder.chmod(0o770)
    with pytest.raises(StorageError, match="remove it, or set TMPDIR"):
        cache_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="can't be trusted"):
        cache_folder()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"can't be mapped from .*set TMPDIR"):
        cache_folder()


def test_a_full_disk_says_what_to_do(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    full = pa.OSFile
    monkeypatch.setattr(module.pa, "OSFile", lambda path, mode: full("/dev/full", mode))
    with pytest.raises(StorageError, match=r"No space left.*set TMPDIR"):
        mapped_index(shares_of([write(tmp_path, "a", 5000)]), cache)
    assert not files(cache) and not files(cache, ".*")


def test_a_mapped_index_takes_hardly_any_memory_of_its_own(tmp_path: Path, cache: Path) -> None:
    count = 300_000
    rows = Index.load(write(tmp_path, "seed", 3000)).table
    table = rows.take(np.arange(count) % len(rows)).set_column(
        rows.column_names.index("sample_id"), "sample_id", [np.arange(count)]
    )
    path = tmp_path / "large" / "index.parquet"
    write_index(path, table, IndexMetadata(corpus="large", stage="raw"))
    program = PROGRAM + textwrap.dedent("""
        import re
        from domainshuttle.pipelines.index.table import Index
        def held():
            text = Path("/proc/self/status").read_text() + Path("/proc/self/io").read_text()
            return [int(re.search(kind + r":\\s+(\\d+)", text)[1]) for kind in ("RssAnon", "read_bytes")]
        def made():
            if sys.argv[1] == "mapped":
                return mapped_index([CorpusShare("", sys.argv[2])], Path(sys.argv[3]))
            return Index.load(sys.argv[2], verify=False)
        Index.load(sys.argv[4]).rows([0])
        before = held()
        index = made()
        rows = index.rows(range(0, len(index), len(index) // 64))
        print(*(now - then for now, then in zip(held(), before)))
    """)

    def taken(how: str) -> list[int]:
        """Anonymous memory in kB, and bytes from the disk."""
        command = [sys.executable, "-c", program, how, str(path), str(cache), str(tmp_path / "seed" / "index.parquet")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=200)
        return [int(number) for number in done.stdout.split()]

    mapped_index(shares_of([path]), cache)
    (made,) = files(cache)
    with made.open("rb") as file:  # out of the page cache, so that what is touched has to be read
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (mapped, read), (whole, _) = taken("mapped"), taken("loaded")
    assert whole > 60_000 and mapped < whole / 10, f"{mapped} kB mapped, {whole} kB loaded"
    assert read < made.stat().st_size / 3, f"{read} of {made.stat().st_size} bytes read for 64 rows"
