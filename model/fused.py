"""A block of which everything between the products is one kernel each way: the same mathematics as ``mot.py``.

That module's code is the reference, and what runs on CPUs. Here norms, modulation, residuals, gates and rotations are
operators of torch (``domainshuttle::...``) with Triton kernels (``triton_kernels.py``): on a GPU, or on a CPU under
``TRITON_INTERPRET=1``, and on the meta device they only make their outputs, so that bytes can be counted. GELU stays
torch's own kernel, which reads and writes once too. Values differ from the reference by rounding: what a chain holds
between its steps is not rounded to bf16 here.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from domainshuttle.model.lora import LoraLinear
from domainshuttle.model.mixed_precision import float32_product
from domainshuttle.model.modulation import Rows
from domainshuttle.model.mot import DomainMoTBlock, FinalDomainMoTBlock, JointAttention
from domainshuttle.model.products import computing

_TOKENS_A_SUM = 64
"""Tokens that a program adds up: sums over tokens are made in this order, so they come out alike each time."""
_PROGRAMS = 264
"""Programs that share all tokens where a weight's gradient is summed: two for each multiprocessor of an H100."""


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


# Operators


def _kernels() -> ModuleType:
    from domainshuttle.model import triton_kernels

    return triton_kernels


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _warps(width: int) -> int:
    return max(1, min(16, _block(width) // 512))


@custom_op("domainshuttle::projections", mutates_args=())
def projections_op(x: Tensor, parameters: list[Tensor], video: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of tokens [1, n, d], by weights and biases of the video's, then of the references'."""
    outs = _projections_outputs(x, parameters, video)
    for first, out in zip((0, 2, 4), outs, strict=True):
        for part, start in ((slice(video), first), (slice(video, None), first + 6)):
            weight, bias = parameters[start : start + 2]
            torch.addmm(bias.to(x.dtype), x[0, part], weight.to(x.dtype).t(), out=out[0, part])
    return outs


@projections_op.register_fake
def _projections_outputs(x: Tensor, parameters: list[Tensor], video: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.new_empty(*x.shape[:2], parameters[first].shape[0]) for first in (0, 2, 4))
    return query, key, value


@custom_op("domainshuttle::residual_norm", mutates_args=())
def residual_norm_op(
    x: Tensor, update: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, by_frame: bool, video: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x + gate update (empty without an update), its norm, and each token's mean and reciprocal deviation."""
    made = _residual_norm_outputs(x, update, gate, scale, shift, by_frame, video, eps)
    _, frames, tokens, width = x.shape
    gate_rows, rows = (0 if one is None else one.shape[1] for one in (gate, scale))
    _kernels().residual_norm[(x[..., 0].numel(),)](
        x, update, gate, scale, shift, *made, tokens, frames, video, gate_rows, rows, eps,
        D=width, BLOCK=_block(width), UPDATE=update is not None, GATE=gate is not None, NORM=True, BY_FRAME=by_frame,
        num_warps=_warps(width),
    )  # fmt: skip
    return made


@residual_norm_op.register_fake
def _residual_norm_outputs(
    x: Tensor, update: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, by_frame: bool, video: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_tokens = x.new_empty(x.shape[:3], dtype=torch.float32)
    return (
        x.new_empty(0) if update is None else x.new_empty(x.shape),
        x.new_empty(x.shape),
        of_tokens,
        torch.empty_like(of_tokens),
    )


@custom_op("domainshuttle::residual_norm_backward", mutates_args=())
def residual_norm_backward_op(
    out: Tensor, gate: Tensor | None, scale: Tensor, means: Tensor, rstds: Tensor, for_out: Tensor | None,
    for_normed: Tensor, by_frame: bool, video: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of the update where it is gated (else empty: it is that of x)."""
    made = _residual_norm_gradients(out, gate, scale, means, rstds, for_out, for_normed, by_frame, video)
    _, frames, tokens, width = out.shape
    gate_rows, rows = (0 if one is None else one.shape[1] for one in (gate, scale))
    _kernels().residual_norm_backward[(means.numel(),)](
        out, gate, scale, means, rstds, for_out, for_normed, *made, tokens, frames, video, gate_rows, rows,
        D=width, BLOCK=_block(width), OUT=for_out is not None, NORM=True, GATE=gate is not None, BY_FRAME=by_frame,
        num_warps=_warps(width),
    )  # fmt: skip
    return made


@residual_norm_backward_op.register_fake
def _residual_norm_gradients(
    out: Tensor, gate: Tensor | None, scale: Tensor, means: Tensor, rstds: Tensor, for_out: Tensor | None,
    for_normed: Tensor, by_frame: bool, video: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return out.new_empty(out.shape), out.new_empty(0) if gate is None else out.new_empty(out.shape)


@custom_op("domainshuttle::gated_residual", mutates_args=())
def gated_residual_op(x: Tensor, update: Tensor, gate: Tensor, video: int) -> Tensor:
    """x + gate update."""
    y = x.new_empty(x.shape)
    _, frames, tokens, width = x.shape
    _kernels().residual_norm[(x[..., 0].numel(),)](
        x, update, gate, None, None, y, None, None, None, tokens, frames, video, gate.shape[1], 0, 0.0,
        D=width, BLOCK=_block(width), UPDATE=True, GATE=True, NORM=False, BY_FRAME=False, num_warps=_warps(width),
    )  # fmt: skip
    return y


@gated_residual_op.register_fake
def _(x: Tensor, update: Tensor, gate: Tensor, video: int) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("domainshuttle::gate", mutates_args=())
def gate_op(x: Tensor, gate: Tensor, video: int) -> Tensor:
    """gate x."""
    y = x.new_empty(x.shape)
    _, frames, tokens, width = x.shape
    _kernels().residual_norm_backward[(x[..., 0].numel(),)](
        None, gate, None, None, None, x, None, None, y, tokens, frames, video, gate.shape[1], 0,
        D=width, BLOCK=_block(width), OUT=True, NORM=False, GATE=True, BY_FRAME=False, num_warps=_warps(width),
    )  # fmt: skip
    return y


@gate_op.register_fake
def _(x: Tensor, gate: Tensor, video: int) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("domainshuttle::sums", mutates_args=())
def sums_op(
    gradient: Tensor, by: Tensor, means: Tensor | None, rstds: Tensor | None, skipped: int
) -> tuple[Tensor, Tensor]:
    """Sums of a gradient [b, F, s, d], and of its product with `by`, over the tokens of each frame but the first ones:
    [b, F - skipped, d] float32 each. `by` has all frames, or those that are counted."""
    b, frames, tokens, width = gradient.shape
    chunks = -(-tokens // _TOKENS_A_SUM)
    sums = gradient.new_empty(b, frames - skipped, chunks, width, dtype=torch.float32)
    products, block = torch.empty_like(sums), min(512, _block(width))
    _kernels().sums[(b * (frames - skipped), chunks, -(-width // block))](
        gradient, by, means, rstds, sums, products, tokens, by.shape[1], skipped, frames,
        D=width, BLOCK=block, TOKENS=_TOKENS_A_SUM, STANDARD=means is not None,
    )  # fmt: skip
    return sums.sum(2), products.sum(2)


@sums_op.register_fake
def _(gradient: Tensor, by: Tensor, means: Tensor | None, rstds: Tensor | None, skipped: int) -> tuple[Tensor, Tensor]:
    sums = gradient.new_empty(gradient.shape[0], gradient.shape[1] - skipped, gradient.shape[-1], dtype=torch.float32)
    return sums, torch.empty_like(sums)


@custom_op("domainshuttle::rms_rotary", mutates_args=())
def rms_rotary_op(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of tokens [b, n, d], rotated, and the reciprocal root of each token's mean square."""
    y, rstds = _rms_rotary_outputs(x, weight, cos, sin, eps)
    width = x.shape[-1]
    _kernels().rms_rotary[(rstds.numel(),)](
        x, weight, cos, sin, y, rstds, width, eps,
        D=width, HALF=_block(width) // 2, HEAD=1 if cos is None else cos.shape[-1], ROTATE=cos is not None,
        num_warps=_warps(width),
    )  # fmt: skip
    return y, rstds


@rms_rotary_op.register_fake
def _rms_rotary_outputs(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


@custom_op("domainshuttle::rms_rotary_backward", mutates_args=())
def rms_rotary_backward_op(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, rstds: Tensor, gradient: Tensor,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of the weight in parts [programs, d] that are still to be added up."""
    for_x, parts = _rms_rotary_gradients(x, weight, cos, sin, rstds, gradient, wants_weight)
    width, tokens = x.shape[-1], rstds.numel()
    _kernels().rms_rotary_backward[(min(_PROGRAMS, tokens),)](
        x, weight, cos, sin, rstds, gradient, for_x, parts, tokens, width,
        D=width, HALF=_block(width) // 2, HEAD=1 if cos is None else cos.shape[-1], ROTATE=cos is not None,
        WEIGHT=wants_weight, num_warps=_warps(width),
    )  # fmt: skip
    return for_x, parts


@rms_rotary_backward_op.register_fake
def _rms_rotary_gradients(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, rstds: Tensor, gradient: Tensor,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    programs = min(_PROGRAMS, rstds.numel()) if wants_weight else 0
    return x.new_empty(x.shape), x.new_empty(programs, x.shape[-1], dtype=torch.float32)
