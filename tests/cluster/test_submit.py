"""A job goes to the cluster that was asked for: python -m pytest tests/cluster/test_submit.py"""

import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientPayloadError

from domainshuttle.cluster import submit
from domainshuttle.cluster.local import ClusterError, Connection, open_warning
from domainshuttle.cluster.submit import Job, exit_line

_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@contextmanager
def dashboard() -> Iterator[tuple[str, list[str]]]:
    """A server that only notes what it is asked."""
    calls: list[str] = []

    class Notes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            calls.append(self.path)
            self.send_response(500)
            self.end_headers()

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Notes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", calls
    finally:
        server.shutdown()


SUBMIT = """
import os, sys
from domainshuttle.cluster.submit import submit_training
from domainshuttle.cluster.local import ClusterError
for given in sys.argv[1:]:
    before = [os.environ.get(n) for n in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")]
    try: submit_training("name: x", "x", given or None)
    except ClusterError as error: print(error)
    assert [os.environ.get(n) for n in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")] == before
import logging
of_ray = [logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith("ray")]
assert len(of_ray) > 2 and not [one for one in of_ray if one.getEffectiveLevel() < logging.WARNING]
"""


def test_the_address_that_is_given_is_called_whatever_the_environment_says() -> None:
    """In processes of their own, since Ray takes its authentication mode once."""
    with ExitStack() as servers:
        asked, asked_calls = servers.enter_context(dashboard())
        others = [servers.enter_context(dashboard()) for _ in _ADDRESSES]
        around = {name: f"http://{other}" for name, (other, _) in zip(_ADDRESSES, others, strict=True)}
        command = [sys.executable, "-c", SUBMIT, f"http://{asked}", asked]
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, **around}
        )
        assert len(asked_calls) >= 2
        assert [calls for _, calls in others] == [[], []]
        assert run.stdout.count(f"not taken by http://{asked}") == 1
        assert run.stdout.count(f"not taken by {asked}") == 1
        # and where none is given the environment's, in Ray's own order
        run = subprocess.run(
            [sys.executable, "-c", SUBMIT, ""], capture_output=True, text=True, check=True, timeout=120,
            env={**os.environ, **around},
        )  # fmt: skip
        assert len(others[0][1]) >= 1
        assert "not taken by RAY_API_SERVER_ADDRESS=http://" in run.stdout


@contextmanager
def no_web_server() -> Iterator[str]:
    """A server that answers as Ray's own port does: not in HTTP/1."""
    server = socketserver.TCPServer(("127.0.0.1", 0), _Binary)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


class _Binary(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1 << 16)
        self.request.sendall(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00")


def test_an_address_of_the_other_kind_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    with dashboard() as (web, _):
        for address in (web, f"http://{web}", "https://head.example.com"):
            with (
                pytest.raises(ClusterError, match=r"of a dashboard.*--address.*HOST:6379"),
                Connection(address),
            ):
                pass
        monkeypatch.setenv("RAY_ADDRESS", f"http://{web}")
        with pytest.raises(ClusterError, match=r"address of a dashboard.*RAY_ADDRESS"), Connection():
            pass
    with no_web_server() as own:
        others = (
            "ray://head:10001",
            "auto",
            "domainshuttle://head",
            "http://[head",
            "[",
            "http://head:99999",
            "head:0",
        )
        for address in (own, f"http://{own}", *others):
            with pytest.raises(ClusterError, match=r"not the address of a dashboard.*http://HOST:8265"):
                submit.list_jobs(address)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), "not taken by here: AssertionError. Is the address"),
        (RuntimeError("\n"), "not taken by here: RuntimeError. Is the address"),
        (RuntimeError("Request failed with status code 401: no token.\nmore"), "code 401: no token. Put the cluster's"),
    ],
)
def test_a_refusal_is_one_line_with_the_remedy_also_without_a_text(error: Exception, said: str) -> None:
    with pytest.raises(ClusterError, match=said), submit._refusals("here", submit._SUBMITTING):
        raise error


def test_the_command_that_follows_a_job_goes_to_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def get_address(self) -> str:
            return "http://host:8265"

    job = Job("job-1", Client())
    for name in _ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    assert job.log_command() == "ray job logs --address http://host:8265 --follow job-1"
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert job.log_command() == "env -u RAY_ADDRESS ray job logs --address http://host:8265 --follow job-1"
    # a client that was told to send its token says so to the next command, whose shell does not
    job = Job("x-1", Client(), by_token=True)
    assert job.log_command() == (
        "env -u RAY_ADDRESS RAY_AUTH_MODE=token ray job logs --address http://host:8265 --follow x-1"
    )
    monkeypatch.delenv("RAY_ADDRESS")
    assert job.stop_command() == "env RAY_AUTH_MODE=token ray job stop --address http://host:8265 x-1"


