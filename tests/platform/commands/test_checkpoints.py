"""`domainshuttle checkpoints`: what is there, in which state, and why it is kept.

Run: python -m pytest tests/platform/commands/test_checkpoints.py
"""

import re
from pathlib import Path

import pytest
from running import in_process

from domainshuttle.platform.checkpoint.backend import describe
from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.resume import require_resumable
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import SKIPPED, Notices


def put(store: CheckpointStore, segment: str, step: int, loss: float) -> Name:
    name = Name(segment, step, len(store.lines(segment)) - 1)
    store.place.write(f"{name}/zero/a.bin", bytes(3 << 20))
    files = {"zero/a.bin": describe(store.place.local(f"{name}/zero/a.bin"))}
    state = TrainingState(segment, step, 1, 4, "d", {}, {}, {}, loss=loss, line=name.line)
    write_manifest(store.place, state, str(name), files)
    return name


def test_the_table_says_state_and_reason(tmp_path: Path) -> None:
    rule = ["checkpoint.every=10", "checkpoint.keep=1", "checkpoint.keep_every=20", "checkpoint.keep_best=1"]
    run = Run.open(load_config("demo", [f"output={tmp_path}", *rule]))
    assert "one is written every 10 steps" in in_process("checkpoints", run.folder)
    store = CheckpointStore.of(run.config)
    left = put(store, "base", 10, 0.125)
    store.branch("base", str(left))
    for step, loss in ((20, 0.25), (30, 0.0625), (40, 0.5), (50, 0.75)):
        put(store, "base", step, loss)
    flipped = store.place.local("base-step00000040-line1") / "zero" / "a.bin"
    flipped.write_bytes(bytes((3 << 20) - 1) + b"1")
    store.place.write("stage1-step00000010/rank-00001.json", b"{}")
    printed = in_process("checkpoints", run.folder)
    lines = ([cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in printed.splitlines())
    rows = {cells[0]: cells for cells in lines if cells}
    new = {step: rows[f"base-step000000{step}-line1"] for step in (20, 30, 50)}
    assert rows[str(left)][-1] == "an earlier line; a later line began here"
    assert [new[step][-1] for step in (20, 30, 50)] == ["every 20th step", "best loss", "last"]
    assert new[50][1:3] + new[50][4:7] == ["50", "0.7500", "3.0 MiB", "4", "whole (sizes)"]
    assert rows["stage1-step00000010"][6] == "unfinished"
    assert "stage1-step00000010 is not chosen: it has no manifest" in printed
    assert "here base-step00000050-line1" in printed
    assert "domainshuttle train CONFIG --resume" in printed
    Notices(run.notices_path, print).add("base", SKIPPED, "checkpoint base-step00000050-line1 is skipped: a reason")
    printed = in_process("checkpoints", run.folder)
    (row,) = (line for line in printed.splitlines() if "│ base-step00000050-line1" in line)
    assert "skipped" in row and "was skipped by a restart: checkpoint base-step00000050-line1 is" in printed
    assert "here base-step00000040-line1" in printed  # whose damage only its bytes tell
    verified = in_process("checkpoints", run.folder, "--verify", expect=1)
    assert "here base-step00000050-line1" in verified
    assert "base-step00000040-line1 is not chosen: zero/a.bin was changed since it was written" in verified
    assert "Being written, or left by a kill: stage1-step00000010" in in_process("status", run.folder)


def test_what_is_proposed_can_be_done(tmp_path: Path) -> None:
    run = Run.open(load_config("demo", [f"output={tmp_path}"]))
    store = CheckpointStore.of(run.config)

    def proposed() -> tuple[list[str], str]:
        printed = in_process("checkpoints", run.folder)
        name, resume = re.findall(r"train CONFIG (?:--set name=(\S+) )?--resume (\S+)", printed)[0]
        return [name] if name else [], resume

    def finish(segment: str) -> None:
        run.segment(segment).weights.mkdir(parents=True, exist_ok=True)
        run.segment(segment).finish(50)

    for segment, steps in (("base", (10, 20)), ("stage1", (10, 20))):
        for step in steps:
            put(store, segment, step, 0.5)
    assert proposed() == ([], "base-step00000010")
    finish("base")
    assert proposed() == ([], "stage1-step00000010")
    finish("stage1")  # a restart begins stage2, of which there is none
    assert proposed() == (["demo-2"], store.place.where("stage1-step00000020"))
    finish("stage2")
    names, resume = proposed()
    assert "The run is finished" in in_process("checkpoints", run.folder)
    with pytest.raises(CheckpointError):
        require_resumable(run, store, resume, run.segments())
    new = Run.open(load_config("demo", [f"output={tmp_path}", f"name={names[0]}"]))
    require_resumable(new, CheckpointStore.of(new.config), resume, new.segments())
