"""The folder that is named is the one that is meant: a run that was moved, copied, renamed or linked to.

Run: python -m pytest tests/platform/run/test_moved.py
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from running import in_process

from domainshuttle.platform.checkpoint.resume import adopt_stages
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run, find_run, require_meant
from domainshuttle.platform.run.segments import Segment


def finish(segment: Segment, content: bytes) -> None:
    segment.weights.mkdir(parents=True)
    (segment.weights / "model.safetensors").write_bytes(content)
    segment.finish(9)


def save(run: Run, segment: Segment, step: int) -> str:
    store, name = CheckpointStore.of(run.config, run.folder), f"{segment.name}-step{step:08d}"
    state = TrainingState(segment.name, step, 1, 2, run.config.digest(), {}, {}, {}, origin=segment.origin)
    write_manifest(store.place, state, name, {})
    return name


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run in which base and stage1 are finished, and stage2 has a checkpoint."""
    made = Run.open(config(tmp_path))
    base, stage1, stage2 = made.segments()
    finish(base, b"base")
    finish(stage1, b"stage1")
    save(made, stage2, 5)
    return made


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config("demo", [f"output={tmp_path / 'old'}", *overrides])


def finished(run: Run) -> list[str]:
    return [segment.name for segment in run.segments() if segment.finished]


def test_a_copy_is_read_where_it_lies_though_another_lies_at_the_old_place(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.folder, tmp_path / "new" / "demo"))
    shutil.rmtree(copy / "weights" / "stage1")
    found = find_run(copy)
    assert finished(found) == ["base"]
    assert found.segment("stage1").origin == str(copy / "weights" / "base")
    assert found.config.tracking_uri == f"sqlite:///{tmp_path}/new/mlflow.db"
    assert finished(find_run(run.folder)) == ["base", "stage1"]
    shown = " ".join(in_process("status", copy).split())
    assert str(copy) in shown
    assert shown.count("finished") == 1
    save(find_run(copy), found.segment("stage1"), 3)
    printed = in_process("checkpoints", copy)
    assert "stage1-step00000003" in printed
    assert "stage1-step00000003" not in in_process("checkpoints", run.folder)


@pytest.mark.parametrize("name", ["demo", "kept for the paper"])
def test_a_moved_run_is_all_there_whatever_its_folder_is_called(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "new").mkdir()
    moved = run.folder.rename(tmp_path / "new" / name)
    found = find_run(moved)
    assert (found.folder, finished(found)) == (moved, ["base", "stage1"])
    assert found.config.digest() == run.config.digest()
    assert "stage2-step00000005" in in_process("checkpoints", moved)


def test_the_command_that_goes_on_with_a_moved_run_does(run: Run, tmp_path: Path) -> None:
    assert run.train_command == f"domainshuttle train {run.config_path}"
    (tmp_path / "new").mkdir()
    moved = run.folder.rename(tmp_path / "new" / "kept for the paper")
    rename, train = find_run(moved).train_command.split(" && ")
    assert shlex.split(rename) == ["mv", str(moved), f"{tmp_path}/new/demo"]
    subprocess.run(rename, shell=True, check=True)
    program, verb, path, option, override = shlex.split(train)
    assert (program, verb, option) == ("domainshuttle", "train", "--set")
    again = Run.open(load_config(path, [override]))
    assert (again.folder, finished(again)) == (tmp_path / "new" / "demo", ["base", "stage1"])
    assert find_run(again.folder).train_command == f"domainshuttle train {again.config_path}"


def test_a_moved_runs_own_configuration_does_not_train_the_run_at_the_old_place(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.folder, tmp_path / "new" / "demo"))
    before = sorted(run.folder.rglob("*"))
    for verb in ("train", "submit"):
        printed = " ".join(in_process(verb, copy / "config.yaml", expect=2).split())
        assert f"which was moved or copied there: it says that its run is {run.folder}" in printed
        assert find_run(copy).train_command in printed and f"--set output={run.folder.parent}" in printed
    assert sorted(run.folder.rglob("*")) == before
    meant = load_config(str(copy / "config.yaml"))
    require_meant(str(copy / "config.yaml"), [f"output={copy.parent}"], meant)
    require_meant(str(run.config_path), [], meant)
    template = shutil.copy(run.config_path, tmp_path / "config.yaml")  # a file beside which there is no run
    require_meant(template, [], meant)
    (tmp_path / "latest").symlink_to(run.folder)
    require_meant(str(tmp_path / "latest" / "config.yaml"), [], meant)


def test_places_in_the_folder_or_moved_along_beside_it_are_meant_where_they_are(tmp_path: Path) -> None:
    old = tmp_path / "old"
    inside = Run.open(config(tmp_path, f"checkpoint.store={old}/demo/kept", f"tracking.uri=sqlite:///{old}/all.db"))
    save(inside, inside.segment("base"), 5)
    (old / "all.db").touch()
    new = old.rename(tmp_path / "new")
    found = find_run(new / "demo")
    assert found.config.checkpoint.store == f"{new}/demo/kept"
    assert found.config.tracking_uri == f"sqlite:///{new}/all.db"
    assert "base-step00000005" in in_process("checkpoints", new / "demo")
    alone = (new / "demo").rename(tmp_path / "demo")
    assert find_run(alone).config.tracking_uri == f"sqlite:///{old}/all.db"  # which did not come along
    assert find_run(alone).config.data == found.config.data


def test_links_and_relative_names_lead_to_the_run_itself(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").symlink_to(run.folder)
    assert find_run(tmp_path / "latest").folder == run.folder
    monkeypatch.chdir(run.folder / "weights")
    assert find_run("..").config == run.config
    moved = run.folder.rename(tmp_path / "moved")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(moved)
    assert find_run(tmp_path / "latest").folder == moved


def test_a_checkpoint_of_a_moved_run_brings_the_stages_before_it(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.folder, tmp_path / "new" / "demo"))
    (run.segment("base").weights / "model.safetensors").write_bytes(b"trained anew at the old place")
    new = Run.open(config(tmp_path, "name=again"))
    taken = str(copy / "checkpoints" / "stage2-step00000005")
    adopt_stages(new, CheckpointStore.of(new.config), taken, lambda _: None)
    assert finished(new) == ["base", "stage1"]
    assert (new.segment("base").weights / "model.safetensors").read_bytes() == b"base"
