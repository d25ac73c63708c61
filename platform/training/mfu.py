"""How much of a device's arithmetic the model uses: FLOPs of the batches against what the device can do at most, and
how evenly they are shared by the ranks."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from domainshuttle.cluster.devices import device_shown_as
from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.spec import ModelSpec
from domainshuttle.platform.config.schema import Trained, patterns_of
from domainshuttle.platform.engine.trained_parameters import with_adapters
from domainshuttle.platform.training.collective_device import collective_device


def peak_flops() -> float | None:
    """What this process's device can do in a second; None where that is not known, as on a CPU."""
    if not torch.cuda.is_available():
        return None
    device = device_shown_as(torch.cuda.get_device_name())
    return device.flops if device else None


class Utilization:
    """Counts the FLOPs that the mathematics of a rank's batches needs: recomputation is not work that was wanted."""

    def __init__(
        self, config: Mapping[str, Any], trained: Trained, peak: float | None = None, sharing: int = 1
    ) -> None:
        """`config` is the transformer's; `trained` is the stage's; `peak` in FLOP/s, None: the device's; `sharing`
        ranks compute a sample together."""
        spec, patterns = with_adapters(ModelSpec.of(config), trained), patterns_of(trained)
        self._peak = peak_flops() if peak is None else peak
        self._flops = 0
        self._micro_batches: list[int] = []
        """FLOPs of each since the last `balance`."""

        @cache
        def flops(size: tuple[int, int, int], b: int, references: int, paired: int | None, text: int) -> int:
            return (
                spec.step_flops(
                    size, batch=b, references=references, paired_references=paired, text_tokens=text, trained=patterns
                ).model
                // sharing
            )

        self._of = flops

    def add(self, batch: TrainingBatch) -> None:
        """Adds a micro-batch, forward and backward."""
        paired = batch.paired_references.shape[1] if batch.paired_references is not None else None
        size = batch.batch_size, batch.references.shape[1], paired, batch.text.shape[1]
        flops = self._of(batch.bucket, *size)
        self._flops += flops
        self._micro_batches.append(flops)

    def take(self, seconds: float) -> dict[str, float]:
        """`mfu`, the share of the peak since the last call, which was `seconds` ago; nothing where it is not known."""
        flops, self._flops = self._flops, 0
        return {} if self._peak is None else {"mfu": flops / seconds / self._peak}

    def balance(self) -> dict[str, float]:
        """`rank_balance`, of the micro-batches since the last call, of which all ranks have as many; all must call."""
        flops, self._micro_batches = self._micro_batches, []
        if not flops:
            return {}
        mine = torch.tensor(flops, dtype=torch.float64, device=collective_device())
        ranks = mine.new_empty(dist.get_world_size() * len(flops))
        dist.all_gather_into_tensor(ranks, mine)
        return {"rank_balance": evenness(ranks.view(-1, len(flops)).cpu().numpy())}


def evenness(flops: np.ndarray) -> float:
    """How much of the devices' time is work where all ranks wait for the longest: of FLOPs [ranks, micro-batches] the
    mean over the ranks against the longest, 1 where all are alike."""
    return float(flops.mean(0).sum() / flops.max(0).sum())
