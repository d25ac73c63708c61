"""Faults, given to whole runs by their users' means: what docs/resuming.md promises of each is what is left at the end.

These start workers again and again, so they are not part of `make test`: python -m pytest -m nightly tests/platform
"""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import (
    balanced,
    cli,
    losses,
    poisoned,
    run_of,
    same_weights,
    skip_stage1,
    start,
    unreadable,
    wait_for_step,
    weights,
    workers_of,
)

from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointStore
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.sample_audit import audit_samples, read_consumed
from domainshuttle.platform.tracking.queries import read_runs

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


def test_a_driver_that_was_killed_is_started_again(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "killed-driver")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 5)
    children = workers_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(child.is_running() for child in children), "workers outlive their driver"
    assert start(tiny, *more).wait(timeout=300) == 0
    same_weights(config, unbroken[0])
    assert losses(config, "stage2") == losses(unbroken[0], "stage2")
    balanced(config)


def test_sigterm_leaves_a_checkpoint(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "sigterm", "checkpoint.every=1000")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 3
    newest = CheckpointStore(run.checkpoints).newest("stage2")
    assert newest is not None
    assert newest.state.step >= 3
    assert config.checkpoint.every > newest.state.step


def test_every_sample_once_through_kills_and_another_number_of_workers(
    tiny: Path, unbroken: tuple[RunConfig, str]
) -> None:
    """The end-to-end form of 'exactly once': random steps, random kills, 2 workers, then 1, then 2 again."""
    dice = random.Random(11)
    name = "exactly-once"
    config, run, two = run_of(tiny, name, "stages.stage2.steps=40")
    skip_stage1(run, unbroken[0])
    _, _, one = run_of(tiny, name, "stages.stage2.steps=40", "cluster.workers=1")
    sizes = set()
    for more in (two, one, two):
        process = start(tiny, *more)
        newest = CheckpointStore(run.checkpoints).newest("stage2")
        at = (newest.state.step if newest else 0) + dice.randint(2, 5)
        wait_for_step(process, run, "stage2", at)
        dice.choice(workers_of(process)).kill()  # without a word, in whatever it is doing
        attempt = run.read_progress()["attempt"]
        while run.read_progress()["attempt"] == attempt:
            assert process.poll() is None
            time.sleep(0.1)
        wait_for_step(process, run, "stage2", run.read_progress()["first_step"] + dice.randint(1, 4))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 3
        found = CheckpointStore(run.checkpoints).newest("stage2")
        assert found is not None
        sizes.add(found.state.world_size)
    assert start(tiny, *two).wait(timeout=300) == 0
    assert sizes == {1, 2}
    balanced(config)
    # of each epoch of the 24 clips, each once, whoever trained it
    consumed, again = read_consumed(run, "stage2")
    by_step: dict[int, list[str]] = {}
    for (step, _, _), part in sorted(consumed.items()):
        by_step.setdefault(step, []).extend(part.samples)
    order = [sample for step in sorted(by_step) for sample in by_step[step]]
    assert len(order) == 40 * 8
    for epoch in range(len(order) // 24):
        assert len(set(order[epoch * 24 : (epoch + 1) * 24])) == 24
    assert again > 0  # the kills did cost steps
    # the tolerance that docs/resuming.md states: two ranks' sums differ from one's by rounding
    ours, whole = dict(losses(config, "stage2")), dict(losses(unbroken[0], "stage2"))
    for step, loss in whole.items():
        assert ours[step] == pytest.approx(loss, rel=1e-4), step


def test_a_hanging_worker_is_found(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "hanging", "guard.hang_seconds=20")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 4)
    workers_of(process)[0].suspend()
    assert process.wait(timeout=300) == 0
    stacks = "".join(path.read_text() for path in (run.folder / "hangs").glob("*.txt"))
    assert "Timeout" in stacks
    assert "agree" in stacks or "backward" in stacks or "step" in stacks
    same_weights(config, unbroken[0])
    balanced(config)


