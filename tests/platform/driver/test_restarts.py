"""Why workers failed, as the tracking and the ledger are told.

Run: python -m pytest tests/platform/driver/test_restarts.py
"""

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver.planned_data import PlannedData
from domainshuttle.platform.driver.restarts import FailuresInARow, cause, tell_restart
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.tracking.outbox import segment_journal, tell_error


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path}"]))


def tags(run: Run, segment: str = "stage1") -> dict[str, str]:
    lines, _ = segment_journal(run.spool, segment).read()
    return {name: text for line in lines if line["kind"] == "tags" for name, text in line["values"].items()}


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:3344")


def test_the_cause_is_not_what_the_others_see_of_it() -> None:
    assert cause({0: LOST, 1: ValueError("the batch is empty")}) == "rank 1: ValueError: the batch is empty"
    died = WorkerHealthCheckFailedError("worker 1 failed its health check", ActorDiedError())
    assert cause({0: LOST, 1: died, 2: ValueError("x")}).startswith("rank 1: ActorDiedError: The actor died")
    assert cause({0: LOST}).startswith("rank 0: RuntimeError: ")
    assert cause({}) == "no worker said why"


def test_any_ranks_error_is_in_the_spool_before_it_dies(run: Run) -> None:
    tell_error(run, "stage1", 5, "OSError: s3://key:hunter2@bucket does not answer")
    assert tags(run) == {"error.rank5": "OSError: s3://***@bucket does not answer"}


def test_each_restart_has_a_tag_and_ends_the_attempt_in_the_ledger(run: Run) -> None:
    ledger = Ledger(run.ledger_path)
    policy = FailuresInARow(run, "stage1", 2)
    assert policy.make_decision(WorkerGroupError("", {1: RayActorError()})) is FailureDecision.RETRY
    assert tags(run) == {}  # there was no attempt yet
    for last in (7, 9):
        attempt = ledger.start(2, "stage1", 4)
        attempt.progress(last)
        attempt._writer.close()
        tell_restart(run, "stage1", f"rank 1: died after {last}")
        assert Ledger(run.ledger_path).attempts()[-1].reason == f"rank 1: died after {last}"
    ledger.start(2, "stage1", 4)
    assert policy.make_decision(WorkerGroupError("", {0: LOST, 1: ValueError("bad")})) is FailureDecision.RETRY
    assert tags(run) == {
        "restart.1": "rank 1: died after 7 (step 7 was reached)",
        "restart.2": "rank 1: died after 9 (step 9 was reached)",
        "restart.3": "rank 1: ValueError: bad (step 4 was reached)",
    }
    ledger.start(2, "stage1", 4)
    assert policy.make_decision(WorkerGroupError("", {1: ValueError("bad")})) is FailureDecision.RAISE
    assert "restart.4" not in tags(run)  # it is not started again


def test_a_resize_is_a_restart_too(run: Run) -> None:
    earlier = Ledger(run.ledger_path, clock=lambda: 1000.0).start(2, "stage1", 0)
    earlier._writer.close()
    data = PlannedData(run, run.segment("stage1"), None, None)  # type: ignore[arg-type]
    data._tell_resize()
    assert tags(run) == {}  # of another fit, which the driver has ended
    Ledger(run.ledger_path).start(2, "stage1", 3)
    data._tell_resize()
    assert tags(run) == {"restart.2": "the group was resized, or a node went (step 3 was reached)"}
