"""The paper's table, to stand beside ours: other cases, other seeds, other decoders. It is never mixed in.

Source: arXiv 2606.26058. Columns as the paper has them; the labels are those of our metrics.
"""

from collections.abc import Sequence
from typing import Any

METRICS = ("aes", "ms", "gme", "nano_clip", "qwen_clip", "cd_score", "qwen_score", "dino_i", "clip_i")
_TABLE = """
Kling 1.6              0.515 0.965 0.596 0.621 0.640 0.725 0.771 0.401 0.672
MAGREF                 0.491 0.964 0.678 0.618 0.638 0.499 0.705 0.312 0.685
SkyReels-V3            0.481 0.920 0.656 0.593 0.616 0.493 0.681 0.407 0.673
HuMo                   0.479 0.981 0.663 0.609 0.636 0.495 0.681 0.317 0.682
BindWeave              0.450 0.963 0.617 0.598 0.612 0.510 0.629 0.317 0.681
Phantom                0.515 0.972 0.660 0.602 0.645 0.506 0.703 0.322 0.701
VACE-Wan2.1            0.517 0.985 0.671 0.622 0.644 0.538 0.769 0.326 0.695
VACE-Wan2.2            0.480 0.974 0.685 0.606 0.622 0.546 0.679 0.303 0.679
FFGO-Wan2.2            0.410 0.945 0.653 0.589 0.611 0.558 0.667 0.274 0.662
DomainShuttle, Wan2.1  0.510 0.977 0.689 0.627 0.647 0.787 0.781 0.405 0.703
DomainShuttle, Wan2.2  0.516 0.987 0.705 0.636 0.658 0.861 0.829 0.400 0.690
"""
TITLES = ("AES", "MS", "GMEScore", "NANO-CLIP", "Qwen-CLIP", "CD-Score", "Qwen-Score", "DINO-I", "CLIP-I")


def published() -> dict[str, dict[str, float]]:
    """The paper's means by model and metric."""
    found = {}
    for line in _TABLE.strip().splitlines():
        *name, values = line[:23].strip(), line[23:].split()
        found[name[0]] = dict(zip(METRICS, map(float, values), strict=True))
    return found


def published_table(labels: Sequence[str]) -> dict[str, Any] | None:
    """The columns that ours has too; None where it has none of them."""
    chosen = [name for name in METRICS if name in labels]
    if not chosen:
        return None
    return {
        "fields": ["published", *(TITLES[METRICS.index(name)] for name in chosen)],
        "rows": [[model, *(f"{values[name]:.3f}" for name in chosen)] for model, values in published().items()],
    }
