"""What one block keeps for its backward pass: the specification against meta tensors.

Run: python -m pytest tests/model/test_kept_bytes.py
"""

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor

from domainshuttle.model import attention
from domainshuttle.model.lora import adapt
from domainshuttle.model.spec import LoraSpec, ModelSpec
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

SMALL = ModelSpec(num_attention_heads=2, ffn_dim=512, text_dim=64, text_len=16, freq_dim=64)


class Fused(torch.autograd.Function):
    """What a fused kernel keeps; torch has none on meta tensors."""

    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> Tensor:
        out = torch.empty_like(qkv[0])
        ctx.save_for_backward(*qkv, out, qkv[0].new_empty(qkv[0].shape[:-1], dtype=torch.float32))
        return out


def fused(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    out: Tensor = Fused.apply(*(one.transpose(1, 2) for one in (query, key, value)))
    return out.transpose(1, 2)


def kept(spec: ModelSpec, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass as the engine makes it, and its tokens."""
    with torch.device("meta"):
        model = DomainShuttleTransformer3DModel(**spec.transformer_config())
    if spec.lora is not None:
        adapt(model, spec.lora)
    for name, old in list(model.named_parameters()):
        trains = any(fnmatchcase(name, pattern) for pattern in trained)
        dtype = torch.float32 if trains or model.keeps_float32(name) else torch.bfloat16
        owner, _, short = name.rpartition(".")
        own = torch.nn.Parameter(torch.empty(old.shape, dtype=dtype, device="meta"), requires_grad=trains)
        setattr(model.get_submodule(owner), short, own)
    model.compute_in(torch.bfloat16)
    model.set_attention_backend("native")
    model.patch_embedding.register_forward_hook(lambda _, __, out: out if out.requires_grad else out.requires_grad_())
    monkeypatch.setattr(attention, "dispatch_attention_fn", fused)
    monkeypatch.setattr(type(model), "_check", lambda *_: None)
    weights = {one.untyped_storage()._cdata for one in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    frames, side, references = 4, 32, 2

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    labels = torch.zeros(1, references, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(
            empty(1, 16, frames, side, side), torch.empty(1, device="meta"), empty(1, 16, 64),
            empty(1, references, 16, side, side), labels, labels,
        )  # fmt: skip
    assert output.sample.requires_grad
    return sum(storage.nbytes() for storage in storages.values()), (frames + references) * (side // 2) ** 2


@pytest.mark.parametrize(
    "trained",
    [
        ("*",),
        ("blocks.*.attn1.*", "*_ref*"),
        ("blocks.*.ffn.*",),
        ("blocks.*.attn2.*",),
        ("blocks.*.attn1.*",),
    ],
    ids=lambda patterns: " ".join(patterns),
)
def test_what_a_block_keeps_is_what_the_specification_says(
    trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the difference of two depths, where all else cancels, at two widths."""
    for heads in (2, 4):
        spec = replace(SMALL, num_attention_heads=heads)
        (deep, tokens), (flat, _) = (kept(replace(spec, num_layers=n), trained, monkeypatch) for n in (5, 3))
        # two of six frames are references'; what is gated of them alone is kept beside autograd's tensors
        expected = spec.block_kept_bytes(tokens, trained, reference_share=2 / 6)
        beside = 4 * tokens * 2 / 6 * spec.dim if "*_ref*" in trained else 0
        assert expected - beside == pytest.approx((deep - flat) / 2, rel=0.03)


def test_what_a_block_keeps_with_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = ("*.lora_A.weight", "*.lora_B.weight")
    lora = LoraSpec(16, ("attn1.to_*", "attn2.to_q", "ffn.net.0.proj", "ffn.net.2"))
    spec = replace(SMALL, lora=lora)
    (deep, tokens), (flat, _) = (kept(replace(spec, num_layers=n), adapters, monkeypatch) for n in (5, 3))
    expected = spec.block_kept_bytes(tokens, adapters, reference_share=2 / 6)
    assert expected == pytest.approx((deep - flat) / 2, rel=0.03)
