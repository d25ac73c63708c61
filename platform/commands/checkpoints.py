"""The checkpoints of a run, for people: what is there, whether it is whole, why it is kept, and how to use it."""

import time
from collections import defaultdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.retention import Retention
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, UnfinishedCheckpoint
from domainshuttle.platform.console import console
from domainshuttle.platform.run.folder import Run, find_run

_WORDS = {"last": "last", "every": "every {every}th step", "best": "best loss"}


def print_checkpoints(folder: Path, verify: bool = False) -> None:
    """Prints a table of a run's checkpoints; with `verify`, every byte is compared with the manifests."""
    run = find_run(folder)
    store = CheckpointStore.of(run.config, run.folder)
    found = store.list(checksums=verify)
    if not found:
        every = run.config.checkpoint.every
        console.print(f"No checkpoint yet in {escape(store.place.redacted())}: one is written every {every} steps.")
        return
    lines = {name: store.lines(name) for name in {Name.parse(text).segment for text, _ in found}}  # type: ignore[union-attr]
    kept = _reasons(run, found)
    table = Table(title=f"Checkpoints of run {run.config.name} in {escape(store.place.redacted())}")
    for column in ("checkpoint", "step", "loss", "written", "size", "workers", "state", "kept"):
        table.add_column(column, justify="right" if column in ("step", "loss", "size", "workers") else "left")
    notes = []
    in_line: list[Checkpoint] = []
    for text, entry in found:
        name = Name.parse(text)
        assert name is not None
        left = name.line < len(lines[name.segment]) - 1
        if isinstance(entry, Checkpoint):
            why = "an earlier line" if left else ", ".join(kept.get(text, ["until the next is written"]))
            if any(line.origin == text for line in lines[name.segment]):
                why += "; a later line began here"
            table.add_row(text, *_cells(entry), "whole" if verify else "whole (sizes)", why)
            if not left:
                in_line.append(entry)
            continue
        unfinished = isinstance(entry, UnfinishedCheckpoint)
        state = "unfinished" if unfinished else "[red]damaged[/]"
        table.add_row(text, str(name.step), "", "", "", "", state, "")
        after = "it is being written, or a later save removes it" if unfinished else "remove it yourself"
        notes.append(f"{text} is not chosen: {escape(str(entry))}; {after}.")
    console.print(table)
    for note in notes:
        console.print(note)
    whole = [entry for _, entry in found if isinstance(entry, Checkpoint)]
    if whole:
        console.print(_how_to_go_on(run, whole, in_line), markup=False)
    if not verify:
        console.print("Sizes were compared; checksums too with --verify.")


def _how_to_go_on(run: Run, whole: list[Checkpoint], in_line: list[Checkpoint]) -> str:
    """What a restart of the run does, and the command to go on from a checkpoint of one's choice."""
    current = next((segment.name for segment in run.segments() if not segment.finished), None)
    mine = [one for one in in_line if one.state.segment == current]
    if not mine:
        newest = max(whole, key=lambda checkpoint: checkpoint.written)
        restart = f"A restart begins stage {current}. " if current else "The run is finished. "
        return (
            f"{restart}To go on from a checkpoint, in a run of its own: domainshuttle train CONFIG --set "
            f"name={run.next_name()} --resume {newest.where}"
        )
    newest = max(mine, key=lambda checkpoint: checkpoint.state.step)
    others = [one for one in whole if one.state.segment == current and one != newest] or [newest]
    return (
        f"A restart goes on from the newest whole one of its segment, here {newest.name}. To go on from another: "
        f"domainshuttle train CONFIG --resume {others[-1].name}"
    )


def _cells(checkpoint: Checkpoint) -> tuple[str, ...]:
    state = checkpoint.state
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.written)) if checkpoint.written else ""
    loss = "" if state.loss is None else f"{state.loss:.4f}"
    return str(state.step), loss, written, f"{checkpoint.size / 2**20:.1f} MiB", str(state.world_size)


def _reasons(run: Run, found: list[tuple[str, Checkpoint | CheckpointError]]) -> dict[str, list[str]]:
    """Why each whole checkpoint stays, by its name."""
    section = run.config.checkpoint
    rule = Retention(section.keep, section.keep_every, section.keep_best)
    losses: defaultdict[tuple[str, int], dict[int, float | None]] = defaultdict(dict)
    for _, entry in found:
        if isinstance(entry, Checkpoint):
            losses[entry.state.segment, entry.state.line][entry.state.step] = entry.state.loss
    reasons = {}
    for (segment, line), steps in losses.items():
        for step, why in rule.kept(steps).items():
            words = [_WORDS[reason].format(every=section.keep_every) for reason in why]
            reasons[str(Name(segment, step, line))] = words
    return reasons
