"""Alert rules on a run's metrics, in Prometheus' own form.

All are about ratios of what the run itself reports, so that one file serves runs of any size; the few thresholds are
those of the cluster's description. What to do about each is in docs/cluster.md, under the alert's name.
"""

from typing import Any

from domainshuttle.cluster.monitoring.metrics import series
from domainshuttle.cluster.spec import MonitoringSection

RUNBOOK = "docs/cluster.md#runbook"


def alert_rules(monitoring: MonitoringSection) -> dict[str, Any]:
    """The content of a rule file: `groups`."""
    rules = [*_of_progress(monitoring), *_of_speed(monitoring), *_of_records()]
    return {
        "groups": [
            {"name": "domainshuttle", "rules": rules},
            {"name": "domainshuttle-devices", "rules": _of_devices()},
        ]
    }


def _of_progress(monitoring: MonitoringSection) -> list[dict[str, Any]]:
    age = f"(time() - {_of_run('checkpoint_time', 'segment')})"
    interval = f"({_of_run('checkpoint_every_steps', 'segment')} * {_of_run('step_seconds', 'segment')})"
    used = f"({_of_run('gpu_hours')} / {_of_run('gpu_hours_budget')})"
    goodput = _of_run("goodput")
    return [
        _rule(
            "DomainShuttleNoStep", f"time() - {_of_run('step_time')} > {monitoring.no_step_minutes * 60:g}", "1m",
            "critical", "Run {{ $labels.run }} has made no step for {{ $value | humanizeDuration }}",
        ),
        _rule(
            "DomainShuttleRestarts", f"{_grown('restarts', '1h')} >= 3", "0m", "critical",
            "The workers of run {{ $labels.run }} were started {{ $value }} more times within an hour",
        ),
        _rule(
            "DomainShuttleCheckpointAge", f"{age} > 2 * {interval} + 900", "5m", "critical",
            "The newest checkpoint of run {{ $labels.run }} ({{ $labels.segment }}) is {{ $value | humanizeDuration }} "
            "old, more than twice as old as planned",
        ),
        _rule(
            "DomainShuttleCheckpointFailed", f"{_grown('failed_checkpoints', '1h', 'segment')} > 0", "0m", "warning",
            "{{ $value }} checkpoints of run {{ $labels.run }} ({{ $labels.segment }}) did not become whole",
        ),
        _rule(
            "DomainShuttleGoodput",
            # the first hours are starts and warm-up
            f"{goodput} < {monitoring.goodput:g} and time() - {_of_run('begin_time')} > 6 * 3600", "30m", "warning",
            "Only {{ $value | humanizePercentage }} of the device-hours of run {{ $labels.run }} went into steps that "
            "count",
        ),
        _rule(
            "DomainShuttleBudget", f"{used} >= {monitoring.budget:g}", "0m", "warning",
            "Run {{ $labels.run }} has used {{ $value | humanizePercentage }} of its budget_gpu_hours",
        ),
        _rule(
            "DomainShuttleDroppedSteps", f"{_grown('dropped_steps', '1h', 'segment')} >= 5", "0m", "warning",
            "{{ $value }} steps of run {{ $labels.run }} ({{ $labels.segment }}) were dropped for their loss within an "
            "hour",
        ),
    ]  # fmt: skip


def _of_speed(monitoring: MonitoringSection) -> list[dict[str, Any]]:
    mfu = _of_run("mfu", "segment")
    waits = _of_rank("rank_wait_fraction", "15m")
    rates = _of_rank("rank_matmul_flops", "15m")
    usual = f"quantile by (run) (0.5, {rates})"
    return [
        _rule(
            "DomainShuttleMfuDrop",
            f"avg_over_time({mfu}[15m:1m]) < {1 - monitoring.mfu_drop:g} * quantile_over_time(0.5, {mfu}[1d:5m])",
            "10m", "warning",
            "Run {{ $labels.run }} ({{ $labels.segment }}) computes slower than usual: MFU "
            "{{ $value | humanizePercentage }}",
        ),
        _rule(
            "DomainShuttleDataWait", f"topk by (run) (1, {waits}) > {monitoring.data_wait:g}", "10m", "warning",
            "Rank {{ $labels.rank }} of run {{ $labels.run }}, on {{ $labels.NodeAddress }}, waits for data for "
            "{{ $value | humanizePercentage }} of its time, and all others for it",
        ),
        _rule(
            "DomainShuttleSlowRank",
            f"bottomk by (run) (1, {rates} / on (run) group_left () {usual}) < {1 / monitoring.slow_rank:.4g}",
            "10m", "warning",
            "Rank {{ $labels.rank }} of run {{ $labels.run }}, on {{ $labels.NodeAddress }}, computes at "
            "{{ $value | humanizePercentage }} of the median rank's rate, and all others wait for it",
        ),
    ]  # fmt: skip


def _of_records() -> list[dict[str, Any]]:
    outbox = _of_run("outbox_bytes")
    return [
        _rule(
            "DomainShuttleOutbox", f"{outbox} > 65536 and {outbox} > {_before('outbox_bytes', '15m')}", "15m",
            "warning",
            "{{ $value | humanize1024 }}B of metrics of run {{ $labels.run }} wait for MLflow, and more come",
        ),
        _rule(
            "DomainShuttleQuarantine", f"{_grown('quarantined_samples', '1h')} > 0", "0m", "info",
            "{{ $value }} more samples of run {{ $labels.run }} could not be read within an hour",
        ),
    ]  # fmt: skip


def _of_devices() -> list[dict[str, Any]]:
    """On what NVIDIA's DCGM exporter reports of each GPU."""
    gpu = "GPU {{ $labels.gpu }} of {{ $labels.Hostname }}"
    return [
        _rule("GpuXid", "DCGM_FI_DEV_XID_ERRORS > 0", "0m", "warning", f"{gpu} reported XID {{{{ $value }}}}"),
        _rule(
            "GpuDoubleBitErrors", "increase(DCGM_FI_DEV_ECC_DBE_VOL_TOTAL[1h]) > 0", "0m", "critical",
            f"{gpu} has uncorrectable memory errors: take its node out",
        ),
        _rule(
            "GpuRowRemapFailed", "DCGM_FI_DEV_ROW_REMAP_FAILURE > 0", "0m", "critical",
            f"{gpu} could not replace a damaged row of its memory: take its node out",
        ),
    ]  # fmt: skip


def _rule(name: str, expression: str, duration: str, severity: str, summary: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": duration,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "runbook": f"{RUNBOOK}: {name}"},
    }


def _of_run(name: str, *more: str) -> str:
    """A metric of a run over its restarts: processes change, the run stays."""
    return f"max by ({', '.join(('run', *more))}) ({series(name)})"


def _of_rank(name: str, duration: str) -> str:
    return f"max by (run, rank, NodeAddress) (avg_over_time({series(name)}[{duration}]))"


def _grown(name: str, duration: str, *more: str) -> str:
    """By how much a count of a run is larger than it was at its least within a duration."""
    now = _of_run(name, *more)
    return f"({now} - min_over_time({now}[{duration}:1m]))"


def _before(name: str, duration: str) -> str:
    return f"max by (run) ({series(name)} offset {duration})"
