"""The step plan through Ray Data to every rank.

Encoded corpora: Ray Data carries the plan, not the samples. A block is one row, some steps of one rank: which samples,
by their rows in the index, make up its micro-batches. The blocks come in the order rank 0, 1, ..., so `streaming_split`
with the order preserved hands every rank exactly its own. Ray Data's processes take seconds to start: for that long a
rank, which has the plan for its substitutes anyway, plans by itself.

Raw corpora (`Feed.encoders`): a block is one micro-batch, and all go through a pool of actors that decode and encode,
on whatever nodes have the CPUs or GPUs for it; the rank is handed finished batches.

Few tasks make the many blocks, one after the other as they are asked for: a task a block would cost every start of a
long run a minute of scheduling, and every process that makes blocks holds the plan.

Ray loads this module into its controllers, coordinators and reading tasks, so nothing here imports torch, which would
cost each of them seconds at every start.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import DataIterator, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from domainshuttle.pipelines.plan.feed import Feed, planned_rows
from domainshuttle.pipelines.sample import READ_AHEAD
from domainshuttle.pipelines.values import ActorPool

_OWN_STEPS = 256
"""Steps that the ranks plan themselves at most: more than any training makes while Ray Data starts."""
_STEPS_PER_TASK = 4096
"""Steps whose blocks one task makes: what a lost node costs to be planned again."""
_PLAN_AHEAD = 64 << 10
"""Bytes of the plan that Ray Data holds for a rank: hundreds of steps. More would be planned at a start, which has
better use for its cores."""
_REST_SECONDS = 0.05


class PlanSource(Datasource):
    """The step plan as a Ray Data source.

    A block is one row (`packed`): `steps_per_block` steps of one rank, the ranks taking turns, or with
    `steps_per_block=None` one micro-batch. Each `sharing` ranks after one another are handed the same.
    """

    def __init__(
        self, feed: Feed, start: int, stop: int, world_size: int, steps_per_block: int | None = 32, sharing: int = 1
    ) -> None:
        super().__init__()
        self.feed, self.world_size, self.steps_per_block, self.sharing = feed, world_size, steps_per_block, sharing
        self.tasks = [(first, min(first + _STEPS_PER_TASK, stop)) for first in range(start, stop, _STEPS_PER_TASK)]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """The tasks, whatever parallelism is asked for: the order of the blocks is the contract."""
        return [ReadTask(self._reader(*steps), BlockMetadata(None, None, None, None)) for steps in self.tasks]

    def _reader(self, start: int, stop: int) -> Callable[[], Iterable[pa.Table]]:
        feed, steps_per_block, sharing = self.feed, self.steps_per_block, self.sharing
        groups = self.world_size // sharing

        def blocks() -> Iterator[pa.Table]:
            for first in range(start, stop, steps_per_block or 1):
                rows = planned_rows(feed, first, min(first + (steps_per_block or 1), stop), None, groups)
                if steps_per_block is None:
                    shares = (rows.slice(number, 1) for number in range(len(rows)))
                else:
                    shares = (rows.filter(pc.equal(rows["rank"], group)) for group in range(groups))
                for share in shares:
                    yield from (packed(share) for _ in range(sharing))

        return blocks


def packed(rows: pa.Table) -> pa.Table:
    """Planned rows as a table of one row, which Ray Data can neither cut nor join with another."""
    rows = rows.combine_chunks()
    column = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows.to_struct_array().combine_chunks())
    return pa.table({"micro_batches": column})


def unpacked(table: pa.Table) -> pa.Table:
    """The planned rows of packed ones."""
    return pa.Table.from_struct_array(table.column("micro_batches").combine_chunks().flatten())


@dataclass(frozen=True)
class Blocks:
    """A rank's share of the steps, as tables in their order: planned rows, or what actors made of them."""

    iterator: DataIterator
    live: bool
    own: Callable[[], pa.Table] | None = None
    """What the rank plans itself, before what Ray Data hands over."""

    def __iter__(self) -> Iterator[pa.Table]:
        if self.own is not None:
            yield self.own()
        # typed loosely, since Ray's annotations lack the None that its documentation names
        whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "prefetch_batches": 1}
        for table in self.iterator.iter_batches(**whole):
            yield table if self.live else unpacked(table)


class WaitForConsumers(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest while what its tasks made is still to be taken by the ranks.

    The loop waits until a task has something to hand over. Tasks that have, and may not since enough is held already,
    and no tasks at all do not keep it waiting: it would turn on most of a core for as long as the ranks train.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called after each turn of the loop."""
        running = [operator for operator in executor._topology if operator.get_active_tasks()]
        if all(operator._in_task_output_backpressure for operator in running):
            time.sleep(_REST_SECONDS)


def plan_dataset(
    feed: Feed,
    start: int,
    stop: int,
    world_size: int,
    pool: ActorPool | None = None,
    read_ahead: int = READ_AHEAD,
    sharing: int = 1,
) -> list[Blocks]:
    """The micro-batches of steps start..stop-1, split among the ranks, of which each `sharing` have the same.

    Where the feed has encoders, `pool` encodes them, as far ahead as `read_ahead` bytes for each rank in the object
    store.
    """
    live = feed.encoders is not None
    first = start if live else start + min(_OWN_STEPS, (stop - start) // 2)
    source = PlanSource(feed, first, stop, world_size, None if live else 32, sharing)
    # no CPU reserved: a task waits nearly all the time, and may live as long as the run
    dataset = ray.data.read_datasource(source, override_num_blocks=len(source.tasks), concurrency=1, num_cpus=0)
    if live:
        from domainshuttle.pipelines.loading.live import LiveEncoder  # brings torch along

        pool = pool or ActorPool()
        # a block a micro-batch: any actor takes the next one, and the split hands them to the ranks in turn
        dataset = dataset.map_batches(
            LiveEncoder,
            fn_constructor_args=(feed, "cuda" if pool.gpus else "cpu"),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
    context = dataset.context
    context.target_max_block_size = 1  # each row is a block as soon as it is made
    context.custom_execution_callback_classes = [WaitForConsumers]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=(read_ahead if live else _PLAN_AHEAD) * world_size
    )
    iterators = dataset.streaming_split(world_size, equal=True)
    if first == start:
        return [Blocks(iterator, live) for iterator in iterators]
    return [
        Blocks(iterator, live, partial(planned_rows, feed, start, first, rank // sharing, world_size // sharing))
        for rank, iterator in enumerate(iterators)
    ]
