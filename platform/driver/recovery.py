"""What a run's folder knew, from its newest checkpoint, when the folder was lost and the store was not."""

import contextlib
from collections.abc import Callable

from domainshuttle.platform.checkpoint.names import candidates
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger


def recover_run(run: Run, say: Callable[[str], None]) -> None:
    """Gives a run that has no books of its own, or emptied ones, those of its newest whole checkpoint.

    These are the ledger with the hours used, the ids of the MLflow runs, the steps that are skipped, and after how
    many steps the finished stages ended: their weights, which were in the folder, are then exported from their last
    checkpoints. The ledger comes last: where this was killed before, it is done again, and what was written stays as it
    is. Raises StorageError when the store does not answer.
    """
    if Ledger(run.ledger_path).attempts():
        return
    newest = _newest(run)
    if newest is None or newest.state.config_digest != run.config.digest():
        return
    state = newest.state
    segments = {segment.name: segment for segment in run.segments()}
    for name, rollbacks in state.passed_over.items():
        if rollbacks and name in segments and not run.skipped(name):
            run.skip(name, *rollbacks)
    for name, steps in state.finished.items():
        if name in segments and not segments[name].finished:
            segments[name].end_at(steps)
    if state.mlflow and run.read_ids() is None:
        run.write_ids(state.mlflow)
    if state.ledger:
        Ledger(run.ledger_path).restore(state.ledger)
    hours = Ledger(run.ledger_path).summary().used
    say(
        f"{run.folder} had no ledger that can be read: what checkpoint {newest.name} knows of the run is taken, with "
        f"{hours:.3f} device-hours used. Finished stages without weights are exported again from their last checkpoints"
    )


def _newest(run: Run) -> Checkpoint | None:
    """The checkpoint of any segment that became whole last, of those that may be gone on from."""
    store = CheckpointStore.of(run.config)
    found: list[Checkpoint] = []
    for segment in run.segments():
        for name in candidates(store.names(segment.name), store.lines(segment.name)):
            with contextlib.suppress(CheckpointError):
                found.append(store.read(name, checksums=False))
                break
    return max(found, key=lambda checkpoint: checkpoint.written, default=None)
