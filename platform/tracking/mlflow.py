"""Experiment tracking: a parent MLflow run a schedule, a child run a segment, and training that never waits for them.

Every event (metrics, params, tags, artifacts, inputs, status) is a line in a spool on disk first, one file a run, and
is sent from there. A server that is down, slow or a black hole therefore costs training nothing: the running worker,
the next start or `flush_spool` sends the rest. Beside each spool lies what the server has acknowledged.

No point is doubled. An event keeps the time it was logged at, and MLflow's store ignores a point that is equal in key,
step, time and value, so a batch sent again after a lost answer changes nothing. Steps that are computed again after a
restore are not sent again: of each metric only steps above the last one sent are. So the curve keeps the first points
(at the same world size a resume is bitwise equal), a tag `resumed.<step>` names the steps, and the spool has both.

A run is found by its id, else by a tag with the schedule's key, else created; so none is ever created twice. One that
was deleted on the server is continued by a new one, tagged `continues`, that gets the whole history from the spool.
A spool belongs where the next attempt sees it too: from a lost node's own disk nothing more can be sent.
This is the only module that imports mlflow, and it does so when something is first sent or read.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from domainshuttle.pipelines.errors import mask_secrets, one_line
from domainshuttle.platform.run.journal import locked
from domainshuttle.platform.tracking.outbox import (
    PARAM_CHARS,
    TAG_CHARS,
    BackgroundLog,
    absolute_uri,
    artifact_event,
    bounded,
    metrics_event,
    new_event,
    reachable,
    segment_journal,
    segment_of,
    status_event,
    texts_event,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_SCHEDULE, _SEGMENT, PARENT_TAG = "domainshuttle.schedule", "domainshuttle.segment", "mlflow.parentRunId"
_BATCH_METRICS, _BATCH_TEXTS = 1000, 100  # MLflow's limits
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # trying again is the sender's business
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


def connect(uri: str) -> MlflowClient:
    """A client that gives up soon: left alone it tries a refused port for four minutes (RELIABILITY.md, fact 6)."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # the first use of an sqlite store tells of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


