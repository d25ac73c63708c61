"""Storage, against a real S3 server (moto's) on loopback, behind a proxy that counts requests and injects faults.

Run: python -m pytest tests/pipelines/storage/test_files.py
"""

import dataclasses
import itertools
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_s3 import QUICK, Proxy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora.builder import PartJob, build_part
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.corpora.survey import Survey
from domainshuttle.pipelines.encoding.sample_encoder import encode_rows, load_encoders
from domainshuttle.pipelines.errors import DataError, MissingError, StorageError
from domainshuttle.pipelines.index.build import Indexed, index_folder, merge_indexes
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, INDEX_NAME, Parts
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.index.verify import verify_index
from domainshuttle.pipelines.loading.loader import Loader
from domainshuttle.pipelines.loading.reader import MicroBatch
from domainshuttle.pipelines.plan.feed import EncoderSources, Feed, planned_rows
from domainshuttle.pipelines.shards.scan import Fault, fault_kind, scan_shard
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.shards.tensors import EncodedSample
from domainshuttle.pipelines.storage import files as storage
from domainshuttle.pipelines.storage.files import (
    coalesce,
    delete,
    exists,
    free_bytes,
    list_dated,
    list_files,
    open_file,
    read_bytes,
    read_ranges,
    size,
    write_bytes,
    write_file,
    writing,
)
from domainshuttle.pipelines.storage.filesystems import opened
from domainshuttle.pipelines.storage.retry import Limits
from domainshuttle.pipelines.storage.uri import holds_keys, is_remote, join, name_of, parent, redacted, require_local
from domainshuttle.platform.commands import data_index as data_checks
from domainshuttle.platform.config.schema import ConfigError

