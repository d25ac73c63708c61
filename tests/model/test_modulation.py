"""Modulation by frame and its own gradients. Run: pytest tests/model/test_modulation.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from domainshuttle.model.modulation import Rows, gated_residual, scale_shift


def expand(video: Tensor, reference: Tensor, frames: int) -> Tensor:
    """A row of each frame, written out."""
    rows = [video[:, 0] if i < frames - reference.shape[1] else reference[:, i - frames] for i in range(frames)]
    return torch.stack(rows, 1) + 0 * reference.sum()  # no part of a batch without references, yet needed


def drawn(seed: int, b: int, f: int, r: int, s: int, d: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, f + r, s, d), (b, f + r, s, d), (b, 1, 1, d), (b, r, 1, d), (b, 1, 1, d), (b, r, 1, d)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "scale_shift": (
        lambda x, _, v, r, sv, sr: scale_shift(x, Rows(v, r), Rows(sv, sr), x.dtype),
        lambda x, _, v, r, sv, sr: x * expand(v, r, x.shape[1]) + expand(sv, sr, x.shape[1]),
    ),
    "gated_residual": (
        lambda x, u, v, r, *_: gated_residual(x, u, Rows(v, r)),
        lambda x, u, v, r, *_: x + u * expand(v, r, x.shape[1]),
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 3), (0, 3), (1, 4), (1, 5)))),
    wanted=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_values_and_gradients_are_those_of_the_formula(
    operation: str, seed: int, sizes: tuple[int, ...], wanted: list[bool]
) -> None:
    """Whatever needs a gradient. Values are float32's and gradients too: the tolerance is that of float32."""
    ours, formula = OPERATIONS[operation]
    exact = [one.requires_grad_(wants) for one, wants in zip(drawn(seed, *sizes), wanted, strict=True)]
    given = [one.detach().float().requires_grad_(one.requires_grad) for one in exact]
    found, expected = ours(*given), formula(*exact)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    if not found.requires_grad:
        return
    back = torch.randn(expected.shape, dtype=torch.float64)
    found.backward(back.float())
    expected.backward(back)
    for one, reference in zip(given, exact, strict=True):
        assert (one.grad is None) == (reference.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad.double(), reference.grad, atol=1e-4, rtol=1e-4)


def kept(run: Callable[[], Any]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()  # no part of a larger one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    out.float().sum().backward()
    return shapes


def test_only_the_references_are_kept_where_only_they_are_trained() -> None:
    x, update, video, reference, shift, shift_reference = (one.bfloat16() for one in drawn(0, 1, 4, 2, 3, 8))
    for one in (x, update, reference, shift_reference):
        one.requires_grad_()
    assert kept(lambda: scale_shift(x, Rows(video, reference), Rows(shift, shift_reference), x.dtype)) == [(1, 2, 3, 8)]
    # nothing that activation checkpointing would see, and so compute again
    assert kept(lambda: gated_residual(x, update, Rows(video, reference))) == []
    video.requires_grad_()
    assert kept(lambda: gated_residual(x, update, Rows(video, reference))) == [(1, 6, 3, 8)]
