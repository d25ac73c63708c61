"""A real Prometheus scrapes a real run by the rendered configuration, and its alerts fire.

Run: python -m pytest tests/platform/driver/test_prometheus.py -m nightly (needs prometheus: apt-get install prometheus)
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import environment, free_port, run_of, start

from domainshuttle.cluster.monitoring.alerts import alert_rules
from domainshuttle.cluster.monitoring.manifests import prometheus_config
from domainshuttle.cluster.spec import MonitoringSection
from domainshuttle.platform.tracking.queries import read_history

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus (Debian: apt-get install prometheus)"),
]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """`ray start --head` with metrics, as a node of a VM: its address, the file in which Ray lists its targets, and the
    environment of its clients."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    folder = Path(f"/tmp/ds-{free_port()}")  # sockets' names may be 107 characters long
    port = free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", "--num-cpus=3",
               f"--temp-dir={folder}", f"--metrics-export-port={free_port()}", "--include-dashboard=true",
               f"--dashboard-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
               "--block"]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(**tokens), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (targets := folder / "prom_metrics_service_discovery.json").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.5)
        yield f"127.0.0.1:{port}", targets, tokens
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def ask(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=5) as answer:
        return json.load(answer)["data"]


def until(port: int, expression: str, seconds: float) -> list[dict[str, Any]]:
    """The series of an expression, once there are any."""
    deadline = time.monotonic() + seconds
    while True:
        found: list[dict[str, Any]] = []
        with contextlib.suppress(urllib.error.URLError):  # it is not up yet
            found = ask(port, f"query?query={urllib.parse.quote(expression)}")["result"]
        if found or time.monotonic() > deadline:
            return found
        time.sleep(1)


def test_a_run_is_seen_and_its_spent_budget_alerts(
    tiny: Path, tmp_path: Path, head: tuple[str, Path, dict[str, str]]
) -> None:
    address, targets, tokens = head
    rules = alert_rules(MonitoringSection(budget=0.05))
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(prometheus_config(str(targets), "alerts.yaml", "2s")))
    port = free_port()
    command = [str(PROMETHEUS), "--config.file=prometheus.yaml", "--storage.tsdb.path=data",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (tmp_path / "prometheus.log").open("w") as log:
        prometheus = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        name = "watched"
        _, run, overrides = run_of(tiny, name, "budget_gpu_hours=0.5", "stages.stage2.steps=400")
        driver = start(tiny, *overrides, "--set", f"cluster.address={address}", log=tmp_path / "train.log", **tokens)
        of_run = f'{{run="{name}"}}'
        losses = until(port, f"ray_domainshuttle_loss{of_run}", 300)
        assert losses, (tmp_path / "train.log").read_text()[-3000:]
        assert {one["metric"]["segment"] for one in losses} <= {"stage1", "stage2"}
        rates = until(port, f"count(max by (rank) (ray_domainshuttle_rank_matmul_flops{of_run})) == 2", 120)
        assert rates, "both ranks"
        for metric in ("step_time", "gpu_hours", "goodput", "checkpoint_time", "rank_wait_fraction", "step"):
            assert until(port, f"ray_domainshuttle_{metric}{of_run}", 60), metric
        scraped, segment = float(losses[0]["value"][1]), losses[0]["metric"]["segment"]
        curve = read_history(run.config.tracking_uri, (run.read_ids() or {})["segments"][segment], "loss")
        assert scraped in [pytest.approx(loss, rel=1e-6) for _, loss in curve]
        deadline = time.monotonic() + 240
        while not (alerts := [one for one in ask(port, "alerts")["alerts"] if one["state"] == "firing"]):
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(2)
        fired = {one["labels"]["alertname"]: one for one in alerts}
        assert fired["DomainShuttleBudget"]["labels"]["run"] == name
        assert name in fired["DomainShuttleBudget"]["annotations"]["summary"]
    finally:
        prometheus.terminate()
        prometheus.wait(30)
