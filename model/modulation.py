"""Modulation of tokens by their frame: all frames of the video share a row, every reference has its own.

The rows of the video and of the references are two tensors, since in most of training only the references' need a
gradient: sums over their tokens alone, and what those need of the forward pass is a fifth of it at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rows(NamedTuple):
    """What tokens [b, F, s, d] of f video frames and then r references are scaled, shifted or gated by, float32."""

    video: Tensor
    """[b, 1, 1, d]"""
    reference: Tensor
    """[b, r, 1, d]"""

    @property
    def references(self) -> int:
        """r."""
        return self.reference.shape[1]

    def over(self, frames: int) -> Tensor:
        """[b, F, 1, d] for ``frames`` = F frames."""
        return torch.cat([self.video.expand(-1, frames - self.references, -1, -1), self.reference], 1)

    def without_references(self) -> Rows:
        """The rows of the video alone; the references' get a gradient of zero."""
        return Rows(self.video, self.reference[:, :0])


def scale_shift(x: Tensor, scale: Rows, shift: Rows, dtype: torch.dtype) -> Tensor:
    """x scale + shift of tokens [b, F, s, d], computed in float32, returned in ``dtype``."""
    y: Tensor = _ScaleShift.apply(x, *scale, *shift, dtype)
    return y


def gated_residual(x: Tensor, update: Tensor, gate: Rows) -> Tensor:
    """x + update gate of tokens [b, F, s, d], computed in float32, returned in the type of ``x``."""
    y: Tensor = _GatedResidual.apply(x, update, *gate)
    return y


class _ScaleShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, video: Tensor, reference: Tensor, shift: Tensor, shift_reference: Tensor, dtype: Any
    ) -> Tensor:
        frames, scale = x.shape[1], Rows(video, reference)
        ctx.scale, ctx.references = scale, scale.references
        _, ctx.for_video, ctx.for_references, *_ = ctx.needs_input_grad
        ctx.save_for_backward(_needed(x, ctx))
        return torch.addcmul(Rows(shift, shift_reference).over(frames), x, scale.over(frames)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].float()
        wants_x, _, _, *shifts = ctx.needs_input_grad[:5]
        scales = _sums(gradient, ctx.saved_tensors[0], ctx, (ctx.for_video, ctx.for_references))
        return (
            gradient * ctx.scale.over(gradient.shape[1]) if wants_x else None,
            *scales,
            *_sums(gradient, None, ctx, shifts),
            None,
        )


class _GatedResidual(torch.autograd.Function):
    """Keeps the references' part of ``update`` itself, out of reach of activation checkpointing: it would compute the
    product that made it again, for that alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, video: Tensor, reference: Tensor) -> Tensor:
        ctx.gate, ctx.types = Rows(video, reference), (x.dtype, update.dtype)
        ctx.references = ctx.gate.references
        _, _, ctx.for_video, ctx.for_references = ctx.needs_input_grad
        ctx.kept = None
        if ctx.for_video:
            ctx.save_for_backward(update)
        elif ctx.for_references:
            ctx.kept = _needed(update, ctx)
        return torch.addcmul(x.float(), update.float(), ctx.gate.over(x.shape[1])).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].float()
        wants_x, wants_update, *gates = ctx.needs_input_grad
        update = ctx.saved_tensors[0] if ctx.for_video else ctx.kept
        ctx.kept = None
        return (
            gradients[0] if wants_x else None,
            (gradient * ctx.gate.over(gradient.shape[1])).to(ctx.types[1]) if wants_update else None,
            *_sums(gradient, update, ctx, gates),
        )


def _needed(x: Tensor, ctx: Any) -> Tensor | None:
    """What the gradients of rows need of ``x`` [b, F, s, d]: all, the references' tokens, or nothing."""
    if ctx.for_video:
        return x
    # a copy: what is kept of a part would keep the whole
    return x[:, x.shape[1] - ctx.references :].clone() if ctx.for_references else None


def _sums(gradient: Tensor, by: Tensor | None, ctx: Any, wanted: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows of the video and of the references: sums over their tokens, of the product with ``by``
    (of all frames, or of the references' alone) where that is given."""
    first = gradient.shape[1] - ctx.references
    for_video, for_references = wanted
    video = reference = None
    if for_video:
        part = gradient[:, :first]
        video = (part if by is None else part * by[:, :first]).sum((1, 2), keepdim=True)
    if for_references:
        part = gradient[:, first:]
        reference = (part if by is None else part * by[:, -part.shape[1] :] if part.shape[1] else part).sum(
            2, keepdim=True
        )
    return video, reference
