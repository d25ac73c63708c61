"""A cluster of several pools: workers are placed on the nodes of their labels alone, and preflight looks at these.

Run: python -m pytest tests/platform/driver/test_pools.py -m nightly
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from running import cli, run_of

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

POOL = "domainshuttle.io/pool"


@pytest.fixture
def pools(ray_cluster: None) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """The address of a cluster, the id of each pool's node, and the variables of its token.

    The encoders' node has most CPUs, so that workers without labels would be placed there.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = {
        pool: cluster.add_node(num_cpus=cpus, labels={POOL: pool}).node_id
        for pool, cpus in (("encoders", 6), ("trainers", 1))
    }
    cluster.wait_for_nodes()
    yield cluster.address, nodes, {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    cluster.shutdown()


def placed(pool: str) -> str:
    return f"cluster.node_labels={{{POOL}: {pool}}}"


def trials(found: list[dict[str, Any]]) -> dict[str, Any]:
    return next(one for one in found if one["check"] == "trial steps")


def test_workers_are_on_the_nodes_of_their_labels(
    tiny: Path, pools: tuple[str, dict[str, str], dict[str, str]]
) -> None:
    address, nodes, access = pools
    common = [f"cluster.address={address}", "stages.stage1.steps=2", "stages.stage2.steps=2"]
    on_trainers = placed("trainers")
    _, run, arguments = run_of(tiny, "pools", *common, on_trainers)
    # four would fit elsewhere; two are what the trainers have room for
    cli("train", tiny, *arguments, "--set", "cluster.workers=[1, 4]", **access)
    states = [json.loads(path.read_text()) for path in (run.folder / "workers").rglob("rank*.json")]
    assert {one["node"] for one in states} == {nodes["trainers"]}
    assert {one["world_size"] for one in states} == {2}
    for pool in ("trainers", "encoders"):
        labels = placed(pool)
        options = ["--set", common[0], "--set", labels, "--only", "nodes", "--only", "group", "--json"]
        trial = trials(json.loads(cli("preflight", tiny, *options, **access)))
        assert trial["verdict"] == "pass" and nodes[pool][:8] in trial["where"], trial
    _, _, wrong = run_of(tiny, "no-pool", *common, placed("trainer"))
    for verb in ("train", "preflight"):
        refused = " ".join(cli(verb, tiny, *wrong, expect=2, **access).split())
        assert f"nodes of the labels {POOL}=trainer" in refused
        assert f"{POOL}=encoders, {POOL}=trainers" in refused
