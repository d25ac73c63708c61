"""Scanning tars of others: what is whole is given, what is not is named.

Run: python -m pytest tests/pipelines/shards/test_scan.py
"""

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.shards.scan import Fault, fault_kind, scan_shard
from domainshuttle.pipelines.shards.tar import ShardEntry, ShardWriter, read_members, sample_checksum

GOOD = [("good.json", b"{}"), ("good.jpg", b"picture")]


def tar_of(
    folder: Path, *members: tarfile.TarInfo | tuple[str, bytes], form: int = tarfile.PAX_FORMAT, name: str = "odd-0.tar"
) -> Path:
    path = folder / name
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size, header.mtime = len(member[1]), 1.5  # in pax, a header of its own, as webdataset writes
                archive.addfile(header, io.BytesIO(member[1]))
    return path


def scanned(path: Path) -> tuple[list[ShardEntry], list[Fault]]:
    found = list(scan_shard(path))
    assert all(one.shard == path.name for one in found)
    return [one for one in found if isinstance(one, ShardEntry)], [one for one in found if isinstance(one, Fault)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[ShardEntry]]:
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path_factory.mktemp("whole"), "cut", 1 << 20) as writer:
        for number in range(4):
            writer.write(
                f"k{number}", {"json": b"{}", "mp4": random.bytes(900 + number), "ref0.jpg": random.bytes(512)}
            )
    return (writer.folder / writer.shards[0]).read_bytes(), writer.entries


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 13_000))
@example(0)
@example(512)
def test_a_tar_cut_anywhere_gives_what_is_whole_and_a_fault(
    tmp_path_factory: pytest.TempPathFactory, whole: tuple[bytes, list[ShardEntry]], cut: int
) -> None:
    data, entries = whole
    end = entries[-1].members[-1].offset + 512 + 1024  # padded data, and the end of the archive
    cut = min(cut, end - 1)
    path = tmp_path_factory.mktemp("cut") / "cut-000000.tar"
    path.write_bytes(data[:cut])
    found, faults = scanned(path)
    assert fault_kind(faults[-1].reason) == "cut shard" and faults[-1].key == ""
    complete = [entry for entry in entries if entry.members[-1].offset + entry.members[-1].size <= cut]
    assert found[: len(complete)] == complete
    # of the sample before the cut come the members that are whole, unless one of them is known to be cut
    for entry in found[len(complete) :]:
        original = entries[len(complete)]
        assert entry.key == original.key and entry.members == original.members[: len(entry.members)]
        assert all(member.offset + member.size <= cut for member in entry.members)
    assert len(found) + sum(bool(fault.key) for fault in faults) <= len(complete) + 1


def test_a_corrupt_header_ends_the_scan_there(tmp_path: Path, whole: tuple[bytes, list[ShardEntry]]) -> None:
    data, entries = whole
    for place, change in (
        (entries[2].members[0].offset - 512, b"\xff"),
        (entries[2].members[0].offset - 512, bytes(512)),
    ):
        path = tmp_path / "cut-000000.tar"
        path.write_bytes(data[:place] + change + data[place + len(change) :])
        found, faults = scanned(path)
        assert found == entries[:2]
        assert [fault_kind(fault.reason) for fault in faults] == ["corrupt shard"]


def test_tars_joined_with_cat_are_not_taken_for_the_first(
    tmp_path: Path, whole: tuple[bytes, list[ShardEntry]]
) -> None:
    path = tmp_path / "cut-000000.tar"
    path.write_bytes(whole[0] * 2)
    found, faults = scanned(path)
    assert found == whole[1]
    assert "joined with cat" in faults[0].reason


def test_a_tar_of_a_folder_holds_the_same_samples(tmp_path: Path, whole: tuple[bytes, list[ShardEntry]]) -> None:
    (tmp_path / "of").mkdir()
    with tarfile.open(fileobj=io.BytesIO(whole[0])) as tar:
        tar.extractall(tmp_path / "of", filter="data")
    subprocess.run(["tar", "--sort=name", "-cf", "folder-0.tar", "-C", "of", "."], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "folder-0.tar") as tar:
        assert tar.getnames()[0] == "." and all(name.startswith("./") for name in tar.getnames()[1:])
    found, faults = scanned(tmp_path / "folder-0.tar")
    assert faults == []
    expected = {entry.key: ({one.extension: one.size for one in entry.members}, entry.checksum) for entry in whole[1]}
    assert {
        entry.key: ({one.extension: one.size for one in entry.members}, entry.checksum) for entry in found
    } == expected


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


