"""Files that systems and tools leave beside others: known by name, counted, no samples.

Run: python -m pytest tests/pipelines/shards/test_companions.py
"""

import io
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from domainshuttle.pipelines.shards.companions import companion, is_index_name
from domainshuttle.pipelines.shards.scan import scan_contents, scan_shard
from domainshuttle.pipelines.shards.tar import ShardEntry, read_members

COMPANIONS = [
    "._k0.json", "._k0.jpg", "./._k0.ref0.jpg", "._.DS_Store", ".DS_Store", "./.DS_Store", "__MACOSX/._k0.jpg",
    "__MACOSX/more/._x", "Thumbs.db", "thumbs.DB", "desktop.ini", "Desktop.ini", "k0.md5", "k0.jpg.md5",
    "k0.jpg.sha256",
    "SHA256SUMS", "md5sum.txt", "PaxHeaders.4711/k0.jpg", "./PaxHeaders/k0.json", "GNU/PaxHeaders.1/x", "k0.idx",
    "a.tar.idx", ".nv-meta/index.sqlite", "@eaDir/k0.jpg", ".ipynb_checkpoints/x", "index.json", "sizes.json",
    "00000_stats.json", "dataset_info.json",
]  # fmt: skip
SAMPLES = [
    "k0.json",
    "index0.json",
    "md5.jpg",
    "k.md.jpg",
    "paxheaders.jpg",
    "Thumbs.jpg",
    "idx.mp4",
    ".hidden",
    "x/k.jpg",
]


@pytest.mark.parametrize("name", SAMPLES)
def test_other_names_are_no_companions(name: str) -> None:
    assert not companion(name) and not is_index_name(name.removesuffix(".json"))


def tar_of(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = len(name)
            archive.addfile(header, io.BytesIO(name.encode()))
    return path


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_companion_costs_no_sample_wherever_it_stands(tmp_path: Path, name: str) -> None:
    sample = ["k0.json", "k0.jpg", "k0.ref0.jpg"]
    expected = list(scan_shard(tar_of(tmp_path / "a.tar", sample)))
    assert len(expected) == 1
    lone = not companion(name)  # a JSON file is a key of its own between members
    for place in (0, len(sample)) if lone else range(len(sample) + 1):
        path = tar_of(tmp_path / "a.tar", [*sample[:place], name, *sample[place:]])
        companions = Counter[str]()
        found = list(scan_contents(path, (), 0, companions))
        (entry,) = [one[0] for one in found if isinstance(one, tuple)]
        assert len(found) == 1 and companions.total() == 1, found
        assert isinstance(expected[0], ShardEntry) and entry.checksum == expected[0].checksum
        assert read_members(tmp_path, "a.tar", entry.members) == {one.partition(".")[2]: one.encode() for one in sample}


def test_a_key_with_a_name_of_an_index_is_a_sample_where_it_has_more_than_a_description(tmp_path: Path) -> None:
    companions = Counter[str]()
    tar_of(tmp_path / "a.tar", ["index.json", "index.jpg", "sizes.json"])
    found = list(scan_contents(tmp_path / "a.tar", (), 0, companions))
    assert [one[0].key for one in found if isinstance(one, tuple)] == ["index"] and len(found) == 1
    assert companions == {"index .json": 1}


def test_a_tar_of_companions_alone_is_an_empty_shard(tmp_path: Path) -> None:
    (fault,) = scan_shard(tar_of(tmp_path / "a.tar", ["._k.jpg", ".DS_Store"]))
    assert not isinstance(fault, ShardEntry) and fault.kind == "empty shard"


def test_a_cut_within_a_companion_is_a_cut_shard(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", ["k0.json", "k0.jpg", "._k0.jpg"])
    path.write_bytes(path.read_bytes()[: 5 * 512 + 3])
    *samples, fault = scan_shard(path)
    assert [one.key for one in samples] == ["k0"] and fault.kind == "cut shard"  # type: ignore[union-attr]


def test_a_folder_that_tar_packs_with_its_companions(tmp_path: Path) -> None:
    """As GNU tar packs what macOS left on a disk, in its pax format, and what an old unpacker made of headers."""
    folder = tmp_path / "of"
    for name in ("k0.json", "k0.jpg", "._k0.json", "._k0.jpg", ".DS_Store", "PaxHeaders.9/k0.jpg", "__MACOSX/._k0.jpg"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    command = ["tar", "--sort=name", "--format=pax", "-cf", "a.tar", "-C", "of", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    companions = Counter[str]()
    (found,) = scan_contents(tmp_path / "a.tar", (), 0, companions)
    assert isinstance(found, tuple) and {one.extension for one in found[0].members} == {"json", "jpg"}
    # the folders of companions are entries of their own
    assert companions == {"._*": 2, ".DS_Store": 1, "PaxHeaders*": 2, "__MACOSX": 2}
