"""Domain-MoT: one transformer block for video and reference tokens (paper, section 3.2).

Both kinds of tokens have their own query, key and value projections and their own modulation; the joint attention, its
output projection and norms, the cross-attention to the text and the feed-forward network are shared. A reference is as
large as one video frame, so all tokens of a sample form one tensor ``[b, F, s, d]`` of F = f + r frames of s tokens.
Of a modulation the video frames share one row, and every reference has its own, with its domain.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from domainshuttle.model.attention import TextAttnProcessor, attend
from domainshuttle.model.modulation import Rows, gated_residual, scale_shift
from domainshuttle.model.products import computing
from domainshuttle.model.rope import apply_rotary
from domainshuttle.model.token_groups import TokenGroup

ReferenceGate = Literal["own", "video"]
ReferenceProjections = Literal["own", "shared"]


class JointAttnProcessor:
    """Computes :class:`JointAttention`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: JointAttention,
        hidden_states: Tensor,
        num_reference_tokens: int,
        attention_mask: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        query, key, value = attn.project(hidden_states, num_reference_tokens)
        # b n (heads d) -> b n heads d
        query = apply_rotary(attn.norm_q(query).unflatten(2, (attn.heads, -1)), *rotary_emb)
        key = apply_rotary(attn.norm_k(key).unflatten(2, (attn.heads, -1)), *rotary_emb)
        value = value.unflatten(2, (attn.heads, -1))
        out = self.attend(attn, query, key, value, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))

    def attend(self, attn: JointAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention [b, n, heads, d] of a sample's tokens, of which this rank may hold a part."""
        group = attn.token_group
        if group is not None:
            query, key, value = group.exchange_for_heads(query, key, value)
        out = attend(query, key, value, mask, self._attention_backend, self._parallel_config)
        return out if group is None else group.exchange_for_tokens(out)


class JointAttention(WanAttention):
    """Wan's self-attention with a second set of query, key and value projections for reference tokens."""

    _default_processor_cls = JointAttnProcessor
    _available_processors: ClassVar = [JointAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, eps: float, reference_projections: ReferenceProjections) -> None:
        super().__init__(dim=dim, heads=heads, dim_head=dim // heads, eps=eps, processor=JointAttnProcessor())
        if reference_projections == "own":
            self.to_q_ref = nn.Linear(dim, dim)
            self.to_k_ref = nn.Linear(dim, dim)
            self.to_v_ref = nn.Linear(dim, dim)
        self.reference_projections = reference_projections
        self.token_group: TokenGroup | None = None

    def project(self, hidden_states: Tensor, num_reference_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [b, n, d] of tokens [b, n, d] whose last ``num_reference_tokens`` are references."""
        with computing("qkv"):
            return self._project(hidden_states, num_reference_tokens)

    def _project(self, hidden_states: Tensor, num_reference_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.reference_projections == "shared":
            return self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        num_video_tokens = hidden_states.shape[1] - num_reference_tokens
        # contiguous: else each product would copy its part, and add the bias to a product that is rounded already, so
        # that a sample's queries in bf16 would depend on whether others are beside it
        video, reference = (
            part.contiguous() for part in hidden_states.split([num_video_tokens, num_reference_tokens], 1)
        )
        return (
            torch.cat([self.to_q(video), self.to_q_ref(reference)], 1),
            torch.cat([self.to_k(video), self.to_k_ref(reference)], 1),
            torch.cat([self.to_v(video), self.to_v_ref(reference)], 1),
        )

    def forward(
        self,
        hidden_states: Tensor,
        num_reference_tokens: int,
        attention_mask: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attend over all tokens [b, n, d]; ``attention_mask`` [b, 1, 1, n] is True at the keys that count."""
        return self.processor(self, hidden_states, num_reference_tokens, attention_mask, rotary_emb)


class FeedForwardNetwork(FeedForward):
    """diffusers' network, which says when it computes its first product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        with computing("ffn"):
            hidden_states = self.net[0](hidden_states)
        out: Tensor = self.net[2](hidden_states)
        return out


class Stream(NamedTuple):
    """Tokens on their way through the blocks, with what goes with them."""

    hidden_states: Tensor
    """[b, F, s, d]"""
    conditioning: Rows
    rotary_emb: tuple[Tensor, Tensor]
    attention_mask: Tensor | None


class DomainMoTBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, modulated per frame and reference."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        reference_gate: ReferenceGate = "own",
        reference_projections: ReferenceProjections = "own",
        domain_adaln: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = JointAttention(dim, num_heads, eps, reference_projections)
        self.attn2 = WanAttention(
            dim=dim,
            heads=num_heads,
            dim_head=dim // num_heads,
            eps=eps,
            cross_attention_dim_head=dim // num_heads,
            processor=TextAttnProcessor(),
        )
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForwardNetwork(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        if domain_adaln:
            self.scale_shift_table_ref = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.reference_gate = reference_gate
        self.domain_adaln = domain_adaln
        self.gradient_checkpointing = False

    def modulation(self, conditioning: Rows) -> list[Rows]:
        """Shift, 1 + scale and gate of the attention, then of the feed-forward.

        Args:
            conditioning: rows of [b, 1 or r, 6, d], the time projection, with the domain embeddings at the references.
        """
        table = reference = self.scale_shift_table.float()  # 1 6 d
        if self.domain_adaln:
            reference = self.scale_shift_table_ref.float()
            if self.reference_gate == "video":
                # The released model gates the attention output of reference tokens as the video's.
                reference = torch.cat([reference[:, :2], table[:, 2:3], reference[:, 3:]], 1)
        video, own = ((rows + added).unsqueeze(3) for rows, added in zip(conditioning, (table, reference), strict=True))
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = map(Rows, video.unbind(2), own.unbind(2))
        scale, ffn_scale = (Rows(1 + one.video, 1 + one.reference) for one in (scale, ffn_scale))
        return [shift, scale, gate, ffn_shift, ffn_scale, ffn_gate]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Rows,
        rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        paired: Stream | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Transform tokens [b, F, s, d] of video frames and then references, as many as ``conditioning`` has rows for.

        ``paired`` is another stream with the same text, transformed without gradients: its tokens are returned as
        well. Both pass in one call, so that sharded weights are gathered once for the two.
        """
        return self._forward((hidden_states, encoder_hidden_states, conditioning, rotary_emb, attention_mask), paired)

    def _forward(self, main: tuple[Any, ...], paired: Stream | None) -> Tensor | tuple[Tensor, Tensor]:
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        out = self._gradient_checkpointing_func(self.transform, *main) if recompute else self.transform(*main)
        if paired is None:
            return out
        with torch.no_grad():
            return out, self.transform(paired.hidden_states, main[1], *paired[1:])

    def transform(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Rows,
        rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> Tensor:
        """One stream through the block: what is computed again in the backward pass, and compiled."""
        return self._transform(
            hidden_states, encoder_hidden_states, conditioning, rotary_emb, attention_mask, keep_references=True
        )

    def _transform(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Rows,
        rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        keep_references: bool,
    ) -> Tensor:
        tokens, dtype = hidden_states.shape[2], hidden_states.dtype
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(conditioning)
        num_references = conditioning.references

        # Joint self-attention. Modulation and residual in float32, as in Wan.
        normed = scale_shift(self.norm1(hidden_states.float()), scale, shift, dtype)
        attended = self.attn1(normed.flatten(1, 2), num_references * tokens, attention_mask, rotary_emb)
        attended = attended.unflatten(1, (-1, tokens))
        if not keep_references:
            num_frames = hidden_states.shape[1] - num_references
            hidden_states, attended = hidden_states[:, :num_frames], attended[:, :num_frames]
            gate, ffn_shift, ffn_scale, ffn_gate = (
                rows.without_references() for rows in (gate, ffn_shift, ffn_scale, ffn_gate)
            )
        hidden_states = gated_residual(hidden_states, attended, gate)

        # Cross-attention to the text
        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        attended = self.attn2(normed.flatten(1, 2), encoder_hidden_states)
        hidden_states = hidden_states + attended.unflatten(1, (-1, tokens))

        # Feed-forward
        normed = scale_shift(self.norm3(hidden_states.float()), ffn_scale, ffn_shift, dtype)
        return gated_residual(hidden_states, self.ffn(normed), ffn_gate)


class FinalDomainMoTBlock(DomainMoTBlock):
    """The last block, which drops the references behind its attention, since only video tokens are decoded.

    A class of its own, with a forward and a transform of its own, so that compilation caches the two kinds apart.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Rows,
        rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        paired: Stream | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Transform tokens [b, F, s, d] to those of the video frames alone, [b, f, s, d]."""
        return self._forward((hidden_states, encoder_hidden_states, conditioning, rotary_emb, attention_mask), paired)

    def transform(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Rows,
        rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> Tensor:
        """One stream through the block, which comes out without its references."""
        return self._transform(
            hidden_states, encoder_hidden_states, conditioning, rotary_emb, attention_mask, keep_references=False
        )
