"""Addresses: the object that was written, or a refusal, and never another one.

Run: python -m pytest tests/pipelines/storage/test_uri.py
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_s3 import Proxy
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError, MissingError
from domainshuttle.pipelines.storage.files import (
    delete,
    exists,
    list_files,
    open_file,
    open_parquet,
    read_bytes,
    read_ranges,
    size,
    write_bytes,
    write_file,
    writing,
)
from domainshuttle.pipelines.storage.uri import (
    Location,
    absolute,
    holds_keys,
    is_remote,
    join,
    local_path,
    name_of,
    parent,
    redacted,
    require_local,
    store_address,
)

AWKWARD = [
    *"#?%+ &=;:@!$*()[]{}|^~`<>,.-_'\"\\aA0",
    "ü",
    "u\u0308",
    "日",
    "\U0001f600",
    "\u00a0",
    "%20",
    "%2F",
    "%ZZ",
    "a",
]
names = st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=5).map("".join).filter(lambda n: n not in (".", ".."))
keys = st.lists(names, min_size=1, max_size=3).map("/".join)
BASES = ["s3://bucket", "s3://bucket/", "gs://bucket/a%23b/c", "s3://key:se%2Fcret@bucket/x?region=eu-west-1"]


@given(keys, st.sampled_from(BASES))
def test_what_is_joined_is_split_again(key: str, base: str) -> None:
    at = join(base, key)
    folder = store_address(base).key
    assert store_address(at).key == (f"{folder}/{key}" if folder else key)
    assert absolute(at) == at and is_remote(at)
    assert name_of(at) == key.rpartition("/")[2]
    assert parent(at) == (join(base, key.rpartition("/")[0]) if "/" in key else absolute(base))
    step = absolute(base)
    for name in key.split("/"):
        step = join(str(step), name)
    assert step == at
    assert store_address(redacted(at)).key == store_address(at).key  # what people see can be given again
    assert ("?region=eu-west-1" in at) == ("region" in base)


@given(keys)
def test_escapes_are_optional_and_mean_the_same(key: str) -> None:
    for safe in ("", "/", "/+ ü:@"):
        assert absolute(f"S3://bucket/{quote(key, safe=safe)}/") == join("s3://bucket", key)


@given(st.lists(st.sampled_from([*AWKWARD, "/", "\t", "\n", "\x00", "%00", "%FF"]), max_size=8).map("".join))
def test_whatever_is_typed_is_one_object_or_refused(typed: str) -> None:
    """Against the standard's reading: the path is before ? and #, and its escapes are bytes in UTF-8."""
    try:
        key = store_address(f"s3://bucket/{typed}").key
    except DataError as error:
        awkward = set("#?%\t\n\0") & set(typed) or {"", ".", ".."} & set(typed.split("/"))
        assert awkward, error
        return
    path = typed.partition("?")[0]
    assert "#" not in typed and key == unquote(path, errors="strict").removesuffix("/")
    assert all(part not in ("", ".", "..") for part in key.split("/")) or not key


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("s3://bkt/cats/raw#2", r"write it as %23, such as s3://bkt/cats/raw%232"),
        ("s3://bkt/cats/raw?region=eu#2", "write it as %23"),
        ("s3://bkt/50%", r"'%' is no escape: write % as %25"),
        ("s3://bkt/a%FFb", "not UTF-8"),
        ("s3://bkt/a//b", "two slashes in a row"),
        ("s3://bkt//a", "two slashes in a row"),
        ("s3://bkt/a%2F%2Fb", "two slashes in a row"),
        ("s3://bkt/a/../b", "would lead to another folder"),
        ("s3://bkt/a/%2E%2e/b", "would lead to another folder"),
        ("s3://bkt/a\tb", "control character"),
        ("s3://bkt/a%0Ab", "control character"),
        ("s3:///cats/raw", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3://b kt/cats", "names no bucket"),
        ("s3://user:ke#y@bkt/a", "access keys can't be read"),
        ("s3://user:ke?y@bkt/a", "access keys can't be read"),
    ],
)
def test_refusals_name_the_remedy(uri: str, remedy: str) -> None:
    for ask in (absolute, parent, name_of, lambda one: join(one, "x"), read_bytes, exists, list_files):
        with pytest.raises(DataError, match=remedy) as caught:
            ask(uri)
        assert "ke#y" not in str(caught.value) and "ke?y" not in str(caught.value)
    assert "y@" not in redacted(uri)


@pytest.mark.parametrize("name", ["", "2", "region", "region=", "=eu", "region=eu&region=us", "nonsense=1"])
def test_what_is_behind_a_question_mark_is_a_parameter_or_refused(name: str, store: Proxy) -> None:
    write_bytes(store.uri("cats/raw"), b"cats")
    uri = store.uri("cats/raw") + (f"&{name}" if name else "&")
    with pytest.raises(DataError, match="%3F"):
        read_bytes(uri)


