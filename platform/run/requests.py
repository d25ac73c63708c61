"""What people ask the workers of a run at work for, through its folder: a file a question, and one with the answer.

A worker looks for questions from the thread of its sign of life, so that one that hangs in a step answers too.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.platform.run.folder import Run

Kind = Literal["stacks", "profile"]


def ask(run: Run, kind: Kind, rank: int) -> str:
    """Asks a worker; returns by what `read_answer` finds its answer."""
    token = uuid.uuid4().hex
    _write(_question(run, kind, rank), {"token": token, "time": time.time()})
    return token


def take(run: Run, kind: Kind, rank: int) -> str | None:
    """On the worker: the question of a kind that waits for it, once."""
    path = _question(run, kind, rank)
    try:
        token = str(json.loads(path.read_text())["token"])
        path.unlink()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return token


def withdraw(run: Run, kind: Kind, rank: int) -> None:
    """Takes a question back, which nobody has taken."""
    _question(run, kind, rank).unlink(missing_ok=True)


def answer(run: Run, token: str, content: Mapping[str, Any]) -> None:
    """On the worker: answers. A disk that is full ends nothing."""
    with contextlib.suppress(OSError):
        _write(_answer(run, token), content)


def read_answer(run: Run, token: str) -> dict[str, Any] | None:
    """The answer, once; None while there is none."""
    path = _answer(run, token)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    path.unlink(missing_ok=True)
    return content


def _question(run: Run, kind: Kind, rank: int) -> Path:
    return run.folder / "requests" / f"{kind}.rank{rank:05d}.json"


def _answer(run: Run, token: str) -> Path:
    return run.folder / "requests" / f"answer-{token}.json"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=False) as aside:
        aside.write_text(json.dumps(content))
