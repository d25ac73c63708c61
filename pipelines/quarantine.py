"""The quarantine: what is left out and why, how much of it is accepted, and to what an error is attributed.

An error of a sample puts the sample into quarantine; an error of the machine ends the work.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from domainshuttle.pipelines.errors import DataError, StorageError, counted

QUARANTINE_NAME = "quarantine.jsonl"

MOST_BAD_IN_CORPUS = 0.05
"""Share of bad samples, or of bad shards, above which a corpus gets no index, unless a command says more."""
MOST_BAD_IN_RUN = 0.01
"""Share of unreadable samples above which a training run ends, unless its configuration says more."""


@dataclass(frozen=True)
class BadSample:
    """A row of the quarantine table: a sample that is left out (with an empty `key` a whole shard), and why, as 'kind:
    detail'."""

    source: str
    shard: str
    key: str
    reason: str


class SampleFault(DataError):
    """What is wrong with a sample or a shard: a kind, by which faults are counted, and the details."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple[type["SampleFault"], tuple[str, str]]:
        return type(self), (self.kind, self.detail)


def fault_kind(reason: str) -> str:
    """The kind of a reason, by which faults are counted: what stands before its colon."""
    return reason.partition(":")[0]


def fault_reason(error: DataError) -> str:
    """The reason of an error for the quarantine table, with a kind."""
    return str(error) if isinstance(error, SampleFault) else f"unreadable sample: {error}"


def bad_share(bad: int, good: int) -> float:
    """The share of bad ones, 0 where there are none at all."""
    return bad / max(bad + good, 1)


def accepted_share(share: float) -> str:
    """The least share of two decimals, as one types it, that accepts `share`."""
    return f"{min(math.ceil(share * 100) / 100, 1):g}"


def percent(share: float) -> str:
    """A share as people set it: 5% or 0.1%."""
    return f"{100 * share:.4g}%"


def kinds_of(reasons: Iterable[str]) -> str:
    """How many reasons there are of each kind, the most frequent first."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(map(fault_kind, reasons)).most_common())


def require_good(where: str, reasons: Sequence[str], good: int, most_bad: float, table: str, repair: str) -> None:
    """Raises DataError for a corpus `where` without `good` samples, or of which more than `most_bad` are bad, for these
    reasons, which are in `table`; they are repaired as `repair` says."""
    bad = len(reasons)
    share = bad_share(bad, good)
    if share <= most_bad and good:
        return
    accept = f", or accept them: --most-bad {accepted_share(share)} (nothing is made again)" if good else ""
    raise DataError(
        f"{where}: {bad} of {counted(bad + good, 'sample')} {'is' if bad == 1 else 'are'} bad, at most "
        f"{percent(most_bad)} may be: {kinds_of(reasons)}. Shards, keys and reasons are in {table}. {repair}{accept}"
    )


# of a GPU or of memory, by name, as torch is not imported here and its types differ by version
_MACHINE_TYPES = ("OutOfMemoryError", "AcceleratorError")


_MACHINE_TEXTS = ("CUDA", "cuDNN", "CUBLAS", "NCCL", "can't allocate memory")


def of_machine(error: BaseException) -> bool:
    """Whether an exception says nothing of the data: a store, the memory or a GPU failed."""
    if not isinstance(error, Exception) or isinstance(error, StorageError | MemoryError):
        return True
    if any(kind.__name__ in _MACHINE_TYPES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MACHINE_TEXTS)


@contextlib.contextmanager
def of_sample(name: str) -> Iterator[None]:
    """Within it a sample is decoded or encoded: whatever its bytes make decoders raise is a DataError that names it.

    Decoders' errors are as many as the corners of their formats, and one sample must not end a run. Errors of the
    machine stay what they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DataError) or of_machine(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: decoder error: {type(error).__name__}: {text}") from error
