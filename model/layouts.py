"""Layouts of weights: how Wan (diffusers or original), the released DomainShuttle and this package name parameters.

Our names are those of diffusers, plus the reference branch; the released model's are those of the original Wan, plus
its reference branch. So one renaming serves all four. Needs no torch: what a folder holds is known at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from domainshuttle.model.spec import SPEC_FIELDS, ModelSpec
from domainshuttle.model.tensor_file import file_extents, weight_files

CLASS_NAME = "DomainShuttleTransformer3DModel"
"""Of our network, in its ``config.json``."""

Layout = Literal["domainshuttle", "release"]
"""Layouts that can be written: this package's (a diffusers folder) and the released model's."""

WAN22_BOUNDARY = 0.875

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


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our model for the config of diffusers' Wan transformer."""
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise ValueError("this is an image-to-video Wan (image_dim is set): give a text-to-video one")
    ours = {name: config[name] for name in SPEC_FIELDS if name in config}
    return ours | {"patch_size": tuple(config.get("patch_size", (1, 2, 2)))}


@dataclass(frozen=True)
class Naming:
    """How a checkpoint names our parameters, and whether it has a reference branch."""

    label: str
    rename: Callable[[str], str]
    has_references: bool

    def origin(self, name: str) -> str | None:
        """The stored tensor that our parameter ``name`` comes from; None where it starts at zero."""
        if self.has_references or "_ref" not in name:
            return self.rename(name)
        if name.startswith(("domain_embedding_ref", "film_")):
            return None
        return self.rename(name.replace("_ref", ""))

    def check(self, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the shapes of stored tensors with those of our parameters, each by name.

        Raises:
            ValueError: listing every missing, unexpected and misshapen tensor.
        """
        origins = {name: origin for name in expected if (origin := self.origin(name)) is not None}
        missing = sorted({origin for origin in origins.values() if origin not in stored})
        unexpected = sorted(stored.keys() - origins.values())
        wrong = [
            f"{origin} is {list(stored[origin])}, expected {list(expected[name])}"
            for name, origin in origins.items()
            if origin in stored and tuple(stored[origin]) != expected[name]
        ]
        if not (missing or unexpected or wrong):
            return
        report = [f"{self.label} does not fit its config: {len(stored)} tensors"]
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
            if names:
                report.append(f"{len(names)} {title}: {', '.join(names)}")
        if missing and self.has_references and all("ref" in n or "dom" in n for n in missing):
            report.append("it has no reference branch: is it a plain Wan checkpoint? Then load it with from_wan")
        raise ValueError("; ".join(report))


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


def describe(folder: Path, overrides: Mapping[str, Any]) -> tuple[Naming, dict[str, Any]]:
    """What the ``config.json`` of one transformer says: how its weights name our parameters, and our model's config.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it describes a model that ours cannot be.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name", "")
    has_references = kind == CLASS_NAME or "reference_num" in config
    rename: Callable[[str], str] = str
    if kind in ("WanTransformer3DModel", CLASS_NAME):
        ours = config_from_diffusers(config)
    else:
        rename, ours = release_name, config_from_release(config)
        if not has_references:
            ours["reference_gate"] = "own"  # a plain Wan says nothing of references: start as the paper does
    return Naming(str(folder), rename, has_references), ours | dict(overrides)


def described_spec(folder: Path, **overrides: Any) -> ModelSpec:
    """Size of our model, by the ``config.json`` of one transformer alone; errors are those of :func:`describe`."""
    return ModelSpec.of(describe(folder, overrides)[1])


def stored_spec(folder: Path, **overrides: Any) -> ModelSpec:
    """Size of our model from the files of one transformer, whose tensors are compared with it by name and shape.

    Raises:
        FileNotFoundError: when files are missing.
        ValueError: listing every missing, unexpected or misshapen tensor.
    """
    naming, config = describe(folder, overrides)
    extents = [file_extents(path) for path in weight_files(folder)]
    spec = ModelSpec.of(config)
    naming.check({name: one.shape for file in extents for name, one in file.items()}, spec.parameter_shapes())
    return spec
