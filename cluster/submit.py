"""Submission: a training run as a Ray job, with this tree and the configuration in its environment."""

import asyncio
import contextlib
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from domainshuttle.cluster.local import ClusterError, first_line, open_warning, quiet_loggers, quiet_ray, speaks_http
from domainshuttle.cluster.wheel import build_wheel


@dataclass
class Job:
    """A submitted job."""

    id: str
    client: Any
    by_token: bool = False
    """Whether the client was told to send a token, which commands in the user's shell must be told too."""

    @property
    def address(self) -> str:
        """The dashboard of the cluster that has it."""
        return str(self.client.get_address())

    def log_command(self) -> str:
        """The command that follows its log, as it can be typed in this shell."""
        return self._command("logs", f"--follow {self.id}")

    def stop_command(self) -> str:
        """The command that asks it for a checkpoint and ends it."""
        return self._command("stop", self.id)

    def _command(self, verb: str, rest: str) -> str:
        """A command of `ray job`, which would prefer an address of the environment and send no token unasked."""
        changes = [f"-u {name}" for name in _ADDRESSES if os.environ.get(name)]
        if self.by_token:
            changes.append("RAY_AUTH_MODE=token")
        around = f"env {' '.join(changes)} " if changes else ""
        return f"{around}ray job {verb} --address {shlex.quote(self.address)} {rest}"

    def open_warning(self) -> str | None:
        """What to tell people where its cluster asks nobody for a token."""
        return open_warning(self.address)

    def follow(self) -> Iterator[str]:
        """The job's log as it is written, until the job ends; a connection that breaks is made again.

        Raises ClusterError when the cluster does not answer for minutes.
        """
        shown = 0
        while True:
            ended, at = self._ended(), 0  # asked before, so that the last look has all of the log
            with contextlib.closing(self._tail()) as tail:
                for text in tail:
                    yield text[max(0, shown - at) :]
                    at += len(text)
                    shown = max(shown, at)
            if ended:
                return
            time.sleep(_PAUSE)

    def _tail(self) -> Generator[str]:
        """The log from its beginning, until the job ends or the connection breaks."""
        loop, tail = asyncio.new_event_loop(), self.client.tail_job_logs(self.id)
        try:
            while True:
                yield loop.run_until_complete(anext(tail))
        except (StopAsyncIteration, *_BROKEN):
            return
        finally:
            loop.run_until_complete(tail.aclose())
            loop.close()

    def _ended(self) -> bool:
        """Whether the job has ended, once the cluster answers."""
        return bool(self._answer(self.client.get_job_status, _BROKEN).is_terminal())

    def _answer(self, ask: Callable[[str], Any], broken: tuple[type[Exception], ...]) -> Any:
        """What the cluster answers of this job, asked again while it fails in these ways.

        Raises ClusterError when it does so for minutes.
        """
        deadline = time.monotonic() + _LONGEST_SILENCE
        while True:
            try:
                return ask(self.id)
            except broken as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{self.address} has not answered for {_LONGEST_SILENCE:g} s ({error}); the job may go on: "
                        f"{self.log_command()}"
                    ) from error
                time.sleep(_PAUSE)

    def exit_code(self) -> int:
        """The command's own exit code, once the job has ended; 1 where it has none, such as when it was killed.

        Of a job that was stopped Ray keeps no code: there it is the one that the command printed (`exit_line`).
        """
        while not self._ended():
            time.sleep(_PAUSE)
        info = self._answer(self.client.get_job_info, _BROKEN)
        if info.driver_exit_code is not None and info.driver_exit_code >= 0:
            return int(info.driver_exit_code)
        if str(info.status) == "STOPPED":
            with contextlib.suppress(RuntimeError):  # the cluster answers that it has no log any more
                if said := _EXIT_LINE.findall(self._answer(self.client.get_job_logs, (OSError, aiohttp.ClientError))):
                    return int(said[-1])
        return 0 if str(info.status) == "SUCCEEDED" else 1


def exit_line(code: int, why: str) -> str:
    """What a command prints last in a job, so that its exit code is known where Ray does not keep it."""
    return f"Exit code {code}: {why}"


_EXIT_LINE = re.compile(r"^(?:[\d-]{10} [\d:]{8} )?Exit code (\d+): ", re.MULTILINE)

