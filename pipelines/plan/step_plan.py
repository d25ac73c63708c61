"""The step plan: which samples every step trains on, as a pure function of the index, the mixture, the seed and the
global batch.

The rule:

* A **stream** is the samples of one source in one bucket, and in one group of those that can show equally many
  references (`pairing.reference_profiles`). It is endless: a pseudo-random permutation of the stream,
  then another (the next epoch), and so on. So each sample comes exactly once an epoch of its source, and what does not
  fill a batch at an epoch's end is not lost: the batch takes the rest from the next epoch.
* A source's samples come at the rate of its weight, a stream's at its share of the source's samples. All streams of a
  source thus pass through their epochs together.
* A **step** has one bucket and one group, and draws for all its samples how many references they show (`StepDraw`), so
  that they cost alike and no rank waits for another. The buckets' groups take turns in proportion to the rates of their
  streams, and within a group the slots of its batches go to its sources in proportion. Both turns are taken by the same
  low-discrepancy rule (`_Turns`), which has no state: how many of the first t turns were whose is a formula. So any
  step is found directly, no order is ever written out, and a source is never more than about a batch ahead of its
  weight or behind it.

The plan knows nothing of ranks: a global batch is cut into micro-batches afterwards, so the same samples are trained on
in the same steps by any number of workers, and the data state of a checkpoint is the number of the next step (and
`state()`, so that a changed index or seed is refused).
"""

import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.plan.pairing import StepDraw, counts_of
from domainshuttle.pipelines.plan.permutation import ROUNDS, hashed, permuted
from domainshuttle.pipelines.values import MOST_BATCH

ORDER_VERSION = 2  # raised with every change that makes another order of the same input
KNOWN_VERSIONS = (1, 2)
"""Orders that are still made, for runs that began with them: in 1 each sample drew its references by itself."""
PROFILE = "reference_profile"
"""The column of an index, made of `reference_subjects`, by which samples are grouped (`pairing.reference_profiles`)."""
_SCALE = 1 << 44  # rates as integers: fine enough for any mixture, and slot * rate stays within 64 bits

_LEAST_BATCHES = 2  # that a group of samples fills, so that no step shows one twice
# 1 / p and 1 / p^2 of 2**64, p = 1.3247... the real root of p^3 = p + 1: multiples of both are spread evenly over the
# unit square, each by itself and together (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018)
_STRIDES = (0xC13FA9A902A6328F, 0x91E10DA5C79E7B1C)

Kind = tuple[Bucket, int]
"""What the samples of a step have in common: their bucket, and the number of their group in it."""
Holder = TypeVar("Holder")


@dataclass(frozen=True)
class PlannedBatch:
    """A global batch, or a part of one: `rows` int64 [b] are row numbers of the index, `epochs` int32 [b] the pass over
    its stream that each is in (the seed of its pairing), `slots` int32 [b] its places in the global batch (for
    `substitute`)."""

    step: int
    bucket: Bucket
    rows: np.ndarray
    epochs: np.ndarray
    slots: np.ndarray
    draw: StepDraw | None = None
    """What its samples draw together; None: each draws by itself (order version 1, and steps without references)."""

    def __len__(self) -> int:
        return len(self.rows)

    def micro_batches(self, world_size: int, accumulation: int = 1) -> list["PlannedBatch"]:
        """Cut into world_size * accumulation equal parts; part k is rank k % world_size's micro-batch number k //
        world_size.

        Raises DataError where the batch does not divide.
        """
        parts = world_size * accumulation
        if world_size < 1 or accumulation < 1 or len(self) % parts:
            raise DataError(
                f"a batch of {len(self)} does not divide into {world_size} ranks x {accumulation} micro-batches: "
                "choose a global_batch that is a multiple of both"
            )
        size = len(self) // parts
        cuts = [slice(part * size, (part + 1) * size) for part in range(parts)]
        return [replace(self, rows=self.rows[cut], epochs=self.epochs[cut], slots=self.slots[cut]) for cut in cuts]


