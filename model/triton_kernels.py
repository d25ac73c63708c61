"""The elementwise chains of a block as Triton kernels that read and write each token once; `fused_operators.py`
launches them.

All compute in float32. Tokens are [b, F, s, d], contiguous. Rows that scale, shift or gate them are [b, 1 + r, d]: the
first is of the video's frames, the others of the r references, which are the last frames.
"""

import triton
import triton.language as tl


@triton.jit
def _row(token, tokens_a_frame, frames, video_frames, rows_a_sample):
    """The row of a token: of the video, or of its reference."""
    frame = (token // tokens_a_frame) % frames
    sample = token // (tokens_a_frame * frames)
    return sample * rows_a_sample + tl.maximum(frame - video_frames + 1, 0)


@triton.jit
def residual_norm(
    x, update, gate, scale, shift, out, normed, means, rstds,
    tokens_a_frame, frames, video_frames, gate_rows, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, UPDATE: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
    BY_FRAME: tl.constexpr,
):  # fmt: skip
    """One token: x + gate update to `out`, and the layer norm of that, scaled and shifted, to `normed`.

    By frame, or by one row of a norm's weight and bias. Of the norm `means` and `rstds` keep mean and 1 / deviation.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    at = token * D + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if UPDATE:
        added = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            row = _row(token, tokens_a_frame, frames, video_frames, gate_rows)
            added = added * tl.load(gate + row * D + channel, mask=inside, other=0.0)
        value = (value + added).to(out.dtype.element_ty)
        tl.store(out + at, value, mask=inside)
        value = value.to(tl.float32)
    if NORM:
        mean = tl.sum(value, 0) / D
        centred = tl.where(inside, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        row = token * 0
        if BY_FRAME:
            row = _row(token, tokens_a_frame, frames, video_frames, rows)
        factor = tl.load(scale + row * D + channel, mask=inside, other=0.0).to(tl.float32)
        term = tl.load(shift + row * D + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + at, (centred * rstd * factor + term).to(normed.dtype.element_ty), mask=inside)
        tl.store(means + token, mean)
        tl.store(rstds + token, rstd)


@triton.jit
def residual_norm_backward(
    out, gate, scale, means, rstds, for_out, for_normed, for_x, for_update,
    tokens_a_frame, frames, video_frames, gate_rows, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    BY_FRAME: tl.constexpr,
):  # fmt: skip
    """One token: the gradient of x by those of `out` and of `normed`, and that of the update where it is gated."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    at = token * D + channel
    total = tl.zeros([BLOCK], tl.float32)
    if OUT:
        total += tl.load(for_out + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        value = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + token)
        standard = tl.where(inside, (value - tl.load(means + token)) * rstd, 0.0)
        row = token * 0
        if BY_FRAME:
            row = _row(token, tokens_a_frame, frames, video_frames, rows)
        factor = tl.load(scale + row * D + channel, mask=inside, other=0.0).to(tl.float32)
        inner = tl.load(for_normed + at, mask=inside, other=0.0).to(tl.float32) * factor
        total += rstd * (inner - tl.sum(inner, 0) / D - standard * (tl.sum(inner * standard, 0) / D))
        tl.store(for_x + at, total.to(for_x.dtype.element_ty), mask=inside)
    if GATE:
        row = _row(token, tokens_a_frame, frames, video_frames, gate_rows)
        gated = total * tl.load(gate + row * D + channel, mask=inside, other=0.0)
        tl.store(for_update + at, gated.to(for_update.dtype.element_ty), mask=inside)


@triton.jit
def sums(
    gradient, by, means, rstds, totals, products, tokens_a_frame, by_frames, skipped, frames,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, STANDARD: tl.constexpr,
):  # fmt: skip
    """Sums of gradient, and of its product with `by`, over TOKENS tokens of a frame; the first frames are skipped."""
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    counted = frames - skipped
    sample, frame = part // counted, part % counted
    chunks = tl.num_programs(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    total, product = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = (sample * frames + skipped + frame) * tokens_a_frame
    by_first = (sample * by_frames + by_frames - counted + frame) * tokens_a_frame
    for token in range(chunk * TOKENS, tl.minimum((chunk + 1) * TOKENS, tokens_a_frame)):
        one = tl.load(gradient + (first + token) * D + channel, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(by + (by_first + token) * D + channel, mask=inside, other=0.0).to(tl.float32)
        if STANDARD:
            other = (other - tl.load(means + first + token)) * tl.load(rstds + first + token)
        total += one
        product += one * other
    at = (part * chunks + chunk) * D + channel

    tl.store(totals + at, total, mask=inside)
    tl.store(products + at, product, mask=inside)


@triton.jit
def rms_rotary(
    x, weight, cos, sin, y, rstds, row_stride, eps,
    D: tl.constexpr, HALF: tl.constexpr, HEAD: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One token: x / rms(x) times the weight, each pair of neighbouring channels of a head turned by its angle."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    inside = 2 * pair < D
    even, odd = 2 * pair, 2 * pair + 1
    u = tl.load(x + token * row_stride + even, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + token * row_stride + odd, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(u * u + v * v, 0) / D + eps)
    tl.store(rstds + token, rstd)
    u *= rstd * tl.load(weight + even, mask=inside, other=0.0).to(tl.float32)
    v *= rstd * tl.load(weight + odd, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        turned = token * HEAD + even % HEAD
        first = u * tl.load(cos + turned, mask=inside) + v * tl.load(sin + turned, mask=inside)
        v = v * tl.load(cos + turned + 1, mask=inside) + u * tl.load(sin + turned + 1, mask=inside)
        u = first
    tl.store(y + token * D + even, u.to(y.dtype.element_ty), mask=inside)
    tl.store(y + token * D + odd, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_rotary_backward(
    x, weight, cos, sin, rstds, gradient, for_x, for_weight, tokens, row_stride,
    D: tl.constexpr, HALF: tl.constexpr, HEAD: tl.constexpr, ROTATE: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """The gradient of x, token by token, and of the weight summed over the tokens that a program takes."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    zero = program.to(tl.int64) * 0  # of a type that addresses of long sequences fit
    pair = tl.arange(0, HALF)
    inside = 2 * pair < D
    even, odd = 2 * pair, 2 * pair + 1
    weight_u = tl.load(weight + even, mask=inside, other=0.0).to(tl.float32)
    weight_v = tl.load(weight + odd, mask=inside, other=0.0).to(tl.float32)
    sum_u, sum_v = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for number in range(program, tokens, programs):
        token = number + zero
        g = tl.load(gradient + token * D + even, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(gradient + token * D + odd, mask=inside, other=0.0).to(tl.float32)
        if ROTATE:
            turned = token * HEAD + even % HEAD
            first = g * tl.load(cos + turned, mask=inside) + h * tl.load(sin + turned + 1, mask=inside)
            h = h * tl.load(cos + turned + 1, mask=inside) + g * tl.load(sin + turned, mask=inside)
            g = first
        rstd = tl.load(rstds + token)
        u = tl.load(x + token * row_stride + even, mask=inside, other=0.0).to(tl.float32) * rstd
        v = tl.load(x + token * row_stride + odd, mask=inside, other=0.0).to(tl.float32) * rstd
        sum_u += g * u
        sum_v += h * v
        g *= weight_u
        h *= weight_v
        mean = tl.sum(g * u + h * v, 0) / D
        tl.store(for_x + token * D + even, (rstd * (g - u * mean)).to(for_x.dtype.element_ty), mask=inside)
        tl.store(for_x + token * D + odd, (rstd * (h - v * mean)).to(for_x.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(for_weight + program * D + even, sum_u, mask=inside)
        tl.store(for_weight + program * D + odd, sum_v, mask=inside)
