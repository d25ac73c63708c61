"""What a stage's steps are made of: buckets, and how many references their samples show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.pipelines.plan.step_plan import StepPlan
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.segments import Segment


@dataclass(frozen=True)
class Steps:
    """Steps that are alike: of one bucket, whose samples show the same numbers of references."""

    bucket: Bucket
    share: float
    """Of all steps."""
    counts: tuple[tuple[int, int], ...]
    """References in sets A and B of each of the step's samples, in the order in which ranks are given them."""


@dataclass(frozen=True)
class StageData:
    """The steps of a stage, and whether they are the index's or assumed."""

    steps: tuple[Steps, ...]
    known: bool

    @property
    def buckets(self) -> list[Bucket]:
        return sorted({one.bucket for one in self.steps})

    def share(self, bucket: Bucket) -> float:
        """Of the steps, those of a bucket."""
        return sum(one.share for one in self.steps if one.bucket == bucket)

    def most(self, bucket: Bucket) -> tuple[int, int]:
        """The most references that a sample shows in either set."""
        shown = [counts for one in self.steps if one.bucket == bucket for counts in one.counts]
        return max(a for a, _ in shown), max(b for _, b in shown)

    def mean(self, bucket: Bucket) -> tuple[float, float]:
        """References of a sample in both sets, on average."""
        steps = [one for one in self.steps if one.bucket == bucket]
        weights = np.array([one.share for one in steps])
        means = np.array([np.mean(one.counts, 0) for one in steps])
        a, b = weights @ means / weights.sum()
        return float(a), float(b)


def known_steps(plan: StepPlan, references: int, dropout: float) -> StageData:
    """The steps of a plan, exact up to `_QUANTILES` of what a step draws."""
    steps = []
    for bucket, share, profiles in plan.groups():
        if not references:
            steps.append(Steps(bucket, share, ((0, 0),) * plan.global_batch))
            continue
        kept = share * (1 - dropout)
        if dropout:
            steps.append(Steps(bucket, share * dropout, ((0, 0),) * plan.global_batch))
        drawn: dict[tuple[tuple[int, int], ...], float] = {}
        for number in range(_QUANTILES):
            counts = tuple(plan.counts_at(profiles, (number + 0.5) / _QUANTILES))
            drawn[counts] = drawn.get(counts, 0.0) + kept / _QUANTILES
        steps += [Steps(bucket, weight, counts) for counts, weight in drawn.items()]
    return StageData(tuple(steps), True)


_QUANTILES = 48


def assumed_steps(config: RunConfig, segment: Segment, references: int) -> StageData:
    """Of corpora that are not there: all their buckets equally often, each sample with so many references."""
    stage = segment.stage
    buckets: Sequence[Bucket] = sorted({one for name in stage.mixture for one in config.corpus(name).buckets})
    counts = ((references, references),) * stage.global_batch
    return StageData(tuple(Steps(bucket, 1 / len(buckets), counts) for bucket in buckets), False)
