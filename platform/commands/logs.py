"""What the workers of a run printed, from its folder."""

import re
import shutil
import sys
import time
from pathlib import Path

from domainshuttle.platform.commands.status import driver_lives
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.workers import attempts

_PAUSE = 0.5
"""Seconds between looks at a log that is followed."""


def print_logs(folder: Path, rank: int = 0, attempt: int | None = None, follow: bool = False) -> None:
    """Prints the log of a rank in an attempt (None: the newest), and with `follow` what comes until the run ends.

    Raises ConfigError, with those there are, for a rank or an attempt without a log.
    """
    run = find_run(folder)
    number = max(attempts(run), default=0) if attempt is None else attempt
    path = run.worker_log_path(number, rank)
    while follow and not path.exists() and driver_lives(run):
        time.sleep(_PAUSE)  # the workers have just been asked for
    if not path.exists():
        raise ConfigError(f"there is no log of rank {rank} in attempt {number} of {run.folder}: {_there(run, number)}")
    with path.open(errors="replace") as file:
        while True:
            living = driver_lives(run)
            shutil.copyfileobj(file, sys.stdout)
            sys.stdout.flush()
            if not follow or not living or (attempt is None and max(attempts(run)) != number):
                return
            time.sleep(_PAUSE)


def _there(run: Run, number: int) -> str:
    ranks = sorted(int(path.stem[4:]) for path in run.worker_log_path(number, 0).parent.glob("rank*.log"))
    if ranks:
        return f"it has ranks {_ranges(ranks)}"
    known = attempts(run)
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
