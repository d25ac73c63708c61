"""The loader: the step plan through Ray Data to every rank, and the rank's own reads.

Ray Data carries the plan, not the samples. A row is one micro-batch: its step, the rank that trains on it, and the
samples by their rows in the index. A block holds some steps of one rank, and the blocks come in the order rank 0, 1,
..., so `streaming_split` with the order preserved hands every rank exactly its own. The rank then reads its samples
from the shards by offset, with a small pool of threads that runs ahead by a bounded number of bytes.
"""

import itertools
import json
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.collate import ReadSample, collate, read_tensors
from domainshuttle.pipelines.encode import EMPTY_CAPTION_NAME
from domainshuttle.pipelines.index import Index, IndexRow
from domainshuttle.pipelines.order import StepPlan
from domainshuttle.pipelines.pairing import choose_references
from domainshuttle.pipelines.parts import BadSample
from domainshuttle.pipelines.sample import DataError
from domainshuttle.pipelines.shards import read_members


@dataclass(frozen=True)
class Feed:
    """Everything that decides the batches of a stage. Two feeds that are equal give the same batches."""

    indexes: tuple[str, ...]
    """Paths of the encoded corpora's index files."""
    mixture: tuple[tuple[str, float], ...]
    seed: int
    global_batch: int
    micro_batch: int
    text_len: int
    references: int
    reference_dropout: float = 0.0
    text_dropout: float = 0.0
    paired: bool = False

    def index(self) -> Index:
        """The joint index; one copy a process."""
        return _index(self.indexes)

    def plan(self) -> StepPlan:
        """The step plan; one copy a process."""
        return _plan(self)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one rank in one step; raises DataError where the global batch does not divide."""
        count, rest = divmod(self.global_batch, world_size * self.micro_batch)
        if rest or not count:
            raise DataError(
                f"global_batch={self.global_batch} can't be shared by {world_size} workers x micro_batch="
                f"{self.micro_batch}: choose a multiple of {world_size * self.micro_batch}"
            )
        return count


@lru_cache(maxsize=4)
def _index(paths: tuple[str, ...]) -> Index:
    return Index.concat([Index.load(path, verify=False) for path in paths])


@lru_cache(maxsize=4)
def _plan(feed: Feed) -> StepPlan:
    return StepPlan(feed.index(), dict(feed.mixture), feed.seed, feed.global_batch)


def planned_rows(feed: Feed, start: int, stop: int, rank: int, world_size: int) -> pa.Table:
    """The micro-batches of a rank in steps start..stop-1: step, rank, part, and the samples' rows, epochs and slots."""
    plan, accumulation = feed.plan(), feed.accumulation(world_size)
    rows: list[dict[str, Any]] = []
    for step in range(start, stop):
        parts = plan[step].micro_batches(world_size, accumulation)
        for number in range(accumulation):
            part = parts[number * world_size + rank]
            rows.append(
                {
                    "step": step,
                    "rank": rank,
                    "part": number,
                    "rows": part.rows.tolist(),
                    "epochs": part.epochs.tolist(),
                    "slots": part.slots.tolist(),
                }
            )
    return pa.Table.from_pylist(rows, schema=_ROWS)


_ROWS = pa.schema(
    [
        ("step", pa.int64()),
        ("rank", pa.int32()),
        ("part", pa.int32()),
        ("rows", pa.list_(pa.int64())),
        ("epochs", pa.list_(pa.int32())),
        ("slots", pa.list_(pa.int32())),
    ]
)


