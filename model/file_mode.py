"""Files that safetensors writes, with the mode that the umask gives.

safetensors writes a file aside and renames it, and what it writes aside has mode 0600, whatever the umask says: another
account could not read corpora, checkpoints and exported models, though it can read the JSON beside them. So this is the
only module that lets it write. Importing it brings no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_SLACK = 10_000_000_000
"""Nanoseconds by which a file system's clock may be behind."""


def umask() -> int:
    """The umask of this process, without changing it for a moment, as `os.umask` would for all threads."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):  # no Linux
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises OSError, for a full disk for example."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:  # which is how it says that the disk is full
        raise OSError(f"{path}: {error}") from error
    path.chmod(0o666 & ~umask())


class UmaskMode:
    """To put before diffusers' bases: what `save_pretrained` writes, also of models within, has the umask's mode."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **named: Any) -> Any:
        """Save as diffusers does, with files that whoever may read the folder can read."""
        began = time.time_ns() - _SLACK
        result = super().save_pretrained(save_directory, *arguments, **named)
        mode = 0o666 & ~umask()
        for path in Path(save_directory).rglob("*.safetensors"):
            if path.stat().st_mtime_ns > began:  # others are not ours to open
                path.chmod(mode)
        return result
