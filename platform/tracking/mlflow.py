"""Experiment tracking: a parent MLflow run a schedule, a child run a segment, and training that never waits for them.

Every event (metrics, params, tags, artifacts, inputs, status) is a line in a spool on disk first, one file a run, and
is sent from there. A server that is down, slow or never answers therefore costs training nothing: the running worker,
the next start or `flush_spool` sends the rest. Beside each spool lies what the server has acknowledged.

Artifacts go a way of their own, beside the stream of the other events: their store may be slow, or closed to this
machine, and metrics, hours and states arrive all the same. One that can't be written is warned about, stays where it is
and is tried again at the next start, at the end and by `flush_spool`.

A run that is sent later looks as one that was sent at once: it begins with its first event and ends with its last one.
The schedule's state is told by the driver and by workers, in several spools, which may be sent in any order: so only
what is newer than the state it shows changes it. The time of that state is a tag of the run. The driver's last word
holds whatever the workers' clocks say: until a driver begins again, nothing of theirs changes the state.

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
import importlib
import json
import logging
import os
import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlencode, urlsplit

from domainshuttle.pipelines.errors import UserFacingError, mask_secrets, one_line, without_user
from domainshuttle.pipelines.storage.locks import locked
from domainshuttle.platform.config.schema import absolute_uri, sqlite_file
from domainshuttle.platform.tracking.metric_names import known, shown
from domainshuttle.platform.tracking.outbox import (
    PARAM_CHARS,
    TAG_CHARS,
    BackgroundLog,
    artifact_event,
    began,
    bounded,
    metrics_event,
    new_event,
    reachable,
    segment_journal,
    segment_of,
    status_event,
    texts_event,
    uploads_journal,
)
from domainshuttle.platform.tracking.training_steps import last_training_step

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SCHEDULE, SEGMENT_TAG, PARENT_TAG = "domainshuttle.schedule", "domainshuttle.segment", "mlflow.parentRunId"
_STATUS_TIME, _ERROR_TIME = "domainshuttle.status_time", "domainshuttle.error_time"
"""Tags of a schedule's run: when what it shows as its state, and as its error, was said, in ms since 1970; the first
with `_ENDED` after it when the driver has ended."""
_ENDED = " ended"
NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as the description of a run, in Markdown."""
_PICTURE = "\n\n!["
_KIND, _TRAINING_KIND = "mlflow.experimentKind", "custom_model_development"
"""A tag of an experiment: MLflow's pages show it as model training, not as one of language models with traces."""
_BATCH_METRICS, _BATCH_TEXTS = 1000, 100  # MLflow's limits
_BATCH_CHARS = 200_000
"""Of params or tags in one request: MLflow takes 1 MB, and so does nginx before it."""
_ARTIFACTS = "mlartifacts"
"""Folder beside an sqlite store, with a folder an experiment."""
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # trying again is the sender's business
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


def preload() -> None:
    """Imports MLflow ahead of its first use: it takes seconds."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    importlib.import_module("mlflow")


def connect(uri: str) -> MlflowClient:
    """A client that gives up soon: left alone it tries a refused port for four minutes."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # the first use of an sqlite store tells of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    if store := sqlite_file(uri):
        store.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


class TrackingError(UserFacingError):
    """A tracking server or store that can't be read, and why."""


