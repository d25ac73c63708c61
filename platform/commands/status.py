"""Where a run is, from its folder alone."""

import json
import socket
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.markup import escape
from rich.table import Table

from domainshuttle.platform.checkpoint.backend import STORE_FAULTS
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointStore, UnfinishedCheckpoint
from domainshuttle.platform.console import console
from domainshuttle.platform.run.eta import remaining, span
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.run.ledger import CATEGORIES, AttemptRecord, Ledger
from domainshuttle.platform.run.lock import HOLDER_NAME, PATIENCE_SECONDS
from domainshuttle.platform.run.segments import Segment

_MOST_ATTEMPTS = 20
"""Attempts that are listed: the newest."""
_SPOOL_BYTES = 1 << 16
"""What waits of a run at work when its server answers is less."""
_MOST_CHARS = 100
"""Of how an attempt ended; the ledger has it in full."""


def print_status(folder: Path) -> None:
    """Prints stages, progress, last losses, checkpoints, device-hours by attempt and quarantine of a run."""
    run = find_run(folder)
    state = run.read_progress()
    lives = driver_lives(run)
    try:
        checkpoints = CheckpointStore.of(run.config, run.folder).list()
    except STORE_FAULTS as error:  # the rest is in the run's folder
        checkpoints = []
        console.print(f"The checkpoints' store does not answer: {escape(str(error))}")
    console.print(_stages(run, state, lives, [found for _, found in checkpoints if isinstance(found, Checkpoint)]))
    ledger = Ledger(run.ledger_path)
    _print_progress(run, state, lives, ledger)
    _print_hours(run, ledger, lives)
    for name, found in checkpoints:
        if isinstance(found, UnfinishedCheckpoint):
            console.print(f"Being written, or left by a kill: {name}")
        elif not isinstance(found, Checkpoint):
            console.print(f"Damaged, never chosen: {name}: {escape(str(found))}")
    waiting = sum(Journal(path).unread() for path in run.spool.glob("*.jsonl"))
    if waiting > _SPOOL_BYTES or (waiting and not lives):
        console.print(f"{waiting} bytes of metrics wait for MLflow: domainshuttle flush {run.folder}")
    # attempts and epochs meet the same sample again
    bad = {(line.get("source"), line.get("shard"), line.get("key")) for line in _lines(run.folder / "quarantine")}
    if bad:
        console.print(f"{len(bad)} samples in quarantine: see {run.folder / 'quarantine'}")
    for segment in run.segments():
        if dropped := run.dropped_steps(segment.name):
            where = run.dropped_path(segment.name, 0).parent
            console.print(f"{len(dropped)} steps of {segment.name} were dropped for their loss: see {where}")


def driver_lives(run: Run) -> bool:
    """Whether the driver is at work: its process where it runs on this machine, else its last sign of life."""
    try:
        holder = json.loads((run.folder / HOLDER_NAME).read_text())
        if holder["host"] == socket.gethostname():
            return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1.0
        return time.time() - float(holder["beat"]) < PATIENCE_SECONDS
    except (OSError, ValueError, KeyError, psutil.Error):  # no driver, or one that is just ending
        return False


def _stages(run: Run, state: dict[str, Any], lives: bool, kept: list[Checkpoint]) -> Table:
    table = Table(title=f"Run {run.config.name} ({run.folder})")
    for column in ("stage", "state", "steps", "last losses", "last checkpoint", "size"):
        table.add_column(column)
    for segment in run.segments():
        mine = [checkpoint for checkpoint in kept if checkpoint.state.segment == segment.name]
        last = max(mine, key=lambda checkpoint: (checkpoint.state.line, checkpoint.state.step), default=None)
        here = state if state.get("segment") == segment.name else None
        reached = segment.last_step if segment.finished else here["step"] if here else last.state.step if last else 0
        losses = _losses(here["metrics"] if here else {})
        if segment.finished:
            doing = "finished"
        elif here:
            doing = "probably dead" if here["state"] == "training" and not lives else here["state"]
        else:
            doing = "stopped" if last else "not begun"
        table.add_row(
            segment.name,
            escape(doing),
            f"{reached} of {_end(segment)}",
            losses,
            f"step {last.state.step}" if last else "none",
            f"{last.size / 2**20:.1f} MiB" if last else "",
        )
    return table


