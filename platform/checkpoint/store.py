"""Checkpoints: a folder a step, whole or not a checkpoint at all.

Every rank writes its shards (async_writer.py); rank 0 adds `state.json` and, last, `manifest.json` with the size
and checksum of every file. A folder without a matching manifest is skipped with its reason, so a kill at any
moment costs the steps since the one before and nothing else.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.errors import UserFacingError
from domainshuttle.pipelines.storage.files import free_bytes
from domainshuttle.pipelines.storage.locks import locked
from domainshuttle.pipelines.storage.private_folder import private_folder
from domainshuttle.pipelines.storage.uri import join, name_of, parent
from domainshuttle.platform.checkpoint.backend import CheckpointDir, FileEntry, describe, describe_all
from domainshuttle.platform.checkpoint.names import Line, Name, candidates, lines_from, with_new_line
from domainshuttle.platform.checkpoint.retention import Retention
from domainshuttle.platform.config.schema import ConfigError, RunConfig

MANIFEST_NAME, STATE_NAME, DAMAGED_NAME = "manifest.json", "state.json", "damaged.json"
VERSION = 3


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
    loss: float | None = None
    """The usual one of the steps before, which one noisy step does not move: what `checkpoint.keep_best` compares."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the loss guard has seen."""
    line: int = 0
    """Which line of the segment it belongs to (names.py); set by the writer."""
    config: dict[str, Any] = field(default_factory=dict)
    """What decided what was learned (`RunConfig.decisive`); empty in a checkpoint of an earlier format, as are the
    fields below."""
    trained: str = ""
    """Digest of names and sizes of the trained parameters."""
    origin: str | None = None
    """Folder or hub id of the weights of `base`; None: a new model."""
    finished: dict[str, int] = field(default_factory=dict)
    """The run's finished segments, with their steps."""
    passed_over: dict[str, list[list[int]]] = field(default_factory=dict)
    """Of each segment, the steps that are not trained on: one list a rollback."""
    version: int = VERSION


class CheckpointError(UserFacingError, RuntimeError):
    """A checkpoint that can't be used or written, and why."""


