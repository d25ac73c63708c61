"""What a stage takes on a number of devices: time, memory, balance of the ranks, hours (docs/planning.md)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.model.spec import ModelSpec
from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.platform.config.schema import EngineSection, StageSection
from domainshuttle.platform.planning.data import StageData
from domainshuttle.platform.planning.goodput import Reliability
from domainshuttle.platform.planning.memory import Memory, Policy, States, best_policy, device_memory
from domainshuttle.platform.planning.step_time import Sample, StepTime, bus_bandwidth, step_time


@dataclass(frozen=True, eq=False)
class Work:
    """A stage, and what it is trained on."""

    spec: ModelSpec
    stage: StageSection
    engine: EngineSection
    data: StageData
    text: int
    """Tokens of a caption."""

    def sample(self, bucket: Bucket, a: int, b: int) -> Sample:
        """A sample of a bucket with so many references in both sets."""
        paired = b if self.stage.loss.cross_pair_weight else None
        return Sample(bucket.latent_shape[1:], a, paired, self.text)

    @property
    def largest(self) -> Sample:
        """The sample that takes most memory."""
        samples = [self.sample(bucket, *self.data.most(bucket)) for bucket in self.data.buckets]
        return max(samples, key=lambda one: one.tokens(self.spec))

    def sample_bytes(self, bucket: Bucket) -> float:
        """Bytes that the loader reads for a sample on average: bf16 latents of target and references, and the text."""
        c, f, h, w = bucket.latent_shape
        a, b = self.data.mean(bucket)
        pictures = a + (b if self.stage.loss.cross_pair_weight else 0)
        return 2 * (c * h * w * (f + pictures) + self.text * self.spec.text_dim)


@dataclass(frozen=True)
class Layout:
    """How a stage's batch is shared: devices, samples of a micro-batch, and what is kept for the backward pass."""

    ranks: int
    micro_batch: int
    policy: Policy
    sharing: int = 1
    """Ranks that compute a sample together (`engine.sequence_parallel`)."""

    @property
    def groups(self) -> int:
        """Groups of ranks that are given the same samples."""
        return self.ranks // self.sharing

    def accumulation(self, global_batch: int) -> int:
        return global_batch // (self.groups * self.micro_batch)

    def __str__(self) -> str:
        shared = f" ({self.sharing} share a sample)" if self.sharing > 1 else ""
        return f"{self.ranks} x {self.micro_batch}{shared}"