def test_a_worker_that_dies_while_they_start_is_started_again(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    """At the first start and at one after a fault: before a worker has come to its first line."""
    config, run, more = run_of(tiny, "starting")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more, log=(log := run.folder / "log.txt"))
    killed = []
    for attempts in (0, 1):
        deadline = time.monotonic() + 200
        while not (workers := [one for one in workers_of(process) if one.pid not in killed]) or len(workers) < 2:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert Ledger(run.ledger_path).summary().attempts == attempts
        time.sleep(2)  # into its imports, or the group's set-up
        killed += [one.pid for one in workers]
        workers[1].kill()
        if not attempts:
            wait_for_step(process, run, "stage2", 4)
            killed += [one.pid for one in workers_of(process)]
            workers_of(process)[0].kill()
    assert process.wait(timeout=300) == 0, log.read_text()
    same_weights(config, unbroken[0])
    balanced(config)


def test_a_stop_is_not_waited_for_by_nobody(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    """Ctrl-C while there are no workers yet that could write a checkpoint."""
    config, run, more = run_of(tiny, "nobody")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more, log=(log := run.folder / "log.txt"))
    deadline = time.monotonic() + 120
    while "Stage stage2: begins" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 3, log.read_text()
    assert "Stopped after" in log.read_text() and "same command goes on" in log.read_text()
    assert "Finished after" in cli("train", tiny, *more)
    same_weights(config, unbroken[0])
    balanced(config)


def planned_samples(config: RunConfig, run: Run, steps: int) -> list[list[str]]:
    """The samples that the plan of stage 2 has for each step."""
    feed = make_feed(config, run.segment("stage2"))
    index, plan = feed.index(), feed.plan()
    return [[f"{row.source}/{row.key}" for row in index.rows(plan[step].rows)] for step in range(steps)]


def test_an_unreadable_sample_is_substituted_and_the_books_say_so(
    tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str]
) -> None:
    config, run, more = run_of(tiny, "unreadable")
    skip_stage1(run, unbroken[0])
    with unreadable(config) as name:
        printed = cli("train", tiny, *more, **cluster_variables)
    assert "Finished after" in printed
    planned = planned_samples(config, run, 24)
    assert audit_samples(config).substituted == sum(samples.count(name) for samples in planned) > 0
    balanced(config)
    lines = [json.loads(line) for path in (run.folder / "quarantine").iterdir() for line in path.open()]
    assert {f"{line['source']}/{line['key']}" for line in lines} == {name}


def test_more_unreadable_samples_than_accepted_end_the_run_for_good(
    tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str]
) -> None:
    config, run, more = run_of(tiny, "too-many", "loader.most_bad=0.001", "stages.stage2.steps=400")
    skip_stage1(run, unbroken[0])
    with unreadable(config):
        printed = cli("train", tiny, *more, expect=2, **cluster_variables)
    assert "samples could not be read, more than 0%" in printed and "loader.most_bad" in printed
    assert "Traceback" not in printed and "start again" not in printed
    assert Ledger(run.ledger_path).summary().attempts == 1


def test_a_spent_budget_stops_and_a_raised_one_goes_on(tiny: Path, cluster_variables: dict[str, str]) -> None:
    config, run, more = run_of(tiny, "budget", "budget_gpu_hours=0.012")
    printed = cli("train", tiny, *more, expect=3, **cluster_variables)
    assert "The budget of 0.012 device-hours is spent" in printed
    assert "budget_gpu_hours" in printed
    assert CheckpointStore(run.checkpoints).newest(run.read_progress()["segment"]) is not None
    assert Ledger(run.ledger_path).summary(0.012).spent
    attempts = Ledger(run.ledger_path).summary().attempts
    assert "The budget of 0.012 device-hours is spent" in cli("train", tiny, *more, expect=3, **cluster_variables)
    assert Ledger(run.ledger_path).summary().attempts == attempts, "devices were asked for"
    assert "Finished after" in cli("train", tiny, *more, "--set", "budget_gpu_hours=5", **cluster_variables)
    balanced(config)


