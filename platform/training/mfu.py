"""How much of a device's arithmetic the model uses: FLOPs of the batches against what the device can do at most."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from domainshuttle.cluster.devices import device_shown_as
from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.spec import ModelSpec


def peak_flops() -> float | None:
    """What this process's device can do in a second; None where that is not known, as on a CPU."""
    if not torch.cuda.is_available():
        return None
    device = device_shown_as(torch.cuda.get_device_name())
    return device.flops if device else None


class Utilization:
    """Counts the FLOPs that the mathematics of a rank's batches needs: recomputation is not work that was wanted."""

    def __init__(self, config: Mapping[str, Any], trained: Sequence[str], peak: float | None = None) -> None:
        """`config` is the transformer's; `trained` are patterns of parameters; `peak` in FLOP/s, None: the device's."""
        spec = ModelSpec.of(config)
        self._peak = peak_flops() if peak is None else peak
        self._flops = 0

        @cache
        def flops(size: tuple[int, int, int], b: int, references: int, paired: int | None, text: int) -> int:
            return spec.step_flops(
                size, batch=b, references=references, paired_references=paired, text_tokens=text, trained=trained
            ).model

        self._of = flops

    def add(self, batch: TrainingBatch) -> None:
        """Adds a micro-batch, forward and backward."""
        if self._peak is None:
            return
        paired = batch.paired_references.shape[1] if batch.paired_references is not None else None
        size = batch.batch_size, batch.references.shape[1], paired, batch.text.shape[1]
        self._flops += self._of(batch.bucket, *size)

    def take(self, seconds: float) -> dict[str, float]:
        """`mfu`, the share of the peak since the last call, which was `seconds` ago; nothing where it is not known."""
        flops, self._flops = self._flops, 0
        return {} if self._peak is None else {"mfu": flops / seconds / self._peak}
