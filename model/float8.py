"""Products of frozen layers in float8 (e4m3): an opt-in of its own, since it changes numbers by more than rounding.

Each token, and each channel of a weight, has a scale of its own, which takes its largest value to float8's. A product
is then some 3% off in relative norm; gradients of what lies before are computed so too. Trained layers are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.functional import ScalingType

LARGEST = 448.0
_ALIGNED = 16
"""Channels in and out must be multiples of it."""


class Float8Linear(nn.Linear):
    """A frozen linear layer whose product is computed in float8."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] of the type of ``x``."""
        y: Tensor = _Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def use_float8(model: nn.Module) -> list[str]:
    """Makes the frozen layers of the blocks that see every token compute in float8; returns their names."""
    changed = []
    for name, layer in model.named_modules():
        of_text = name.endswith(("attn2.to_k", "attn2.to_v"))
        if not name.startswith("blocks.") or of_text or not isinstance(layer, nn.Linear):
            continue
        aligned = layer.in_features % _ALIGNED == layer.out_features % _ALIGNED == 0
        if aligned and not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.__class__ = Float8Linear
            changed.append(name)
    return changed


class _Product(torch.autograd.Function):
    """Saves the weight and not what it is rounded to, so that ZeRO-3 can free what it gathered after the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0], weight.t()) if ctx.needs_input_grad[0] else None, None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], in the type of ``x``."""
    rows, by_row = _rounded(x.flatten(0, -2))
    columns, by_column = _rounded(weight)
    # the kernel writes bf16
    y = F.scaled_mm(
        rows, columns.t(), by_row, ScalingType.RowWise, by_column.t(), ScalingType.RowWise, output_dtype=torch.bfloat16
    )
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, k] in float8, and what each is to be multiplied with, [n, 1] float32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale
