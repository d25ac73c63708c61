"""Why workers failed and were started again, told to the tracking by whichever process sees it.

It is written to the segment's spool, from which rank 0, the next attempt or the driver sends it. Ray loads this module
into its controller, so nothing here imports torch.
"""

import logging
import re
from collections.abc import Mapping

from ray.exceptions import RayActorError, RayTaskError

from domainshuttle.platform.ledger import Ledger
from domainshuttle.platform.schedule import Run
from domainshuttle.platform.spool import TAG_CHARS, segment_journal, texts_event

logger = logging.getLogger(__name__)


def tell_error(run: Run, segment: str, rank: int, error: str) -> None:
    """The tag `error.rank<n>` of the segment: what a rank failed of, on the disk when this returns."""
    _tag(run, segment, f"error.rank{rank}", error)


def tell_restart(run: Run, segment: str, reason: str) -> None:
    """The tag `restart.<n>` of the segment, after its nth attempt, which ends here in the ledger if it has not yet."""
    try:
        ledger = Ledger(run.ledger_path)
        ledger.end_open(reason)
        attempts = [one for one in ledger.attempts() if one.segment == segment and one.devices]
    except OSError as error:
        logger.warning("the ledger can not be written: %s", error)
        return
    if attempts:  # none where the workers never came to their first line
        _tag(run, segment, f"restart.{len(attempts)}", f"{reason} (step {attempts[-1].last} was reached)")


def cause(failures: Mapping[int, BaseException]) -> str:
    """Rank and error that most likely came first: a death before an error, both before connections that were lost."""
    if not failures:
        return "no worker said why"
    rank, failure = min(failures.items(), key=lambda item: (_follows(item[1]), item[0]))
    return f"rank {rank}: {_describe(failure)}"


def _follows(failure: BaseException) -> int:
    """0: a process died; 1: an error of its own; 2: what the others see of either."""
    inner = getattr(failure, "health_check_failure", failure)
    if isinstance(inner, RayActorError) and not isinstance(inner, RayTaskError):
        return 0
    return 2 if _CONSEQUENCE.search(str(failure)) else 1


_CONSEQUENCE = re.compile(r"(?i)connection (closed|reset|refused)|closed by peer|gloo|NCCL|ProcessGroup|Broken pipe")


def _describe(failure: BaseException) -> str:
    inner = getattr(failure, "health_check_failure", failure)
    found = inner.cause if isinstance(inner, RayTaskError) else inner
    lines = [line.strip() for line in str(found).strip().splitlines() if line.strip()]
    kind = type(found).__name__
    # of an actor's death the first line says it; of an error with its traceback the last one
    line = (lines[0] if isinstance(inner, RayActorError) else lines[-1]) if lines else ""
    return f"{kind}: {line[:200]}"


def _tag(run: Run, segment: str, name: str, text: str) -> None:
    try:
        segment_journal(run.spool, segment).append([texts_event("tags", {name: text}, TAG_CHARS)], sync=True)
    except OSError as error:
        logger.warning("tracking: %s %s can not be written: %s", name, text, error)
