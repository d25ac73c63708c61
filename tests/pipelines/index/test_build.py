"""Indexing shards that exist already: what is whole is indexed, the rest is named, and only changes are read again.

Run: python -m pytest tests/pipelines/index/test_build.py
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded_corpora import inline_actors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora.builder import build_corpus
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.encoding.corpus import encode
from domainshuttle.pipelines.encoding.target import EncodingJob
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.build import Indexed, index_folder, merge_indexes
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.index.verify import verify_index
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.shards.scan import fault_kind
from domainshuttle.pipelines.shards.tar import ShardWriter, read_members, sample_checksum
from domainshuttle.pipelines.values import ActorPool

pytestmark = pytest.mark.usefixtures("ray_cluster")

RAW = IndexMetadata(corpus="mine", stage="raw")
BUCKETS = [parse_bucket("1x32x32"), parse_bucket("5x32x32"), parse_bucket("9x32x32")]
Members = dict[str, bytes]


def silent(*_: Any) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def samples() -> dict[str, Members]:
    """Real pictures and clips: key to members."""
    made: dict[str, Members] = {}
    for kind, count in (("image", 8), ("video", 3)):
        builder = SpritesBuilder(SpritesConfig(kind=kind, samples=count, identities=72, side=48), "sprites")
        made |= {
            f"{kind}-{one.key}": {k: bytes(v) for k, v in one.members().items()} for one in builder.build(0, count)
        }
    return made


def write(folder: Path, samples: Mapping[str, Members], prefix: str = "a", shards: int = 1) -> list[Path]:
    """The samples in shards of a number of files alike."""
    folder.mkdir(exist_ok=True)
    keys = list(samples)
    for number in range(shards):
        part = keys[number::shards]
        with ShardWriter(folder, f"{prefix}{number}", 1 << 30) as writer:
            for key in part:
                writer.write(key, samples[key])
    return sorted(folder.glob(f"{prefix}*.tar"))


def tar_of(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    """A tar as others may make it, in which anything goes."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            archive.addfile(header, io.BytesIO(member[1]))
    return path


def index(folder: Path, most_bad: float = 1.0, metadata: IndexMetadata = RAW, **options: Any) -> Indexed:
    return index_folder(folder, metadata, options.pop("buckets", BUCKETS), silent, most_bad, **options)


def rows(folder: Path, name: str = INDEX_NAME) -> list[IndexRow]:
    loaded = Index.load(folder / name)
    return loaded.rows(range(len(loaded)))