DATA = os.urandom(6 << 20)
FAULTS = [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests"), (408, "RequestTimeout"), "reset", "cut"]


@pytest.fixture
def held(store: Proxy, request: pytest.FixtureRequest) -> str:
    """DATA in the store, at a place of its own, whose size is known."""
    place = store.uri(f"held/{abs(hash(request.node.name))}.bin")
    write_bytes(place, DATA)
    read_ranges(place, [(0, 1)])
    store.forget()
    return place


@pytest.mark.parametrize("kind", ["path", "text", "file", "store", "variables"])
def test_places_are_alike_wherever_they_are(
    kind: str, store: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "variables":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{store.port}")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
    places = {
        "path": tmp_path, "text": str(tmp_path), "file": f"file://{tmp_path}",
        "store": store.uri(kind), "variables": f"s3://bucket/{kind}",
    }  # fmt: skip
    place: storage.Location = places[kind]
    assert is_remote(place) == (kind in ("store", "variables"))
    large = tmp_path / "large"
    large.write_bytes(DATA * 3)
    if kind != "store":
        store.always = (503, "SlowDown") if kind in ("path", "text", "file") else None
    base = join(place, "made here")
    assert list_files(base) == [] and not exists(base)
    write_bytes(join(base, "a b/c=1+2%.txt"), b"first")
    write_bytes(join(base, "a b/c=1+2%.txt"), b"second")
    write_bytes(join(base, "empty"), b"")
    write_file(large, join(base, "deep/er/large"))
    assert list_files(base) == [("a b/c=1+2%.txt", 6), ("deep/er/large", len(DATA) * 3), ("empty", 0)]
    inner = join(base, "a b/c=1+2%.txt")
    assert read_bytes(inner) == b"second" and size(inner) == 6 and read_bytes(join(base, "empty")) == b""
    assert name_of(inner) == "c=1+2%.txt" and read_bytes(join(parent(inner), "c=1+2%.txt")) == b"second"
    assert read_bytes(join(base, "deep/er/large")) == DATA * 3
    assert [bytes(one) for one in read_ranges(inner, [(4, 2), (0, 3), (1, 0)])] == [b"nd", b"sec", b""]
    with open_file(inner) as file:
        assert (file.read(2), file.seek(-2, 2), file.read(), file.read()) == (b"se", 4, b"nd", b"")
    assert exists(base) and exists(inner)
    assert (free_bytes(base) is None) == is_remote(place)
    delete(inner)
    delete(inner)
    assert not exists(inner) and [name for name, _ in list_files(base)] == ["deep/er/large", "empty"]
    for ask in (read_bytes, size, open_file, lambda p: read_ranges(p, [(0, 1)])):
        with pytest.raises(MissingError, match="is missing"):
            ask(inner)
    for ask in (lambda p: read_ranges(p, [(len(DATA), 2 * len(DATA) + 1)]), lambda p: read_ranges(p, [(-1, 1)])):
        with pytest.raises(DataError, match=r"not within its|below 0"):
            ask(join(base, "deep/er/large"))


def test_a_large_file_is_asked_for_again_piece_by_piece(store: Proxy, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(DATA * 4)
    store.fail("PUT", (503, "SlowDown"), None, "reset")
    write_file(tmp_path / "large", store.uri("pieces"))
    pieces = {path for method, path, _ in store.requests if method == "PUT"}
    assert len(pieces) > 1 and store.count("PUT") == len(pieces) + 2 and store.count("POST") == 2
    store.always = (403, "AccessDenied")
    with pytest.raises(StorageError, match=r"uploading .*large was refused: .*ACCESS_DENIED"):
        write_file(tmp_path / "large", store.uri("pieces"))
    store.forget()
    assert read_bytes(store.uri("pieces")) == DATA * 4


@pytest.mark.parametrize("remote", [False, True])
def test_a_copy_that_fails_half_way_leaves_nothing(remote: bool, store: Proxy, tmp_path: Path) -> None:
    place = store.uri("never") if remote else tmp_path / "out" / "never"
    with pytest.raises(OSError, match="Input/output error"):
        write_file(Path("/proc/self/mem"), place)  # which can be opened, but not be read from its beginning
    assert not exists(place)
    assert list_files(parent(place)) == [] or remote


def test_neighbours_are_one_request_and_the_object_is_opened_once(held: str, store: Proxy) -> None:
    ranges = [(3 << 20, 1000), (5, 70), (2000, 1 << 20), (100, 1500)]
    for _ in range(3):
        store.requests.clear()
        assert [bytes(one) for one in read_ranges(held, ranges)] == [DATA[at : at + n] for at, n in ranges]
        assert store.ranges() == [(5, 2000 + (1 << 20) - 1), (3 << 20, (3 << 20) + 999)]
        assert store.count("HEAD") == 0


def test_requests_have_a_largest_size(held: str, store: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST", 1 << 20)
    ranges = [(at, 300_000) for at in range(0, 3_000_000, 300_000)]
    assert [bytes(one) for one in read_ranges(held, ranges)] == [DATA[at : at + n] for at, n in ranges]
    assert store.count("GET") == 4
    store.requests.clear()
    assert bytes(read_ranges(held, [(7, 2_500_000)])[0]) == DATA[7:2_500_007]
    assert max(last - first for first, last in store.ranges()) < 1 << 20 and store.count("GET") == 3


@given(
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 40)), max_size=12), st.integers(0, 12), st.integers(1, 50)
)
def test_coalescing_against_brute_force(ranges: list[tuple[int, int]], gap: int, most: int) -> None:
    requests = coalesce(ranges, gap, most)
    assert sorted(number for one in requests for number in one.ranges) == list(range(len(ranges)))
    for one in requests:
        inner = [ranges[number] for number in one.ranges]
        assert one.offset == min(at for at, _ in inner) and one.offset + one.size == max(at + n for at, n in inner)
        assert one.size <= most or any(n == one.size for _, n in inner)
        wanted = {byte for at, n in inner for byte in range(at, at + n)} | {at for at, _ in inner}
        idle = longest = 0
        for byte in range(one.offset, one.offset + one.size):
            idle = 0 if byte in wanted else idle + 1
            longest = max(longest, idle)
        assert longest <= gap
    for left, right in itertools.pairwise(requests):
        end = left.offset + left.size
        assert right.offset > end + gap or max(end, right.offset + right.size) - left.offset > most


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again_and_gives_the_same_bytes(fault: Any, held: str, store: Proxy) -> None:
    store.fail("GET", fault, fault, fault)
    assert bytes(read_ranges(held, [(11, 900_000)])[0]) == DATA[11:900_011]
    assert store.count("GET") == 4
    if fault != "cut":  # these have no body
        place = store.uri(f"faults/{fault}".replace(" ", ""))
        store.fail("PUT", fault, fault)
        store.fail("HEAD", fault)
        write_bytes(place, b"whole")
        assert read_bytes(place) == b"whole"
        assert (store.count("PUT"), store.count("HEAD")) == (3, 2)


def test_an_answer_that_trickles_is_asked_for_again(held: str, store: Proxy) -> None:
    """A byte now and then keeps a connection from being idle; the answer would take 15 s, and would not be whole."""
    store.fail("GET", "trickle")
    began = time.monotonic()
    assert bytes(read_ranges(held, [(0, 1000)])[0]) == DATA[:1000]
    assert time.monotonic() - began < 6 and store.count("GET") == 2


def test_an_answer_that_does_not_come_is_asked_for_again(held: str, store: Proxy) -> None:
    store.fail("GET", 5.0)
    began = time.monotonic()
    assert bytes(read_ranges(held, [(0, 1000)])[0]) == DATA[:1000]
    assert time.monotonic() - began < 4 and store.count("GET") == 2


@pytest.mark.parametrize("fault", [(503, "SlowDown"), "reset", "cut", "refused"])
def test_an_outage_ends_with_one_error(fault: Any, held: str, store: Proxy) -> None:
    place = held.replace(str(store.port), "1") if fault == "refused" else held
    store.always = fault
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"failed 4 times in \d+ s.*The store is down") as caught:
        read_ranges(place, [(0, 1000)])
    assert time.monotonic() - began < 20  # not the minutes that the limits of a run allow
    assert not isinstance(caught.value, DataError)
    assert store.count("GET") == (0 if fault == "refused" else 4)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.place, again.attempts, str(again)) == (redacted(held), 4, str(caught.value))
    assert again.reason and again.reason in str(again) and str(again).startswith("s3://bucket/held/")


