"""Standard output and errors: their reader may go away, such as `head`, and a job's log has a time in each line.

A command whose reader is gone ends as by Ctrl-C, silently.
"""

import contextlib
import io
import os
import re
import signal
import sys
import time
from typing import Any

CLOSED = 141
"""Exit code of a command whose reader is gone, as of one that SIGPIPE ends (128 + 13)."""


class _Readers:
    """Whether a reader of this process has gone away."""

    gone = False


class _Stream(io.FileIO):
    """A file descriptor that leads to nowhere once its reader is gone; of the first one the process is told by SIGINT.

    SIGPIPE would end it before training has a checkpoint, and also for a connection that breaks.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not _Readers.gone:
                _Readers.gone = True
                signal.raise_signal(signal.SIGINT)
            return memoryview(data).nbytes


class _Lines(io.TextIOWrapper):
    """Text to which the time can be put before each line that has none."""

    dated = False
    _DATE = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")
    _begins = True

    def write(self, text: str, /) -> int:
        if not self.dated:
            return super().write(text)
        for line in text.splitlines(keepends=True):
            if self._begins and line.strip() and not self._DATE.match(line):
                super().write(time.strftime("%Y-%m-%d %H:%M:%S "))
            super().write(line)
            self._begins = line.endswith("\n")
        return len(text)


def watch_readers() -> None:
    """From now on standard output and errors are such streams, where they are the process's own."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            watched = _Lines(
                io.BufferedWriter(_Stream(number, "wb", closefd=False)),
                stream.encoding,
                "backslashreplace",  # a name that the terminal's encoding does not have ends no command
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, watched)


def date_lines() -> None:
    """From now on each line of these streams begins with a time: what the log of a job tells is asked for when."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Lines):
            stream.dated = True


def reader_gone() -> bool:
    """Whether nobody reads any more what this process prints."""
    return _Readers.gone


def flush() -> None:
    """Writes what waits in the buffers; a reader that is gone is no error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(KeyboardInterrupt):
                stream.flush()
