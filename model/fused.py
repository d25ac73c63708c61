"""A block of which everything between the products is one kernel each way: the same mathematics as ``mot.py``.

That module's code is the reference, and what runs on CPUs. Here norms, modulation, residuals, gates and rotations are
operators of torch (``fused_operators.py``). GELU stays torch's own kernel, which reads and writes once too. Values
differ from the reference by rounding: what a chain holds between its steps is not rounded to bf16 here.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from domainshuttle.model.fused_operators import (
    gate_op,
    gated_residual_op,
    projections_op,
    residual_norm_backward_op,
    residual_norm_op,
    rms_rotary_backward_op,
    rms_rotary_op,
    sums_op,
)
from domainshuttle.model.lora import LoraLinear
from domainshuttle.model.mixed_precision import float32_product
from domainshuttle.model.modulation import Rows
from domainshuttle.model.mot import DomainMoTBlock, FinalDomainMoTBlock, JointAttention
from domainshuttle.model.products import computing


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def fuse(model: nn.Module) -> None:
    """Makes the blocks of a transformer compute with kernels."""
    for block in model.blocks:
        block.transform = functools.partial(transform, block)


def transform(
    block: DomainMoTBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    conditioning: Rows,
    rotary_emb: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
) -> Tensor:
    """``block.transform`` by kernels."""
    tokens, references = hidden_states.shape[2], conditioning.references
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = block.modulation(conditioning)

    # Joint self-attention
    _, normed = residual_norm(hidden_states, None, None, scale, shift, block.norm1.eps)
    attended = _attention(block.attn1, normed.flatten(1, 2), references * tokens, rotary_emb, attention_mask)
    attended = attended.unflatten(1, (-1, tokens))
    if isinstance(block, FinalDomainMoTBlock):
        video = hidden_states.shape[1] - references
        hidden_states, attended = hidden_states[:, :video].contiguous(), attended[:, :video].contiguous()
        gate, ffn_shift, ffn_scale, ffn_gate = (
            rows.without_references() for rows in (gate, ffn_shift, ffn_scale, ffn_gate)
        )

    # Its residual, and cross-attention to the text
    if isinstance(block.norm2, nn.Identity):
        hidden_states = normed = gated_residual(hidden_states, attended, gate)
    else:
        hidden_states, normed = residual_norm(
            hidden_states, attended, gate, block.norm2.weight, block.norm2.bias, block.norm2.eps
        )
    cross, flat = block.attn2, normed.flatten(1, 2)
    query = rms_rotary(cross.to_q(flat), cross.norm_q).unflatten(2, (cross.heads, -1))
    key = cross.norm_k(cross.to_k(encoder_hidden_states)).unflatten(2, (cross.heads, -1))
    value = cross.to_v(encoder_hidden_states).unflatten(2, (cross.heads, -1))
    attended = cross.processor.attend(query, key, value)
    attended = cross.to_out[0](attended.flatten(2, 3).type_as(query)).unflatten(1, (-1, tokens))

    # Its residual, and feed-forward
    hidden_states, normed = residual_norm(hidden_states, attended, None, ffn_scale, ffn_shift, block.norm3.eps)
    return gated_residual(hidden_states, block.ffn(normed), ffn_gate)


def _attention(
    attn: JointAttention,
    x: Tensor,
    num_reference_tokens: int,
    rotary_emb: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
) -> Tensor:
    query, key, value = project(attn, x, num_reference_tokens)
    query = rms_rotary(query, attn.norm_q, rotary_emb).unflatten(2, (attn.heads, -1))
    key = rms_rotary(key, attn.norm_k, rotary_emb).unflatten(2, (attn.heads, -1))
    value = value.unflatten(2, (attn.heads, -1))
    out = attn.processor.attend(attn, query, key, value, attention_mask)
    return attn.to_out[0](out.flatten(2, 3).type_as(query))


# Residual, gate, norm and modulation


def residual_norm(
    x: Tensor, update: Tensor | None, gate: Rows | None, scale: Rows | Tensor, shift: Rows | Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate update, and its layer norm, scaled and shifted by frame, or by a norm's weight and bias [d]."""
    rows = [] if gate is None else list(gate)
    by_frame = isinstance(scale, Rows)
    affine = [*scale, *shift] if by_frame else [scale, shift]
    out, normed = _ResidualNorm.apply(x, update, gate is not None, by_frame, eps, *rows, *affine)
    return (x if update is None else out), normed


