"""What the workers of a run printed, from its folder."""

import re
import shutil
import sys
import time
from pathlib import Path

from domainshuttle.platform.commands.status import driver_lives
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import errors
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.workers import attempts

_PAUSE = 0.5
"""Seconds between looks at a log that is followed."""


def print_logs(folder: Path, rank: int = 0, attempt: int | None = None, follow: bool = False) -> None:
    """Prints the log of a rank in an attempt (None: the newest), and with `follow` what comes until it ends; of the
    newest also the logs of those that follow it, until the run ends.

    Raises ConfigError, with those there are, for a rank or an attempt without a log.
    """
    run = find_run(folder)
    number = _newest(run) if attempt is None else attempt
    while follow and not run.worker_log_path(number, rank).exists() and driver_lives(run):
        time.sleep(_PAUSE)  # the workers have just been asked for
        number = _newest(run) if attempt is None else attempt
    if not run.worker_log_path(number, rank).exists():
        raise ConfigError(f"there is no log of rank {rank} in attempt {number} of {run.folder}: {_there(run, number)}")
    while _print_log(run, rank, number, follow) and attempt is None:
        number = _newest(run)
        errors.print(f"Attempt {number}:")


def _print_log(run: Run, rank: int, number: int, follow: bool) -> bool:
    """Prints a log, with `follow` until the run ends or a later attempt has one of this rank: then True."""
    with run.worker_log_path(number, rank).open(errors="replace") as file:
        while True:
            living, newest = driver_lives(run), _newest(run)
            shutil.copyfileobj(file, sys.stdout)
            sys.stdout.flush()
            if not follow or not living:
                return False
            if newest > number and run.worker_log_path(newest, rank).exists():
                return True
            time.sleep(_PAUSE)


def _newest(run: Run) -> int:
    return max(attempts(run), default=0)


def _there(run: Run, number: int) -> str:
    ranks = sorted(int(path.stem[4:]) for path in run.worker_log_path(number, 0).parent.glob("rank*.log"))
    if ranks:
        return f"it has ranks {_ranges(ranks)}"
    known = [one for one in attempts(run) if any(run.worker_log_path(one, 0).parent.glob("rank*.log"))]
    return f"there are attempts {_ranges(known)}" if known else "no worker has started yet"


def _ranges(numbers: list[int]) -> str:
    """Numbers for people: 0-7, 9."""
    text = ""
    for number in numbers:
        previous = re.search(r"(\d+)$", text)
        if previous and int(previous[1]) == number - 1:
            text = re.sub(r"(?:-\d+)?$", f"-{number}", text, count=1)
        else:
            text += f"{', ' if text else ''}{number}"
    return text
