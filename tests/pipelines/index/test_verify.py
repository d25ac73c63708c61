"""Verifying: a corpus that was damaged after it was indexed is never called whole.

Run: python -m pytest tests/pipelines/index/test_verify.py
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.index.verify import Verified, verify_index
from domainshuttle.pipelines.media.decode import encode_jpeg
from domainshuttle.pipelines.sample import SampleInfo
from domainshuttle.pipelines.shards.scan import fault_kind
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.shards.tensors import EncodedSample

pytestmark = pytest.mark.usefixtures("ray_cluster")

Members = dict[str, Any]
FPS = 4.0
FRAMES = 5


def silent(*_: Any) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def samples() -> dict[str, tuple[Members, SampleInfo]]:
    """Six pictures and three clips of nine frames at 8 fps: key to members and description."""
    made = {}
    for kind, count in (("image", 6), ("video", 3)):
        builder = SpritesBuilder(SpritesConfig(kind=kind, samples=count, identities=72, side=48), "sprites")
        made |= {f"{kind}{number}": (one.members(), one.info) for number, one in enumerate(builder.build(0, count))}
    return made


def corpus(folder: Path, samples: dict[str, tuple[Members, SampleInfo]], **changes: Members) -> list[IndexRow]:
    """Shards of three samples, and their index; `changes` are members to put in before writing."""
    with ShardWriter(folder, "a", 1 << 30) as writer:
        for number, (key, (members, _)) in enumerate(samples.items()):
            if number % 3 == 0:
                writer.finish()
            writer.write(key, {**members, **changes.get(key, {})})
    rows = [
        IndexRow.of(entry, samples[entry.key][1], "1x32x32" if "image" in entry.key else f"{FRAMES}x32x32")
        for entry in writer.entries
    ]
    index(folder, rows)
    return rows


def index(folder: Path, rows: list[IndexRow], **changes: Any) -> None:
    write_index(folder / "index.parquet", rows, IndexMetadata(corpus="c", stage="raw", fps=FPS, **changes))


def verify(folder: Path, decode: int | None = None, **options: Any) -> Verified:
    return verify_index(folder / "index.parquet", silent, decode=decode, **options)


def faults(folder: Path) -> dict[str, str]:
    """Key to kind, as they are in the file."""
    found = [json.loads(line) for line in (folder / "verify.jsonl").read_text().splitlines()]
    assert all(row["shard"] and row["source"] for row in found)
    return {row["key"]: fault_kind(row["reason"]) for row in found}


def member(rows: list[IndexRow], key: str, extension: str) -> tuple[str, int, int]:
    row = next(row for row in rows if row.key == key)
    found = next(one for one in row.members if one.extension == extension)
    return row.shard, found.offset, found.size


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_whole_corpus_is_called_whole(tmp_path: Path, samples: dict[str, tuple[Members, SampleInfo]]) -> None:
    rows = corpus(tmp_path, samples)
    seen: list[tuple[int, int]] = []
    found = verify_index(tmp_path / "index.parquet", lambda done, total: seen.append((done, total)), decode=4)
    assert (found.samples, found.decoded, found.shards, found.bad_samples) == (9, 4, 3, 0) and not found.faults
    assert found.read_bytes == sum(one.size for row in rows for one in row.members)
    assert seen[-1] == (9, 9) and len(seen) == 3
    assert found.path.read_text() == "" and sorted(path.name for path in tmp_path.iterdir()) == [
        "a-000000.tar",
        "a-000001.tar",
        "a-000002.tar",
        "index.parquet",
        "verify.jsonl",
    ]
    with ShardWriter(tmp_path, "new", 1 << 20) as writer:
        writer.write("later", samples["image0"][0])
    some = verify(tmp_path, where="kind == 'video'")
    assert (some.samples, some.decoded, some.unindexed) == (3, 3, ("new-000000.tar",))
    with pytest.raises(DataError, match="no sample for which"):
        verify(tmp_path, where="frames > 100")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_sample_is_found(
    tmp_path_factory: pytest.TempPathFactory,
    samples: dict[str, tuple[Members, SampleInfo]],
    place: float,
    bit: int,
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    rows = corpus(folder, dict(list(samples.items())[:2]))
    places = [(row.key, one.offset + n) for row in rows for one in row.members for n in range(one.size)]
    key, offset = places[int(place * len(places))]
    shard = folder / rows[0].shard
    overwrite(shard, offset, bytes([shard.read_bytes()[offset] ^ 1 << bit]))
    found = verify(folder, decode=0)
    assert found.bad_samples == 1 and faults(folder) == {key: "checksum differs"}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1))
@example(fraction=0.0)
def test_every_cut_of_a_shard_is_found(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, tuple[Members, SampleInfo]], fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    rows = corpus(folder, dict(list(samples.items())[:3]))
    shard = folder / rows[0].shard
    end = rows[-1].members[-1].offset + rows[-1].members[-1].size
    cut = round(fraction * end)
    shard.write_bytes(shard.read_bytes()[:cut])
    lost = [row.key for row in rows if row.members[-1].offset + row.members[-1].size > cut]
    found = verify(folder, decode=0, checksums=False)
    assert faults(folder) == dict.fromkeys(lost, "outside shard") and found.bad_samples == len(lost)


def test_damage_is_named_by_kind(tmp_path: Path, samples: dict[str, tuple[Members, SampleInfo]]) -> None:
    picture, clip = bytes(samples["image1"][0]["jpg"]), bytes(samples["video0"][0]["mp4"])
    small = encode_jpeg(np.zeros((40, 48, 3), np.uint8))
    rows = corpus(
        tmp_path,
        samples,
        image1={"jpg": picture[: len(picture) // 2]},
        image2={"jpg": small},
        image3={"ref0.jpg": b"no picture"},
        image4={"ref1.jpg": small},
        video0={"mp4": clip[: len(clip) // 3]},
        video1={"mp4": picture},
    )
    # the index that was made of them is right: only decoding tells
    assert not verify(tmp_path, decode=0).faults
    found = verify(tmp_path)
    assert faults(tmp_path) == {
        "image1": "undecodable target",
        "image2": "wrong size",
        "image3": "undecodable reference",
        "image4": "wrong size",
        "video0": "undecodable target",
        "video1": "undecodable target",
    }
    assert (found.bad_samples, found.bad_shards) == (6, 3)
    assert found.faults == {"undecodable target": 3, "undecodable reference": 1, "wrong size": 2}
    # a shard that is gone counts with all its samples, a folder is left as it was
    (tmp_path / rows[0].shard).unlink()
    gone = verify(tmp_path, decode=0)
    assert gone.faults == {"missing shard": 1} and gone.bad_samples == 3


CHANGES: list[tuple[str, str, Callable[[IndexRow], IndexRow]]] = [
    ("image0", "index differs", lambda row: replace(row, frames=9)),
    ("image0", "index differs", lambda row: replace(row, domains=tuple(3 for _ in row.domains))),
    ("image0", "index differs", lambda row: replace(row, scores={})),
    ("image0", "index differs", lambda row: replace(row, text_tokens=3)),
    ("image0", "wrong bucket", lambda row: replace(row, bucket="5x32x32")),
    ("video0", "wrong bucket", lambda row: replace(row, bucket="9x32x32")),  # 9 frames at 8 fps are 5 at 4
    ("video0", "wrong bucket", lambda row: replace(row, bucket="1x32x32")),
    ("image0", "checksum differs", lambda row: replace(row, checksum=row.checksum ^ 1)),
    ("image0", "missing reference", lambda row: without(row, "ref1.jpg")),
    ("image0", "missing target", lambda row: without(row, "jpg")),
    ("image0", "missing description", lambda row: without(row, "json")),
    ("image0", "bad description", lambda row: replace(row, members=shifted(row, "json", 3))),
    ("image0", "outside shard", lambda row: replace(row, members=shifted(row, "jpg", 1 << 40))),
    ("image0", "outside shard", lambda row: replace(row, members=shifted(row, "jpg", -(1 << 40)))),
]


def without(row: IndexRow, extension: str) -> IndexRow:
    return replace(row, members=tuple(one for one in row.members if one.extension != extension))


def shifted(row: IndexRow, extension: str, by: int) -> Any:
    return tuple(replace(one, offset=one.offset + by * (one.extension == extension)) for one in row.members)


@pytest.mark.parametrize(("key", "kind", "change"), CHANGES)
def test_an_index_that_does_not_fit_is_found(
    tmp_path: Path,
    samples: dict[str, tuple[Members, SampleInfo]],
    key: str,
    kind: str,
    change: Callable[[IndexRow], IndexRow],
) -> None:
    rows = corpus(tmp_path, samples)
    index(tmp_path, [change(row) if row.key == key else row for row in rows])
    verify(tmp_path, decode=0, checksums=kind == "checksum differs")
    assert faults(tmp_path) == {key: kind}


def test_latents_are_checked_in_full(tmp_path: Path, samples: dict[str, tuple[Members, SampleInfo]]) -> None:
    info = samples["image0"][1]
    random = np.random.default_rng(0)

    def encoded(key: str, **changes: Any) -> EncodedSample:
        values = {
            "target": random.normal(size=(16, 1, 4, 4)),
            "text": random.normal(size=(7, 8)),
            **{f"reference{n}": random.normal(size=(16, 4, 4)) for n in range(len(info.references))},
            **changes,
        }
        bits = {name: torch.from_numpy(value).bfloat16().view(torch.uint16).numpy() for name, value in values.items()}
        references = [bits[f"reference{n}"] for n in range(len(info.references))]
        return EncodedSample(key, info, bits["target"], references, bits["text"])

    spoilt = random.normal(size=(16, 4, 4))
    spoilt[3, 2, 1] = np.nan
    made = {
        "good": encoded("good"),
        "nan": encoded("nan", reference1=spoilt),
        "inf": encoded("inf", text=np.full((7, 8), np.inf)),
        "size": encoded("size", reference0=random.normal(size=(16, 4, 2))),
        "bucket": encoded("bucket", target=random.normal(size=(16, 2, 4, 4))),
        "tokens": encoded("tokens", text=random.normal(size=(6, 8))),
    }
    with ShardWriter(tmp_path, "e", 1 << 30) as writer:
        for key, sample in made.items():
            writer.write(key, sample.members())
    rows = [IndexRow.of(entry, info, "1x32x32", 7) for entry in writer.entries]
    metadata = IndexMetadata(corpus="c", stage="encoded", encoders={"video": "x"})
    write_index(tmp_path / "index.parquet", rows, metadata)
    verify(tmp_path)
    assert faults(tmp_path) == {
        "nan": "not finite",
        "inf": "not finite",
        "size": "bad tensors",
        "bucket": "wrong bucket",
        "tokens": "index differs",
        "": "missing file",  # of the empty caption
    }
    (tmp_path / EMPTY_CAPTION_NAME).write_bytes(b"")
    verify(tmp_path)
    assert "" not in faults(tmp_path)
    assert "1 of 256 values of reference.1" in (tmp_path / "verify.jsonl").read_text()


def test_an_index_that_is_not_whole_is_refused(tmp_path: Path, samples: dict[str, tuple[Members, SampleInfo]]) -> None:
    corpus(tmp_path, samples)
    path = tmp_path / "index.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="index the shards again"):
        verify(tmp_path)
