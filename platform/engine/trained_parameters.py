"""Which parameters a stage trains, by patterns of their names."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.report.text import Records


@dataclass(frozen=True)
class TrainedParameters:
    """Which parameters a stage trains, by its patterns."""

    trained: dict[str, int]
    frozen: dict[str, int]

    @property
    def trained_count(self) -> int:
        return sum(self.trained.values())

    @property
    def frozen_count(self) -> int:
        return sum(self.frozen.values())


def select_trained(model: nn.Module, patterns: list[str]) -> TrainedParameters:
    """Freezes what no pattern names. Raises ConfigError for a pattern that names nothing."""
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        used.update(hits)
        parameter.requires_grad_(bool(hits))
        (trained if hits else frozen)[name] = parameter.numel()
    if unused := [pattern for pattern in patterns if pattern not in used]:
        groups = sorted({group_name(name) for name in [*trained, *frozen]})
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
