"""Retries: which failures of a store pass, how long they are waited for, and what is said when they do not.

Every request of ours is tried once by pyarrow and again by us, so that attempts neither multiply nor hide. One that is
waited for is told of, on the log, which is a command's standard error.
"""

import contextlib
import logging
import math
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from domainshuttle.pipelines.errors import DataError, MissingError, StorageError, mask_secrets

T = TypeVar("T")
logger = logging.getLogger(__name__)

SILENT_SECONDS = 3.0
"""How long a store may leave a request unanswered before people are told."""
REPEAT_SECONDS = 30.0
"""How long nothing more is said of the same store."""


@dataclass(frozen=True)
class Limits:
    """How long a store that fails is asked again. The n-th wait is drawn from 0 to first_wait x 2^n seconds, at most
    `longest_wait`, so that many workers do not come back at once."""

    attempts: int = 14
    total_seconds: float = 300.0
    first_wait: float = 0.25
    longest_wait: float = 30.0
    connect_seconds: float = 10.0
    stall_seconds: float = 20.0
    """A request without a byte for so long is given up."""
    least_rate: float = 1e6
    """Bytes a second: a request that is slower is given up `stall_seconds` later, and made again."""

    def attempt_seconds(self, size: int | None) -> float:
        """How long one request for `size` bytes may take; None where it is not known what it moves."""
        return self.total_seconds if size is None else self.stall_seconds + size / self.least_rate


_STATUS = re.compile(r"HTTP status (\d{3})")
_AWS_ERROR = re.compile(r"AWS Error ([A-Z_]+)")
_CURL = re.compile(r"curlCode: (\d+)")
_PASSING_STATUS = (408, 416, 429)  # 416: see is_unclear
_PASSING_ERRORS = (
    "INTERNAL_FAILURE", "NETWORK_CONNECTION", "REQUEST_TIMEOUT", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "THROTTLING",
)  # fmt: skip
_MISSING_ERRORS = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND")
_LASTING_CURL = (1, 3, 60, 77)  # protocol or URL not understood, certificate not trusted, its file not readable


def is_missing(error: OSError) -> bool:
    """Whether a store said that there is no such object or bucket."""
    named = _AWS_ERROR.search(str(error))
    return isinstance(error, FileNotFoundError) or (named is not None and named[1] in _MISSING_ERRORS)


def is_unclear(error: OSError) -> bool:
    """Whether the object may be another by now, which a look at it tells: a range was not in it (416), or an answer had
    no room where the bytes should go, as an error's text has none, and pyarrow lost its status."""
    status = _STATUS.search(str(error))
    return (status is not None and status[1] == "416") or "response stream" in str(error)


def passes(error: OSError) -> bool:
    """Whether an error is one that may be gone at the next attempt: a timeout, a broken connection, a store that is
    overloaded or at fault. pyarrow gives S3's errors as text."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    text = str(error)
    if status := _STATUS.search(text):
        return int(status[1]) >= 500 or int(status[1]) in _PASSING_STATUS
    if curl := _CURL.search(text):
        return int(curl[1]) not in _LASTING_CURL
    named = _AWS_ERROR.search(text)
    return named is not None and named[1] in _PASSING_ERRORS


_jitter = random.Random()  # its own, so that a run's seeded randomness is left alone


_patience: ContextVar[float | None] = ContextVar("patience", default=None)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Requests of this thread are given up after so many seconds, where what they are for can be done without."""
    before = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(before)


def retried(place: str, doing: str, request: Callable[[], T], limits: Limits, size: int | None = None) -> T:
    """What `request`, for `size` bytes, returns, asked again while its failures are such that pass; `place` as it may
    be shown.

    Raises MissingError for what is not there, StorageError for what a store refuses, and after the last attempt.
    """
    began, asked = time.monotonic(), _patience.get()
    total = limits.total_seconds if asked is None else min(asked, limits.total_seconds)
    word = Word(place, doing, total, size, limits)
    for attempt in range(1, limits.attempts + 1):
        try:
            left = total - (time.monotonic() - began)
            return _within(min(left, limits.attempt_seconds(size)), request, word)
        except (DataError, StorageError):
            raise
        except OSError as error:
            last = error
        wait = _jitter.uniform(0, min(limits.longest_wait, limits.first_wait * 2 ** (attempt - 1)))
        spent = time.monotonic() - began
        if attempt == limits.attempts or spent + wait >= total or not passes(last):
            break
        word.failed(attempt, last)
        if spent + wait >= SILENT_SECONDS:
            word.say()
        time.sleep(wait)
    raise explained(place, doing, last, attempt, spent)


