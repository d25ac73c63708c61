"""Whether a checkpoint can be gone on from, also one of another run, and what a lost folder gets back.

Run: python -m pytest tests/platform/checkpoint/test_resume.py
"""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.resume import IncompatibleError, adopt_stages, require_fit, require_resumable
from domainshuttle.platform.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    TrainingState,
    write_manifest,
)
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig, differences
from domainshuttle.platform.driver.recovery import recover_run
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import SKIPPED, WAITING, Journal, Notices
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import Fingerprints, folder_digest
from domainshuttle.platform.run.weights_origin import WeightsOrigin


class PlanOf:
    """As a feed: its plan's state is one number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def plan(self) -> "PlanOf":
        return self

    def check(self, saved: dict[str, Any]) -> None:
        if saved != {"seed": self.seed}:
            raise DataError(f"the data order is not the one this run began with: seed was {saved['seed']}")


def demo(folder: Path, *overrides: str) -> RunConfig:
    return load_config("demo", [f"output={folder / 'runs'}", f"checkpoint.store={folder / 'store'}", *overrides])


def save(run: Run, segment: Segment, step: int, **changes: Any) -> Checkpoint:
    store = CheckpointStore.of(run.config)
    name = str(Name(segment.name, step))
    state = TrainingState(
        segment.name, step, segment.seed, 2, run.config.digest(), {"seed": 1}, {}, {}, "theirs",
        config=run.config.decisive(), trained="abc", origin=segment.origin,
    )  # fmt: skip
    write_manifest(store.place, dataclasses.replace(state, **changes), name, {})
    return store.read(name)


def finish(segment: Segment, content: bytes = b"w", steps: int = 9) -> None:
    segment.weights.mkdir(parents=True)
    (segment.weights / "model.safetensors").write_bytes(content)
    segment.finish(steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"base": "theirs", "trained": ""}, None),  # of an earlier format
        ({"base": "others"}, r"weights others \(of /old/weights\), but segment stage1 now begins with theirs"),
        ({"trained": "more"}, "other trained parameters"),
        ({"step": 301}, "done 301 steps, and segment stage1 has only 300"),
        ({"plan": {"seed": 2}}, "data order is not the one"),
    ],
)
def test_a_checkpoint_fits_by_its_weights_its_data_and_its_parameters(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    run = Run.open(demo(tmp_path))
    segment = run.segment("stage1")
    found = save(run, segment, changes.pop("step", 5), origin="/old/weights", **changes)
    feed: Any = PlanOf(1)
    if message is None:
        require_fit(found, segment, WeightsOrigin("/base", identity="theirs"), "abc", feed)
        require_fit(found, segment, WeightsOrigin("/base", identity="theirs"), None, feed)
        return
    with pytest.raises(IncompatibleError, match=message):
        require_fit(found, segment, WeightsOrigin("/base", identity="theirs"), "abc", feed)


def identity_of(place: str | None, seed: int, known: Path | None = None) -> str:
    return WeightsOrigin(place, seed).identified(Fingerprints(known)).identity


def test_what_differs_from_a_checkpoints_configuration_is_listed(tmp_path: Path) -> None:
    run = Run.open(demo(tmp_path))
    state = save(run, run.segment("stage1"), 5).state
    new = demo(tmp_path, "name=again", "stages.stage1.learning_rate=1e-6", "guard.spike_factor=3")
    told = differences(state.config, new.decisive())
    assert told.startswith("name was 'demo', now 'again'; stages.stage1.learning_rate was 0.00")
    assert "guard" not in told


def test_a_run_of_a_new_name_takes_the_finished_stages_over(tmp_path: Path) -> None:
    old = Run.open(demo(tmp_path))
    base, stage1, stage2 = old.segments()
    finish(base)
    finish(stage1, b"trained", steps=7)
    found = save(old, stage2, 5)
    new = Run.open(demo(tmp_path, "name=again", "stages.stage2.learning_rate=1e-7"))
    said: list[str] = []
    adopted = adopt_stages(new, CheckpointStore.of(new.config), found.where, said.append)
    assert adopted == {"base": base.weights, "stage1": stage1.weights}
    assert [segment.finished for segment in new.segments()] == [True, True, False]
    assert new.segment("stage1").last_step == 7
    assert len(said) == 2
    ours = new.segment("stage2")
    assert identity_of(ours.origin, ours.seed) == identity_of(stage2.origin, stage2.seed)
    shutil.rmtree(old.folder)
    assert (new.segment("stage1").weights / "model.safetensors").read_bytes() == b"trained"
    # and nothing where there is nothing to take
    for there in (found.where, "stage2-step00000099"):
        assert adopt_stages(new, CheckpointStore.of(new.config), there, said.append) == {}
    assert len(said) == 2


def lose_folder(tmp_path: Path) -> tuple[Run, str]:
    """A run that was in stage 2 when its folder was lost, opened again; and what is said of it."""
    run = Run.open(demo(tmp_path))
    base, stage1, stage2 = run.segments()
    now = [1000.0]
    ledger = Ledger(run.ledger_path, clock=lambda: now[0])
    attempt = ledger.start(4, "stage1", 0)
    now[0] += 3600
    attempt.end("stopped")
    save(run, stage1, 7)
    save(
        run, stage2, 5, ledger=ledger.snapshot(), mlflow={"key": "k", "parent": "p"},
        finished={base.name: 12, stage1.name: 7}, passed_over={"stage1": [], "stage2": [[3, 4], [9]]},
    )  # fmt: skip
    shutil.rmtree(run.folder)
    again = Run.open(run.config)
    said: list[str] = []
    recover_run(again, said.append)
    return again, " ".join(said)


def test_a_lost_folder_gets_its_books_back_from_the_store(tmp_path: Path) -> None:
    run, said = lose_folder(tmp_path)
    assert "4.000 device-hours" in said
    assert "stage2-step00000005" in said
    assert Ledger(run.ledger_path).summary().used == pytest.approx(4.0)
    assert run.read_ids() == {"key": "k", "parent": "p"}
    assert run.skipped("stage2") == [[3, 4], [9]]
    stage1 = run.segment("stage1")
    assert not stage1.finished  # its weights are gone; its last checkpoint, at step 7, has them
    assert stage1.last_step == 7
    assert stage1.stage.steps != 7
    stage1.begin_anew()
    assert stage1.last_step == stage1.stage.steps


@pytest.mark.parametrize("last", ["Run.skip", "Segment.end_at", "Run.write_ids", "Ledger.restore"])
def test_books_that_were_not_taken_to_the_end_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Killed at each of its writes, and started again."""
    run, _ = lose_folder(tmp_path)
    whole = books(run)
    shutil.rmtree(run.folder)
    run = Run.open(run.config)
    kind, name = {"Run": Run, "Segment": Segment, "Ledger": Ledger}[last.partition(".")[0]], last.partition(".")[2]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kind, name, killed)
        recover_run(run, pytest.fail)
    recover_run(run, lambda _: None)
    assert books(run) == whole
    recover_run(run, pytest.fail)


