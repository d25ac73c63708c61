"""One function over many pieces of work, as Ray tasks, on the cluster that is connected."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from domainshuttle.pipelines.errors import DataError, StorageError


def each_result(
    function: Callable[..., Any], work: Iterable[tuple[Any, ...]], at_once: int = 256, retries: int = 3
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Calls `function(*piece)` in a task a piece; yields (piece, result) as they finish, at most `at_once` waiting.

    A task whose worker dies is tried again `retries` times; then its result is the error, so that one piece on which a
    decoder crashes does not end the work. An error that the function itself raises is raised here: DataError and
    StorageError as they are, others as Ray's with their traceback.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    remote = ray.remote(max_retries=retries)(function)
    pieces = iter(work)
    waiting = {remote.remote(*piece): piece for piece in islice(pieces, at_once)}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            piece = waiting.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                if isinstance(error.cause, DataError | StorageError):
                    raise error.cause from None
                raise
            except RayError as error:
                result = error
            waiting.update((remote.remote(*following), following) for following in islice(pieces, 1))
            yield piece, result
    finally:
        for left in waiting:
            ray.cancel(left)


Progress = Callable[[int, int], None]
"""Called with the samples done and the samples in all."""
