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

import contextlib
import functools
import json
import logging
import os
import re
import socket
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from domainshuttle.platform.ledger import Journal, JournalWriter, locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_SCHEDULE, _SEGMENT, _PARENT = "domainshuttle.schedule", "domainshuttle.segment", "mlflow.parentRunId"
_BATCH_METRICS, _BATCH_TEXTS, _PARAM_CHARS, _TAG_CHARS = 1000, 100, 6000, 8000  # MLflow's limits
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")
_SECRET = re.compile(r"(?i)(^|[._-])(password|passwd|secret|token|api_?key|credentials?)$")


def mask_secrets(text: str) -> str:
    """`text` with `***` for the user and password of every URL in it."""
    return re.sub(r"(\w://)[^/\s'\"]+@", r"\1***@", text)


def absolute_uri(uri: str) -> str:
    """An sqlite URI with an absolute path, as Ray workers change their directory; any other URI as it is."""
    path = uri.removeprefix("sqlite:///")
    return uri if path in ("", uri) else f"sqlite:///{Path(path).expanduser().resolve()}"


def reachable(uri: str, timeout: float = 2.0) -> bool:
    """Whether a server answers, in about 2 x `timeout` seconds; True for what is not a plain HTTP server."""
    address = urlsplit(uri)
    host, tls = address.hostname, address.scheme == "https"
    if address.scheme not in ("http", "https") or not host:
        return True
    if address.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return True  # a connection of our own says nothing about a server behind a proxy
    try:
        with socket.create_connection((host, address.port or (443 if tls else 80)), timeout) as connection:
            if tls:  # only the client knows the certificates
                return True
            path = address.path.rstrip("/") + "/health"
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(1) != b""
    except OSError:
        return False


