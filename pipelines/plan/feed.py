"""The feed: what decides the batches of a stage, and the plan's micro-batches as rows of a table."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import pyarrow as pa

from domainshuttle.model.encoder_sources import TILE_ABOVE
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.mapped import mapped_index
from domainshuttle.pipelines.index.selection import load_selected, selected_digest
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import Index, IndexRow
from domainshuttle.pipelines.plan.pairing import Pairing, StepDraw, choose_references, reference_profiles
from domainshuttle.pipelines.plan.step_plan import ORDER_VERSION, PROFILE, StepPlan
from domainshuttle.pipelines.storage.uri import absolute, parent, redacted

PLAN_COLUMNS = ("bucket",)
"""What a plan needs of the index, beside which corpus a row is of, and the profiles of its references."""


@dataclass(frozen=True)
class EncoderSources:
    """Where the encoders come from: names of the built-in ones, folders or hub ids."""

    video: str
    text: str
    text_len: int
    tile_above: int | None = TILE_ABOVE
    """Pixels of a frame above which Wan's VAE encodes in tiles; None: never."""
    files: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    """Digests of the encoders' files where the run was started (`video_files`, `text_files`), for other nodes to
    compare theirs with."""

    @property
    def by_kind(self) -> tuple[tuple[Literal["video", "text"], str], ...]:
        """Both, with what they are."""
        return ("video", self.video), ("text", self.text)


@dataclass(frozen=True)
class Feed:
    """Everything that decides the batches of a stage. Two feeds that are equal give the same batches."""

    shares: tuple[CorpusShare, ...]
    """The corpora: encoded ones, or raw ones where `encoders` are given."""
    seed: int
    global_batch: int
    micro_batch: int
    text_len: int
    references: int
    reference_dropout: float = 0.0
    text_dropout: float = 0.0
    paired: bool = False
    encoders: EncoderSources | None = None
    """What encodes raw corpora while they are trained on."""
    order: int = ORDER_VERSION
    """The version of the data order: that which the run began with."""

    def index(self) -> Index:
        """The joint index, mapped from a file that the processes of a node share."""
        return _mapped(self.shares)

    def plan(self) -> StepPlan:
        """The step plan; one copy a process."""
        return _plan(self)

    def corpora(self) -> Iterator[tuple[str, str, str, int]]:
        """Name, place, index digest and number of samples of each corpus, of what its filter leaves."""
        index = self.index()
        counts: Counter[str] = Counter()
        for chunk in index.table.column("corpus").chunks:  # each of one corpus
            counts[chunk[0].as_py()] += len(chunk)
        for part, share in zip(index.parts, self.shares, strict=True):
            place = redacted(parent(absolute(share.index)))
            yield part.corpus, place, selected_digest(part, share.where), counts[part.corpus]

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one rank in one step; raises DataError where the global batch does not divide."""
        count, rest = divmod(self.global_batch, world_size * self.micro_batch)
        if rest or not count:
            raise DataError(
                f"global_batch={self.global_batch} can't be shared by {world_size} workers x micro_batch="
                f"{self.micro_batch}: choose a multiple of {world_size * self.micro_batch}"
            )
        return count

    def pair(self, row: IndexRow, epoch: int, step: StepDraw | None = None) -> Pairing:
        """The reference sets of a sample in an epoch; empty where the stage shows no references. `step` is what its
        step draws for all samples."""
        return choose_references(
            row.reference_subjects if self.references else (),
            row.reference_origins if self.references else (),
            self.seed,
            epoch,
            row.sample_id,
            max(self.references, 1),
            self.reference_dropout,
            self.text_dropout,
            step,
        )


@lru_cache(maxsize=4)
def _mapped(shares: tuple[CorpusShare, ...]) -> Index:
    return mapped_index(shares)


@lru_cache(maxsize=4)
def _plan(feed: Feed) -> StepPlan:
    # of its own columns: Ray Data's processes, also on nodes without ranks, need no others
    profiles = partial(reference_profiles, max_references=feed.references)
    derived = {PROFILE: ("reference_subjects", profiles)} if feed.references else {}
    index = Index.concat([load_selected(share, PLAN_COLUMNS, derived) for share in feed.shares])
    weights = {share.corpus: share.weight for share in feed.shares if share.weight is not None}
    return StepPlan(
        index, weights, feed.seed, feed.global_batch, "corpus", references=feed.references, version=feed.order
    )


def planned_rows(feed: Feed, start: int, stop: int, rank: int | None, world_size: int) -> pa.Table:
    """The micro-batches of a rank (None: of all, in turn) in steps start..stop-1: step, rank, part, the samples' rows
    in the index, epochs and slots, what the step draws for all of them, and the digest of the plan."""
    plan, accumulation = feed.plan(), feed.accumulation(world_size)
    digest = plan.digest
    rows: list[dict[str, Any]] = []
    for step in range(start, stop):
        parts = plan[step].micro_batches(world_size, accumulation)
        for number in range(accumulation):
            for own in range(world_size) if rank is None else (rank,):
                part = parts[number * world_size + own]
                rows.append(
                    {
                        "step": step,
                        "rank": own,
                        "part": number,
                        "rows": part.rows.tolist(),
                        "epochs": part.epochs.tolist(),
                        "slots": part.slots.tolist(),
                        "draw": None if part.draw is None else asdict(part.draw),
                        "plan": digest,
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
        ("draw", pa.struct([("drop", pa.float64()), ("deal", pa.float64())])),
        ("plan", pa.string()),
    ]
)
