"""Video-Reference DualRoPE: where video and reference tokens lie in Wan's rotary embedding (paper, section 3.3).

A token at (t, y, x) is rotated by angles position x frequency; time has the frequencies that height and width leave.
Video token (i, j, k) lies at (i + 1, j, k). Token (j, k) of image n, which shows subject m, lies at
(0, j + h (m + 1), k + w (n + 1)): references share no coordinate with the video, subjects lie apart in height, images
in width. Rotations act on differences of positions only, so starting the video at frame 1 keeps Wan's attention.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ReferenceRope = Literal["dual", "frames"]
THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that time, height and width rotate; e.g. 128 -> (44, 42, 42)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def image_index(subjects: Tensor, mask: Tensor | None) -> Tensor:
    """Running index [b, r] of each image in its sample; with a mask only real images count."""
    if mask is None:
        return torch.arange(subjects.shape[1], device=subjects.device).expand_as(subjects)
    return mask.long().cumsum(1) - 1


def rotary_embedding(
    head_dim: int,
    grid: tuple[int, int, int],
    subjects: Tensor,
    images: Tensor,
    mode: ReferenceRope = "dual",
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, in the order [video; reference].

    Args:
        head_dim: channels of an attention head (even).
        grid: video tokens in time, height and width (f, h, w); a reference has h x w tokens.
        subjects: [b, r] subject index m of each image.
        images: [b, r] running index n of each image.
        mode: ``dual`` as in the paper, ``frames`` for its ablation: images follow as frames f + 1 + n of the video.

    Returns:
        Two float32 tensors [b, (f + r) h w, 1, head_dim] for :func:`apply_rotary`. Angles are computed in float64,
        since positions reach the hundreds, where float32 angles are off by 1e-5.
    """
    f, h, w = grid
    b, r = subjects.shape
    device = subjects.device
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    if mode == "dual":
        reference_t = torch.zeros_like(subjects)
        reference_y = rows + h * (subjects[..., None] + 1)  # b r h
        reference_x = columns + w * (images[..., None] + 1)  # b r w
    else:
        reference_t = images + (f + 1)
        reference_y, reference_x = rows.expand(b, r, h), columns.expand(b, r, w)
    t = torch.cat([torch.arange(1, f + 1, device=device).expand(b, f), reference_t], 1)  # b F
    y = torch.cat([rows.expand(b, f, h), reference_y], 1)  # b F h
    x = torch.cat([columns.expand(b, f, w), reference_x], 1)  # b F w
    pieces = [
        _rotation(positions, dim)
        for positions, dim in zip(
            (t[:, :, None, None], y[:, :, :, None], x[:, :, None, :]), axis_dims(head_dim), strict=True
        )
    ]
    # b F h w d -> b (F h w) 1 d
    cos, sin = (torch.cat([p.expand(b, f + r, h, w, -1) for p in axes], -1) for axes in zip(*pieces, strict=True))
    return cos.view(b, (f + r) * h * w, 1, head_dim), sin.view(b, (f + r) * h * w, 1, head_dim)


def _rotation(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the sign of a rotation, of positions [...]: float32 [..., dim], equal in adjacent pairs."""
    channel = torch.arange(dim, device=positions.device)
    frequency = THETA ** -((channel // 2 * 2).double() / dim)
    angles = positions[..., None] * frequency
    return angles.cos().float(), (angles.sin() * (channel % 2 * 2 - 1)).float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (u, v) of ``x`` [b, n, heads, d] to (u cos - v sin, v cos + u sin).

    ``sin`` carries the signs, so a swap of each pair and two products do it, in fewer passes over memory than
    strided reads and writes of the pairs' halves. Computed in float32, returned in the dtype of ``x``.
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).type_as(x)
