"""Products of frozen layers in float8. Run: pytest tests/model/test_float8.py"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from domainshuttle.model.float8 import Float8Linear, use_float8
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_near_those_of_float64(dtype: torch.dtype) -> None:
    """Rows of very different sizes alike: each has a scale of its own."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=False).requires_grad_(False)
    exact = nn.Linear(64, 48, bias=False).double()
    exact.load_state_dict(layer.state_dict())
    layer.__class__ = Float8Linear
    sizes = torch.tensor([1e-4, 1.0, 1e3]).repeat_interleave(20)[:, None]
    x = (torch.randn(60, 64) * sizes).to(dtype).view(3, 20, 64).requires_grad_()
    reference = x.detach().double().requires_grad_()
    back = torch.randn(3, 20, 48).to(dtype)
    found, expected = layer(x), exact(reference)
    assert found.dtype == dtype
    found.backward(back)
    expected.backward(back.double())
    for one, right in ((found, expected), (x.grad, reference.grad)):
        for part, whole in zip(one, right, strict=True):
            assert 1e-3 < (part.double() - whole).norm() / whole.norm() < 0.06


def test_only_frozen_layers_of_the_blocks_change(make_model: Callable[..., DomainShuttleTransformer3DModel]) -> None:
    model = make_model(num_attention_heads=2, attention_head_dim=16)
    before = {name: type(layer) for name, layer in model.named_modules()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn1" in name or "_ref" in name)
    changed = use_float8(model)
    layers = ("attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
    assert sorted(changed) == sorted(f"blocks.{i}.{layer}" for i in range(2) for layer in layers)
    for name, layer in model.named_modules():
        assert type(layer) is (Float8Linear if name in changed else before[name])
    assert use_float8(make_model(num_attention_heads=2, attention_head_dim=16)) == []  # all are trained
