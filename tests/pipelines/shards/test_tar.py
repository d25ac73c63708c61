"""Shards: written whole or not at all, nothing lost silently. Run: pytest tests/pipelines/shards/test_tar.py"""

import hashlib
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.shards.scan import scan_shard
from domainshuttle.pipelines.shards.tar import Member, ShardCache, ShardWriter, read_members, sample_checksum

Samples = dict[str, dict[str, bytes]]


def make_samples(count: int, size: int = 700) -> Samples:
    random = np.random.default_rng(count)
    return {
        f"k{number:03d}": {
            "mp4": random.bytes(size + number),
            "json": b'{"n": %d}' % number,
            "ref0.jpg": random.bytes(number),
        }
        for number in range(count)
    }


def write(folder: Path, samples: Samples, max_bytes: int = 1 << 20, prefix: str = "part") -> ShardWriter:
    with ShardWriter(folder, prefix, max_bytes) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return writer


KEYS = st.text("abcXYZ019_", min_size=1, max_size=12).filter(lambda key: key[0] != "_")
MEMBERS = st.dictionaries(st.sampled_from(["json", "jpg", "mp4", "ref0.jpg"]), st.binary(max_size=1500), min_size=1)


@settings(max_examples=30, deadline=None)
@given(samples=st.dictionaries(KEYS, MEMBERS, min_size=1, max_size=8), max_bytes=st.integers(1, 12000))
def test_what_is_written_is_read_by_offset_by_scanning_and_by_tarfile(
    tmp_path_factory: pytest.TempPathFactory, samples: Samples, max_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = write(folder, samples, max_bytes)
    assert [entry.key for entry in writer.entries] == list(samples)
    for entry in writer.entries:
        assert read_members(folder, entry.shard, entry.members) == samples[entry.key]
        assert entry.checksum == sample_checksum(samples[entry.key])
    assert [entry for shard in writer.shards for entry in scan_shard(folder / shard)] == writer.entries
    for shard in writer.shards:
        size = (folder / shard).stat().st_size
        held = [entry for entry in writer.entries if entry.shard == shard]
        # a record of padding (10,240 bytes) may be added; a sample alone may be larger than the bound
        assert size <= max(max_bytes, 10240) + 10240 or len(held) == 1
        with tarfile.open(folder / shard) as archive:
            assert {m.name for m in archive} == {f"{e.key}.{m.extension}" for e in held for m in e.members}


def test_the_webdataset_library_reads_what_we_write(tmp_path: Path) -> None:
    samples = make_samples(9)
    writer = write(tmp_path, samples, max_bytes=8000)
    assert len(writer.shards) > 2
    urls = [str(tmp_path / shard) for shard in writer.shards]
    seen = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        seen[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    assert seen == samples and list(seen) == list(samples)


def test_we_scan_what_the_webdataset_library_writes(tmp_path: Path) -> None:
    samples = make_samples(5)
    path = tmp_path / "theirs-0.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for key, members in samples.items():
            sink.write({"__key__": key, **members})
    entries = list(scan_shard(path))
    assert {e.key: read_members(tmp_path, e.shard, e.members) for e in entries} == samples
    assert [e.checksum for e in entries] == [sample_checksum(members) for members in samples.values()]


def test_the_same_samples_give_the_same_names_and_bytes(tmp_path: Path) -> None:
    samples = make_samples(6)
    first = write(tmp_path / "a", samples, 4000)
    swapped = {key: dict(reversed(members.items())) for key, members in samples.items()}
    second = write(tmp_path / "b", swapped, 4000)
    assert first.entries == second.entries and first.shards[:2] == ["part-000000.tar", "part-000001.tar"]
    for shard in first.shards:
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_bytes_do_not_depend_on_the_day_the_process_or_the_user(tmp_path: Path) -> None:
    """So that a corpus that is made again has the digests that it had."""
    samples = {
        f"k{n:03d}": {"mp4": bytes([n]) * (700 * n), "json": b'{"n": %d}' % n, "ref0.jpg": bytes(range(n))}
        for n in range(40)
    }
    writer = write(tmp_path, samples, 200_000)
    assert len(writer.shards) == 4
    written = hashlib.blake2b(b"".join((tmp_path / shard).read_bytes() for shard in writer.shards), digest_size=8)
    assert written.hexdigest() == "b511292e5ebee0ce"


def test_members_of_any_buffer_are_written(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.int32)
    members = {"json": bytearray(b"{}"), "mp4": memoryview(array)}
    with ShardWriter(tmp_path, "part", 1 << 20) as writer:
        writer.write("k", members)
    (entry,) = writer.entries
    assert read_members(tmp_path, entry.shard, entry.members) == {"json": b"{}", "mp4": array.tobytes()}
    assert [*scan_shard(tmp_path / entry.shard)] == [entry]


def test_a_checksum_sees_every_change() -> None:
    members = {"jpg": b"ab", "json": b"c"}
    changed = [{"jpg": b"ac", "json": b"c"}, {"png": b"ab", "json": b"c"}, {"jpg": b"abc", "json": b""}, {"jpg": b"ab"}]
    sums = {sample_checksum(members), *map(sample_checksum, changed)}
    assert len(sums) == 5
    assert sample_checksum(dict(reversed(members.items()))) == sample_checksum(members)


def test_an_exception_leaves_whole_shards_only(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "part", 3000) as writer:
        for key, members in make_samples(5).items():
            writer.write(key, members)
        raise RuntimeError("the builder failed")
    assert sorted(path.name for path in tmp_path.iterdir()) == writer.shards
    assert {entry.shard for entry in writer.entries} == set(writer.shards)
    assert 0 < len(writer.entries) < 5
    assert [entry for shard in writer.shards for entry in scan_shard(tmp_path / shard)] == writer.entries


def test_a_killed_writer_leaves_no_shard_that_is_not_whole(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from domainshuttle.pipelines.shards.tar import ShardWriter\n"
        "with ShardWriter(sys.argv[1], 'part', 20000) as writer:\n"
        "    for number in range(100):\n"
        "        if len(writer.shards) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        writer.write(f'k{number}', {'json': b'x' * 3000})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    whole = sorted(tmp_path.glob("*.tar"))
    assert [path.name for path in whole] == ["part-000000.tar", "part-000001.tar"]
    assert all(list(scan_shard(path)) for path in whole)
    assert list(tmp_path.glob(".*partial"))
    write(tmp_path, make_samples(2))  # the next writer of the prefix clears what was left
    assert not list(tmp_path.glob(".*partial"))


def test_a_full_disk_leaves_whole_shards_only(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from domainshuttle.pipelines.shards.tar import ShardWriter\n"
        "try:\n"
        "    with ShardWriter(sys.argv[1], 'part', 200_000) as writer:\n"
        "        writer.write('k0', {'json': b'x' * 150_000})\n"
        "        writer.write('k1', {'json': b'x' * 150_000})\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n"
        "        writer.write('k2', {'json': b'x' * 150_000})\n"
        "except OSError as error:\n"
        "    print(error.strerror, writer.shards)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "File too large ['part-000000.tar']\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["part-000000.tar"]
    assert [entry.key for entry in scan_shard(tmp_path / "part-000000.tar")] == ["k0"]


def test_an_empty_writer_makes_no_shard(tmp_path: Path) -> None:
    assert write(tmp_path, {}).shards == [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "members", "expected"),
    [
        ("k000", {"json": b""}, "written before"),
        ("../k", {"json": b""}, "sample key"),
        ("k", {"../json": b""}, "member extension"),
        ("k", {}, "no members"),
    ],
)
def test_the_writer_refuses_and_goes_on(tmp_path: Path, key: str, members: dict[str, bytes], expected: str) -> None:
    with ShardWriter(tmp_path, "part", 10**6) as writer:
        writer.write("k000", {"json": b"1"})
        with pytest.raises(DataError, match=expected):
            writer.write(key, members)
        writer.write("k001", {"json": b"2"})
    assert [entry.key for entry in scan_shard(tmp_path / "part-000000.tar")] == ["k000", "k001"]
    with pytest.raises(DataError, match="shard name"):
        ShardWriter(tmp_path, "../part", 10**6)
    with pytest.raises(DataError, match="max_bytes"):
        ShardWriter(tmp_path, "part", 0)


def test_reading_refuses_what_lies_outside(tmp_path: Path) -> None:
    writer = write(tmp_path, make_samples(1))
    size = (tmp_path / writer.shards[0]).stat().st_size
    for offset, length in ((size, 1), (0, size + 1), (-1, 5), (5, -1), (0, 10 * 2**30)):
        with pytest.raises(DataError, match="is not within the file"):
            read_members(tmp_path, writer.shards[0], [Member("jpg", offset, length)])
    for shard in ("../part-000000.tar", str(tmp_path / writer.shards[0]), "part-000000.zip", ""):
        with pytest.raises(DataError, match="shard name"):
            read_members(tmp_path / "x", shard, [])
    (tmp_path / "empty-0.tar").touch()
    for shard in ("missing-0.tar", "empty-0.tar"):
        with pytest.raises(DataError, match="can't be read"):
            read_members(tmp_path, shard, [])


def test_a_rewritten_shard_is_read_anew(tmp_path: Path) -> None:
    for value in (b"old", b"new!"):
        entry = write(tmp_path, {"k": {"json": value}}).entries[0]
        assert read_members(tmp_path, entry.shard, entry.members)["json"] == value


def test_few_shards_stay_open_and_views_outlive_them(tmp_path: Path) -> None:
    samples = make_samples(30)
    writer = write(tmp_path, samples, max_bytes=1)
    cache = ShardCache(max_open=4)
    first = cache.read(tmp_path, writer.entries[0].shard, writer.entries[0].members)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for entry in writer.entries:
        assert cache.read(tmp_path, entry.shard, entry.members) == samples[entry.key]
        assert len(cache) <= 4
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 4
    assert first == samples["k000"]
    with pytest.raises(TypeError):
        first["json"][0] = 0


def test_threads_share_one_cache(tmp_path: Path) -> None:
    samples = make_samples(20)
    writer = write(tmp_path, samples, max_bytes=1)
    cache, wrong = ShardCache(max_open=3), []

    def reader(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 20, 300):
            entry = writer.entries[number]
            if cache.read(tmp_path, entry.shard, entry.members) != samples[entry.key]:
                wrong.append(entry.key)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
