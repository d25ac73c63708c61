"""Servers that are larger, slower and further away: python -m pytest tests/platform/tracking/test_servers.py"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from domainshuttle.platform.config.schema import absolute_uri
from domainshuttle.platform.tracking import mlflow as tracking
from domainshuttle.platform.tracking import outbox
from domainshuttle.platform.tracking import queries as records
from domainshuttle.platform.tracking.mlflow import RunIds, Tracker, TrackingError, explained


@contextmanager
def answering(delay: float = 0.0) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """A server that only notes path and Host of each request, and answers after a while."""
    seen: list[tuple[str, str]] = []

    class Notes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Host"]))
            time.sleep(delay)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Notes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, seen
    finally:
        server.shutdown()


def test_a_slow_server_behind_a_path_is_there() -> None:
    with answering(delay=3.0) as (port, seen):
        assert outbox.reachable(f"http://anna:hunter2@127.0.0.1:{port}/team/mlflow/")
    assert seen == [("/team/mlflow/health", f"127.0.0.1:{port}")]


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_server_behind_a_proxy_is_not_asked_for_directly(
    variable: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not outbox.reachable(refused, 1.0)
    monkeypatch.setenv(variable, "http://proxy.invalid:3128")
    assert outbox.reachable(refused, 1.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not outbox.reachable(refused, 1.0)


def test_all_pages_are_read(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    names = [f"run {number}" for number in range(5)]
    for name in names:
        assert Tracker(RunIds(store, "paged", name), tmp_path / name).tag({"a": 1})
    for number in range(3):
        tracking.connect(store).create_experiment(f"paged-{number}")
    for method in ("search_runs", "search_experiments"):
        ask = getattr(MlflowClient, method)

        def two(self: MlflowClient, *arguments: object, ask: Callable[..., object] = ask, **named: object) -> object:
            return ask(self, *arguments, **{"max_results": 2, **named})

        monkeypatch.setattr(MlflowClient, method, two)
    assert [run.name for run in records.read_runs(store, ["paged"])] == names
    monkeypatch.setattr(records, "_MOST_NAMES", 1000)
    with pytest.raises(LookupError, match=r"paged-0, paged-1, paged-2") as raised:
        records.read_runs(store, ["page"])
    assert isinstance(raised.value, TrackingError)


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, REQUEST_LIMIT_EXCEEDED

    monkeypatch.setattr(tracking, "_PAUSES", (0.0, 0.0))
    tries: list[int] = []

    def busy(times: int, code: int) -> str:
        tries.append(1)
        if len(tries) <= times:
            raise MlflowException("too many requests", code)
        return "an answer"

    assert tracking.ask("http://x", partial(busy, 2, REQUEST_LIMIT_EXCEEDED)) == "an answer"
    tries.clear()
    with pytest.raises(TrackingError, match=r"http://\*\*\*@x can't be read: too many"):
        tracking.ask("http://a:b@x", partial(busy, 3, REQUEST_LIMIT_EXCEEDED))
    tries.clear()
    with pytest.raises(TrackingError):
        tracking.ask("http://x", partial(busy, 9, PERMISSION_DENIED))
    assert len(tries) == 1


def test_a_place_that_is_no_store_is_named() -> None:
    with pytest.raises(TrackingError, match="foo://bar can't be read"):
        records.read_runs("foo://bar", ["x"])


def test_an_sqlite_uri_may_have_options(store: str, tmp_path: Path) -> None:
    uri = store + "?timeout=20"
    assert absolute_uri(uri) == uri
    assert Tracker(RunIds(uri, "options", "a run"), tmp_path / "spool").tag({"a": 1})
    assert [run.name for run in records.read_runs(uri, ["options"])] == ["a run"]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("451aebb31d03", "an older MLflow made its tables: .*mlflow db upgrade 'sqlite:///a b.db'"),
        ("f" * 12, "a newer"),
    ],
)
def test_a_store_of_another_mlflow_is_answered_with_what_to_do(tmp_path: Path, version: str, expected: str) -> None:
    """Of a newer one MLflow itself says that it is out of date, and its upgrade fails."""
    import sqlalchemy
    from mlflow.exceptions import MlflowException
    from mlflow.store.db.utils import _verify_schema

    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/mlflow.db")
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("create table alembic_version (version_num varchar(32))"))
        connection.execute(sqlalchemy.text(f"insert into alembic_version values ('{version}')"))
    with pytest.raises(MlflowException) as error:
        _verify_schema(engine)
    assert re.match(expected, explained(error.value, "sqlite:///a b.db"))
    assert explained(ValueError("else"), "sqlite:///a.db") == "else"