@dataclass(frozen=True)
class Forecast:
    """A stage in a layout on a cluster. Without `cluster` (workers on CPUs) there is no time."""

    work: Work
    layout: Layout
    cluster: ClusterSpec | None

    @cached_property
    def states(self) -> States:
        return _states(self.work, self.layout.ranks)

    def memory(self, sample: Sample) -> Memory:
        """Of a rank whose micro-batches are of such samples."""
        tokens = -(-sample.tokens(self.work.spec) // self.layout.sharing)
        return device_memory(
            self.work.spec, self.work.stage, self.states, self.layout.policy, tokens, self.layout.micro_batch,
            self.work.engine.precision, sample.reference_share(self.work.spec),
        )  # fmt: skip

    def micro_batch(self, sample: Sample) -> StepTime:
        """The time of a micro-batch of such samples."""
        assert self.cluster is not None
        ranks, work = self.layout.ranks, self.work
        return step_time(
            work.spec, work.stage, self.states, self.layout.policy, sample, self.layout.micro_batch,
            self.cluster.device, ranks, bus_bandwidth(self.cluster, ranks), self.layout.sharing,
            bus_bandwidth(self.cluster, self.layout.sharing),
        )  # fmt: skip

    @cached_property
    def _times(self) -> dict[tuple[Bucket, int, int], float]:
        return {}

    def _time(self, bucket: Bucket, a: int, b: int) -> float:
        key = bucket, a, b
        if key not in self._times:
            self._times[key] = self.micro_batch(self.work.sample(*key)).micro_batch
        return self._times[key]

    def _steps(self, bucket: Bucket | None = None) -> Iterator[tuple[float, float, float]]:
        """Share of the steps, mean seconds over the ranks, and those of the longest, of steps that are alike."""
        groups, micro = self.layout.groups, self.layout.micro_batch
        for one in self.work.data.steps:
            if bucket in (None, one.bucket):
                # slots of a micro-batch are as many as its fullest sample has
                shown = np.array(one.counts).reshape(-1, groups, micro, 2).max(2)
                times = np.array([[self._time(one.bucket, int(a), int(b)) for a, b in row] for row in shown])
                yield one.share, float(times.mean(1).sum()), float(times.max(1).sum())

    def step_seconds(self, bucket: Bucket | None = None) -> float:
        """Seconds of a step, of a bucket or on average over all: each micro-batch takes what the slowest rank does."""
        update = self.micro_batch(self.work.largest).update
        steps = list(self._steps(bucket))
        return update + sum(share * longest for share, _, longest in steps) / sum(share for share, _, _ in steps)

    @property
    def balance(self) -> float:
        """Mean over longest of the ranks' micro-batches."""
        steps = list(self._steps())
        return sum(share * mean for share, mean, _ in steps) / sum(share * longest for share, _, longest in steps)

    def flops(self, bucket: Bucket) -> float:
        """FLOPs of a step of a bucket on average, recomputation not counted."""
        return sum(
            one.share * sum(_flops(self.work, bucket, a, b) for a, b in one.counts)
            for one in self.work.data.steps if one.bucket == bucket
        ) / self.work.data.share(bucket)  # fmt: skip

    @property
    def mfu(self) -> float:
        """Share of the devices' peak that the mathematics of a step uses."""
        assert self.cluster is not None
        work = sum(self.work.data.share(bucket) * self.flops(bucket) for bucket in self.work.data.buckets)
        return work / (self.step_seconds() * self.layout.ranks * self.cluster.device.flops)

    def fits(self) -> bool:
        """Whether the largest micro-batch fits the device."""
        return self.cluster is None or self.memory(self.work.largest).fits(self.cluster.device.memory)

    def hours(self, steps: float) -> float:
        """Device-hours of so many steps, without failures."""
        return steps * self.step_seconds() * self.layout.ranks / 3600

    @property
    def checkpoint_bytes(self) -> float:
        """Of a checkpoint, of all ranks: masters, both moments, and the moving average where one is kept."""
        return 4 * self.states.trained * (4 if self.work.engine.ema is not None else 3)

    @property
    def reliability(self) -> Reliability:
        """What failures cost: a rank's part of a checkpoint is copied to the host, and then written beside training."""
        assert self.cluster is not None
        known, ranks = self.cluster.reliability, self.layout.ranks
        return Reliability(
            between_failures=3600 * known.device_hours / ranks,
            start=known.start_seconds,
            detect=known.detect_seconds,
            stall=self.checkpoint_bytes / ranks / _TO_HOST,
            write=self.checkpoint_bytes / (1e9 * self.cluster.storage.write_gb_s),
        )

    def goodput(self, every: int) -> float:
        """Share of the time that goes into steps that count, with a checkpoint every so many steps."""
        return self.reliability.goodput(every * self.step_seconds())


@lru_cache(maxsize=256)
def _states(work: Work, ranks: int) -> States:
    return States.of(work.spec, work.stage, work.engine, ranks)


@lru_cache(maxsize=8192)
def _flops(work: Work, bucket: Bucket, a: int, b: int) -> int:
    sample = work.sample(bucket, a, b)
    return work.spec.step_flops(
        sample.latent, references=a, paired_references=sample.paired, text_tokens=work.text, trained=work.stage.patterns
    ).model


def layouts(work: Work, cluster: ClusterSpec, most_ranks: int) -> list[Forecast]:
    """The layouts that fit, each with the policy that fits best, the one of the fewest device-hours first.

    Ranks share samples where the engine is told so, and where nothing fits as many ranks otherwise.
    """
    found: list[Forecast] = []
    node = cluster.trainers.devices
    most = work.stage.global_batch * max(_sharings(work, node), default=1)  # more have nothing to do
    for ranks in range(1, min(most, most_ranks) + 1):
        if ranks > node and ranks % node:
            continue
        of_ranks: list[Forecast] = []
        for sharing in _sharings(work, min(node, ranks)):
            groups, rest = divmod(ranks, sharing)
            if rest or work.stage.global_batch % groups or (of_ranks and sharing != work.engine.sequence_parallel):
                continue
            of_ranks += _fitting(work, cluster, ranks, sharing)
        found += of_ranks
    return sorted(found, key=lambda one: one.hours(1))


def _sharings(work: Work, most: int) -> list[int]:
    """By how many ranks a sample's tokens and heads can be shared: 1, powers of two, and what the engine is told."""
    sizes = {1, 2, 4, 8, work.engine.sequence_parallel}
    whole = {work.spec.num_attention_heads, *(bucket.reference_tokens for bucket in work.data.buckets)}
    return sorted(size for size in sizes if size <= most and not any(count % size for count in whole))


def _fitting(work: Work, cluster: ClusterSpec, ranks: int, sharing: int) -> list[Forecast]:
    found, states = [], _states(work, ranks)
    tokens = -(-work.largest.tokens(work.spec) // sharing)
    share = work.stage.global_batch * sharing // ranks
    for micro in (size for size in range(1, min(share, _MOST_MICRO) + 1) if share % size == 0):
        policy = best_policy(
            work.spec, work.stage, states, tokens, micro, cluster.device.memory, work.engine.precision,
            work.largest.reference_share(work.spec),
        )  # fmt: skip
        if policy is not None:
            found.append(Forecast(work, Layout(ranks, micro, policy, sharing), cluster))
    return found


_TO_HOST = 20e9
"""Bytes/s of a copy into pinned memory of the host; half of what PCIe 4 gives, as ranks share a node's memory."""
_MOST_MICRO = 64
"""Samples of a micro-batch that are tried at most."""
