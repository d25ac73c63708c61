"""The model of a segment: new, from a base, or from the segment before."""

from pathlib import Path

import torch
from torch import nn

from domainshuttle.model.convert import load_transformer
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.config import ConfigError, ModelSection


def build_model(section: ModelSection, origin: str | None, seed: int) -> DomainShuttleTransformer3DModel:
    """The transformer, on the CPU: the weights in `origin`, or without one a new model of the configured size."""
    if origin is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DomainShuttleTransformer3DModel(**section.size, reference_gate=section.reference_gate)
            initialise(model)
        return model
    if not Path(origin).is_dir():
        return DomainShuttleTransformer3DModel.from_pretrained(origin, dtype=torch.float32)
    # of a Wan the gate is ours to choose; a model that was trained with references knows its own
    overrides = {"reference_gate": section.reference_gate} if origin == section.base else {}
    return load_transformer(origin, **overrides).float()


def outline_model(section: ModelSection) -> DomainShuttleTransformer3DModel | None:
    """A new model's parameters without their memory, to check a configuration by; None for one with a base.

    Raises ConfigError for a size that no model can have.
    """
    if section.base is not None:
        return None
    try:
        with torch.device("meta"):
            return DomainShuttleTransformer3DModel(**section.size, reference_gate=section.reference_gate)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"model.size can't be built: {error}") from error


@torch.no_grad()
def initialise(model: DomainShuttleTransformer3DModel) -> None:
    """Wan's initialisation of a new model: Xavier for layers, a small embedding, and an output of zeros."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            if "film_" in name:
                continue
            small = any(part in name for part in ("text_embedder", "time_embedder"))
            if small:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    model.initialise_references()
