"""The names of checkpoints, and which of them a segment goes on from: its lines.

A segment's first line is 0. Whoever starts it anew (`--resume none`) or from an earlier checkpoint (`--resume PATH`)
begins a further line, which is noted in the store before anything is trained: from then on, checkpoints of the line
that was left are there to be looked at, copied or named again, but no restart takes them, whatever their step.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_NAME = re.compile(r"(?P<segment>[a-z0-9][a-z0-9_-]*)-step(?P<step>\d{8,})(-line(?P<line>\d+))?")


@dataclass(frozen=True)
class Name:
    """What the name of a checkpoint's folder says: `stage1-step00000010`, or `stage1-step00000010-line2`."""

    segment: str
    step: int
    line: int = 0

    def __str__(self) -> str:
        return f"{self.segment}-step{self.step:08d}" + (f"-line{self.line}" if self.line else "")

    @classmethod
    def parse(cls, text: str) -> "Name | None":
        """None for what is no name of a checkpoint."""
        match = _NAME.fullmatch(text)
        return cls(match["segment"], int(match["step"]), int(match["line"] or 0)) if match else None


@dataclass(frozen=True)
class Line:
    """An unbroken history of training of a segment."""

    origin: str | None = None
    """What it goes on from: the name of a checkpoint of this store, or the path of one elsewhere; None: the start."""
    began: float = 0.0
    """Seconds since 1970."""


def lines_from(content: dict[str, Any] | None) -> list[Line]:
    """The lines as they are noted in a store; without a note there is the first. Raises TypeError, KeyError."""
    return [Line(**entry) for entry in content["lines"]] if content else [Line()]


def with_new_line(lines: Sequence[Line], origin: str | None) -> dict[str, Any]:
    """What to note in the store when a further line begins now."""
    return {"lines": [asdict(line) for line in [*lines, Line(origin, time.time())]]}


def candidates(names: Iterable[Name], lines: Sequence[Line]) -> Iterator[str]:
    """The names or paths from which the newest line may go on, the best first.

    These are its own, then the checkpoint that it began from (also when its folder is gone: that must be noticed), the
    ones before that in its line, and so on.
    """
    there = sorted(names, key=lambda name: -name.step)
    number: int | None = len(lines) - 1
    below: int | None = None
    while number is not None:
        yield from (str(n) for n in there if n.line == number and (below is None or n.step < below))
        origin = lines[number].origin
        if origin:
            yield origin
        parent = Name.parse(origin) if origin else None
        number, below = (parent.line, parent.step) if parent else (None, None)
