"""Sizes of the model: presets, parameters, FLOPs and memory. Needs no torch, so planning runs anywhere at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
"""Ends of the names of an adapter's parameters, as in PEFT: A [rank, in] and B [out, rank]."""


def lora_layer(name: str) -> str | None:
    """The layer of which ``name`` is a parameter of the adapter; None: it is none."""
    layer, _, last = name.rpartition(".lora_")
    return layer if layer and f"lora_{last}" in (LORA_A, LORA_B) else None


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters of the linear layers that the patterns name."""

    rank: int
    targets: tuple[str, ...]
    """Patterns of layers' names, or of their ends, as PEFT takes them: ``to_q``, ``attn1.*``, ``blocks.0.*``."""
    scale: float = 1.0
    """With which what an adapter adds is multiplied: alpha / rank."""

    def selects(self, layer: str) -> bool:
        """Whether the layer of this name gets an adapter."""
        return any(_names(pattern, layer) for pattern in self.targets)

    def unused(self, layers: Iterable[str]) -> list[str]:
        """The patterns that name none of these layers."""
        names = list(layers)
        return [pattern for pattern in self.targets if not any(_names(pattern, layer) for layer in names)]


def _names(pattern: str, layer: str) -> bool:
    return fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}")


@dataclass(frozen=True)
class ModelSpec:
    """Architecture of one expert; names and defaults are those of ``DomainShuttleTransformer3DModel``'s arguments.

    Raises:
        ValueError: for values that no network has.
    """

    num_layers: int = 40
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    ffn_dim: int = 13824
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
    lora: LoraSpec | None = None
    """Adapters that a stage trains: no part of the network's own description."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value, least = getattr(self, name), 0 if name == "max_references" else 1
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
        if len(self.patch_size) != 3 or not all(type(size) is int and size > 0 for size in self.patch_size):
            raise ValueError(f"patch_size is {self.patch_size!r}; expected frames, rows and columns, each at least 1")
        if self.attention_head_dim % 2:
            raise ValueError(f"attention_head_dim is {self.attention_head_dim}; RoPE turns pairs of channels")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {allowed}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSpec:
        """The size of a network by its arguments, or its ``config.json``; what a spec does not know is passed over.

        Raises:
            ValueError: for values that no network has.
        """
        known = {name: value for name, value in config.items() if name in SPEC_FIELDS}
        return cls(**known | {"patch_size": tuple(config.get("patch_size", cls.patch_size))})

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
        del config["num_experts"], config["lora"]
        return config

    def tokens(self, latent_size: tuple[int, int, int]) -> int:
        """Video tokens of latents of ``latent_size`` (frames, height, width)."""
        return math.prod(size // patch for size, patch in zip(latent_size, self.patch_size, strict=True))

    def reference_tokens(self, latent_size: tuple[int, int, int]) -> int:
        """Tokens of one reference image beside a video of ``latent_size``."""
        return self.tokens((self.patch_size[0], *latent_size[1:]))

    def linear_layers(self) -> list[str]:
        """Names of the linear layers, which may have adapters."""
        shapes = replace(self, lora=None).parameter_shapes()
        layers = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        return [name for name in layers if name != "domain_embedding_ref"]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one expert, by name, in the network's names; of adapters too."""
        return dict(_shapes(self))

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        d, shapes = self.dim, {}

        def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> None:
            shapes[f"{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{name}.bias"] = (n_out,)
            if self.lora is not None and self.lora.selects(name):
                shapes[f"{name}.{LORA_A}"] = (self.lora.rank, n_in)
                shapes[f"{name}.{LORA_B}"] = (n_out, self.lora.rank)

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
        shapes = self.parameter_shapes()
        return sum(math.prod(shapes[name]) for name in _selected(self, tuple(patterns)))

    def step_flops(
        self,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        references: int = 0,
        paired_references: int | None = None,
        text_tokens: int | None = None,
        trained: Iterable[str] = ("*",),
        recompute: bool = False,
    ) -> StepFlops:
        """FLOPs of one training step of one expert: matrix products, two for each multiplication and addition.

        A frozen weight costs no weight gradient, and what lies before the first trained weight no gradient at all.

        Args:
            latent_size: latent frames, height and width.
            batch: samples.
            references: images a sample.
            paired_references: images of the second set, when the cross-pair loss runs its frozen forward.
            text_tokens: length of the text; default ``text_len``.
            trained: patterns of the trained parameters' names.
            recompute: whether blocks are run again in the backward pass (gradient checkpointing).
        """
        patterns = tuple(trained)
        _selected(self, patterns)  # raises for a pattern without matches
        sizes = latent_size, batch, text_tokens if text_tokens is not None else self.text_len
        tally = _trace(self, *sizes, references, patterns)
        frozen = _Tally({}, frozenset())
        if paired_references is not None:
            # of the second set of references only what the first does not have too: both go through in one call
            frozen = _trace(self, *sizes, paired_references, (), shared=True)
        again = tally.blocks_forward if recompute else 0
        of_attention = tally.attention_forward, tally.attention_backward, frozen.attention_forward
        return StepFlops(tally.forward, tally.backward, frozen.forward, again, *of_attention)

    def product_flops(self, tokens: int, batch: int = 1) -> dict[Product, int]:
        """FLOPs of a block's forward by the product that may be kept, for ``batch`` samples of ``tokens`` tokens."""
        rows = batch * tokens
        return {
            "attention": 4 * rows * tokens * self.dim,
            "qkv": 6 * rows * self.dim**2,
            "ffn": 2 * rows * self.dim * self.ffn_dim,
        }

    def product_bytes(self, tokens: int, batch: int = 1) -> dict[Product, int]:
        """Bytes in bf16 of what a block keeps of each product: of attention its output and a float32 for each head and
        query (the log-sum-exp of its scores), of ``qkv`` the three projections, of ``ffn`` the first product."""
        rows = batch * tokens
        return {
            "attention": rows * (2 * self.dim + 4 * self.num_attention_heads),
            "qkv": rows * 6 * self.dim,
            "ffn": rows * 2 * self.ffn_dim,
        }

    def block_kept_bytes(
        self, tokens: int, trained: Iterable[str] = ("*",), batch: int = 1, reference_share: float = 1.0
    ) -> int:
        """Bytes that one block keeps for its backward pass where nothing is computed again, in bf16 with trained
        parameters in float32: counted on the network. A frozen linear layer does not keep its input, and of what is
        modulated only the references' tokens are kept (``reference_share`` of all) where they alone are trained."""
        names, rows = _selected(self, tuple(trained)), batch * tokens

        def trains(*layers: str) -> bool:
            return any(f"blocks.0.{layer}" in name and not name.endswith("bias") for layer in layers for name in names)

        kept = [trains("attn1.to_q", "attn1.to_k", "attn1.to_v"), trains("attn2.to_q"), trains("ffn.net.0")]
        # a frozen norm is torch's own, which keeps its input in float32
        kept += [not trains(norm) for norm in ("attn1.norm_q", "attn1.norm_k", "attn2.norm_q")]
        # what is scaled, in float32, and gated, twice each
        everywhere = any(name == "blocks.0.scale_shift_table" or "time_" in name for name in names)
        modulated = 1.0 if everywhere else reference_share * any(part in name for name in names for part in _DOMAIN)
        per_width = _BLOCK_BYTES + 2 * sum(kept) + 12 * modulated
        per_hidden = 2 + 2 * trains("ffn.net.2")
        # what comes out of each A, which B's gradient needs
        low_rank = (
            2 * sum(self.lora.rank for name in names if name.startswith("blocks.0.") and name.endswith(LORA_B))
            if self.lora
            else 0
        )
        return int(rows * (per_width * self.dim + per_hidden * self.ffn_dim + 8 * self.num_attention_heads + low_rank))


