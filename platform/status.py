"""Where a run is, from its folder alone."""

import json
import time
from pathlib import Path

from rich.table import Table

from domainshuttle.platform.checkpoint import Checkpoint, CheckpointStore, UnfinishedCheckpoint
from domainshuttle.platform.console import console
from domainshuttle.platform.ledger import Ledger
from domainshuttle.platform.schedule import find_run


def print_status(folder: Path) -> None:
    """Prints stages, progress, last losses, checkpoints, device-hours and quarantine of a run."""
    run = find_run(folder)
    state = json.loads(run.progress_path.read_text()) if run.progress_path.exists() else None
    table = Table(title=f"Run {run.config.name} ({run.folder})")
    for column in ("stage", "state", "steps", "loss", "last checkpoint", "size"):
        table.add_column(column)
    checkpoints = CheckpointStore.of(run.config).list()
    kept = [found for _, found in checkpoints if isinstance(found, Checkpoint)]
    for segment in run.segments():
        mine = [checkpoint for checkpoint in kept if checkpoint.state.segment == segment.name]
        last = max(mine, key=lambda checkpoint: (checkpoint.state.line, checkpoint.state.step), default=None)
        here = state if state and state["segment"] == segment.name else None
        reached = segment.last_step if segment.finished else here["step"] if here else last.state.step if last else 0
        loss = here["metrics"].get("loss") if here else None
        table.add_row(
            segment.name,
            "finished" if segment.finished else here["state"] if here else "stopped" if last else "not begun",
            f"{reached} of {segment.last_step}",
            f"{loss:.4f}" if loss is not None else "",
            f"step {last.state.step}" if last else "none",
            f"{last.size / 2**20:.1f} MiB" if last else "",
        )
    console.print(table)
    if state and not run.segment(state["segment"]).finished:
        age = time.time() - state["time"]
        rate = state["metrics"].get("step_seconds")
        left = (state["steps"] - state["step"]) * rate if rate else None
        eta = f", about {left / 60:.0f} min of this stage left" if left else ""
        console.print(f"Last heard of {age:.0f} s ago{eta}.")
    hours = Ledger(run.ledger_path).summary(run.config.budget_gpu_hours)
    budget = "" if hours.left is None else f", {max(0.0, hours.left):.3f} of the budget's {hours.budget:g} left"
    console.print(
        f"Device-hours: used {hours.used:.3f}, productive {hours.productive:.3f}, lost {hours.lost:.3f}, starting "
        f"{hours.starting:.3f}, waiting for data {hours.waiting:.3f}, checkpointing {hours.checkpointing:.3f}; "
        f"{hours.attempts} attempts, goodput {hours.goodput:.0%}{budget}."
    )
    for name, found in checkpoints:
        if isinstance(found, UnfinishedCheckpoint):
            console.print(f"Being written, or left by a kill: {name}")
        elif not isinstance(found, Checkpoint):
            console.print(f"Damaged, never chosen: {name}: {found}")
    bad = sum(path.read_text().count("\n") for path in (run.folder / "quarantine").glob("*.jsonl"))
    if bad:
        console.print(f"{bad} samples in quarantine: see {run.folder / 'quarantine'}")
    if dropped := [path for path in (run.folder / "dropped").glob("*.rank00000.jsonl") if path.stat().st_size]:
        steps = sum(path.read_text().count("\n") for path in dropped)
        console.print(f"{steps} steps were dropped for their loss: see {run.folder / 'dropped'}")
