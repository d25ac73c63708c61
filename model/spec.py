"""Sizes of the model: presets, parameters, FLOPs and memory. Needs no torch, so planning runs anywhere at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSpec:
    """Architecture of one expert; the names are those of ``DomainShuttleTransformer3DModel``'s arguments."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    max_references: int = 5
    num_domains: int = 5
    reference_gate: Literal["own", "video"] = "own"
    reference_projections: Literal["own", "shared"] = "own"
    domain_adaln: bool = True
    reference_rope: Literal["dual", "frames"] = "dual"
    timestep_angles: Literal["float32", "float64"] = "float32"
    num_experts: int = 1
    boundary: float | None = None
    """Timestep t' at which the high-noise expert hands over to the low-noise one; None with one expert."""

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def preset(cls, name: str) -> ModelSpec:
        """The size called ``name``.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model size {name!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def transformer_config(self) -> dict[str, Any]:
        """Keyword arguments of ``DomainShuttleTransformer3DModel``."""
        config = asdict(self)
        del config["num_experts"]
        return config

    def tokens(self, latent_size: tuple[int, int, int]) -> int:
        """Video tokens of latents of ``latent_size`` (frames, height, width)."""
        return math.prod(size // patch for size, patch in zip(latent_size, self.patch_size, strict=True))

    def reference_tokens(self, latent_size: tuple[int, int, int]) -> int:
        """Tokens of one reference image beside a video of ``latent_size``."""
        return self.tokens((self.patch_size[0], *latent_size[1:]))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one expert, by name, in the network's names."""
        d, shapes = self.dim, {}

        def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> None:
            shapes[f"{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{name}.bias"] = (n_out,)

        own = ["", "_ref"] if self.reference_projections == "own" else [""]
        shapes["scale_shift_table"] = (1, 2, d)
        for suffix in own:
            shapes[f"patch_embedding{suffix}.weight"] = (d, self.in_channels, *self.patch_size)
            shapes[f"patch_embedding{suffix}.bias"] = (d,)
        linear("condition_embedder.time_embedder.linear_1", self.freq_dim, d)
        linear("condition_embedder.time_embedder.linear_2", d, d)
        linear("condition_embedder.time_proj", d, 6 * d)
        linear("condition_embedder.text_embedder.linear_1", self.text_dim, d)
        linear("condition_embedder.text_embedder.linear_2", d, d)
        if self.domain_adaln:
            shapes["domain_embedding_ref.weight"] = (self.num_domains, d)
            linear("film_scale_ref", d, d, bias=False)
            linear("film_shift_ref", d, d, bias=False)
        for i in range(self.num_layers):
            block = f"blocks.{i}"
            shapes[f"{block}.scale_shift_table"] = (1, 6, d)
            if self.domain_adaln:
                shapes[f"{block}.scale_shift_table_ref"] = (1, 6, d)
            for attention in ("attn1", "attn2"):
                for projection in ("to_q", "to_k", "to_v"):
                    for suffix in own if attention == "attn1" else [""]:
                        linear(f"{block}.{attention}.{projection}{suffix}", d, d)
                linear(f"{block}.{attention}.to_out.0", d, d)
                shapes[f"{block}.{attention}.norm_q.weight"] = (d,)
                shapes[f"{block}.{attention}.norm_k.weight"] = (d,)
            if self.cross_attn_norm:
                shapes[f"{block}.norm2.weight"] = shapes[f"{block}.norm2.bias"] = (d,)
            linear(f"{block}.ffn.net.0.proj", d, self.ffn_dim)
            linear(f"{block}.ffn.net.2", self.ffn_dim, d)
        linear("proj_out", d, self.out_channels * math.prod(self.patch_size))
        return shapes

    def parameters(self, patterns: Iterable[str] = ("*",)) -> int:
        """Parameters of one expert whose name matches one of the shell-style ``patterns``.

        Raises:
            ValueError: when a pattern matches nothing.
        """
        shapes, chosen = self.parameter_shapes(), set()
        for pattern in patterns:
            matches = {name for name in shapes if fnmatchcase(name, pattern)}
            if not matches:
                raise ValueError(f"the pattern {pattern!r} matches no parameter; names look like {list(shapes)[5:9]}")
            chosen |= matches
        return sum(math.prod(shapes[name]) for name in chosen)


PRESETS: dict[str, ModelSpec] = {
    "wan2.1-t2v-1.3b": ModelSpec(num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960),
    "wan2.1-t2v-14b": ModelSpec(num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824),
    "wan2.2-t2v-a14b": ModelSpec(
        num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_experts=2, boundary=0.875
    ),
    "tiny": ModelSpec(
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=24,
        ffn_dim=384,
        text_dim=64,
        text_len=16,
        freq_dim=64,
    ),
}