@pytest.mark.parametrize("fault", [(503, "SlowDown"), "trickle"])
def test_the_time_limit_holds_whatever_the_store_does(
    fault: Any, held: str, store: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        storage, "LIMITS", Limits(attempts=1000, total_seconds=1.5, first_wait=0.05, longest_wait=0.1, stall_seconds=5)
    )
    store.always = fault
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"failed \d+ times in [12] s"):
        read_ranges(held, [(0, 1000)])
    assert 1.0 < time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("fault", "error"), [((403, "AccessDenied"), StorageError), ((404, "NoSuchKey"), MissingError)]
)
def test_what_lasts_is_not_tried_again(fault: Any, error: type[Exception], held: str, store: Proxy) -> None:
    store.always = fault
    with pytest.raises(error, match=r"was refused: .*ACCESS_DENIED|is missing"):
        read_ranges(held, [(0, 10_000)])
    assert store.count("GET") == 1
    store.requests.clear()
    with pytest.raises(error):
        read_ranges(held, [(0, 10)])  # pyarrow has no room for the answer's text
    assert store.count("GET") + store.count("HEAD") <= 2
    store.requests.clear()
    with pytest.raises(error):
        read_bytes(held)
    assert (store.count("HEAD"), store.count("GET")) == (1, 0)
    assert not (error is StorageError and issubclass(error, DataError))


def test_an_object_that_became_shorter_is_bad_data(held: str, store: Proxy) -> None:
    filesystem, path = opened(held, QUICK)
    with filesystem.open_output_stream(path) as another:  # not by write_bytes, which would know
        another.write(DATA[:1000])
    with pytest.raises(DataError, match="100 bytes at byte 5000 are not within its 1000: it was cut short"):
        read_ranges(held, [(5000, 100)])
    assert bytes(read_ranges(held, [(900, 100)])[0]) == DATA[900:1000]


