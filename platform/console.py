"""Standard output and errors, and the progress of long work: a bar on a terminal, a line now and then in a log."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from domainshuttle.platform.report.text import visible

for _name in ("COLUMNS", "LINES"):
    if os.environ.get(_name) == "0":  # set so by programs that know no width: nothing at all would be shown
        del os.environ[_name]
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):  # a name that the terminal's encoding does not have ends no command
        _stream.reconfigure(errors="backslashreplace")

console = Console(highlight=False, soft_wrap=True)
"""Standard output."""
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def say(what: RenderableType) -> None:
    """Prints with the time before it: what happens in long work is read afterwards. Markup in a text has no effect."""
    if isinstance(what, str):
        console.print(f"{_now()} {what}", markup=False)
    else:
        console.print(_now())
        console.print(what)


def _now() -> str:
    return time.strftime("%H:%M:%S" if console.is_terminal else "%Y-%m-%d %H:%M:%S")


@contextlib.contextmanager
def progress(what: str, unit: str, log_every: float = 10.0) -> Iterator[Callable[..., None]]:
    """Prints the progress of `what`: call the result with (done, total), None where that is not known, and a `note` to
    print behind.

    On a terminal a bar moves; elsewhere a line is printed every `log_every` seconds. Markup in the texts has no effect.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[note]}", markup=False), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None, unit=unit, note="")
            yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)
        return
    last, printed = time.monotonic(), ""

    def line(done: int, total: int | None, note: str = "") -> None:
        nonlocal last, printed
        if time.monotonic() - last >= log_every and printed != f"{done} {note}":
            last, printed = time.monotonic(), f"{done} {note}"
            amount = done if total is None else f"{done} of {total}"
            say(f"{what}: {amount} {unit} {note}".rstrip())

    yield line
    sys.stdout.flush()


def fail(message: str) -> int:
    """Prints a mistake of the user's as one message without a traceback. Returns the exit code."""
    text = escape(visible(message, but="\n"))
    errors.print(f"[bold red]Error:[/] {text}")
    return 2