class PlanSource(Datasource):
    """The step plan as a Ray Data source: one read task a block, made when it is needed."""

    def __init__(self, feed: Feed, start: int, stop: int, world_size: int, steps_per_block: int = 32) -> None:
        super().__init__()
        self.feed, self.world_size = feed, world_size
        self.starts = list(range(start, stop, steps_per_block))
        self.stops = [*self.starts[1:], stop]

    @property
    def blocks(self) -> int:
        """How many blocks there are: the steps' chunks times the ranks."""
        return len(self.starts) * self.world_size

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task a block, whatever parallelism is asked for: the order of the blocks is the contract."""
        return [
            ReadTask(self._reader(start, stop, rank), BlockMetadata(None, None, None, None))
            for start, stop in zip(self.starts, self.stops, strict=True)
            for rank in range(self.world_size)
        ]

    def _reader(self, start: int, stop: int, rank: int) -> Callable[[], Iterable[pa.Table]]:
        feed, world_size = self.feed, self.world_size
        return lambda: [planned_rows(feed, start, stop, rank, world_size)]


def plan_dataset(feed: Feed, start: int, stop: int, world_size: int) -> list[ray.data.DataIterator]:
    """The micro-batches of steps start..stop-1, split among the ranks."""
    source = PlanSource(feed, start, stop, world_size)
    dataset = ray.data.read_datasource(source, override_num_blocks=source.blocks)
    dataset.context.execution_options.preserve_order = True
    return dataset.streaming_split(world_size, equal=True)


@dataclass
class MicroBatch:
    """What a rank trains on in one forward and backward pass."""

    step: int
    part: int
    batch: TrainingBatch
    keys: list[str]
    """`source/key` of each sample, as they were trained on (substitutes included)."""
    pair_kinds: Counter[str]


class Loader:
    """A rank's micro-batches in order, read ahead on a pool of threads.

    `read_ahead` bounds the bytes of latents that are read before they are needed; at least one micro-batch is. Samples
    that can't be read go to `quarantine` (a JSONL file) and the plan's substitutes take their place; when more than
    `most_bad` of the samples were bad (and at least 10), DataError ends the run.
    """

    def __init__(
        self,
        iterator: ray.data.DataIterator | None,
        feed: Feed,
        rank: int,
        world_size: int,
        quarantine: Path,
        read_ahead: int = 256 << 20,
        threads: int = 2,
        most_bad: float = 0.01,
    ) -> None:
        self.iterator, self.feed, self.rank = iterator, feed, rank
        self.index, self.plan = feed.index(), feed.plan()
        self.accumulation = feed.accumulation(world_size)
        self.quarantine, self.read_ahead, self.most_bad = quarantine, read_ahead, most_bad
        self.read = self.bad = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        # Ray Data takes seconds to start: it does so while the caller builds the model
        self._tables: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=2)
        threading.Thread(target=self._fetch_tables, name="loader-plan", daemon=True).start()
        folder = Path(self.index.row(0).folder)
        with (folder / EMPTY_CAPTION_NAME).open("rb") as file:
            self._empty_caption = read_tensors(file.read(), EMPTY_CAPTION_NAME)["text"].clone()

    def __iter__(self) -> Iterator[MicroBatch]:
        """Micro-batches in the plan's order. Raises DataError when the rows are not this rank's, in order."""
        waiting: deque[tuple[Future[MicroBatch], int]] = deque()
        ahead = 0
        rows = self._rows()
        try:
            while True:
                while not waiting or ahead < self.read_ahead:
                    row = next(rows, None)
                    if row is None:
                        break
                    numbers = row["rows"]
                    samples = self.index.rows(numbers)
                    size = sum(member.size for sample in samples for member in sample.members)
                    waiting.append((self._pool.submit(self._assemble, row, samples), size))
                    ahead += size
                    if len(waiting) >= _MOST_WAITING:
                        break
                if not waiting:
                    return
                future, size = waiting.popleft()
                ahead -= size
                yield future.result()
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_tables(self) -> None:
        try:
            for table in self.iterator.iter_batches(**_WHOLE_BLOCKS) if self.iterator is not None else ():
                self._tables.put(table)
            self._tables.put(None)
        except BaseException as error:
            self._tables.put(error)

    def _rows(self) -> Iterator[dict[str, Any]]:
        expected: tuple[int, int] | None = None
        while (table := self._tables.get()) is not None:
            if isinstance(table, BaseException):
                raise table
            for row in table.to_pylist():
                place = row["step"], row["part"]
                if row["rank"] != self.rank or (expected is not None and place != expected):
                    raise DataError(
                        f"rank {self.rank} was handed step {place[0]}, part {place[1]} of rank {row['rank']}; expected "
                        f"{expected}: the plan's order was lost on its way"
                    )
                part = place[1] + 1
                expected = (place[0], part) if part < self.accumulation else (place[0] + 1, 0)
                yield row

    def _assemble(self, row: dict[str, Any], samples: list[IndexRow]) -> MicroBatch:
        ready = [
            self._sample_or_substitute(sample, row["step"], epoch, slot)
            for sample, epoch, slot in zip(samples, row["epochs"], row["slots"], strict=True)
        ]
        kinds: Counter[str] = Counter()
        for one in ready:
            kinds.update(one.pairing.kinds)
        return MicroBatch(
            step=row["step"],
            part=row["part"],
            batch=collate(ready, self.feed.text_len, self.feed.paired),
            keys=[f"{one.row.source}/{one.row.key}" for one in ready],
            pair_kinds=kinds,
        )

    def _sample_or_substitute(self, row: IndexRow, step: int, epoch: int, slot: int) -> ReadSample:
        for attempt in itertools.count():
            self.read += 1
            try:
                return self._sample(row, epoch)
            except DataError as error:
                self.bad += 1
                self._note(row, str(error))
                row = self.index.row(self.plan.substitute(step, slot, attempt))
        raise AssertionError("unreachable: substitute() raises when no sample is left")

    def _note(self, row: IndexRow, reason: str) -> None:
        bad = BadSample(row.source, row.shard, row.key, reason)
        with self.quarantine.open("a") as file:
            file.write(json.dumps(bad.__dict__) + "\n")
        if self.bad >= 10 and self.bad > self.most_bad * self.read:
            raise RuntimeError(
                f"{self.bad} of {self.read} samples could not be read, more than {self.most_bad:.0%}: see "
                f"{self.quarantine}, then repair the corpus or encode it again"
            )

    def _sample(self, row: IndexRow, epoch: int) -> ReadSample:
        feed = self.feed
        members = [member for member in row.members if member.extension == "safetensors"]
        where = f"{row.source}/{row.key}"
        if not members:
            raise DataError(f"{where}: no safetensors member; encode the corpus again")
        tensors = read_tensors(read_members(row.folder, row.shard, members)["safetensors"], where)
        pairing = choose_references(
            row.reference_subjects if feed.references else (),
            row.reference_origins if feed.references else (),
            feed.seed,
            epoch,
            row.sample_id,
            max(feed.references, 1),
            feed.reference_dropout,
            feed.text_dropout,
        )
        wanted = {"target", "text", *(f"reference.{i}" for i in {*pairing.set_a, *pairing.set_b})}
        if missing := sorted(wanted - set(tensors)):
            raise DataError(f"{where}: tensors {missing} are missing; encode the corpus again")
        bucket = parse_bucket(row.bucket)
        for name in sorted(wanted - {"text"}):
            expected = bucket.latent_shape if name == "target" else bucket.reference_shape
            if tuple(tensors[name].shape) != expected:
                raise DataError(
                    f"{where}: {name} has shape {list(tensors[name].shape)}, its bucket {bucket} {list(expected)}; "
                    "encode the corpus again"
                )
            if not bool(torch.isfinite(tensors[name].float().sum())):
                raise DataError(f"{where}: the latents of {name} are not finite; encode the corpus again")
        text = self._empty_caption if pairing.text_dropped else tensors["text"]
        return ReadSample(row, tensors, text, pairing)


# typed loosely, since Ray's annotations lack the None that its documentation names
_WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "prefetch_batches": 1}

_MOST_WAITING = 16
"""Micro-batches read ahead at most, however small they are."""
