"""DualRoPE. Run: pytest tests/model/test_rope.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.model.rope import apply_rotary, axis_dims, image_index, rotary_embedding


def embedding(grid: tuple[int, int, int], subjects: list[int], head_dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    m = torch.tensor([subjects], dtype=torch.long).view(1, -1)
    return rotary_embedding(head_dim, grid, m, image_index(m, None))


@given(head_dim=st.integers(3, 80).map(lambda n: 2 * n))
def test_axes_fill_the_head(head_dim: int) -> None:
    dims = axis_dims(head_dim)
    assert sum(dims) == head_dim
    assert all(dim % 2 == 0 for dim in dims)
    assert axis_dims(128) == (44, 42, 42)


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    subjects=st.lists(st.integers(0, 4), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_no_two_tokens_share_a_place(grid: tuple[int, int, int], subjects: list[int]) -> None:
    cos, sin = embedding(grid, sorted(subjects))
    rows = torch.cat([cos, sin], -1)[0, :, 0]
    assert rows.shape[0] == (grid[0] + len(subjects)) * grid[1] * grid[2]
    assert len(rows.unique(dim=0)) == len(rows)


def test_places_are_the_papers() -> None:
    """Images of two subjects differ by (h, w), two images of one subject by (0, w)."""
    f, h, w = 2, 3, 5
    cos, sin = embedding((f, h, w), [0, 0, 1])
    angles = torch.atan2(sin[..., 1::2], cos[..., 1::2])[0, :, 0].view(f + 3, h, w, 12)
    t, y, x = angles[..., 0], angles[..., 4], angles[..., 8]  # first frequency (1) of each axis: the angle is the place

    def place(frame: int) -> tuple[float, float, float]:
        return tuple(float(axis[frame, 0, 0]) for axis in (t, y, x))

    def wrapped(*position: int) -> tuple[float, float, float]:
        return tuple(float(torch.atan2(torch.tensor(float(p)).sin(), torch.tensor(float(p)).cos())) for p in position)

    assert place(0) == pytest.approx(wrapped(1, 0, 0), abs=1e-6)
    assert place(1) == pytest.approx(wrapped(2, 0, 0), abs=1e-6)
    assert place(2) == pytest.approx(wrapped(0, h, w), abs=1e-6)
    assert place(3) == pytest.approx(wrapped(0, h, 2 * w), abs=1e-6)
    assert place(4) == pytest.approx(wrapped(0, 2 * h, 3 * w), abs=1e-6)


def test_image_index_counts_real_images() -> None:
    subjects = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    assert image_index(subjects, None).tolist() == [[0, 1, 2, 3]] * 2
    assert image_index(subjects, mask)[0, [0, 2, 3]].tolist() == [0, 1, 2]


def test_gradient_against_finite_differences() -> None:
    cos, sin = embedding((1, 2, 2), [0])
    x = torch.randn(1, 8, 2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos.double(), sin.double()), x)


@given(offset=st.tuples(st.integers(0, 50), st.integers(0, 300), st.integers(0, 500)))
@settings(max_examples=30, deadline=None)
def test_rotations_keep_length_and_depend_on_differences(offset: tuple[int, int, int]) -> None:
    """q(p + d) . k(p) is the same for every p, here far along each axis, as Wan's attention needs."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 24, generator=generator) for _ in range(2))

    def at(x: torch.Tensor, t: int, y: int, w: int) -> torch.Tensor:
        cos, sin = rotary_embedding(24, (t + 1, y + 1, w + 1), torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0))
        return apply_rotary(x, cos[:, -1:], sin[:, -1:])

    t, y, w = (min(o, limit) for o, limit in zip(offset, (5, 12, 12), strict=True))
    torch.testing.assert_close(at(q, t, y, w).norm(), q.norm())
    near = (at(q, 1, 2, 0) * at(k, 0, 1, 3)).sum()
    far = (at(q, t + 1, y + 2, w) * at(k, t, y + 1, w + 3)).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)
