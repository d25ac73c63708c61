"""Attention over tokens [b, n, heads, d], on a GPU through diffusers' dispatcher and on a CPU in float32.

A CPU's fused kernel holds no n x n products, so memory grows with the length and not with its square. In bf16 its
backward pass is slow at short lengths (and all of it on processors without bf16 products), while in float32 it takes
less time than plain products at every length: benchmarks/README.md, "Attention on a CPU".
"""

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

NO_MASKS = ("flash", "flash_hub", "flash_4_hub", "_flash_3", "_flash_3_hub", "_native_flash", "aiter_fa2_hub")
"""Backends of diffusers' dispatcher that raise for a mask; torch's choice takes their place there."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Attention [b, n, heads, d] of queries [b, n, heads, d] over keys and values [b, m, heads, d], in their dtype.

    ``mask`` [b or 1, 1, 1, m] is True at the keys that count. ``backend``, of diffusers' dispatcher, is what a user
    has set; without one it is torch's choice on a GPU, and the fused float32 kernel on a CPU. So it is with a mask,
    where the backend takes none.
    """
    if mask is not None and backend in NO_MASKS:
        backend = None if query.device.type == "cpu" else "native"
    if backend is None and query.device.type == "cpu":
        # b n heads d -> b heads n d
        heads = (one.float().transpose(1, 2) for one in (query, key, value))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).type_as(query)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel_config)


class TextAttnProcessor:
    """Computes the cross-attention of a block to the text."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        # b n (heads d) -> b n heads d
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        out = self.attend(query, key, value, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention to the text, which every rank has whole: the queries alone are shared where a sequence is."""
        return attend(query, key, value, mask, self._attention_backend)