def gated_residual(x: Tensor, update: Tensor, gate: Rows) -> Tensor:
    """x + gate update."""
    y: Tensor = _GatedResidual.apply(x, update, *gate)
    return y


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, gated: bool, by_frame: bool, eps: float, *rows: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        gates, affine = (rows[:2], rows[2:]) if gated else ((), rows)
        gate = torch.cat(gates, 1).flatten(1).view(x.shape[0], -1, x.shape[-1]) if gated else None
        scale, shift = _affine(x, affine, by_frame)
        references = gates[1].shape[1] if gated else affine[1].shape[1] if by_frame else 0
        video = x.shape[1] - references
        out, normed, means, rstds = residual_norm_op(x, update, gate, scale, shift, by_frame, video, eps)
        ctx.sizes = gated, by_frame, references
        ctx.gate, ctx.scale, ctx.updated = gate, scale, update is not None
        ctx.save_for_backward(x if update is None else out, means, rstds)
        ctx.update = None
        if update is not None and gated and any(ctx.needs_input_grad[5:7]):
            # the references' alone where the video's gate is frozen; out of reach of activation checkpointing
            ctx.update = update if ctx.needs_input_grad[5] else update[:, video:].clone()
        return (None if update is None else out), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_out: Tensor | None, for_normed: Tensor) -> tuple[Any, ...]:
        out, means, rstds = ctx.saved_tensors
        gated, by_frame, references = ctx.sizes
        video = out.shape[1] - references
        for_out = for_out.contiguous() if ctx.updated and for_out is not None else None
        for_normed = for_normed.contiguous()
        for_x, for_update = residual_norm_backward_op(
            out, ctx.gate, ctx.scale, means, rstds, for_out, for_normed, by_frame, video
        )
        wanted = ctx.needs_input_grad[5:]
        gates: list[Tensor | None] = []
        if gated:
            gates = _by_frame(for_x, ctx.update, None, references, wanted[:2])[1]
            ctx.update = None
        affine = wanted[2:] if gated else wanted
        if by_frame:
            either = (affine[0] or affine[2], affine[1] or affine[3])
            shifts, scales = _by_frame(for_normed, out, (means, rstds), references, either)
            rows: list[Tensor | None] = [*scales, *shifts]
        else:
            rows = [None, None]
            if any(affine):
                sums, products = sums_op(for_normed, out, means, rstds, 0)
                rows = [products.sum((0, 1)).to(ctx.scale.dtype), sums.sum((0, 1)).to(ctx.scale.dtype)]
        given = [one if wants else None for one, wants in zip([*gates, *rows], wanted, strict=True)]
        update = None if not ctx.updated else for_update if gated else for_x
        return for_x, update, None, None, None, *given