def quarantined(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def changed(members: Members, change: Mapping[str, Any] | None = None, **files: bytes | None) -> Members:
    """A sample with other fields in its description, and other or (None) without some files."""
    info = json.loads(members["json"]) | dict(change or {})
    made = {**members, "json": json.dumps(info).encode(), **{k.replace("_", "."): v for k, v in files.items()}}
    return {name: data for name, data in made.items() if data is not None}


def test_scanned_shards_give_the_index_that_was_made_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SpritesConfig(kind="video", samples=24, identities=72, side=48, frames=9, fps=8)
    metadata = build_corpus("mine", config, BUCKETS, tmp_path / "raw", silent, 8, fps=5).metadata
    own = rows(tmp_path / "raw")
    assert {row.bucket for row in own} == {"5x32x32"}  # nine frames at 8 fps are five or six at 5
    made = index(tmp_path / "raw", metadata=RAW.model_copy(update={"fps": 5.0}))
    assert made.metadata == metadata and (made.samples, made.scanned, made.shards) == (24, 3, 3)
    assert rows(tmp_path / "raw") == own
    # and the same of the encoded shards, of which the index names the encoders
    inline_actors(monkeypatch)
    job = EncodingJob(
        CorpusSpec("mine", "raw", str(tmp_path / "raw")), CorpusSpec("mine", "encoded", str(tmp_path / "encoded"))
    )
    (made,) = encode([job], EncoderSources("block-dct", "byte-umt5", 48), silent, ActorPool(), samples_per_part=8)
    encoded = made.metadata
    before = rows(tmp_path / "encoded")
    monkeypatch.undo()
    again = index(tmp_path / "encoded", metadata=encoded.model_copy(update={"digest": ""}), buckets=[])
    assert (again.samples, again.metadata.encoders) == (24, encoded.encoders)
    after = rows(tmp_path / "encoded")
    assert [(row.key, row.members, row.checksum, row.bucket) for row in after] == [
        (row.key, row.members, row.checksum, row.bucket) for row in before
    ]
    assert all(0 < row.text_tokens <= 48 for row in after)
    assert not verify_index(tmp_path / "encoded" / INDEX_NAME, silent, decode=None).faults
    # without that index nobody knows what made the latents
    (tmp_path / "encoded" / INDEX_NAME).unlink()
    with pytest.raises(DataError, match=r"is encoded, and the folder has no index that names its encoders: copy the"):
        index(tmp_path / "encoded")


def test_whatever_is_wrong_is_left_out_and_named(tmp_path: Path, samples: dict[str, Members]) -> None:
    good = [key for key in samples if key.startswith("image")]
    clip = next(key for key in samples if key.startswith("video"))
    base, reference = samples[good[0]], json.loads(samples[good[0]]["json"])
    subject = reference["subjects"][0]
    deep = b'{"caption": ' + b"[" * 20_000
    bad: dict[str, tuple[str, Members]] = {
        "noJson": ("missing description", {"jpg": base["jpg"]}),
        "notJson": ("bad description", {**base, "json": base["json"][:-9]}),
        "deep": ("bad description", {**base, "json": deep}),
        "list": ("bad description", {**base, "json": b"[]"}),
        "bytes": ("bad description", {**base, "json": b"\xff\xfe{}"}),
        "surrogate": ("bad description", changed(base, {"caption": "?"}) | {"json": base["json"].replace(b'"caption": "', b'"caption": "\\ud800')}),  # noqa: E501
        "domain5": ("bad description", changed(base, {"subjects": [subject | {"domain": 5}]})),
        "domainM2": ("bad description", changed(base, {"subjects": [subject | {"domain": -2}]})),
        "order": ("bad description", changed(base, {"subjects": [subject | {"id": 1}, subject]})),
        "nan": ("bad description", {**base, "json": base["json"].replace(b'"scores": {', b'"scores": {"x": NaN, ')}),
        "frames": ("bad description", changed(samples[clip], {"frames": 2**40})),
        "noRef": ("missing reference", changed(base, ref1_jpg=None)),
        "noTarget": ("missing target", changed(base, jpg=None)),
        "npy": ("unknown file", changed(base, npy=b"\x93NUMPY object")),
        "pickle": ("unknown file", changed(base, pyd=b"\x80\x04cos\nsystem\n")),
        "encoded": ("encoded sample", changed(base, jpg=None, safetensors=b"")),
        "short": ("no bucket", changed(samples[clip], {"frames": 3})),
    }  # fmt: skip
    write(tmp_path, {key: samples[key] for key in good[:4]}, "a")
    write(tmp_path, {key: members for key, (_, members) in bad.items()}, "b")
    write(tmp_path, {key: samples[key] for key in [good[0], *good[4:6]]}, "c")  # one that `a` has too
    huge = tarfile.TarInfo("huge.mp4")
    huge.size = 10 * 2**30
    whole = [(f"{good[6]}.{name}", data) for name, data in samples[good[6]].items()]
    tar_of(tmp_path / "d-0.tar", *whole, ("../../x.jpg", b""), ("/etc/y.jpg", b""), ("odd name.jpg", b""), *whole)
    whole = [(f"{good[7]}.{name}", data) for name, data in samples[good[7]].items()]
    (tmp_path / "e-0.tar").write_bytes(with_huge(tar_of(tmp_path / "e", *whole).read_bytes(), whole, huge))
    (tmp_path / "f-0.tar").write_bytes(b"")
    tar_of(tmp_path / "g-0.tar")
    (tmp_path / "h 0.tar").write_bytes(b"")
    tar_of(tmp_path / "i.tar.gz")

    made = index(tmp_path)
    assert [row.key for row in rows(tmp_path)] == good
    expected = {("b0-000000.tar", key, kind) for key, (kind, _) in bad.items()} | {
        ("c0-000000.tar", good[0], "duplicate key"),
        ("d-0.tar", "../../x", "unsafe name"),
        ("d-0.tar", "/etc/y", "unsafe name"),
        ("d-0.tar", "odd name", "unsafe name"),
        ("d-0.tar", good[6], "duplicate key"),
        ("e-0.tar", "huge", "cut shard"),
        ("e-0.tar", "", "cut shard"),
        ("f-0.tar", "", "cut shard"),
        ("g-0.tar", "", "empty shard"),
        ("h 0.tar", "", "unsafe name"),
    }
    found = quarantined(tmp_path)
    assert {(row["shard"], row["key"], fault_kind(row["reason"])) for row in found} == expected
    assert len(found) == len(expected) and made.faults == Counter(kind for _, _, kind in expected)
    assert "the first shard's stays" in next(row["reason"] for row in found if row["shard"] == "c0-000000.tar")
    verified = verify_index(tmp_path / INDEX_NAME, silent, decode=None)
    assert verified.samples == verified.decoded == len(good) and not verified.faults
    with pytest.raises(DataError, match=r"are bad, at most 5% may be: .*bad description 10, .*--most-bad 0\.75"):
        index(tmp_path, most_bad=0.05)
    assert [row.key for row in rows(tmp_path)] == good  # the index before stays


def with_huge(data: bytes, members: list[tuple[str, bytes]], huge: tarfile.TarInfo) -> bytes:
    """A tar with one more header, of a member that is not there."""
    end = sum(512 + len(content) + -len(content) % 512 for _, content in members)
    return data[:end] + huge.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def test_only_what_changed_is_read_again(tmp_path: Path, samples: dict[str, Members]) -> None:
    shards = write(tmp_path, samples, shards=4)
    first = index(tmp_path)
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".index").iterdir()}
    assert first.scanned == len(parts) == 4
    unchanged = index(tmp_path)
    assert (unchanged.scanned, unchanged.metadata) == (0, first.metadata)
    # other buckets need no reading
    assert index(tmp_path, buckets=BUCKETS[:2]).scanned == 0
    assert {row.bucket for row in rows(tmp_path)} == {"1x32x32", "5x32x32"}
    # one added, one removed, one cut, one touched; a part that a killed job left half-written counts for nothing
    extra = next(iter(samples))
    write(tmp_path, {"extra": samples[extra]}, "b")
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-30_000])
    os.utime(shards[2])
    part = tmp_path / ".index" / f"{shards[3].name}.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    (tmp_path / ".index" / ".left.parquet.1.partial").touch()
    second = index(tmp_path)
    assert (second.scanned, second.shards) == (4, 4)
    held = {row.key for row in rows(tmp_path)}
    assert "extra" in held and not held & set(list(samples)[0::4])
    assert sorted(path.name for path in (tmp_path / ".index").iterdir()) == sorted(
        f"{path.name}.parquet" for path in tmp_path.glob("*.tar")
    )
    # what was in quarantine stays there though its shard is not read again
    assert index(tmp_path).scanned == 0 and {row["shard"] for row in quarantined(tmp_path)} == {shards[1].name}


