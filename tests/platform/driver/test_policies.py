"""Ray Train's decisions as a run wants them: when a segment is given up, and how many workers it may have.

Run: python -m pytest tests/platform/driver/test_policies.py
"""

import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from domainshuttle.pipelines.errors import TooManyBadError
from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.resume import IncompatibleError
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.driver.restarts import DividingSizes, FailuresInARow, failed_start, final_error
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Notices

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(load_config("demo", [f"output={tmp_path}"]))


def save(run: Run, step: int) -> None:
    store = CheckpointStore.of(run.config)
    write_manifest(store.place, TrainingState("stage1", step, 1, 2, "d", {}, {}, {}), str(Name("stage1", step)), {})


def fault(error: Exception | None = None) -> WorkerGroupError:
    return WorkerGroupError("a worker died", {0: error or RayActorError()})


def test_failures_are_counted_between_checkpoints(run: Run) -> None:
    policy = FailuresInARow(run, "stage1", 2)
    for step in range(1, 8):  # more than the two that may come in a row
        assert policy.make_decision(fault()) is RETRY
        assert policy.make_decision(fault()) is RETRY
        save(run, step)
    assert [policy.make_decision(fault()) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_an_older_checkpoint_is_no_progress(run: Run) -> None:
    save(run, 5)
    save(run, 6)
    policy = FailuresInARow(run, "stage1", 1)
    assert policy.make_decision(fault()) is RETRY
    CheckpointStore.of(run.config).clear("stage1-step00000006")  # as if it were damaged
    assert policy.make_decision(fault()) is RAISE


def test_another_segments_checkpoints_do_not_count(run: Run) -> None:
    policy = FailuresInARow(run, "stage2", 1)
    assert policy.make_decision(fault()) is RETRY
    save(run, 5)
    assert policy.make_decision(fault()) is RAISE


@pytest.mark.parametrize(
    "error", [ConfigError("no such base"), IncompatibleError("other weights"), TooManyBadError("12 of 500")]
)
def test_what_does_not_go_away_ends_the_fit_at_once(run: Run, error: Exception) -> None:
    for raised in (error, RayTaskError("configure", "traceback", error).as_instanceof_cause()):
        failure = fault(raised)
        assert FailuresInARow(run, "stage1", 3).make_decision(failure) is RAISE
        found = final_error(failure)
        assert isinstance(found, type(error))
        assert str(found) == str(error)
    assert final_error(fault()) is None


def test_a_start_without_room_is_not_counted(run: Run) -> None:
    policy = FailuresInARow(run, "stage1", 0)
    for _ in range(5):
        assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) is RETRY
    assert policy.make_decision(ControllerError(ValueError("a bug"))) is RAISE


def test_a_death_while_they_start_needs_another_controller(run: Run) -> None:
    """Ray's keeps the room of workers that it could not start."""
    lost = RayTaskError("init_process_group", "traceback", ConnectionError("closed by peer")).as_instanceof_cause()
    startup = WorkerGroupStartupFailedError("at least one worker failed")
    startup.__cause__ = RayActorError()
    for found, reason in ((lost, lost), (RayActorError(), None), (startup, startup.__cause__)):
        error = ControllerError(found)
        assert FailuresInARow(run, "stage1", 9).make_decision(error) is RAISE
        assert failed_start(error) is (reason or found)
    for error in (ControllerError(WorkerGroupStartupTimeoutError(2)), ControllerError(ValueError("a bug")), fault()):
        assert failed_start(error) is None


def test_people_are_told_and_the_policy_travels_to_rays_controller(run: Run) -> None:
    driver = Notices(run.notices_path)
    policy = pickle.loads(pickle.dumps(FailuresInARow(run, "stage1", 1)))
    policy.make_decision(fault(RuntimeError("CUDA error: an illegal access")))
    policy.make_decision(fault(RuntimeError("again")))
    first, second = (text for _, _, text in driver.new())
    assert "RuntimeError: CUDA error: an illegal access" in first
    assert "start again. Failure 1 in a row without a newer checkpoint, at most 1" in first
    assert "cluster.max_failures is 1" in second


@pytest.mark.parametrize(("room", "size"), [(9, 8), (8, 8), (7, 4), (4, 4), (3, 0), (100, 16)])
def test_an_elastic_group_takes_the_largest_size_that_shares_the_batch(
    room: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = DividingSizes(ScalingConfig(num_workers=(4, 16), resources_per_worker={"CPU": 2}), [4, 8, 16])
    nodes: Any = {f"node-{n}": {"CPU": 3.0} for n in range(room)}  # a worker each
    assert policy._count_possible_workers(nodes) == size
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: nodes)
    decision = policy.make_decision_for_non_running_worker_group()
    assert getattr(decision, "num_workers", 0) == size
