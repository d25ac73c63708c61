"""What people see of long work: a line that moves on a terminal, a line now and then in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
"""Standard output."""
errors = Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(what: str, unit: str, log_every: float = 10.0) -> Iterator[Callable[..., None]]:
    """Shows progress of `what`: call the result with (done, total), and a `note` to show behind.

    On a terminal a bar moves; elsewhere a line is printed every `log_every` seconds.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn(unit),
                   TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None, note="")
            yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)
        return
    last, shown = time.monotonic(), ""

    def line(done: int, total: int, note: str = "") -> None:
        nonlocal last, shown
        if time.monotonic() - last >= log_every and shown != f"{done} {note}":
            last, shown = time.monotonic(), f"{done} {note}"
            console.print(f"{what}: {done} of {total} {unit} {note}".rstrip())

    yield line
    sys.stdout.flush()


def fail(message: str, code: int = 2) -> "SystemExit":
    """What to raise for a mistake of the user's: one message, no traceback."""
    errors.print(f"[bold red]Error:[/] {_escaped(message)}")
    return SystemExit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
