"""Reading: the plan's rows become micro-batches, with substitutes in the place of samples that can't be read.

`Reader` is the frame: it pairs, reads through a function, substitutes, assembles through another. What the two
functions do is up to the corpus: encoded.py has those of encoded shards, live.py those of raw ones.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, cast

import pyarrow as pa
from typing_extensions import TypeVar

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.errors import DataError, TooManyBadError
from domainshuttle.pipelines.index.table import IndexRow
from domainshuttle.pipelines.media.conversions import noted_conversions
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.pipelines.plan.pairing import Pairing, StepDraw
from domainshuttle.pipelines.quarantine import BadSample, of_sample
from domainshuttle.pipelines.storage.uri import redacted

T = TypeVar("T")
B = TypeVar("B", default=TrainingBatch)


@dataclass
class MicroBatch(Generic[B]):
    """What a rank trains on in one forward and backward pass."""

    step: int
    part: int
    batch: B
    keys: list[str]
    """`source/key` of each sample, as they were trained on (substitutes included)."""
    pair_kinds: Counter[str]
    bad: list[BadSample] = field(default_factory=list)
    """Samples that could not be read, in whose place others stand."""
    replaced: list[tuple[str, str]] = field(default_factory=list)
    """`source/key` of each planned sample that is not there, and of the one that stands in its place."""
    cut_captions: int = 0
    """Of how many samples the caption has more tokens than the batch shows."""
    converted: list[BadSample] = field(default_factory=list)
    """Samples whose pixels were converted as they were decoded, a row a conversion: they are in the batch."""


@dataclass(frozen=True)
class Drawn:
    """A sample as the plan shows it: where it lies, which pass over the corpus it is, its references."""

    row: IndexRow
    epoch: int
    pairing: Pairing


@dataclass(frozen=True)
class Work(Generic[B]):
    """A micro-batch that is still to be made, on a thread of the loader; `size` are the bytes it will hold."""

    step: int
    part: int
    rank: int
    size: int
    make: Callable[[], MicroBatch[B]]


class Source(Protocol[B]):
    """Where a rank's micro-batches come from."""

    def works(self, table: pa.Table) -> Iterator[Work[B]]:
        """The micro-batches of a block that Ray Data handed over, in its order."""
        ...


class BadPlacesError(Exception):
    """Samples that turned out bad while a batch was assembled: their places in it, and why."""

    def __init__(self, faults: dict[int, DataError]) -> None:
        super().__init__(faults)
        self.faults = faults