def ask(uri: str, question: Callable[[], T]) -> T:
    """What the server or store at `uri` answers; one that is too busy is asked again, for some seconds.

    Raises TrackingError for what MLflow, its database, or whatever stores its artifacts, raise.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for pause in (*_PAUSES, None):
        try:
            return question()
        # the import is that of a database's driver, or of what reads an artifact's store
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            if pause is None or getattr(error, "error_code", None) not in _TEMPORARY:
                hint = _HOST_REFUSED if "403" in str(error) else ""
                raise TrackingError(f"{mask_secrets(uri)} can't be read: {explained(error, uri)}{hint}") from error
            time.sleep(pause)
    raise AssertionError


def explained(error: BaseException, uri: str) -> str:
    """An error of MLflow's in a line; of a database of another version with what to do, since of a newer one too MLflow
    says that it is out of date."""
    found = re.search(r"out-of-date database schema \(found version (\w+)", str(error))
    if found is None:
        return one_line(error)
    import mlflow

    known = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if any(known.glob(f"{found[1]}_*.py")):
        return (
            f"an older MLflow made its tables: back it up, end what writes to it, then: mlflow db upgrade "
            f"{shlex.quote(mask_secrets(uri))}"
        )
    return (
        f"a newer MLflow than {mlflow.__version__}, which is installed here, made its tables ({found[1]}): use that "
        "one, through its server (http://HOST:5000)"
    )


_HOST_REFUSED = (
    ". A server answers 403 to a name of its own that it was not told: start mlflow server with --allowed-hosts "
    "NAME:PORT,NAME (MLFLOW_SERVER_ALLOWED_HOSTS), or give the rights that it asks for"
)
_PAUSES = (1.0, 2.0, 4.0)
"""Seconds before a request that was not answered is made again."""
_TEMPORARY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")


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
    experiment_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, and without the user and password of the URI."""
        return {**asdict(self), "tracking_uri": without_user(self.tracking_uri)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tracking_uri: str | None = None) -> RunIds:
        """The ids of `to_dict`; `tracking_uri`, with the password or of another server, replaces the saved one."""
        return cls(**{**data, "tracking_uri": tracking_uri or data["tracking_uri"], "segments": {**data["segments"]}})


def page_of(ids: RunIds) -> str | None:
    """Where MLflow shows a schedule's run, as model training; of an sqlite store also what serves it. None where the
    run is not known to be on a server yet."""
    if ids.parent is None or ids.experiment_id is None:
        return None
    return page_at(ids.tracking_uri, f"experiments/{ids.experiment_id}/runs/{ids.parent}")


def page_of_runs(uri: str, runs: Mapping[str, str]) -> str | None:
    """Where MLflow shows runs, given as ids with their experiments' ids: the page of one, the curves of several of one
    experiment, else a table."""
    if len(runs) == 1:
        return page_at(uri, "".join(f"experiments/{experiment}/runs/{run}" for run, experiment in runs.items()))
    if len(experiments := {*runs.values()}) == 1:
        chosen = ",".join(f"'{run}'" for run in runs)
        query = urlencode({"compareRunsMode": "CHART", "searchFilter": f"attributes.run_id IN ({chosen})"})
        return page_at(uri, f"experiments/{experiments.pop()}/runs?{query}")
    lists = {"runs": list(runs), "experiments": list(dict.fromkeys(runs.values()))}
    return page_at(uri, f"compare-runs?{urlencode({name: json.dumps(ids) for name, ids in lists.items()})}")


def page_at(uri: str, path: str) -> str | None:
    """A page of MLflow's; None for a store that has none, such as a database that is not on this machine."""
    page = f"#/{path}{'&' if '?' in path else '?'}workflowType=machine_learning"
    if urlsplit(uri).scheme in ("http", "https"):
        return f"{without_user(uri).rstrip('/')}/{page}"
    if sqlite_file(uri) is None:
        return None
    serve = f"mlflow server --backend-store-uri {shlex.quote(uri)} --port {_PORT}"
    return f"http://127.0.0.1:{_PORT}/{page} (after: {serve})"


_PORT = 5000
"""MLflow's own default."""


