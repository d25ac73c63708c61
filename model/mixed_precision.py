"""Mixed precision: float32 parameters in layers that compute in bf16.

A trained parameter is float32. A layer that computes in a lower precision rounds it for the product, and makes its
gradient in float32: the products of a whole micro-batch are added up there, and nothing is rounded on the way to the
sum over micro-batches and ranks. (The gradient of a bf16 parameter is rounded to bf16 once a micro-batch.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the type of ``x`` [..., in]; the gradients of W and b have their own types.

    For the backward pass the parameter W itself is held, no view or rounded copy of it, so that ZeRO-3 can free what
    it gathered; and of ``x`` only what is needed, nothing where W is frozen.
    """
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class MixedLinear(nn.Linear):
    """A linear layer that computes in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] of the type of ``x``."""
        return linear(x, self.weight, self.bias)


class MixedRMSNorm(nn.RMSNorm):
    """An RMS norm over the last dimension, with the weight rounded to the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] of the type of ``x``."""
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        y: Tensor = _RMSNorm.apply(x, self.weight, eps)
        return y


_MIXED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MixedLinear, nn.RMSNorm: MixedRMSNorm}


def mix_precision(model: nn.Module) -> None:
    """Makes a network's layers compute in the type of what comes in, whatever type their parameters have.

    Names, parameters and hooks stay: a layer only changes its class.
    """
    for module in model.modules():
        mixed = _MIXED.get(type(module))
        if mixed is not None:
            module.__class__ = mixed


class _Linear(torch.autograd.Function):
    """Where the types agree, torch's own product and gradients, bit for bit.

    The weight is no saved tensor: where it is frozen nothing is saved at all, and activation checkpointing, which runs
    a block again up to the last tensor that was saved, does not run this product for itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.weight = weight if wants_x else None
        ctx.types = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if wants_weight else None)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        of_weight, of_bias = ctx.types
        rows = gradient.flatten(0, -2)
        for_weight = None
        if wants_weight:
            (x,) = ctx.saved_tensors
            x = x.flatten(0, -2)
            for_weight = rows.t() @ x if of_weight == x.dtype else float32_product(rows, x).to(of_weight)
        for_x = rows @ ctx.weight.to(rows.dtype) if wants_x else None
        return (
            None if for_x is None else for_x.unflatten(0, gradient.shape[:-1]),
            for_weight,
            rows.sum(0, dtype=of_bias) if wants_bias else None,
        )


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right [n, m] in float32, of rows left [k, n] and right [k, m] in bf16: a weight's gradient."""
    if left.is_cuda or left.is_meta:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient, rounded = gradients[0].float(), weight.to(x.dtype).float()
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + ctx.eps)
        normed = x.float() * scale
        wants_x, wants_weight, _ = ctx.needs_input_grad
        for_x = None
        if wants_x:
            inner = gradient * rounded
            for_x = ((inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale).to(x.dtype)
        return for_x, (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype) if wants_weight else None, None
