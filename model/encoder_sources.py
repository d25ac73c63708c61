"""Which encoders there are by name, and what they say of themselves without being loaded. Nothing here brings torch."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from domainshuttle.model.tensor_file import TensorExtent, tensor_extents

BLOCK_DCT, BYTE_UMT5 = "block-dct", "byte-umt5"
"""The names of the two encoders that need no weights from elsewhere."""
BYTE_UMT5_WIDTH = 64
TILE_ABOVE, TILE, TILE_STRIDE = 600_000, 512, 384
"""Pixels of a frame above which Wan's VAE encodes in tiles, as those of 720p; the sides of a tile, and how far apart
tiles begin. So a frame of 720p takes no more memory than one of 480p."""


def tiling_rule(source: str, tile_above: int | None) -> str | None:
    """What an encoded corpus says of tiles, of which latents are others than of whole frames; None without tiles."""
    if source == BLOCK_DCT or tile_above is None:
        return None
    return f"frames above {tile_above} pixels in tiles of {TILE}, {TILE_STRIDE} apart"


def text_width(source: str) -> int | None:
    """Channels of what a text encoder gives; None for one of the hub, and for a folder that does not say."""
    if source == BYTE_UMT5:
        return BYTE_UMT5_WIDTH
    folder = Path(source).expanduser()
    for config in (folder / "text_encoder" / "config.json", folder / "config.json"):
        if config.is_file():
            width = json.loads(config.read_text()).get("d_model")
            return width if isinstance(width, int) else None
    return None


def encoder_files(source: str, kind: Literal["video", "text"]) -> list[Path]:
    """The files on this machine that decide what an encoder gives: configuration, weights and tokenizer.

    Nothing where it is built in, and where it is not here (a folder of another machine, an id that was not fetched).
    """
    if source in (BLOCK_DCT, BYTE_UMT5):
        return []
    files = [path for name in _FOLDERS[kind] if (folder := _folder(source, name)) for path in _deciding(folder)]
    return files if any(path.suffix in _WEIGHTS for path in files) else []


def files_digest(files: Sequence[Path]) -> str:
    """A digest of an encoder's files: of the tensors by name, however they are spread over files, of the configuration
    without notes of the library that wrote it, and of the tokenizer.

    Raises TensorFileError for weights that are no whole safetensors file.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors: dict[str, tuple[Path, TensorExtent]] = {}
    for path in sorted(files, key=lambda path: (path.name, str(path))):
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                extents = tensor_extents(
                    lambda offset, size, number=file.fileno(): os.pread(number, size, offset),
                    path.stat().st_size,
                    str(path),
                )
            tensors |= {name: (path, extent) for name, extent in extents.items()}
        elif path.name == "config.json":
            config = json.loads(path.read_text())
            digest.update(json.dumps(deciding_options(config), sort_keys=True).encode())
        else:
            digest.update(path.name.encode() + path.read_bytes())
    for name, (path, extent) in sorted(tensors.items()):
        digest.update(f"{name}{extent.shape}{extent.dtype}".encode())
        with path.open("rb") as file:
            file.seek(extent.start)
            left = extent.stop - extent.start
            while left and (chunk := file.read(min(left, _READ_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def deciding_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration without what its library notes for itself."""
    return {name: value for name, value in config.items() if not name.startswith("_") and name not in _NOTES}


_FOLDERS = {"video": ("vae",), "text": ("text_encoder", "tokenizer")}
_WEIGHTS = (".safetensors", ".bin")
_USUAL_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_NOTES = ("transformers_version", "torch_dtype", "dtype", "architectures")
_READ_BYTES = 16 << 20


def _folder(source: str, name: str) -> Path | None:
    """Where a part of a pipeline lies: its subfolder, or the source itself where it is the part."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path / name if (path / name).is_dir() else path
    if path.is_absolute() or source.startswith("."):
        return None
    from huggingface_hub import try_to_load_from_cache  # only where an id is given
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "tokenizer_config.json"):
        with contextlib.suppress(HFValidationError):
            if isinstance(found := try_to_load_from_cache(source, f"{name}/{file}"), str):
                return Path(found).parent
    return None


def _deciding(folder: Path) -> list[Path]:
    weights = [path for path in sorted(folder.glob("*.safetensors")) if _USUAL_WEIGHTS.fullmatch(path.name)]
    weights = weights or sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    vocabulary = sorted(folder.glob("tokenizer.json")) or sorted([*folder.glob("*.model"), *folder.glob("vocab*")])
    return [*folder.glob("config.json"), *weights, *vocabulary]