class UnfinishedCheckpoint(CheckpointError):
    """A folder whose writing goes on, or was cut short: it was never a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its files are those that its manifest lists."""

    root: str
    """Path or URI of the store that it is in."""
    name: str
    state: TrainingState
    size: int
    """Bytes of all files."""
    written: float
    """When it became whole, in seconds since 1970; 0 where the manifest is older than this field."""
    files: dict[str, FileEntry] = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where it is, on a local or shared file system; of one in an object store, ask `CheckpointStore.fetch`."""
        return Path(self.root) / self.name

    @property
    def where(self) -> str:
        """Its path or URI, as `--resume` takes it."""
        return CheckpointDir(self.root).where(self.name)


class CheckpointStore:
    """The checkpoints of a run under a folder or URI. `scratch` is a folder on this node, for copies."""

    def __init__(self, root: str | Path, scratch: Path | Callable[[], Path] = private_folder) -> None:
        self.place = CheckpointDir(root)
        self._scratch = scratch

    @classmethod
    def of(cls, config: RunConfig, folder: Path | None = None) -> "CheckpointStore":
        """The store of a run: in its `folder`, which was perhaps moved, or where `checkpoint.store` says, under its
        name."""
        section = config.checkpoint
        inside = (folder or config.run_folder) / "checkpoints"
        root = join(section.store, config.name) if section.store else inside
        place = Path(section.scratch) if section.scratch else None
        return cls(root, lambda: private_folder(place, "name another checkpoint.scratch") / config.name)

    @property
    def scratch(self) -> Path:
        """The folder on this node for copies of a URI's files. Raises StorageError as `private_folder` does."""
        return self._scratch if isinstance(self._scratch, Path) else self._scratch()

    # Reading

    def newest(
        self,
        segment: str,
        report: Callable[[str], None] = lambda _: None,
        verified: Checkpoint | None = None,
    ) -> Checkpoint | None:
        """The newest whole checkpoint that a segment goes on from; `report` gets a line for each that is skipped.

        The bytes of one that was `verified` already are not read again. On a local or shared file system checksums are
        compared; in an object store sizes are, and `fetch` compares the checksums of what a node needs. Raises
        StorageError when the store does not answer: then nobody knows.
        """
        for name in candidates(self.names(segment), self.lines(segment)):
            try:
                if verified and name in (verified.name, verified.where):
                    found = self.read(name, checksums=False)
                    if found == verified:
                        return found
                return self.read(name)
            except CheckpointError as error:
                report(f"checkpoint {name} is skipped: {error}")
        return None

    def read(self, name: str, checksums: bool | None = None) -> Checkpoint:
        """The checkpoint of a name in this store, or of a path or URI elsewhere.

        Raises CheckpointError that says what is missing or changed. `checksums` None compares them on a file system
        only; in an object store that would be a download.
        """
        place = CheckpointDir(parent(name)) if "/" in name else self.place
        return _read(place, name_of(name), not place.remote if checksums is None else checksums, self.scratch)

    def list(self, checksums: bool = False) -> list[tuple[str, Checkpoint | CheckpointError]]:
        """All by name, in order of segment, line and step, with what is wrong with those that are not whole."""
        found: list[tuple[str, Checkpoint | CheckpointError]] = []
        for name in sorted(self.names(), key=lambda name: (name.segment, name.line, name.step)):
            try:
                found.append((str(name), self.read(str(name), checksums)))
            except CheckpointError as error:
                found.append((str(name), error))
        return found

    def names(self, segment: str | None = None) -> set[Name]:
        """The folders there are, whole or not."""
        parsed = {Name.parse(folder) for folder in self.place.top()}
        return {name for name in parsed if name and segment in (None, name.segment)}

    def fetch(self, checkpoint: Checkpoint, ranks: Collection[int] | None = None) -> Path:
        """The local folder with what these ranks wrote, or with all; any number of processes may call at once.

        On a file system that is the checkpoint itself. From an object store the files are copied to this node's
        scratch, each once, and their checksums compared: a file that was changed raises CheckpointError, and the
        checkpoint is marked, so that the next start passes it over. Raises ConfigError where there is no room for them.
        """
        place = CheckpointDir(checkpoint.root)
        if not place.remote:
            return checkpoint.folder
        folder = self.scratch / "restored" / checkpoint.name
        for other in (self.scratch / "restored").glob("*"):
            if other != folder:  # of a start that was killed before it released it
                shutil.rmtree(other, ignore_errors=True)
        wanted = [
            name
            for name, entry in sorted(checkpoint.files.items())
            if ranks is None or entry.get("rank") is None or entry["rank"] in ranks
        ]
        needed = sum(checkpoint.files[name]["size"] for name in wanted if not (folder / name).exists())
        free = free_bytes(self.scratch)
        if free is not None and free < needed:
            raise ConfigError(
                f"checkpoint {checkpoint.name} needs {needed / 2**20:,.0f} MiB in {self.scratch}, where "
                f"{free / 2**20:,.0f} MiB are free: make room there, or name another folder of the nodes with "
                "--set checkpoint.scratch=FOLDER"
            )
        # processes that need the same files begin at different ones
        start = os.getpid() % max(1, len(wanted))
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda name: self._fetch_file(place, checkpoint, name, folder), wanted[start:] + wanted[:start]
                )
            )
        return folder

    def release(self, checkpoint: Checkpoint) -> None:
        """Removes the node's copy of a checkpoint, once every rank of the node has loaded it."""
        shutil.rmtree(self.scratch / "restored" / checkpoint.name, ignore_errors=True)

    def _fetch_file(self, place: CheckpointDir, checkpoint: Checkpoint, name: str, folder: Path) -> None:
        path, entry = folder / name, checkpoint.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), wait=_FETCH_WAIT) as held:
            if not held:
                raise CheckpointError(f"{path} was not there after {_FETCH_WAIT:.0f} s: another process holds its lock")
            if path.exists() and _same(describe(path), entry):
                return
            place.fetch(f"{checkpoint.name}/{name}", path)
            if not _same(describe(path), entry):
                path.unlink()
                why = f"{name} was changed since it was written (its checksum differs)"
                place.write(f"{checkpoint.name}/{DAMAGED_NAME}", json.dumps({"why": why}).encode())
                raise CheckpointError(
                    f"checkpoint {place.redacted(checkpoint.name)} is damaged: {why}; the next start takes another"
                )

    # Lines

    def lines(self, segment: str) -> Sequence[Line]:
        """The lines of a segment (names.py), the newest last. Raises CheckpointError when their file is damaged."""
        name = f"{segment}-lines.json"
        if name not in self.place.top():
            return lines_from(None)
        try:
            return lines_from(json.loads(self.place.read(name)))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.place.redacted(name)}, which says what segment {segment} goes on from, is damaged ({error}): "
                "remove it, and name the checkpoint to go on from with --resume PATH"
            ) from error

    def branch(self, segment: str, origin: str | None) -> None:
        """Begins a line of a segment at a checkpoint (its name, or path elsewhere), or at the segment's start."""
        content = with_new_line(self.lines(segment), origin)
        self.place.write(f"{segment}-lines.json", json.dumps(content, indent=2).encode())

    # Removing

    def clear(self, name: str) -> None:
        """Removes a checkpoint, or what is left of one. Its manifest goes first: half removed it must not be one."""
        with contextlib.suppress(FileNotFoundError):
            self.place.remove(f"{name}/{MANIFEST_NAME}")
        self.place.remove(name)

    def retire(self, written: Name, retention: Retention, known: dict[str, float | None]) -> None:
        """Removes what the rule does not keep of a line, of which `written` has just become whole.

        Also goes what killed attempts left unfinished of the segment, up to that step, and of its other lines. Whole
        checkpoints of other lines and damaged ones stay. `known` remembers losses from call to call.
        """
        for name in self.names(written.segment):
            if name.line == written.line and name.step > written.step:
                continue
            try:
                if str(name) not in known:
                    known[str(name)] = self.read(str(name), checksums=False).state.loss
            except UnfinishedCheckpoint:
                self.clear(str(name))
            except CheckpointError:
                continue  # `domainshuttle checkpoints` shows it
        line = {name: loss for name, loss in ((Name.parse(text), loss) for text, loss in known.items()) if name}
        mine = {name.step: loss for name, loss in line.items() if _line_of(name) == _line_of(written)}
        for step in mine.keys() - retention.kept(mine).keys():
            name = Name(written.segment, step, written.line)
            self.clear(str(name))
            del known[str(name)]