@pytest.mark.parametrize(
    ("code", "body", "warned"),
    [(200, b'{"ray_version": "2.60.0"}', True), (401, b"", False), (200, b"<html>another server</html>", False)],
)
def test_a_cluster_that_answers_without_a_token_is_warned_about(
    code: int, body: bytes, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, [name.lower() for name in self.headers]))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # no proxy stands before a cluster
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = open_warning(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert (found is not None) == warned
    if found is not None:
        assert f"http://127.0.0.1:{server.server_port} is open" in found and "ray get-auth-token --generate" in found
    ((path, headers),) = asked
    assert path == "/api/version"
    assert not {"authorization", "x-ray-authorization"} & set(headers)


def test_a_cluster_that_does_not_answer_is_not_called_open() -> None:
    assert open_warning("http://127.0.0.1:1") is None


def test_a_given_cluster_is_used_unless_a_job_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "left:6379")
    assert Connection("given:6379").address == "given:6379"
    assert "at given:6379, as was asked; RAY_ADDRESS=left:6379 is left aside" in str(Connection("given:6379").note)
    assert Connection().address == "left:6379"
    assert "at left:6379, as RAY_ADDRESS in the environment says" in str(Connection().note)
    assert Connection("left:6379").note is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert Connection("given:6379").address == "left:6379"
    assert Connection("given:6379").note is None
    monkeypatch.delenv("RAY_ADDRESS")
    assert Connection("given:6379").note is None


LOG = "".join(f"line {number}\n" for number in range(20))


class BrokenStreams:
    """A dashboard whose streams end in the middle, each time with other pieces, and that is away for a time."""

    def __init__(self, code: int | None, status: str = "FAILED") -> None:
        self.streams = iter(
            [(5, 30, ClientPayloadError("cut")), (7, 61, None), (3, 61, OSError("reset")), (50, 999, None)]
        )
        self.answers = iter([RuntimeError("502"), False, OSError("refused"), False, False])
        status, _, self.last_line = status.partition(" ")
        self.info = SimpleNamespace(driver_exit_code=code, status=status)

    def get_job_logs(self, job: str) -> str:
        return f"{LOG}{self.last_line}\nmore\n"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        size, stop, error = next(self.streams)
        for at in range(0, min(stop, len(LOG)), size):
            yield LOG[at : min(at + size, stop)]
        if error is not None:
            raise error

    def get_job_status(self, job: str) -> SimpleNamespace:
        answer = next(self.answers, True)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(is_terminal=lambda: answer)

    def get_job_info(self, job: str) -> SimpleNamespace:
        return self.info


def test_a_log_is_followed_through_broken_streams_without_a_letter_lost_or_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "_PAUSE", 0.01)
    assert "".join(Job("job-1", BrokenStreams(3)).follow()) == LOG