class StepPlan:
    """The plan of an index. `plan[s]` is the batch of step s >= 0, for any s; the plan has no end.

    `mixture` gives each source of the index its share of the samples (any positive scale; 0 leaves a source out); None
    or an empty one means by their counts. `by` says which column names a sample's source: a run weighs its corpora,
    each of which may be made of several sources. `references` is how many a set shows at most: where it is not 0, the
    index needs the column `PROFILE`. `version` is that of an order that a run began with. Raises DataError on
    an empty index, a source that is unknown or has no weight, a bad weight, or an unknown version.
    """

    def __init__(
        self,
        index: Index,
        mixture: Mapping[str, float] | None,
        seed: int,
        global_batch: int,
        by: Literal["source", "corpus"] = "source",
        references: int = 0,
        version: int = ORDER_VERSION,
    ) -> None:
        if version not in KNOWN_VERSIONS:
            raise DataError(
                f"order version {version!r}: this program makes {', '.join(map(str, KNOWN_VERSIONS))}; go on with the "
                "program that the run began with"
            )
        if not len(index):
            raise DataError("the index has no rows: nothing to plan; check the filter")
        if not 1 <= global_batch <= MOST_BATCH:
            raise DataError(f"global_batch = {global_batch}: expected 1 to {MOST_BATCH} samples")
        self.seed = int(seed)
        self.global_batch = global_batch
        self.index_digest = index.digest
        self.version, self.references = version, references if version > 1 else 0
        source_codes, sources = index.codes(by)
        bucket_codes, bucket_names = index.codes("bucket")
        present = np.bincount(source_codes, minlength=len(sources))
        sizes = {source: int(size) for source, size in zip(sources, present, strict=True) if size}
        self.mixture = _checked_mixture(mixture, sizes)
        weighed = np.array([self.mixture.get(source, 0.0) > 0 for source in sources])[source_codes]
        self._profiles: np.ndarray | None = None
        groups = np.zeros(len(index), np.uint16)
        if self.references:
            self._profiles = index.table.column(PROFILE).to_numpy()
            groups = _groups(bucket_codes, self._profiles, weighed, _LEAST_BATCHES * global_batch)
        self._streams = self._make_streams(source_codes, sources, bucket_codes, bucket_names, groups)
        self._kinds = sorted({stream.kind for stream in self._streams})
        # A source's weight by the stream's share of it. Always from the normalised mixture, as `state()` has it: plans
        # of equal state must be equal, also where one was given by counts and the other by the same numbers.
        units = {
            s: max(1, round(Fraction(self.mixture[s.source]) * len(s.rows) * _SCALE / sizes[s.source]))
            for s in self._streams
        }
        self._slot_turns: dict[Kind, _Turns[_Stream]] = {
            kind: _Turns({s: unit for s, unit in units.items() if s.kind == kind}) for kind in self._kinds
        }
        self._bucket_turns = _grouped_turns(self._slot_turns)
        self._source_sizes = sizes

    def _make_streams(
        self,
        source_codes: np.ndarray,
        sources: list[str],
        bucket_codes: np.ndarray,
        bucket_names: list[str],
        groups: np.ndarray,
    ) -> list["_Stream"]:
        cells = source_codes.astype(np.int64) * len(bucket_names) + bucket_codes
        count = int(groups.max()) + 1
        if count > 1:
            cells = cells * count + groups
        size = len(sources) * len(bucket_names) * count
        if size <= 1 << 16:
            cells = cells.astype(np.uint16)  # numpy sorts these by radix, ten times as fast
        counts = np.bincount(cells, minlength=size)
        order = np.argsort(cells, kind="stable")
        order = order.astype(np.int32) if len(order) < 1 << 31 else order
        ends = np.cumsum(counts)
        streams = []
        for cell in np.flatnonzero(counts):
            rest, group = divmod(int(cell), count)
            source, bucket = sources[rest // len(bucket_names)], bucket_names[rest % len(bucket_names)]
            if self.mixture[source] > 0:
                rows = order[ends[cell] - counts[cell] : ends[cell]]
                streams.append(_Stream(source, (parse_bucket(bucket), group), rows, self.seed))
        return streams

    def __getitem__(self, step: int) -> PlannedBatch:
        if step < 0:
            raise DataError(f"step {step}: expected 0 or more")
        step = int(step)  # numpy's would overflow in the products of `_Turns`
        kind, turn = self._kind_turn(step)
        rows = np.empty(self.global_batch, np.int64)
        epochs = np.empty(self.global_batch, np.int32)
        first = turn * self.global_batch
        for stream, slots, position in self._slot_turns[kind].holders(first, self.global_batch):
            rows[slots], epochs[slots] = stream.take(position, len(slots))
        # Turns alternate regularly: unshuffled, a rank would meet the same sources in every step.
        order = np.argsort(
            hashed(np.arange(self.global_batch, dtype=np.uint64) ^ self._key(f"slots {step}")), kind="stable"
        )
        if self._profiles is not None:
            # micro-batches that are passed through at the same time lie beside each other
            order = order[np.argsort(self._profiles[rows[order]], kind="stable")]
        slots = np.arange(self.global_batch, dtype=np.int32)
        return PlannedBatch(step, kind[0], rows[order], epochs[order], slots, self._draw(kind, turn))

    def _draw(self, kind: "Kind", turn: int) -> StepDraw | None:
        """What the samples of a group's turn draw together: evenly spread over the turns, from a random beginning."""
        if not self.references:
            return None
        name = f"draws {kind[0]} {kind[1]}"
        drop, deal = (
            ((int(self._key(f"{name} {number}")) + turn * stride) >> 11 & (1 << 53) - 1) * 2.0**-53
            for number, stride in enumerate(_STRIDES)
        )
        return StepDraw(drop, deal)

    def reference_counts(self, batch: PlannedBatch, dropout: float) -> np.ndarray:
        """int64 [b, 2]: how many references each sample of a batch shows in A and in B. Of plans with `references`."""
        assert self._profiles is not None and batch.draw is not None
        counts = np.zeros((len(batch), 2), np.int64)
        if batch.draw.drop >= dropout:
            profiles, which = np.unique(self._profiles[batch.rows], return_inverse=True)
            shown = [counts_of(int(profile), self.references, batch.draw.deal) for profile in profiles]
            counts = np.array(shown)[which]
        return counts

    def _key(self, purpose: str) -> np.uint64:
        name = json.dumps([self.seed, purpose]).encode()
        return np.uint64(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))

    def _kind_turn(self, step: int) -> tuple["Kind", int]:
        """The bucket and group of a step, and how many steps they had before."""
        turns, turn = self._bucket_turns.holder(step)
        return turns.holder(turn)

    def substitute(self, step: int, slot: int, attempt: int) -> int:
        """The row that takes the place of a bad sample: of the same bucket, and as far as it has others of the same
        source, and of these first those that can show as many references.

        `slot` is the sample's place in the global batch, `attempt` counts from 0 where substitutes are bad too;
        attempts give different rows, those of the same batch last. The streams stay as they are, so a substitute comes
        in its own turn as well. Raises DataError where the bucket has no sample left.
        """
        batch = self[step]
        if not 0 <= slot < self.global_batch or attempt < 0:
            raise DataError(f"substitute for slot {slot}, attempt {attempt}: expected a slot below {self.global_batch}")
        bad = batch.rows[slot]
        streams = [stream for stream in self._streams if stream.bucket == batch.bucket]
        own = next(stream for stream in streams if bad in stream)
        streams.sort(
            key=lambda one: (
                one.source != own.source,
                one.source,
                one.group != own.group,
                abs(one.group - own.group),
                one.group,
            )
        )
        remaining = attempt
        for stream in streams:
            available = len(stream.rows) - (bad in stream)
            if remaining < available:
                shown = min(len(stream.rows), remaining + 1 + self.global_batch)
                rows = stream.shuffled(f"substitute {step} {slot}", np.arange(shown))
                fresh = ~np.isin(rows, batch.rows)
                return int(np.concatenate([rows[fresh], rows[~fresh & (rows != bad)]])[remaining])
            remaining -= available
        raise DataError(
            f"step {step}, slot {slot}: no substitute number {attempt + 1} in bucket {batch.bucket}: it has "
            f"{sum(len(stream.rows) for stream in streams)} samples and the others were tried; see the quarantine "
            "table, and repair the corpus or leave the bucket out"
        )

    def groups(self) -> list[tuple[Bucket, float, np.ndarray]]:
        """Of each bucket and group: the bucket, its share of the steps, and the profiles [global_batch] of the samples
        of a typical step, in order (zeros in plans without references)."""
        found, total = [], self._bucket_turns.total
        quantiles = (np.arange(self.global_batch) + 0.5) / self.global_batch
        for kind, turns in self._slot_turns.items():
            profiles = np.zeros(self.global_batch, np.uint16)
            if self._profiles is not None:
                shown = [self._profiles[stream.rows] for stream in turns.units]
                weights = [np.full(len(stream.rows), unit / len(stream.rows)) for stream, unit in turns.units.items()]
                present, which = np.unique(np.concatenate(shown), return_inverse=True)
                cumulated = np.cumsum(np.bincount(which, np.concatenate(weights)))
                profiles = present[np.searchsorted(cumulated, quantiles * cumulated[-1], side="right")]
            found.append((kind[0], turns.total / total, profiles))
        return found

    def counts_at(self, profiles: np.ndarray, deal: float) -> list[tuple[int, int]]:
        """References in both sets of samples of these profiles, in a step that draws `deal` and keeps references."""
        shown = {int(profile): counts_of(int(profile), self.references, deal) for profile in np.unique(profiles)}
        return [shown[int(profile)] for profile in profiles]

    @property
    def source_steps_per_epoch(self) -> dict[str, float]:
        """For each source, how many steps one pass over its samples takes."""
        return {
            source: self._source_sizes[source] / (weight * self.global_batch)
            for source, weight in self.mixture.items()
            if weight > 0
        }

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every source has been passed over once (those with more weight than samples oftener)."""
        return math.ceil(max(self.source_steps_per_epoch.values()) - 1e-9)

    def state(self) -> dict[str, Any]:
        """What decides the order, ready for JSON; a checkpoint keeps it and `check` compares it on resume."""
        return {
            "order_version": self.version,
            **({"references": self.references} if self.references else {}),
            "index_digest": self.index_digest,
            "mixture": dict(sorted(self.mixture.items())),
            "seed": self.seed,
            "global_batch": self.global_batch,
        }

    @property
    def digest(self) -> str:
        """A hash of `state()`: equal digests mean the same batches at every step."""
        return hashlib.blake2b(json.dumps(self.state(), sort_keys=True).encode(), digest_size=16).hexdigest()

    def check(self, saved_state: Mapping[str, Any]) -> None:
        """Raise DataError, naming what differs, where a run's saved `state()` is not this plan's."""
        own = self.state()
        differing = [name for name in own if saved_state.get(name) != own[name]]
        if differing:
            changes = "; ".join(f"{name} was {saved_state.get(name)!r}, now {own[name]!r}" for name in differing)
            raise DataError(
                f"the data order is not the one this run began with: {changes}. Resuming would repeat some samples and "
                "leave out others: restore what changed"
            )

    def describe(self) -> dict[str, Any]:
        """Shares and costs for people and planners: per source, per bucket, and the mean tokens of a target."""
        total = self._bucket_turns.total
        buckets = {}
        for bucket in sorted({bucket for bucket, _ in self._kinds}):
            turns = [self._slot_turns[kind] for kind in self._kinds if kind[0] == bucket]
            sizes = [sum(len(stream.rows) for stream in one.units) for one in turns]
            buckets[str(bucket)] = {
                "samples": sum(sizes),
                "share_of_steps": sum(one.total for one in turns) / total,
                "video_tokens": bucket.video_tokens,
                "reference_tokens": bucket.reference_tokens,
                # Fewer samples than a batch holds: its batches show the same sample more than once.
                "repeats_within_batch": min(sizes) < self.global_batch,
            }
        sources = {
            source: {"samples": self._source_sizes[source], "weight": self.mixture[source], "steps_per_epoch": steps}
            for source, steps in self.source_steps_per_epoch.items()
        }
        mean = sum(entry["share_of_steps"] * entry["video_tokens"] for entry in buckets.values())
        return {
            "digest": self.digest,
            "global_batch": self.global_batch,
            "steps_per_epoch": self.steps_per_epoch,
            "mean_video_tokens": mean,
            "sources": sources,
            "buckets": buckets,
        }


def _checked_mixture(mixture: Mapping[str, float] | None, sizes: Mapping[str, int]) -> dict[str, float]:
    """The mixture as shares that sum to 1."""
    weights = dict(mixture) if mixture else {source: float(size) for source, size in sizes.items()}
    unknown, without = sorted(set(weights) - set(sizes)), sorted(set(sizes) - set(weights))
    if unknown:
        raise DataError(
            f"mixture names {unknown}, but the index has the sources {sorted(sizes)}: correct the name or remove it"
        )
    if without:
        raise DataError(f"mixture has no weight for {without}: give each source of the index one, 0 to leave it out")
    bad = {source: weight for source, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if bad or not sum(weights.values()) > 0:
        raise DataError(f"mixture {bad or weights}: expected finite weights of 0 or more, at least one above 0")
    total = sum(map(Fraction, weights.values()))
    return {source: float(Fraction(weight) / total) for source, weight in weights.items()}


def _groups(bucket_codes: np.ndarray, profiles: np.ndarray, weighed: np.ndarray, least: int) -> np.ndarray:
    """uint16 [rows]: the group of each sample in its bucket. Samples of one profile are in one group, with those of the
    next ones where they are fewer than `least`: a step would have to show them several times."""
    groups = np.zeros(len(profiles), np.uint16)
    for bucket in np.unique(bucket_codes):
        inside = bucket_codes == bucket
        counts = np.bincount(profiles[inside & weighed])
        ends, gathered = [], 0
        for profile in np.flatnonzero(counts):
            gathered += counts[profile]
            if gathered >= least:
                ends.append(int(profile))
                gathered = 0
        # what is left over goes to the last whole group
        groups[inside] = np.searchsorted(ends[:-1], profiles[inside])
    return groups


class _Stream:
    """The samples of one source, bucket and group, permuted anew in each epoch."""

    def __init__(self, source: str, kind: Kind, rows: np.ndarray, seed: int) -> None:
        self.source = source
        self.kind = kind
        self.bucket, self.group = kind
        self.rows = rows  # ascending
        self.seed = seed

    def __contains__(self, row: int) -> bool:
        place = int(np.searchsorted(self.rows, row))
        return place < len(self.rows) and self.rows[place] == row

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [count] and epochs [count] of the stream from a position in it."""
        size = len(self.rows)
        rows = np.empty(count, np.int64)
        epochs = ((position % size + np.arange(count)) // size + position // size).astype(np.int32)
        done = 0
        while done < count:
            epoch, place = divmod(position + done, size)
            part = min(count - done, size - place)
            rows[done : done + part] = self.shuffled(f"epoch {epoch}", np.arange(place, place + part))
            done += part
        return rows, epochs

    def shuffled(self, purpose: str, places: np.ndarray) -> np.ndarray:
        """The rows at `places` [n] of the permutation that belongs to `purpose`."""
        group = [self.group] if self.group else []
        name = json.dumps([self.seed, self.source, str(self.bucket), *group, purpose]).encode()
        keys = np.frombuffer(hashlib.blake2b(name, digest_size=8 * ROUNDS).digest(), "<u8")
        return self.rows[permuted(places, len(self.rows), keys)].astype(np.int64)


class _Turns(Generic[Holder]):
    """Turns 0, 1, 2 ... held in proportion to integer units, each holder's spread as evenly as may be.

    A tree: at a node that has had t turns, the left side has held floor(t * left / total + 1/2) of them. That never
    falls and grows by at most one a turn, so it is a schedule, and it is a formula, so any turn is found in the tree's
    depth. Holders with few units lie deep, as in Huffman's code, where the rounding of the nodes above them hardly
    reaches.
    """

    def __init__(self, units: Mapping[Holder, int]) -> None:
        self.units = dict(units)
        self.total = sum(units.values())
        # (units, tie-break, node); a node is (holder,) or (left units, total units, left node, right node)
        heap: list[tuple[int, int, Any]] = [(unit, n, (holder,)) for n, (holder, unit) in enumerate(units.items())]
        heapq.heapify(heap)
        for number in range(len(heap), 2 * len(heap) - 1):
            (small, _, right), (large, _, left) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (small + large, number, (large, small + large, left, right)))
        self._root = heap[0][2]

    def holder(self, turn: int) -> tuple[Holder, int]:
        """Who holds a turn, and how many turns it held before."""
        node = self._root
        while len(node) > 1:
            share, total, left, right = node
            before, after = _rounded(turn, share, total), _rounded(turn + 1, share, total)
            node, turn = (left, before) if after > before else (right, turn - before)
        return node[0], turn

    def holders(self, first: int, count: int) -> Iterator[tuple[Holder, np.ndarray, int]]:
        """Who holds the turns first .. first + count - 1: (holder, which of them [n] from 0, its turns held before)."""
        stack = [(self._root, first, np.arange(count))]
        while stack:
            node, turn, places = stack.pop()
            if not len(places):
                continue
            if len(node) == 1:
                yield node[0], places, turn
                continue
            share, total, left, right = node
            before, rest = divmod(2 * turn * share + total, 2 * total)
            # how many of this node's turns up to each of ours the left side has held, counted from `before`
            held = (rest + 2 * share * np.arange(len(places) + 1, dtype=np.int64)) // (2 * total)
            taken = np.diff(held) > 0
            stack.append((left, before, places[taken]))
            stack.append((right, turn - before, places[~taken]))


def _grouped_turns(slot_turns: Mapping[Kind, _Turns[_Stream]]) -> _Turns[_Turns[Kind]]:
    """The buckets' turns: first between groups of buckets that have the same main source, then within the group.

    In one tree a source with many buckets to itself could fall behind in all of them at once (3 batches, in trials with
    random mixtures); with its buckets in one group their sum is what is kept even (1.2 batches at the worst).
    """
    groups: dict[str, dict[Kind, int]] = {}
    for kind, turns in slot_turns.items():
        units: dict[str, int] = {}
        for stream, unit in turns.units.items():
            units[stream.source] = units.get(stream.source, 0) + unit
        groups.setdefault(max(sorted(units), key=units.__getitem__), {})[kind] = turns.total
    inner = [_Turns(group) for _, group in sorted(groups.items())]
    return _Turns({group: group.total for group in inner})


def _rounded(turn: int, share: int, total: int) -> int:
    return (2 * turn * share + total) // (2 * total)
