"""Kernels between the products against the plain formulas in float64, and their bytes on meta tensors.

Kernels run in Triton's interpreter, where Triton is installed: pip install domainshuttle[kernels].
Run: pytest tests/model/test_fused.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from domainshuttle.model import attention, fused, mot
from domainshuttle.model.modulation import Rows
from domainshuttle.model.mot import DomainMoTBlock, FinalDomainMoTBlock
from domainshuttle.model.rope import apply_rotary

needs_triton = pytest.mark.skipif(not fused.available(), reason="needs triton: pip install domainshuttle[kernels]")
B, F, R, S, D = 2, 3, 2, 5, 20
"""Samples, frames of video, references, tokens a frame, channels."""


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.requires_grad_()


def by_frame(rows: Rows) -> Tensor:
    return torch.cat([rows.video.expand(-1, F, -1, -1), rows.reference], 1)


def rows(seed: int) -> Rows:
    return Rows(drawn(seed, B, 1, 1, D), drawn(seed + 50, B, R, 1, D))


def exact(given: Any) -> Any:
    """The same in float64, to be trained likewise."""
    if isinstance(given, Rows):
        return Rows(*map(exact, given))
    if isinstance(given, Tensor):
        return given.detach().double().requires_grad_(given.requires_grad)
    return given


def tensors(given: Any) -> Iterator[Tensor]:
    for one in given:
        if isinstance(one, Rows):
            yield from one
        elif isinstance(one, Tensor):
            yield one


def norm(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


CHAINS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], list[Any]]]] = {
    "norm and modulation": (
        lambda x, scale, shift: fused.residual_norm(x, None, None, scale, shift, 1e-6)[1:],
        lambda x, scale, shift: (norm(x) * by_frame(scale) + by_frame(shift),),
        lambda: [drawn(1, B, F + R, S, D), rows(2), rows(3)],
    ),
    "gate, residual and affine norm": (
        lambda x, u, gate, w, b: fused.residual_norm(x, u, gate, w, b, 1e-6),
        lambda x, u, gate, w, b: ((y := x + u * by_frame(gate)), norm(y) * w + b),
        lambda: [drawn(1, B, F + R, S, D), drawn(2, B, F + R, S, D), rows(3), drawn(4, D), drawn(5, D)],
    ),
    "residual, norm and modulation": (
        lambda x, u, scale, shift: fused.residual_norm(x, u, None, scale, shift, 1e-6),
        lambda x, u, scale, shift: ((y := x + u), norm(y) * by_frame(scale) + by_frame(shift)),
        lambda: [drawn(1, B, F + R, S, D), drawn(2, B, F + R, S, D), rows(3), rows(4)],
    ),
    "gate and residual": (
        lambda x, u, gate: (fused.gated_residual(x, u, gate),),
        lambda x, u, gate: (x + u * by_frame(gate),),
        lambda: [drawn(1, B, F + R, S, D), drawn(2, B, F + R, S, D), rows(3)],
    ),
}


@needs_triton
@pytest.mark.parametrize("trained", ["all", "references", "nothing but x"])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_and_its_gradients_are_those_of_its_formula(chain: str, trained: str) -> None:
    kernels, formula, make = CHAINS[chain]
    given = make()
    for one in given[1:]:
        for tensor in tensors([one]):
            tensor.requires_grad_(trained == "all")
        if isinstance(one, Rows):
            one.reference.requires_grad_(trained != "nothing but x")
    compare(kernels, formula, given)


def compare(kernels: Callable[..., Any], formula: Callable[..., Any], given: list[Any]) -> None:
    reference = [exact(one) for one in given]
    found, expected = kernels(*given), formula(*reference)
    backs = [drawn(90 + number, *one.shape).detach() for number, one in enumerate(expected)]
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), right, atol=2e-5, rtol=2e-5)
    torch.autograd.backward(found, backs)
    torch.autograd.backward(expected, [back.double() for back in backs])
    for one, right in zip(tensors(given), tensors(reference), strict=True):
        assert (one.grad is None) == (right.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad.double(), right.grad, atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("rotated", [False, True])
def test_a_norm_and_rotation_are_those_of_their_formula(rotated: bool) -> None:
    layer, exactly, head = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6).double(), 4
    with torch.no_grad():
        layer.weight.copy_(drawn(7, D))
        exactly.weight.copy_(layer.weight)
    positions = torch.arange(6.0).view(1, 6, 1, 1).expand(B, -1, -1, 1) * torch.tensor([0.3, 0.3, 1.1, 1.1])
    angles = (positions.cos(), positions.sin() * torch.tensor([-1.0, 1.0, -1.0, 1.0])) if rotated else None

    def formula(x: Tensor) -> tuple[Tensor]:
        y = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exactly.weight
        if angles is not None:
            y = apply_rotary(y.unflatten(2, (-1, head)), *(one.double() for one in angles)).flatten(2)
        return (y,)

    compare(lambda x: (fused.rms_rotary(x, layer, angles),), formula, [drawn(8, B, 6, D)])
    torch.testing.assert_close(layer.weight.grad.double(), exactly.weight.grad, atol=1e-4, rtol=1e-4)


def block_of(kind: type[DomainMoTBlock], **more: Any) -> DomainMoTBlock:
    torch.manual_seed(4)
    block = kind(16, 40, 2, **more)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


@needs_triton
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("options", [{}, {"cross_attn_norm": False}, {"reference_projections": "shared"}])
@pytest.mark.parametrize("kind", [DomainMoTBlock, FinalDomainMoTBlock])
def test_a_block_computes_what_its_reference_computes(kind: Any, options: dict[str, Any], samples: int) -> None:
    inputs = [
        drawn(1, samples, F + R, S, 16),
        drawn(2, samples, 3, 16).detach(),
        Rows(drawn(3, samples, 1, 6, 16).detach(), drawn(4, samples, R, 6, 16)),
        tuple(drawn(number, samples, (F + R) * S, 1, 8).detach() for number in (5, 6)),
        None,
    ]
    found = []
    for transform in (lambda block: fused.transform.__get__(block), lambda block: block.transform):
        block = block_of(kind, **options)
        given = [one.detach().requires_grad_(one.requires_grad) if isinstance(one, Tensor) else one for one in inputs]
        out = transform(block)(*given)
        out.square().mean().backward()
        found.append([out, given[0].grad, *(parameter.grad for parameter in block.parameters())])
    for one, right in zip(*found, strict=True):
        torch.testing.assert_close(one, right, atol=2e-5, rtol=2e-4)


class Bytes(TorchDispatchMode):
    """Bytes that operators read and write, but for products, attention, and what only looks at memory otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        name = str(func)
        if func.is_view or any(
            part in name for part in ("mm", "projections", "attention", "empty", "detach", "_unsafe_view", "alias")
        ):
            return out
        flat = [one for one in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        self.count += sum(one.numel() * one.element_size() for one in flat)
        return out


class Unread(torch.autograd.Function):
    """In the place of attention, whose bytes are its kernel's."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        ctx.like = query, key, value
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return *(torch.empty_like(one) for one in ctx.like), *[None] * (len(ctx.needs_input_grad) - 3)


def bytes_of(fuse: bool) -> tuple[float, float]:
    """Bytes a token and channel of a forward and a backward of a block of the 14B, with what stage 2 trains."""
    width, hidden, heads, video, references, tokens = 5120, 13824, 40, 21, 5, 1560
    with torch.device("meta"):
        block = DomainMoTBlock(width, hidden, heads).bfloat16()
        for name, parameter in block.named_parameters():
            trained = name.startswith("attn1.") or "_ref" in name
            parameter.requires_grad_(trained)
            keeps = any(part in ("norm1", "norm2", "norm3") or "table" in part for part in name.split("."))
            parameter.data = parameter.data.float() if keeps else parameter.data
        x = torch.empty(1, video + references, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        rotary = tuple(torch.empty(1, (video + references) * tokens, 1, width // heads) for _ in range(2))
        text = torch.empty(1, 512, width, dtype=torch.bfloat16)
        conditioning = Rows(torch.empty(1, 1, 6, width), torch.empty(1, references, 6, width, requires_grad=True))
        counted = []
        with Bytes() as seen:
            out = (fused.transform.__get__(block) if fuse else block.transform)(x, text, conditioning, rotary, None)
            counted.append(seen.count)
            seen.count = 0
            out.backward(torch.empty_like(out))
            counted.append(seen.count)
    units = (video + references) * tokens * width
    return counted[0] / units, counted[1] / units


def test_bytes_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read and written between the products, a token and channel. Of the reference's norms the meta device
    shows more steps than a GPU's kernels have, so it is only compared."""
    for module in (mot, attention):
        monkeypatch.setattr(module, "attend", lambda *given: Unread.apply(*given))
    forward, backward = bytes_of(fuse=True)
    assert forward < 60 and backward < 110, (forward, backward)
    plain_forward, plain_backward = bytes_of(fuse=False)
    assert forward < plain_forward / 3 and backward < plain_backward / 3
