"""One training batch: what the loader hands to the objective, and the only type that both know."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from domainshuttle.model.domains import DOMAINS


@dataclass(frozen=True)
class TrainingBatch:
    """Encoded samples of one bucket, so that every tensor is rectangular.

    ``b`` samples, ``r`` reference slots (padding at the end, where ``reference_mask`` is False), latents of ``f``
    frames and ``h x w`` positions. Reference latents have the size of one video frame.

    Raises:
        ValueError: when shapes contradict each other; the message lists every contradiction.
    """

    latents: Tensor
    """[b, 16, f, h, w] normalised latents of the target video (one frame for a picture)."""
    text: Tensor
    """[b, l, text_dim] text embedding, padded with zeros."""
    references: Tensor
    """[b, r, 16, h, w] normalised latents of the reference pictures."""
    reference_subjects: Tensor
    """[b, r] int64, index of the subject that a picture shows."""
    reference_domains: Tensor
    """[b, r] int64, domain id (see :data:`DOMAINS`), -1 for none."""
    reference_mask: Tensor | None
    """[b, r] bool, True where a slot holds a picture; None when all do."""
    sample_ids: Tensor
    """[b] int64, stable hash of the sample's key: it seeds noise and timestep."""
    sources: tuple[str, ...]
    """b names of the corpora that the samples came from, for the logs."""
    paired_references: Tensor | None = None
    """[b, r*, 16, h, w] the other pictures of the same subjects, for the cross-pair loss; r* may differ from r."""
    paired_reference_subjects: Tensor | None = None
    paired_reference_domains: Tensor | None = None
    paired_reference_mask: Tensor | None = None

    def __post_init__(self) -> None:
        problems = [
            f"latents must be [b, c, f, h, w], not {list(self.latents.shape)}" if self.latents.ndim != 5 else "",
            f"text must be [b, l, text_dim], not {list(self.text.shape)}" if self.text.ndim != 3 else "",
        ]
        if not any(problems):
            b, c, _, h, w = self.latents.shape
            if self.text.shape[0] != b or len(self.sources) != b or tuple(self.sample_ids.shape) != (b,):
                problems.append(
                    f"latents hold {b} samples, but text {self.text.shape[0]}, sources {len(self.sources)} "
                    f"and sample_ids {list(self.sample_ids.shape)}"
                )
            for prefix in ("", "paired_"):
                problems += self._reference_problems(prefix, (b, c, h, w))
        if any(problems):
            raise ValueError("TrainingBatch does not fit together: " + "; ".join(p for p in problems if p))

    def _reference_problems(self, prefix: str, size: tuple[int, int, int, int]) -> list[str]:
        """Contradictions of one reference set with latents of ``size`` (b, c, h, w)."""
        references = getattr(self, f"{prefix}references")
        labels = {name: getattr(self, f"{prefix}reference_{name}") for name in _LABELS}
        if references is None:
            given = [f"{prefix}reference_{name}" for name, value in labels.items() if value is not None]
            return [f"{given} given without {prefix}references"] if given else []
        b, c, h, w = size
        r = references.shape[1] if references.ndim == 5 else "r"
        problems = []
        if tuple(references.shape) != (b, r, c, h, w):
            problems.append(f"{prefix}references must be [{b}, r, {c}, {h}, {w}], not {list(references.shape)}")
        for name, value in labels.items():
            if value is None and name == "mask":
                continue
            if value is None or tuple(value.shape) != (b, r):
                shape = None if value is None else list(value.shape)
                problems.append(f"{prefix}reference_{name} must be [{b}, {r}], not {shape}")
        return problems

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return self.latents.shape[0]

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        _, _, f, h, w = self.latents.shape
        return f, h, w

    @property
    def has_pairs(self) -> bool:
        """Whether the batch carries the second reference set of the cross-pair loss."""
        return self.paired_references is not None

    def reference_inputs(self, *, paired: bool = False) -> dict[str, Tensor | None]:
        """Keyword arguments of the network for the references, or for the second set in their place."""
        prefix = "paired_" if paired else ""
        labels = {f"reference_{name}": getattr(self, f"{prefix}reference_{name}") for name in _LABELS}
        return {"reference_latents": getattr(self, f"{prefix}references"), **labels}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TrainingBatch:
        """Move to ``device``, floating-point tensors also to ``dtype``.

        A mask on the CPU that masks nothing becomes None on the way: attention without a mask runs the flash kernels,
        and once the mask is on the accelerator the question would cost a synchronisation.
        """
        moved: dict[str, Tensor | None] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            if field.name.endswith("reference_mask") and value.device.type == "cpu" and bool(value.all()):
                moved[field.name] = None
            else:
                moved[field.name] = value.to(
                    device, dtype if value.is_floating_point() else None, non_blocking=value.is_pinned()
                )
        return replace(self, **moved)

    @classmethod
    def fake(
        cls,
        batch_size: int = 2,
        *,
        frames: int = 2,
        height: int = 8,
        width: int = 8,
        references: int = 2,
        channels: int = 16,
        text_tokens: int = 8,
        text_dim: int = 64,
        paired: bool = True,
        mask_tail: bool = False,
        num_domains: int = len(DOMAINS),
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TrainingBatch:
        """Random batch of a given size, for dry runs, benchmarks and tests.

        ``frames``, ``height``, ``width`` are latent sizes. With ``mask_tail`` sample i keeps i mod (references + 1)
        pictures, else every slot holds one (and the mask is None).
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def labels() -> dict[str, Tensor | None]:
            slots = torch.arange(references).expand(batch_size, references)
            real = slots < (torch.arange(batch_size) % (references + 1))[:, None]
            return {
                "references": normal(batch_size, references, channels, height, width),
                "reference_subjects": slots.clone(),
                "reference_domains": torch.randint(-1, num_domains, (batch_size, references), generator=generator),
                "reference_mask": real if mask_tail else None,
            }

        pairs = {f"paired_{name}": value for name, value in labels().items()} if paired else {}
        batch = cls(
            latents=normal(batch_size, channels, frames, height, width),
            text=normal(batch_size, text_tokens, text_dim),
            sample_ids=torch.randint(-(2**62), 2**62, (batch_size,), generator=generator),
            sources=("fake",) * batch_size,
            **labels(),
            **pairs,
        )
        return batch.to(device, dtype)


_LABELS = ("subjects", "domains", "mask")
"""What a set of references has beside their latents."""
