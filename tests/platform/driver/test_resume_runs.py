"""Whole runs that are resumed in other ways than by their own command: by another driver, name, folder.

Run: python -m pytest -m nightly tests/platform/driver/test_resume_runs.py
"""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from running import balanced, cli, run_of, same_weights, skip_stage1, start, wait_for_step, weights, workers_of

from domainshuttle.platform.checkpoint.store import CheckpointStore
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.tracking.queries import read_runs

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]


def test_faults_without_end_end_a_run_only_where_nothing_is_saved_between_them(
    tiny: Path, unbroken: tuple[RunConfig, str]
) -> None:
    config, run, more = run_of(tiny, "many-faults", "cluster.max_failures=1")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    for _ in range(3):
        wait_for_checkpoint(process, run)
        attempt = run.read_progress()["attempt"]
        workers_of(process)[0].kill()
        while run.read_progress()["attempt"] == attempt:
            assert process.poll() is None, "given up although checkpoints were written between the faults"
            time.sleep(0.1)
    assert process.wait(timeout=400) == 0
    same_weights(config, unbroken[0])
    balanced(config)
    told = [json.loads(line)["text"] for line in run.notices_path.open()]
    assert len(told) == 3
    assert all("fault 1 of at most 1 in a row" in text for text in told)


def wait_for_checkpoint(process: subprocess.Popen[bytes], run: Run) -> None:
    """Until this attempt has written one that is whole."""
    store = CheckpointStore.of(run.config)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        newest, state = store.newest("stage2"), run.read_progress()
        if newest and state["segment"] == "stage2" and newest.state.step > state["first_step"]:
            return
        time.sleep(0.2)
    raise AssertionError("there was no checkpoint")


def test_a_second_driver_of_a_run_is_refused(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "twice")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 2)
    for arguments in (more, [*more, "--fresh"]):
        printed = cli("train", tiny, *arguments, expect=2)
        assert f"process {process.pid} on " in printed
        assert "Traceback" not in printed
    assert process.wait(timeout=400) == 0
    same_weights(config, unbroken[0])
    balanced(config)


def test_a_run_whose_folder_was_lost_goes_on_from_its_store(
    tiny: Path, unbroken: tuple[RunConfig, str], tmp_path: Path
) -> None:
    config, run, more = run_of(
        tiny, "lost-folder", f"checkpoint.store={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/m.db"
    )
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 3
    hours = Ledger(run.ledger_path).summary()
    ids = {record.name: record.id for record in read_runs(config.tracking_uri, [config.tracking.experiment])}
    shutil.rmtree(run.folder)
    printed = cli("train", tiny, *more)
    assert "had no ledger" in printed
    assert "Stage stage1: goes on after step 4" in printed  # of 4: only its weights are written again
    after = Ledger(run.ledger_path).summary()
    # the last checkpoint's account is a little older than the end
    assert after.used > 0.8 * hours.used
    assert after.attempts > hours.attempts
    assert {r.name: r.id for r in read_runs(config.tracking_uri, [config.tracking.experiment])} == ids
    for stage in ("stage1", "stage2"):
        same_weights(config, unbroken[0], stage)


def test_a_run_of_a_new_name_goes_on_from_another_ones_checkpoint(
    tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str]
) -> None:
    """What is advised after a divergence: a lower learning rate, from a checkpoint before it, under a new name."""
    whole, _ = unbroken
    from_run = CheckpointStore.of(whole)
    found = from_run.newest("stage2")
    assert found is not None
    config, _, more = run_of(tiny, "lower-rate", "stages.stage2.learning_rate=1e-4", "stages.stage2.steps=27")
    printed = " ".join(cli("train", tiny, *more, "--resume", found.where, **cluster_variables).split())
    assert "Stage stage1 is taken over, finished" in printed
    assert "stages.stage2.learning_rate was 0.001, now 0.0001" in printed
    assert "Stage stage2: goes on after step 24" in printed
    assert "Finished after" in printed
    assert re.search(r"Stage stage2 trains [\d,]+ of [\d,]+ parameters", printed)
    before, after = weights(whole, "stage2"), weights(config, "stage2")
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    newest = CheckpointStore.of(config).newest("stage2")
    assert newest is not None
    assert newest.state.step == 27
    (page,) = [one for one in read_runs(config.tracking_uri, ["lower-rate"]) if one.parent is None]
    assert page.tags["from.stage2"] == found.where
    assert page.tags["from.stage1"] == str(Run(whole).segment("stage1").weights)
    _, _, other = run_of(tiny, "other-data", "stages.stage2.global_batch=4")
    refused = cli("train", tiny, *other, "--resume", found.where, expect=2, **cluster_variables)
    assert "the data order is not the one" in refused
    assert "Traceback" not in refused