class _Sender:
    """Sends a spool to its run; creates the run, and the schedule's parent run, where they are not there."""

    def __init__(self, ids: RunIds, folder: Path, segment: str | None) -> None:
        self.ids, self.folder, self.segment = ids, folder, segment
        self.journal = segment_journal(folder, segment)
        self.uploads = uploads_journal(self.journal)
        self._run_id: str | None = None
        self._failing = False
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def client(self) -> MlflowClient:
        return connect(self.ids.tracking_uri)

    @property
    def _server(self) -> str:
        return without_user(self.ids.tracking_uri).rstrip("/")

    def unsent(self) -> int:
        """Bytes that the server has not acknowledged: all of them where another one was sent to last."""
        elsewhere = self.journal.bookmark().get("server", self._server) != self._server
        events = self.journal.size() if elsewhere else self.journal.unread()
        return events + self.uploads.unread()

    def drain(self, deadline: float = float("inf"), wait: float = 0.0) -> bool:
        """Sends until nothing is left (True), the server fails, another sends for `wait` seconds or time is over.

        Artifacts are left to `upload`.
        """
        if self._run_id and not self.journal.unread():
            return True
        with locked(self.journal.path.with_suffix(".lock"), wait) as held:
            try:
                if held and not reachable(self.ids.tracking_uri):
                    raise ConnectionError(f"{self.ids.tracking_uri} does not answer")
                while held and time.monotonic() < deadline:
                    saved = self.journal.bookmark()
                    state = self._bind(saved)
                    events, offset = self.journal.read(state["offset"], lines=2000)
                    if offset == state["offset"]:
                        if state != saved:
                            self.journal.set_bookmark(state)
                        self._failing = False
                        return True
                    self._send(state["run_id"], events, state["last_step"], state)
                    self.journal.set_bookmark({**state, "offset": offset})
            except Exception as error:  # whatever a store raises, training goes on and the events stay on disk
                self._run_id = None  # it may have been deleted: look for it again
                if not self._failing:
                    logger.warning("tracking: %s; events wait in %s", explained(error, self._server), self.folder)
                self._failing = True
        return False

    def upload(self, deadline: float = float("inf"), wait: float = 0.0, again: bool = False) -> bool:
        """Uploads the artifacts that `drain` has come to, until none waits (True), the server is away or time is over.

        One that can't be written is noted, and stops nothing; such ones of before are tried once more with `again`.
        """
        if not self.uploads.unread() and not (again and self.uploads.bookmark().get("failed")):
            return True
        with locked(self.uploads.path.with_suffix(".lock"), wait) as held:
            while held and self._run_id and time.monotonic() < deadline:
                state = {"failed": [], **self.uploads.bookmark()}
                events, offset = self.uploads.read(state["offset"], lines=_UPLOADS)
                # a file that was logged twice is the same file: it is sent once
                failed = {(event["path"], event["to"]): event for event in state["failed"]}
                todo = {(event["path"], event["to"]): event for event in events} | (failed if again else {})
                if not todo:
                    return True
                for key, event in todo.items():
                    failed.pop(key, None)
                    try:
                        self._upload(self._run_id, event)
                    except Exception as error:  # whatever a store of artifacts raises
                        if time.monotonic() > deadline or not reachable(self.ids.tracking_uri):
                            return False  # then nothing is known of the store
                        failed[key] = {**event, "error": one_line(error)}
                again = False
                self.uploads.set_bookmark({"offset": offset, "failed": list(failed.values())})
        return False

    def _upload(self, run_id: str, event: Mapping[str, Any]) -> None:
        path = self.folder.parent / event["path"]
        if not path.exists():
            logger.warning("tracking: the artifact %s is gone: it is skipped", path)
            return
        try:
            if "step" in event:
                self._show_picture(path, event["to"], event["step"])
                return
            store = artifact_repository(self.ids.tracking_uri, self.client.get_run(run_id))
            (store.log_artifacts if path.is_dir() else store.log_artifact)(str(path), event["to"])
        except Exception as error:
            logger.warning("tracking: the artifact %s could not be written: %s", path, one_line(error))
            raise

    def _show_picture(self, path: Path, folder: str, step: int) -> None:
        """Puts a picture on the page of the schedule's run, in place of the one before: below its description.

        MLflow's own charts of pictures show all params above each, and open at a step that has none.
        """
        if self.ids.parent is None:
            return
        run = self.client.get_run(self.ids.parent)
        artifact_repository(self.ids.tracking_uri, run).log_artifact(str(path), folder)
        # the step is for the browser, which else would show the picture of before
        place = urlencode({"path": f"{folder}/{path.name}", "run_uuid": run.info.run_id, "step": step})
        text, head = run.data.tags.get(NOTE_TAG, "").partition(_PICTURE)[0], f"{folder.replace('_', ' ')}, step {step}"
        self._set_tags(run.info.run_id, {NOTE_TAG: f"{text}{_PICTURE}{head}](get-artifact?{place})"})

    def _bind(self, state: dict[str, Any]) -> dict[str, Any]:
        """Finds or creates the run. One that is not the run of `state` gets the spool from its beginning."""
        if self._run_id is None:
            with self._alone():
                self._run_id = self._open_runs()
        parent = self.ids.parent
        if state.get("run_id") == self._run_id and state.get("parent", parent) == parent:
            return {**state, "parent": parent, "server": self._server}
        last_step = last_steps(self.client.get_run(self._run_id))
        # the schedule's points are sent with the segment's; a schedule's run that is new has none of them
        there = last_steps(self.client.get_run(parent)) if parent and state.get("parent", parent) == parent else {}
        has_some = last_training_step(there) is not None
        sent = last_training_step(last_step) if has_some else None
        sent = -1 if sent is None else sent
        bound = {"run_id": self._run_id, "parent": parent, "server": self._server}
        return {**bound, "offset": 0, "last_step": last_step, "schedule": sent}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While it lasts no other process opens the runs, or changes the schedule's state."""
        with locked(self.folder / "runs.lock", wait=15) as held:
            if not held:
                raise TimeoutError("another process has been opening the runs for 15 s")
            yield

    def _open_runs(self) -> str:
        uri, name, segment = self.ids.tracking_uri, self.ids.experiment, self.segment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # an sqlite store's default is the working directory of whoever creates the experiment
            store = sqlite_file(uri)
            place = (store.parent / _ARTIFACTS / quote(name, safe="")).as_uri() if store else None
            kind = {_KIND: _TRAINING_KIND}
            experiment_id = self.client.create_experiment(name, artifact_location=place, tags=kind)
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                self.client.restore_experiment(experiment_id)
                logger.warning("tracking: the experiment %r had been deleted and is restored", name)
            if _KIND not in experiment.tags:
                self.client.set_experiment_tag(experiment_id, _KIND, _TRAINING_KIND)
        self.ids.experiment_id = experiment_id
        start = began(segment_journal(self.folder, None)) or began(self.journal)
        run = self.ids.parent = self._open_run(experiment_id, self.ids.parent, self.ids.name, start, {SEGMENT_TAG: ""})
        if segment is not None:
            tags = {SEGMENT_TAG: segment, PARENT_TAG: run}
            known, start = self.ids.segments.get(segment), began(self.journal)
            run = self._open_run(experiment_id, known, f"{self.ids.name} / {segment}", start, tags)
            self.ids.segments[segment] = run
        return run

    def _open_run(
        self, experiment_id: str, known: str | None, name: str, start: int | None, tags: dict[str, str]
    ) -> str:
        """A run, found or created as one that began at `start` (ms since 1970; None: now)."""
        run = self._active(known) if known else None
        if run is None:
            marks = f"tags.`{_SCHEDULE}` = '{self.ids.key}' and tags.`{SEGMENT_TAG}` = '{tags[SEGMENT_TAG]}'"
            run = next(iter(self.client.search_runs([experiment_id], marks, max_results=1)), None)
        if run is None:
            tags = {**tags, _SCHEDULE: self.ids.key, **({"continues": known} if known else {})}
            run = self.client.create_run(experiment_id, start_time=start, tags=tags, run_name=name)
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

    def _send(
        self, run_id: str, events: Sequence[Mapping[str, Any]], last_step: dict[str, int], state: dict[str, Any]
    ) -> None:
        """Sends events in their order; `last_step`, the highest step sent of each metric, grows with them, and so does
        the step of the segment in `state` at which the schedule's run got its last point."""
        batch: list[Any] = []
        of_schedule: list[Any] = []
        states = [number for number, event in enumerate(events) if event.get("kind") == "status"]
        for number, event in enumerate([*events, None]):
            if event is not None and event.get("kind") == "metrics":
                self._attempt(run_id, partial(_add_points, batch, event, last_step))
                self._attempt(run_id, partial(_add_schedule_points, of_schedule, event, state))
                continue
            for first in range(0, len(of_schedule) if self.ids.parent else 0, _BATCH_METRICS):
                self._log_points(str(self.ids.parent), of_schedule[first : first + _BATCH_METRICS])
            of_schedule.clear()
            for first in range(0, len(batch), _BATCH_METRICS):
                self._log_points(run_id, batch[first : first + _BATCH_METRICS])
            batch.clear()
            if event is not None:
                self._attempt(run_id, partial(self._apply, run_id, event, last_step, number in states[-1:]))

    def _log_points(self, run_id: str, points: Sequence[Any]) -> None:
        """Sends points; of those that are refused together, or too much at once for what is before the server, each
        half. One bad point must not take the others with it."""
        from mlflow.exceptions import MlflowException

        try:
            if self._attempt(run_id, partial(self.client.log_batch, run_id, points)) or len(points) == 1:
                return
        except MlflowException:
            if len(points) == 1 or self._active(run_id) is None:  # which raises where the server is away
                raise
        half = len(points) // 2
        self._log_points(run_id, points[:half])
        self._log_points(run_id, points[half:])

    def _attempt(self, run_id: str, call: Callable[[], Any]) -> bool:
        """Calls. What is damaged, or never accepted, is skipped with a warning (False); other errors are raised."""
        from mlflow.exceptions import MlflowException

        try:
            call()
            return True
        except (MlflowException, KeyError, TypeError, ValueError) as error:
            temporary = isinstance(error, MlflowException) and error.error_code not in _REFUSALS
            if temporary or self._active(run_id) is None:
                raise
            logger.warning("tracking: refused and skipped: %s", one_line(error))
            return False

    def _apply(self, run_id: str, event: Mapping[str, Any], last_step: Mapping[str, int], last_word: bool) -> None:
        """Applies an event that is no metric; `last_word`: no state comes after it in what is known of the spool."""
        kind = event["kind"]
        if kind == "params":
            self._set_params(run_id, event["values"])
        elif kind == "tags":
            self._set_tags(run_id, event["values"])
        elif kind == "artifact":
            self.uploads.append([{key: event[key] for key in ("path", "to", "step") if key in event}])
        elif kind == "input":
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source, rows = json.dumps({"uri": event["path"]}), json.dumps({"num_rows": event["rows"]})
            dataset = Dataset(event["name"], event["digest"], "local", source, profile=rows)
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        elif kind == "resume":
            # the last logged step, or one after it that the workers had begun
            reached = max(last_training_step(last_step) or 0, int(event.get("reached", 0)))
            if reached > event["step"]:
                again = f"steps {event['step'] + 1} to {reached} are computed again, the points are the first ones"
                self._set_tags(run_id, {f"resumed.{event['step']}": again})
        elif kind == "status":
            if event.get("if_running") and self.client.get_run(run_id).info.status != "RUNNING":
                return
            if self.segment is None:
                self._set_schedule_status(run_id, event, last_word)
                return
            self._set_status(self.client.get_run(run_id), event, event["error"])
            if event["parent"] and self.ids.parent:
                self._set_schedule_status(self.ids.parent, event)

    def _set_schedule_status(self, run_id: str, event: Mapping[str, Any], last_word: bool = False) -> None:
        """Changes the schedule's state and error, each where the one it shows was said before this."""
        with self._alone():
            run = self.client.get_run(run_id)
            time_of_state, ended, _ = run.data.tags.get(_STATUS_TIME, "0").partition(_ENDED)
            ends = self.segment is None and last_word and event["status"] != "RUNNING"
            newest = ends or (event["time"] > int(time_of_state) and not (ended and self.segment is not None))
            error = event["error"] if event["time"] > int(run.data.tags.get(_ERROR_TIME, 0)) else ""
            said = {_STATUS_TIME: f"{event['time']}{_ENDED if ends else ''}"} if newest else {}
            if error:
                said[_ERROR_TIME] = str(event["time"])
            self._set_tags(run_id, said)
            self._set_status(run, event, error, newest)

    def _set_status(self, run: MlflowRun, event: Mapping[str, Any], error: str, newest: bool = True) -> None:
        """Sets the error, where there is one, and, where the event is the `newest`, its state.

        The tag `error` is of a run that failed; what a run recovered from is the tag `error.recovered`.
        """
        run_id, over = run.info.run_id, event["status"] != "FAILED"
        if error:
            self._set_tags(run_id, {"error" if newest else "error.recovered": error})
        elif newest and over and (old := run.data.tags.get("error")):
            self._set_tags(run_id, {"error.recovered": old})
            self.client.delete_tag(run_id, "error")
        if newest and event["status"] == "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        elif newest:  # clocks of two machines may differ
            self.client.set_terminated(run_id, event["status"], max(event["time"], run.info.start_time))

    def _set_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Sets params; one that has another value, which MLflow would refuse, becomes the tag `changed.<param>`."""
        from mlflow.entities import Param

        old = self.client.get_run(run_id).data
        for batch in _text_batches({key: value for key, value in params.items() if key not in old.params}):
            self.client.log_batch(run_id, params=[Param(key, value) for key, value in batch])
        tags = {key: old.tags.get(f"changed.{key}", old.params.get(key, value)) for key, value in params.items()}
        self._set_tags(run_id, {f"changed.{key}": params[key] for key, value in tags.items() if value != params[key]})

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _text_batches(tags):
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in batch])


def last_steps(run: MlflowRun) -> dict[str, int]:
    """The last step of each metric that MLflow has of a run."""
    steps: dict[str, int] = {}
    for metric in run.data.to_proto().metrics:
        steps[known(metric.key)] = max(metric.step, steps.get(known(metric.key), metric.step))
    return steps


_UPLOADS = 50
"""Artifacts that are looked at together."""


def _text_batches(texts: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    """Params or tags in groups that one request may have."""
    batch: list[tuple[str, str]] = []
    size = 0
    for key, value in texts.items():
        size += len(key) + len(value)
        if batch and (len(batch) == _BATCH_TEXTS or size > _BATCH_CHARS):
            yield batch
            batch, size = [], len(key) + len(value)
        batch.append((key, value))
    if batch:
        yield batch


def _add_points(batch: list[Any], event: Mapping[str, Any], last_step: dict[str, int]) -> None:
    """Adds the points of an event that are beyond what was sent of their metric."""
    from mlflow.entities import Metric

    for key, value in event["values"].items():
        last = last_step.get(key, -1)
        step = last + 1 if event["step"] is None else max(last, event["step"]) if event.get("last") else event["step"]
        if step > last or event.get("last"):
            batch.append(Metric(shown(key), float(value), int(event["time"]), int(step)))
            last_step[key] = step


def _add_schedule_points(batch: list[Any], event: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Adds what an event has for the schedule's run, where it is of a step that no event before was of."""
    from mlflow.entities import Metric

    if event.get("both"):
        at = int(event["time"])
        batch += [Metric(shown(key), float(value), at, at // 1000) for key, value in event["values"].items()]
    elif "schedule" in event and event["step"] > state.get("schedule", -1):
        step, values = event["schedule"]["step"], event["schedule"]["values"]
        batch += [Metric(shown(key), float(value), int(event["time"]), int(step)) for key, value in values.items()]
        state["schedule"] = event["step"]


_HURRY = 60.0
"""Seconds for which a driver does not wait for a server that did not take events."""


class Tracker:
    """The driver's side: a schedule's run and its segments' runs.

    A call returns within `timeout` seconds: True when the server has everything, False when some waits in `spool`.
    """

    def __init__(self, ids: RunIds, spool: Path | str, timeout: float = 30.0) -> None:
        self.ids, self.folder, self.timeout = ids, Path(spool), timeout
        self._opened: str | None = None
        self._sender = cache(lambda segment: _Sender(ids, self.folder, segment))
        self._missed, self._hurries_until = 0, 0.0

    def _put(self, segment: str | None, *events: Mapping[str, Any]) -> bool:
        sender = self._sender(segment)
        sender.journal.append(events)
        # a server that did not take two events in a row is not waited for again with every other one
        timeout = self.timeout if time.monotonic() > self._hurries_until else 0.0
        sent = bounded(lambda: sender.drain(wait=self.timeout) and sender.upload(), timeout)
        self._missed = 0 if sent else self._missed + 1
        if self._missed > 1 and timeout:
            self._hurries_until = time.monotonic() + _HURRY
        return sent

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
        return self._put(segment, artifact_event(path, artifact_path, self.folder))

    def log_dataset(self, name: str, digest: str, path: str, rows: int, segment: str | None = None) -> bool:
        """Records a dataset of `rows` samples as an input; MLflow keeps 36 characters of its index's digest."""
        return self._put(segment, new_event("input", name=name, digest=digest[:36], path=mask_secrets(path), rows=rows))

    def log(
        self, metrics: Mapping[str, float], step: int | None = 0, segment: str | None = None, last: bool = False
    ) -> bool:
        """Logs what the driver measures, such as an evaluation; `step` None: after the last of each metric.

        `last`: the value is newer than that at the last step of each metric, and is logged there.
        """
        return self._put(segment, metrics_event(step, metrics, last=last))

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
        if segment is None and self._opened is not None:  # of workers that did not end it, since others might follow
            self._put(self._opened, status_event("KILLED", if_running=True))
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
    tracker._put(
        None, status_event("RUNNING"), *texts, *(artifact_event(path, None, tracker.folder) for path in artifacts)
    )
    # what earlier attempts left is sent beside the training
    bounded(lambda: flush_spool(tracker.ids, spool, timeout=3600) == 0, timeout=0)
    return tracker


def probe(uri: str, experiment: str) -> None:
    """Makes a run in an experiment, logs a metric and a file to it, and deletes it: what training will do.

    Raises TrackingError with the step that failed.
    """
    uri = absolute_uri(uri)
    if not sqlite_file(uri) and not reachable(uri):
        raise TrackingError(f"{mask_secrets(uri)} does not answer")

    def attempt() -> None:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else client.create_experiment(experiment)
        run = client.create_run(place, run_name="preflight").info.run_id
        try:
            client.log_metric(run, "preflight", 1.0)
            client.log_text(run, "preflight", "preflight.txt")
        finally:
            client.delete_run(run)

    ask(uri, attempt)


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
        reached: int = 0,
        system: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """`start_step` is the step that was restored, if one was; `reached` says how many steps the workers had begun
        before, logged or not; `system` measures the load of the machines, without it of this one; `system_every` None
        means no system metrics.

        Both intervals are in seconds. Raises OSError when `spool` can not be made.
        """
        self._sender = _Sender(ids, Path(spool), segment)
        sender = self._sender
        ways = sender.drain, sender.upload
        super().__init__(sender.journal, *ways, start_step, send_every, system_every, reached, system)


def flush_spool(ids: RunIds, spool: Path | str, timeout: float = 60.0) -> int:
    """Sends what earlier attempts could not, for at most `timeout` seconds; returns how many bytes are still unsent.

    A server that answers is asked again until all is sent. Artifacts that their store did not take are tried once more;
    what is left of these is no part of the count (outbox.failed_uploads).
    """
    senders = [_Sender(ids, path.parent, segment_of(path)) for path in sorted(Path(spool).glob("*.jsonl"))]
    deadline = time.monotonic() + timeout

    def send() -> bool:
        pause = 1.0
        while left := [sender for sender in senders if not sender.drain(deadline, wait=deadline - time.monotonic())]:
            if time.monotonic() + pause > deadline or not reachable(ids.tracking_uri):
                break
            time.sleep(pause)
            pause = min(30.0, 2 * pause)
        for sender in senders:
            sender.upload(deadline, wait=deadline - time.monotonic(), again=True)
        return not left

    bounded(send, timeout)
    return sum(sender.unsent() for sender in senders)


def artifact_place(uri: str, run: MlflowRun) -> str:
    """Where a run's artifacts are: as the server says, but of an sqlite store that was moved, or copied, with its
    folder of artifacts, in the one beside it."""
    store, said = sqlite_file(uri), run.info.artifact_uri
    parts = Path(unquote(urlsplit(said).path)).parts[-4:]  # the folder, the experiment, the run, "artifacts"
    if store is None or len(parts) < 4 or parts[0] != _ARTIFACTS or urlsplit(said).scheme not in ("", "file"):
        return said
    there, beside = Path(unquote(urlsplit(said).path)).parents[1], store.parent.joinpath(*parts[:2])
    return store.parent.joinpath(*parts).as_uri() if beside.is_dir() or not there.is_dir() else said


def artifact_repository(uri: str, run: MlflowRun) -> ArtifactRepository:
    """Reads and writes a run's artifacts."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(artifact_place(uri, run), tracking_uri=uri)
