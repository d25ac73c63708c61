"""The outbox under tracking: events on disk that survive a crash, and the threads that write and send them.

Nothing here knows MLflow.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from domainshuttle.pipelines.errors import mask_secrets
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Journal, JournalWriter

logger = logging.getLogger(__name__)


PARAM_CHARS, TAG_CHARS = 6000, 8000  # MLflow's limits


def tell_error(run: Run, segment: str, rank: int, error: str) -> None:
    """The tag `error.rank<n>` of the segment: what a rank failed of, on the disk when this returns."""
    tag_segment(run, segment, f"error.rank{rank}", error)


def tag_segment(run: Run, segment: str, name: str, text: str) -> None:
    try:
        segment_journal(run.spool, segment).append([texts_event("tags", {name: text}, TAG_CHARS)], sync=True)
    except OSError as error:
        logger.warning("tracking: %s %s can not be written: %s", name, text, error)


_SECRET = re.compile(r"(?i)(^|[._-])(password|passwd|secret|token|api_?key|credentials?)$")


def segment_journal(folder: Path, segment: str | None) -> Journal:
    """The spool of a segment's run, or of the schedule's, in the folder of a run's spools."""
    return Journal(folder / ("schedule.jsonl" if segment is None else f"segment-{quote(segment, safe='')}.jsonl"))


def segment_of(path: Path) -> str | None:
    """Whose spool a file is: a segment's, or the schedule's (None)."""
    return None if path.stem == "schedule" else unquote(path.stem.removeprefix("segment-"))


def uploads_journal(journal: Journal) -> Journal:
    """The artifacts of a spool that are to be uploaded, beside the stream of its other events."""
    return Journal(journal.path.parent / "uploads" / journal.path.name)


def failed_uploads(folder: Path) -> dict[str, str]:
    """Of the spools in a folder, the artifacts that their store did not take, with the reason."""
    states = [Journal(path).bookmark() for path in sorted((folder / "uploads").glob("*.jsonl"))]
    return {event["path"]: event["error"] for state in states for event in state.get("failed", [])}


def began(journal: Journal) -> int | None:
    """When the first event of a journal was logged, in ms since 1970; None where there is none."""
    events, _ = journal.read(lines=_FIRST_LINES)
    return next((event["time"] for event in events if isinstance(event.get("time"), int)), None)


_FIRST_LINES = 20
"""Among so many lines one is whole."""


def reachable(uri: str, timeout: float = 10.0) -> bool:
    """Whether a server answers, in at most 2 x `timeout` seconds; True for what is not a plain HTTP server."""
    address = urlsplit(uri)
    host, tls = address.hostname, address.scheme == "https"
    if address.scheme not in ("http", "https") or not host:
        return True
    if {address.scheme, "all"} & urllib.request.getproxies().keys() and not urllib.request.proxy_bypass(host):
        return True  # a connection of our own says nothing about a server behind a proxy
    try:
        with socket.create_connection((host, address.port or (443 if tls else 80)), timeout) as connection:
            if tls:  # only the client knows the certificates
                return True
            path, name = address.path.rstrip("/") + "/health", address.netloc.rpartition("@")[2]
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(1) != b""
    except OSError:
        return False


