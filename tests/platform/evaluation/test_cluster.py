"""An evaluation as a job of a standing cluster, its actors on other nodes than the command.

Run: pytest tests/platform/evaluation/test_cluster.py -m nightly
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from running import CLI, cli, free_port

from domainshuttle.platform.evaluation.config import EvaluationConfig
from domainshuttle.platform.evaluation.evaluate import read_results

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dashboard of a head without CPUs, and of two nodes with one each."""
    (tmp_path / "token").write_text("0123456789abcdef0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": free_port()})
    for _ in range(2):
        cluster.add_node(num_cpus=1, dashboard_agent_listen_port=free_port())
    cluster.wait_for_nodes()
    yield f"http://{cluster.webui_url.removeprefix('http://')}"
    cluster.shutdown()


def submitted(dashboard: str, folder: Path, *arguments: object, expect: int = 0) -> str:
    """What `ray job submit -- domainshuttle evaluate` prints, from a folder that is no node's own."""
    ray = Path(sys.executable).parent / "ray"
    command = [ray, "job", "submit", "--address", dashboard, "--", *CLI, "evaluate", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder, env={**os.environ})
    assert run.returncode == expect, (run.returncode, run.stdout[-4000:], run.stderr[-3000:])
    return run.stdout + run.stderr


def test_a_job_makes_and_measures_on_other_nodes_what_one_process_does(
    nodes: str, model: Path, config: EvaluationConfig, tmp_path: Path
) -> None:
    from ray.util.state import list_actors

    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    common = (f"ours={model}", "--cases", tmp_path / "mini.yaml")
    pools = ("--set", "generation.pool={actors: 2}", "--set", "scoring={actors: 2}")
    printed = submitted(nodes, tmp_path, *common, "--out", tmp_path / "job", *pools)
    assert "Made 6 clips of ours" in printed and "Report:" in printed
    actors = list_actors(address=nodes, filters=[("class_name", "=", "_Holder")], limit=100)
    assert len({one.node_id for one in actors}) == 2  # both nodes worked, and the head, which has no CPU, did not
    cli("evaluate", *common, "--out", tmp_path / "alone")
    one, other = (
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / out / "videos").rglob("*.mp4")
        }
        for out in ("job", "alone")
    )
    assert one == other and len(one) == 6
    for metric in ("hue_identity", "steadiness", "sharpness"):
        values = [read_results(tmp_path / out).values("ours", metric).tolist() for out in ("job", "alone")]
        assert values[0] == values[1]
    again = submitted(nodes, tmp_path, *common, "--out", tmp_path / "job", *pools)
    assert "Made " not in again and "Measured 0 values" in again
    refused = submitted(
        nodes, tmp_path, *common, "--out", tmp_path / "gpus", "--set", "generation.pool={gpus: 1}", expect=1
    )
    assert "generation.pool.gpus=1: an actor runs on one node" in " ".join(refused.split())
    assert not [*(tmp_path / "gpus").rglob("*.mp4")]
    assert json.loads((tmp_path / "job/results.json").read_text())["failures"] == []