def _client(uri: str) -> MlflowClient:
    """A client that gives up soon: left alone it tries a refused port for four minutes (RELIABILITY.md, fact 6)."""
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    for name, value in {**limits, "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}.items():
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
        self.stem = "schedule" if segment is None else "segment-" + quote(segment, safe="")
        self.journal = Journal(folder / f"{self.stem}.jsonl")
        self._run_id: str | None = None
        self._failing = False
        folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def client(self) -> MlflowClient:
        return _client(self.ids.tracking_uri)

    def drain(self, deadline: float = float("inf"), wait: float = 0.0) -> bool:
        """Sends until nothing is left (True), the server fails, another sends for `wait` seconds or time is over."""
        with locked(self.folder / f"{self.stem}.lock", wait) as held:
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
                    logger.warning("tracking: %s; events wait in %s", _line(error), self.folder)
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
            tags = {_SEGMENT: segment, _PARENT: run}
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
        elif run.data.tags.get(_PARENT) != tags.get(_PARENT):  # the parent was the one deleted
            self.client.set_tag(run.info.run_id, _PARENT, tags[_PARENT])
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
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for event in [*events, None]:
            if event is not None and event["kind"] == "metrics":
                for key, value in event["values"].items():
                    step = last_step.get(key, -1) + 1 if event["step"] is None else event["step"]
                    if step > last_step.get(key, -1):
                        last_step[key] = step
                        batch.append(Metric(key, value, event["time"], step))
                continue
            for first in range(0, len(batch), _BATCH_METRICS):
                part = batch[first : first + _BATCH_METRICS]
                if not self._attempt(run_id, self.client.log_batch, run_id, part):
                    for metric in part:  # one bad point must not take the others with it
                        self._attempt(run_id, self.client.log_batch, run_id, [metric])
            batch = []
            if event is not None:
                self._attempt(run_id, self._apply, run_id, event, last_step)

    def _attempt(self, run_id: str, call: Callable[..., None], *arguments: Any) -> bool:
        """Calls. What the server will never take is passed over with a warning (False), other errors are raised."""
        from mlflow.exceptions import MlflowException

        try:
            call(*arguments)
            return True
        except (MlflowException, FileNotFoundError) as error:
            refused = isinstance(error, FileNotFoundError) or error.error_code in _REFUSALS
            if not refused or self._active(run_id) is None:
                raise
            logger.warning("tracking: refused and passed over: %s", _line(error))
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


def _line(error: Exception) -> str:
    return mask_secrets(str(error) or type(error).__name__).splitlines()[0][:300]


def _event(kind: str, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "time": time.time_ns() // 1_000_000, **values}


def _texts(kind: str, values: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Params or tags as MLflow accepts them, without secrets."""
    texts = {_name(key): "***" if _SECRET.search(key) else mask_secrets(str(value)) for key, value in values.items()}
    return _event(kind, values={k: v if len(v) <= limit else v[: limit - 3] + "..." for k, v in texts.items()})


def _name(key: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", key)[:250]


def _artifact(path: Path | str, to: str | None) -> dict[str, Any]:
    return _event("artifact", path=str(Path(path).resolve()), to=to)


def _status(status: str, error: BaseException | str = "", parent: bool = False) -> dict[str, Any]:
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    return _event("status", status=status, error=mask_secrets(text)[:_TAG_CHARS], parent=parent)


class Tracker:
    """The driver's side: a schedule's run and its segments' runs.

    A call returns within `timeout` seconds: True when the server has everything, False when some waits in `spool`.
    """

    def __init__(self, ids: RunIds, spool: Path | str, timeout: float = 30.0) -> None:
        self.ids, self.folder, self.timeout = ids, Path(spool), timeout
        self._sender = functools.cache(lambda segment: _Sender(ids, self.folder, segment))

    def _put(self, segment: str | None, *events: Mapping[str, Any]) -> bool:
        sender = self._sender(segment)
        sender.journal.append(events)
        return _bounded(lambda: sender.drain(wait=self.timeout), self.timeout)

    def open_segment(
        self, name: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None
    ) -> bool:
        """Creates or resumes the run of a segment: of a stage, or of one expert's stage."""
        texts = _texts("params", params or {}, _PARAM_CHARS), _texts("tags", tags or {}, _TAG_CHARS)
        return self._put(name, _status("RUNNING", parent=True), *texts)

    def tag(self, tags: Mapping[str, Any], segment: str | None = None) -> bool:
        """Sets tags of the schedule's or a segment's run."""
        return self._put(segment, _texts("tags", tags, _TAG_CHARS))

    def artifact(self, path: Path | str, artifact_path: str | None = None, segment: str | None = None) -> bool:
        """Uploads a file or folder, which has to stay where it is until it was sent."""
        return self._put(segment, _artifact(path, artifact_path))

    def log_dataset(self, name: str, digest: str, path: str, rows: int, segment: str | None = None) -> bool:
        """Records a dataset of `rows` samples as an input; MLflow keeps 36 characters of its index's digest."""
        return self._put(segment, _event("input", name=name, digest=digest[:36], path=mask_secrets(path), rows=rows))

    def fail(self, error: BaseException | str, segment: str | None = None) -> bool:
        """Marks the schedule's run, and the segment's, as FAILED with the error as the tag `error`."""
        return self._put(segment, _status("FAILED", error, parent=True))

    def finish(self, status: str = "FINISHED", segment: str | None = None) -> bool:
        """Ends the schedule's or a segment's run, as FINISHED or KILLED."""
        return self._put(segment, _status(status))


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
    texts = _texts("params", params, _PARAM_CHARS), _texts("tags", tags, _TAG_CHARS)
    tracker._put(None, _status("RUNNING"), *texts, *(_artifact(path, None) for path in artifacts))
    return tracker


class MetricLogger:
    """The worker's side, on one rank: logs to a segment's run without ever delaying the caller.

    One thread writes events to the spool, another sends them and samples the system.
    """

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
        self._writer = JournalWriter(self._sender.journal, sync=False)
        self._send_every, self._system_every = send_every, system_every
        self._closing, self._deadline = threading.Event(), float("inf")
        self._writer.put(_status("RUNNING", parent=True))
        if start_step is not None:
            self._writer.put(_event("resume", step=start_step))
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs numbers at a step of the segment, in some microseconds (but a GPU's tensor would make it wait).

        Raises TypeError or ValueError for what is not a number.
        """
        self._writer.put(_event("metrics", step=int(step), values={_name(k): float(v) for k, v in metrics.items()}))

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Sets tags of the segment's run."""
        self._writer.put(_texts("tags", tags, _TAG_CHARS))

    def artifact(self, path: Path | str, artifact_path: str | None = None) -> None:
        """Uploads a file or folder, which has to stay where it is until it was sent."""
        self._writer.put(_artifact(path, artifact_path))

    def fail(self, error: BaseException | str, timeout: float = 10.0) -> bool:
        """Marks the segment's and the schedule's run as FAILED, with the error as a tag, and closes."""
        self._writer.put(_status("FAILED", error, parent=True))
        return self.close(timeout)

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> bool:
        """Ends the segment's run, as FINISHED or KILLED, and closes."""
        self._writer.put(_status(status))
        return self.close(timeout)

    def close(self, timeout: float = 10.0) -> bool:
        """Puts everything on the disk and sends for at most `timeout` seconds; True when the server has it all."""
        self._deadline = time.monotonic() + timeout
        written = self._writer.close(timeout)
        self._closing.set()
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return written and self._sender.journal.unread() == 0

    def _deliver(self) -> None:
        now, pause = time.monotonic(), self._send_every
        send, sample = now + pause, now + (self._system_every or float("inf"))
        while not self._closing.wait(max(0.0, min(send, sample) - time.monotonic())):
            if time.monotonic() >= sample:
                sample += self._system_every or 0
                self._writer.put(_event("metrics", step=None, values=_system_metrics()))
            if time.monotonic() >= send:
                pause = self._send_every if self._sender.drain() else min(30.0, 2 * pause + 0.5)
                send = time.monotonic() + pause
        while not self._sender.drain(self._deadline) and time.monotonic() + 1 < self._deadline:
            time.sleep(0.5)


def _system_metrics() -> dict[str, float]:
    """Load of this process, this machine and its GPUs, by the names under which MLflow shows system metrics."""
    import psutil

    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
        "system/process_memory_gigabytes": psutil.Process().memory_info().rss / 2**30,
    }
    with contextlib.suppress(Exception):  # no NVML, no GPU, or one that does not tell
        import pynvml

        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            values[f"system/gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            values[f"system/gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
    return values


def _bounded(call: Callable[[], Any], timeout: float) -> bool:
    """Whether `call` returned True within `timeout` seconds; if not, it goes on in the background."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), name="tracking", daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(result and result[0])


def flush_spool(ids: RunIds, spool: Path | str, timeout: float = 60.0) -> int:
    """Sends what earlier attempts could not, for at most `timeout` seconds; returns how many bytes are still unsent."""
    stems = sorted(path.stem for path in Path(spool).glob("*.jsonl"))
    segments = [None if stem == "schedule" else unquote(stem.removeprefix("segment-")) for stem in stems]
    senders = [_Sender(ids, Path(spool), segment) for segment in segments]
    deadline = time.monotonic() + timeout
    _bounded(lambda: [sender.drain(deadline, wait=deadline - time.monotonic()) for sender in senders], timeout)
    return sum(sender.journal.unread() for sender in senders)


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
    client = _client(uri)
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
                    parent=data.tags.get(_PARENT),
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
    points = _client(absolute_uri(uri)).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)