_BROKEN = (OSError, RuntimeError, aiohttp.ClientError)
"""What a connection to a dashboard raises that breaks, or is not there for a while."""
_LONGEST_SILENCE = 300.0
_PAUSE, _PATIENCE = 1.0, 15.0
"""Seconds between questions to the cluster, and until a busy machine has answered one."""


def submit_training(
    config_yaml: str,
    name: str,
    address: str | None = None,
    options: Sequence[str] = (),
    stop_seconds: int = 600,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Job:
    """Submits `domainshuttle train` of a resolved configuration, with the command's own `options`.

    `address` is the cluster's dashboard; None: the one that the environment names to Ray, else the one on this machine.
    The cluster's image has the dependencies; this tree goes with the job. `ray job stop` gives it `stop_seconds` for
    its last checkpoint. Secrets are no part of the job, whose environment everybody reads: pods and machines have them.

    Raises ClusterError, with the remedy, when the cluster does not answer or refuses, or a job trains this run already.
    """
    with contextlib.ExitStack() as stack:
        client, by_token, named = stack.enter_context(_client(address, _SUBMITTING))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with _refusals(named, _SUBMITTING):
            jobs = client.list_jobs()
        live = [job for job in jobs if _run_of(job) == name and not job.status.is_terminal()]
        output = metadata.get("output")
        # in another folder it is another run, such as a colleague's; a job that does not say where is taken for this
        for before in (job for job in live if job.metadata.get("output", output) == output):
            job = Job(str(before.submission_id), client, by_token)
            raise ClusterError(
                f"run {name} is trained by job {job.id} of {named} already ({str(before.status).lower()}). Follow it: "
                f"{job.log_command()}; or stop it, with a checkpoint, and submit again: {job.stop_command()}"
            )
        (folder / "job").mkdir()
        (folder / "job/run.yaml").write_text(config_yaml)
        wheel = build_wheel(folder)
        with _refusals(named, _SUBMITTING):
            job_id = _submit(
                client,
                jobs,
                name,
                # by the module, so that it is found where the image has no command of this name
                entrypoint=shlex.join(["python", "-m", "domainshuttle.platform.cli", "train", "run.yaml", *options]),
                runtime_env={
                    "working_dir": str(folder / "job"),
                    "py_modules": [str(wheel)],
                    # without it Ray kills a job three seconds after it asked it to stop
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds)},
                },
                metadata={"run": name, "package": wheel.name.split("-")[1], **metadata},
            )
    return Job(job_id, client, by_token)


