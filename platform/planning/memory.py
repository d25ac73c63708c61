"""Memory of a device in training under ZeRO-3, part by part, known without torch (docs/planning.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from domainshuttle.model.spec import ModelSpec, Product
from domainshuttle.pipelines.errors import counted
from domainshuttle.platform.config.schema import EngineSection, StageSection
from domainshuttle.platform.engine.deepspeed_config import BlockSize

PRODUCTS: tuple[Product, ...] = ("attention", "qkv", "ffn")
"""By the FLOPs that a kept byte saves: attention 80,000 at 40,560 tokens, the others as many as the width."""

_CONTEXT = 2e9
"""Bytes that CUDA, NCCL and their buffers take of a device beside torch's tensors."""
_USABLE = 0.95
"""Share of a device's memory that tensors fill before its parts are too small."""
_WORK = 16
"""Bytes for each token and channel that a block's backward pass holds beside what was kept: four float32 tensors."""
_STEP_AT_ONCE = 1_000_000_000
"""Parameters that DeepSpeed steps at once (`sub_group_size`), with a float32 copy of their gradients."""
_FLOAT32_KEPT = ("time_embedder", "scale_shift_table", "scale_shift_table_ref", "norm1", "norm2", "norm3")
"""Parts of names of parameters that are float32 in a model of any type."""
_SHORT = {"bf16": 2, "float32": 4}


@dataclass(frozen=True)
class Policy:
    """What is kept of a forward pass: in how many of the recomputed blocks each product is, and how many blocks are not
    recomputed at all."""

    recomputed: int
    kept: Mapping[Product, int]
    whole: int = 0

    @classmethod
    def of(cls, engine: EngineSection, spec: ModelSpec) -> "Policy":
        """The policy of a configuration."""
        activations, layers = engine.activations, spec.num_layers
        if activations.mode == "none":
            return cls(0, {}, layers)
        recomputed = len(range(0, layers, activations.every or 1))
        return cls(recomputed, activations.kept(layers), layers - recomputed)

    def __str__(self) -> str:
        if not self.recomputed:
            return "all"
        parts = ["inputs", *(f"{product} {count}" for product, count in self.kept.items() if count)]
        return ", ".join(parts) + (f", {counted(self.whole, 'block')} whole" if self.whole else "")

    def setting(self) -> str:
        """The value of `engine.activations` that means it."""
        if not self.recomputed:
            return "{mode: none}"
        kept = {product: count for product, count in self.kept.items() if count}
        if not kept:
            return "{mode: full}"
        if kept == {"attention": self.recomputed}:
            return "{mode: attention}"
        return f"{{mode: products, keep: {{{', '.join(f'{name}: {count}' for name, count in kept.items())}}}}}"


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank's device, by part; the most that are held at a time."""

    parts: dict[str, float]

    @property
    def tensors(self) -> float:
        """What torch's allocator counts as its peak."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """With what CUDA and NCCL take beside."""
        return self.tensors + _CONTEXT

    def fits(self, capacity: float) -> bool:
        """Whether a device of `capacity` bytes holds it, with room for parts that are too small."""
        return self.room(capacity) >= 0

    def room(self, capacity: float) -> float:
        """Bytes that are left of a device; below 0 it lacks them."""
        return _USABLE * capacity - self.total


@dataclass(frozen=True)
class States:
    """Bytes that do not depend on the batch: of weights, gradients and optimiser, and of a gathered block."""

    parts: dict[str, float]
    stepping: float
    """What the optimiser's step takes instead of activations."""
    gathered_elements: float
    """Parameters of a block."""
    prefetched_elements: float
    """Parameters that the engine gathers ahead."""
    pass_bytes: float
    """Bytes of all weights in the types in which they are gathered."""
    trained: float
    """Parameters that are trained, of all ranks together."""

    @classmethod
    def of(cls, spec: ModelSpec, stage: StageSection, engine: EngineSection, ranks: int) -> "States":
        """Of a stage on so many ranks."""
        short = _SHORT[engine.precision]
        buckets = BlockSize.planned(spec, stage.trained)
        frozen = trained = whole = 0.0
        block = block_elements = block_trained = pass_bytes = 0.0
        for name, shape in spec.parameter_shapes().items():
            size = math.prod(shape)
            trains = any(fnmatchcase(name, pattern) for pattern in stage.patterns)
            exact = trains or any(part in _FLOAT32_KEPT for part in name.split("."))
            width = 4 if exact else short
            pass_bytes += size * width
            # small ones stay whole on every rank, beside the part that the optimiser steps
            if size <= engine.persistent_parameters and ranks > 1:
                whole += size * width
            if trains:
                trained += size
            else:
                frozen += size * width
            if name.startswith("blocks.1." if spec.num_layers > 1 else "blocks.0."):
                block += size * width
                block_elements += size
                block_trained += size if trains else 0
        held = trained / ranks
        offloaded = engine.offload_optimizer
        parts = {
            "frozen weights": frozen / ranks,
            # DeepSpeed steps masters and copies them into what is gathered, which is float32 too (deepspeed_config.py)
            "trained weights": 4 * held,
            "masters": 0.0 if offloaded else 4 * held,
            "moments": 0.0 if offloaded else 8 * held,
            "gradients": 0.0 if offloaded else 4 * held,
            "moving average": 4 * held if engine.ema is not None and not offloaded else 0.0,
            "parameters kept whole": whole,
            "snapshot for the pair loss": (
                short * spec.parameters() / ranks
                if stage.loss.cross_pair_weight and stage.loss.cross_pair_target == "snapshot"
                else 0.0
            ),
            "gathered blocks": (2 if ranks > 1 else 1) * block,
            "a block's gradients": 4 * block_trained,
            "reduction bucket": 4.0 * buckets.reduce_bucket,
        }
        return cls(
            parts,
            stepping=4.0 * min(_STEP_AT_ONCE, held),
            gathered_elements=block_elements,
            prefetched_elements=buckets.prefetch_bucket,
            pass_bytes=pass_bytes,
            trained=trained,
        )