def test_no_request_waits_for_another(store: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LIMITS", Limits(attempts=1))
    places = [store.uri(f"threads/{number}") for number in range(4)]
    for place in places:
        write_bytes(place, DATA[:10_000])
    together = threading.Barrier(8)  # a request is answered when all eight are there, be it to open or to read
    store.always = together
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: bytes(read_ranges(places[n % 4], [(n, 5000)])[0]), range(8)))
    assert found == [DATA[n : n + 5000] for n in range(8)]
    assert not together.broken and store.count("GET") == store.count("HEAD") == 8


@pytest.mark.parametrize(
    ("make", "secret"),
    [
        (lambda s: s.uri("x", keys="AKIAUSER:se%2Fcret@"), "cret"),
        (lambda s: s.uri("x", keys="AKIAUSER:se/cret@"), "cret"),
        (lambda s: s.uri("x", keys="AKIAUSER:secret@") + "&nonsense=1", "secret"),
        (lambda s: f"abfs://AKIAUSER:secret@bucket/x?client_secret=secret&port={s.port}", "secret"),
    ],
)
def test_access_keys_are_in_no_message(make: Callable[[Proxy], str], secret: str, store: Proxy) -> None:
    place = make(store)
    assert holds_keys(place) and secret not in redacted(place) and "AKIAUSER" not in redacted(place)
    store.always = (403, "AccessDenied")
    for ask in (read_bytes, exists, lambda p: write_bytes(p, b"1"), lambda p: require_local(p, "building")):
        with pytest.raises((StorageError, DataError)) as caught:
            ask(join(place, "more"))
        assert secret not in str(caught.value) and "AKIAUSER" not in str(caught.value)
        assert caught.value.__cause__ is None
    for plain in (store.uri("x"), "/home/a@b/c", "s3://bucket/a@b/c"):
        assert not holds_keys(plain)


def test_keys_of_the_uri_are_used(store: Proxy) -> None:
    place = store.uri("own-keys", keys="AKIAUSER:se%2Fcret@")
    write_bytes(place, b"mine")
    assert read_bytes(place) == b"mine"