@pytest.mark.parametrize(
    ("member", "kind"),
    [
        (("../../escaped.jpg", b"x"), "unsafe name"),
        (("/etc/passwd.jpg", b"x"), "unsafe name"),
        (("./../escaped.jpg", b"x"), "unsafe name"),
        (("././k.jpg", b"x"), "unsafe name"),
        (("folder/k.jpg", b"x"), "unsafe name"),
        (("noextension", b"x"), "unsafe name"),
        ((".hidden", b"x"), "unsafe name"),
        (("k k.jpg", b"x"), "unsafe name"),
        (("k.jpg/../../x", b"x"), "unsafe name"),
        (("k.JPG", b"x"), "unsafe name"),
        (("k" * 200 + ".jpg", b"x"), "unsafe name"),
        (("\udcff\udcfe.jpg", b"x"), "unsafe name"),
        (special("k.jpg", tarfile.SYMTYPE, "/etc/passwd"), "not a file"),
        (special("k.jpg", tarfile.LNKTYPE, "good.json"), "not a file"),
        (special("folder", tarfile.DIRTYPE), "unsafe name"),
        (special("k.jpg", tarfile.FIFOTYPE), "not a file"),
        (special("k.jpg", tarfile.CHRTYPE), "not a file"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_hostile_member_costs_its_sample_only(
    tmp_path: Path, member: tarfile.TarInfo | tuple[str, bytes], kind: str, form: int
) -> None:
    # before, between the members of a sample, and after it
    path = tar_of(tmp_path, member, GOOD[0], member, GOOD[1], member, ("last.json", b"{}"), form=form)
    before = set(tmp_path.iterdir())
    found, faults = scanned(path)
    expected = ["good", "last"] if kind == "unsafe name" and "k.JPG" not in str(member) else ["last"]
    assert [entry.key for entry in found][-len(expected) :] == expected
    assert {fault_kind(fault.reason) for fault in faults} <= {kind, "duplicate key"}
    assert faults[0].key and faults[0].key.isprintable()
    for entry in found:
        members = read_members(tmp_path, entry.shard, entry.members)
        assert sample_checksum(members) == entry.checksum
    assert set(tmp_path.iterdir()) == before


def test_a_folder_is_called_one_and_breaks_no_sample(tmp_path: Path) -> None:
    """Also one that is called as the sample in which it lies."""
    folders = [special("./good/", tarfile.DIRTYPE), special("sub/", tarfile.DIRTYPE)]
    found, faults = scanned(tar_of(tmp_path, GOOD[0], *folders, GOOD[1]))
    assert [(entry.key, [one.extension for one in entry.members]) for entry in found] == [("good", ["json", "jpg"])]
    assert [fault.key for fault in faults] == ["good", "sub"] and all("is a folder" in one.reason for one in faults)


def test_other_members_of_an_odd_sample_do_not_stand_alone(tmp_path: Path) -> None:
    path = tar_of(tmp_path, ("k.json", b"{}"), ("k.JPG", b"x"), *GOOD)
    found, faults = scanned(path)
    assert [entry.key for entry in found] == ["good"]
    assert [(fault.key, fault_kind(fault.reason)) for fault in faults] == [("k", "unsafe name")]


def test_of_duplicates_the_first_stays(tmp_path: Path) -> None:
    again = tar_of(tmp_path, ("a.json", b"1"), ("b.json", b"2"), ("a.jpg", b"3"), ("c.json", b"1"), ("c.json", b"2"))
    found, faults = scanned(again)
    assert [(entry.key, len(entry.members)) for entry in found] == [("a", 1), ("b", 1), ("c", 1)]
    assert read_members(tmp_path, "odd-0.tar", found[2].members) == {"json": b"1"}
    assert [(fault.key, fault_kind(fault.reason)) for fault in faults] == [
        ("a", "duplicate key"),
        ("c", "duplicate key"),
    ]


def test_empty_missing_and_foreign_files_are_faults(tmp_path: Path) -> None:
    (tmp_path / "zip-0.tar").write_bytes(b"PK\3\4" + bytes(range(256)) * 40)
    for path, kind in (
        (tar_of(tmp_path), "empty shard"),
        (tmp_path / "missing-0.tar", "unreadable shard"),
        (tmp_path / "zip-0.tar", "corrupt shard"),
    ):
        found, faults = scanned(path)
        assert not found and [fault_kind(fault.reason) for fault in faults] == [kind]
    with pytest.raises(DataError, match="shard name"):
        list(scan_shard(tmp_path / "a b.tar"))


@pytest.mark.parametrize("size", [10 * 2**30, 2**62, -1])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, b"?"])
def test_a_declared_size_beyond_the_file_costs_no_memory(tmp_path: Path, size: int, kind: bytes) -> None:
    header = tarfile.TarInfo("big.mp4")
    header.size, header.type = size, kind
    path = tar_of(tmp_path, *GOOD)
    good = path.read_bytes()[: 512 * 8]  # two members, each with a header that extends it
    path.write_bytes(good + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    found, faults = scanned(path)
    assert [entry.key for entry in found] == ["good"] and len(found[0].members) == 2
    assert {fault_kind(fault.reason) for fault in faults} <= {"cut shard", "corrupt shard", "not a file"}
    assert faults[-1].key == ""


def test_tars_of_the_tar_command_are_read(tmp_path: Path) -> None:
    for name, data in GOOD:
        (tmp_path / name).write_bytes(data)
    for form in ("gnu", "pax", "ustar"):
        subprocess.run(
            ["tar", f"--format={form}", "-cf", f"{form}.tar", "good.json", "good.jpg"], cwd=tmp_path, check=True
        )
        found, faults = scanned(tmp_path / f"{form}.tar")
        assert not faults
        assert read_members(tmp_path, f"{form}.tar", found[0].members) == {"json": b"{}", "jpg": b"picture"}


@pytest.mark.parametrize("form", ["oldgnu", "gnu", "posix"])
@pytest.mark.parametrize("holes", [1, 60])
def test_a_sparse_file_costs_its_sample_only(tmp_path: Path, form: str, holes: int) -> None:
    """Its header may go on in further blocks, and say another name and size than those of the file."""
    with (tmp_path / "b.jpg").open("wb") as file:
        for number in range(holes):
            file.seek(65536 * number)
            file.write(b"x")
        file.truncate(65536 * (holes + 1))
    for name in ("a.json", "a.jpg", "b.json", "c.json", "c.jpg"):
        (tmp_path / name).write_bytes(b"{}")
    names = ["a.json", "a.jpg", "b.json", "b.jpg", "c.json", "c.jpg"]
    subprocess.run(["tar", f"--format={form}", "-S", "-cf", "s.tar", *names], cwd=tmp_path, check=True)
    entries, faults = scanned(tmp_path / "s.tar")
    assert [entry.key for entry in entries] == ["a", "c"]
    assert [fault.key for fault in faults] == ["b"] and "not with `tar --sparse`" in faults[0].reason