def test_a_cluster_that_answers_no_more_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_PAUSE", 0.01)
    monkeypatch.setattr(submit, "_LONGEST_SILENCE", 0.1)

    class Away(BrokenStreams):
        def get_job_status(self, job: str) -> SimpleNamespace:
            raise OSError("refused")

        def get_address(self) -> str:
            return "http://host:8265"

    with pytest.raises(
        ClusterError, match=r"has not answered for 0.1 s \(refused\); the job may go on: .*ray job logs"
    ):
        "".join(Job("job-1", Away(None)).follow())


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        (3, "FAILED", 3),
        (2, "FAILED", 2),
        (0, "SUCCEEDED", 0),
        (None, "STOPPED", 1),
        (None, f"STOPPED {exit_line(3, 'stopped')}", 3),
        (None, f"STOPPED 2026-11-29 10:00:00 {exit_line(0, 'stopped')}", 0),
        (None, "SUCCEEDED", 0),
        (-9, "FAILED", 1),
    ],
)
def test_waiting_for_a_job_ends_with_its_own_exit_code(
    code: int | None, status: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_PAUSE", 0.01)
    assert Job("job-1", BrokenStreams(code, status)).exit_code() == expected


@pytest.mark.parametrize(("gone", "expected"), [(OSError("refused"), 3), (RuntimeError("404"), 1)])
def test_a_question_that_breaks_at_the_end_is_asked_again(
    gone: Exception, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a job that was stopped, with a checkpoint, would end as one that failed."""
    monkeypatch.setattr(submit, "_PAUSE", 0.01)
    broken = {"info": [OSError("refused"), RuntimeError("502")], "logs": [gone]}

    class Breaking(BrokenStreams):
        def get_job_info(self, job: str) -> SimpleNamespace:
            if broken["info"]:
                raise broken["info"].pop()
            return super().get_job_info(job)

        def get_job_logs(self, job: str) -> str:
            if broken["logs"]:
                raise broken["logs"].pop()
            return super().get_job_logs(job)

    assert Job("job-1", Breaking(None, f"STOPPED {exit_line(3, 'stopped')}")).exit_code() == expected


class Jobs:
    """A cluster's jobs; notes what is submitted."""

    def __init__(self, *jobs: tuple[str, str, str]) -> None:
        from ray.job_submission import JobStatus

        self.jobs = [
            SimpleNamespace(submission_id=name, metadata={"run": run}, status=JobStatus(status), message="",
                            start_time=number * 1000, end_time=None, driver_exit_code=None)
            for number, (name, run, status) in enumerate(jobs)
        ]  # fmt: skip
        self.submitted: dict[str, Any] = {}

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.jobs

    def get_address(self) -> str:
        return "http://head:8265"

    def submit_job(self, **job: Any) -> str:
        self.submitted = {
            **job,
            "files": sorted(path.name for path in Path(job["runtime_env"]["working_dir"]).iterdir()),
        }
        assert Path(job["runtime_env"]["py_modules"][0]).suffix == ".whl"
        return str(job["submission_id"])


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*jobs: tuple[str, str, str]) -> Jobs:
        client = Jobs(*jobs)
        monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: client)
        return client

    return make


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_run_that_is_trained_is_not_submitted_again(cluster_of: Any, status: str) -> None:
    client = cluster_of(("other-1", "other", "RUNNING"), ("x-1", "x", "FAILED"), ("x-2", "x", status))
    with pytest.raises(ClusterError, match=r"trained by job x-2 .* already \(.*job stop .*x-2"):
        submit.submit_training("name: x", "x", "http://head:8265")
    assert client.submitted == {}


def test_a_run_of_the_same_name_in_another_folder_is_another(cluster_of: Any) -> None:
    client = cluster_of(("x-1", "x", "RUNNING"))
    client.jobs[0].metadata["output"] = "/shared/colleague"
    assert submit.submit_training("", "x", "http://head:8265", metadata={"output": "/shared/mine"}).id == "x-2"
    with pytest.raises(ClusterError, match="trained by job x-1"):
        submit.submit_training("", "x", "http://head:8265", metadata={"output": "/shared/colleague"})


def test_a_stopped_run_goes_on_under_the_next_number_with_this_tree_and_no_secrets(
    cluster_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc")
    monkeypatch.setenv("HF_TOKEN", "abc")
    client = cluster_of(("x-1", "x", "STOPPED"), ("x-2", "x", "FAILED"), ("y-7", "y", "RUNNING"))
    job = submit.submit_training("name: x", "x", "http://head:8265", ["--preflight"], 60, {"config": "d"})
    assert job.id == "x-3"
    told = client.submitted
    assert told["files"] == ["run.yaml"] and told["metadata"]["config"] == "d"
    assert told["entrypoint"] == "python -m domainshuttle.platform.cli train run.yaml --preflight"
    assert told["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert "abc" not in str(told)


def test_jobs_of_runs_are_listed_the_newest_first(cluster_of: Any) -> None:
    cluster_of(("x-1", "x", "STOPPED"), ("x-2", "x", "RUNNING"))
    assert [(job.id, job.live) for job in submit.list_jobs("http://head:8265")] == [("x-2", True), ("x-1", False)]
    assert submit.find_job("x-2", "http://head:8265").id == "x-2"
    with pytest.raises(ClusterError, match="has no job x-3"):
        submit.find_job("x-3", "http://head:8265")


def test_an_address_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    assert submit.overriding_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "http://left:8265")
    assert "cluster of RAY_ADDRESS=http://left:8265" in str(submit.overriding_address(None))
    assert "RAY_ADDRESS=http://left:8265 is left aside" in str(submit.overriding_address("http://asked:8265"))
