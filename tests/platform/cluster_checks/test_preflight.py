"""Preflight on real clusters: several nodes by `cluster_utils`, a run's data, and what is broken on the way.

Run: python -m pytest tests/platform/cluster_checks/test_preflight.py -m nightly
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from running import cli

from domainshuttle.platform.config.loading import load_config

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture
def two_nodes(ray_cluster: None) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a cluster, and the variables of its token: it has that of this process's own."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address, {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    cluster.shutdown()


def test_two_nodes_pass_and_what_is_broken_is_named(
    tiny: Path, two_nodes: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, access = two_nodes
    # a node has one CPU: so each takes one of the two workers
    common = ["--set", "cluster.cpus_per_worker=0.6", "--set", f"cluster.address={address}", "--json"]
    found = json.loads(cli("preflight", tiny, *common, **access))
    by_check = {one["check"]: one for one in found}
    assert {one["verdict"] for one in found} <= {"pass", "warn"}, found
    assert "locked and renamed by 2 nodes" in by_check["storage of runs"]["what"]
    assert "between nodes" in by_check["links"]["what"]
    assert "GiB" in by_check["trial steps"]["what"]
    config = load_config(str(tiny))
    assert not [*Path(config.output).glob(".preflight*")]
    # a shard is gone, and nobody listens where MLflow should be
    data = tmp_path / "data"
    shutil.copytree(config.data, data)
    next((data / "clips/encoded").glob("*.tar")).unlink()
    more = ["--set", f"data={data}", "--set", "tracking.uri=http://127.0.0.1:9"]
    broken = json.loads(cli("preflight", tiny, *common, *more, expect=1, **access))
    wrong = {one["check"]: one for one in broken if one["verdict"] != "pass"}
    assert wrong["corpora"]["verdict"] == "fail" and "shards of its index are missing" in wrong["corpora"]["what"]
    assert wrong["tracking"]["verdict"] == "warn" and "does not answer" in wrong["tracking"]["what"]
    assert "left out" in wrong["trial steps"]["what"]
    refused = cli("train", tiny, "--preflight", *common[:4], *more, "--set", "name=refused", expect=2, **access)
    assert "does not pass 1 check:" in refused
