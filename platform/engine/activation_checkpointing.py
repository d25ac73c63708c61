"""Activation checkpointing of the blocks: what is kept of a forward pass, what is computed again, and where it lies.

All modes compute the same numbers in the same order, so the gradients are those of a model without it, bit for bit.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from domainshuttle.model import fused_operators  # noqa: F401  declares them
from domainshuttle.model.products import computed
from domainshuttle.model.spec import Product
from domainshuttle.platform.config.schema import ActivationSection
from domainshuttle.platform.engine.activation_offload import Offload

_PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.domainshuttle.projections.default)
"""Operators that make linear products."""


def checkpoint_blocks(model: Any, section: ActivationSection) -> None:
    """Makes a transformer's blocks recompute what the section says."""
    if section.mode == "none":
        return
    keep = section.kept(len(model.blocks))
    offload = Offload() if section.offload else None

    def run(kept: frozenset[Product], transform: Callable[..., Tensor], hidden_states: Tensor, *others: Any) -> Tensor:
        selective: dict[str, Any] = {}
        if kept:
            policy = functools.partial(_policy, kept)
            selective["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
        with contextlib.nullcontext() if offload is None else offload.saving(hidden_states):
            out: Tensor = checkpoint(transform, hidden_states, *others, use_reentrant=False, **selective)
        return out

    for number, block in enumerate(model.blocks):
        kept = frozenset(product for product, blocks in keep.items() if number < blocks)
        block.gradient_checkpointing = number % (section.every or 1) == 0
        block._gradient_checkpointing_func = functools.partial(run, kept)


def _policy(kept: frozenset[Product], _: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Keeps what a fused self-attention returns, which has as many keys as queries (the text's has others, and costs
    little), and the linear products that are computed as one of `kept`."""
    if operator in _PRODUCTS:
        wanted = computed() in kept
    else:
        fused = any(part in str(operator) for part in ("attention", "attn"))
        wanted = fused and "attention" in kept and len(args) > 1 and args[0].shape == args[1].shape
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE
