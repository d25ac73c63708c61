"""The DomainShuttle network: Wan's video transformer with a reference branch.

What Wan's transformer does not have holds ``_ref`` in its name; all other parameters are named as in diffusers'
``WanTransformer3DModel``, and with no references the two compute the same.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from domainshuttle.model.file_mode import UmaskMode
from domainshuttle.model.mixed_precision import linear, mix_precision
from domainshuttle.model.modulation import Rows
from domainshuttle.model.mot import DomainMoTBlock, FinalDomainMoTBlock, ReferenceGate, ReferenceProjections, Stream
from domainshuttle.model.rope import ReferenceRope, image_index, rotary_embedding
from domainshuttle.model.token_groups import TokenGroup


class PatchEmbedding(nn.Conv3d):
    """Convolution whose stride is its kernel, computed as one matrix product over patches.

    Same weights as Wan's ``Conv3d``; the product avoids the slow three-dimensional convolutions of cuDNN and oneDNN.
    """

    def forward(self, latents: Tensor) -> Tensor:
        """[b, c, f, h, w] -> [b, frames, tokens of a frame, dim]."""
        b, c, f, h, w = latents.shape
        pt, ph, pw = self.kernel_size
        patches = latents.view(b, c, f // pt, pt, h // ph, ph, w // pw, pw)
        # b c f pt h ph w pw -> b f (h w) (c pt ph pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, f // pt, (h // ph) * (w // pw), c * pt * ph * pw)
        return linear(patches, self.weight.flatten(1), self.bias)


class ExactTimesteps(nn.Module):
    """Sinusoidal embedding of timesteps with angles in float64, as in the original Wan and the released model.

    diffusers computes the angles in float32, which at 1000 t near 1000 moves the embedding by up to 1e-4.
    """

    def __init__(self, freq_dim: int) -> None:
        super().__init__()
        self.half = freq_dim // 2

    def forward(self, timestep: Tensor) -> Tensor:
        """[b] -> [b, freq_dim] float32."""
        exponents = torch.arange(self.half, device=timestep.device, dtype=torch.float64) / self.half
        angles = timestep.double()[:, None] * 10000.0**-exponents
        return torch.cat([angles.cos(), angles.sin()], 1).float()


class DomainShuttleTransformer3DModel(UmaskMode, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Subject-driven text-to-video transformer (arXiv 2606.26058, section 3).

    The arguments up to ``eps`` are those of diffusers' ``WanTransformer3DModel``.

    Args:
        patch_size: latent frames, rows and columns of one token.
        num_attention_heads: heads of every attention.
        attention_head_dim: channels of a head; their product is the width of the model.
        in_channels: latent channels in.
        out_channels: latent channels out.
        text_dim: width of the text embedding.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim: hidden width of the feed-forward networks.
        num_layers: number of blocks.
        cross_attn_norm: whether the cross-attention has an affine norm before it.
        eps: of all norms.
        max_references: most reference images that a sample may have.
        num_domains: number of domain ids.
        reference_gate: which gate scales the attention output of reference tokens: ``own`` as in the paper (the domain
            embedding is then added to the gates too), ``video`` as in the released model.
        reference_projections: ``own`` patch embedding, query, key and value for references, or ``shared`` with the
            video (ablation).
        domain_adaln: whether references have their own modulation, domain embedding and FiLM (False: ablation).
        reference_rope: ``dual``, or ``frames`` to append references as frames of the video (ablation).
        timestep_angles: precision of the timestep embedding, ``float32`` as in diffusers or ``float64`` as in the
            original Wan and the released model.
        text_len: length that prompts are padded to with zeros, for whoever encodes them.
        boundary: timestep t' at which the high-noise expert hands over to the low-noise one; None with one expert.
            Like ``text_len`` it travels with the weights, and the network itself does not use it.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embedding", "condition_embedder", "norm"]
    _no_split_modules: ClassVar = ["DomainMoTBlock", "FinalDomainMoTBlock"]
    _keep_in_fp32_modules: ClassVar = [
        "time_embedder",
        "scale_shift_table",
        "scale_shift_table_ref",
        "norm1",
        "norm2",
        "norm3",
    ]
    _repeated_blocks: ClassVar = ["DomainMoTBlock", "FinalDomainMoTBlock"]
    predicts_pairs = True
    """Whether a call may hold a second set of references, for the cross-pair loss."""

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        max_references: int = 5,
        num_domains: int = 5,
        reference_gate: ReferenceGate = "own",
        reference_projections: ReferenceProjections = "own",
        domain_adaln: bool = True,
        reference_rope: ReferenceRope = "dual",
        timestep_angles: Literal["float32", "float64"] = "float32",
        text_len: int = 512,
        boundary: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("reference_gate", reference_gate, ("own", "video")),
            ("reference_projections", reference_projections, ("own", "shared")),
            ("reference_rope", reference_rope, ("dual", "frames")),
            ("timestep_angles", timestep_angles, ("float32", "float64")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; use one of {allowed}")
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = PatchEmbedding(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        if reference_projections == "own":
            self.patch_embedding_ref = PatchEmbedding(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=dim, time_freq_dim=freq_dim, time_proj_dim=dim * 6, text_embed_dim=text_dim
        )
        if timestep_angles == "float64":
            self.condition_embedder.timesteps_proj = ExactTimesteps(freq_dim)
        if domain_adaln:
            self.domain_embedding_ref = nn.Embedding(num_domains, dim)
            self.film_scale_ref = nn.Linear(dim, dim, bias=False)
            self.film_shift_ref = nn.Linear(dim, dim, bias=False)
        self.blocks = nn.ModuleList(
            (DomainMoTBlock if i + 1 < num_layers else FinalDomainMoTBlock)(
                dim,
                ffn_dim,
                num_attention_heads,
                cross_attn_norm,
                eps,
                reference_gate,
                reference_projections,
                domain_adaln,
            )
            for i in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self._compute_dtype: torch.dtype | None = None
        self.token_group: TokenGroup | None = None
        self.initialise_references()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of tokens and products; that of the weights unless :meth:`compute_in` chose another."""
        return self._compute_dtype or self.patch_embedding.weight.dtype

    def compute_in(self, dtype: torch.dtype) -> None:
        """Computes in ``dtype`` with parameters that may be float32, as training in bf16 needs.

        What is computed is what a model loaded in ``dtype`` computes, if the parameters that :meth:`keeps_float32`
        names are float32 in both.
        """
        self._compute_dtype = dtype
        mix_precision(self)

    def share_tokens(self, group: TokenGroup) -> None:
        """Computes with the other ranks of ``group``, which call the model with the same batch.

        What a frame has of tokens, and the heads, must be multiples of the ranks. Gradients are those of the rank's own
        tokens, times the ranks: their mean over all ranks of a job is that of a job without groups.
        """
        self.token_group = group
        for block in self.blocks:
            block.attn1.token_group = group

    @classmethod
    def keeps_float32(cls, name: str) -> bool:
        """Whether the parameter ``name`` is float32 in a model of any type: time embedding, modulation and norms."""
        return any(part in cls._keep_in_fp32_modules for part in name.split("."))

    @torch.no_grad()
    def initialise_references(self) -> None:
        """Start the reference branch as a copy of the video branch, without effect of the domains."""
        parameters = dict(self.named_parameters())
        for name, parameter in parameters.items():
            if name.startswith(("domain_embedding_ref", "film_")):
                parameter.zero_()
            elif "_ref" in name:
                parameter.copy_(parameters[name.replace("_ref", "")])

    def embed_references(self, latents: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [b, r, s, d] of reference latents [b, r, c, h, w] after FiLM, and domain embeddings [b, r, d]."""
        embed = self.patch_embedding_ref if self.config.reference_projections == "own" else self.patch_embedding
        tokens = embed(latents.transpose(1, 2))  # references as frames
        if not self.config.domain_adaln:
            return tokens, tokens.new_zeros(*domains.shape, tokens.shape[-1])
        domain = self.domain_embedding_ref(domains.clamp(min=0)).to(tokens.dtype) * (domains >= 0)[..., None]
        gamma, beta = self.film_scale_ref(domain), self.film_shift_ref(domain)
        return torch.addcmul(beta[:, :, None], tokens, 1 + gamma[:, :, None]), domain

    def condition(self, time: Tensor, domain: Tensor) -> Rows:
        """Conditioning of the blocks, float32: time projection [b, 6, d], and for references plus domain [b, r, d]."""
        time, domain = time.float(), domain.float()
        zero = torch.zeros_like(domain)
        gate = domain if self.config.reference_gate == "own" else zero
        domain = torch.stack([domain, domain, gate, domain, domain, gate], 2)  # b r 6 d
        return Rows(time[:, None], time[:, None] + domain)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        reference_latents: Tensor | None = None,
        reference_subjects: Tensor | None = None,
        reference_domains: Tensor | None = None,
        reference_mask: Tensor | None = None,
        paired_reference_latents: Tensor | None = None,
        paired_reference_subjects: Tensor | None = None,
        paired_reference_domains: Tensor | None = None,
        paired_reference_mask: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Predict the velocity e - z_0 of noisy latents.

        Args:
            hidden_states: [b, c, f, h, w] noisy latents z_t.
            timestep: [b] float, 1000 t.
            encoder_hidden_states: [b, l, text_dim] text embedding; the released model attends to its zero padding.
            reference_latents: [b, r, c, h, w] latents of the reference images; None or r = 0 for none.
            reference_subjects: [b, r] int64, subject of each image, from 0.
            reference_domains: [b, r] int64, domain wanted in the video, -1 for none.
            reference_mask: [b, r] bool, True where an image is real. The others are not attended to. None attends to
                all, and runs the faster attention kernels.
            paired_reference_latents: of a second set of references, with its own ``subjects``, ``domains`` and
                ``mask``, as the cross-pair loss needs it: the same latents are predicted with it too, without
                gradients. Both pass through each block in one call of it, so that sharded weights are gathered once.
            return_dict: whether to return a ``Transformer2DModelOutput`` instead of a tuple.
            attention_kwargs: ``scale`` of LoRA layers, as in diffusers.

        Returns:
            [b, out_channels, f, h, w], as ``sample`` or as the only element of a tuple; with a second set always a
            tuple, of the prediction and of that with the second set.

        Raises:
            ValueError: for inputs that do not fit the configuration or each other.
        """
        latents = hidden_states
        sets = [(reference_latents, reference_subjects, reference_domains, reference_mask)]
        if paired_reference_latents is not None:
            sets.append(
                (paired_reference_latents, paired_reference_subjects, paired_reference_domains, paired_reference_mask)
            )
        given = [self._checked(latents, timestep, encoder_hidden_states, *each) for each in sets]
        dtype = self.compute_dtype

        video = self.patch_embedding(latents.to(dtype))  # b f s d
        temb, time, text, _ = self.condition_embedder(timestep, encoder_hidden_states.to(dtype))
        time = time.unflatten(1, (6, -1))
        stream, paired = self._stream(latents, video, time, *given[0]), None
        if len(given) > 1:
            with torch.no_grad():
                # detached: else views of them would still count as parts of the graph
                paired = self._stream(latents, video.detach(), time.detach(), *given[1])
        for block in self.blocks:
            out = block(stream.hidden_states, text, *stream[1:], paired)
            if paired is not None:
                out, paired_out = out
                paired = Stream(paired_out, *paired[1:])
            stream = Stream(out, *stream[1:])

        sample = self._decode(latents, stream.hidden_states, temb)
        if paired is not None:
            with torch.no_grad():
                return sample, self._decode(latents, paired.hidden_states, temb)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _stream(
        self,
        latents: Tensor,
        video: Tensor,
        time: Tensor,
        references: Tensor,
        subjects: Tensor,
        domains: Tensor,
        mask: Tensor | None,
    ) -> Stream:
        """What goes into the blocks: tokens of the video, and then of one set of references."""
        grid = self._grid(latents)
        images = image_index(subjects, mask)
        rotary_emb = rotary_embedding(
            self.config.attention_head_dim, grid, subjects, images, self.config.reference_rope
        )
        attention_mask = None
        if mask is not None:
            # b r -> b 1 1 (F s), True at keys that count; video tokens always do
            frames, tokens_of_one = torch.cat([mask.new_ones(mask.shape[0], grid[0]), mask], 1), grid[1] * grid[2]
            keys = frames[..., None].expand(-1, -1, tokens_of_one).flatten(1)
            if self.token_group is not None:
                keys = self.token_group.key_mask(frames, tokens_of_one)
            attention_mask = keys[:, None, None]
        tokens, domain = self.embed_references(references.to(self.compute_dtype), domains)
        hidden_states = torch.cat([video, tokens], 1)  # b F s d
        if self.token_group is not None:
            hidden_states = self.token_group.own(hidden_states, 2)
            # b (F s) 1 d
            rotary_emb = tuple(
                self.token_group.own(one.unflatten(1, (-1, grid[1] * grid[2])), 2).flatten(1, 2) for one in rotary_emb
            )
        return Stream(hidden_states, self.condition(time, domain), rotary_emb, attention_mask)

    def _decode(self, latents: Tensor, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Velocity [b, c, f, h, w] of tokens [b, f, s, d] of the video."""
        b, _, f, h, w = latents.shape
        shift, scale = (self.scale_shift_table.float() + temb.float().unsqueeze(1)).unsqueeze(2).chunk(2, 1)
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states.float()), 1 + scale).type_as(hidden_states)
        patches = self.proj_out(hidden_states)
        if self.token_group is not None:
            patches = self.token_group.whole(patches, 2)
        # b f (h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)
        patches = patches.view(b, *self._grid(latents), *self.config.patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.reshape(b, -1, f, h, w)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens of the video in time, height and width."""
        t, h, w = (size // patch for size, patch in zip(latents.shape[2:], self.config.patch_size, strict=True))
        return t, h, w

    def _checked(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        references: Tensor | None,
        subjects: Tensor | None,
        domains: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One set of references, which may be none; raises ValueError for inputs that do not fit."""
        b, _, _, h, w = latents.shape if latents.ndim == 5 else (0,) * 5
        if references is None:
            references = latents.new_zeros(b, 0, self.config.in_channels, h, w)
        if subjects is None or domains is None:
            if references.shape[1] > 0:
                raise ValueError("reference_latents need reference_subjects and reference_domains: pass int64 [b, r]")
            subjects = domains = torch.zeros(b, 0, dtype=torch.long, device=latents.device)
        self._check(latents, timestep, text, references, subjects, domains, mask)
        return references, subjects, domains, mask

    def _check(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        references: Tensor,
        subjects: Tensor,
        domains: Tensor,
        mask: Tensor | None,
    ) -> None:
        """Raise one ValueError that lists everything wrong with the inputs."""
        config, problems = self.config, []
        if latents.ndim != 5:
            raise ValueError(f"hidden_states is {list(latents.shape)}; expected [b, c, frames, height, width]")
        b, c, f, h, w = latents.shape
        pt, ph, pw = config.patch_size
        if c != config.in_channels:
            problems.append(f"hidden_states has {c} channels, the model {config.in_channels}")
        if f % pt or h % ph or w % pw:
            problems.append(f"latent size {f}x{h}x{w} must be a multiple of the patch {pt}x{ph}x{pw}: resize the video")
        if tuple(timestep.shape) != (b,):
            problems.append(f"timestep is {list(timestep.shape)}, expected [{b}] (1000 t of each sample)")
        if text.ndim != 3 or text.shape[0] != b or text.shape[2] != config.text_dim:
            problems.append(f"encoder_hidden_states is {list(text.shape)}, expected [{b}, length, {config.text_dim}]")
        r = references.shape[1] if references.ndim == 5 else -1
        if references.ndim != 5 or tuple(references.shape) != (b, r, c, h, w):
            problems.append(f"reference_latents is {list(references.shape)}, expected [{b}, r, {c}, {h}, {w}]")
        if r > config.max_references:
            problems.append(f"{r} references, the model takes max_references={config.max_references}: drop some")
        for name, value in (("subjects", subjects), ("domains", domains), ("mask", mask)):
            if value is not None and tuple(value.shape) != (b, r):
                problems.append(f"reference_{name} is {list(value.shape)}, expected [{b}, {r}]")
        # On an accelerator looking at the values would wait for it; there the batch was checked before it was moved.
        if not problems and r > 0 and domains.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(domains.min()), int(domains.max())
            if low < -1 or high >= config.num_domains:
                problems.append(f"reference_domains run {low}..{high}, expected -1 (none)..{config.num_domains - 1}")
        if problems:
            raise ValueError("inputs do not fit the model: " + "; ".join(problems))
