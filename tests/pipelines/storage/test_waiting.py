"""A store that does not answer is told of while it is waited for, and is not waited for without end.

Run: python -m pytest tests/pipelines/storage/test_waiting.py
"""

import itertools
import logging
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import QUICK

from domainshuttle.pipelines.errors import StorageError
from domainshuttle.pipelines.storage import files as storage
from domainshuttle.pipelines.storage import retry


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(retry, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(retry.Word, "_said", {})
    monkeypatch.setattr(
        storage, "LIMITS", replace(QUICK, attempts=100, total_seconds=1.0, first_wait=0.1, longest_wait=0.2)
    )


@pytest.fixture(params=["silent", "refused"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """In a store that takes connections and never answers, or at whose address nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listening.listen(100)
        yield f"s3://bucket/x/a.bin?region=us-east-1&endpoint_override=http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    "ask",
    [
        storage.exists,
        storage.size,
        storage.list_files,
        storage.read_bytes,
        lambda place: storage.read_ranges(place, [(0, 10)]),
        lambda place: storage.write_bytes(place, b"x"),
        storage.delete,
    ],
    ids=["exists", "size", "list", "read", "ranges", "write", "delete"],
)
def test_each_request_is_told_of_and_ends(ask: Callable[[str], Any], place: str, caplog: Any) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="The store is down"):
        ask(place)
    assert time.monotonic() - began < 3
    (told,) = caplog.records  # once, of the same store, though it was asked many times
    assert told.created - (time.time() - (time.monotonic() - began)) < 1
    assert "s3://bucket/x/a.bin" in told.message and "it is waited for up to 1 s" in told.message


def test_an_upload_is_told_of(place: str, caplog: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LIMITS", replace(QUICK, attempts=2))
    (tmp_path / "a").write_bytes(b"x")
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        storage.write_file(tmp_path / "a", place)
    assert ["uploading" in record.message for record in caplog.records] in ([True], [])  # refused twice is quick


def test_a_large_upload_to_a_store_that_is_away_is_told_of_again_and_again(
    caplog: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only once its bytes could have come through, which is after the upload was given up."""
    monkeypatch.setattr(retry, "REPEAT_SECONDS", 0.3)
    monkeypatch.setattr(storage, "LIMITS", replace(QUICK, attempts=2, connect_seconds=1, stall_seconds=1))
    with (tmp_path / "a").open("wb") as file:
        file.truncate(10 << 30)  # of which nothing is read before the store answers
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        place = f"s3://bucket/x?region=us-east-1&endpoint_override=http://127.0.0.1:{listening.getsockname()[1]}"
        with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="uploading"):
            storage.write_file(tmp_path / "a", place)
    assert len(caplog.records) >= 3 and all("it is waited for up to 4 s" in one.message for one in caplog.records)
    count = len(caplog.records)
    time.sleep(0.5)
    assert len(caplog.records) == count


def test_what_is_answered_in_time_is_not_told_of(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        assert retry.retried("s3://b/x", "reading", lambda: 7, storage.LIMITS) == 7
        assert retry.retried("s3://b/x", "reading", lambda: time.sleep(0.4) or 7, storage.LIMITS, 10**9) == 7
    assert not caplog.records


def test_it_is_said_again_and_with_the_reason(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "REPEAT_SECONDS", 0.3)

    def fail() -> None:
        raise ConnectionError("nobody there, key s3://AKIAUSER:hunter2@bucket")

    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        retry.retried("s3://bucket/x", "listing", fail, storage.LIMITS)
    told = [record.message for record in caplog.records]
    assert 2 <= len(told) <= 4 and all("attempts failed, the last: nobody there" in text for text in told)
    assert "hunter2" not in "".join(told)


def test_it_is_said_at_even_times_whenever_attempts_fail(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "REPEAT_SECONDS", 0.3)
    limits = replace(storage.LIMITS, total_seconds=2.0, stall_seconds=0.45, first_wait=0.001, longest_wait=0.002)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        retry.retried("s3://bucket/x", "listing", lambda: time.sleep(9), limits, 1)
    times = [record.created for record in caplog.records]
    assert len(times) >= 5 and max(later - one for one, later in itertools.pairwise(times)) < 0.44
    assert "an attempt failed: no whole answer" in caplog.records[2].message


def test_what_can_be_done_without_is_given_up_sooner(place: str) -> None:
    began = time.monotonic()
    with retry.patience(0.3), pytest.raises(StorageError):
        storage.exists(place)
    assert time.monotonic() - began < 0.9
    with pytest.raises(StorageError, match=r"in [12] s"):
        storage.exists(place)