@settings(max_examples=40, deadline=None)
@given(keys, st.booleans(), st.booleans())
def test_a_local_path_is_taken_as_it_is(key: str, as_text: bool, as_uri: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base: Location = Path(folder)
        base = str(base) if as_text else base
        if as_uri:
            base = Path(folder).as_uri()
        at = join(base, key)
        write_bytes(at, key.encode())
        there = Path(f"{folder}/{key}")
        assert there.read_bytes() == key.encode() and absolute(at) == there
        again: list[Location] = [there, str(there), there.as_uri(), join(parent(at), name_of(at))]
        assert [read_bytes(one) for one in again] == [key.encode()] * 4
        assert list_files(base) == [(key, len(key.encode()))]
        assert local_path(absolute(there.as_uri())) == there


def test_local_addresses_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("file://data/raw", "file:///a#b", "file:///a?b", "file:///50%"):
        with pytest.raises(DataError, match=r"file:///data/corpora|give the path"):
            local_path(uri)
    for mistyped in ("s3:/bucket/x", Path("s3://bucket/x"), "file:/x"):
        for ask in (absolute, local_path, lambda one: join(one, "x"), lambda one: require_local(one, "work")):
            with pytest.raises(DataError, match="one slash after the scheme"):
                ask(mistyped)
    assert local_path("file://localhost/a%23b") == Path("/a#b") == local_path("FILE:///a%23b")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("~/x") == Path("/home/me/x")
    assert absolute("./~/x") == absolute(Path("~/x")) == absolute(join("./~", "x")) == tmp_path / "~/x"
    with pytest.raises(DataError, match=r"is written \./~nobody-of-this-name"):
        absolute("~nobody-of-this-name/x")
    with pytest.raises(DataError, match="not UTF-8"):
        absolute(Path(os.fsdecode(b"/m\xfcnchen")))
    assert not is_remote("/data/a://b") and absolute("odd://x/y") == "odd://x/y"


@pytest.mark.parametrize("base", ["s3://bucket/raw", "/data/raw", "raw", Path("/data/raw")])
@pytest.mark.parametrize("name", ["../other", "a/../../b", "/etc/passwd", ".."])
def test_a_name_does_not_lead_out_of_its_folder(base: Location, name: str) -> None:
    with pytest.raises(DataError, match="leads out of the folder"):
        join(base, name)


def misreadings(key: str) -> set[str]:
    """What other keys a careless reader takes a key for."""
    parts = {key.partition(one)[0] for one in "#?%&;"}
    return {*parts, unquote(key), quote(key), key.replace("+", " "), key.replace(" ", "+"), key.replace("\\", "/")} - {
        key,
        "",
    }


@pytest.fixture
def bucket(store: Proxy) -> Iterator[Any]:
    """A bucket as another client sees it, which is empty."""
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*store.upstream), region_name="us-east-1")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="awkward")
    yield boto3.resource("s3", endpoint_url=client.meta.endpoint_url, region_name="us-east-1").Bucket("awkward")


def table() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2, 3]}), sink)
    return sink.getvalue().to_pybytes()


TABLE = table()
READERS: list[Callable[[Location], bytes]] = [
    read_bytes,
    lambda at: bytes(read_ranges(at, [(0, len(TABLE))])[0]),
    lambda at: open_file(at).read(),
    lambda at: TABLE if open_parquet(at).read().column("x").to_pylist() == [1, 2, 3] else b"",
    lambda at: TABLE if size(at) == len(TABLE) and exists(at) else b"",
    lambda at: TABLE if (name_of(at), len(TABLE)) in list_files(parent(at)) else b"",
]


def test_every_function_takes_the_object_that_was_written(store: Proxy, bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(TABLE)
    base = store.uri("").replace("s3://bucket/", "s3://awkward/")

    def written(at: Location, how: int) -> None:
        if how == 0:
            write_bytes(at, TABLE)
        elif how == 1:
            write_file(tmp_path / "table", at)
        else:
            with writing(at) as aside:
                aside.write_bytes(TABLE)

    @settings(max_examples=25, deadline=None)
    @given(keys.filter(str.strip), st.integers(0, 2))
    def law(key: str, how: int) -> None:
        bucket.objects.all().delete()
        decoys = {one for one in misreadings(key) if all(part not in ("", ".", "..") for part in one.split("/"))}
        for decoy in decoys:
            bucket.put_object(Key=decoy, Body=b"another object")
        at = join(base, key)
        if not any(decoy.startswith(f"{key}/") for decoy in decoys):
            assert not exists(at)
        with pytest.raises(MissingError):
            read_bytes(at)
        written(at, how)
        assert bucket.Object(key).get()["Body"].read() == TABLE
        for reader in READERS:
            assert reader(at) == TABLE
        delete(at)
        left = {one.key for one in bucket.objects.all()}
        assert key not in left and decoys <= left | {key}
        for decoy in decoys:
            assert bucket.Object(decoy).get()["Body"].read() == b"another object"

    law()


def test_what_a_store_lists_is_what_it_gives(store: Proxy, bucket: Any) -> None:
    bucket.objects.all().delete()
    names = ["a#b", "a?b", "a%20b", "a b", "a+b", "ü/ö#?%", "a%2Fb", "a\\b", "50%", "a&b=c;d"]
    for name in names:
        bucket.put_object(Key=f"raw#2/{name}", Body=name.encode())
        bucket.put_object(Key=f"raw/{name}", Body=b"another object")
    base = store.uri("raw%232").replace("s3://bucket/", "s3://awkward/")
    assert {name: read_bytes(join(base, name)).decode() for name, _ in list_files(base)} == {n: n for n in names}


def test_keys_are_found_in_every_form() -> None:
    for uri in ("s3://u:p@b/x", "s3://u@b/x", "s3://u:p/q@b/x", "gs://b/x?token=1", "http://h/x?X-Amz-Signature=ab"):
        assert holds_keys(uri)
    for uri in ("s3://b/x@y", "s3://b/x?region=eu", "/a:b@c", "s3://b/x:y@z"):
        assert not holds_keys(uri)
