"""float32 parameters in layers that compute in bf16. Run: pytest tests/model/test_mixed_precision.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from domainshuttle.model.mixed_precision import mix_precision
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]
WIDTH, OUT = 24, 10


def layers(seed: int = 0) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    made = {"linear": nn.Linear(WIDTH, OUT), "no bias": nn.Linear(WIDTH, OUT, bias=False), "norm": nn.RMSNorm(WIDTH)}
    for layer in made.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


def inputs(rows: int = 300) -> tuple[Tensor, Tensor]:
    """An input [2, rows / 2, in], and the gradient of an output as wide."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, rows // 2, WIDTH, generator=generator).bfloat16() for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("name", layers())
def test_a_layer_computes_as_in_bf16_and_its_gradients_are_those_of_float64(name: str) -> None:
    """The reference is the same layer in float64 on what the bf16 layer sees: its rounded weights and its input."""
    mixed, half, exact = (layers()[name] for _ in range(3))
    mix_precision(mixed)
    half.bfloat16()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    exact.double()
    x, gradient = inputs()
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = mixed(ours), exact(theirs)
    assert found.dtype == torch.bfloat16 and found.equal(half(x))
    gradient = gradient[..., : found.shape[-1]]
    found.backward(gradient)
    expected.backward(gradient.double())
    for parameter, reference in zip(mixed.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and reference.grad is not None
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-6, error  # of a bf16 gradient it would be 1e-3
    assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.bfloat16
    assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < 3e-3


@pytest.mark.parametrize("name", layers())
def test_nothing_but_the_parameter_itself_is_kept_of_a_weight(name: str) -> None:
    """A rounded copy would keep the weights of all blocks in memory until the backward pass."""
    layer = layers()[name]
    mix_precision(layer)
    x = inputs()[0].requires_grad_()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    weight = next(layer.parameters())
    kept += [y.grad_fn.weight] if name != "norm" else []  # of a linear layer out of reach of activation checkpointing
    others = [tensor for tensor in kept if tensor.data_ptr() not in (weight.data_ptr(), x.data_ptr())]
    assert any(tensor.data_ptr() == weight.data_ptr() for tensor in kept)
    assert all(tensor.shape[:-1] == x.shape[:-1] for tensor in others)


def test_where_the_types_agree_a_layer_stays_what_it_was() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for name, plain in layers().items():
            layer = layers()[name].to(dtype)
            mix_precision(layer)
            x = inputs()[0].to(dtype)
            assert isinstance(layer, type(plain))
            assert layer(x).equal(plain.to(dtype)(x)), name


def predict(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return model(  # type: ignore[no-any-return]
        torch.randn(2, 16, 2, 4, 6, generator=generator),
        torch.tensor([421.0, 999.5]),
        torch.randn(2, 5, 32, generator=generator),
        torch.randn(2, 2, 16, 4, 6, generator=generator),
        torch.tensor([[0, 1], [0, 0]]),
        torch.tensor([[0, 2], [4, -1]]),
    ).sample


@pytest.mark.parametrize("changes", [{}, {"reference_projections": "shared"}, {"domain_adaln": False}])
def test_float32_weights_compute_what_a_model_loaded_in_bf16_computes(
    make_model: MakeModel, changes: dict[str, Any], tmp_path: Any
) -> None:
    model = make_model(**changes)
    model.save_pretrained(tmp_path)
    loaded = DomainShuttleTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        exact = predict(model)
        model.compute_in(torch.bfloat16)
        found, expected = predict(model), predict(loaded)
    assert found.dtype == torch.bfloat16 and found.equal(expected)
    assert 0 < (found.float() - exact).norm() / exact.norm() < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_gradients_are_the_sum_over_samples_however_they_are_cut(make_model: MakeModel) -> None:
    """Of every parameter, in float64 added up over single samples, against one pass over both."""
    model = make_model()
    model.compute_in(torch.bfloat16)
    output = predict(model)
    output.float().square().sum().backward()
    whole = {
        name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    sums = {name: torch.zeros_like(value) for name, value in whole.items()}
    for sample in range(2):
        model.zero_grad()
        predict(model)[sample].float().square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.double()
    assert whole.keys() == {name for name, _ in model.named_parameters()}
    for name, value in whole.items():
        assert (sums[name] - value).norm() <= 2e-6 * value.norm(), name
