"""The schedule: segments of stages and experts, their durations, origins and seeds, and what is chosen to run.

Run: python -m pytest tests/platform/run/test_folder.py
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.lock import RunLock
from domainshuttle.platform.run.sample_audit import read_consumed

EXPERTS = (
    "experts=[{name: high, base: /wan/transformer, low: 0.875}, {name: low, base: /wan/transformer_2, high: 0.875}]"
)


def demo(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config("demo", [f"output={tmp_path}", *overrides])


def test_stages_chain_their_weights(tmp_path: Path) -> None:
    run = Run.open(demo(tmp_path))
    base, stage1, stage2 = run.segments()
    assert base.origin is None
    assert stage1.origin == str(base.weights)
    assert stage2.origin == str(stage1.weights)
    assert len({segment.seed for segment in run.segments()}) == 3


def test_each_expert_is_a_segment_of_its_own_with_its_own_chain_and_timesteps(tmp_path: Path) -> None:
    run = Run.open(demo(tmp_path, EXPERTS))
    names = [segment.name for segment in run.segments()]
    assert names == ["base-high", "base-low", "stage1-high", "stage1-low", "stage2-high", "stage2-low"]
    high = run.segment("stage1-high")
    assert high.origin == str(run.segment("base-high").weights)
    assert run.segment("base-low").origin == "/wan/transformer_2"
    assert (high.flow.low, high.flow.high, high.flow.shift) == (0.875, 1.0, 3.0)
    assert (run.segment("stage1-low").flow.low, run.segment("stage1-low").flow.high) == (0.0, 0.875)
    assert [segment.name for segment in run.choose("stage1")] == ["stage1-high", "stage1-low"]
    assert [segment.name for segment in run.choose("stage1-low")] == ["stage1-low"]
    with pytest.raises(ConfigError, match="no stage 'stage9'"):
        run.choose("stage9")


def test_durations_are_steps_samples_or_hours(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"

    def write(**duration: float) -> None:
        content = yaml.safe_load(demo(tmp_path).to_yaml())
        del content["stages"][1]["steps"]
        content["stages"][1] |= duration
        path.write_text(yaml.safe_dump(content))

    write(samples=6401)
    config = load_config(str(path))
    assert config.stages[1].steps == 101  # of 64 samples each
    path.write_text(config.to_yaml())  # the resolved file says both
    assert load_config(str(path)).stages[1].steps == 101
    with pytest.raises(ConfigError, match="give one"):
        load_config(str(path), ["stages.stage1.samples=64"])
    write(gpu_hours=2)
    with pytest.raises(ConfigError, match="final_learning_rate needs an end"):
        load_config(str(path))
    assert load_config(str(path), ["stages.stage1.final_learning_rate=null"]).stages[1].gpu_hours == 2


def test_a_finished_stage_knows_after_how_many_steps(tmp_path: Path) -> None:
    segment = Run.open(demo(tmp_path)).segment("stage1")
    segment.weights.mkdir(parents=True)
    assert segment.last_step == 300
    segment.finish(123)
    assert segment.finished
    assert segment.last_step == 123
    for damage in (b"", b"{", b"\xff\xfe"):
        (segment.weights / "steps.txt").write_bytes(damage)
        with pytest.raises(ConfigError, match=r"steps\.txt is damaged: expected a whole number"):
            segment.last_step  # noqa: B018


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experts=[{name: high}, {name: high}]", "same name twice"),
        ("experts=[{name: high, low: 0.9, high: 0.8}]", "must lie below"),
        ("cluster.workers=[2, 1]", "least, most"),
        (
            "cluster.workers=[5, 7]",
            r"can't be shared by cluster.workers=\(5, 7\) x micro_batch=32: use a multiple of 224, or workers of which "
            "there are 1, 2",
        ),
        ("budget_gpu_hours=0", "greater than 0"),
    ],
)
def test_schedules_that_can_not_be_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demo(tmp_path, override)


def test_steps_of_a_rollback_are_kept_one_list_each(tmp_path: Path) -> None:
    run = Run.open(demo(tmp_path))
    assert run.skipped("stage2") == []
    run.skip("stage2", [7, 8])
    run.skip("stage2", [11])
    assert Run(run.config).skipped("stage2") == [[7, 8], [11]]


def test_the_later_attempt_at_a_step_is_the_one_that_counts(tmp_path: Path) -> None:
    run = Run.open(demo(tmp_path))

    def note(rank: int, attempt: int, step: int, samples: list[str], **more: bool) -> None:
        line = {"step": step, "part": 0, "attempt": attempt, "samples": samples, **more}
        with run.consumed_path("stage2", rank).open("a") as file:
            file.write(json.dumps(line) + "\n")

    for rank in (0, 1):  # two workers reach step 1, then one worker does step 1 again, alone
        note(rank, 100, 0, [f"a{rank}"])
        note(rank, 100, 1, [f"b{rank}"])
    note(0, 200, 1, ["b0", "b1"])
    note(0, 200, 2, ["c0", "c1"], passed_over=True)
    with run.consumed_path("stage2", 1).open("a") as file:
        file.write('{"step": 2, "pa')  # torn by a kill
    consumed, again = read_consumed(run, "stage2")
    assert {place: found.samples for place, found in consumed.items()} == {
        (0, 0, 0): ["a0"],
        (0, 0, 1): ["a1"],
        (1, 0, 0): ["b0", "b1"],
        (2, 0, 0): ["c0", "c1"],
    }
    assert [place for place, found in consumed.items() if found.skipped] == [(2, 0, 0)]
    assert again == 2


def test_hours_are_also_known_by_segment(tmp_path: Path) -> None:
    now = [0.0]
    ledger = Ledger(tmp_path / "ledger.jsonl", clock=lambda: now[0])
    for segment, seconds in (("stage1", 3600.0), ("stage2", 1800.0), ("stage1", 900.0)):
        attempt = ledger.start(2, segment, 0, now[0])
        now[0] += seconds
        attempt.add("productive", seconds)
        assert attempt.hours_since_last_line() == pytest.approx(2 * seconds / 3600)
        attempt.end("stopped")
    again = Ledger(tmp_path / "ledger.jsonl")
    assert again.segment_hours("stage1") == pytest.approx(2.5)
    assert again.segment_hours("stage2") == pytest.approx(1.0)
    other = Ledger(tmp_path / "other.jsonl")
    assert other.restore(again.snapshot())
    assert other.segment_hours("stage1") == pytest.approx(2.5)


def test_a_full_disk_at_a_start_leaves_the_runs_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = demo(tmp_path)
    run = Run.open(config)
    before = run.config_path.read_text()
    written = run.config_path.stat().st_mtime_ns
    Run.open(config)
    assert run.config_path.stat().st_mtime_ns == written, "what has not changed is not written"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Run.open(demo(tmp_path, "tracking.every=77"))
    monkeypatch.undo()
    assert run.config_path.read_text() == before
    assert find_run(run.folder).config == config
    segment = run.segment("stage1")
    segment.weights.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        segment.finish(5)
    assert not segment.finished


def test_a_fresh_start_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """Checkpoints on another disk, linked into the run's folder."""
    run = Run.open(demo(tmp_path / "runs"))
    elsewhere = run.checkpoints.rename(tmp_path / "disk")
    (elsewhere / "kept").touch()
    run.checkpoints.symlink_to(elsewhere)
    again = Run.open(run.config, fresh=True)
    assert again.checkpoints.is_dir() and not again.checkpoints.is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]


