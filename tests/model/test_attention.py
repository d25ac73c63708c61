"""Attention on a CPU: what float64 gives by the formula, and no memory that grows with the square of the length.

Run: python -m pytest tests/model/test_attention.py
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from domainshuttle.model.attention import attend
from domainshuttle.model.modulation import Rows
from domainshuttle.model.mot import DomainMoTBlock

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""The relative error of a result: of sums in float32, and of rounding it once to bf16."""


def make(batch: int, queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, width)] + 2 * [(batch, keys, heads, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in float64."""
    query, key, value = (one.double() for one in (query, key, value))
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 300),
    keys=st.integers(1, 300),
    heads=st.integers(1, 3),
    width=st.sampled_from([2, 8, 24, 64, 128]),
    dtype=st.sampled_from(list(DTYPES)),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_formula(
    batch: int, queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, masked: bool, seed: int
) -> None:
    given = [one.requires_grad_() for one in make(batch, queries, keys, heads, width, dtype, seed)]
    exact = [one.detach().double().requires_grad_() for one in given]
    mask = None
    if masked:
        kept = torch.Generator().manual_seed(seed)
        mask = torch.rand(batch, 1, 1, keys, generator=kept) < 0.7
        mask[..., 0] = True
    out, expected = attend(*given, mask), formula(*exact, mask)
    assert out.dtype == dtype and out.shape == expected.shape
    back = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    out.backward(back)
    expected.backward(back.double())
    for found, right in zip([out, *(one.grad for one in given)], [expected, *(one.grad for one in exact)], strict=True):
        assert found is not None and right is not None
        error = (found.double() - right).abs().max()
        assert error <= 4 * DTYPES[dtype] * max(1.0, right.abs().max().item()), error


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("tokens", [16, 200, 777, 1100])
def test_a_sample_does_not_depend_on_those_beside_it(dtype: torch.dtype, tokens: int) -> None:
    query, key, value = make(5, tokens, tokens, 2, 24, dtype, 3)
    together = attend(query, key, value)
    for number in range(5):
        own = slice(number, number + 1)
        assert attend(query[own], key[own], value[own]).equal(together[own])


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Gathers the bytes of what is saved for the backward pass, each storage once."""
    seen: set[int] = set()
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_a_block_saves_grows_with_the_length_and_not_with_its_square(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block, width = DomainMoTBlock(32, 64, 2).to(dtype), 32

    def saved(frames: int) -> int:
        per_frame, text = 64, 16
        tokens = torch.randn(1, frames, per_frame, width, dtype=dtype)
        rotary = tuple(torch.ones(1, frames * per_frame, 1, width // 2) for _ in range(2))
        with saved_bytes() as sizes:
            out = block(
                tokens, torch.randn(1, text, width, dtype=dtype), Rows(*torch.randn(2, 1, 1, 6, width)), rotary, None
            )
        out.sum().backward()
        return sum(sizes)

    short, long = saved(8), saved(32)
    assert long < 4.1 * short
    assert long < 32 * 64 * width * 4 * 60  # 60 float32 values of a token's width: far below 2 x 2048 a token


def resident(kind: str) -> int:
    """Bytes of this process's memory now (VmRSS) or at most (VmHWM)."""
    found = re.search(kind + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_no_process_holds_a_square_of_the_length() -> None:
    """Scores of 6,144 tokens and two heads would be 302 MB in float32, and plain products hold several."""
    given = [one.requires_grad_() for one in make(1, 6144, 6144, 2, 16, torch.bfloat16, 0)]
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    except OSError:
        pytest.skip("this machine does not let a process forget its highest use of memory")
    before = resident("VmRSS")
    attend(*given).sum().backward()
    assert resident("VmHWM") - before < 100e6
