"""The loader: a rank's micro-batches in the plan's order, made ahead on a few threads.

Ray Data hands each rank its rows of the plan (ray_source.py). Of encoded corpora the rank reads its samples from the
shards itself, by offset; of raw ones the rows come with finished batches, which actors have made. Either way what is
made ahead is bounded in bytes.
"""

import errno
import json
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, cast

import pyarrow as pa
import torch

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.errors import DataError, TooManyBadError
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.loading.device_prefetch import on_device
from domainshuttle.pipelines.loading.encoded import EncodedReader
from domainshuttle.pipelines.loading.reader import B, MicroBatch, Source, Work
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_RUN, BadSample, accepted_share, percent
from domainshuttle.pipelines.sample import READ_AHEAD

logger = logging.getLogger(__name__)


class Loader(Generic[B]):
    """A rank's micro-batches in order, made ahead on a pool of threads.

    `blocks` are the tables that Ray Data hands over; `source` says how micro-batches are made of them: by default as
    the feed says, from encoded shards or from actors. `read_ahead` bounds the bytes that are held before they are
    needed; at least one micro-batch is.
    Samples that can't be read go to `quarantine` (a JSONL file) and the plan's substitutes take their place; when more
    than `most_bad` of the samples were bad (and at least 10), TooManyBadError ends the run. On a CUDA `device` the
    batches come out there, copied ahead from pinned memory.
    Samples whose pixels live encoding converts are listed in `converted` (JSONL), each once a start. Without `lists`
    another rank, which is handed the same, writes to `quarantine`.
    """

    def __init__(
        self,
        blocks: Iterable[pa.Table],
        feed: Feed,
        rank: int,
        world_size: int,
        quarantine: Path,
        read_ahead: int = READ_AHEAD,
        threads: int = 2,
        most_bad: float = MOST_BAD_IN_RUN,
        device: torch.device | None = None,
        source: Source[B] | None = None,
        converted: Path | None = None,
        lists: bool = True,
    ) -> None:
        self.blocks, self.rank, self._lists = blocks, rank, lists
        self.accumulation = feed.accumulation(world_size)
        self.quarantine, self.read_ahead, self.most_bad = quarantine, read_ahead, most_bad
        self.device = device if device is not None and device.type == "cuda" else None
        self.read = self.bad = 0
        self._quarantined, self._converted = _Table(quarantine), converted and _Table(converted)
        self._listed: set[tuple[str, str]] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        if source is None:
            staging = Staging(pinned=self.device is not None)
            source = cast(Source[B], _source(feed, staging))
        self.source = source
        # Ray Data takes seconds to start: it does so while the caller builds the model. Not before the source, whose
        # plan the first blocks are made with.
        self._tables: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=2)
        threading.Thread(target=self._fetch_tables, name="loader-plan", daemon=True).start()

    def __iter__(self) -> Iterator[MicroBatch[B]]:
        """Micro-batches in the plan's order. Raises DataError when the rows are not this rank's, in order."""
        if self.device is None:
            return self._in_order()
        return cast(Iterator[MicroBatch[B]], on_device(cast(Any, self._in_order()), self.device))

    def _in_order(self) -> Iterator[MicroBatch[B]]:
        waiting: deque[tuple[Future[MicroBatch[B]], int]] = deque()
        ahead = 0
        works = self._works()
        try:
            while True:
                while len(waiting) < _MOST_WAITING and (not waiting or ahead < self.read_ahead):
                    work = next(works, None)
                    if work is None:
                        break
                    waiting.append((self._pool.submit(work.make), work.size))
                    ahead += work.size
                if not waiting:
                    return
                future, size = waiting.popleft()
                ahead -= size
                micro = future.result()
                self._note(micro)
                yield micro
        finally:
            self._quarantined.write()
            if self._converted:
                self._converted.write()
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_tables(self) -> None:
        try:
            for table in self.blocks:
                self._tables.put(table)
            self._tables.put(None)
        except BaseException as error:
            self._tables.put(error)

    def _works(self) -> Iterator[Work[B]]:
        expected: tuple[int, int] | None = None
        while (table := self._tables.get()) is not None:
            if isinstance(table, BaseException):
                raise table
            for work in self.source.works(table):
                place = work.step, work.part
                if work.rank != self.rank or (expected is not None and place != expected):
                    raise DataError(
                        f"rank {self.rank} was handed step {work.step}, part {work.part} of rank {work.rank}; expected "
                        f"{expected}: the plan's order was lost on its way"
                    )
                part = work.part + 1
                expected = (work.step, part) if part < self.accumulation else (work.step + 1, 0)
                yield work

    def _note(self, micro: MicroBatch[B]) -> None:
        """Counts what was read, puts bad samples on the quarantine table, and lists converted ones, once each."""
        self.read += len(micro.keys) + len(micro.bad)
        self.bad += len(micro.bad)
        if self._converted and (fresh := [one for one in micro.converted if (one.shard, one.key) not in self._listed]):
            self._listed.update((one.shard, one.key) for one in fresh)
            self._converted.add(fresh)
        if not micro.bad:
            return
        if self._lists:
            self._quarantined.add(micro.bad)
        if self.bad >= 10 and self.bad > self.most_bad * self.read:
            raise TooManyBadError(
                f"{self.bad} of {self.read} samples could not be read, more than {percent(self.most_bad)}: see "
                f"{self.quarantine}, then repair the corpus or encode it again{self._accept()}"
            )

    def _accept(self) -> str:
        """How to go on all the same: with twice the share, as it varies. A run can't accept all samples to be bad."""
        share = accepted_share(2 * self.bad / self.read)
        return f"; or accept more with --set loader.most_bad={share}" if float(share) < 1 else ""


class _Table:
    """A JSONL file to which rows are added, whole lines only; where it can't be written they wait in memory, and no
    step ends by it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = b""

    def add(self, rows: Iterable[BadSample]) -> None:
        self._unwritten += b"".join(json.dumps(asdict(one)).encode() + b"\n" for one in rows)
        self.write()

    def write(self) -> None:
        """Writes what waits."""
        if not self._unwritten:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(self._unwritten) < len(self._unwritten):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
            self._unwritten = b""
        except OSError as error:
            logger.warning("%s can not be written; its rows wait in memory: %s", self.path, error)


def _source(feed: Feed, staging: Staging) -> Source[TrainingBatch]:
    if feed.encoders is None:
        return EncodedReader(feed, staging)
    from domainshuttle.pipelines.loading.live import Unpacked  # brings the encoders' libraries along

    return Unpacked(staging)


_MOST_WAITING = 16
"""Micro-batches made ahead at most, however small they are."""
