"""The model of a segment: new, from a base, or from the segment before. Its weights come one tensor at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from domainshuttle.model.convert import stream_transformer
from domainshuttle.model.lora import initial_value
from domainshuttle.model.spec import lora_layer
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.config.schema import ModelSection
from domainshuttle.platform.engine.hub import require_as_downloaded, weights_folder
from domainshuttle.platform.engine.model_size import readable_model
from domainshuttle.platform.run.weights_origin import WeightsOrigin


@dataclass(frozen=True)
class Blueprint:
    """A model that is not built yet: its modules without memory, and where its weights come from."""

    outline: DomainShuttleTransformer3DModel
    """On the meta device."""
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    """Name and value of every parameter, in the order of `outline.named_parameters()`, each made when it is asked for;
    in the type of its source. What is built from it has them in float32 or bf16. Of adapters that the outline was given
    none: they begin with values of `seed`."""
    seed: int = 0

    def source(self) -> Callable[[], Iterator[tuple[str, Tensor]]]:
        """`weights`, with those of the adapters that the outline has now. Later, its parameters may be divided."""
        shapes = {name: tuple(one.shape) for name, one in self.outline.named_parameters()}

        def values() -> Iterator[tuple[str, Tensor]]:
            own = self.weights()
            for name, shape in shapes.items():
                yield (name, initial_value(name, shape, self.seed)) if lora_layer(name) else next(own)

        return values

    def build(self) -> DomainShuttleTransformer3DModel:
        """The whole model on this CPU, float32. The outline becomes it."""
        for name, value in self.source()():
            owner, _, short = name.rpartition(".")
            wanted = self.outline.get_parameter(name).requires_grad
            setattr(self.outline.get_submodule(owner), short, nn.Parameter(value.float(), requires_grad=wanted))
        return self.outline


def blueprint(section: ModelSection, origin: WeightsOrigin) -> Blueprint:
    """The transformer with the weights of `origin`: of the configured size where that is a new model.

    Raises ConfigError for an origin that the hub does not give, that holds two experts, or whose files do not
    make a model; reading the weights raises ChangedError for files of the hub
    that were changed or damaged in its cache.
    """
    if origin.kind == "new":
        with torch.device("meta"):
            outline = _construct(section)
        return Blueprint(outline, lambda: _new_weights(section, origin.seed), origin.seed)
    # of a Wan these are ours to choose; a model that was trained with references knows its own
    overrides: dict[str, Any] = section.choices if origin.place == section.base else {}
    folder = weights_folder(origin)
    with readable_model(folder):
        outline, stream = stream_transformer(folder, **overrides)

    def weights() -> Iterator[tuple[str, Tensor]]:
        if origin.kind == "hub":
            require_as_downloaded(folder)
        return stream()

    return Blueprint(outline, weights, origin.seed)


def build_model(section: ModelSection, origin: WeightsOrigin) -> DomainShuttleTransformer3DModel:
    """The whole transformer of a blueprint, on the CPU in float32."""
    return blueprint(section, origin).build()


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