class _GatedResidual(torch.autograd.Function):
    """Keeps the references' part of ``update`` itself, as ``modulation.gated_residual`` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, video: Tensor, reference: Tensor) -> Tensor:
        ctx.gate = torch.cat([video, reference], 1).flatten(2)
        ctx.references = reference.shape[1]
        first = x.shape[1] - ctx.references
        ctx.update = None
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(update)
        elif ctx.needs_input_grad[3]:
            ctx.update = update[:, first:].clone()
        return gated_residual_op(x, update, ctx.gate, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient = gradients[0].contiguous()
        wants_x, wants_update, *wanted = ctx.needs_input_grad
        for_update = None
        if wants_update:
            for_update = gate_op(gradient, ctx.gate, gradient.shape[1] - ctx.references)
        update = ctx.saved_tensors[0] if wanted[0] else ctx.update
        ctx.update = None
        gates = _by_frame(gradient, update, None, ctx.references, wanted)[1]
        return gradients[0] if wants_x else None, for_update, *gates


def _affine(x: Tensor, rows: tuple[Tensor, ...], by_frame: bool) -> tuple[Tensor, Tensor]:
    if not by_frame:
        return rows[0].view(1, 1, -1), rows[1].view(1, 1, -1)
    return torch.cat(rows[:2], 1).flatten(2), torch.cat(rows[2:], 1).flatten(2)


def _by_frame(
    gradient: Tensor, by: Tensor | None, norm: tuple[Tensor, Tensor] | None, references: int, wanted: Any
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Sums of a gradient, and of its product with `by`, over the tokens of the video [b, 1, 1, d] and of each
    reference [b, r, 1, d], where they are wanted; of `norm`, means and deviations, `by` is normalised first."""
    if not any(wanted):
        return [None, None], [None, None]
    b, frames, _, d = gradient.shape
    if by is None:  # of no references
        by = gradient[:, :0]
    skipped = 0 if wanted[0] else frames - references
    if skipped == frames:
        empty = gradient.new_zeros(b, 0, 1, d, dtype=torch.float32)
        return [None, empty], [None, empty]
    means, rstds = norm or (None, None)
    both = []
    for one in sums_op(gradient, by, means, rstds, skipped):
        own = one[:, one.shape[1] - references :, None]
        video = one[:, : one.shape[1] - references].sum(1, keepdim=True)[:, :, None] if wanted[0] else None
        both.append([video, own if wanted[1] else None])
    return both[0], both[1]


# RMS norm and rotation


def rms_rotary(x: Tensor, norm: nn.RMSNorm, rotary_emb: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The RMS norm of tokens [b, n, d] over d, then, where angles are given, the rotation of their heads."""
    cos, sin = rotary_emb or (None, None)
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    y: Tensor = _RMSRotary.apply(x, norm.weight, cos, sin, eps)
    return y


class _RMSRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
        y, rstds = rms_rotary_op(x, weight, cos, sin, eps)
        ctx.save_for_backward(x, weight, rstds)
        ctx.angles = cos, sin
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight, rstds = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        for_x, sums = rms_rotary_backward_op(x, weight, *ctx.angles, rstds, gradients[0].contiguous(), wants_weight)
        return for_x, sums.sum(0).to(weight.dtype) if wants_weight else None, None, None, None


# Query, key and value


def project(attn: JointAttention, x: Tensor, num_reference_tokens: int) -> tuple[Tensor, ...]:
    """Query, key and value [b, n, d]: each product of a single sample is written to its place at once."""
    if attn.reference_projections == "shared" or x.shape[0] > 1:
        return attn.project(x, num_reference_tokens)
    if any(isinstance(layer, LoraLinear) for layer in attn.children()):
        return attn.project(x, num_reference_tokens)
    layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_q_ref, attn.to_k_ref, attn.to_v_ref)
    parameters = [one for layer in layers for one in (layer.weight, layer.bias)]
    with computing("qkv"):
        projected: tuple[Tensor, ...] = _Projections.apply(x, x.shape[1] - num_reference_tokens, *parameters)
    return projected


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_video: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.num_video = num_video
        ctx.save_for_backward(x, *parameters)
        return projections_op(x, list(parameters), num_video)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        for_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None] * len(parameters)
        parts = slice(ctx.num_video), slice(ctx.num_video, None)
        for number, gradient in enumerate(gradients):
            for place, part in enumerate(parts):
                index = 2 * number + 6 * place
                rows, weight = gradient[0, part], parameters[index]
                if for_x is not None:
                    rounded, own = weight.to(x.dtype), for_x[0, part]
                    if number:
                        own.addmm_(rows, rounded)  # added inside of the product
                    else:
                        torch.mm(rows, rounded, out=own)
                if ctx.needs_input_grad[2 + index]:
                    found[index] = float32_product(rows, x[0, part]).to(weight.dtype)
                if ctx.needs_input_grad[3 + index]:
                    found[index + 1] = rows.sum(0, dtype=torch.float32).to(parameters[index + 1].dtype)
        return for_x, None, *found