def test_a_stage_ends_with_its_hours(
    tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str]
) -> None:
    config, run, more = run_of(tiny, "hours", "stages.stage2.gpu_hours=0.01", "stages.stage2.steps=5000")
    skip_stage1(run, unbroken[0])
    assert "Finished after" in cli("train", tiny, *more, **cluster_variables)
    segment = run.segment("stage2")
    assert 0 < segment.last_step < 5000
    assert Ledger(run.ledger_path).segment_hours("stage2") >= 0.01
    balanced(config)
    assert "Stage stage2 is finished" in cli("train", tiny, *more, **cluster_variables)


def test_stages_run_singly(tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str]) -> None:
    config, _, more = run_of(tiny, "singly")
    assert "train that one first" in cli("train", tiny, *more, "--stage", "stage2", expect=2, **cluster_variables)
    printed = cli("train", tiny, *more, "--stage", "stage1", **cluster_variables)
    assert "Next: the stages that are left, stage2" in printed
    same_weights(config, unbroken[0], "stage1")


@pytest.fixture
def poison(tiny: Path) -> Iterator[str]:
    """One clip whose latents are finite, so that the loader takes them, and whose loss is not."""
    with poisoned(load_config(str(tiny)), 4e37) as sample:
        yield sample


def test_a_step_that_is_not_finite_is_dropped_and_named(
    tiny: Path, unbroken: tuple[RunConfig, str], poison: str, cluster_variables: dict[str, str]
) -> None:
    steps = 10  # whose last one is good: else the run goes back, as in the next test
    config, run, more = run_of(tiny, "dropped", f"stages.stage2.steps={steps}")
    skip_stage1(run, unbroken[0])
    assert "Finished after" in cli("train", tiny, *more, **cluster_variables)
    lines = [json.loads(t) for p in run.dropped_path("stage2", 0).parent.glob("stage2*") for t in p.open()]
    assert {line["reason"] for line in lines} == {"not finite"}
    planned = planned_samples(config, run, steps)
    bad = {step for step, samples in enumerate(planned) if poison in samples}
    assert len(bad) == 3 and steps - 1 not in bad  # once an epoch of three steps
    assert {line["step"] for line in lines} == bad
    assert sum(poison in line["samples"] for line in lines) == 3
    assert all(np.isfinite(array).all() for array in weights(config, "stage2").values())


def test_bad_steps_in_a_row_send_the_run_back_and_are_skipped(
    tiny: Path, unbroken: tuple[RunConfig, str], poison: str, cluster_variables: dict[str, str]
) -> None:
    config, run, more = run_of(tiny, "rolled-back", "stages.stage2.steps=6", "guard.rollback_after=1")
    skip_stage1(run, unbroken[0])
    printed = cli("train", tiny, *more, **cluster_variables)
    assert "went back, and now skips what was bad: step" in printed
    assert len(run.skipped("stage2")) == 2
    balanced(config)
    assert audit_samples(config).skipped == 2 * 8
    _, run, never = run_of(
        tiny, "diverged", "stages.stage2.steps=6", "guard.rollback_after=1", "guard.most_rollbacks=0"
    )
    skip_stage1(run, unbroken[0])
    assert "went back to a checkpoint 1 time," in cli("train", tiny, *never, expect=2, **cluster_variables)


