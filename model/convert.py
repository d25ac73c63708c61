"""Weights in and out: Wan (diffusers or original layout), the released DomainShuttle, and this package's own folders.

Our names are those of diffusers, plus the reference branch; the released model's are those of the original Wan, plus
its reference branch. So one renaming serves all four, and what a Wan checkpoint lacks is made: copies of the video
branch, and zeros for domains, so that training starts exactly at the base model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import __version__ as diffusers_version
from torch import Tensor, nn

from domainshuttle.model.spec import ModelSpec
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.model.weight_files import WeightReader, write_shards

Layout = Literal["domainshuttle", "release"]
"""Layouts that can be written: this package's (a diffusers folder) and the released model's."""

WAN22_BOUNDARY = 0.875
MAX_SHARD_BYTES = 5 * 10**9

# ours -> original Wan and release; applied in this order
_RENAMING = [
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^domain_embedding_ref\.", "domain_embedding."),
    (r"^film_scale_ref\.", "dom_to_film_gamma."),
    (r"^film_shift_ref\.", "dom_to_film_beta."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv](?:_ref)?)\.", r".\1."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
]
# ours: release
_CONFIG_NAMES = {
    "patch_size": "patch_size",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
    "max_references": "reference_num",
    "num_domains": "num_domains",
    "boundary": "boundary",
}
# What the released code computes; written only where a model differs.
_RELEASED = {"reference_gate": "video", "timestep_angles": "float64"}
_SPEC_FIELDS = {field.name for field in fields(ModelSpec)}


def release_name(name: str) -> str:
    """Name of one of our parameters in the original Wan and the released layout."""
    for pattern, replacement in _RENAMING:
        name = re.sub(pattern, replacement, name)
    return name


def config_from_release(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our model for a config of the released or the original Wan layout.

    Raises:
        ValueError: when it lacks a size or describes a model that ours cannot be.
    """
    missing = [name for name in ("dim", "ffn_dim", "num_heads", "num_layers") if name not in config]
    if missing:
        raise ValueError(f"config lacks {missing}; it holds {sorted(config)}: give the config.json beside the weights")
    problems = [] if config.get("qk_norm", True) else ["qk_norm is off"]
    if config.get("model_type", "t2v") not in ("t2v", "r2v"):  # r2v: the released DomainShuttle
        problems.append(f"model_type is {config['model_type']!r}")
    if config["dim"] % config["num_heads"]:
        problems.append(f"dim {config['dim']} is not a multiple of num_heads {config['num_heads']}")
    if problems:
        raise ValueError(f"not a Wan text-to-video model: {'; '.join(problems)}")
    ours = {name: config[theirs] for name, theirs in _CONFIG_NAMES.items() if config.get(theirs) is not None}
    ours["num_attention_heads"] = config["num_heads"]
    ours["attention_head_dim"] = config["dim"] // config["num_heads"]
    ours["patch_size"] = tuple(ours.get("patch_size", (1, 2, 2)))
    return ours | {name: config.get(name, value) for name, value in _RELEASED.items()}