def test_the_first_shard_of_a_sample_wins_and_another_takes_its_place(
    tmp_path: Path, samples: dict[str, Members]
) -> None:
    key, *others = samples
    write(tmp_path, {key: samples[key]}, "a")
    write(tmp_path, {key: changed(samples[key], {"caption": "second"}), others[0]: samples[others[0]]}, "b")
    index(tmp_path)
    assert [(row.shard[0], row.key) for row in rows(tmp_path)] == [("a", key), ("b", others[0])]
    next(tmp_path.glob("a*.tar")).unlink()
    made = index(tmp_path)
    assert made.scanned == 0 and not made.faults
    assert next((row.key, row.caption_length) for row in rows(tmp_path)) == (key, len("second"))


def test_indexes_of_several_jobs_become_one(tmp_path: Path, samples: dict[str, Members]) -> None:
    keys = list(samples)
    write(tmp_path, {key: samples[key] for key in keys[:5]}, "a", 2)
    write(tmp_path, {key: samples[key] for key in keys[4:]}, "b", 2)
    whole = index(tmp_path)
    table = (tmp_path / "quarantine.jsonl").read_text()
    for prefix in "ab":
        assert index(tmp_path, shards=f"{prefix}*", name=f"{prefix}.parquet").shards == 2
    jobs = [tmp_path / f"{prefix}.parquet" for prefix in "ba"]
    merged = merge_indexes([*jobs, jobs[0]], tmp_path / INDEX_NAME, most_bad=1.0)
    assert merged.metadata == whole.metadata and merged.shards == 4
    assert (tmp_path / "quarantine.jsonl").read_text() == table and merged.faults == whole.faults
    other = rows(tmp_path, "a.parquet")[:1]
    write_index(tmp_path / "c.parquet", other, RAW)
    with pytest.raises(DataError, match="do not agree on a"):
        merge_indexes([jobs[1], tmp_path / "c.parquet"], tmp_path / INDEX_NAME)
    write_index(tmp_path / "c.parquet", other, RAW.model_copy(update={"corpus": "other"}))
    with pytest.raises(DataError, match="differ in corpus"):
        merge_indexes([jobs[1], tmp_path / "c.parquet"], tmp_path / INDEX_NAME)
    with pytest.raises(DataError, match="of the folder"):
        merge_indexes([jobs[1]], tmp_path / "elsewhere" / INDEX_NAME)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1), part=st.integers(-3, 3))
