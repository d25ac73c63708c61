"""The quarantine: samples that were left out and why, and whose fault an exception is.

A fault of a sample puts it into quarantine; a fault of the machine ends the work.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from domainshuttle.pipelines.errors import DataError, StorageError

QUARANTINE_NAME = "quarantine.jsonl"


MOST_BAD_RAW = 0.05
"""Share of samples that can't be decoded or fitted above which a corpus gets no index, unless a command says more."""


@dataclass(frozen=True)
class BadSample:
    """A row of the quarantine table: a sample that was left out, and why."""

    source: str
    shard: str
    key: str
    reason: str


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
