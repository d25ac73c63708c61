"""The checkpoints of a run, for people: what is there, whether it is whole, why it is kept, and how to use it."""

import re
import shlex
import time
from collections import defaultdict
from pathlib import Path

from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.retention import Retention
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, UnfinishedCheckpoint
from domainshuttle.platform.console import console
from domainshuttle.platform.report.text import Advice, Prose, Records
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.journal import SKIPPED, Journal

_WORDS = {"last": "last", "every": "every {every}th step", "best": "best loss"}


def print_checkpoints(folder: Path, verify: bool = False) -> bool:
    """Prints a table of a run's checkpoints; with `verify`, every byte is compared with the manifests.

    Returns whether none is damaged.
    """
    run = find_run(folder)
    store = CheckpointStore.of(run.config, run.folder)
    found = store.list(checksums=verify)
    if not found:
        every = run.config.checkpoint.every
        console.print(Prose(f"No checkpoint yet in {store.place.redacted()}: one is written every {every} steps."))
        return True
    lines = {name: store.lines(name) for name in {Name.parse(text).segment for text, _ in found}}  # type: ignore[union-attr]
    kept, refused = _reasons(run, found), _passed_over(run, found)
    rows, notes = [], []
    in_line: list[Checkpoint] = []
    for text, entry in found:
        name = Name.parse(text)
        assert name is not None
        left = name.line < len(lines[name.segment]) - 1
        if isinstance(entry, Checkpoint):
            why = "an earlier line" if left else ", ".join(kept.get(text, ["until the next is written"]))
            if any(line.origin == text for line in lines[name.segment]):
                why += "; a later line began here"
            over = text in refused and not verify  # of which only the bytes tell whether it is whole again
            rows.append([text, *_cells(entry), "skipped" if over else "whole" if verify else "whole (sizes)", why])
            if over:
                notes.append(f"{text} was skipped by a restart: {refused[text]}.")
            elif not left:
                in_line.append(entry)
            continue
        unfinished = isinstance(entry, UnfinishedCheckpoint)
        rows.append([text, str(name.step), "", "", "", "", "unfinished" if unfinished else "damaged", ""])
        after = "it is being written, or a later save removes it" if unfinished else "remove it yourself"
        notes.append(f"{text} is not chosen: {entry}; {after}.")
    title = f"Checkpoints of run {run.config.name} in {store.place.redacted()}"
    console.print(Records(_FIELDS, rows, title, _NUMERIC, _STYLES))
    for note in notes:
        console.print(Prose(note))
    if whole := [entry for _, entry in found if isinstance(entry, Checkpoint)]:
        console.print(_how_to_go_on(run, whole, in_line))
    if not verify:
        console.print(Prose("Sizes were compared; --verify compares checksums too."))
    return all(isinstance(entry, Checkpoint | UnfinishedCheckpoint) for _, entry in found)


def _passed_over(run: Run, found: list[tuple[str, Checkpoint | CheckpointError]]) -> dict[str, str]:
    """What restarts said of the whole checkpoints that they did not take, by name; of one that was written again since
    then it means nothing."""
    said = [line for line in Journal(run.notices_path).read()[0] if line.get("kind") == SKIPPED]
    return {
        name: line["text"]
        for line in said
        for name, entry in found
        if isinstance(entry, Checkpoint) and line["time"] > entry.written and re.search(rf"{name}\b", line["text"])
    }


_FIELDS = ("checkpoint", "step", "median loss", "written", "size", "workers", "state", "kept")
_STYLES = {"damaged": "red", "skipped": "red", "unfinished": "yellow"}
_NUMERIC = ("step", "median loss", "size", "workers")


def _how_to_go_on(run: Run, whole: list[Checkpoint], in_line: list[Checkpoint]) -> Advice:
    """What a restart of the run does, and the command to go on from a checkpoint of one's choice."""
    current = next((segment.name for segment in run.segments() if not segment.finished), None)
    mine = [one for one in in_line if one.state.segment == current]
    if not mine:
        newest = max(whole, key=lambda checkpoint: checkpoint.written)
        restart = f"A restart begins stage {current}." if current else "The run is finished."
        return Advice(
            f"{restart} To go on from a checkpoint, in a run of its own:",
            f"domainshuttle train CONFIG --set name={run.next_name()} --resume {shlex.quote(newest.where)}",
        )
    newest = max(mine, key=lambda checkpoint: checkpoint.state.step)
    others = [one for one in whole if one.state.segment == current and one != newest] or [newest]
    return Advice(
        f"A restart goes on from the newest whole one of its segment, here {newest.name}. To go on from another:",
        f"domainshuttle train CONFIG --resume {others[-1].name}",
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
