"""Which parameters a stage trains: by patterns of their names, or adapters of linear layers."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from domainshuttle.model.spec import LoraSpec, ModelSpec, lora_layer
from domainshuttle.platform.config.schema import ConfigError, Trained, adapters_of, patterns_of
from domainshuttle.platform.report.text import Records

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TrainedParameters:
    """Which parameters a stage trains, by its patterns."""

    trained: dict[str, int]
    frozen: dict[str, int]

    def __str__(self) -> str:
        """One line for people; `parameter_table` has all of it."""
        groups, others = ({group_name(name) for name in names} for names in (self.trained, self.frozen))
        return (
            f"trains {self.trained_count:,} of {self.trained_count + self.frozen_count:,} parameters, {len(groups)} of "
            f"{len(groups | others)} groups (all of them: domainshuttle plan CONFIG --parameters)"
        )

    @property
    def trained_count(self) -> int:
        return sum(self.trained.values())

    @property
    def frozen_count(self) -> int:
        return sum(self.frozen.values())


def trained_of(spec: ModelSpec, trained: Trained) -> TrainedParameters:
    """Which parameters of a model of this size a stage's `trained` means; raises as `match_parameters`, and ConfigError
    for adapters of layers that the model has not."""
    adapted = with_adapters(spec, trained)
    return match_parameters({name: math.prod(shape) for name, shape in adapted.parameter_shapes().items()}, trained)


def with_adapters(spec: ModelSpec, trained: Trained) -> ModelSpec:
    """The size of the network that a stage trains, which may have adapters. Raises ConfigError for those of layers that
    it has not."""
    lora = adapters_of(trained)
    if lora is not None:
        _require_layers(lora, spec.linear_layers())
    return replace(spec, lora=lora)


def select_trained(model: "nn.Module", trained: Trained) -> TrainedParameters:
    """Gives the model the adapters, without values, and freezes what is not trained; raises as `trained_of`."""
    lora = adapters_of(trained)
    if lora is not None:
        from torch import nn

        from domainshuttle.model.lora import adapt

        _require_layers(lora, [name for name, one in model.named_modules() if isinstance(one, nn.Linear)])
        adapt(model, lora)
    selected = match_parameters({name: one.numel() for name, one in model.named_parameters()}, trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected.trained)
    return selected


def _require_layers(lora: LoraSpec, layers: Iterable[str]) -> None:
    layers = list(layers)
    if unused := lora.unused(layers):
        raise ConfigError(
            f"trained.lora.targets: {unused} name no linear layer; the model has: "
            f"{', '.join(sorted({group_name(name) for name in layers}))} (write * for a block's number, or the "
            "end of a name alone)"
        )


def match_parameters(sizes: Mapping[str, int], wanted: Trained) -> TrainedParameters:
    """Which parameters, of these sizes by name, are meant. Raises ConfigError for a pattern that names none, and for
    one of weights that have adapters."""
    patterns = patterns_of(wanted)
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    used: set[str] = set()
    for name, size in sizes.items():
        hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        used.update(hits)
        (trained if hits else frozen)[name] = size
    if unused := [pattern for pattern in patterns if pattern not in used]:
        groups = sorted({group_name(name) for name in sizes})
        raise ConfigError(
            f"trained: {unused} name no parameter; the model has: {', '.join(groups)} (write * for a block's number)"
        )
    adapted = {layer for name in sizes if (layer := lora_layer(name))}
    if both := sorted({group_name(name) for name in trained if name.rpartition(".")[0] in adapted}):
        raise ConfigError(
            f"trained.parameters names {', '.join(both)}, whose layers get adapters: train either, and narrow "
            "`parameters` or `lora.targets`"
        )
    return TrainedParameters(trained, frozen)


def group_name(name: str) -> str:
    """A parameter's name without its block's number: `blocks.*.attn1.to_q.weight`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def parameter_table(selections: Mapping[str, TrainedParameters]) -> Records:
    """Which parameters each segment trains, by group: the blocks' numbers are left out. Prints at any width."""
    sizes: dict[str, int] = {}
    trained: dict[str, set[str]] = {}
    for segment, selected in selections.items():
        trained[segment] = {group_name(name) for name in selected.trained}
        sizes = {}
        for name, size in {**selected.trained, **selected.frozen}.items():
            sizes[group_name(name)] = sizes.get(group_name(name), 0) + size
    rows = [
        [group, f"{size:,}", *("trained" if group in trained[name] else "." for name in selections)]
        for group, size in sizes.items()
    ]
    return Records(("group", "elements", *selections), rows, "Parameters: trained, or frozen (.)", numeric=["elements"])
