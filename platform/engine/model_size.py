"""The size of the model that a configuration means, known without torch: of its base no weight is read."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainshuttle.model.layouts import described_spec, stored_spec
from domainshuttle.model.spec import ModelSpec
from domainshuttle.pipelines.errors import one_line
from domainshuttle.platform.config.schema import ConfigError, ModelSection
from domainshuttle.platform.engine.hub import description_folder, resolve, weights_folder
from domainshuttle.platform.run.weights_origin import WeightsOrigin


class MissingWeightsError(ConfigError, FileNotFoundError):
    """A model's folder without its weights."""


def model_size(section: ModelSection, origin: WeightsOrigin | None = None) -> ModelSpec:
    """The size to check a configuration by; of a base on the hub only its `config.json` is fetched, of a folder the
    names and shapes of its weights are compared. `origin` is that of the base, where it is resolved already; until then
    nothing is fetched of the bases whose sizes are known.

    Raises ConfigError for a size that no model can have, and for a base that does not make one.
    """
    if section.base is None:
        size: dict[str, Any] = {**section.size}
        try:
            return ModelSpec(**size, **section.choices)  # a key of both is an error, not overridden in silence
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.size can't be built: {error}") from error
    if origin is None and (known := _known_size(section.base)) is not None:
        return replace(known, **section.choices)
    origin = origin or resolve(section.base)
    with readable_model(section.base):
        if origin.kind == "folder":
            return stored_spec(weights_folder(origin), **section.choices)
        return described_spec(description_folder(origin), **section.choices)


_WAN = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-t2v-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-14b",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer": "wan2.2-t2v-a14b",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer_2": "wan2.2-t2v-a14b",
}


def _known_size(base: str) -> ModelSpec | None:
    """The size of one transformer of Wan's releases on the hub, by its id, of any revision."""
    name = _WAN.get(base.partition("@")[0].removesuffix("/"))
    if name is None or Path(base).expanduser().is_dir():
        return None
    return replace(ModelSpec.preset(name), num_experts=1, boundary=None)


@contextlib.contextmanager
def readable_model(folder: Path | str) -> Iterator[None]:
    """Raises ConfigError, or MissingWeightsError, for a folder whose files do not make a model when it is read."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # of files that are damaged, or others'
        kind = MissingWeightsError if isinstance(error, FileNotFoundError) else ConfigError
        raise kind(f"the weights in {folder} do not make a model: {one_line(error)}") from error
