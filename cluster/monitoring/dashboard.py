"""A Grafana dashboard of runs, beside Ray's own of their nodes."""

from typing import Any

from domainshuttle.cluster.monitoring.metrics import series

UID = "domainshuttle-runs"


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    for title, rows in _ROWS.items():
        top = 9 * len(panels)
        panels.append({"type": "row", "title": title, "gridPos": {"h": 1, "w": 24, "x": 0, "y": top}, "panels": []})
        width = 24 // len(rows)
        for number, (name, unit, *queries) in enumerate(rows):
            place = {"h": 8, "w": width, "x": width * number, "y": top + 1}
            panels.append(_panel(name, unit, [(query, legend) for query, legend in queries], place))
    for number, panel in enumerate(panels):
        panel["id"] = number + 1
    return {
        "uid": UID,
        "title": "DomainShuttle runs",
        "tags": ["domainshuttle", "ray"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "1m",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                {
                    "name": "run",
                    "type": "query",
                    "label": "Run",
                    "datasource": _SOURCE,
                    "query": {"query": f"label_values({series('step_time')}, run)", "refId": "runs"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
        "panels": panels,
    }


def _panel(name: str, unit: str, queries: list[tuple[str, str]], place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": name,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"lineWidth": 1, "showPoints": "never"}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for number, (query, legend) in enumerate(queries)
        ],
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_CHOSEN = '{run=~"$run"}'


def _run(name: str, *more: str) -> str:
    return f"max by ({', '.join(('run', *more))}) ({series(name)}{_CHOSEN})"


def _line(name: str, *more: str, what: str = "") -> tuple[str, str]:
    legend = " ".join(f"{{{{{label}}}}}" for label in ("run", *more))
    return _run(name, *more), f"{legend} {what}".strip()


_ranks = _run("rank_matmul_flops", "rank", "NodeAddress")
_ROWS: dict[str, list[tuple[Any, ...]]] = {
    "Learning": [
        ("Loss", "short", _line("loss", "segment")),
        ("Gradient norm", "short", _line("grad_norm", "segment")),
        ("Learning rate", "sci", _line("learning_rate", "segment")),
        ("Dropped steps", "short", _line("dropped_steps", "segment")),
    ],
    "Speed": [
        ("Step", "s", _line("step_seconds", "segment")),
        ("MFU", "percentunit", _line("mfu", "segment")),
        ("Tokens a second of a device", "short", _line("device_tokens_per_second", "segment")),
        ("Samples a second", "short", _line("samples_per_second", "segment")),
    ],
    "Ranks": [
        ("Waiting for data", "percentunit", _line("data_wait_fraction", "segment", what="rank 0"),
         _line("rank_wait_fraction", "rank", "NodeAddress")),
        ("Own rate against the median rank's", "percentunit",
         (f"{_ranks} / on (run) group_left () quantile by (run) (0.5, {_ranks})",
          "{{run}} rank {{rank}} {{NodeAddress}}")),
        ("The five slowest ranks", "short", (f"bottomk by (run) (5, {_ranks})",
         "{{run}} rank {{rank}} {{NodeAddress}}")),
    ],
    "Progress": [
        ("Steps", "short", _line("step", "segment"), _line("planned_steps", "segment", what="planned")),
        ("Since the last step and checkpoint", "s",
         (f"time() - {_run('step_time')}", "{{run}} step"),
         (f"time() - {_run('checkpoint_time', 'segment')}", "{{run}} {{segment}} checkpoint")),
        ("Device-hours", "h", _line("gpu_hours"), _line("gpu_hours_budget", what="budget")),
        ("Goodput", "percentunit", _line("goodput")),
    ],
    "Evaluation": [
        ("Scores of generated clips", "short", _line("evaluation_score", "segment", "metric")),
    ],
    "Trouble": [
        ("Workers", "short", _line("workers")),
        ("Restarts", "short", _line("restarts")),
        ("Failed checkpoints", "short", _line("failed_checkpoints", "segment")),
        ("Waiting for MLflow", "bytes", _line("outbox_bytes")),
        ("Quarantined samples", "short", _line("quarantined_samples")),
        ("Held up by checkpoints", "s", _line("checkpoint_stall_seconds", "segment")),
    ],
}  # fmt: skip