_HINTS = get_type_hints(ModelSpec)
SPEC_FIELDS = frozenset(field.name for field in fields(ModelSpec) if field.name != "lora")
_SIZES = [field.name for field in fields(ModelSpec) if _HINTS[field.name] is int]
_CHOICES = {name: get_args(hint) for name, hint in _HINTS.items() if get_origin(hint) is Literal}
_DOMAIN = ("scale_shift_table_ref", "domain_embedding_ref", "film_")
"""Parts of names of the parameters that modulate references."""
_BLOCK_BYTES = 30
"""Bytes that a block keeps for a token and each of its width, whatever is trained: counted on the network."""
Product = Literal["attention", "qkv", "ffn"]
"""What a block may keep for its backward pass: self-attention, its three projections, the FFN's first product."""


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of the parts of a training step."""

    forward: int
    backward: int
    frozen_forward: int
    """The cross-pair loss's forward without gradients."""
    recompute: int
    attention_forward: int = 0
    """Of ``forward``, the products of attention."""
    attention_backward: int = 0
    """Of ``backward``."""
    attention_frozen: int = 0
    """Of ``frozen_forward``."""

    @property
    def model(self) -> int:
        """What the mathematics needs: the base of the model FLOPs utilisation (MFU)."""
        return self.forward + self.backward + self.frozen_forward

    @property
    def hardware(self) -> int:
        """What is computed, recomputation included."""
        return self.model + self.recompute