@dataclass
class RunIds:
    """What identifies a schedule's runs; the caller keeps it in the run directory and in every checkpoint.

    An id is missing (None, or not in `segments`) until the server was reached; `key` finds a run without it.
    """

    tracking_uri: str = field(repr=False)
    experiment: str
    name: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    parent: str | None = None
    segments: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, and without the user and password of the URI."""
        return {**asdict(self), "tracking_uri": mask_secrets(self.tracking_uri).replace("***@", "")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tracking_uri: str | None = None) -> RunIds:
        """The ids of `to_dict`; `tracking_uri`, with the password or of another server, replaces the saved one."""
        return cls(**{**data, "tracking_uri": tracking_uri or data["tracking_uri"], "segments": {**data["segments"]}})


class _Sender:
    """Sends a spool to its run; creates the run, and the schedule's parent run, where they are not there."""

    def __init__(self, ids: RunIds, folder: Path, segment: str | None) -> None:
        self.ids, self.folder, self.segment = ids, folder, segment
        self.journal = segment_journal(folder, segment)
        self._run_id: str | None = None
        self._failing = False
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def client(self) -> MlflowClient:
        return connect(self.ids.tracking_uri)

    def drain(self, deadline: float = float("inf"), wait: float = 0.0) -> bool:
        """Sends until nothing is left (True), the server fails, another sends for `wait` seconds or time is over."""
        if self._run_id and not self.journal.unread():
            return True
        with locked(self.journal.path.with_suffix(".lock"), wait) as held:
            try:
                if held and not reachable(self.ids.tracking_uri):
                    raise ConnectionError(f"{self.ids.tracking_uri} does not answer")
                while held and time.monotonic() < deadline:
                    state = self._bind(self.journal.bookmark())
                    events, offset = self.journal.read(state["offset"], lines=2000)
                    if offset == state["offset"]:
                        self._failing = False
                        return True
                    self._send(state["run_id"], events, state["last_step"])
                    self.journal.set_bookmark({**state, "offset": offset})
            except Exception as error:  # whatever a store raises, training goes on and the events stay on disk
                self._run_id = None  # it may have been deleted: look for it again
                if not self._failing:
                    logger.warning("tracking: %s; events wait in %s", one_line(error), self.folder)
                self._failing = True
        return False

    def _bind(self, state: dict[str, Any]) -> dict[str, Any]:
        """Finds or creates the run. One that is not the run of `state` gets the spool from its beginning."""
        if self._run_id is None:
            with locked(self.folder / "runs.lock", wait=15) as held:
                if not held:
                    raise TimeoutError("another process has been opening the runs for 15 s")
                self._run_id = self._open_runs()
        if state.get("run_id") == self._run_id:
            return state
        latest = self.client.get_run(self._run_id).data._metric_objs
        return {"run_id": self._run_id, "offset": 0, "last_step": {metric.key: metric.step for metric in latest}}

    def _open_runs(self) -> str:
        uri, name, segment = self.ids.tracking_uri, self.ids.experiment, self.segment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # an sqlite store's default is the working directory of whoever creates the experiment
            beside = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / quote(name, safe="")
            place = beside.as_uri() if uri.startswith("sqlite:///") else None
            experiment_id = self.client.create_experiment(name, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                self.client.restore_experiment(experiment_id)
                logger.warning("tracking: the experiment %r had been deleted and is restored", name)
        run = self.ids.parent = self._open_run(experiment_id, self.ids.parent, self.ids.name, {_SEGMENT: ""})
        if segment is not None:
            tags = {_SEGMENT: segment, PARENT_TAG: run}
            run = self._open_run(experiment_id, self.ids.segments.get(segment), segment, tags)
            self.ids.segments[segment] = run
        return run

    def _open_run(self, experiment_id: str, known: str | None, name: str, tags: dict[str, str]) -> str:
        run = self._active(known) if known else None
        if run is None:
            marks = f"tags.`{_SCHEDULE}` = '{self.ids.key}' and tags.`{_SEGMENT}` = '{tags[_SEGMENT]}'"
            run = next(iter(self.client.search_runs([experiment_id], marks, max_results=1)), None)
        if run is None:
            tags = {**tags, _SCHEDULE: self.ids.key, **({"continues": known} if known else {})}
            run = self.client.create_run(experiment_id, tags=tags, run_name=name)
            if known:
                logger.warning("tracking: the run %s is gone, %s continues it", known, run.info.run_id)
        elif run.data.tags.get(PARENT_TAG) != tags.get(PARENT_TAG):  # the parent was the one deleted
            self.client.set_tag(run.info.run_id, PARENT_TAG, tags[PARENT_TAG])
        return run.info.run_id

    def _active(self, run_id: str) -> Any:
        """The run, or None if it was deleted or is of another server."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _send(self, run_id: str, events: Sequence[Mapping[str, Any]], last_step: dict[str, int]) -> None:
        """Sends events in their order; `last_step`, the highest step sent of each metric, grows with them."""
        batch: list[Any] = []
        for event in [*events, None]:
            if event is not None and event.get("kind") == "metrics":
                self._attempt(run_id, partial(_add_points, batch, event, last_step))
                continue
            for first in range(0, len(batch), _BATCH_METRICS):
                part = batch[first : first + _BATCH_METRICS]
                if not self._attempt(run_id, partial(self.client.log_batch, run_id, part)):
                    for point in part:  # one bad point must not take the others with it
                        self._attempt(run_id, partial(self.client.log_batch, run_id, [point]))
            batch.clear()
            if event is not None:
                self._attempt(run_id, partial(self._apply, run_id, event, last_step))

    def _attempt(self, run_id: str, call: Callable[[], Any]) -> bool:
        """Calls. What is damaged, or never accepted, is passed over with a warning (False); other errors are raised."""
        from mlflow.exceptions import MlflowException

        try:
            call()
            return True
        except (MlflowException, FileNotFoundError, KeyError, TypeError, ValueError) as error:
            temporary = isinstance(error, MlflowException) and error.error_code not in _REFUSALS
            if temporary or self._active(run_id) is None:
                raise
            logger.warning("tracking: refused and passed over: %s", one_line(error))
            return False

    def _apply(self, run_id: str, event: Mapping[str, Any], last_step: Mapping[str, int]) -> None:
        kind = event["kind"]
        if kind == "params":
            self._set_params(run_id, event["values"])
        elif kind == "tags":
            self._set_tags(run_id, event["values"])
        elif kind == "artifact":
            send = self.client.log_artifacts if Path(event["path"]).is_dir() else self.client.log_artifact
            send(run_id, event["path"], event["to"])
        elif kind == "input":
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source, rows = json.dumps({"uri": event["path"]}), json.dumps({"num_rows": event["rows"]})
            dataset = Dataset(event["name"], event["digest"], "local", source, profile=rows)
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        elif kind == "resume":
            reached = max((step for key, step in last_step.items() if not key.startswith("system/")), default=0)
            if reached > event["step"]:
                again = f"steps {event['step'] + 1} to {reached} are computed again, the points are the first ones"
                self._set_tags(run_id, {f"resumed.{event['step']}": again})
        elif kind == "status":
            if event.get("if_running") and self.client.get_run(run_id).info.status != "RUNNING":
                return
            for run in {run_id, self.ids.parent or run_id} if event["parent"] else {run_id}:
                if event["error"]:
                    self._set_tags(run, {"error": event["error"]})
                if event["status"] == "RUNNING":
                    self.client.update_run(run, status="RUNNING")
                else:
                    self.client.set_terminated(run, event["status"], event["time"])

    def _set_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Sets params; one that has another value, which MLflow would refuse, becomes the tag `changed.<param>`."""
        from mlflow.entities import Param

        old = self.client.get_run(run_id).data
        new = [Param(key, value) for key, value in params.items() if key not in old.params]
        for first in range(0, len(new), _BATCH_TEXTS):
            self.client.log_batch(run_id, params=new[first : first + _BATCH_TEXTS])
        tags = {key: old.tags.get(f"changed.{key}", old.params.get(key, value)) for key, value in params.items()}
        self._set_tags(run_id, {f"changed.{key}": params[key] for key, value in tags.items() if value != params[key]})

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        items = [RunTag(key, value) for key, value in tags.items()]
        for first in range(0, len(items), _BATCH_TEXTS):
            self.client.log_batch(run_id, tags=items[first : first + _BATCH_TEXTS])


def _add_points(batch: list[Any], event: Mapping[str, Any], last_step: dict[str, int]) -> None:
    """Adds the points of an event that are beyond what was sent of their metric."""
    from mlflow.entities import Metric

    for key, value in event["values"].items():
        step = last_step.get(key, -1) + 1 if event["step"] is None else event["step"]
        if step > last_step.get(key, -1):
            batch.append(Metric(key, float(value), int(event["time"]), int(step)))
            last_step[key] = step


class Tracker:
    """The driver's side: a schedule's run and its segments' runs.

    A call returns within `timeout` seconds: True when the server has everything, False when some waits in `spool`.
    """

    def __init__(self, ids: RunIds, spool: Path | str, timeout: float = 30.0) -> None:
        self.ids, self.folder, self.timeout = ids, Path(spool), timeout
        self._opened: str | None = None
        self._sender = cache(lambda segment: _Sender(ids, self.folder, segment))

    def _put(self, segment: str | None, *events: Mapping[str, Any]) -> bool:
        sender = self._sender(segment)
        sender.journal.append(events)
        return bounded(lambda: sender.drain(wait=self.timeout), self.timeout)

    def open_segment(
        self, name: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None
    ) -> bool:
        """Creates or resumes the run of a segment: of a stage, or of one expert's stage."""
        self._opened = name
        texts = texts_event("params", params or {}, PARAM_CHARS), texts_event("tags", tags or {}, TAG_CHARS)
        return self._put(name, status_event("RUNNING", parent=True), *texts)

    def tag(self, tags: Mapping[str, Any], segment: str | None = None) -> bool:
        """Sets tags of the schedule's or a segment's run."""
        return self._put(segment, texts_event("tags", tags, TAG_CHARS))

    def artifact(self, path: Path | str, artifact_path: str | None = None, segment: str | None = None) -> bool:
        """Uploads a file or folder, which has to stay where it is until it was sent."""
        return self._put(segment, artifact_event(path, artifact_path))

    def log_dataset(self, name: str, digest: str, path: str, rows: int, segment: str | None = None) -> bool:
        """Records a dataset of `rows` samples as an input; MLflow keeps 36 characters of its index's digest."""
        return self._put(segment, new_event("input", name=name, digest=digest[:36], path=mask_secrets(path), rows=rows))

    def log(self, metrics: Mapping[str, float], step: int | None = 0, segment: str | None = None) -> bool:
        """Logs what the driver measures, such as an evaluation; `step` None: after the last of each metric."""
        return self._put(segment, metrics_event(step, metrics))

    def fail(self, error: BaseException | str, segment: str | None = None) -> bool:
        """Marks the schedule's run, and the segment's, as FAILED with the error as the tag `error`.

        Without a segment: also of the one opened last, if its worker did not live to do so; what that left is sent.
        """
        sent = self._put(segment, status_event("FAILED", error, parent=True))
        if segment is None and self._opened is not None:
            sent &= self._put(self._opened, status_event("FAILED", error, if_running=True))
        return sent

    def finish(self, status: str = "FINISHED", segment: str | None = None) -> bool:
        """Ends the schedule's or a segment's run, as FINISHED or KILLED; with the schedule's all segments are sent."""
        sent = self._put(segment, status_event(status))
        return sent if segment else flush_spool(self.ids, self.folder, self.timeout) == 0


def open_schedule(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    spool: Path | str,
    artifacts: Sequence[Path | str] = (),
    ids: RunIds | None = None,
    timeout: float = 30.0,
) -> Tracker:
    """Creates a schedule's parent run, or resumes that of `ids`; the caller keeps the tracker's `ids`.

    Returns within `timeout` seconds also when the server does not answer: runs are then created later. `params` is the
    flattened config. Raises OSError when the spool can not be written.
    """
    uri = absolute_uri(uri)
    tracker = Tracker(RunIds.from_dict(ids.to_dict(), uri) if ids else RunIds(uri, experiment, name), spool, timeout)
    texts = texts_event("params", params, PARAM_CHARS), texts_event("tags", tags, TAG_CHARS)
    tracker._put(None, status_event("RUNNING"), *texts, *(artifact_event(path, None) for path in artifacts))
    # what earlier attempts left is sent beside the training
    bounded(lambda: flush_spool(tracker.ids, spool, timeout=3600) == 0, timeout=0)
    return tracker


class MetricLogger(BackgroundLog):
    """The worker's side, on one rank: logs to a segment's run without ever delaying the caller."""

    def __init__(
        self,
        ids: RunIds,
        segment: str,
        spool: Path | str,
        start_step: int | None = None,
        send_every: float = 2.0,
        system_every: float | None = None,
    ) -> None:
        """`start_step` is the step that was restored, if one was; `system_every` None means no system metrics.

        Both intervals are in seconds. Raises OSError when `spool` can not be made.
        """
        self._sender = _Sender(ids, Path(spool), segment)
        super().__init__(self._sender.journal, self._sender.drain, start_step, send_every, system_every)


def flush_spool(ids: RunIds, spool: Path | str, timeout: float = 60.0) -> int:
    """Sends what earlier attempts could not, for at most `timeout` seconds; returns how many bytes are still unsent."""
    senders = [_Sender(ids, path.parent, segment_of(path)) for path in sorted(Path(spool).glob("*.jsonl"))]
    deadline = time.monotonic() + timeout
    bounded(lambda: [sender.drain(deadline, wait=deadline - time.monotonic()) for sender in senders], timeout)
    return sum(sender.journal.unread() for sender in senders)