@dataclass(frozen=True)
class JobRecord:
    """A job of a run, for people."""

    id: str
    run: str
    status: str
    started: float
    ended: float | None
    """Unix times."""
    code: int | None
    """Of its command."""
    message: str

    @property
    def live(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


def list_jobs(address: str | None = None) -> list[JobRecord]:
    """The jobs of runs on a cluster, the newest first. Raises ClusterError as `submit_training`."""
    with _client(address, _ASKING) as (client, _, named), _refusals(named, _ASKING):
        found = [
            JobRecord(
                str(job.submission_id),
                run,
                str(job.status),
                (job.start_time or 0) / 1000,
                job.end_time / 1000 if job.end_time else None,
                job.driver_exit_code,
                (job.message or "").strip(),
            )
            for job in client.list_jobs()
            if (run := _run_of(job)) is not None
        ]
    return sorted(found, key=lambda job: -job.started)


def find_job(job_id: str, address: str | None = None) -> Job:
    """A job that was submitted before. Raises ClusterError where the cluster has none of this id."""
    with _client(address, _ASKING) as (client, by_token, named), _refusals(named, _ASKING):
        if job_id not in {job.submission_id for job in client.list_jobs()}:
            raise ClusterError(f"{named} has no job {job_id}: domainshuttle jobs lists those that it has")
        return Job(job_id, client, by_token)


_SUBMITTING, _ASKING = "the job was not taken by", "no list of jobs came from"
"""What was tried, before the name of the cluster that refused it."""


def _run_of(job: Any) -> str | None:
    return (job.metadata or {}).get("run")


@contextlib.contextmanager
def _client(address: str | None, doing: str) -> Iterator[tuple[Any, bool, str]]:
    """A client of a cluster, whether it was told to send a token, and what to call the cluster; `doing` begins what is
    said where there is none."""
    quiet_ray()
    if address:
        _require_dashboard(address)
    if not address and not any(os.environ.get(name) for name in _ADDRESSES):
        address = _HERE
    named = address or " or ".join(f"{name}={os.environ[name]}" for name in _ADDRESSES if os.environ.get(name))
    with _token_mode() as by_token:
        # imported here, since Ray takes its mode when it is imported
        from ray.job_submission import JobSubmissionClient

        quiet_loggers()
        with _refusals(named, doing), _without_addresses() if address else contextlib.nullcontext():
            client = JobSubmissionClient(_with_scheme(address) if address else None)
        yield client, by_token, named


@contextlib.contextmanager
def _refusals(named: str, doing: str) -> Iterator[None]:
    """Turns what Ray raises into one line with the remedy."""
    from ray.exceptions import RayError

    try:
        yield
    except ClusterError:
        raise
    # a bare one for an address that is none
    except (OSError, RuntimeError, ValueError, AssertionError, RayError) as error:
        raise ClusterError(f"{doing} {named}: {_remedy(error)}") from error


def _submit(client: Any, jobs: Sequence[Any], name: str, **job: Any) -> str:
    """Submits a job as `NAME-1`, or with the first number that no job of the cluster has; returns its id.

    Ray remembers an id for good, so one that it refuses as taken is followed by the next.
    """
    numbers = [int(found[1]) for one in jobs
               if (found := re.fullmatch(rf"{re.escape(name)}-(\d+)", one.submission_id or ""))]  # fmt: skip
    number = max(numbers, default=0) + 1
    while True:
        try:
            return str(client.submit_job(submission_id=f"{name}-{number}", **job))
        except RuntimeError as error:
            if "already exists" not in str(error) or number > max(numbers, default=0) + _MOST_TAKEN:
                raise
            number += 1


_MOST_TAKEN = 100
"""Ids of removed jobs that are tried one after the other."""


_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's client prefers to the address it is given."""
_HERE = "http://127.0.0.1:8265"


def overriding_address(address: str | None) -> str | None:
    """Which cluster is talked to, where the environment names one and a user may not think of it; None: it does not."""
    named = [f"{name}={os.environ[name]}" for name in _ADDRESSES if os.environ.get(name)]
    if not named:
        return None
    if address:
        return f"This talks to {address}, as --dashboard says; {' and '.join(named)} is left aside."
    return f"This talks to the cluster of {named[0]} in the environment."


@contextlib.contextmanager
def _without_addresses() -> Iterator[None]:
    """Hides the environment's addresses, so that the one that was asked for is the one that is called."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _require_dashboard(address: str) -> None:
    """Raises ClusterError for Ray's own address, or for what is none, where a dashboard's is expected."""
    try:
        url = urlsplit(_with_scheme(address))
        right = url.scheme in ("http", "https") and bool(url.hostname) and url.hostname != "auto" and url.port != 0
    except ValueError:  # brackets that are open, a port that is no number or beyond 65535
        right = False
    if not right or (url.scheme == "http" and speaks_http(f"http://{url.netloc}", _PATIENCE) is False):
        raise ClusterError(
            f"{address} is not the address of a dashboard. Expected here: http://HOST:8265, as `ray start --head` "
            "prints it; Ray's own address (HOST:6379) is for --address of other commands and cluster.address"
        )


def _with_scheme(address: str) -> str:
    """A dashboard's `HOST:PORT` would be taken for the address of a cluster's control."""
    return address if "://" in address else f"http://{address}"


@contextlib.contextmanager
def _token_mode() -> Iterator[bool]:
    """Sends the token that there is: without the mode a client that has one still sends none. Yields whether it set it.

    The mode is taken back, since a Ray cluster that is started with it, by a process that began without, refuses it.
    """
    wanted = "RAY_AUTH_MODE" not in os.environ and Path("~/.ray/auth_token").expanduser().exists()
    if wanted:
        os.environ["RAY_AUTH_MODE"] = "token"
    try:
        yield wanted
    finally:
        if wanted:
            del os.environ["RAY_AUTH_MODE"]


def _remedy(error: BaseException) -> str:
    line = first_line(error).rstrip(".")
    if any(word in str(error).lower() for word in ("authentication", "token")):
        return f"{line}. Put the cluster's token into ~/.ray/auth_token and set RAY_AUTH_MODE=token"
    return f"{line}. Is the address the dashboard's (http://HOST:8265), and is the cluster up?"