SOURCES = EncoderSources("block-dct", "byte-umt5", 48)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 encoded pictures in three shards, in a local folder."""
    folder = tmp_path_factory.mktemp("corpus")
    parts = Parts(folder / "raw", 1, "test")
    parts.begin()
    config = SpritesConfig(kind="image", samples=24, identities=72, side=48, seed=4)
    source = SpritesBuilder(config, "pictures")
    survey = Survey(folder / "survey", tuple(source.pieces()))
    survey.take(0, source)
    job = PartJob("pictures", config, survey, [parse_bucket("1x32x32")], 1 << 30)
    build_part(parts, 0, job, survey.select(None)[0])
    parts.merge(IndexMetadata(corpus="pictures", stage="raw"))
    video, text = load_encoders(SOURCES)
    infos = {}
    with ShardWriter(folder / "encoded", "part", 50_000) as writer:
        for row, sample in encode_rows(Index.load(parts.index_path).rows(range(24)), video, text):
            assert isinstance(sample, EncodedSample)
            writer.write(sample.key, sample.members())
            infos[sample.key] = sample.info, row.bucket, len(sample.text), sample.whole_caption_tokens
    assert len(writer.shards) >= 3
    rows = [IndexRow.of(entry, *infos[entry.key]) for entry in writer.entries]
    write_index(folder / "encoded" / INDEX_NAME, rows, IndexMetadata(corpus="pictures", stage="encoded"))
    save_file({"text": text.encode([""])[0].to(torch.bfloat16).contiguous()}, folder / "encoded" / EMPTY_CAPTION_NAME)
    return folder / "encoded"


@pytest.fixture
def uploaded(corpus: Path, store: Proxy, request: pytest.FixtureRequest) -> storage.Location:
    """The corpus in the store, at a place of its own."""
    place = store.uri(f"corpora/{request.node.name}")
    for name, _ in list_files(corpus):
        write_file(corpus / name, join(place, name))
    store.forget()
    return place


def loader(place: storage.Location, quarantine: Path, **changes: Any) -> Loader[Any]:
    """A rank's loader of three steps, with the planned rows in Ray's place."""
    feed = Feed(
        shares=(CorpusShare("pictures", str(join(place, INDEX_NAME)), 1.0),), seed=9, global_batch=8, micro_batch=4,
        text_len=48, references=3, paired=True, **changes,
    )  # fmt: skip

    return Loader([planned_rows(feed, 0, 3, 0, 1)], feed, 0, 1, quarantine)


def same(left: MicroBatch[Any], right: MicroBatch[Any]) -> bool:
    names = [field.name for field in dataclasses.fields(left.batch)]
    pairs = [(getattr(left.batch, name), getattr(right.batch, name)) for name in names]
    equal = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs]
    return left.keys == right.keys and all(equal)


def test_batches_from_the_store_are_those_from_the_disk(
    corpus: Path, uploaded: storage.Location, store: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = list(loader(corpus, tmp_path / "q"))
    assert len(local) == 6 and local[0].batch.has_pairs
    monkeypatch.setattr(storage, "LIMITS", dataclasses.replace(QUICK, attempts=12))
    store.fail("GET", *[None, (503, "SlowDown"), "reset", "cut"] * 4)  # the index, the caption and samples
    store.fail("HEAD", None, (500, "InternalError"), "reset")
    remote = list(loader(uploaded, tmp_path / "q"))
    assert all(same(a, b) for a, b in zip(local, remote, strict=True))
    assert not (tmp_path / "q").exists() and not store.faults["GET"]
    # the samples, the faults, the index (to map it, and by both threads for the plan), the caption
    assert store.count("GET") <= 24 + 12 + 10 + 1


def test_an_outage_blames_no_sample(uploaded: storage.Location, store: Proxy, tmp_path: Path) -> None:
    made = loader(uploaded, tmp_path / "q", text_dropout=0.1)
    store.always = (503, "SlowDown")
    with pytest.raises(StorageError, match="failed 4 times"):
        list(made)
    assert not (tmp_path / "q").exists()
    with pytest.raises(StorageError, match="failed 4 times"):
        loader(uploaded, tmp_path / "q", text_dropout=0.2)  # which reads the caption anew
    store.forget()
    assert len(list(loader(uploaded, tmp_path / "q", text_dropout=0.1))) == 6


def test_a_shard_that_is_missing_or_cut_costs_its_samples(
    corpus: Path, uploaded: storage.Location, store: Proxy, tmp_path: Path
) -> None:
    first, second, *_ = sorted(name for name, _ in list_files(corpus) if name.endswith(".tar"))
    delete(join(uploaded, first))
    write_bytes(join(uploaded, second), (corpus / second).read_bytes()[:12_000])
    made = loader(uploaded, tmp_path / "q")
    made.most_bad = 1.0
    assert sum(len(micro.keys) for micro in made) == 24
    reasons = {(line["shard"], line["reason"]) for line in map(json.loads, (tmp_path / "q").read_text().splitlines())}
    assert any(shard == first and "is missing" in reason for shard, reason in reasons)
    assert any(shard == second and "cut short" in reason for shard, reason in reasons)
    assert {shard for shard, _ in reasons} <= {first, second}


def test_an_index_is_read_as_from_the_disk(
    corpus: Path, uploaded: storage.Location, store: Proxy, tmp_path: Path
) -> None:
    local, remote = Index.load(corpus / INDEX_NAME), Index.load(join(uploaded, INDEX_NAME))
    assert store.count("GET") <= 3
    assert (remote.digest, remote.parts, len(remote)) == (local.digest, local.parts, 24)
    assert remote.row(3).folder == uploaded and redacted(uploaded) not in local.row(3).folder
    assert Index.load(join(uploaded, INDEX_NAME), ["source", "bucket"]).column("source").tolist() == ["pictures"] * 24
    store.always = (503, "SlowDown")
    with pytest.raises(StorageError):
        Index.load(join(uploaded, INDEX_NAME))
    store.forget()
    with pytest.raises(DataError, match=r"corpora/.*none.parquet is missing"):
        Index.load(join(uploaded, "none.parquet"))
    write_bytes(join(uploaded, INDEX_NAME), (corpus / INDEX_NAME).read_bytes()[:-100])
    with pytest.raises(DataError, match=r"index s3://bucket/corpora/.* can't be read"):
        Index.load(join(uploaded, INDEX_NAME))


def test_a_shard_is_scanned_as_from_the_disk(corpus: Path, store: Proxy, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "part", 1 << 30) as writer:
        for number in range(12):
            writer.write(f"k{number}", {"json": b"{}", "bin": DATA[: 2_500_000 + number]})
    name = writer.shards[0]
    place, total = store.uri(f"scanned/{name}"), (tmp_path / name).stat().st_size
    write_file(tmp_path / name, place)
    store.forget()
    store.fail("GET", None, "cut", (503, "SlowDown"))
    assert list(scan_shard(place)) == list(scan_shard(tmp_path / name)) == writer.entries
    lengths = [last - first + 1 for first, last in store.ranges()]
    assert max(lengths) <= 8 << 20 and sum(lengths) < total + 3 * (8 << 20)  # once, but for what failed
    store.always = (503, "SlowDown")
    with pytest.raises(StorageError):
        list(scan_shard(place))
    store.forget()
    write_bytes(place, (tmp_path / name).read_bytes()[:9_000_000])
    found = list(scan_shard(place))
    assert found[:3] == writer.entries[:3] and isinstance(found[-1], Fault) and "cut shard" in found[-1].reason


def test_a_file_is_at_its_place_only_when_it_was_written_whole(store: Proxy, tmp_path: Path) -> None:
    for place in (store.uri("written/file"), tmp_path / "folder" / "file"):
        with pytest.raises(ZeroDivisionError), writing(place) as aside:
            aside.write_bytes(b"half")
            raise ZeroDivisionError
        assert not exists(place) and not list_files(parent(place))
        with writing(place) as aside:
            aside.write_bytes(DATA)
        ((name, held, changed),) = list_dated(parent(place))
        assert (name, held) == ("file", len(DATA)) and read_bytes(place) == DATA
        assert abs(changed / 1e9 - time.time()) < 3600
        write_bytes(join(place, "deeper") if is_remote(place) else tmp_path / "folder" / "in" / "it", b"1")
        assert len(list_dated(parent(place))) == 1 and len(list_files(parent(place))) == 2


RAW, BUCKETS = IndexMetadata(corpus="mine", stage="raw"), [parse_bucket("1x32x32"), parse_bucket("5x32x32")]
KEYS = "AKIAUSER:se%2Fcret@"  # in the URI, so that Ray's workers, which were started without them, have them too


@pytest.fixture(scope="module")
def raw_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of pictures, one of clips, in a local folder."""
    folder = tmp_path_factory.mktemp("raw-shards")
    for number, kind in enumerate(("image", "image", "image", "video")):
        config = SpritesConfig(kind=kind, samples=16, identities=72, side=48, frames=5)
        builder = SpritesBuilder(config, "sprites")
        with ShardWriter(folder, f"{kind}{number}", 1 << 30) as writer:
            for sample in builder.build(4 * number, 4 * number + 4):
                writer.write(f"{kind}-{sample.key}", sample.members())
    return folder


