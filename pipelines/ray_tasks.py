"""One function over many pieces of work, as Ray tasks, on the cluster that is connected."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from domainshuttle.pipelines.errors import DataError, StorageError, UserFacingError
from domainshuttle.pipelines.values import ActorPool


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


def each_by_actors(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    work: Iterable[Any],
    pool: ActorPool | None,
    tries: int = 3,
) -> Iterator[tuple[Any, Any]]:
    """Calls `make(*arguments)(piece)` of each piece; yields (piece, result) as they finish.

    `make(*arguments)` is made once in each actor of the pool, on the cluster that is connected, or with `pool` None
    once in this process. A piece whose actor dies is tried again by a new one; when that has happened `tries` times its
    result is the error. What is raised otherwise is raised here: a UserFacingError as it is, others as Ray's.
    """
    if pool is None:
        worker = make(*arguments)
        yield from ((piece, worker(piece)) for piece in work)
        return
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    kind = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(_Holder)
    numbered, tried = iter(enumerate(work)), Counter[int]()
    again: list[tuple[int, Any]] = []
    busy: dict[Any, tuple[Any, int, Any]] = {}

    def give(actor: Any = None) -> None:
        """The next piece to the actor, or to a new one in the place of one that died: made only where there is work."""
        following = again.pop() if again else next(numbered, None)
        if following is not None:
            holder: Any = actor or kind.remote(make, arguments)
            number, piece = following
            busy[holder.call.remote(piece)] = holder, number, piece
        elif actor is not None:
            ray.kill(actor)

    try:
        for first in islice(numbered, pool.actors):
            again.append(first)
            give()
        while busy:
            (done,), _ = ray.wait(list(busy))
            actor, number, piece = busy.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                if isinstance(error.cause, UserFacingError):
                    raise error.cause from None
                raise
            except RayActorError as error:
                tried[number] += 1
                actor = None
                if tried[number] < tries:
                    again.append((number, piece))
                    give(actor)
                    continue
                result = error
            give(actor)
            yield piece, result
    finally:
        for actor, _, _ in busy.values():
            ray.kill(actor)


class _Holder:
    """An actor around a callable object."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self.fault: Exception | None = None
        try:
            self.held = make(*arguments)
        except Exception as error:  # raised in a constructor it would look as if the actor's process had died
            self.fault = error

    def call(self, piece: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        return self.held(piece)