_FETCH_WAIT = 3600.0


def read_checkpoint(folder: str | Path, checksums: bool | None = None) -> Checkpoint:
    """The checkpoint in a folder or at a URI. Raises CheckpointError that says what is missing or changed."""
    return CheckpointStore(parent(folder)).read(name_of(folder), checksums)


def write_manifest(place: CheckpointDir, state: TrainingState, name: str, files: dict[str, FileEntry]) -> int:
    """Makes a checkpoint whole; returns its bytes. Everything in `files` is in the store already."""
    content = json.dumps(asdict(state), indent=2).encode()
    place.write(f"{name}/{STATE_NAME}", content)
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    entries = {**files, STATE_NAME: FileEntry(size=len(content), checksum=digest)}
    manifest = {"version": VERSION, "written": time.time(), "files": entries}
    place.write(f"{name}/{MANIFEST_NAME}", json.dumps({**manifest, "checksum": _seal(manifest)}, indent=2).encode())
    return sum(entry["size"] for entry in entries.values())


def _read(place: CheckpointDir, name: str, checksums: bool, scratch: Path) -> Checkpoint:
    there = {file.removeprefix(f"{name}/"): size for file, size in place.listing(name).items()}
    if MANIFEST_NAME not in there:
        raise UnfinishedCheckpoint(_unfinished(place, name, there))
    try:
        if DAMAGED_NAME in there:
            raise CheckpointError(json.loads(place.read(f"{name}/{DAMAGED_NAME}"))["why"])
        manifest = json.loads(place.read(f"{name}/{MANIFEST_NAME}"))
        files: dict[str, FileEntry] = manifest["files"]
        if manifest["version"] > VERSION:
            raise CheckpointError(f"it was written by a newer domainshuttle (format {manifest['version']})")
        if manifest["version"] > 1 and manifest.pop("checksum") != _seal(manifest):
            raise CheckpointError("its manifest was changed since it was written")
        for file, entry in files.items():
            if file not in there:
                raise CheckpointError(f"{file} is missing")
            if there[file] != entry["size"]:
                raise CheckpointError(f"{file} has {there[file]} bytes, the manifest says {entry['size']}")
        if checksums:
            for file, found in zip(files, _describe_there(place, name, list(files), scratch), strict=True):
                if not _same(found, files[file]):
                    raise CheckpointError(f"{file} was changed since it was written (its checksum differs)")
        state = TrainingState(**{"version": 1, **json.loads(place.read(f"{name}/{STATE_NAME}"))})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"it can't be read ({error})") from error
    except OSError as error:
        if place.remote and not isinstance(error, FileNotFoundError):
            raise  # a store that does not answer says nothing of the checkpoint
        raise CheckpointError(f"it can't be read ({error})") from error
    size = sum(entry["size"] for entry in files.values())
    return Checkpoint(place.root, name, state, size, manifest.get("written", 0.0), files)


def _describe_there(place: CheckpointDir, name: str, files: list[str], scratch: Path) -> list[FileEntry]:
    if not place.remote:
        return describe_all([place.local(f"{name}/{file}") for file in files])
    found = []
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for file in files:
            copy = Path(folder) / "file"
            place.fetch(f"{name}/{file}", copy)
            found.append(describe(copy))
    return found


def _unfinished(place: CheckpointDir, name: str, there: Collection[str]) -> str:
    if not there:
        return f"there is nothing at {place.redacted(name)}"
    ranks = sum(file.startswith("rank-") for file in there)
    return f"it has no manifest: its writing was not finished ({ranks} of its ranks had written theirs)"


def _line_of(name: Name) -> tuple[str, int]:
    return name.segment, name.line


def _same(found: FileEntry, expected: FileEntry) -> bool:
    return (found["size"], found["checksum"]) == (expected["size"], expected["checksum"])


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
