"""Low-rank adapters (LoRA, arXiv 2106.09685) of linear layers: x W^T + b + scale (x A^T) B^T, with W and b frozen.

Names, initial values and the order of operations are PEFT's, so that in float32 a layer computes what PEFT's computes,
bit for bit (tests/model/test_lora.py). PEFT itself is not needed: diffusers imports it wherever it is installed, which
costs seconds of every start of a worker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from domainshuttle.model.file_mode import save_tensors
from domainshuttle.model.mixed_precision import linear
from domainshuttle.model.products import computing
from domainshuttle.model.spec import LORA_A, LORA_B, LoraSpec, lora_layer

LORA_FOLDER, LORA_FILE = "lora", "pytorch_lora_weights.safetensors"
"""Beside merged weights: the adapters alone, in the file that diffusers' `load_lora_weights` looks for."""
_PREFIX = "transformer."
"""Of names in diffusers' files, which may hold adapters of several networks."""


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; it computes in the type of its input."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] of the type of ``x``."""
        out = linear(x, self.weight, self.bias)
        with computing(None):  # of little work, but as large as what it is added to
            return out + self.lora_B(self.lora_A(x)) * self.scale


def adapt(model: nn.Module, lora: LoraSpec) -> list[str]:
    """Gives the linear layers that ``lora`` names adapters, without values; returns the layers' names.

    Names of the model's own parameters stay as they are.
    """
    adapted = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and lora.selects(name):
            layer.__class__ = LoraLinear
            layer.lora_A = nn.Linear(layer.in_features, lora.rank, bias=False, device="meta")
            layer.lora_B = nn.Linear(lora.rank, layer.out_features, bias=False, device="meta")
            layer.scale = lora.scale
            adapted.append(name)
    return adapted


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The value with which an adapter's parameter begins, float32: PEFT's, A uniform and B zero, so that the network
    begins as it is without adapters. A's numbers depend on seed and name alone."""
    if name.endswith(LORA_B):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


@dataclass(frozen=True)
class LoraWeights:
    """Adapters of one network: of each adapted layer A [rank, in] and B [out, rank], float32, with the scale in B."""

    layers: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], scale: float) -> LoraWeights:
        """Of parameters by their names in the network; others than adapters' are passed over."""
        names = [layer for name in parameters if (layer := lora_layer(name)) and name.endswith(LORA_A)]
        return cls({one: (parameters[f"{one}.{LORA_A}"], parameters[f"{one}.{LORA_B}"] * scale) for one in names})

    @classmethod
    def joined(cls, parts: Iterable[LoraWeights]) -> LoraWeights:
        """One adapter of a layer that adds what several add, one after the other: of the sum of their ranks."""
        layers: dict[str, tuple[Tensor, Tensor]] = {}
        for part in parts:
            for name, (a, b) in part.layers.items():
                before = layers.get(name)
                layers[name] = (a, b) if before is None else (torch.cat([before[0], a]), torch.cat([before[1], b], 1))
        return cls(layers)

    @property
    def rank(self) -> int:
        """The largest of a layer."""
        return max(len(a) for a, _ in self.layers.values())

    def merged(self, name: str, value: Tensor) -> Tensor:
        """A parameter of the network with what its layer's adapter adds, float32: W + B A."""
        found = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return value if found is None else value.float() + found[1] @ found[0]

    def save(self, folder: Path) -> Path:
        """Writes them as diffusers' `load_lora_weights` and PEFT take them, with alpha = rank; returns the file."""
        tensors = {}
        for name, (a, b) in self.layers.items():
            tensors[f"{_PREFIX}{name}.{LORA_A}"], tensors[f"{_PREFIX}{name}.{LORA_B}"] = a.contiguous(), b.contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, folder / LORA_FILE, {"format": "pt"})
        return folder / LORA_FILE

    @classmethod
    def load(cls, folder: Path) -> LoraWeights:
        """What `save` wrote into a folder."""
        tensors = {name.removeprefix(_PREFIX): value for name, value in load_file(folder / LORA_FILE).items()}
        return cls.of(tensors, 1.0)
