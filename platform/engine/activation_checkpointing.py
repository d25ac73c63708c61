"""Activation checkpointing of the blocks: what is kept of a forward pass, what is computed again, and where it lies.

All modes compute the same numbers in the same order, so the gradients are those of a model without it, bit for bit.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from domainshuttle.platform.config.schema import ActivationSection


def checkpoint_blocks(model: Any, section: ActivationSection) -> None:
    """Makes a transformer's blocks recompute what the section says."""
    if section.mode == "none":
        return
    selective: dict[str, Any] = {}
    if section.mode == "attention":
        selective["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)

    def run(transform: Callable[..., Tensor], hidden_states: Tensor, *others: Any) -> Tensor:
        with _on_host(hidden_states) if section.offload else contextlib.nullcontext():
            out: Tensor = checkpoint(transform, hidden_states, *others, use_reentrant=False, **selective)
        return out

    model.enable_gradient_checkpointing(run)
    for number, block in enumerate(model.blocks):
        block.gradient_checkpointing = number % (section.every or 1) == 0


def _keep_attention(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Keeps what a fused attention returns, the most expensive part of a block to compute again."""
    fused = any(part in str(operator) for part in ("attention", "attn"))
    return CheckpointPolicy.MUST_SAVE if fused else CheckpointPolicy.PREFER_RECOMPUTE


def _on_host(kept: Tensor) -> saved_tensors_hooks:
    """While it is active, `kept` is saved in the host's memory; all else, such as the text of all blocks, stays.

    The copies are queued on the stream that computes, so they need no further synchronisation.
    """

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.data_ptr() != kept.data_ptr() or tensor.shape != kept.shape:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        device, host = saved
        return host.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
