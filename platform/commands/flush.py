"""Delivery by hand: what a run's spool still holds for a tracking server that was away."""

import shlex
from pathlib import Path

from domainshuttle.pipelines.errors import counted, mask_secrets
from domainshuttle.platform.config.schema import absolute_uri
from domainshuttle.platform.console import console
from domainshuttle.platform.report.text import Prose
from domainshuttle.platform.run.folder import find_run
from domainshuttle.platform.tracking.mlflow import RunIds, flush_spool, page_of
from domainshuttle.platform.tracking.outbox import failed_uploads, reachable


def flush_run(folder: Path, uri: str | None = None, timeout: float = 600.0) -> bool:
    """Sends what is left in a run's spool, to its own server or to the one at `uri`; returns whether all was sent.

    Artifacts that their store does not take are named, and do not count. Raises ConfigError where there is no run.
    """
    run = find_run(folder)
    ids = run.read_ids()
    if ids is None:
        console.print(Prose(f"Run {run.config.name} was never started: there is nothing to send."))
        return True
    address = absolute_uri(uri or run.config.tracking_uri)
    redacted = mask_secrets(address)
    known = RunIds.from_dict(ids, address)
    if not reachable(address) or flush_spool(known, run.spool, timeout):
        console.print(
            Prose(
                f"Not all of {run.spool} could be sent: {redacted} did not take it within {timeout:g} s. Start the "
                "server, or name another with --uri, and run this again"
            )
        )
        return False
    if uri is None:
        run.write_ids(known.to_dict())
    failed = failed_uploads(run.spool)
    for path, error in failed.items():
        console.print(f"The artifact {run.folder / path} could not be written: {error}", markup=False)
    if failed:
        console.print(
            f"{redacted} has all but {counted(len(failed), 'artifact')}, whose store did not take them: they stay "
            "where they are, and this command tries them again",
            markup=False,
        )
    else:
        console.print(
            f"Nothing is left in {run.spool}: {redacted} has it all. Next: domainshuttle compare "
            f"{shlex.quote(known.experiment)} --uri {shlex.quote(redacted)}",
            markup=False,
        )
    if page := page_of(known):
        console.print(f"MLflow's page of the run: {page}", markup=False)
    return True
