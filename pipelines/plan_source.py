"""The step plan through Ray Data to every rank.

Encoded corpora: Ray Data carries the plan, not the samples. A row is one micro-batch: its step, the rank that trains on
it, and the samples by their rows in the index. A block holds some steps of one rank, and the blocks come in the order
rank 0, 1, ..., so `streaming_split` with the order preserved hands every rank exactly its own.

Raw corpora (`Feed.encoders`): the same rows, one a block, go through a pool of actors that decode and encode, on
whatever nodes have the CPUs or GPUs for it; the rank is handed finished batches.

Ray loads this module into its controllers, coordinators and reading tasks, so nothing here imports torch, which would
cost each of them seconds at every start.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from domainshuttle.pipelines.feed import Feed, planned_rows

READ_AHEAD = 256 << 20
"""Bytes that a rank holds before they are needed."""


class PlanSource(Datasource):
    """The step plan as a Ray Data source: one read task a block, made when it is needed.

    With `interleaved` a task's rows are those of all ranks in turn, to be cut into blocks of one row; else a block's
    rows are one rank's.
    """

    def __init__(
        self,
        feed: Feed,
        start: int,
        stop: int,
        world_size: int,
        interleaved: bool = False,
        steps_per_block: int = 32,
    ) -> None:
        super().__init__()
        self.feed, self.world_size = feed, world_size
        self.starts = list(range(start, stop, steps_per_block))
        self.stops = [*self.starts[1:], stop]
        self.ranks: list[int | None] = [None] if interleaved else [*range(world_size)]

    @property
    def blocks(self) -> int:
        """How many blocks there are: the steps' chunks, times the ranks where each has its own."""
        return len(self.starts) * len(self.ranks)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task a block, whatever parallelism is asked for: the order of the blocks is the contract."""
        return [
            ReadTask(self._reader(start, stop, rank), BlockMetadata(None, None, None, None))
            for start, stop in zip(self.starts, self.stops, strict=True)
            for rank in self.ranks
        ]

    def _reader(self, start: int, stop: int, rank: int | None) -> Callable[[], Iterable[pa.Table]]:
        feed, world_size = self.feed, self.world_size
        return lambda: [planned_rows(feed, start, stop, rank, world_size)]


@dataclass(frozen=True)
class LivePool:
    """The actors that encode raw corpora while they are trained on, and what each reserves (fractions are allowed)."""

    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


def plan_dataset(
    feed: Feed, start: int, stop: int, world_size: int, pool: LivePool | None = None, read_ahead: int = READ_AHEAD
) -> list[ray.data.DataIterator]:
    """The micro-batches of steps start..stop-1, split among the ranks.

    Where the feed has encoders, `pool` encodes them, as far ahead as `read_ahead` bytes for each rank in the object
    store.
    """
    source = PlanSource(feed, start, stop, world_size, interleaved=feed.encoders is not None)
    dataset = ray.data.read_datasource(source, override_num_blocks=source.blocks)
    if feed.encoders is not None:
        from domainshuttle.pipelines.live import LiveEncoder  # brings torch along

        pool = pool or LivePool()
        # a block a micro-batch: any actor takes the next one, and the split hands them to the ranks in turn
        dataset = dataset.repartition(target_num_rows_per_block=1).map_batches(
            LiveEncoder,
            fn_constructor_args=(feed, "cuda" if pool.gpus else "cpu"),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
        limits = ExecutionResources(object_store_memory=read_ahead * world_size)
        dataset.context.execution_options.resource_limits = limits
    dataset.context.execution_options.preserve_order = True
    return dataset.streaming_split(world_size, equal=True)
