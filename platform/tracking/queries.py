"""What the tracking server has: the runs of experiments, points of a metric, and artifacts; each read to its end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.errors import mask_secrets
from domainshuttle.platform.config.schema import absolute_uri, server_or_store, sqlite_file
from domainshuttle.platform.tracking.metric_names import known, shown
from domainshuttle.platform.tracking.mlflow import (
    PARENT_TAG,
    SEGMENT_TAG,
    TrackingError,
    artifact_repository,
    ask,
    connect,
    last_steps,
)
from domainshuttle.platform.tracking.outbox import reachable

_MOST_NAMES = 20


class UnknownRecordError(TrackingError, LookupError):
    """A store, an experiment or a run that is not there."""


class ServerAwayError(TrackingError, ConnectionError):
    """A server that does not answer."""


@dataclass(frozen=True)
class RunRecord:
    """A run as the server has it: times in seconds since 1970, the last value and the last step of each metric.

    A segment's run has the segment's name here, without the schedule's before it.
    """

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
    experiment_id: str = ""


def read_runs(uri: str, experiments: Sequence[str]) -> list[RunRecord]:
    """All runs of the experiments, oldest first, without deleted ones; of runs that began in the same millisecond,
    a schedule's before those of its segments.

    Raises ServerAwayError when the server does not answer, and UnknownRecordError for an experiment it does not have.
    """
    uri = absolute_uri(uri)
    store = sqlite_file(uri)
    if store and not store.is_file():  # of a folder SQLAlchemy would try again for minutes
        kind = "that is a folder" if store.is_dir() else "train first, or set tracking.uri"
        raise UnknownRecordError(f"there is no store {uri}: {kind}")
    try:
        server_or_store(uri)
    except ValueError as error:
        raise UnknownRecordError(f"{mask_secrets(uri)} can't be read: it {error}") from None
    if not reachable(uri):
        raise ServerAwayError(f"the tracking server {mask_secrets(uri)} does not answer: start it or set tracking.uri")
    client = ask(uri, lambda: connect(uri))
    known: dict[str, str] = {}
    for name in experiments:
        found = ask(uri, partial(client.get_experiment_by_name, name))
        if found is None or found.lifecycle_stage == "deleted":
            there = sorted(one.name for one in _pages(uri, client.search_experiments))
            more = f" and {len(there) - _MOST_NAMES} more" if len(there) > _MOST_NAMES else ""
            raise UnknownRecordError(
                f"no experiment {name!r} in {mask_secrets(uri)}; it has: {', '.join(there[:_MOST_NAMES])}{more}"
            )
        known[found.experiment_id] = found.name
    runs = _pages(uri, partial(client.search_runs, list(known), order_by=["attributes.start_time ASC"]))
    records = [_record(run, known) for run in runs]
    return sorted(records, key=lambda run: (run.start, run.parent is not None, run.name, run.id))


def _record(run: Any, experiments: dict[str, str]) -> RunRecord:
    info, data = run.info, run.data
    # one that was logged by its older name too goes on with the newer
    metrics = {
        known(key): value for key, value in sorted(data.metrics.items(), key=lambda one: known(one[0]) != one[0])
    }
    return RunRecord(
        id=info.run_id,
        parent=data.tags.get(PARENT_TAG),
        experiment=experiments[info.experiment_id],
        name=data.tags.get(SEGMENT_TAG) or info.run_name,
        status=info.status,
        start=info.start_time / 1000,
        end=info.end_time / 1000 if info.end_time and info.status != "RUNNING" else None,
        params=data.params,
        tags=data.tags,
        metrics=metrics,
        steps=last_steps(run),
        experiment_id=info.experiment_id,
    )


def read_history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """The (step, value) points of a metric, by step."""
    client = ask(uri, lambda: connect(absolute_uri(uri)))
    older, newer = (
        [(point.step, point.value) for point in ask(uri, partial(client.get_metric_history, run_id, name))]
        for name in (key, shown(key))
    )
    steps = {step for step, _ in newer}
    return sorted([*newer, *((step, value) for step, value in older if step not in steps)])


def list_artifacts(uri: str, run_id: str, folder: str = "") -> list[str]:
    """Paths of the files that a run has in a folder and below it, sorted. Raises TrackingError where they can't be
    listed, for example by a client that has no access to their store."""
    store, todo = _artifacts(uri, run_id), [folder]
    found: list[str] = []
    while todo:
        for entry in ask(uri, partial(store.list_artifacts, todo.pop() or None)):
            (todo if entry.is_dir else found).append(entry.path)
    return sorted(found)


def read_artifact(uri: str, run_id: str, path: str) -> bytes:
    """A file of a run, whole. Raises TrackingError when it is not there, or not where this machine can read it."""
    store = _artifacts(uri, run_id)
    with tempfile.TemporaryDirectory() as folder:
        return Path(ask(uri, lambda: store.download_artifacts(path, folder))).read_bytes()


def _artifacts(uri: str, run_id: str) -> Any:
    uri = absolute_uri(uri)
    return ask(uri, lambda: artifact_repository(uri, connect(uri).get_run(run_id)))


def _pages(uri: str, search: Callable[..., Any]) -> Iterator[Any]:
    """The entries of all pages of a search; a page may be empty and yet not be the last."""
    token: str | None = None
    while True:
        page = ask(uri, partial(search, page_token=token))
        yield from page
        token = page.token
        if not token:
            return
