"""Hooks: real programs and a real server on this machine get what happened, in time, again after a failure, and
nothing that they do ends or delays a run.

Run: python -m pytest tests/platform/tracking/test_hooks.py
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.driver.driver import failure_events
from domainshuttle.platform.driver.schedule_loop import DivergedError, WorkersFailedError
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.tracking.hooks import Hooks


class Pager(HTTPServer):
    """A web service that refuses its first `failures` messages."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.failures, self.got = failures, list[tuple[str, dict[str, str], dict[str, Any]]]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Pager

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.failures -= 1
        if self.server.failures >= 0:
            self.send_error(503)
            return
        self.server.got.append((self.path, dict(self.headers), json.loads(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def pager() -> Iterator[Pager]:
    server = Pager()
    yield server
    server.shutdown()
    server.server_close()


def hooks_of(tmp_path: Path, said: list[str], *hooks: dict[str, Any]) -> tuple[Hooks, Run]:
    run = Run.open(load_config("demo", [f"output={tmp_path}/runs", f"tracking.hooks={json.dumps(hooks)}"]))
    return Hooks(run, said.append, lambda: "http://mlflow/page", pause=0.01), run


def told(run: Run) -> list[dict[str, Any]]:
    return Journal(run.folder / "hooks.jsonl").read()[0]


WRITE = (
    "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['DOMAINSHUTTLE_EVENT']).write_text(sys.stdin.read())"
)


def test_a_program_and_a_server_get_what_they_listen_to(tmp_path: Path, pager: Pager) -> None:
    said: list[str] = []
    got = tmp_path / "it's here"
    got.mkdir()
    hooks, run = hooks_of(
        tmp_path, said,
        {"command": [sys.executable, "-c", WRITE, str(got)], "on": ["failed", "finished"]},
        {"webhook": pager.address + "/x", "on": ["hung", "restarted"]},
    )  # fmt: skip
    run.progress_path.write_text(json.dumps({"segment": "stage1", "step": 7}))
    hooks.tell(("hung", "restarted"), "worker 1 hung at s3://me:secret@bucket")
    hooks.tell(("diverged", "failed"), "the loss went wrong")
    hooks.close(30)
    ((path, _, message),) = pager.got
    assert path == "/x" and message["event"] == "hung" and message["text"] == "demo: worker 1 hung at s3://***@bucket"
    assert (message["run"], message["stage"], message["step"]) == ("demo", "stage1", 7)
    assert message["mlflow"] == "http://mlflow/page" and message["look"] == f"domainshuttle status {run.folder}"
    (file,) = got.iterdir()
    assert file.name == "failed" and json.loads(file.read_text())["text"] == "demo: the loss went wrong"
    assert not said and sorted((one["event"], one["error"]) for one in told(run)) == [("failed", ""), ("hung", "")]


def test_a_failure_is_tried_again_and_given_up_with_a_line(tmp_path: Path, pager: Pager) -> None:
    said: list[str] = []
    hooks, run = hooks_of(
        tmp_path, said, {"webhook": pager.address, "retries": 2}, {"command": ["false"], "retries": 0}
    )
    pager.failures = 2
    hooks.tell(("finished",), "done")
    hooks.close(30)
    assert [message["event"] for _, _, message in pager.got] == ["finished"]
    assert said == ["A hook for 'finished' (false) could not be told: it ended with code 1"]
    hooks, run = hooks_of(tmp_path, said, {"webhook": pager.address, "retries": 1})
    pager.failures = 2
    hooks.tell(("failed",), "x")
    hooks.close(30)
    assert "503" in said[-1] and told(run)[-1]["error"] and pager.failures == 0


def test_one_that_hangs_is_ended_and_delays_nobody(tmp_path: Path) -> None:
    said: list[str] = []
    mark = tmp_path / "child"
    nested = f"import subprocess, time; subprocess.Popen(['sh', '-c', 'sleep 2; touch {mark}']); time.sleep(60)"
    slow = {"command": [sys.executable, "-c", nested], "timeout": 1, "retries": 0}
    hooks, _ = hooks_of(tmp_path, said, slow)
    began = time.monotonic()
    hooks.tell(("restarted",), "x")
    assert time.monotonic() - began < 0.5
    hooks.close(0.1)  # a run that ends does not wait longer than it is told to
    assert time.monotonic() - began < 1.0
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "not done after 1 s" in said[0]
    time.sleep(2.2)
    assert not mark.exists()  # its children are ended with it


def test_secrets_come_from_the_environment_and_are_shown_nowhere(
    tmp_path: Path, pager: Pager, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("PAGER", f"{pager.address}/T000/very-secret")
    monkeypatch.setenv("PAGER_TOKEN", "tell-nobody")
    hook = {"webhook": "${PAGER}", "headers": {"Authorization": "Bearer ${PAGER_TOKEN}"}, "retries": 0}
    hooks, run = hooks_of(tmp_path, said, hook)
    assert hooks.missing() == []
    hooks.tell(("failed",), "x")
    pager_address = pager.address
    hooks.close(30)
    ((path, headers, _),) = pager.got
    assert path == "/T000/very-secret" and headers["Authorization"] == "Bearer tell-nobody"
    pager.failures = 1
    hooks, run = hooks_of(tmp_path, said, hook)
    hooks.tell(("failed",), "x")
    hooks.close(30)
    monkeypatch.setenv("PAGER", "gopher://very-secret")
    hooks, run = hooks_of(tmp_path, said, hook)
    hooks.tell(("failed",), "x")
    hooks.close(30)
    monkeypatch.delenv("PAGER")
    hooks, run = hooks_of(tmp_path, said, hook)
    assert hooks.missing() == ["PAGER is not in the environment: tracking.hooks that need it can't tell anybody"]
    hooks.tell(("failed",), "x")
    hooks.close(30)
    assert len(said) == 3 and "PAGER is not in the environment" in said[2]
    kept = "".join(path.read_text() for path in run.folder.rglob("*") if path.is_file())
    for secret in ("very-secret", "tell-nobody", pager_address):
        assert secret not in "".join(said) + kept


@pytest.mark.parametrize(
    ("hook", "fault"),
    [
        ({}, "either `command` or `webhook`"),
        ({"command": ["x"], "webhook": "http://x"}, "either `command` or `webhook`"),
        ({"webhook": "ftp://x"}, "begins with http"),
        ({"webhook": "https://me:very-secret@host/x"}, "environment"),
        ({"webhook": "https://host/x?token=very-secret"}, "environment"),
        ({"webhook": "https://hooks.slack.com/services/T0/B0/very-secret"}, "environment"),
        ({"webhook": "https://discord.com/api/webhooks/1/very-secret"}, "environment"),
        ({"webhook": "https://host", "headers": {"X-Api-Key": "very-secret"}}, "environment"),
        ({"command": ["x"], "on": ["fail"]}, "failed"),
        ({"command": []}, "command"),
    ],
)
def test_a_hook_that_can_not_work_is_refused(hook: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("demo", [f"tracking.hooks={json.dumps([hook])}"])
    assert fault in str(refused.value) and "very-secret" not in str(refused.value)


def test_an_end_is_called_by_what_is_known_of_it() -> None:
    hung = WorkersFailedError("x")
    hung.hung = True
    assert failure_events(DivergedError("x")) == ("diverged", "failed")
    assert failure_events(hung) == ("hung", "failed")
    assert failure_events(WorkersFailedError("x")) == failure_events(OSError("x")) == ("failed",)
