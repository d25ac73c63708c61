"""Hooks: somebody is told when a run needs him. A command or a web address gets one small JSON object.

Hooks never hold up the training, and never end it: each has a thread of its own, a time limit and a number of tries.
What could not be told is said once, without addresses, which are often secrets, and kept in `hooks.jsonl` of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tenacity import Retrying, stop_after_attempt, wait_exponential

from domainshuttle.pipelines.errors import mask_secrets, one_line
from domainshuttle.platform.config.schema import HookEvent, HookSection
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Journal

_OUTPUT = 300
"""Characters of a failed command's last words that are shown."""


class Hooks:
    """The hooks of a run. `echo` shows a line to people; `page` says where MLflow shows the run, if it does."""

    def __init__(
        self, run: Run, echo: Callable[[str], None], page: Callable[[], str | None], pause: float = 1.0
    ) -> None:
        """`pause` is the time before the second try, in seconds; it doubles with each."""
        self._run, self._echo, self._page, self._pause = run, echo, page, pause
        self._journal = Journal(run.folder / "hooks.jsonl")
        self._closing = threading.Event()
        self._lanes = [_HookThread(hook, self._deliver) for hook in run.config.tracking.hooks]

    def missing(self) -> list[str]:
        """What hooks need of the environment and do not find, for people."""
        names = sorted({name for lane in self._lanes for name in lane.hook.variables() if name not in os.environ})
        return [f"{name} is not in the environment: tracking.hooks that need it can't tell anybody" for name in names]

    def tell(self, events: Sequence[HookEvent], text: str, **facts: Any) -> None:
        """Tells each hook of an occurrence, which is one event or several at once, by the first that it listens to.

        Returns at once. `text` is a line for people.
        """
        state = self._run.read_progress()
        common = {
            "text": f"{self._run.config.name}: {mask_secrets(text)}",
            "run": self._run.config.name,
            "folder": str(self._run.folder),
            "stage": state.get("segment"),
            "step": state.get("step"),
            "host": socket.gethostname(),
            "time": time.time(),
            "mlflow": self._page(),
            "look": f"domainshuttle status {shlex.quote(str(self._run.folder))}",
            **facts,
        }
        for lane in self._lanes:
            event = next((one for one in events if one in lane.hook.on), None)
            if event is not None:
                lane.put({"event": event, **common})

    def close(self, timeout: float) -> None:
        """Waits until all is told, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for lane in self._lanes:
            lane.close(max(0.0, deadline - time.monotonic()))
        self._closing.set()

    def _rest(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def _deliver(self, hook: HookSection, message: Mapping[str, Any]) -> None:
        """Tells one hook; whatever goes wrong is noted."""
        tries = Retrying(
            stop=stop_after_attempt(hook.retries + 1),
            wait=wait_exponential(multiplier=self._pause, max=60),
            sleep=self._rest,
            reraise=True,
        )
        error = ""
        try:
            tries(_send, hook, message)
        except Exception as raised:  # of a program, a server, or a setting that is not there
            error = _without_values(hook, _words(raised))
            self._echo(f"A hook for {message['event']!r} ({_name(hook)}) could not be told: {error}")
        line = {"time": time.time(), "event": message["event"], "hook": _name(hook), "error": error}
        with contextlib.suppress(OSError):  # of a full disk
            self._journal.append([line])


class _HookThread:
    """A hook and the thread that tells it, one message after the other."""

    def __init__(self, hook: HookSection, deliver: Callable[[HookSection, Mapping[str, Any]], None]) -> None:
        self.hook, self._deliver = hook, deliver
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="hook", daemon=True)
        self._thread.start()

    def put(self, message: Mapping[str, Any]) -> None:
        self._queue.put(message)

    def close(self, timeout: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            self._deliver(self.hook, message)


def _send(hook: HookSection, message: Mapping[str, Any]) -> None:
    body = json.dumps(message).encode()
    if hook.command is not None:
        _run_command(hook.command, body, message, hook.timeout)
        return
    address = hook.resolved(hook.webhook or "", os.environ)
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError("the address does not begin with http:// or https://")
    headers = {name: hook.resolved(value, os.environ) for name, value in hook.headers.items()}
    request = urllib.request.Request(address, body, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=hook.timeout) as answer:
        answer.read(1 << 16)


def _run_command(command: Sequence[str], body: bytes, message: Mapping[str, Any], timeout: float) -> None:
    """Runs a program with the message as its input and as variables; ends it, with its children, after `timeout`."""
    variables = {f"DOMAINSHUTTLE_{key.upper()}": str(value) for key, value in message.items() if value is not None}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, **variables},
    )  # fmt: skip
    try:
        said, _ = process.communicate(body, timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise TimeoutError(f"it was not done after {timeout:g} s and was ended") from None
    if process.returncode:
        words = said.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"it ended with code {process.returncode}" + (f": {words[-1][:_OUTPUT]}" if words else ""))


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is not in the environment"
    return one_line(error)


def _without_values(hook: HookSection, text: str) -> str:
    """A text without the values of the variables that the hook takes from the environment."""
    for name in hook.variables():
        if value := os.environ.get(name):
            text = text.replace(value, f"${{{name}}}")
    return text


def _name(hook: HookSection) -> str:
    """A hook for people, without what may be secret."""
    if hook.command is not None:
        return Path(hook.command[0]).name
    return urlsplit(hook.webhook or "").hostname or str(hook.webhook)
