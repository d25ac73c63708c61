"""What a training step is worth knowing: losses by part, timestep, source and domain, summed over all workers."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from domainshuttle.model.batch import DOMAINS, TrainingBatch
from domainshuttle.model.objective import LossOutput

TIMESTEP_BUCKETS = 4


class LossMetrics:
    """Sums of per-sample losses since the last `reduce`, in one vector, so that one collective adds up all of them."""

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
        self._tokens = 0
        self.samples = 0

    def add(self, batch: TrainingBatch, loss: LossOutput) -> None:
        """Adds the samples of a micro-batch."""
        flow = loss.flow.double()
        self._add(torch.zeros_like(loss.timesteps, dtype=torch.long), flow)
        if loss.cross_pair is not None:
            self._add(torch.ones_like(loss.timesteps, dtype=torch.long), loss.cross_pair.double())
        bucket = (loss.timesteps * TIMESTEP_BUCKETS).long().clamp(0, TIMESTEP_BUCKETS - 1)
        self._add(2 + bucket, flow)
        none = torch.full_like(bucket, -1)
        domain = batch.reference_domains[:, 0] if batch.reference_domains.shape[1] else none
        self._add(self._domain_offset + 1 + domain.to(flow.device), flow)
        numbers = [self._sources[source] for source in batch.sources]
        self._add(self._source_offset + torch.tensor(numbers, device=flow.device), flow)
        b, _, f, h, w = batch.latents.shape
        self.samples += b
        self._tokens += b * (f + batch.references.shape[1]) * h * w // 4

    def _add(self, places: Tensor, values: Tensor) -> None:
        self._sums[0].index_add_(0, places, values)
        self._sums[1].index_add_(0, places, torch.ones_like(values))

    def reduce(self) -> dict[str, float]:
        """The means over all workers since the last call; all ranks must call. Also `tokens`, those of this rank."""
        totals = self._sums.to("cpu" if dist.get_backend() == "gloo" else self._sums.device)
        dist.all_reduce(totals)
        sums, counts = totals.tolist()
        means = {name: s / c for name, s, c in zip(self._names, sums, counts, strict=True) if c}
        if "loss/flow" in means:
            means["loss"] = means["loss/flow"] + self._weight * means.get("loss/cross_pair", 0.0)
        means["tokens"] = float(self._tokens)
        means["samples"] = counts[0]
        self._sums.zero_()
        self._tokens = self.samples = 0
        return means
