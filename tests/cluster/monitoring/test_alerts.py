"""Alert rules and the dashboard, by Prometheus' own tools: promtool's unit tests, and a parser of its language."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from domainshuttle.cluster.monitoring.alerts import alert_rules
from domainshuttle.cluster.monitoring.dashboard import dashboard
from domainshuttle.cluster.monitoring.metrics import METRICS, series
from domainshuttle.cluster.spec import MonitoringSection

PROMTOOL = shutil.which("promtool")
RULES = alert_rules(MonitoringSection())
NAMES = [rule["alert"] for group in RULES["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    rules = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return rules + [expression.replace("$run", ".*") for expression in panels]


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_promql_on_metrics_that_there_are(expression: str) -> None:
    promql_parser.parse(expression)
    known = {series(name) for name in METRICS}
    for word in re.findall(r"ray_domainshuttle_\w+", expression):
        assert word in known


def test_each_metric_is_shown() -> None:
    shown = " ".join(expressions())
    assert [name for name in METRICS if series(name) not in shown] == []


def test_panels_lie_beside_each_other() -> None:
    content = json.loads(json.dumps(dashboard()))
    taken: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])


def until(minute: int, before: float, after: float) -> str:
    """Values of four hours, a minute each: one, then from a minute on another."""
    return f"{before:g}x{minute - 1} {after:g}x{240 - minute}"


def always(value: float) -> str:
    return f"{value:g}x600"


Series = dict[str, str]
"""Values by a metric's name; `name@2` is that of rank 2, on a node of its own."""


def lines(run: str, content: Series) -> list[dict[str, str]]:
    found = []
    for text, values in content.items():
        name, _, rank = text.partition("@")
        labels = {"run": run, "WorkerId": "w"}
        if "segment" in METRICS[name].tags:
            labels["segment"] = "stage2"
        if rank:
            labels |= {"rank": rank, "NodeAddress": f"10.0.0.{rank}"}
        inside = ", ".join(f'{key}="{value}"' for key, value in labels.items())
        found.append({"series": f"{series(name)}{{{inside}}}", "values": values})
    return found


def of_ranks(name: str, usual: float, third: float) -> Series:
    return {f"{name}@{rank}": always(third if rank == 3 else usual) for rank in range(5)}


CASES: dict[str, tuple[str, Series, Series, Series]] = {
    # when, what both runs have, and what the good and the bad one have
    "NoStep": ("120m", {}, {"step_time": "0+60x240"}, {"step_time": "0+60x80 4800x160"}),
    "Restarts": ("120m", {}, {"restarts": until(90, 1, 2)}, {"restarts": until(90, 1, 5)}),
    "CheckpointAge": (
        "200m",
        {"checkpoint_every_steps": always(100), "step_seconds": always(23)},
        {"checkpoint_time": "0+60x240"},
        {"checkpoint_time": always(0)},
    ),
    "CheckpointFailed": ("120m", {}, {"failed_checkpoints": always(1)}, {"failed_checkpoints": until(100, 1, 2)}),
    "Goodput": ("500m", {"begin_time": always(0)}, {"goodput": always(0.95)}, {"goodput": always(0.7)}),
    "Budget": ("10m", {"gpu_hours_budget": always(100)}, {"gpu_hours": always(50)}, {"gpu_hours": always(91)}),
    "DroppedSteps": ("120m", {}, {"dropped_steps": until(100, 2, 4)}, {"dropped_steps": until(100, 2, 9)}),
    "MfuDrop": ("235m", {}, {"mfu": always(0.38)}, {"mfu": until(200, 0.38, 0.30)}),
    "DataWait": ("60m", {}, of_ranks("rank_wait_fraction", 0.001, 0.01), of_ranks("rank_wait_fraction", 0.001, 0.3)),
    "SlowRank": ("60m", {}, of_ranks("rank_matmul_flops", 5e14, 4.8e14), of_ranks("rank_matmul_flops", 5e14, 3.9e14)),
    "Outbox": ("120m", {}, {"outbox_bytes": always(200_000)}, {"outbox_bytes": "0+10000x240"}),
    "Quarantine": ("120m", {}, {"quarantined_samples": always(7)}, {"quarantined_samples": until(100, 7, 8)}),
}


def unit_test(name: str) -> dict[str, Any]:
    """promtool's: of two runs, alike but for what the alert is about, only the bad one is alerted."""
    when, shared, good, bad = CASES[name]
    rule = next(rule for rule in RULES["groups"][0]["rules"] if rule["alert"] == f"DomainShuttle{name}")
    labels = {"run": "bad", **rule["labels"]}
    if not rule["expr"].startswith(("topk", "bottomk")):
        labels |= {"segment": "stage2"} if "by (run, segment)" in rule["expr"] else {}
    else:
        labels |= {"rank": "3", "NodeAddress": "10.0.0.3"}
    alerted = {"eval_time": when, "alertname": rule["alert"], "exp_alerts": [{"exp_labels": labels}]}
    inputs = [*lines("good", {**shared, **good}), *lines("bad", {**shared, **bad})]
    return {"interval": "1m", "input_series": inputs, "alert_rule_test": [alerted]}


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_rules_alert_on_the_bad_run_and_not_on_the_good_one(tmp_path: Path) -> None:
    """By promtool, which evaluates the rules over hours. Texts are left out, since it would compare them."""
    assert {name for name in NAMES if name.startswith("DomainShuttle")} == {f"DomainShuttle{one}" for one in CASES}
    bare = json.loads(json.dumps(RULES))
    for group in bare["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(bare))
    content = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [unit_test(one) for one in CASES]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(content))
    command = [str(PROMTOOL), "test", "rules", "tests.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_the_rendered_files_are_prometheus_own(tmp_path: Path) -> None:
    from domainshuttle.cluster.monitoring.manifests import prometheus_config

    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(RULES))
    targets = tmp_path / "targets.json"
    targets.write_text("[]")
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(prometheus_config(str(targets), "alerts.yaml")))
    done = subprocess.run(
        [str(PROMTOOL), "check", "config", "prometheus.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and f"{len(NAMES)} rules found" in done.stdout, done.stdout + done.stderr
