"""Errors of data and storage, and their texts: without secrets, in one line, with words that fit their numbers."""

from __future__ import annotations

import re


class UserFacingError(Exception):
    """A mistake of the user's, or a fault of the environment, such as a full disk or a store that is away.

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


# a user and a password: up to an @ in the host or, where they were not escaped as they should be, after a colon in it
_KEYS = re.compile(r"(\w://)(?:[^/\s'\":?]*:[^\s'\"]*|[^/\s'\"]+)@")
_PARAMETER = re.compile(r"(?i)([?&](?:[\w-]*(?:secret|token|passw|key|credential|signature)[\w-]*|sig)=)[^&\s'\"]*")


def mask_secrets(text: str) -> str:
    """`text` with `***` for the user and password of every URL in it, and for the values of parameters that name a
    secret."""
    return _PARAMETER.sub(r"\1***", _KEYS.sub(r"\1***@", text))


def without_user(url: str) -> str:
    """A URL without its user and password, and with `***` for the values of parameters that name a secret."""
    return mask_secrets(url).replace("***@", "")


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with what it counts, `1 step` or `2 steps`; `plural` where that is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def one_line(error: BaseException) -> str:
    """The first line of an error's text, without secrets."""
    return mask_secrets(str(error) or type(error).__name__).splitlines()[0][:300]
