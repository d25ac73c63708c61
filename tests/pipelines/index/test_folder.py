"""What lies beside the shards of a corpus: read, ours, a companion, or named and counted.

Run: python -m pytest tests/pipelines/index/test_folder.py
"""

import io
import os
import socket
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.folder import (
    COMPANION,
    PARTS_FOLDER,
    Skipped,
    list_folder,
    no_shards,
    read_skipped,
    write_skipped,
)
from domainshuttle.pipelines.index.parts import INDEX_NAME, WORK_NAME
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import SampleInfo
from domainshuttle.pipelines.shards.tar import Member, ShardEntry

KINDS = {
    "b.tar.gz": "packed shard", "b.TGZ": "packed shard", "c.tar.bz2": "packed shard", "d.tar.xz": "packed shard",
    "e.tar.zst": "packed shard", "f.tar.lz4": "packed shard", "UPPER.TAR": "upper-case ending",
    "Mixed.Tar": "upper-case ending", "g.zip": "other format", "h.parquet": "other format", "i.mds": "other format",
    "j.tar.part": "other file", "notes.txt": "other file", "captions.json": "other file", "noending": "other file",
    ".k.tar.Ab12Cd": "hidden file", ".l.tar": "hidden file", "more/m.tar": "in a subfolder",
    "more/deep/n.tar.gz": "in a subfolder", "more/o.jpg": "in a subfolder",
}  # fmt: skip
COMPANIONS = {
    ".DS_Store": ".DS_Store", "._a.tar": "._*", "more/._m.tar": "._*", "Thumbs.db": "Thumbs.db", "a.tar.md5": "*.md5",
    "a.tar.sha256": "*.sha256", "SHA256SUMS": "SHA256SUM*", "a.tar.idx": "*.idx", "a.idx": "*.idx",
    "index.json": "index .json", "a.json": "index .json", "a_stats.json": "index .json", "sizes.json": "index .json",
}  # fmt: skip
OURS = [
    INDEX_NAME, "other.parquet", "quarantine.jsonl", "other.quarantine.jsonl", "verify.jsonl", "skipped.jsonl",
    f"{PARTS_FOLDER}/a.tar.parquet", f"{WORK_NAME}/recipe.json", ".index.parquet.ab-0.partial",
    "empty_caption.safetensors",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    info = SampleInfo(caption="", source="s", kind="image", frames=1, size=(8, 8), subjects=[], references=[])
    row = IndexRow.of(ShardEntry("a.tar", "k", (Member("json", 512, 2),), 1), info, "1x16x16")
    for name in ("a.tar", *KINDS, *COMPANIONS, *OURS):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in (INDEX_NAME, "other.parquet"):
        write_index(tmp_path / name, [row], IndexMetadata(corpus="c", stage="raw"))
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_every_file_is_a_shard_ours_a_companion_or_named(folder: Path) -> None:
    found = list_folder(folder)
    assert [*found.shards] == ["a.tar"] and found.shards["a.tar"][0] == len("a.tar")
    assert {one.file: one.kind for one in found.skipped} == KINDS
    assert found.companions == Counter(COMPANIONS.values()) + Counter({"__MACOSX": 1})
    assert all(one.remedy and one.count == 1 for one in found.skipped)


def test_a_pattern_asks_for_shards_and_files_of_such_names(folder: Path) -> None:
    for name in ("b-1.tar", "b-2.tar", "b-3.tar.gz"):
        (folder / name).touch()
    found = list_folder(folder, "b-*")
    assert [*found.shards] == ["b-1.tar", "b-2.tar"] and [one.file for one in found.skipped] == ["b-3.tar.gz"]


def test_what_is_no_regular_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "x.tar").touch()
    (tmp_path / "link.tar").symlink_to(tmp_path / "whole" / "x.tar")
    (tmp_path / "gone.tar").symlink_to("nowhere.tar")
    (tmp_path / "linked").symlink_to(tmp_path / "whole")
    (tmp_path / "whole" / "round").symlink_to(tmp_path)  # which must not be followed for ever
    (tmp_path / "unpacked.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)  # a socket's path may not be long
        made.bind("socket.tar")
        found = list_folder(tmp_path)
    assert [*found.shards] == ["link.tar"]
    assert {one.file: one.kind for one in found.skipped} == {
        "gone.tar": "broken link",
        "linked": "linked folder",
        "whole/round": "linked folder",
        "whole/x.tar": "in a subfolder",
        "unpacked.tar": "folder",
        "pipe.tar": "no file",
        "socket.tar": "no file",
    }


def test_names_that_no_index_takes_are_faults_of_shards(tmp_path: Path) -> None:
    for name in ("s +1.tar", "s#3.tar", "ä.tar", "a.b.tar", os.fsdecode(b"\xff.tar"), "x" * 90 + ".tar"):
        (tmp_path / name).touch()
    found = list_folder(tmp_path)
    assert not found.shards and not found.skipped and len(found.misnamed) == 6
    assert {fault.kind for fault in found.misnamed.values()} == {"unsafe name"}
    said = str(no_shards(tmp_path, "*", found))
    assert "no shard *.tar; it has" in said and "and 3 more" in said and "rename" in said


def test_a_folder_without_shards_says_what_it_has_instead(tmp_path: Path) -> None:
    assert str(no_shards(tmp_path, "*", list_folder(tmp_path))).endswith("WebDataset tars, called NAME.tar")
    (tmp_path / "more").mkdir()
    with tarfile.open(tmp_path / "more" / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("k.json"), io.BytesIO())
    (tmp_path / "b.TAR").touch()
    said = str(no_shards(tmp_path, "*", list_folder(tmp_path)))
    assert "b.TAR (upper-case ending: rename" in said and "more/a.tar (in a subfolder: move" in said
    with pytest.raises(DataError, match="is no folder"):
        list_folder(tmp_path / "missing")


def test_the_table_of_skipped_files_comes_back(tmp_path: Path) -> None:
    made = [Skipped("b.tar.gz", "packed shard", "unpack"), Skipped("a.zip", "other format", "pack")]
    for name in (INDEX_NAME, "other.parquet"):
        rows = write_skipped(tmp_path / name, made, Counter({"._*": 3}))
        assert rows == [made[1], made[0], Skipped("._*", COMPANION, "", 3)] == read_skipped(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"skipped.jsonl", "other.skipped.jsonl"}
    assert read_skipped(tmp_path / "none.parquet") == []
