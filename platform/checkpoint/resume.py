"""Where a segment starts: `--resume auto`, a checkpoint's name or path, or `none`."""

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.platform.checkpoint.names import Name, candidates
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, UnfinishedCheckpoint
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import DIGEST_NAME, verified_digest, weights_files
from domainshuttle.platform.run.weights_origin import WeightsOrigin

AUTO, NONE = "auto", "none"


class IncompatibleError(CheckpointError):
    """A whole checkpoint that does not fit what is about to be trained on it: trying again changes nothing."""


def choose_start(
    store: CheckpointStore,
    segment: str,
    resume: str,
    config_digest: str,
    report: Callable[[str], None] = lambda _: None,
    verified: Checkpoint | None = None,
) -> Checkpoint | None:
    """The checkpoint that a segment starts from; None: from its own beginning. Writes nothing.

    `auto` is the newest whole checkpoint of the segment's line (names.py). A name in the store, or a path or URI of
    one elsewhere, is that one, also where it was trained with another configuration: ask `require_fit`. `none` is the
    beginning. After a choice other than `auto` call `begin` once, before anything is trained: it makes the choice last,
    so that restarts, which are always `auto`, keep to it: checkpoints of the line that was left are not removed, and
    never chosen again unless somebody names one. `verified` is a checkpoint whose bytes were compared already.

    Raises CheckpointError when the named one is not whole or of another segment; and, for `auto`, when there were
    checkpoints and damage has left none: beginning anew is then for people to decide. Raises IncompatibleError for
    `auto` when the newest was trained with another configuration and nobody has named it. Raises StorageError when the
    store does not answer.
    """
    if resume == NONE:
        return None
    if resume == AUTO:
        chosen = store.newest(segment, report, verified)
        if chosen is None:
            _require_never_whole(store, segment)
            return None
        named = {line.origin for line in store.lines(segment)}
        if chosen.state.config_digest != config_digest and not named & {chosen.name, chosen.where}:
            raise IncompatibleError(
                f"checkpoint {chosen.name} was trained with another configuration (digest "
                f"{chosen.state.config_digest}, here {config_digest}): give this run a name of its own (--set "
                f"name=NAME), go on from it all the same with --resume {chosen.name}, or begin with --resume none"
            )
        return chosen
    chosen = read_named(store, resume, "--resume", segment)
    if chosen.state.segment != segment:
        raise CheckpointError(
            f"--resume {resume}: it is a checkpoint of segment {chosen.state.segment}, and the run is at {segment}"
        )
    return chosen


def require_resumable(run: Run, store: CheckpointStore, resume: str, chosen: Sequence[Segment]) -> None:
    """Refuses a `--resume` of which nothing would come in the `chosen` segments, before a cluster is asked for.

    Raises CheckpointError, with what to do instead, for a checkpoint that is not there or not whole, and where what it
    is to begin is finished. Raises StorageError when the store does not answer.
    """
    if resume == AUTO:
        return
    finished = [segment.name for segment in chosen if segment.finished]
    of_run = f"of run {run.config.name} in {run.folder}"
    if resume == NONE:
        if len(finished) == len(chosen):
            raise CheckpointError(
                f"--resume none: {_stages(finished)} {of_run} finished, so nothing is left to begin anew: give the run "
                f"a name of its own (--set name={run.next_name()}), or remove all that it has made with --fresh"
            )
        return
    checkpoint = read_named(store, resume, "--resume", checksums=False)
    if checkpoint.state.segment in finished or len(finished) == len(chosen):
        raise CheckpointError(
            f"--resume {resume}: {_stages([n for n in finished if n == checkpoint.state.segment] or finished)} "
            f"{of_run} finished, so there is nothing to go on with: to train on from this checkpoint, give the run "
            f"that does a name of its own: --set name={run.next_name()} --resume {checkpoint.where}"
        )
    names = [segment.name for segment in chosen]
    if checkpoint.state.segment not in names:
        raise CheckpointError(
            f"--resume {resume}: it is a checkpoint of stage {checkpoint.state.segment}, and to be trained is "
            f"{', '.join(names)}: name a checkpoint of that, or leave out --stage"
        )


def _stages(names: Sequence[str]) -> str:
    return f"stage {names[0]} is" if len(names) == 1 else f"stages {', '.join(names)} are"


def read_named(
    store: CheckpointStore, name: str, option: str, segment: str | None = None, checksums: bool | None = None
) -> Checkpoint:
    """The whole checkpoint of a name, path or URI, that was given for an `option`; `checksums` as in `read`.

    Raises CheckpointError that lists those there are, of a segment or of all.
    """
    try:
        if not name.strip("/"):
            raise CheckpointError("it names nothing")
        return store.read(name, checksums)
    except CheckpointError as error:
        there = ", ".join(sorted(str(name) for name in store.names(segment))) or "none"
        of = f"Of segment {segment} there" if segment else "There"
        raise CheckpointError(f"{option} {name}: it is not a whole checkpoint: {error}. {of} are: {there}") from error