def device_memory(
    spec: ModelSpec,
    stage: StageSection,
    states: States,
    policy: Policy,
    tokens: int,
    batch: int,
    precision: str = "bf16",
    reference_share: float = 1.0,
) -> Memory:
    """The most of a rank's device with micro-batches of `batch` samples of `tokens` tokens, of which `reference_share`
    are of references."""
    width = _SHORT[precision] / 2
    rows = batch * tokens
    block = spec.block_kept_bytes(tokens, stage.patterns, batch, reference_share) * (1 if width == 1 else 1.6)
    kept = sum(count * spec.product_bytes(tokens, batch)[product] * width for product, count in policy.kept.items())
    work = _WORK * rows * spec.dim
    activations = {
        "block inputs": policy.recomputed * rows * spec.dim * 2 * width,
        "kept products": kept,
        "blocks not run again": policy.whole * block,
        "a block at work": work + (block if policy.recomputed else 0),
    }
    if sum(activations.values()) >= states.stepping:
        return Memory({**states.parts, **activations})
    return Memory({**states.parts, "the optimiser's step": states.stepping})


def best_policy(
    spec: ModelSpec,
    stage: StageSection,
    states: States,
    tokens: int,
    batch: int,
    capacity: float,
    precision: str = "bf16",
    reference_share: float = 1.0,
) -> Policy | None:
    """The policy that runs the fewest FLOPs again and fits a device of `capacity` bytes; None: none fits.

    What saves most FLOPs a byte is kept first, in as many blocks as have room.
    """
    layers = spec.num_layers
    nothing = Policy(0, {}, layers)
    if device_memory(spec, stage, states, nothing, tokens, batch, precision, reference_share).fits(capacity):
        return nothing
    policy = Policy(layers, {})
    room = device_memory(spec, stage, states, policy, tokens, batch, precision, reference_share).room(capacity)
    if room < 0:
        return None
    kept: dict[Product, int] = {}
    sizes = spec.product_bytes(tokens, batch)
    for product in PRODUCTS:
        count = min(layers, int(room // (sizes[product] * _SHORT[precision] / 2)))
        if count:
            kept[product] = count
        room -= count * sizes[product] * _SHORT[precision] / 2
    return Policy(layers, kept)
