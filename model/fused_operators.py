"""Operators of torch, ``domainshuttle::...``, for ``fused.py``: of Triton kernels (``triton_kernels.py``), and products
whose outputs lie where the next kernel reads them.

Kernels run on a GPU, or on a CPU under ``TRITON_INTERPRET=1``; on the meta device operators only make their outputs, so
that bytes can be counted. None has a gradient of its own.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

_TOKENS_A_SUM = 64
"""Tokens that a program adds up: sums over tokens are made in this order, so they come out alike each time."""
_PROGRAMS = 264
"""Programs that share all tokens where a weight's gradient is summed: two for each multiprocessor of an H100."""


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