@pytest.fixture
def raw_place(raw_shards: Path, store: Proxy, request: pytest.FixtureRequest) -> str:
    """The shards in the store, at a place of its own."""
    place = store.uri(f"raw/{request.node.name}", keys=KEYS)
    for name, _ in list_files(raw_shards):
        if name.endswith(".tar"):
            write_file(raw_shards / name, join(place, name))
    store.forget()
    return place


def indexed(folder: storage.Location, most_bad: float = 1.0, **options: Any) -> Indexed:
    return index_folder(folder, RAW, BUCKETS, lambda *_: None, most_bad, **options)


def verified(folder: storage.Location, **options: Any) -> Any:
    return verify_index(join(folder, INDEX_NAME), lambda *_: None, **options)


def lines(place: storage.Location) -> list[dict[str, str]]:
    return [json.loads(line) for line in read_bytes(place).splitlines()]


@pytest.mark.usefixtures("ray_cluster")
def test_shards_in_the_store_are_indexed_and_verified_as_on_the_disk(
    raw_shards: Path, raw_place: str, store: Proxy
) -> None:
    local = indexed(raw_shards)
    store.fail("GET", None, (503, "SlowDown"), "reset", "cut", None, (500, "InternalError"))
    store.fail("HEAD", (503, "SlowDown"), None, "reset")
    store.fail("PUT", (503, "SlowDown"))
    remote = indexed(raw_place)
    assert not any(store.faults.values())
    assert (remote.metadata, remote.samples, remote.scanned) == (local.metadata, 16, 4)
    here, there = Index.load(raw_shards / INDEX_NAME), Index.load(join(raw_place, INDEX_NAME))
    assert there.digest == here.digest and there.row(0).folder == raw_place
    assert read_bytes(join(raw_place, "quarantine.jsonl")) == b""
    parts = sorted(name for name, _ in list_files(raw_place) if name.startswith(".index/"))
    assert parts == sorted(f".index/{name}.parquet" for name in here.codes("shard")[1])
    # of what is unchanged no shard is read, and other buckets need none
    store.forget()
    assert indexed(raw_place).scanned == 0
    assert index_folder(raw_place, RAW, BUCKETS[:1], lambda *_: None, 1.0).scanned == 0
    assert indexed(raw_place).scanned == 0
    assert not [path for method, path, _ in store.requests if method == "GET" and path.endswith(".tar")]
    # all bytes of a shard in one request
    store.forget()
    store.fail("GET", "cut", (503, "SlowDown"), "reset")
    found = verified(raw_place, decode=None)
    assert (found.samples, found.decoded, found.shards, found.unindexed) == (16, 16, 4, ()) and not found.faults
    assert found.read_bytes == verified(raw_shards, decode=None).read_bytes
    tars = [path for method, path, _ in store.requests if method == "GET" and ".tar" in path]
    assert len(tars) <= 4 + 3
    assert read_bytes(join(raw_place, "verify.jsonl")) == b""


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_wrong_in_the_store_is_named_and_only_what_changed_is_read(
    raw_shards: Path, raw_place: str, store: Proxy
) -> None:
    indexed(raw_place)
    _, second, third, clips = sorted(path.name for path in raw_shards.glob("*.tar"))
    rows = Index.load(join(raw_place, INDEX_NAME)).rows(range(16))
    whole = (raw_shards / second).read_bytes()
    cut = next(row.members[-1].offset for row in rows if row.shard == second and row.members[0].offset > 600)
    write_bytes(join(raw_place, second), whole[:cut])
    flipped = bytearray((raw_shards / third).read_bytes())
    picture = next(row for row in rows if row.shard == third)
    target = next(member for member in picture.members if member.extension == "jpg")
    flipped[target.offset + 40] ^= 1
    write_bytes(join(raw_place, third), flipped)
    delete(join(raw_place, clips))
    write_bytes(join(raw_place, "extra.tar"), whole)
    found = verified(raw_place)
    kinds = {(row["shard"], row["key"], fault_kind(row["reason"])) for row in lines(join(raw_place, "verify.jsonl"))}
    lost = [row.key for row in rows if row.shard == second and row.members[-1].offset + row.members[-1].size > cut]
    expected = {(second, key, "outside shard") for key in lost}
    assert kinds == expected | {(third, picture.key, "checksum differs"), (clips, "", "missing shard")}
    assert found.unindexed == ("extra.tar",) and found.bad_samples == len(lost) + 1 + 4
    # `third` has another time, or the same where a test is done within a second of it
    made = indexed(raw_place)
    assert 2 <= made.scanned <= 3 and made.shards == 4
    reasons = {row["shard"]: row["reason"] for row in lines(join(raw_place, "quarantine.jsonl")) if not row["key"]}
    assert "cut shard" in reasons[second]
    assert f".index/{clips}.parquet" not in {name for name, _ in list_files(raw_place)}
    text = b"".join(read_bytes(join(raw_place, name)) for name in ("quarantine.jsonl", "verify.jsonl"))
    assert b"cret" not in text and b"AKIA" not in text
    with pytest.raises(DataError, match=r"s3://bucket/raw/.* are bad, at most 1%") as caught:
        indexed(raw_place, most_bad=0.01)
    assert "cret" not in str(caught.value) and "AKIA" not in str(caught.value)


