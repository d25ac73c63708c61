"""Errors of data and storage, and their texts without secrets."""

from __future__ import annotations

import re


class UserFacingError(Exception):
    """A mistake of the user's, or a fault of the place, such as a full disk or a store that is away.

    Its text is one message that says what, where and what to do: the command line shows it without a traceback and ends
    with code 2. Any other exception is a fault of the product's own: a traceback, and code 1.
    """


class DataError(UserFacingError, ValueError):
    """Data that breaks its contract: the message says what, where, what was expected and what to do."""


class TooManyBadError(DataError):
    """More bad samples than a run accepts: starting again would meet them again."""


class StorageError(UserFacingError, OSError):
    """A store that is down or refuses: nothing is known of the data, so no sample is to blame.

    `place` has no access keys in it; `reason` is the last attempt's.
    """

    def __init__(self, message: str, place: str = "", attempts: int = 1, reason: str = "") -> None:
        super().__init__(message)
        self.place, self.attempts, self.reason = place, attempts, reason

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, int, str]]:
        return type(self), (str(self), self.place, self.attempts, self.reason)


class MissingError(DataError, FileNotFoundError):
    """Something that is not where it should be."""


# up to an @ in the host, or, as it is with keys that were not escaped, after a colon in it
_KEYS = re.compile(r"(\w://)(?:[^/\s'\"?:]*:[^\s'\"?]*|[^/\s'\"?]*)@")


def masked(text: str) -> str:
    """`text` without user and keys of its URIs, and without values of parameters that name a secret."""
    text = _KEYS.sub(r"\1", text)
    return re.sub(r"(?i)([?&][\w-]*(?:secret|token|password|key)[\w-]*=)[^&\s'\"]*", r"\1***", text)


def mask_secrets(text: str) -> str:
    """`text` with `***` for the user and password of every URL in it."""
    return re.sub(r"(\w://)[^/\s'\"]+@", r"\1***@", text)


def one_line(error: Exception) -> str:
    return mask_secrets(str(error) or type(error).__name__).splitlines()[0][:300]
