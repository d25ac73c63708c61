"""Weights in and out: Wan (diffusers or original layout), the released DomainShuttle, and this package's own folders.

What a Wan checkpoint lacks is made: copies of the video branch, and zeros for domains, so that training starts exactly
at the base model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from torch import Tensor, nn

from domainshuttle.model.layouts import (
    CLASS_NAME,
    WAN22_BOUNDARY,
    Layout,
    Naming,
    config_from_diffusers,
    config_from_release,
    config_to_release,
    describe,
    expert_folders,
    release_name,
)
from domainshuttle.model.spec import ModelSpec
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.model.weight_files import WeightReader, write_shards

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class _Source:
    """A checkpoint to read: its naming, what it holds, and how one tensor of it is read."""

    naming: Naming
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self.naming.check(self.shapes, expected)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Our parameter ``name``; of ``dtype`` where it starts at zero."""
        origin = self.naming.origin(name)
        return torch.zeros(shape, dtype=dtype) if origin is None else self.read(origin)


def _build(source: _Source, config: Mapping[str, Any]) -> DomainShuttleTransformer3DModel:
    """A model in eval mode with the source's tensors, without ever holding a second set of weights."""
    with torch.device("meta"):
        model = DomainShuttleTransformer3DModel(**config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    source.check(expected)
    dtype = source.read(source.naming.rename("patch_embedding.weight")).dtype
    weights = {name: source.tensor(name, shape, dtype) for name, shape in expected.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _memory_source(
    state_dict: Mapping[str, Tensor], label: str, rename: Callable[[str], str], has_references: bool
) -> _Source:
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    return _Source(Naming(label, rename, has_references), shapes, lambda name: state_dict[name].detach().clone())


def from_release(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> DomainShuttleTransformer3DModel:
    """Our model with weights of the released layout, in eval mode; computes what the released code computes.

    Raises:
        ValueError: listing every missing, unexpected or misshapen tensor.
    """
    return _build(_memory_source(state_dict, "the state dict", release_name, True), config_from_release(config))


def to_release(model: DomainShuttleTransformer3DModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config of the released layout; the tensors are the model's own, as in ``state_dict()``.

    The released code gates references with the video's gate. A model with ``reference_gate="own"`` is written with
    that as an extra config key, which :func:`from_release` reads and the released code does not know.
    """
    state_dict = {release_name(name): value.detach() for name, value in model.named_parameters()}
    return state_dict, config_to_release(model.config)


def from_wan(wan: nn.Module, **reference_config: Any) -> DomainShuttleTransformer3DModel:
    """Our model starting from diffusers' ``WanTransformer3DModel``, in eval mode, with copies of its weights.

    Args:
        wan: the base model.
        reference_config: arguments of our model that Wan does not have, e.g. ``max_references=3``.
    """
    config = config_from_diffusers(wan.config) | reference_config
    return _build(_memory_source(dict(wan.named_parameters()), "the Wan model", str, False), config)


def _open(folder: Path, reader: WeightReader, overrides: Mapping[str, Any]) -> tuple[_Source, dict[str, Any]]:
    """The source that the files of one transformer are, and our model's config for it."""
    naming, ours = describe(folder, overrides)
    shapes = {name: info.shape for name, info in reader.infos.items()}
    return _Source(naming, shapes, reader.read), ours


def load_transformer(folder: Path | str, **overrides: Any) -> DomainShuttleTransformer3DModel:
    """Our model from the files of one transformer: Wan (diffusers or original layout), released, or our own.

    Args:
        folder: holds ``config.json`` and one or more safetensors files.
        overrides: arguments of our model to set, e.g. ``reference_gate="video"`` for a plain Wan.

    Raises:
        FileNotFoundError: when files are missing.
        ValueError: listing every missing, unexpected or misshapen tensor.
    """
    with WeightReader(Path(folder)) as reader:
        source, config = _open(Path(folder), reader, overrides)
        return _build(source, config)


def stream_transformer(
    folder: Path | str, **overrides: Any
) -> tuple[DomainShuttleTransformer3DModel, Callable[[], Iterator[tuple[str, Tensor]]]]:
    """Our model without memory, and a function that reads its weights, one tensor at a time and in its order.

    Arguments and errors are those of :func:`load_transformer`.
    """
    with WeightReader(Path(folder)) as reader:
        source, config = _open(Path(folder), reader, overrides)
    with torch.device("meta"):
        model = DomainShuttleTransformer3DModel(**config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    source.check(expected)

    def weights() -> Iterator[tuple[str, Tensor]]:
        with WeightReader(Path(folder)) as reader:
            source, _ = _open(Path(folder), reader, overrides)
            dtype = reader.infos[source.naming.rename("patch_embedding.weight")].dtype
            for name, shape in expected.items():
                yield name, source.tensor(name, shape, dtype)

    return model.eval(), weights


def convert_checkpoint(
    source: Path | str,
    target: Path | str,
    *,
    layout: Layout = "domainshuttle",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **overrides: Any,
) -> list[Path]:
    """Convert a checkpoint with one or two experts file to file; memory holds one tensor at a time.

    Args:
        source: Wan2.1 or Wan2.2 (diffusers or original layout), the release, or a folder that this wrote.
        target: folder to write: ``transformer[_2]/`` or, in the released layout, ``high_noise_model/`` and
            ``low_noise_model/``; one expert in the released layout is written into ``target`` itself.
        layout: of the target.
        dtype: of the target's weights; None keeps each tensor's. In this package's layout those that every model keeps
            in float32 (time embedding, modulation and norms) are not rounded to it.
        max_shard_bytes: largest file.
        overrides: as in :func:`load_transformer`.

    Returns:
        The folders written.
    """
    folders = expert_folders(Path(source))
    if len(folders) == 2:
        overrides = {"boundary": WAN22_BOUNDARY} | overrides
    names = ["transformer", "transformer_2"] if layout == "domainshuttle" else ["high_noise_model", "low_noise_model"]
    if len(folders) == 1 and layout == "release":
        names = ["."]
    written = []
    for folder, name in zip(folders, names, strict=False):
        with WeightReader(folder) as reader:
            _convert_one(*_open(folder, reader, overrides), reader, Path(target) / name, layout, dtype, max_shard_bytes)
        written.append(Path(target) / name)
    return written


def _convert_one(
    source: _Source,
    config: dict[str, Any],
    reader: WeightReader,
    target: Path,
    layout: Layout,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    """Write one transformer in another layout."""
    expected = ModelSpec.of(config).parameter_shapes()
    source.check(expected)
    base = reader.infos[source.naming.rename("patch_embedding.weight")].dtype
    rename: Callable[[str], str] = release_name if layout == "release" else str
    ours = {rename(name): name for name in expected}

    def dtype_of(name: str) -> torch.dtype:
        origin = source.naming.origin(name)
        stored = base if origin is None else reader.infos[origin].dtype
        kept = layout == "domainshuttle" and DomainShuttleTransformer3DModel.keeps_float32(name)
        return stored if dtype is None or (kept and stored == torch.float32) else dtype

    def read(written: str) -> Tensor:
        name = ours[written]
        return source.tensor(name, expected[name], base).to(dtype_of(name))

    write_shards(
        target, [(written, expected[name], dtype_of(name)) for written, name in ours.items()], read, max_shard_bytes
    )
    with torch.device("meta"):
        full = dict(DomainShuttleTransformer3DModel(**config).config)
    if layout == "release":
        content = config_to_release(full)
    else:
        content = {"_class_name": CLASS_NAME, "_diffusers_version": diffusers_version}
        content |= {name: value for name, value in full.items() if not name.startswith("_")}
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n")