def _losses(metrics: dict[str, float]) -> str:
    """The whole loss, and its parts where it has more than one."""
    parts = [f"{name.removeprefix('loss/')} {metrics[name]:.4f}" for name in _LOSSES if name in metrics]
    whole = f"{metrics['loss']:.4f}" if "loss" in metrics else ""
    return f"{whole} ({', '.join(parts)})" if len(parts) > 1 else whole


_LOSSES = ("loss/flow", "loss/cross_pair")


def _end(segment: Segment) -> str:
    """Where a stage ends: at a step, or only when its hours are used."""
    if segment.stage.endless and not segment.finished:
        return f"those in {segment.stage.gpu_hours:g} GPU-hours"
    return str(segment.last_step)


def _print_progress(run: Run, state: dict[str, Any], lives: bool, ledger: Ledger) -> None:
    if not state or run.segment(state["segment"]).finished:
        return
    heard = f"Last heard of {span(max(0.0, time.time() - state['time']))} ago"
    if not lives:
        if state["state"] == "training":
            heard += "; its driver is gone without a word, so it is probably dead"
        console.print(f"{heard}. Next: {run.train_command}")
        return
    left = remaining(run, state, ledger)
    stage = f"about {span(left.stage)} left" if left.stage is not None else "how long it takes is not known yet"
    schedule = ""
    if len(run.segments()) > 1:
        schedule = f"; of the whole schedule {'at least' if left.unknown else 'about'} {span(left.known)}"
        if others := [name for name in left.unknown if name != state["segment"]]:
            schedule += f" (how long {', '.join(others)} will take is not known before the first steps)"
    budget = f". The budget is spent in about {span(left.budget)}" if left.budget is not None else ""
    console.print(f"{heard}. Stage {state['segment']}: {stage}{schedule}{budget}.")


def _print_hours(run: Run, ledger: Ledger, lives: bool) -> None:
    hours = ledger.summary(run.config.budget_gpu_hours)
    attempts = ledger.attempts()
    table = Table(title="Attempts, in seconds of the wall clock")
    for column in ("stage", "steps", "workers", "began", "used", *CATEGORIES):
        table.add_column(column, justify="left" if column in ("stage", "steps", "began") else "right")
    table.add_column("ended", overflow="fold")
    for number, one in enumerate(attempts, 1):
        if one.devices and number > len(attempts) - _MOST_ATTEMPTS:
            table.add_row(*_attempt(one, number == len(attempts) and lives))
    if table.row_count:
        console.print(table)
    if len(attempts) > table.row_count:
        earlier = sum(sum(one.hours.values()) for one in attempts[: len(attempts) - table.row_count])
        console.print(f"Earlier attempts used {earlier:.3f} device-hours.")
    budget = "" if hours.left is None else f", {max(0.0, hours.left):.3f} of the budget's {hours.budget:g} left"
    parts = ", ".join(f"{_PARTS.get(name, name)} {getattr(hours, name):.3f}" for name in CATEGORIES)
    console.print(
        f"Device-hours: used {hours.used:.3f} = {parts}; {hours.attempts} attempts, "
        f"goodput {hours.goodput:.0%}{budget}."
    )


_PARTS = {"waiting": "waiting for data"}


def _attempt(one: AttemptRecord, running: bool) -> Iterable[str]:
    seconds = {name: hours * 3600 / one.devices for name, hours in one.hours.items()}
    began = datetime.fromtimestamp(one.began).strftime("%m-%d %H:%M:%S")
    # an error's text may look like markup: [/path/pair.cc:537]
    reason = one.reason if one.reason is None or len(one.reason) <= _MOST_CHARS else f"{one.reason[:_MOST_CHARS]}..."
    ended = escape(reason) if reason is not None else "running" if running else "no last line"
    numbers = (sum(seconds.values()), *(seconds[name] for name in CATEGORIES))
    return one.segment, f"{one.first}-{one.last}", str(one.devices), began, *(f"{n:.1f}" for n in numbers), ended


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        yield from Journal(path).read()[0]
