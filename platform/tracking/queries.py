"""What the tracking server has: the runs of experiments, and the points of a metric."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainshuttle.pipelines.errors import mask_secrets
from domainshuttle.platform.tracking.mlflow import PARENT_TAG, connect
from domainshuttle.platform.tracking.outbox import absolute_uri, reachable


@dataclass(frozen=True)
class RunRecord:
    """A run as the server has it: times in seconds since 1970, the last value and the last step of each metric."""

    id: str
    parent: str | None
    experiment: str
    name: str
    status: str
    start: float
    end: float | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    steps: dict[str, int]


def read_runs(uri: str, experiments: Sequence[str]) -> list[RunRecord]:
    """All runs of the experiments, oldest first, without deleted ones.

    Raises ConnectionError when the server does not answer, and LookupError for an experiment it does not have.
    """
    uri = absolute_uri(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise LookupError(f"there is no store {uri}; train first, or set tracking.uri")
    if not reachable(uri):
        raise ConnectionError(f"the tracking server {mask_secrets(uri)} does not answer: start it or set tracking.uri")
    client = connect(uri)
    known = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    for name in experiments:
        if name not in known.values():
            there = ", ".join(sorted(known.values()))
            raise LookupError(f"no experiment {name!r} in {mask_secrets(uri)}; it has: {there}")
    chosen = [key for key, name in known.items() if name in experiments]
    records: list[RunRecord] = []
    token = None
    while token or not records:
        page = client.search_runs(chosen, order_by=["attributes.start_time ASC"], page_token=token)
        for run in page:
            info, data = run.info, run.data
            records.append(
                RunRecord(
                    id=info.run_id,
                    parent=data.tags.get(PARENT_TAG),
                    experiment=known[info.experiment_id],
                    name=info.run_name,
                    status=info.status,
                    start=info.start_time / 1000,
                    end=info.end_time / 1000 if info.end_time and info.status != "RUNNING" else None,
                    params=data.params,
                    tags=data.tags,
                    metrics=data.metrics,
                    steps={metric.key: metric.step for metric in data._metric_objs},
                )
            )
        token = page.token
        if not token:
            break
    return records


def read_history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """The (step, value) points of a metric, by step."""
    points = connect(absolute_uri(uri)).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def list_artifacts(uri: str, run_id: str, folder: str = "") -> list[str]:
    """Paths of the files that a run has in a folder and below it, sorted."""
    client, todo = connect(absolute_uri(uri)), [folder]
    found: list[str] = []
    while todo:
        for entry in client.list_artifacts(run_id, todo.pop() or None):
            (todo if entry.is_dir else found).append(entry.path)
    return sorted(found)


def read_artifact(uri: str, run_id: str, path: str) -> bytes:
    """A file of a run, whole. Raises OSError when it is not there, or not on this machine's disk as the server says."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(connect(absolute_uri(uri)).download_artifacts(run_id, path, folder)).read_bytes()