@pytest.mark.usefixtures("ray_cluster")
def test_a_store_that_refuses_ends_the_work_and_blames_nothing(raw_place: str, store: Proxy) -> None:
    indexed(raw_place, shards="image*")
    held = read_bytes(join(raw_place, INDEX_NAME))
    for work in (indexed, verified):
        store.fail("GET", *[None] * (2 if work is verified else 8), *[(403, "AccessDenied")] * 20)
        with pytest.raises(StorageError, match=r"was refused: .*ACCESS_DENIED") as caught:
            work(raw_place)
        assert "cret" not in str(caught.value) and "AKIA" not in str(caught.value)
        store.forget()
        assert read_bytes(join(raw_place, INDEX_NAME)) == held and not exists(join(raw_place, "verify.jsonl"))
    assert lines(join(raw_place, "quarantine.jsonl")) == []
    store.always = (503, "SlowDown")
    with pytest.raises(StorageError, match="failed 4 times"):
        indexed(raw_place)
    store.forget()
    assert indexed(raw_place).samples == 16 and not verified(raw_place).faults
    with pytest.raises(DataError, match=r"s3://bucket/none: no shard \*\.tar") as wrong:
        indexed(store.uri("none", keys=KEYS))
    assert "cret" not in str(wrong.value)


@pytest.mark.usefixtures("ray_cluster")
def test_jobs_share_shards_in_the_store(raw_place: str) -> None:
    whole = indexed(raw_place)
    for kind in ("image", "video"):
        indexed(raw_place, shards=f"{kind}*", name=f"{kind}.parquet")
    delete(join(raw_place, INDEX_NAME))
    jobs = [join(raw_place, "video.parquet"), join(raw_place, "image.parquet")]
    assert merge_indexes(jobs, join(raw_place, INDEX_NAME)).metadata == whole.metadata
    with pytest.raises(DataError, match=r"of the folder s3://bucket/raw$") as caught:
        merge_indexes(jobs, join(parent(raw_place), INDEX_NAME))
    assert "cret" not in str(caught.value)


