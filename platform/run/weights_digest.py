"""Fingerprints of weights, by which a checkpoint is never put on others than it was trained on."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from domainshuttle.pipelines.storage.files import write_bytes

DIGEST_NAME = "digest.txt"


def weights_identity(origin: str | None, seed: int, known: Path | None = None, commit: str | None = None) -> str:
    """A digest of the weights that a segment begins with: a new model of this seed, a folder, or one of the hub at a
    commit.

    Hashing a folder takes minutes for a large model. `known` is a file that remembers digests by the sizes and times
    of the folder's files; one that can't be written is done without.
    """
    if origin is None:
        return f"new:{seed}"
    folder = Path(origin).expanduser()
    if not folder.is_dir():
        return f"hub:{origin.partition('@')[0]}@{commit}"
    noted = folder / DIGEST_NAME
    if noted.exists():
        return noted.read_text().strip()
    remembered = _read(known)
    files = [[str(path.relative_to(folder)), (s := path.stat()).st_size, s.st_mtime_ns] for path in _files(folder)]
    entry = remembered.get(str(folder))
    if entry and entry["files"] == files:
        return str(entry["digest"])
    digest = folder_digest(folder)
    if known:
        remembered[str(folder)] = {"files": files, "digest": digest}
        with contextlib.suppress(OSError):
            write_bytes(known, json.dumps(remembered, indent=2).encode())
    return digest


def folder_digest(folder: Path) -> str:
    """A digest of the safetensors files and configurations in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _files(folder):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while chunk := file.read(16 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def sizes_digest(parameters: Mapping[str, int]) -> str:
    """A digest of parameters' names and sizes: shards of one digest fit where the same is trained."""
    return hashlib.blake2b(json.dumps(sorted(parameters.items())).encode(), digest_size=8).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.rglob("*.safetensors"), *folder.rglob("config.json")])


def _read(known: Path | None) -> dict[str, dict[str, object]]:
    with contextlib.suppress(OSError, ValueError):
        if known:
            content: dict[str, dict[str, object]] = json.loads(known.read_text())
            return content
    return {}