def config_to_release(config: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the released layout for our model's config.

    Raises:
        ValueError: for ablations, which the released layout cannot hold.
    """
    full = {"reference_projections": "own", "domain_adaln": True, "reference_rope": "dual"}
    other = {name: config[name] for name, value in full.items() if config[name] != value}
    if other:
        raise ValueError(f"the released layout cannot hold {other}: save with save_pretrained instead")
    heads = config["num_attention_heads"]
    release = {"dim": heads * config["attention_head_dim"], "num_heads": heads, "qk_norm": True}
    for name, theirs in _CONFIG_NAMES.items():
        if config[name] is not None:
            release[theirs] = list(config[name]) if name == "patch_size" else config[name]
    return release | {name: config[name] for name, value in _RELEASED.items() if config[name] != value}


def _config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our model for the config of diffusers' Wan transformer."""
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise ValueError("this is an image-to-video Wan (image_dim is set): give a text-to-video one")
    ours = {name: config[name] for name in _SPEC_FIELDS if name in config}
    return ours | {"patch_size": tuple(config.get("patch_size", (1, 2, 2)))}


@dataclass(frozen=True)
class _Source:
    """A checkpoint to read: what it holds, how it names our parameters, and whether it has a reference branch."""

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    rename: Callable[[str], str]
    has_references: bool

    def origin(self, name: str) -> str | None:
        """The stored tensor that our parameter ``name`` comes from; None where it starts at zero."""
        if self.has_references or "_ref" not in name:
            return self.rename(name)
        if name.startswith(("domain_embedding_ref", "film_")):
            return None
        return self.rename(name.replace("_ref", ""))

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise one ValueError that lists every missing, unexpected and misshapen tensor."""
        origins = {name: origin for name in expected if (origin := self.origin(name)) is not None}
        missing = sorted({origin for origin in origins.values() if origin not in self.shapes})
        unexpected = sorted(self.shapes.keys() - origins.values())
        wrong = [
            f"{origin} is {list(self.shapes[origin])}, expected {list(expected[name])}"
            for name, origin in origins.items()
            if origin in self.shapes and tuple(self.shapes[origin]) != expected[name]
        ]
        if not (missing or unexpected or wrong):
            return
        report = [f"{self.label} does not fit its config: {len(self.shapes)} tensors"]
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
            if names:
                report.append(f"{len(names)} {title}: {', '.join(names)}")
        if missing and self.has_references and all("ref" in n or "dom" in n for n in missing):
            report.append("it has no reference branch: is it a plain Wan checkpoint? Then load it with from_wan")
        raise ValueError("; ".join(report))

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Our parameter ``name``; of ``dtype`` where it starts at zero."""
        origin = self.origin(name)
        return torch.zeros(shape, dtype=dtype) if origin is None else self.read(origin)


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return ModelSpec(**{name: value for name, value in config.items() if name in _SPEC_FIELDS}).parameter_shapes()


def _build(source: _Source, config: Mapping[str, Any]) -> DomainShuttleTransformer3DModel:
    """A model in eval mode with the source's tensors, without ever holding a second set of weights."""
    with torch.device("meta"):
        model = DomainShuttleTransformer3DModel(**config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    source.check(expected)
    dtype = source.read(source.rename("patch_embedding.weight")).dtype
    weights = {name: source.tensor(name, shape, dtype) for name, shape in expected.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _memory_source(
    state_dict: Mapping[str, Tensor], label: str, rename: Callable[[str], str], has_references: bool
) -> _Source:
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    return _Source(label, shapes, lambda name: state_dict[name].detach().clone(), rename, has_references)


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
    config = _config_from_diffusers(wan.config) | reference_config
    return _build(_memory_source(dict(wan.named_parameters()), "the Wan model", str, False), config)


def expert_folders(checkpoint: Path) -> list[Path]:
    """Folders of the transformers of a checkpoint: one, or the high-noise and then the low-noise expert's.

    Raises:
        FileNotFoundError: when there is none.
    """
    for names in (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")):
        found = [checkpoint / name for name in names if (checkpoint / name / "config.json").is_file()]
        if found:
            return found
    if (checkpoint / "config.json").is_file():
        return [checkpoint]
    raise FileNotFoundError(
        f"no model in {checkpoint}: expected config.json there, or in transformer[_2]/ or high_noise_model/ and "
        "low_noise_model/"
    )


def _described(folder: Path, overrides: Mapping[str, Any]) -> tuple[Callable[[str], str], bool, dict[str, Any]]:
    """What the ``config.json`` of one transformer says: how its weights name our parameters, whether it has a
    reference branch, and our model's config for it."""
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name", "")
    has_references = kind == DomainShuttleTransformer3DModel.__name__ or "reference_num" in config
    rename: Callable[[str], str] = str
    if kind in ("WanTransformer3DModel", DomainShuttleTransformer3DModel.__name__):
        ours = _config_from_diffusers(config)
    else:
        rename, ours = release_name, config_from_release(config)
        if not has_references:
            ours["reference_gate"] = "own"  # a plain Wan says nothing of references: start as the paper does
    return rename, has_references, ours | dict(overrides)


def _open(folder: Path, reader: WeightReader, overrides: Mapping[str, Any]) -> tuple[_Source, dict[str, Any]]:
    """The source that the files of one transformer are, and our model's config for it."""
    rename, has_references, ours = _described(folder, overrides)
    shapes = {name: info.shape for name, info in reader.infos.items()}
    return _Source(str(folder), shapes, reader.read, rename, has_references), ours


def outline_transformer(folder: Path | str, **overrides: Any) -> DomainShuttleTransformer3DModel:
    """Our model without memory, on the meta device, by the ``config.json`` of one transformer alone.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it describes a model that ours cannot be.
    """
    _, _, config = _described(Path(folder), overrides)
    with torch.device("meta"):
        return DomainShuttleTransformer3DModel(**config).eval()


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
            dtype = reader.infos[source.rename("patch_embedding.weight")].dtype
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
    expected = _expected_shapes(config)
    source.check(expected)
    base = reader.infos[source.rename("patch_embedding.weight")].dtype
    rename: Callable[[str], str] = release_name if layout == "release" else str
    ours = {rename(name): name for name in expected}

    def dtype_of(name: str) -> torch.dtype:
        origin = source.origin(name)
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
        content = {"_class_name": DomainShuttleTransformer3DModel.__name__, "_diffusers_version": diffusers_version}
        content |= {name: value for name, value in full.items() if not name.startswith("_")}
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n")
