"""Checkpoints: whole or not at all, whatever is cut, changed or missing; and which of them a run goes on from.

Run: python -m pytest tests/platform/checkpoint/test_store.py
"""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domainshuttle.platform.checkpoint.backend import describe
from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.resume import IncompatibleError, begin, choose_start
from domainshuttle.platform.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    TrainingState,
    UnfinishedCheckpoint,
    read_checkpoint,
    write_manifest,
)

DIGEST = "the run's"


def put(store: CheckpointStore, step: int, segment: str = "stage1", content: bytes = b"x", digest: str = DIGEST) -> str:
    """Saves a checkpoint of two shards, in the line that the segment is in."""
    name = Name(segment, step, len(store.lines(segment)) - 1)
    files = {"zero/a.pt": content, "zero/b.pt": content[::-1]}
    for file, data in files.items():
        store.place.write(f"{name}/{file}", data)
    entries = {file: describe(store.place.local(f"{name}/{file}")) for file in files}
    plan, ledger, mlflow = {"seed": 1}, {"hours": {"productive": 1.5}}, {"parent": "p1"}
    state = TrainingState(segment, step, 1, 2, digest, plan, ledger, mlflow, "base", loss=0.5, line=name.line)
    write_manifest(store.place, state, str(name), entries)
    return str(name)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def start(store: CheckpointStore, resume: str = "auto", segment: str = "stage1") -> str | None:
    """The name of what a run starts from, as the driver chooses it and makes it last."""
    chosen = choose_start(store, segment, resume, DIGEST)
    begin(store, segment, resume, chosen, DIGEST)
    return chosen.name if chosen else None


def damage(store: CheckpointStore, name: str) -> None:
    (store.place.local(name) / "zero" / "a.pt").write_bytes(b"")


def test_what_was_saved_comes_back(store: CheckpointStore) -> None:
    put(store, 10, content=b"ten")
    newest = store.newest("stage1")
    assert newest is not None
    plan, ledger, mlflow = {"seed": 1}, {"hours": {"productive": 1.5}}, {"parent": "p1"}
    assert newest.state == TrainingState("stage1", 10, 1, 2, DIGEST, plan, ledger, mlflow, "base", loss=0.5)
    assert (newest.folder / "zero" / "a.pt").read_bytes() == b"ten"
    files = {path.name: path.stat().st_size for path in newest.folder.rglob("*") if path.is_file()}
    assert newest.size == sum(files.values()) - files["manifest.json"]
    assert store.newest("stage2") is None
    assert read_checkpoint(newest.folder) == newest == store.read(newest.where)
    # at its own place it is not copied
    assert store.fetch(newest) == newest.folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    store = CheckpointStore(folder)
    put(store, 1, content=b"one" * 50)
    newer = folder / put(store, 2, content=b"two" * 50)
    victim = data.draw(st.sampled_from(sorted(p for p in newer.rglob("*") if p.is_file())))
    content = victim.read_bytes()
    kind = data.draw(st.sampled_from(["remove", "cut", "flip"]))
    place = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))
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
        # only a flip between the tokens of the manifest changes nothing of what it says
        assert json.loads(victim.read_bytes()) == json.loads(content)
    else:
        assert len(notes) == 1
        assert "stage1-step00000002 is skipped: " in notes[0]


def test_the_list_says_what_is_wrong(store: CheckpointStore) -> None:
    put(store, 3)
    damage(store, put(store, 7))
    store.place.write("stage1-step00000008/rank-00000.json", b"{}")
    (_, whole), (_, damaged), (_, unfinished) = store.list()
    assert isinstance(whole, Checkpoint)
    assert str(damaged) == "zero/a.pt has 0 bytes, the manifest says 1"
    assert isinstance(unfinished, UnfinishedCheckpoint)
    assert "1 of its ranks had written theirs" in str(unfinished)


def test_a_changed_file_of_the_same_size_is_found_by_its_checksum(store: CheckpointStore) -> None:
    name = put(store, 3, content=b"xy")
    (store.place.local(name) / "zero" / "a.pt").write_bytes(b"zz")
    assert isinstance(store.read(name, checksums=False), Checkpoint)
    with pytest.raises(CheckpointError, match=r"zero/a.pt was changed since it was written"):
        store.read(name)


def test_a_checkpoint_of_the_first_format_is_still_read(store: CheckpointStore) -> None:
    name = put(store, 3)
    folder = store.place.local(name)
    state = json.loads((folder / "state.json").read_text())
    for key in ("loss", "guard", "line", "version"):
        del state[key]
    (folder / "state.json").write_text(json.dumps(state))
    files = {file: describe(folder / file) for file in ("zero/a.pt", "zero/b.pt", "state.json")}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
    assert store.read(name).state.version == 1
    (folder / "manifest.json").write_text(json.dumps({"version": 9, "files": files}))
    with pytest.raises(CheckpointError, match="newer domainshuttle"):
        store.read(name)