def books(run: Run) -> list[Any]:
    """What the driver goes on from."""
    of_segments = [(run.skipped(one.name), one.last_step) for one in run.segments()]
    return [of_segments, run.read_ids(), Ledger(run.ledger_path).summary()]


def test_a_folder_that_has_books_keeps_its_own(tmp_path: Path) -> None:
    run, _ = lose_folder(tmp_path)
    run.write_ids({"key": "ours"})
    recover_run(run, pytest.fail)
    assert run.read_ids() == {"key": "ours"}
    assert run.skipped("stage2") == [[3, 4], [9]]


@pytest.mark.parametrize("left", [b"", b"\0" * 300, b"\0" * 300 + b"\n", b'{"kind": "sta'])
def test_a_ledger_that_was_emptied_is_taken_from_the_checkpoint_again(tmp_path: Path, left: bytes) -> None:
    run, _ = lose_folder(tmp_path)
    whole = books(run)
    run.ledger_path.write_bytes(left)
    assert Ledger(run.ledger_path).summary().used == 0
    said: list[str] = []
    recover_run(run, said.append)
    assert books(run) == whole and len(said) == 1
    recover_run(run, pytest.fail)


def test_books_of_another_configuration_are_not_taken(tmp_path: Path) -> None:
    run, _ = lose_folder(tmp_path)
    shutil.rmtree(run.folder)
    other = Run.open(demo(tmp_path, "seed=99"))
    recover_run(other, pytest.fail)
    assert other.read_ids() is None