def test_a_rate_that_destroys_the_weights_never_finishes_a_stage(
    tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str]
) -> None:
    """The last loss tells nothing of the last update: the weights that leave a stage are checked by themselves."""
    for steps in (1, 6):
        _, run, more = run_of(
            tiny,
            f"destroyed-{steps}",
            f"stages.stage2.steps={steps}",
            "stages.stage2.learning_rate=1e3",  # the most that a configuration may say
            "stages.stage2.trained=['*']",
        )
        skip_stage1(run, unbroken[0])
        printed = " ".join(cli("train", tiny, *more, expect=2, **cluster_variables).split())
        assert "left weights whose loss is not finite" in printed and "--resume PATH" in printed
        assert not run.segment("stage2").finished


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A Ray cluster of three nodes on this machine: a head without workers, and two with room for one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def elastic(tiny: Path, whole: RunConfig, name: str, nodes: Any, *more: str) -> tuple[RunConfig, Run, Any]:
    config, run, arguments = run_of(
        tiny, name, "cluster.workers=[1, 2]", "cluster.cpus_per_worker=2", "stages.stage2.steps=60", *more
    )
    skip_stage1(run, whole)
    # this process's own cluster has set the mode, which the nodes have from it
    mode = {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]} if "RAY_AUTH_MODE" in os.environ else {}
    process = start(tiny, *arguments, RAY_ADDRESS=nodes.address, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1", **mode)
    return config, run, process


def test_a_lost_node_costs_steps_and_nothing_else(tiny: Path, unbroken: tuple[RunConfig, str], nodes: Any) -> None:
    first, second = nodes.add_node(num_cpus=2), nodes.add_node(num_cpus=2)
    assert first is not second
    config, run, process = elastic(tiny, unbroken[0], "lost-node", nodes)
    wait_for_step(process, run, "stage2", 5)
    nodes.remove_node(second, allow_graceful=False)
    assert process.wait(timeout=400) == 0
    balanced(config)
    consumed, _ = read_consumed(run, "stage2")
    ranks = {step: {r for s, _, r in consumed if s == step} for step in (0, 59)}
    assert ranks == {0: {0, 1}, 59: {0}}  # two workers at first, one at the end, the same batches
    tracked = {one.name: one for one in read_runs(config.tracking_uri, [config.tracking.experiment])}
    # these nodes are on one machine, which is what Ray Train and the loads on the schedule's page count
    loads = {name for name in tracked["lost-node"].metrics if name.endswith("/cpu_utilization_percentage")}
    assert loads == {"system/node_0/cpu_utilization_percentage"}
    names = {name: text for name, text in tracked["stage2"].tags.items() if name.startswith("nodes.")}
    assert set(names) == {"nodes.1", "nodes.2"} and [text.count("Ray's") for _, text in sorted(names.items())] == [2, 1]


def test_a_node_that_is_about_to_go_gets_a_checkpoint_in_time(
    tiny: Path, unbroken: tuple[RunConfig, str], nodes: Any
) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    nodes.add_node(num_cpus=2)
    second = nodes.add_node(num_cpus=2)
    config, run, process = elastic(tiny, unbroken[0], "preempted", nodes, "checkpoint.every=1000")
    wait_for_step(process, run, "stage2", 5)
    deadline = int((time.time() + 20) * 1000)
    accepted, message = GcsClient(address=nodes.address).drain_node(
        second.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot reclaim", deadline
    )
    assert accepted, message
    checkpoint = None
    while checkpoint is None and time.time() * 1000 < deadline:
        checkpoint = CheckpointStore(run.checkpoints).newest("stage2")
        time.sleep(0.2)
    assert checkpoint is not None, "no checkpoint before the deadline"
    nodes.remove_node(second, allow_graceful=False)
    assert process.wait(timeout=400) == 0
    balanced(config)
    assert Ledger(run.ledger_path).summary().lost < Ledger(run.ledger_path).summary().used


def test_a_damaged_newest_checkpoint_is_skipped(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, run, more = run_of(tiny, "damaged")
    skip_stage1(run, unbroken[0])
    process = start(tiny, *more)
    wait_for_step(process, run, "stage2", 10)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 3
    store = CheckpointStore(run.checkpoints)
    newest = store.newest("stage2")
    assert newest is not None
    shard = max(Path(newest.folder).rglob("*.safetensors"), key=os.path.getsize)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    printed = cli("train", tiny, *more)
    assert f"{newest.name} is skipped" in " ".join(printed.split())
    same_weights(config, unbroken[0])
    balanced(config)
    assert all(isinstance(found, Checkpoint) for _, found in CheckpointStore(run.checkpoints).list())