class Word:
    """What people are told of a request that is not answered: that it is waited for, and for how long at most. After
    `SILENT_SECONDS` and as long as `size` bytes may take, but not later than `REPEAT_SECONDS`, and then every
    `REPEAT_SECONDS`."""

    _said: dict[str, float] = {}  # noqa: RUF012  # of all requests: when something was said of a store
    _lock = threading.Lock()

    def __init__(self, place: str, doing: str, seconds: float, size: int | None, limits: Limits) -> None:
        self._place, self._doing, self._most = place, doing, seconds
        self.began, self._why = time.monotonic(), ""
        self.after = min(SILENT_SECONDS + (size or 0) / limits.least_rate, max(SILENT_SECONDS, REPEAT_SECONDS))
        """Seconds after which it is said."""

    def failed(self, attempts: int, error: OSError) -> None:
        """Notes why the request is made again."""
        failed = f"{attempts} attempts failed, the last" if attempts > 1 else "an attempt failed"
        self._why = f" ({failed}: {_reason(error)})"
        self.after = min(self.after, SILENT_SECONDS)

    def left(self) -> float:
        """Seconds until there is something to say."""
        return self.began + self.after - time.monotonic()

    def say(self) -> None:
        """Says it, unless something was said of the same store a moment ago."""
        now = time.monotonic()
        store = "/".join(self._place.split("/")[:3])
        with self._lock:
            free = self._said.get(store, -math.inf) + REPEAT_SECONDS
            if now < free:
                self.after = free - self.began
                return
            self._said[store] = now
        self.after = now - self.began + REPEAT_SECONDS
        logger.warning(
            "%s: %s takes longer than %.0f s%s; it is waited for up to %.0f s",
            *(self._place, self._doing, now - self.began, self._why, self._most),
        )

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Says it while the block lasts, which itself waits for the store."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(max(self.left(), 0.0)):
                self.say()

        threading.Thread(target=watch, name="storage-word", daemon=True).start()
        try:
            yield
        finally:
            ended.set()


def explained(place: str, doing: str, error: OSError, attempts: int, seconds: float) -> MissingError | StorageError:
    """The error to raise for a store's last one, with what to do."""
    if is_missing(error):
        return MissingError(f"{place} is missing: copy it again, or correct its place")
    reason = _reason(error)
    if passes(error):
        text = (
            f"{doing} failed {attempts} times in {seconds:.0f} s, the last time: {reason}. The store is down or "
            "overloaded: see to it, then run the same command again"
        )
    else:
        text = (
            f"{doing} was refused: {reason}. Check the access keys or role, the bucket's policy and the place; to "
            "those who may not list a bucket S3 says the same of what is missing"
        )
    return StorageError(f"{place}: {text}", place, attempts, reason)


def _reason(error: OSError) -> str:
    return mask_secrets(" ".join(str(error).split()))[:300] or type(error).__name__


def _within(seconds: float, request: Callable[[], T], word: Word) -> T:
    """What `request` returns, or TimeoutError after `seconds`: pyarrow gives up a store that is silent, but would wait
    for days for one that sends a byte now and then. Such a request is left behind on its thread."""
    end = time.monotonic() + seconds
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((request(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, name="storage", daemon=True).start()
    while True:
        try:
            value, error = answers.get(timeout=max(min(end - time.monotonic(), word.left()), 0.0))
            break
        except queue.Empty:
            if time.monotonic() >= end:
                raise TimeoutError("no whole answer within the time limit") from None
            word.say()
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