def test_large_weights_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, known = tmp_path / "wan", tmp_path / "fingerprints.json"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    first = identity_of(str(folder), 0, known)
    assert first == folder_digest(folder) == identity_of(str(folder), 0)
    from domainshuttle.platform.run import weights_digest as fingerprints

    hashed: list[Path] = []
    monkeypatch.setattr(fingerprints, "folder_digest", lambda path: hashed.append(path) or "new")
    assert identity_of(str(folder), 0, known) == first
    assert not hashed
    (folder / "model.safetensors").write_bytes(b"other")
    assert identity_of(str(folder), 0, known) == "new"
    known.write_text("{")  # torn
    assert identity_of(str(folder), 0, known) == "new"
    assert len(hashed) == 2


def test_people_are_told_each_thing_once_and_a_file_keeps_it(tmp_path: Path) -> None:
    path, shown = tmp_path / "notices.jsonl", list[str]()
    notices = Notices(path, shown.append)
    for segment, text in (("stage1", "a is cut"), ("stage1", "a is cut"), ("stage2", "b is gone")):
        notices.add(segment, SKIPPED, text)
    assert shown == ["a is cut", "b is gone"]
    assert notices.given("stage1", SKIPPED) == ["a is cut"]
    Notices(path, shown.append).add("stage1", SKIPPED, "a is cut")  # of another day
    assert [line["text"] for line in Journal(path).read()[0]] == ["a is cut", "b is gone", "a is cut"]


def test_what_is_said_of_workers_is_said_again_of_the_next(tmp_path: Path) -> None:
    """They may wait for the same room again, hours later."""
    path, shown = tmp_path / "notices.jsonl", list[str]()
    notices = Notices(path, shown.append)
    for _ in range(2):
        notices.other_workers()
        for _ in range(2):
            notices.add("stage1", WAITING, "no room for 2 workers")
            notices.add("stage1", SKIPPED, "a is cut")
    assert shown == ["no room for 2 workers", "a is cut", "no room for 2 workers"]
    assert [line["text"] for line in Journal(path).read()[0]] == shown
    assert notices.given("stage1", SKIPPED) == ["a is cut"]


def test_a_resume_of_which_nothing_would_come_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = Run.open(demo(tmp_path))
    base, stage1, stage2 = run.segments()
    store = CheckpointStore.of(run.config)
    of_base, of_stage1 = save(run, base, 5), save(run, stage1, 4)
    require_resumable(run, store, of_stage1.name, run.segments())
    with pytest.raises(CheckpointError, match=r"a checkpoint of stage stage1, and to be trained is base: .* --stage"):
        require_resumable(run, store, of_stage1.name, [base])
    finish(base)
    for resume, chosen, message in (
        ("stage1-step00000099", run.segments(), "not a whole checkpoint: there is nothing at .* There are: base-step0"),
        (str(tmp_path / "nowhere" / "stage1-step00000001"), run.segments(), "there is nothing at"),
        ("", run.segments(), "it names nothing"),
        (of_base.name, run.segments(), "stage base is|stage base of run demo"),
        (of_stage1.name, [base], "stage base"),
        ("none", [base], "--resume none: stage base is of run demo"),
    ):
        with pytest.raises(CheckpointError, match=message):
            require_resumable(run, store, resume, chosen)
    for resume in ("auto", "none", of_stage1.name, of_stage1.where):
        require_resumable(run, store, resume, run.segments())
    require_resumable(run, store, "auto", [base])
    finish(stage1)
    finish(stage2)
    with pytest.raises(CheckpointError, match="--fresh"):
        require_resumable(run, store, "none", run.segments())
    with pytest.raises(CheckpointError) as raised:
        require_resumable(run, store, of_stage1.name, run.segments())
    name, path = re.findall(r"--set name=(\S+) --resume (\S+)", str(raised.value))[0]
    new = Run.open(demo(tmp_path, f"name={name}"))
    require_resumable(new, CheckpointStore.of(new.config), path, new.segments())
    adopt_stages(new, CheckpointStore.of(new.config), path, lambda _: None)
    assert [segment.finished for segment in new.segments()] == [True, False, False]
    assert run.next_name() == "demo-3"
