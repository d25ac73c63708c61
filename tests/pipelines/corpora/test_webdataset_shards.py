"""WebDataset shards of others. Run: python -m pytest tests/pipelines/corpora/test_webdataset_shards.py"""

import bz2
import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from built import grey, jpeg, made, reasons
from sources.webdataset_shards import MEMBERS, tar

from domainshuttle.pipelines.corpora.webdataset_shards import WebDatasetConfig
from domainshuttle.pipelines.errors import DataError


@pytest.mark.parametrize(("ending", "codec"), [("tar", None), ("tar.gz", "gzip"), ("tgz", "gzip"), ("tar.zst", "zstd")])
def test_shards_are_read_however_they_are_packed(tmp_path: Path, ending: str, codec: str | None) -> None:
    data = tar(MEMBERS)
    packed = data if codec is None else pa.compress(data, codec, asbytes=True) if codec == "zstd" else _gzip(data)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"00000.{ending}").write_bytes(packed)
    result = made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")
    picture, clip = result
    assert (picture.info.caption, grey(picture.target), picture.info.size) == ("A cat.", 30, (40, 56))
    assert (clip.info.caption, clip.info.kind, clip.info.frames) == ("A clip.", "video", 10)
    assert bytes(clip.target) == MEMBERS["dir/clip one.mp4"] and not clip.info.references
    assert result.tally.counts == {"not downloaded": 1, "empty caption": 1, "unknown form": 1}
    assert reasons(result.bad) == ["unreadable picture"]
    assert result.notes.counts == {"members of other kinds": 2}
    kept = made(WebDatasetConfig(folder=str(tmp_path), empty_captions="keep"), tmp_path / "kept")
    assert kept.tally.counts == {"not downloaded": 1, "unknown form": 1} and "" in [one.info.caption for one in kept]


def test_shards_are_known_by_their_bytes(tmp_path: Path) -> None:
    """Some programs unpack what they download, and leave it its name."""
    data = tar({"a.jpg": jpeg(1), "a.txt": b"A."})
    (tmp_path / "0.tar.gz").write_bytes(data)
    (tmp_path / "1.tar").write_bytes(pa.compress(data, "zstd", asbytes=True))
    (tmp_path / "2.tgz").write_bytes(bz2.compress(data))
    assert [one.info.caption for one in made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")] == ["A."] * 3


def _gzip(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data)


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.zst"])
def test_shards_that_are_cut_are_one_message(tmp_path: Path, ending: str) -> None:
    data = tar(
        {f"{number}.{kind}": jpeg(number) if kind == "jpg" else b"x" for number in range(9) for kind in ("jpg", "txt")}
    )
    packed = {"tar": data, "tar.gz": _gzip(data), "tar.zst": pa.compress(data, "zstd", asbytes=True)}[ending]
    (tmp_path / f"a.{ending}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a.tar.* is cut short or damaged"):
        made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")


def test_a_shard_that_was_cut_between_members_is_one_message(tmp_path: Path) -> None:
    """webdataset and tarfile take it for a whole one."""
    (tmp_path / "a.tar").write_bytes(tar({"1.jpg": jpeg(1), "1.txt": b"x"}, end=False))
    with pytest.raises(DataError, match="no end of archive"):
        made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")
    (tmp_path / "a.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")


def test_captions_may_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar({"1.webp.json": b"", "2.jpg": jpeg(1), "2.json": b'{"title": "T", "caption": ""}'})
    )
    config = WebDatasetConfig(folder=str(tmp_path), captions=["alt", "title"])
    assert [sample.info.caption for sample in made(config, tmp_path / "survey")] == ["T"]
    assert made(config, tmp_path / "survey").tally.counts == {"no picture or clip": 1}


