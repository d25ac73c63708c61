"""Checkpoints: whole or not at all, whatever is cut, changed or missing.

Run: python -m pytest tests/platform/test_checkpoint.py
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domainshuttle.platform.checkpoint import (
    MANIFEST_NAME,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    TrainingState,
    read_checkpoint,
)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(step: int, segment: str = "stage1") -> TrainingState:
    return TrainingState(
        segment=segment, step=step, seed=1, world_size=1, config_digest="d", plan={"seed": 1}, ledger={}, mlflow={}
    )


def write(content: bytes):  # type: ignore[no-untyped-def]
    def write_shards(folder: Path) -> None:
        (folder / "zero").mkdir()
        (folder / "zero" / "a.pt").write_bytes(content)
        (folder / "zero" / "b.pt").write_bytes(content[::-1])

    return write_shards


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(state(10), write(b"ten"), keep=2)
    newest = store.newest("stage1")
    assert newest is not None
    assert newest.state == state(10)
    assert (newest.folder / "zero" / "a.pt").read_bytes() == b"ten"
    assert store.newest("stage2") is None


def test_the_newest_are_kept_of_each_segment(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(state(5, "base"), write(b"x"), keep=2)
    for step in (1, 2, 3, 4):
        store.save(state(step), write(b"x"), keep=2)
    names = [path.name for path, _ in store.list()]
    assert sorted(names) == ["base-step00000005", "stage1-step00000003", "stage1-step00000004"]


def test_a_rank_that_can_not_write_leaves_the_one_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(state(1), write(b"one"), keep=2)

    def full_disk(folder: Path) -> None:
        (folder / "half.pt").write_bytes(b"h")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.save(state(2), full_disk, keep=2)
    notes: list[str] = []
    newest = store.newest("stage1", notes.append)
    assert newest is not None
    assert newest.state.step == 1
    assert notes == ["checkpoint stage1-step00000002 is passed over: it has no manifest: its writing was not finished"]
    # and the step can be saved again over what was left
    store.save(state(2), write(b"two"), keep=2)
    assert store.newest("stage1").state.step == 2  # type: ignore[union-attr]
    assert not (tmp_path / "stage1-step00000002" / "half.pt").exists()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    store = CheckpointStore(folder)
    store.save(state(1), write(b"one" * 50), keep=3)
    newer = store.save(state(2), write(b"two" * 50), keep=3)
    victim = data.draw(st.sampled_from(sorted(p for p in newer.rglob("*") if p.is_file())))
    content = victim.read_bytes()
    kind = data.draw(st.sampled_from(["remove", "cut", "flip"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "remove":
        victim.unlink()
    elif kind == "cut":
        victim.write_bytes(content[:place])
    else:
        victim.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    notes: list[str] = []
    newest = store.newest("stage1", notes.append)
    assert newest is not None
    if newest.state.step == 2:
        # only a change of the manifest itself that still describes these files may pass
        assert victim.name == MANIFEST_NAME
        assert kind == "flip"
        described = {name: entry["checksum"] for name, entry in json.loads(victim.read_text())["files"].items()}
        assert described == {name: entry["checksum"] for name, entry in json.loads(content)["files"].items()}
    else:
        assert len(notes) == 1
        assert "stage1-step00000002" in notes[0]


def test_the_list_says_what_is_wrong(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(state(3), write(b"x"), keep=2)
    (path / "zero" / "a.pt").unlink()
    ((_, found),) = store.list()
    assert isinstance(found, CheckpointError)
    assert "zero/a.pt is missing" in str(found)


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save(state(3), write(b"xy"), keep=2)
    (path / "zero" / "a.pt").write_bytes(b"zz")
    assert isinstance(read_checkpoint(path, checksums=False), Checkpoint)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)
