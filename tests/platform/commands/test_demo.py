"""The parts of the demo that decide: python -m pytest tests/platform/commands/test_demo.py"""

import json
import subprocess
import sys
import time
from pathlib import Path

from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.commands.demo import _has_begun, _interrupt_at
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.run.folder import Run


def test_a_demo_that_goes_on_stops_no_stage_that_was_stopped_or_is_finished(tmp_path: Path) -> None:
    """`demo --no-fresh`, of one that ended anywhere: a training that is done can't be stopped half way."""
    run = Run.open(load_config("demo", [f"output={tmp_path}"]))
    last = run.segments()[-1]
    assert not _has_begun(run.config, last)
    last.weights.mkdir(parents=True)
    last.finish(9)
    assert _has_begun(run.config, last)
    (last.weights / "digest.txt").unlink()
    assert not _has_begun(run.config, last)
    state = TrainingState(last.name, 5, 1, 2, run.config.digest(), {}, {}, {})
    write_manifest(CheckpointStore.of(run.config).place, state, str(Name(last.name, 5)), {})
    assert _has_begun(run.config, last)


def test_what_an_earlier_training_wrote_interrupts_no_later_one(tmp_path: Path) -> None:
    run = Run.open(load_config("demo", [f"output={tmp_path}"]))
    state = {"segment": "stage2", "step": 40, "time": time.time() - 1}
    run.progress_path.write_text(json.dumps(state))
    code = "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(3)); time.sleep({})"
    process = subprocess.Popen([sys.executable, "-c", code.format(0.8)])
    _interrupt_at(process, run, "stage2", 40)
    assert process.wait(10) == 0
    process = subprocess.Popen([sys.executable, "-c", code.format(60)])
    time.sleep(0.5)  # until it listens
    run.progress_path.write_text(json.dumps({**state, "time": time.time() + 0.1}))
    _interrupt_at(process, run, "stage2", 40)
    assert process.wait(10) == 3