def begin(
    store: CheckpointStore, segment: str, resume: str, chosen: Checkpoint | None, config_digest: str | None = None
) -> None:
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
    foreign = config_digest not in (None, chosen.state.config_digest) and store.lines(segment)[-1].origin != origin
    if foreign or next(candidates(names, store.lines(segment)), None) != origin:
        store.branch(segment, origin)


def require_fit(
    checkpoint: Checkpoint, segment: Segment, origin: WeightsOrigin, trained: str | None, feed: Feed
) -> None:
    """Raises IncompatibleError that says why a checkpoint can't be gone on from; its configuration may be another.

    `origin` are the weights that the segment begins with, identified; `trained` is the digest of the parameters that it
    trains, None where it is not known yet.
    """
    state, name = checkpoint.state, checkpoint.name
    if state.base != origin.identity:
        raise IncompatibleError(
            f"checkpoint {name} was trained on the weights {state.base}"
            + (f" (of {state.origin})" if state.origin else "")
            + f", but segment {segment.name} now begins with {origin.identity}: restore model.base, or start anew "
            "with --fresh"
        )
    if trained and state.trained and state.trained != trained:
        stage = segment.stage
        wanted = f"which trains {stage.described_trained}" if stage.lora else f"whose patterns are {stage.trained}"
        raise IncompatibleError(
            f"checkpoint {name} has other trained parameters than segment {segment.name}, {wanted}: restore `trained` "
            "and the model of the run that wrote it"
        )
    if state.step > segment.stage.duration.planned_steps:
        raise IncompatibleError(
            f"checkpoint {name} has done {state.step} steps, and segment {segment.name} has only "
            f"{segment.stage.duration.planned_steps}: raise its `steps`, or name an earlier checkpoint"
        )
    try:
        feed.plan().check(state.plan)
    except DataError as error:
        raise IncompatibleError(
            f"checkpoint {name}: {error}, or begin a new run with its weights: {_export_command(checkpoint)}, and "
            f"instead of --resume {_base_override(segment)} and a name of its own (--set name=NAME)"
        ) from error


def _export_command(checkpoint: Checkpoint) -> str:
    """The command that makes a whole model of a checkpoint, which `model.base` can take."""
    run = checkpoint.folder.parents[1]
    known = (run / "config.yaml").is_file()  # in a store of their own, checkpoints do not lie in their run's folder
    which = checkpoint.name if known else shlex.quote(checkpoint.where)
    return f"domainshuttle export {shlex.quote(str(run)) if known else 'RUN'} FOLDER --checkpoint {which}"


def _base_override(segment: Segment) -> str:
    """The overrides by which a run begins with an exported model."""
    if segment.expert is None:
        return "--set model.base=FOLDER --set 'model.size={}'"
    network = "transformer" if segment.expert.low else "transformer_2"  # the one for high noise comes first
    return f"--set experts.{segment.expert.name}.base=FOLDER/{network}"


def adopt_stages(run: Run, store: CheckpointStore, resume: str, say: Callable[[str], None]) -> dict[str, Path]:
    """Gives a run of a new name the finished stages before a checkpoint of another run that it goes on from; returns
    which these were, and where their weights were taken from.

    They are found beside the weights that the checkpoint's segment began with, and need no space on the same disk.
    Nothing happens where the checkpoint is not whole, is of the run's first segment, or the weights are gone. Raises
    ChangedError for weights that were changed since they were exported.
    """
    try:
        checkpoint = store.read(resume, checksums=False)
    except CheckpointError:
        return {}  # `choose_start` says so
    state = checkpoint.state
    names = [segment.name for segment in run.segments()]
    if state.segment not in names or state.origin is None:
        return {}
    adopted: dict[str, Path] = {}
    beside = _weights_beside(checkpoint, Path(state.origin))
    for segment in run.segments()[: names.index(state.segment)]:
        found = beside / segment.name
        if segment.finished or not (found / DIGEST_NAME).exists():
            continue
        for source, target in ((found, segment.weights), (_averaged(found), segment.averaged_weights)):
            if source.is_dir():
                digest = verified_digest(source, run.fingerprints)
                with atomic_folder(target) as aside:
                    shutil.copytree(source, aside, copy_function=_link, dirs_exist_ok=True)
                if all(one.samefile(target / one.relative_to(source)) for one in weights_files(source)):
                    run.fingerprints.remember(target, digest)
        say(f"Stage {segment.name} is taken over, finished, from {found}")
        adopted[segment.name] = found
    return adopted


def _weights_beside(checkpoint: Checkpoint, origin: Path) -> Path:
    """The folder of weights that `origin` is in: that of the checkpoint's own run, wherever it was moved to."""
    own = checkpoint.folder.parent.parent / origin.parent.name
    return own if (own / origin.name).is_dir() else origin.parent


def _averaged(weights: Path) -> Path:
    return weights.with_name(f"{weights.name}-ema")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copyfile(source, target)


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