def test_a_damaged_header_and_joined_archives_lose_nothing_silently(tmp_path: Path) -> None:
    members = {f"{number}.{ending}": data for number in range(4) for ending, data in (("jpg", jpeg(9)), ("txt", b"x"))}
    data = tar(members)
    (tmp_path / "a.tar").write_bytes(data)
    assert len(made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "whole").samples) == 4
    for number, name in enumerate(("2.jpg", "3.txt")):
        torn = bytearray(data)
        torn[data.index(name.encode()) + 100] ^= 0xFF  # of the header's mode, which its checksum covers
        (tmp_path / "a.tar").write_bytes(torn)
        with pytest.raises(DataError, match=r"a\.tar is cut short or damaged \(ValueError: a header that is none"):
            made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / f"torn{number}")
    (tmp_path / "a.tar").write_bytes(data + tar({"9.jpg": jpeg(9), "9.txt": b"x"}))
    with pytest.raises(DataError, match="more follows the end of the archive, as where several were joined"):
        made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "joined")


def test_names_that_are_not_utf8_stay_names(tmp_path: Path) -> None:
    data = tar({"caf_.jpg": jpeg(9), "caf_.txt": b"A cup."})
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as old,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as new,
    ):
        for member in old:
            content = old.extractfile(member)
            member.name = member.name.replace("_", "é")
            new.addfile(member, content)
    (tmp_path / "a.tar").write_bytes(packed.getvalue())
    (sample,) = made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")
    assert "caf_xe9" in sample.key and sample.info.caption == "A cup."


def test_shards_and_archives_whose_own_names_are_not_utf8_are_left_out_by_name(tmp_path: Path) -> None:
    data = tar({"a.jpg": jpeg(10), "a.txt": b"A."})
    for name in (b"0.tar", b"\xff.tar", b"\xfe.zip"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(data)
    result = made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")
    assert [one.info.caption for one in result] == ["A."]
    assert result.tally.counts == {"unsafe name": 1, "other file": 1}


def test_no_picture_gets_the_caption_of_another_of_the_same_key(tmp_path: Path) -> None:
    """Webdataset refuses such a tar, or takes what comes last."""
    data = tar({"a.jpg": jpeg(10), "a.txt": b"First.", "b.jpg": jpeg(30), "b.txt": b"B."}, end=False)
    data += tar({"a.JPG": jpeg(20), "a.txt": b"Second.", "b.txt": b"Not B."})
    (tmp_path / "0.tar").write_bytes(data)
    result = made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")
    assert [(one.info.caption, grey(one.target)) for one in result] == [("First.", 10), ("B.", 30)]
    assert result.tally.counts == {"duplicate key": 2}


def test_links_are_counted_and_nan_is_a_missing_value(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data, linked in (
            ("a.jpg", jpeg(10), ""),
            ("a.json", b'{"caption": "A.", "similarity": NaN}', ""),
            ("b.jpg", b"", "a.jpg"),
            ("c.jpg", jpeg(5), ""),
            ("c.json", b'{"caption": "C.", "similarity": Infinity}', ""),
        ):
            header = tarfile.TarInfo(name)
            header.size, header.linkname = len(data), linked
            header.type = tarfile.LNKTYPE if linked else tarfile.REGTYPE
            archive.addfile(header, io.BytesIO(data))
    (tmp_path / "0.tar").write_bytes(file.getvalue())
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7" + bytes(120))  # macOS's own of the file
    result = made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")
    assert [one.info.caption for one in result] == ["A."]
    assert result.tally.counts == {"not a file": 1, "unreadable sample": 1}


def test_archives_that_are_not_read_are_counted_unless_shards_are_named(tmp_path: Path) -> None:
    data = tar({"a.jpg": jpeg(10), "a.txt": b"A."})
    half = len(data) // 2
    (tmp_path / "0.tar.gz").write_bytes(_gzip(data[:half]) + _gzip(data[half:]))  # as tools with threads write it
    for name in ("1.tar.xz", "2.TAR", "sub/3.zip", "sub/._4.tar", "5.parquet", "0_stats.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    result = made(WebDatasetConfig(folder=str(tmp_path)), tmp_path / "survey")
    assert [one.info.caption for one in result] == ["A."] and result.tally.counts == {"other file": 3}
    named = made(WebDatasetConfig(folder=str(tmp_path), shards=["0.tar.gz"]), tmp_path / "named")
    assert len(named.samples) == 1 and not named.tally.counts