def test_a_fresh_start_removes_all_but_the_lock(tmp_path: Path) -> None:
    run = Run.open(demo(tmp_path))
    (run.folder / "checkpoints" / "old").mkdir()
    run.skip("stage1", [3])
    with RunLock(run.folder):
        Run.open(run.config, fresh=True)
        assert {path.name for path in run.folder.iterdir() if path.is_file()} == {
            "driver.lock", "driver.json", "config.yaml",
        }  # fmt: skip
        assert run.skipped("stage1") == []
        assert not list(run.checkpoints.iterdir())


@pytest.mark.parametrize(
    ("grace_seconds", "calls"), [(1.0, ""), (1.0, "dog.alive(); dog.allow_grace()"), (60.0, "dog.alive()")]
)
def test_a_worker_that_hangs_while_it_builds_or_saves_dies_too(
    tmp_path: Path, grace_seconds: float, calls: str
) -> None:
    """Before its first step, in a save with its longer limit, and, as ever, between steps."""
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from domainshuttle.platform.training.watchdog import Watchdog\n"
        "seconds = 60.0 if float(sys.argv[2]) < 60 else 1.0\n"
        "dog = Watchdog(seconds, float(sys.argv[2]), Path(sys.argv[1]))\n"
        f"{calls}\n"
        "threading.Event().wait(50)\n"
    )
    stacks = tmp_path / "rank0.txt"
    worker = subprocess.run([sys.executable, "-c", code, str(stacks), str(grace_seconds)], timeout=45, check=False)
    assert worker.returncode == 1
    assert "wait" in stacks.read_text()


def test_a_worker_that_hangs_dies_and_says_where(tmp_path: Path) -> None:
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from domainshuttle.platform.training.watchdog import Watchdog\n"
        "dog = Watchdog(1.0, 3.0, Path(sys.argv[1]))\n"
        "for _ in range(4):\n"
        "    dog.alive(); threading.Event().wait(0.4)\n"
        "print('alive', flush=True)\n"
        "def hanging_collective(): threading.Event().wait(60)\n"
        "hanging_collective()\n"
    )
    stacks = tmp_path / "hangs" / "rank0.txt"
    began = time.monotonic()
    worker = subprocess.run(
        [sys.executable, "-c", code, str(stacks)], capture_output=True, text=True, timeout=50, check=False
    )
    assert worker.returncode == 1
    assert worker.stdout == "alive\n"  # as long as it made steps it was left alone
    assert time.monotonic() - began < 30
    assert "hanging_collective" in stacks.read_text()


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "3", '{"offset": "x"}', '{"offset": null}'])
def test_a_damaged_bookmark_is_at_the_beginning(tmp_path: Path, text: str) -> None:
    journal = Journal(tmp_path / "schedule.jsonl")
    journal.append([{"a": 1}])
    journal.set_bookmark({"offset": journal.size()})
    assert journal.unread() == 0
    journal.path.with_suffix(".read.json").write_text(text)
    assert journal.bookmark() == {"offset": 0} and journal.unread() == journal.size()
