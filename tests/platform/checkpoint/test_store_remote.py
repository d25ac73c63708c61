"""Checkpoints in an object store: a real S3 server (moto's) on loopback, which is stopped and damaged underneath.

Run: python -m pytest tests/platform/checkpoint/test_store_remote.py
"""

import http.client
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.mapped import cache_folder
from domainshuttle.pipelines.storage import files as storage
from domainshuttle.pipelines.storage import retry
from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer, Write
from domainshuttle.platform.checkpoint.backend import FileEntry, describe
from domainshuttle.platform.checkpoint.resume import begin, choose_start
from domainshuttle.platform.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    TrainingState,
    write_manifest,
)
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import CheckpointSection, ConfigError


class Server:
    """S3 on a port of its own; what is in it outlives a stop."""

    def __init__(self) -> None:
        self.port = 0
        self.start()
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200

    def start(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        self.server.stop()

    def uri(self, path: str) -> str:
        return f"s3://bucket/{path}?endpoint_override=http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def store(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> CheckpointStore:
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    quick = retry.Limits(attempts=2, total_seconds=5, first_wait=0.01, longest_wait=0.02, connect_seconds=2)
    monkeypatch.setattr(storage, "LIMITS", quick)
    return CheckpointStore(server.uri(request.node.name), tmp_path / "scratch")


def writer(store: CheckpointStore, **settings: int) -> AsyncCheckpointer:
    return AsyncCheckpointer(store, CheckpointSection(every=1, **settings), 0, 1, lambda mine: [mine])


def save(one: AsyncCheckpointer, step: int, content: bytes = b"x" * 1000) -> None:
    def snapshot() -> Write:
        def write(folder: Path) -> None:
            (folder / "zero").mkdir()
            for part in range(3):
                (folder / "zero" / f"{part}.bin").write_bytes(content)

        return write

    one.save(TrainingState("stage1", step, 1, 1, "d", {}, {}, {}), snapshot)
    one.wait()


def test_save_retain_choose_and_fetch(store: CheckpointStore, tmp_path: Path) -> None:
    one = writer(store, keep=2)
    for step in (1, 2, 3):
        save(one, step, b"step %d" % step)
    assert {name.step for name in store.names()} == {2, 3}
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
    newest = choose_start(store, "stage1", "auto", "d")
    assert newest is not None
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(store.fetch(newest))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 3
    assert {path.read_bytes() for path in folders[0].glob("zero/*.bin")} == {b"step 3"}
    before = {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")}
    store.fetch(newest)
    assert before == {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")}, "what is there is not copied"
    store.release(newest)
    assert not folders[0].exists()
    # by its URI, from a store of another run
    begin(store, "stage1", store.place.where("stage1-step00000002"), store.read("stage1-step00000002"))
    again = choose_start(store, "stage1", "auto", "d")
    assert again is not None
    assert again.state.step == 2


def test_a_node_fetches_what_its_ranks_wrote(store: CheckpointStore) -> None:
    files = {f"zero/{rank}.bin": describe_of(store, "stage1-step00000001", f"zero/{rank}.bin", rank) for rank in (0, 1)}
    state = TrainingState("stage1", 1, 1, 2, "d", {}, {}, {})
    write_manifest(store.place, state, "stage1-step00000001", files)
    saved = store.newest("stage1")
    assert saved is not None
    folder = store.fetch(saved, {1})
    assert [path.name for path in folder.rglob("*.bin")] == ["1.bin"]
    assert (folder / "state.json").exists()
    store.fetch(saved)
    assert {path.name for path in folder.rglob("*.bin")} == {"0.bin", "1.bin"}


def describe_of(store: CheckpointStore, name: str, file: str, rank: int) -> FileEntry:
    """Puts a file of a rank into the store, and describes it as a manifest does."""
    path = store.scratch / "file"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"of rank %d" % rank)
    entry: FileEntry = {**describe(path), "rank": rank}
    store.place.take(path, f"{name}/{file}")
    return entry


def test_a_changed_object_is_found_when_it_is_fetched_and_then_skipped(store: CheckpointStore) -> None:
    one = writer(store, keep=3)
    save(one, 1)
    save(one, 2)
    store.place.write("stage1-step00000002/zero/1.bin", b"y" + b"x" * 999)
    newest = store.newest("stage1")
    assert newest is not None
    assert newest.state.step == 2, "sizes alone do not show it"
    assert isinstance(dict(store.list())["stage1-step00000002"], Checkpoint)
    assert "zero/1.bin was changed" in str(dict(store.list(checksums=True))["stage1-step00000002"])
    with pytest.raises(CheckpointError, match=r"zero/1.bin was changed since it was written.*next start takes another"):
        store.fetch(newest)
    notes: list[str] = []
    newest = store.newest("stage1", notes.append)
    assert newest is not None
    assert newest.state.step == 1
    assert "zero/1.bin was changed" in notes[0]


def test_a_store_that_is_down_costs_a_save_and_never_chooses_an_older_one(
    store: CheckpointStore, server: Server, tmp_path: Path
) -> None:
    one = writer(store)
    save(one, 1)
    server.stop()
    try:
        began = one.save(TrainingState("stage1", 2, 1, 1, "d", {}, {}, {}), lambda: lambda folder: None)
        assert not began.started
        with pytest.raises(StorageError):
            choose_start(store, "stage1", "auto", "d")
    finally:
        server.start()
    assert one.ended()[-1].fault is not None

    def goes_down(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"x" * 100)
        server.stop()

    one.save(TrainingState("stage1", 3, 1, 1, "d", {}, {}, {}), lambda: goes_down)
    with pytest.raises(CheckpointError, match=r"stage1-step00000003 could not be written: rank 0: .*store is down"):
        one.wait()
    server.start()
    assert choose_start(store, "stage1", "auto", "d").state.step == 1  # type: ignore[union-attr]
    save(one, 4)
    assert {name.step for name in store.names()} == {1, 4}
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def test_a_configured_store_holds_the_runs_by_name(tmp_path: Path) -> None:
    remote = load_config("demo", [f"output={tmp_path}", "checkpoint.store=s3://bucket/runs?region=eu-west-1"])
    assert CheckpointStore.of(remote).place.root == "s3://bucket/runs/demo?region=eu-west-1"
    local = load_config("demo", [f"output={tmp_path}"])
    assert CheckpointStore.of(local).place.root == f"{tmp_path}/demo/checkpoints"
    shared = load_config("demo", [f"output={tmp_path}", "checkpoint.store=relative"])
    assert CheckpointStore.of(shared).place.root == str(Path("relative/demo").absolute())


@pytest.mark.parametrize(
    "folder", ["runs%231", "runs%3F1", "runs%2520 +ü", "runs 1"], ids=["hash", "question", "percent", "space"]
)
def test_a_store_with_an_awkward_name(folder: str, store: CheckpointStore, server: Server, tmp_path: Path) -> None:
    beside = CheckpointStore(server.uri("runs"), tmp_path / "beside")
    one = CheckpointStore(server.uri(folder), tmp_path / "scratch")
    save(writer(beside, keep=1), 7, b"another run's")
    save(writer(one, keep=1), 1, b"mine")
    save(writer(one, keep=1), 2, b"mine")
    newest = choose_start(one, "stage1", "auto", "d")
    assert newest is not None
    for resume in (newest.name, newest.where, one.place.where(newest.name)):
        named = choose_start(one, "stage1", resume, "d")
        assert named is not None
        assert (named.state.step, named.root) == (2, one.place.root)
    assert {path.read_bytes() for path in one.fetch(newest).glob("zero/*.bin")} == {b"mine"}
    assert {name.step for name in one.names()} == {2}
    assert {name.step for name in beside.names()} == {7}


@pytest.mark.parametrize(
    "folder",
    ["runs#1", "runs?1", "runs%ZZ", "runs//1", "runs/../1"],
    ids=["hash", "mark", "percent", "slashes", "up"],
)
def test_a_store_whose_name_can_be_misread_is_refused(folder: str, store: CheckpointStore, server: Server) -> None:
    uri = server.uri("").replace("?", f"{folder}?", 1)
    with pytest.raises(DataError):
        CheckpointStore(uri)
    with pytest.raises(DataError):
        choose_start(store, "stage1", uri.replace("?endpoint", "/stage1-step00000001?endpoint"), "d")
    with pytest.raises(ConfigError, match=r"checkpoint\.store"):
        load_config("demo", [f"checkpoint.store={uri}"])
    with pytest.raises(ConfigError, match="data: s3://bucket"):
        load_config("demo", [f"data={uri}"])


def test_the_default_scratch_is_the_folder_in_which_indexes_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch = CheckpointStore("s3://bucket/run").scratch
    assert scratch == cache_folder() and scratch.stat().st_mode & 0o777 == 0o700
    scratch.chmod(0o755)  # as it was made until now: others could look, not write
    assert CheckpointStore("s3://bucket/run").scratch == cache_folder() and scratch.stat().st_mode & 0o777 == 0o700