@example(fraction=0.0, part=0)
@example(fraction=1.0, part=-1)
def test_of_a_tar_cut_anywhere_exactly_the_whole_samples_are_indexed(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, Members], fraction: float, part: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    keys = list(samples)[:3]
    write(folder, {key: samples[key] for key in keys})
    write(folder, {keys[-1]: samples[keys[-1]]}, "b")  # so that there is always something to index
    shard = folder / "a0-000000.tar"
    data = shard.read_bytes()
    with tarfile.open(shard) as archive:  # an independent reader of the offsets
        ends: dict[str, int] = {}
        for member in archive:
            ends[member.name.partition(".")[0]] = member.offset_data + member.size
    # cuts near the samples' ends, and anywhere
    near = sorted(ends.values())[round(fraction * 2)] + part
    cut = near if part else round(fraction * len(data))
    shard.write_bytes(data[:cut])
    index(folder)
    held = [row for row in rows(folder) if row.shard == shard.name]
    assert [row.key for row in held] == [key for key in keys if ends[key] <= cut]
    for row in held:
        members = read_members(folder, row.shard, row.members)
        assert {name: bytes(view) for name, view in members.items()} == samples[row.key]
        assert sample_checksum(members) == row.checksum
    assert not verify_index(folder / INDEX_NAME, silent).faults


def test_folders_without_shards_and_commands_without_buckets_say_what_to_do(
    tmp_path: Path, samples: dict[str, Members]
) -> None:
    with pytest.raises(DataError, match="is no folder"):
        index(tmp_path / "missing")
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(DataError, match=r"a\.tar\.gz.*unpack them"):
        index(tmp_path)
    write(tmp_path, samples)
    with pytest.raises(DataError, match="no buckets"):
        index(tmp_path, buckets=[])
    with pytest.raises(DataError, match=r"no shard z\*\.tar"):
        index(tmp_path, shards="z*")


def test_latents_that_do_not_fit_their_sample_are_left_out(tmp_path: Path, samples: dict[str, Members]) -> None:
    from domainshuttle.pipelines.sample import SampleInfo
    from domainshuttle.pipelines.shards.tensors import EncodedSample

    info = SampleInfo.from_json(next(iter(samples.values()))["json"])
    target, text = np.zeros((16, 1, 4, 4), np.uint16), np.zeros((7, 8), np.uint16)
    latents = [np.zeros((16, 4, 4), np.uint16) for _ in info.references]
    good = EncodedSample("good", info, target, latents, text).members()
    wrong = {
        "shape": {
            **EncodedSample("s", info, target, [latents[0], *(one[:, :2] for one in latents[1:])], text).members()
        },
        "cut": {**good, "safetensors": bytes(good["safetensors"])[:-2]},
        "npy": {**good, "npy": b"\x93NUMPY"},
        "none": {"json": good["json"]},
    }
    with ShardWriter(tmp_path, "e", 1 << 20) as writer:
        for key, members in {"good": good, **wrong}.items():
            writer.write(key, members)
    made = index(tmp_path, metadata=IndexMetadata(corpus="m", stage="encoded", encoders={"video": "x"}), buckets=[])
    assert made.faults == {"bad tensors": 2, "unknown file": 1, "missing target": 1}
    (row,) = rows(tmp_path)
    assert (row.key, row.bucket, row.text_tokens) == ("good", "1x32x32", 7)
