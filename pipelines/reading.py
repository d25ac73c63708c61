"""Reading: the plan's rows become micro-batches, with substitutes in the place of samples that can't be read.

`Reader` is the frame: it pairs, reads through a function, substitutes, assembles through another. What the two
functions do is up to the corpus: `EncodedReader` has those of encoded shards.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol

import pyarrow as pa
from torch import Tensor
from typing_extensions import TypeVar

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.collate import ReadSample, all_finite, collate, read_tensors
from domainshuttle.pipelines.feed import Feed
from domainshuttle.pipelines.index import IndexRow
from domainshuttle.pipelines.pairing import Pairing
from domainshuttle.pipelines.parts import EMPTY_CAPTION_NAME, BadSample
from domainshuttle.pipelines.sample import DataError
from domainshuttle.pipelines.shards import read_members
from domainshuttle.pipelines.staging import Staging
from domainshuttle.pipelines.storage import join, read_bytes

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


class Reader(Generic[T, B]):
    """Makes micro-batches of planned rows, by reading samples where it runs.

    `read` gives one sample, and raises DataError for one that can't be used; `assemble` makes a batch of them. Both
    are called from several threads.
    """

    def __init__(self, feed: Feed, read: Callable[[Drawn], T], assemble: Callable[[list[T]], B]) -> None:
        self.feed, self.read, self.assemble = feed, read, assemble
        self.index, self.plan = feed.index(), feed.plan()

    def works(self, table: pa.Table) -> Iterator[Work[B]]:
        """The micro-batches of planned rows (`planned_rows`), still to be read."""
        planned = table.to_pylist()
        # one look into the index for the whole block: far cheaper than one a micro-batch
        samples = iter(self.index.rows([number for one in planned for number in one["rows"]]))
        for one in planned:
            own = list(itertools.islice(samples, len(one["rows"])))
            size = sum(member.size for sample in own for member in sample.members)
            yield Work(one["step"], one["part"], one["rank"], size, partial(self._make, one, own))

    def _make(self, planned: dict[str, Any], samples: list[IndexRow]) -> MicroBatch[B]:
        read: list[T] = []
        keys: list[str] = []
        kinds: Counter[str] = Counter()
        bad: list[BadSample] = []
        for first, epoch, slot in zip(samples, planned["epochs"], planned["slots"], strict=True):
            row = first
            for attempt in itertools.count():
                pairing = self.feed.pair(row, epoch)
                try:
                    read.append(self.read(Drawn(row, epoch, pairing)))
                    break
                except DataError as error:
                    bad.append(BadSample(row.source, row.shard, row.key, str(error)))
                    if attempt >= _MOST_SUBSTITUTES:
                        raise RuntimeError(
                            f"step {planned['step']}: {attempt + 1} samples in a row can't be read, the last one "
                            f"because: {error}"
                        ) from error
                    row = self.index.row(self.plan.substitute(planned["step"], slot, attempt))
            keys.append(f"{row.source}/{row.key}")
            kinds.update(pairing.kinds)
        return MicroBatch(planned["step"], planned["part"], self.assemble(read), keys, kinds, bad)


_MOST_SUBSTITUTES = 20
"""Tried for one place of a batch: when all of them are bad, the corpus is, or its disk."""


class EncodedReader(Reader[ReadSample, TrainingBatch]):
    """Reads encoded shards: latents and text states, as the rank's own threads do."""

    def __init__(self, feed: Feed, staging: Staging) -> None:
        super().__init__(feed, self.read_sample, self.collate)
        self.staging = staging
        empty = read_bytes(join(self.index.row(0).folder, EMPTY_CAPTION_NAME))
        self._empty_caption = read_tensors(empty, EMPTY_CAPTION_NAME)["text"].clone()

    def collate(self, samples: list[ReadSample]) -> TrainingBatch:
        return collate(samples, self.feed.text_len, self.feed.paired, self.staging)

    def read_sample(self, drawn: Drawn) -> ReadSample:
        """The tensors that a step shows of a sample, as views of the shard; raises DataError for what can't be used."""
        row, pairing = drawn.row, drawn.pairing
        where = f"{row.source}/{row.key}"
        members = [member for member in row.members if member.extension == "safetensors"]
        if not members:
            raise DataError(f"{where}: no safetensors member; encode the corpus again")
        tensors = read_tensors(read_members(row.folder, row.shard, members)["safetensors"], where)
        set_a = [f"reference.{picture}" for picture in pairing.set_a]
        set_b = [
            f"{'view' if altered else 'reference'}.{picture}"
            for picture, altered in zip(pairing.set_b, pairing.augment_b, strict=True)
            if self.feed.paired
        ]
        names = {"target", "text", *set_a, *set_b}
        if missing := sorted(names - set(tensors)):
            raise DataError(f"{where}: tensors {missing} are missing; encode the corpus again")
        bucket, text_dim = parse_bucket(row.bucket), self._empty_caption.shape[-1]
        for name in sorted(names):
            expected = {"target": bucket.latent_shape, "text": (*tensors["text"].shape[:1], text_dim)}
            check_tensor(tensors[name], expected.get(name, bucket.reference_shape), f"{where}: {name}")
        text = self._empty_caption if pairing.text_dropped else tensors["text"]
        return ReadSample(
            row, pairing, tensors["target"], text, [tensors[name] for name in set_a], [tensors[name] for name in set_b]
        )


def check_tensor(tensor: Tensor, expected: tuple[int, ...], where: str) -> None:
    """Raises DataError for another shape, or values that are not finite."""
    if tuple(tensor.shape) != expected:
        raise DataError(f"{where} has shape {list(tensor.shape)}, expected {list(expected)}; encode the corpus again")
    if not all_finite(tensor):
        raise DataError(f"{where} holds NaN or infinity; encode the corpus again")
