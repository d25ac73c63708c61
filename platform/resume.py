"""Where a segment starts: `--resume auto`, a checkpoint's name or path, or `none`."""

from collections.abc import Callable

from domainshuttle.platform.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    UnfinishedCheckpoint,
)
from domainshuttle.platform.lineage import Name, candidates

AUTO, NONE = "auto", "none"


def choose_start(
    store: CheckpointStore,
    segment: str,
    resume: str,
    config_digest: str,
    report: Callable[[str], None] = lambda _: None,
) -> Checkpoint | None:
    """The checkpoint that a segment starts from; None: from its own beginning. Writes nothing.

    `auto` is the newest whole checkpoint of the segment's line (lineage.py). A name in the store, or a path or URI of
    one elsewhere, is that one. `none` is the beginning. After a choice other than `auto` call `begin` once, before
    anything is trained: it makes the choice last, so that restarts, which are always `auto`, keep to it: checkpoints
    of the line that was left are not removed, and never chosen again unless somebody names one.

    Raises CheckpointError when the named one is not whole, is of another segment, or was trained with another
    configuration; and, for `auto`, when there were checkpoints and damage has left none: beginning anew is then for
    people to decide. Raises StorageError when the store does not answer.
    """
    if resume == NONE:
        return None
    if resume == AUTO:
        chosen = store.newest(segment, report)
        if chosen is None:
            _require_never_whole(store, segment)
            return None
    else:
        try:
            chosen = store.read(resume)
        except CheckpointError as error:
            there = ", ".join(sorted(str(name) for name in store.names(segment))) or "none"
            raise CheckpointError(
                f"--resume {resume}: it is not a whole checkpoint: {error}. Of segment {segment} there are: {there}"
            ) from error
        if chosen.state.segment != segment:
            raise CheckpointError(
                f"--resume {resume}: it is a checkpoint of segment {chosen.state.segment}, and the run is at {segment}"
            )
    if chosen.state.config_digest != config_digest:
        raise CheckpointError(
            f"checkpoint {chosen.name} was trained with another configuration (digest {chosen.state.config_digest}, "
            f"here {config_digest}): give this run a name of its own (--set name=...), or begin with --resume none"
        )
    return chosen


def begin(store: CheckpointStore, segment: str, resume: str, chosen: Checkpoint | None) -> None:
    """Makes a choice of `choose_start` last. For one process, before the segment is trained; `auto` changes nothing.

    Where `auto` would start from the same now and later, no further line is begun.
    """
    if resume == AUTO:
        return
    names = store.names(segment)
    if chosen is None:
        if names:
            store.branch(segment, None)
        return
    inside = chosen.root == store.place.root
    origin = chosen.name if inside else chosen.where
    if next(candidates(names, store.lines(segment)), None) != origin:
        store.branch(segment, origin)


def _require_never_whole(store: CheckpointStore, segment: str) -> None:
    for name in candidates(store.names(segment), store.lines(segment)):
        try:
            store.read(name)
        except UnfinishedCheckpoint as error:
            # what was never whole takes nothing with it; a name that a line goes on from was whole once
            if Name.parse(name) not in store.names(segment):
                raise CheckpointError(_nothing_left(segment, name, error)) from error
        except CheckpointError as error:
            raise CheckpointError(_nothing_left(segment, name, error)) from error


def _nothing_left(segment: str, name: str, error: CheckpointError) -> str:
    return (
        f"segment {segment} was trained before, but none of its checkpoints is whole; the newest, {name}: {error}. "
        "Bring one back, or begin the segment anew with --resume none"
    )
