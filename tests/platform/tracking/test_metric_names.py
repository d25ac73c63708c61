"""Names of metrics in MLflow: whole titles, the loss first, and back again to what the run's files call them.

Run: python -m pytest tests/platform/tracking/test_metric_names.py
"""

import ast
import re
from pathlib import Path

import pytest

from domainshuttle.platform.run.ledger import LedgerSummary
from domainshuttle.platform.tracking.metric_names import _SHOWN, known, shown
from domainshuttle.platform.tracking.mlflow import MetricLogger, RunIds, connect
from domainshuttle.platform.tracking.queries import read_history, read_runs
from domainshuttle.platform.training import monitor, rank_rates

NAMES = {
    *_SHOWN, *LedgerSummary(0, 0, 0, 0, 0, 0, 0, 0, 1, 2.0).metrics(), "loss/flow", "loss/cross_pair", "pairs/same",
    "loss/flow/t_0.00-0.25", "loss/flow/domain/human", "memory/peak_gib", "ranks/lag_seconds/rank_3",
    "evaluation/identity_own", "speed/slowest_rank", *monitor._OF_SCHEDULE,
}  # fmt: skip


def test_each_metric_of_the_monitor_is_among_them() -> None:
    sources = [ast.parse(Path(one.__file__).read_text()) for one in (monitor, rank_rates)]
    nodes = [node for source in sources for node in ast.walk(source)]
    literals = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert literals & {"grad_norm", "step_seconds", "samples/s"} <= NAMES
    assert {name for name in literals if re.fullmatch(r"[a-z_]+/[a-z_]+(/device)?", name)} <= NAMES | {
        "memory/peak_rank"
    }


def test_the_loss_is_first_and_no_title_is_a_rest_of_a_unit() -> None:
    """MLflow 3.17 sorts the sections, which are what is before the last slash, and puts those without one last."""
    sections = sorted({shown(name).rpartition("/")[0] for name in NAMES})
    assert sections[0] == "loss" and "" not in sections
    titles = {shown(name).rpartition("/")[2] for name in NAMES}
    assert not titles & {"s", "device"} and all(len(title) <= 24 for title in titles)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_is_found_again(name: str) -> None:
    assert known(shown(name)) == name == known(name)


def test_points_of_before_and_of_now_are_one_curve(store: str, tmp_path: Path) -> None:
    uri = store
    ids = RunIds(uri, "names", "a run")
    logger = MetricLogger(ids, "s1", tmp_path / "spool")
    logger.log(3, {"loss": 0.5, "gpu_hours/used": 2.0})
    logger.log(4, {"loss": 0.25, "gpu_hours/used": 3.0})
    assert logger.close(60)
    client, run = connect(uri), read_runs(uri, ["names"])[1]
    assert set(client.get_run(run.id).data.metrics) == {"loss/total", "used_device_hours/total"}
    for step in (1, 2, 3):  # as versions until November 2026 logged it
        client.log_metric(run.id, "loss", 10.0 + step, step=step)
    assert read_history(uri, run.id, "loss") == [(1, 11.0), (2, 12.0), (3, 0.5), (4, 0.25)]
    run = read_runs(uri, ["names"])[1]
    assert run.metrics == {"loss": 0.25, "gpu_hours/used": 3.0} and run.steps == {"loss": 4, "gpu_hours/used": 4}