@pytest.mark.usefixtures("ray_cluster")
def test_encoded_shards_in_the_store(corpus: Path, uploaded: storage.Location, store: Proxy) -> None:
    place = str(uploaded).replace("s3://", f"s3://{KEYS}")
    described = Index.load(corpus / INDEX_NAME).parts[0].model_copy(update={"digest": ""})
    made = index_folder(place, described, [], lambda *_: None)
    assert (made.samples, made.metadata.digest) == (24, Index.load(corpus / INDEX_NAME).digest)
    store.forget()
    assert not verified(place, decode=None).faults
    delete(join(place, INDEX_NAME))
    with pytest.raises(DataError, match="is encoded, and the folder has no index"):
        indexed(join(place, ""))


@pytest.mark.usefixtures("ray_cluster")
def test_what_the_commands_print_of_a_store_has_no_keys(raw_place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="which corpus is this") as caught:
        data_checks.described_as(raw_place, None, None, BUCKETS)
    for _ in range(2):
        described = data_checks.described_as(raw_place, "mine", None, BUCKETS)
        data_checks.index_shards(raw_place, described, BUCKETS, 0.05, "*", INDEX_NAME)
    assert data_checks.verify_corpus(raw_place, True, "all", None)
    assert data_checks.verify_corpus(join(raw_place, INDEX_NAME), False, "0", None)
    delete(join(raw_place, next(name for name, _ in list_files(raw_place) if name.endswith(".tar"))))
    assert not data_checks.verify_corpus(raw_place, True, "0", None)
    said = "".join(capsys.readouterr().out.split())
    assert "16samples,4shards:4read" in said and "16samples,4shards:0read" in said and "Nofaults" in said
    assert "s3://bucket/raw/" in said and "verify.jsonl" in said
    assert not [secret for secret in ("cret", "AKIA") if secret in said + str(caught.value)]
