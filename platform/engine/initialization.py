"""The model of a segment: new, from a base, or from the segment before. Its weights come one tensor at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from domainshuttle.model.convert import outline_transformer, stream_transformer
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.config.schema import ConfigError, ModelSection
from domainshuttle.platform.engine.hub import description_folder, weights_folder


@dataclass(frozen=True)
class Blueprint:
    """A model that is not built yet: its modules without memory, and where its weights come from."""

    outline: DomainShuttleTransformer3DModel
    """On the meta device."""
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    """Name and value of every parameter, in the order of `outline.named_parameters()`, each made when it is asked for;
    in the type of its source. What is built from it has them in float32 or bf16."""

    def build(self) -> DomainShuttleTransformer3DModel:
        """The whole model on this CPU, float32. The outline becomes it."""
        for name, value in self.weights():
            owner, _, short = name.rpartition(".")
            wanted = self.outline.get_parameter(name).requires_grad
            setattr(self.outline.get_submodule(owner), short, nn.Parameter(value.float(), requires_grad=wanted))
        return self.outline


def blueprint(section: ModelSection, origin: str | None, seed: int, commit: str | None = None) -> Blueprint:
    """The transformer with the weights in `origin`, or without one a new model of the configured size; `commit` is
    what an id of the hub meant when the run began.

    Raises ConfigError for an origin that is neither a folder nor on the hub or that holds two experts,
    FileNotFoundError and ValueError for one whose files do not make a model.
    """
    if origin is None:
        with torch.device("meta"):
            outline = _construct(section)
        return Blueprint(outline, lambda: _new_weights(section, seed))
    # of a Wan these are ours to choose; a model that was trained with references knows its own
    overrides: dict[str, Any] = section.choices if origin == section.base else {}
    return Blueprint(*stream_transformer(weights_folder(origin, commit), **overrides))


def build_model(section: ModelSection, origin: str | None, seed: int) -> DomainShuttleTransformer3DModel:
    """The whole transformer of a blueprint, on the CPU in float32."""
    return blueprint(section, origin, seed).build()


def outline_model(section: ModelSection) -> DomainShuttleTransformer3DModel:
    """A model's parameters without their memory, to check a configuration by; of a base on the hub only its
    `config.json` is fetched.

    Raises ConfigError for a size that no model can have, and as `blueprint` for a base.
    """
    if section.base is not None:
        if Path(section.base).is_dir():
            return blueprint(section, section.base, 0).outline
        return outline_transformer(description_folder(section.base), **section.choices)
    try:
        with torch.device("meta"):
            return _construct(section)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"model.size can't be built: {error}") from error


def _construct(section: ModelSection) -> DomainShuttleTransformer3DModel:
    return DomainShuttleTransformer3DModel(**section.size, **section.choices)


class _DrawnOnly(TorchDispatchMode):
    """Construction that draws the random numbers of a real one on the CPU and keeps only those of small tensors.

    Layers draw into tensors without memory: the numbers are made, so that the generator moves on, and dropped.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if isinstance(args[0], Tensor):
            func(torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu"), *args[1:], **kwargs)
            return args[0]
        return func(*args, **{**kwargs, "device": "cpu"})


def _new_weights(section: ModelSection, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Wan's initialisation of a new model: Xavier for layers, a small embedding, and an output of zeros.

    The references start as copies of the video branch, the domains without effect.
    """
    generator = torch.Generator()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"), _DrawnOnly():
            drawn = _construct(section)
        generator.set_state(torch.get_rng_state())
    names = {name for name, _ in drawn.named_parameters()}
    copied = {name.replace("_ref", "") for name in names if "_ref" in name} & names
    originals: dict[str, Tensor] = {}
    for prefix, module in drawn.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{short}" if prefix else short
            value = _initial(name, module, parameter, generator)
            if "_ref" in name:
                value = originals.pop(name.replace("_ref", ""), value)
            elif name in copied:
                originals[name] = value.clone()
            yield name, value


@torch.no_grad()
def _initial(name: str, module: nn.Module, parameter: Tensor, generator: torch.Generator) -> Tensor:
    if not parameter.is_meta:
        return parameter.detach()
    if name.startswith(("domain_embedding_ref", "film_", "proj_out.")):
        return torch.zeros(parameter.shape)
    if name.endswith("bias"):
        return torch.zeros(parameter.shape)
    if not isinstance(module, nn.Linear | nn.Conv3d):
        return torch.ones(parameter.shape)  # of norms
    value = torch.empty(parameter.shape)
    if "text_embedder" in name or "time_embedder" in name:
        return nn.init.normal_(value, std=0.02, generator=generator)
    nn.init.xavier_uniform_(value.flatten(1), generator=generator)
    return value
