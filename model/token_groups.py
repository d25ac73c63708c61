"""A sample's tokens over several ranks (Ulysses, arXiv 2309.14509), for sequences that one device is too small for.

Each rank of a group holds a part of every frame's tokens, so that projections, modulation and feed-forward are its own;
around the joint attention tokens are exchanged for heads. Every rank is given whole latents and returns whole
predictions, so that a loss is computed as on one rank: what goes back from it is that of the rank's own tokens, times
the ranks, since gradients are averaged over all ranks afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TokenGroup:
    """The ranks that share a sample's tokens."""

    ranks: dist.ProcessGroup

    @property
    def size(self) -> int:
        """P."""
        return self.ranks.size()

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of the tokens of a frame, which lie along ``dim``."""
        return x.tensor_split(self.size, dim)[self.ranks.rank()].contiguous()

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All tokens of a frame, of each rank's part along ``dim``; gradients as the module says."""
        y: Tensor = _Whole.apply(x, dim, self)
        return y

    def exchange_for_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Own tokens of all heads [b, n / P, heads, d] for all tokens of own heads [b, n, heads / P, d], of each part.

        All tokens of a rank come before those of the next.
        """
        stacked: Tensor = _Exchange.apply(torch.stack(parts), self, True)
        return stacked.unbind(0)

    def exchange_for_tokens(self, x: Tensor) -> Tensor:
        """All tokens of own heads [b, n, heads / P, d] for own tokens of all heads [b, n / P, heads, d]."""
        y: Tensor = _Exchange.apply(x[None], self, False)
        return y[0]

    def key_mask(self, frames: Tensor, tokens: int) -> Tensor:
        """Mask [b, F tokens] of the keys in the order after an exchange, of a mask [b, F] of frames."""
        own = frames[..., None].expand(-1, -1, tokens // self.size).flatten(1)
        return own.repeat(1, self.size)


class _Exchange(torch.autograd.Function):
    """Both ways are permutations of what the group holds, so each is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TokenGroup, for_heads: bool) -> Tensor:
        ctx.group, ctx.for_heads = group, for_heads
        return _exchanged(x, group, for_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(gradients[0], ctx.group, not ctx.for_heads), None, None


def _exchanged(x: Tensor, group: TokenGroup, for_heads: bool) -> Tensor:
    """[k, b, n / P, heads, d] -> [k, b, n, heads / P, d], or back."""
    # k b n (P h) d -> P k b n h d, or k b (P n) h d -> P k b n h d: what goes to each rank
    dim = 3 if for_heads else 2
    sent = x.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group.ranks)
    to = 2 if for_heads else 3
    return received.movedim(0, to).flatten(to, to + 1)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: TokenGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        parts = x.new_empty(group.size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(parts, x.contiguous(), group=group.ranks)
        return parts.unflatten(0, (group.size, -1)).movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.own(gradients[0], ctx.dim) * ctx.group.size, None, None