# Where a run starts


def test_auto_takes_the_newest_whole_one(store: CheckpointStore) -> None:
    assert start(store) is None
    older = put(store, 10)
    damage(store, put(store, 20))
    put(store, 10, segment="stage2")
    assert start(store) == older
    assert start(store, segment="stage2") == "stage2-step00000010"


def test_auto_does_not_begin_anew_when_damage_left_nothing(store: CheckpointStore) -> None:
    store.place.write("stage1-step00000005/rank-00000.json", b"{}")
    assert start(store) is None  # never whole: nothing is lost by beginning
    damage(store, put(store, 10))
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole.*--resume none"):
        start(store)
    assert start(store, "none") is None
    assert start(store) is None


def test_none_begins_anew_and_older_ones_are_never_chosen_again(store: CheckpointStore) -> None:
    old = [put(store, 10), put(store, 20)]
    assert start(store, "none") is None
    assert start(store) is None, "a restart before the first checkpoint must begin anew too"
    new = put(store, 10)
    assert new == "stage1-step00000010-line1"
    assert start(store) == new
    damage(store, new)
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        start(store)
    assert {str(name) for name in store.names()} == {*old, new}
    assert start(store, old[1]) == old[1], "by its name it can be had"


def test_a_path_goes_on_from_there_and_restarts_keep_to_it(store: CheckpointStore) -> None:
    five, ten, twenty = (put(store, step) for step in (5, 10, 20))
    assert start(store, str(store.place.local(ten))) == ten
    assert start(store) == ten, "not the 20 of the line that was left"
    fifteen = put(store, 15)
    assert start(store) == fifteen
    damage(store, fifteen)
    assert start(store) == ten
    damage(store, ten)
    assert start(store) == five
    # naming what would be chosen anyway begins nothing
    lines = store.lines("stage1")
    assert start(store, twenty) == twenty
    assert start(store, twenty) == twenty
    assert len(store.lines("stage1")) == len(lines) + 1


def test_a_path_that_does_not_fit_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    put(store, 10)
    damage(store, put(store, 20))
    other = put(store, 30, segment="stage2")
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint: .*there are: stage1-step00000010, stage1"):
        start(store, "stage1-step00000020")
    with pytest.raises(CheckpointError, match=r"nothing at .*stage1-step00000099"):
        start(store, "stage1-step00000099")
    with pytest.raises(CheckpointError, match=r"checkpoint of segment stage2, and the run is at stage1"):
        start(store, other)


def test_a_checkpoint_of_another_configuration_is_taken_when_it_is_named_and_only_then(
    store: CheckpointStore, tmp_path: Path
) -> None:
    foreign = CheckpointStore(tmp_path / "foreign")
    name = put(foreign, 40, digest="another's")
    with pytest.raises(IncompatibleError, match=rf"another configuration .*another's.*--set name=.*--resume {name}"):
        start(foreign)
    for resume, into in ((str(foreign.place.local(name)), store), (name, foreign)):
        assert start(into, resume) == name
        assert start(into) == name, "restarts keep to it"
        assert len(into.lines("stage1")) == 2
        assert start(into, resume) == name
        assert len(into.lines("stage1")) == 2, "naming it again begins nothing"
        ours = put(into, 50)
        assert start(into) == ours
        damage(into, ours)
        assert start(into) == name


def test_what_was_verified_is_not_read_again(store: CheckpointStore) -> None:
    name = put(store, 3, content=b"xy")
    verified = store.newest("stage1")
    (store.place.local(name) / "zero" / "a.pt").write_bytes(b"zz")  # only its bytes would show it
    assert store.newest("stage1", verified=verified) == verified
    notes: list[str] = []
    assert store.newest("stage1", notes.append) is None
    assert "is skipped" in notes[0]
    shutil.rmtree(store.place.local(name))
    again = put(store, 3, content=b"xz")  # the same name, written later
    assert store.newest("stage1", verified=verified) == store.read(again) != verified


def test_a_checkpoint_elsewhere_can_be_gone_on_from_while_it_is_there(store: CheckpointStore, tmp_path: Path) -> None:
    put(store, 10)
    foreign = CheckpointStore(tmp_path / "copied")
    name = put(foreign, 40)
    path = str(foreign.place.local(name))
    assert start(store, path) == name
    chosen = choose_start(store, "stage1", "auto", DIGEST)
    assert chosen is not None
    assert chosen.where == path
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        start(store)
    assert start(store, "stage1-step00000010") == "stage1-step00000010"
