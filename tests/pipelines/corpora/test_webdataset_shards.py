"""WebDataset shards of others. Run: python -m pytest tests/pipelines/corpora/test_webdataset_shards.py"""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from built import grey, jpeg, made, mp4, reasons

from domainshuttle.pipelines.corpora.webdataset_shards import WebDatasetConfig
from domainshuttle.pipelines.errors import DataError

MEMBERS = {
    "000000001.jpg": jpeg(30),
    "000000001.txt": b"A cat.",
    "000000001.json": json.dumps({"caption": "not this", "status": "success", "width": 56}).encode(),
    "dir/clip one.mp4": mp4(),
    "dir/clip one.json": json.dumps({"caption": "A clip."}).encode(),
    "dir/clip one.m4a": b"sound",
    "dir/clip one.JPG": jpeg(1),  # a picture of the clip
    "failed.json": json.dumps({"caption": "x", "status": "failed_to_download"}).encode(),
    "mute.png": jpeg(60),
    "torn.jpg": jpeg(9)[:40],
    "torn.txt": b"x",
    "odd.jpg": jpeg(9),
    "odd.json": b"[1]",
    "__MACOSX/._x.jpg": b"",
}


def tar(members: dict[str, bytes], end: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
        size = buffer.tell()
    return buffer.getvalue() if end else buffer.getvalue()[:size]


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
