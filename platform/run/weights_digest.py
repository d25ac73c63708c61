"""Digests of weights and corpora, and the bytes that they stand for.

By the digest of the weights that it began with, a checkpoint is never put on others. So a digest is not believed: it is
compared with the bytes where it is used. Reading a large model takes a minute, so a run remembers, file by file, of
which size and times what it has read was, and reads again only what has changed since.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainshuttle.model.encoder_sources import files_digest
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.storage.files import list_dated, write_bytes
from domainshuttle.pipelines.storage.uri import is_remote, local_path, name_of, parent

DIGEST_NAME = "digest.txt"
"""Beside weights that are whole: their digest, written last."""


class ChangedError(DataError):
    """Weights that are not those that their digest stands for."""


class Fingerprints:
    """The digests of files, remembered by the files' sizes and times in `path` (None: not remembered).

    A file that can't be written, or is torn, is done without.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def of_folder(self, folder: Path) -> str:
        """`folder_digest`, read anew where anything in the folder has changed."""
        return self._remembered(str(folder), _stamps(weights_files(folder)), lambda: folder_digest(folder))

    def of_file(self, path: Path, algorithm: "Callable[[], hashlib._Hash]") -> str:
        """The digest of a file by an algorithm of hashlib."""

        def read() -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, algorithm).hexdigest()

        return self._remembered(str(path), _stamps([path]), read)

    def of_encoder(self, files: Sequence[Path]) -> str:
        """The digest of an encoder's files (`files_digest`)."""
        return self._remembered(f"encoder {files[0].parent}", _stamps(files), lambda: files_digest(files))

    def of_index(self, place: str) -> str:
        """The digest of an index file's rows. Raises DataError where it is not the one that the file says."""
        from domainshuttle.pipelines.index.table import Index  # brings pyarrow along

        return self._remembered(place, _stamp_of(place), lambda: Index.load(place).digest)

    def remember(self, folder: Path, digest: str) -> None:
        """Notes the digest of a folder that has just been read."""
        self._remembered(str(folder), _stamps(weights_files(folder)), lambda: digest, anew=True)

    def _remembered(self, name: str, stamps: list[Any], read: Callable[[], str], anew: bool = False) -> str:
        known = self._load()
        entry = known.get(name)
        if not anew and entry and entry.get("files") == stamps:
            return str(entry["digest"])
        digest = read()
        if self.path:
            with contextlib.suppress(OSError):
                # loaded again: reading took its time
                content = {**self._load(), name: {"files": stamps, "digest": digest}}
                write_bytes(self.path, json.dumps(content, indent=2).encode())
        return digest

    def _load(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self.path.read_text()) if self.path else {}
            if isinstance(content, dict):
                return {name: entry for name, entry in content.items() if isinstance(entry, dict)}
        return {}


def verified_digest(folder: Path, fingerprints: Fingerprints) -> str:
    """The digest of the weights in a folder; raises ChangedError where it is not the one noted beside them."""
    digest = fingerprints.of_folder(folder)
    path = folder / DIGEST_NAME
    noted = path.read_text().strip() if path.exists() else digest
    if noted != digest:
        since = path.stat().st_mtime
        later = [file.name for file in weights_files(folder) if file.stat().st_mtime > since]
        changed = f"; {', '.join(later)} changed since" if later else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
        raise ChangedError(
            f"the weights of stage {folder.name} in {folder} are not those that were exported there on {when}: their "
            f"digest is {digest}, and was {noted}{changed}. Bring the right files back; or remove {path} and start the "
            "run that made them again: it exports them from the last checkpoint of that stage"
        )
    return digest


def folder_digest(folder: Path) -> str:
    """A digest of the safetensors files and configurations in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in weights_files(folder):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while chunk := file.read(16 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def weights_files(folder: Path) -> list[Path]:
    """The files that `folder_digest` covers."""
    return sorted([*folder.rglob("*.safetensors"), *folder.rglob("config.json")])


def sizes_digest(parameters: Mapping[str, int]) -> str:
    """A digest of parameters' names and sizes: shards of one digest fit where the same is trained."""
    return hashlib.blake2b(json.dumps(sorted(parameters.items())).encode(), digest_size=8).hexdigest()


def _stamps(files: Sequence[Path]) -> list[Any]:
    """Size, time of writing and time of change, which nobody can set, of files by name."""
    return [[path.name, (s := path.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for path in files]


def _stamp_of(place: str) -> list[Any]:
    if not is_remote(place):
        return _stamps([local_path(place)])
    found: Iterable[tuple[str, int, int]] = list_dated(parent(place))
    return [list(one) for one in found if one[0] == name_of(place)]
