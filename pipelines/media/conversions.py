"""What is done to the pixels of a file beside decoding them, as it is counted for people."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

GUESSED = "colours guessed"
"""A matrix or a range that the file does not name, or CMYK without a profile."""
HDR, WIDE, PROFILE = "HDR to SDR", "wide colours to sRGB", "colours by ICC profile"
DEPTH = "more than 8 bits to 8"
ON_WHITE = "transparent, on white"
TURNED = "turned or mirrored"
SQUARED = "pixels made square"
CROPPED = "cropped by its container"
DEINTERLACED = "deinterlaced"
ONE_STREAM = "other video streams left out"
ONE_PICTURE = "first of several pictures"

_noted: ContextVar[set[str] | None] = ContextVar("noted", default=None)


@contextmanager
def noted_conversions() -> Iterator[set[str]]:
    """The set to which conversions within the block, in this thread, are added."""
    found: set[str] = set()
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note(conversion: str) -> None:
    """Adds a conversion to the set of the block around, if there is one."""
    if (found := _noted.get()) is not None:
        found.add(conversion)
