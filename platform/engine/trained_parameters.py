"""Which parameters a stage trains, by patterns of their names."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from domainshuttle.model.spec import ModelSpec
from domainshuttle.platform.config.schema import ConfigError
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


def trained_of(spec: ModelSpec, patterns: list[str]) -> TrainedParameters:
    """Which parameters of a model of this size the patterns name; raises as `match_parameters`."""
    return match_parameters({name: math.prod(shape) for name, shape in spec.parameter_shapes().items()}, patterns)


def select_trained(model: "nn.Module", patterns: list[str]) -> TrainedParameters:
    """Freezes what no pattern names; raises as `match_parameters`."""
    selected = match_parameters({name: one.numel() for name, one in model.named_parameters()}, patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected.trained)
    return selected


def match_parameters(sizes: Mapping[str, int], patterns: list[str]) -> TrainedParameters:
    """Which parameters, of these sizes by name, the patterns name. Raises ConfigError for a pattern that names none."""
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