class _Tally:
    """Counts FLOPs along the network, and follows which tensors need a gradient."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], trained: frozenset[str]) -> None:
        self.forward = self.backward = self.blocks_forward = 0
        self.attention_forward = self.attention_backward = 0
        self._shapes = shapes
        self._trained = trained

    def trains(self, *names: str) -> bool:
        return any(name in self._trained for name in names)

    def linear(self, name: str, rows: int, needs: bool) -> bool:
        """``rows`` vectors through the layer ``name``; returns whether the result needs a gradient."""
        weight = f"{name}.weight"
        flops = 2 * rows * math.prod(self._shapes[weight])
        self.forward += flops
        self.backward += flops * (needs + self.trains(weight))
        out = needs or self.trains(weight, f"{name}.bias")
        if f"{name}.{LORA_A}" in self._shapes:  # the same of A, and then of B
            out = self._adapter(name, rows, needs) or out
        return out

    def _adapter(self, name: str, rows: int, needs: bool) -> bool:
        for weight in (f"{name}.{LORA_A}", f"{name}.{LORA_B}"):
            flops = 2 * rows * math.prod(self._shapes[weight])
            self.forward += flops
            self.backward += flops * (needs + self.trains(weight))
            needs = needs or self.trains(weight)
        return needs

    def attention(self, queries: int, keys: int, width: int, needs: tuple[bool, bool, bool]) -> bool:
        """Attention of all heads; ``needs`` of query, key and value."""
        q, k, v = needs
        flops = 2 * queries * keys * width
        backward = flops * (q + k) + flops * ((q or k) + v)
        self.forward += 2 * flops
        self.backward += backward
        self.attention_forward += 2 * flops
        self.attention_backward += backward
        return q or k or v


@lru_cache(maxsize=64)
def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return spec._parameter_shapes()


@lru_cache(maxsize=64)
def _selected(spec: ModelSpec, patterns: tuple[str, ...]) -> frozenset[str]:
    """Names of the parameters that match one of the patterns. Raises ValueError when a pattern matches nothing."""
    shapes, chosen = spec.parameter_shapes(), set[str]()
    for pattern in patterns:
        matches = {name for name in shapes if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"the pattern {pattern!r} matches no parameter; names look like {list(shapes)[5:9]}")
        chosen |= matches
    return frozenset(chosen)


@lru_cache(maxsize=4096)
def _trace(
    spec: ModelSpec,
    latent_size: tuple[int, int, int],
    batch: int,
    text_tokens: int,
    references: int,
    patterns: tuple[str, ...],
    shared: bool = False,
) -> _Tally:
    """Follow a forward of the network, as ``transformer`` and ``mot`` compute it.

    With ``shared`` the embeddings of video, time and text are there already.
    """
    tally = _Tally(spec.parameter_shapes(), _selected(spec, patterns))
    own = "_ref" if spec.reference_projections == "own" else ""
    video = batch * spec.tokens(latent_size)
    reference = batch * references * spec.reference_tokens(latent_size)
    text = batch * text_tokens

    domain = False
    x = tally.linear(f"patch_embedding{own}", reference, False)
    if spec.domain_adaln:
        domain = tally.trains("domain_embedding_ref.weight")
        for name in ("film_scale_ref", "film_shift_ref"):
            x = tally.linear(name, batch * references, domain) or x
    own_forward = tally.forward
    x = tally.linear("patch_embedding", video, False) or x
    time = tally.linear("condition_embedder.time_embedder.linear_1", batch, False)
    time = tally.linear("condition_embedder.time_embedder.linear_2", batch, time)
    timed = tally.linear("condition_embedder.time_proj", batch, time)
    modulation = timed or domain
    context = tally.linear("condition_embedder.text_embedder.linear_1", text, False)
    context = tally.linear("condition_embedder.text_embedder.linear_2", text, context)
    if shared:
        tally.forward = own_forward

    before, not_again = tally.forward, 0
    for i in range(spec.num_layers):
        block = f"blocks.{i}"
        modulated = modulation or tally.trains(f"{block}.scale_shift_table", f"{block}.scale_shift_table_ref")
        x = x or modulated
        needs = []
        for projection in "qkv":
            name = f"{block}.attn1.to_{projection}"
            out = tally.linear(name, video, x)
            out = tally.linear(f"{name}{own}", reference, x) or out
            needs.append(out or tally.trains(f"{block}.attn1.norm_{projection}.weight"))
        tokens = spec.tokens(latent_size) + references * spec.reference_tokens(latent_size)
        # every sample attends within itself
        out = tally.attention(batch * tokens, tokens, spec.dim, (needs[0], needs[1], needs[2]))
        x = tally.linear(f"{block}.attn1.to_out.0", video + reference, out) or x
        kept = video + (reference if i + 1 < spec.num_layers else 0)
        x = x or tally.trains(f"{block}.norm2.weight", f"{block}.norm2.bias")
        q = tally.linear(f"{block}.attn2.to_q", kept, x) or tally.trains(f"{block}.attn2.norm_q.weight")
        k = tally.linear(f"{block}.attn2.to_k", text, context) or tally.trains(f"{block}.attn2.norm_k.weight")
        v = tally.linear(f"{block}.attn2.to_v", text, context)
        out = tally.attention(kept, text_tokens, spec.dim, (q, k, v))
        x = tally.linear(f"{block}.attn2.to_out.0", kept, out) or x
        out = tally.linear(f"{block}.ffn.net.0.proj", kept, x)
        begun = tally.forward
        x = tally.linear(f"{block}.ffn.net.2", kept, out) or x
        if not (timed or tally.trains(f"{block}.scale_shift_table", f"{block}.ffn.net.2.weight")):
            not_again += tally.forward - begun  # what comes out of it is needed for the gate's gradient alone
    tally.blocks_forward = tally.forward - before - not_again
    tally.linear("proj_out", video, x or time or tally.trains("scale_shift_table"))
    return tally


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
