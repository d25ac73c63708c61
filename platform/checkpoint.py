"""Checkpoints: a directory a step, whole or not a checkpoint at all.

Every rank writes its shards into a directory that nobody takes for a checkpoint; rank 0 adds `state.json`, and then,
last, `manifest.json` with the size and checksum of every file. A directory without a matching manifest is passed over
with its reason, so a kill at any moment costs the steps since the one before and nothing else.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

MANIFEST_NAME, STATE_NAME = "manifest.json", "state.json"
_NAME = re.compile(r"(?P<segment>[a-z0-9][a-z0-9_-]*)-step(?P<step>\d{8})")


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint knows beside the shards. `step` steps are done: the next one has this number."""

    segment: str
    step: int
    seed: int
    world_size: int
    config_digest: str
    plan: dict[str, Any]
    ledger: dict[str, Any]
    mlflow: dict[str, Any]
    base: str = ""
    """Digest of the weights that the segment began with, from which the frozen parameters come."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its files are those that its manifest lists."""

    folder: Path
    state: TrainingState
    size: int

    @property
    def name(self) -> str:
        return self.folder.name


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used, and why."""


class CheckpointStore:
    """The checkpoints of a run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self, segment: str, report: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
        """The newest whole checkpoint of a segment; `report` gets a line for each newer one that is not whole."""
        for path in sorted(self._folders(segment), reverse=True):
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                report(f"checkpoint {path.name} is passed over: {error}")
        return None

    def list(self) -> list[tuple[Path, Checkpoint | CheckpointError]]:
        """All of them, oldest first, with what is wrong with those that are not whole."""
        found: list[tuple[Path, Checkpoint | CheckpointError]] = []
        for path in sorted(self._folders(None), key=lambda p: p.stat().st_mtime):
            try:
                found.append((path, read_checkpoint(path, checksums=False)))
            except CheckpointError as error:
                found.append((path, error))
        return found

    def save(self, state: TrainingState, write_shards: Callable[[Path], None], keep: int) -> Path:
        """Writes a checkpoint; all ranks call it together. Keeps the `keep` newest of the segment.

        `write_shards` writes this rank's files into the folder it is given. Raises OSError, on every rank, when any
        rank could not write (a full disk, for example); the checkpoints before stay as they are.
        """
        final = self.folder / f"{state.segment}-step{state.step:08d}"
        rank, size = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            # what an attempt before left here is no checkpoint, or one of the same step that is made again
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir(parents=True)
        dist.barrier()
        fault: str | None = None
        try:
            write_shards(final)
        except (OSError, RuntimeError) as error:
            fault = f"rank {rank}: {error}"
        faults: list[str | None] = [None] * size
        dist.all_gather_object(faults, fault)
        if any(faults):
            raise OSError(f"checkpoint {final} could not be written: {'; '.join(filter(None, faults))}")
        if rank == 0:
            _write(final / STATE_NAME, json.dumps(asdict(state), indent=2))
            files = {str(path.relative_to(final)): path for path in sorted(final.rglob("*")) if path.is_file()}
            with ThreadPoolExecutor(8) as pool:
                entries = dict(zip(files, pool.map(_describe, files.values()), strict=True))
            _write(final / MANIFEST_NAME, json.dumps({"version": 1, "files": entries}, indent=2))
            self._retire(state.segment, keep)
        dist.barrier()
        return final

    def _retire(self, segment: str, keep: int) -> None:
        whole = [path for path in sorted(self._folders(segment)) if (path / MANIFEST_NAME).exists()]
        for path in whole[:-keep]:
            # the manifest goes first: what is half removed must not be a checkpoint
            (path / MANIFEST_NAME).unlink()
            shutil.rmtree(path, ignore_errors=True)

    def _folders(self, segment: str | None) -> Iterator[Path]:
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir() and segment in (None, match["segment"]):
                yield path


def read_checkpoint(folder: Path, checksums: bool = True) -> Checkpoint:
    """The checkpoint in a folder. Raises CheckpointError that says what is missing or changed."""
    manifest = folder / MANIFEST_NAME
    if not manifest.exists():
        raise CheckpointError("it has no manifest: its writing was not finished")
    try:
        files = json.loads(manifest.read_text())["files"]
        size = 0
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda name: _measure(folder / name, checksums), files))
        for (name, entry), measured in zip(files.items(), found, strict=True):
            if measured is None:
                raise CheckpointError(f"{name} is missing")
            if measured["size"] != entry["size"]:
                raise CheckpointError(f"{name} has {measured['size']} bytes, the manifest says {entry['size']}")
            if checksums and measured["checksum"] != entry["checksum"]:
                raise CheckpointError(f"{name} was changed since it was written (its checksum differs)")
            size += entry["size"]
        state = TrainingState(**json.loads((folder / STATE_NAME).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"it can't be read ({error})") from error
    return Checkpoint(folder, state, size)


def _measure(path: Path, checksums: bool) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return _describe(path) if checksums else {"size": path.stat().st_size}


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(16 << 20):
            digest.update(chunk)
    return {"size": path.stat().st_size, "checksum": digest.hexdigest()}


def _write(path: Path, text: str) -> None:
    """Writes a small file whole or not at all, and waits for the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
