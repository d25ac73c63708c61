"""Tiny real models with weights large enough that every part of the network shows in its output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """Constructor arguments shared by our model and diffusers' Wan."""
    return dict(TINY)


@pytest.fixture
def make_model() -> Callable[..., DomainShuttleTransformer3DModel]:
    """Build a tiny model in eval mode with random weights, its domain branch included."""

    def make(seed: int = 0, **config: Any) -> DomainShuttleTransformer3DModel:
        torch.manual_seed(seed)
        model = DomainShuttleTransformer3DModel(**{**TINY, **config}).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.5 if "scale_shift_table" in name else 0.15
                offset = 1.0 if ".norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(offset + scale * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def golden_folder() -> Path:
    """Output of the released model code on small random weights, kept beside the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "golden" / "release_small"
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors run faster on one thread, and the tests of other rooms need the rest."""
    torch.set_num_threads(1)
