"""The runs of a folder side by side, and a stop that is asked for through a run's folder."""

import shlex
import time
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.errors import UserFacingError
from domainshuttle.platform.commands.status import driver_lives, status_record
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import console, progress
from domainshuttle.platform.report.text import Advice, Prose, Records
from domainshuttle.platform.run.eta import span
from domainshuttle.platform.run.folder import Run, find_run

_FIELDS = ("run", "state", "stage", "steps", "loss", "device-hours", "goodput", "last update")
_STYLES = {"finished": "green", "training": "cyan", "failed": "red", "diverged": "red", "probably dead": "red"}
_PAUSE = 0.5


def print_runs(folder: Path) -> None:
    """Prints a line a run of a folder, the last updated first. Raises ConfigError where there is no run in it."""
    places = [path.parent for path in folder.glob("*/config.yaml") if not path.parent.name.startswith(".")]
    records, odd = [], []
    for place in places:
        try:
            records.append(status_record(place))
        except (UserFacingError, OSError) as error:
            odd.append(f"{place}: {error}")
    if not records and not odd:
        raise ConfigError(f"no run in {folder}: give the folder that is `output` in the runs' configurations")
    records.sort(key=lambda record: -(record["heard"] or 0.0))
    rows = [_row(record) for record in records]
    console.print(Records(_FIELDS, rows, f"Runs in {folder}", ["loss", "device-hours", "goodput"], _STYLES))
    for text in odd:
        console.print(Prose(f"Left out: {text}"))
    if records:
        console.print(Advice("More of one:", f"domainshuttle status {shlex.quote(records[0]['folder'])}"))


def _row(record: dict[str, Any]) -> list[str]:
    stage = next((one for one in record["stages"] if not one["finished"]), record["stages"][-1])
    loss, heard = record["metrics"].get("loss"), record["heard"]
    folder = Path(record["folder"]).name
    return [
        folder if folder == record["run"] else f"{folder} (run {record['run']})",  # one that was copied or renamed
        record["state"],
        stage["stage"],
        f"{stage['step']} of {stage['steps']}" if stage["steps"] else str(stage["step"]),
        "" if loss is None else f"{loss:.4f}",
        f"{record['device_hours']['used']:.3f}",
        f"{record['goodput']:.0%}",
        "" if heard is None else f"{span(max(0.0, time.time() - heard))} ago",
    ]


def stop_run(folder: Path, wait: bool = True) -> bool:
    """Asks a run's workers for a checkpoint and its driver to end, as Ctrl-C there would; waits for that.

    Returns whether it was asked, or has stopped; False where it ended in another way meanwhile. Raises ConfigError
    where no driver is at work.
    """
    run = find_run(folder)
    if not driver_lives(run):
        raise ConfigError(
            f"run {run.config.name} is not at work: domainshuttle status {shlex.quote(str(run.folder))} says what it "
            "did last"
        )
    run.stop_path.touch()
    if not wait:
        console.print(Prose(f"Asked {run.config.name} to stop after this step, with a checkpoint."))
        return True
    began = time.monotonic()
    with progress(f"Stopping {run.config.name}", "s") as show:
        while driver_lives(run):
            run.stop_path.touch()  # again: a driver that is only starting takes earlier wishes away
            show(int(time.monotonic() - began), None, _step(run))
            time.sleep(_PAUSE)
    record = status_record(folder)
    if record["state"] in ("stopped", "not begun"):
        console.print(Prose(f"Stopped {run.config.name} after {_step(run) or 'no step'}."))
        console.print(Advice("To go on:", run.train_command))
        return True
    why = f", because: {record['why']}" if record["why"] else ""
    console.print(Prose(f"{run.config.name} ended meanwhile: {record['state']}{why}"))
    return record["state"] in ("finished", "budget spent")


def _step(run: Run) -> str:
    state = run.read_progress()
    return f"step {state['step']} of {state['segment']}" if state else ""