class Reader(Generic[T, B]):
    """Makes micro-batches of planned rows, by reading samples where it runs.

    `read` gives one sample, and raises DataError for one that can't be used; `assemble` makes a batch of them, and
    raises BadPlacesError where that shows only then. Both are called from several threads.
    """

    def __init__(self, feed: Feed, read: Callable[[Drawn], T], assemble: Callable[[list[T]], B]) -> None:
        self.feed, self.read, self.assemble = feed, read, assemble
        self.index, self.plan = feed.index(), feed.plan()
        self._digest = self.plan.digest
        self._require_same(self.index.digest, self.plan.index_digest)

    def works(self, table: pa.Table) -> Iterator[Work[B]]:
        """The micro-batches of planned rows (`planned_rows`), still to be read."""
        for first in range(0, len(table), _ROWS_AT_ONCE):
            planned = table.slice(first, _ROWS_AT_ONCE).to_pylist()
            for digest in {one["plan"] for one in planned}:
                self._require_same(digest, self._digest)
            # one look into the index for many: far cheaper than one a micro-batch
            samples = iter(self.index.rows([number for one in planned for number in one["rows"]]))
            for one in planned:
                own = list(itertools.islice(samples, len(one["rows"])))
                yield Work(one["step"], one["part"], one["rank"], self.held_bytes(own), partial(self._make, one, own))

    def _require_same(self, theirs: str, ours: str) -> None:
        """Row numbers of another index would be other samples."""
        if theirs != ours:
            raise DataError(
                f"an index of {[redacted(share.index) for share in self.feed.shares]} was written anew while the run "
                f"reads it ({theirs}, not {ours}): put the index back that the run began with, or begin a new run"
            )

    def held_bytes(self, samples: list[IndexRow]) -> int:
        """Bytes that a batch of these samples holds, at most: here what they are in their shards."""
        return sum(member.size for sample in samples for member in sample.members)

    def _make(self, planned: dict[str, Any], samples: list[IndexRow]) -> MicroBatch[B]:
        draw = StepDraw(**planned["draw"]) if planned["draw"] else None
        places = [
            _Place(self._drawn(row, epoch, draw), slot)
            for row, epoch, slot in zip(samples, planned["epochs"], planned["slots"], strict=True)
        ]
        read: list[T | None] = [None] * len(places)
        bad: list[BadSample] = []
        batch = None
        while batch is None:
            for number, place in enumerate(places):
                while read[number] is None:
                    try:
                        with noted_conversions() as place.conversions:
                            read[number] = self.read_one(place.drawn)
                    except DataError as error:
                        bad.append(self._substitute(place, planned["step"], draw, error))
            try:
                batch = self.assemble(cast(list[T], read))
            except BadPlacesError as found:
                for number, fault in found.faults.items():
                    bad.append(self._substitute(places[number], planned["step"], draw, fault))
                    read[number] = None
        keys = [_name(place.drawn.row) for place in places]
        replaced = [(_name(row), key) for row, key, p in zip(samples, keys, places, strict=True) if p.attempts]
        kinds: Counter[str] = Counter()
        for place in places if self.feed.paired else ():
            kinds.update(place.drawn.pairing.kinds)
        cut = sum(self.has_cut_caption(one) for one in cast(list[T], read))
        converted = [
            BadSample(place.drawn.row.source, place.drawn.row.shard, place.drawn.row.key, conversion)
            for place in places
            for conversion in sorted(place.conversions)
        ]
        return MicroBatch(planned["step"], planned["part"], batch, keys, kinds, bad, replaced, cut, converted)

    def has_cut_caption(self, sample: T) -> bool:
        """Whether a sample's caption has more tokens than are shown; here none has."""
        return False

    def read_one(self, drawn: Drawn) -> T:
        """A sample as `read` gives it; whatever else than the machine's failures ends that is a DataError."""
        with of_sample(_name(drawn.row)):
            return self.read(drawn)

    def _drawn(self, row: IndexRow, epoch: int, draw: StepDraw | None) -> Drawn:
        return Drawn(row, epoch, self.feed.pair(row, epoch, draw))

    def _substitute(self, place: "_Place", step: int, draw: StepDraw | None, error: DataError) -> BadSample:
        """Puts the plan's next substitute in a place, and returns the row of the quarantine table for what was there.

        Raises TooManyBadError after too many.
        """
        row, epoch = place.drawn.row, place.drawn.epoch
        if place.attempts >= _MOST_SUBSTITUTES:
            raise TooManyBadError(
                f"step {step}: {place.attempts + 1} samples in a row can't be read, the last one because: {error}"
            ) from error
        substitute = self.index.row(self.plan.substitute(step, place.slot, place.attempts))
        place.drawn = self._drawn(substitute, epoch, draw)
        place.attempts += 1
        return BadSample(row.source, row.shard, row.key, str(error))


def _name(row: IndexRow) -> str:
    return f"{row.source}/{row.key}"


@dataclass
class _Place:
    """A place of a batch: the sample that is to stand there, after how many bad ones."""

    drawn: Drawn
    slot: int
    attempts: int = 0
    conversions: set[str] = field(default_factory=set)


_ROWS_AT_ONCE = 32
"""Micro-batches whose samples are looked up together, and held."""
_MOST_SUBSTITUTES = 20
"""Tried for one place of a batch: when all of them are bad, the corpus is, or its disk."""