def new_event(kind: str, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "time": time.time_ns() // 1_000_000, **values}


def texts_event(kind: str, values: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Params or tags as MLflow accepts them, without secrets."""
    texts = {clean(key): "***" if _SECRET.search(key) else mask_secrets(str(value)) for key, value in values.items()}
    return new_event(kind, values={k: v if len(v) <= limit else v[: limit - 3] + "..." for k, v in texts.items()})


def clean(key: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", key)[:250]


SchedulePoint = tuple[int, Mapping[str, float]]
"""A step of the whole schedule, and what its run shows there."""


def metrics_event(
    step: int | None, values: Mapping[str, float], schedule: SchedulePoint | None = None, last: bool = False
) -> dict[str, Any]:
    """`step` None stands for the one after the last of each metric. `schedule` is what the schedule's run gets beside
    it. `last`: newer values at the last step of each metric, where that is beyond `step`."""
    step = None if step is None else int(step)
    more: dict[str, Any] = {"last": True} if last else {}
    if schedule is not None:
        more["schedule"] = {"step": int(schedule[0]), "values": _floats(schedule[1])}
    return new_event("metrics", step=step, values=_floats(values), **more)


def load_event(values: Mapping[str, float]) -> dict[str, Any]:
    """Load of machines, which the schedule's run gets too: there at a step a second, since segments follow each other
    and MLflow shows it by time."""
    return {**metrics_event(None, values), "both": True}


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {clean(key): float(value) for key, value in values.items()}


def artifact_event(path: Path | str, to: str | None, spool: Path) -> dict[str, Any]:
    """What lies in the folder of the run, which may be moved before it is sent, is named relative to that."""
    place, run = Path(path).resolve(), spool.resolve().parent
    return new_event("artifact", path=str(place.relative_to(run) if place.is_relative_to(run) else place), to=to)


def picture_event(path: Path, folder: str, step: int, spool: Path) -> dict[str, Any]:
    """A picture for the page of the schedule's run, and the folder of that run's artifacts that gets it."""
    return {**artifact_event(path, folder, spool), "step": step}


def status_event(
    status: str, error: BaseException | str = "", parent: bool = False, if_running: bool = False
) -> dict[str, Any]:
    """`parent`: of the schedule's run too; `if_running`: only of a run that nobody has ended."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    return new_event(
        "status", status=status, error=mask_secrets(text)[:TAG_CHARS], parent=parent, if_running=if_running
    )


class BackgroundLog:
    """Logs to one run without ever delaying the caller.

    One thread writes events to the spool, another sends them and samples the system, a third one uploads artifacts,
    which may take long.
    """

    def __init__(
        self,
        journal: Journal,
        drain: Callable[[float], bool],
        upload: Callable[[float], bool],
        start_step: int | None,
        send_every: float,
        system_every: float | None,
        reached: int = 0,
        system: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """`drain` sends what is in the journal until the given time.monotonic(), True when all is sent; `upload` does
        the same with the artifacts that `drain` has come to. `reached`: steps that the workers had begun before.
        `system` measures the load of the machines, without it of this one."""
        self._journal, self._drain, self._upload = journal, drain, upload
        self._uploads, self._uploader = uploads_journal(journal), threading.Thread()
        self._writer = JournalWriter(journal, sync=False)
        self._send_every, self._system_every = send_every, system_every
        self._system = system or system_metrics
        self._closing, self._deadline = threading.Event(), float("inf")
        self._writer.put(status_event("RUNNING", parent=True))
        if start_step is not None:
            self._writer.put(new_event("resume", step=start_step, reached=reached))
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float], schedule: SchedulePoint | None = None) -> None:
        """Logs numbers at a step of the segment, and of the schedule, in some microseconds.

        A GPU's tensor would make it wait.

        Raises TypeError or ValueError for what is not a number.
        """
        self._writer.put(metrics_event(step, metrics, schedule))

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Sets tags of the segment's run."""
        self._writer.put(texts_event("tags", tags, TAG_CHARS))

    def artifact(self, path: Path | str, artifact_path: str | None = None) -> None:
        """Uploads a file or folder, which has to stay where it is until it was sent."""
        self._writer.put(artifact_event(path, artifact_path, self._journal.path.parent))

    def picture(self, path: Path, folder: str, step: int) -> None:
        """Shows a picture of a step on the page of the schedule's run, where it replaces the one of before."""
        self._writer.put(picture_event(path, folder, step, self._journal.path.parent))

    def fail(self, error: BaseException | str, timeout: float = 10.0) -> bool:
        """Marks the segment's and the schedule's run as FAILED, with the error as a tag, and closes."""
        self._writer.put(status_event("FAILED", error, parent=True))
        return self.close(timeout)

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> bool:
        """Ends the segment's run, as FINISHED or KILLED, and closes."""
        self._writer.put(status_event(status))
        return self.close(timeout)

    def close(self, timeout: float = 10.0) -> bool:
        """Puts everything on the disk and sends for at most `timeout` seconds; True when the server has it all."""
        self._deadline = time.monotonic() + timeout
        written = self._writer.close(timeout)
        self._closing.set()
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return written and self._journal.unread() == 0 and self._uploads.unread() == 0

    def _deliver(self) -> None:
        now, pause = time.monotonic(), self._send_every
        send, sample = now + pause, now + min(_FIRST_LOAD, self._system_every or float("inf"))
        if self._system_every is None:
            sample = float("inf")
        while not self._closing.wait(max(0.0, min(send, sample) - time.monotonic())):
            if time.monotonic() >= sample:
                sample += self._system_every or 0
                self._writer.put(load_event(self._system()))
            if time.monotonic() >= send:
                pause = self._send_every if self._drain(float("inf")) else min(30.0, 2 * pause + 0.5)
                self._begin_upload()
                send = time.monotonic() + pause
        while not self._drain(self._deadline) and time.monotonic() + 1 < self._deadline:
            time.sleep(0.5)
        for _ in range(2):  # once more for what came while an upload ended
            self._begin_upload()
            if self._uploader.is_alive():
                self._uploader.join(max(0.0, self._deadline - time.monotonic()))

    def _begin_upload(self) -> None:
        """Starts the upload of artifacts that wait for one; what comes while it is under way waits for the next."""
        if self._uploads.unread() and not self._uploader.is_alive():
            self._uploader = threading.Thread(target=self._upload, args=(float("inf"),), name="uploads", daemon=True)
            self._uploader.start()


_FIRST_LOAD = 5.0
"""Seconds until the load of the machines is noted first: of a short segment too."""


def system_metrics() -> dict[str, float]:
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


def bounded(call: Callable[[], Any], timeout: float) -> bool:
    """Whether `call` returned True within `timeout` seconds; if not, it goes on in the background."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), name="tracking", daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(result and result[0])
