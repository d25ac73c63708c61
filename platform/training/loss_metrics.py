"""What a training step is worth knowing: losses by part, timestep, source and domain, summed over all workers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement

import torch
import torch.distributed as dist
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.domains import DOMAINS
from domainshuttle.model.objective import LossOutput
from domainshuttle.pipelines.sample import ORIGINS
from domainshuttle.platform.training.collective_device import collective_device

TIMESTEP_BUCKETS = 4

PAIR_KINDS = ("augmented", *("+".join(pair) for pair in combinations_with_replacement(sorted(ORIGINS), 2)))
"""What a subject's two pictures may be (pairing.py); every rank counts in this order."""


class LossMetrics:
    """Sums of per-sample losses since the last `reduce`, in one vector, so that one collective adds up all of them.

    What a step adds counts when the step is kept: one that is dropped for its loss must not be the mean of others.
    """

    def __init__(self, sources: Sequence[str], cross_pair_weight: float, device: torch.device) -> None:
        self._sources = {source: number for number, source in enumerate(sources)}
        self._weight = cross_pair_weight
        timesteps = [
            f"loss/flow/t_{n / TIMESTEP_BUCKETS:.2f}-{(n + 1) / TIMESTEP_BUCKETS:.2f}" for n in range(TIMESTEP_BUCKETS)
        ]
        # a sample is counted under the domain of its first reference; those without references under "none"
        domains = [f"loss/flow/domain/{name}" for name in ("none", *DOMAINS)]
        self._names = [
            "loss/flow",
            "loss/cross_pair",
            *timesteps,
            *domains,
            *(f"loss/flow/source/{s}" for s in sources),
        ]
        self._domain_offset = 2 + len(timesteps)
        self._source_offset = self._domain_offset + len(domains)
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)
        self._step = torch.zeros_like(self._sums)
        self._pairs: Counter[str] = Counter()
        self._step_pairs: Counter[str] = Counter()
        self._tokens = self._samples = self._cut_captions = 0

    def add(self, batch: TrainingBatch, loss: LossOutput, pair_kinds: Mapping[str, int], cut_captions: int = 0) -> None:
        """Adds the samples of a micro-batch of the step that is under way."""
        flow = loss.flow
        self._add(torch.zeros_like(loss.timesteps, dtype=torch.long), flow)
        if loss.cross_pair is not None:
            self._add(torch.ones_like(loss.timesteps, dtype=torch.long), loss.cross_pair)
        bucket = (loss.timesteps * TIMESTEP_BUCKETS).long().clamp(0, TIMESTEP_BUCKETS - 1)
        self._add(2 + bucket, flow)
        none = torch.full_like(bucket, -1)
        domain = batch.reference_domains[:, 0] if batch.reference_domains.shape[1] else none
        self._add(self._domain_offset + 1 + domain, flow)
        numbers = [self._sources[source] for source in batch.sources]
        self._add(self._source_offset + torch.tensor(numbers), flow)
        self._step_pairs.update(pair_kinds)
        b, _, f, h, w = batch.latents.shape
        self._samples += b
        self._cut_captions += cut_captions
        self._tokens += b * (f + batch.references.shape[1]) * h * w // 4

    def _add(self, places: Tensor, values: Tensor) -> None:
        """Adds values [b] of any type and device to the sums at their places [b], by number in `_names`."""
        places, values = places.to(self._step.device), values.to(self._step)
        self._step[0].index_add_(0, places, values)
        self._step[1].index_add_(0, places, torch.ones_like(values))

    def keep(self) -> None:
        """The step under way changed the model: its losses count."""
        self._sums += self._step
        self._pairs.update(self._step_pairs)
        self.drop()

    def drop(self) -> None:
        """The step under way was dropped; its samples count as work, not as losses."""
        self._step.zero_()
        self._step_pairs.clear()

    def reduce(self) -> dict[str, float]:
        """The means over all workers since the last call; all ranks must call. Without a step that was kept, no losses.

        Also the share of each kind of pairs, that of samples whose captions are cut, `samples` of all ranks, and
        `tokens`, those of this rank.
        """
        pairs_seen = [float(self._pairs[kind]) for kind in PAIR_KINDS]
        counted = torch.tensor([float(self._cut_captions), *pairs_seen, float(self._samples)])
        totals = torch.cat((self._sums.flatten(), counted.to(self._sums))).to(collective_device())
        dist.all_reduce(totals)
        size = len(self._names)
        values = totals.tolist()
        sums, counts, (cut, *pairs, samples) = values[:size], values[size : 2 * size], values[2 * size :]
        means = {name: s / c for name, s, c in zip(self._names, sums, counts, strict=True) if c}
        if "loss/flow" in means:
            means["loss"] = means["loss/flow"] + self._weight * means.get("loss/cross_pair", 0.0)
        means |= {f"pairs/{kind}": count / sum(pairs) for kind, count in zip(PAIR_KINDS, pairs, strict=True) if count}
        means |= {"cut_captions": cut / samples} if cut else {}
        means |= {"samples": samples, "tokens": float(self._tokens)}
        self._sums.zero_()
        self._pairs.clear()
        self._tokens = self._samples = self._cut_captions = 0
        return means
