"""What lies in a corpus's folder: shards, what we made, and files that are not read, which are named and counted."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, INDEX_NAME, REPORT_NAME, TRACE_NAME, WORK_NAME
from domainshuttle.pipelines.index.table import read_metadata
from domainshuttle.pipelines.quarantine import QUARANTINE_NAME, SampleFault
from domainshuttle.pipelines.shards.companions import companion, is_index_name
from domainshuttle.pipelines.shards.tar import LABELS_FOLDER, check_shard_name
from domainshuttle.pipelines.storage.files import exists, list_dated, read_bytes, write_bytes
from domainshuttle.pipelines.storage.uri import Location, is_remote, join, local_path, name_of, parent, redacted

BUILT_INDEX_NAME = f"{LABELS_FOLDER}/built.parquet"
"""In a raw corpus's folder that was labelled: its index as it was without labels."""
PARTS_FOLDER = ".index"
"""The folder, in a corpus's, of what was read of each shard."""
SKIPPED_NAME = "skipped.jsonl"
VERIFY_NAME = "verify.jsonl"
COMPANION = "companion"
_TABLES = (QUARANTINE_NAME, VERIFY_NAME, SKIPPED_NAME, REPORT_NAME, TRACE_NAME)
_UNPACK = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tbz": "bunzip2",
    ".tar.xz": "unxz", ".txz": "unxz", ".tar.zst": "zstd -d --rm", ".tzst": "zstd -d --rm", ".tar.lz4": "lz4 -d --rm",
}  # fmt: skip
_ARCHIVES = (".zip", ".7z", ".rar", ".tar.lzma", ".tar.br", ".mds", ".mds.zstd", ".tfrecord", ".arrow", ".parquet")
_AT_ONCE = 16


@dataclass(frozen=True)
class Skipped:
    """A file in a corpus's folder that is not read: its name in the folder, its kind, what to do where its samples are
    wanted. Of companions one a pattern of names, with how many there are, in shards and beside them."""

    file: str
    kind: str
    remedy: str
    count: int = 1


@dataclass
class CorpusFolder:
    """`shards`: name to (bytes, time of change in ns), by name. `misnamed`: faults of tars whose names no index takes.
    `skipped`: what is neither. `companions`: how many there are beside the shards, by the pattern of their names."""

    shards: dict[str, tuple[int, int]] = field(default_factory=dict)
    misnamed: dict[str, SampleFault] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    companions: Counter[str] = field(default_factory=Counter)


def list_folder(folder: Location, pattern: str = "*") -> CorpusFolder:
    """What lies in a corpus's folder, and under it; `pattern` restricts it to shards and files whose names, without
    endings, fit. Raises DataError where there is no such folder, StorageError."""
    require_folder(folder)
    found = CorpusFolder()
    tables: list[str] = []
    entries = sorted(_stored(folder) if is_remote(folder) else _local(local_path(folder)))
    stems = {name.removesuffix(".tar") for name, *_ in entries if "/" not in name}
    labelled = any(name == BUILT_INDEX_NAME for name, *_ in entries)  # by us
    for name, size, changed, oddity in entries:
        base = PurePosixPath(name).name
        if labelled and name.startswith(f"{LABELS_FOLDER}/"):
            continue
        if label := companion(name):
            found.companions[label] += 1
        elif "/" not in name and _is_ours(name):
            continue
        elif base.endswith(".json") and (is_index_name(base[:-5]) or name[:-5] in stems):
            found.companions["index .json"] += 1
        elif "/" not in name and name.endswith(".parquet") and not oddity:
            tables.append(name)
        elif "/" not in name and not name.startswith(".") and name.endswith(".tar") and not oddity:
            if not fnmatchcase(name, f"{pattern}.tar"):
                continue
            try:
                found.shards[check_shard_name(name)] = size, changed
            except DataError as error:
                found.misnamed[name] = SampleFault("unsafe name", f"{error}; rename the shard")
        elif fnmatchcase(base, f"{pattern}.*") or fnmatchcase(base, pattern):
            found.skipped.append(_skipped(name, oddity))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, own in zip(tables, pool.map(lambda name: _is_index(join(folder, name)), tables), strict=True):
            if not own and fnmatchcase(name, f"{pattern}.*"):
                found.skipped.append(_skipped(name, ""))
    return found


def require_folder(folder: Location) -> None:
    """Raises DataError for a corpus's folder that is none; of a store nothing is asked."""
    if not is_remote(folder) and not local_path(folder).is_dir():
        raise DataError(f"{folder} is no folder: give the folder of the shards (*.tar)")


def write_skipped(index: Location, skipped: Iterable[Skipped], companions: Counter[str]) -> list[Skipped]:
    """Writes the table of what was not read beside an index, and returns its rows."""
    rows = [*skipped, *(Skipped(name, COMPANION, "", count) for name, count in sorted(companions.items()))]
    rows.sort(key=lambda row: (row.kind == COMPANION, row.kind, row.file))
    write_bytes(beside(index, SKIPPED_NAME), "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())
    return rows


def read_skipped(index: Location) -> list[Skipped]:
    """The rows of that table; none where there is no table."""
    if not exists(path := beside(index, SKIPPED_NAME)):
        return []
    return [Skipped(**json.loads(line)) for line in read_bytes(path).splitlines()]


def beside(index: Location, name: str) -> Location:
    """Where the file `name` of an index lies: beside `index.parquet`, and under its name beside another."""
    own = name_of(index)
    return join(parent(index), name if own == INDEX_NAME else f"{own.removesuffix('.parquet')}.{name}")


def no_shards(folder: Location, pattern: str, found: CorpusFolder) -> DataError:
    """What to say of a folder in which there is nothing to index."""
    others = [f"{name} ({fault.detail})" for name, fault in found.misnamed.items()]
    others += [f"{one.file} ({one.kind}: {one.remedy})" for one in found.skipped]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    held = f"; it has {', '.join(others[:3])}{more}" if others else ": shards are WebDataset tars, called NAME.tar"
    return DataError(f"{redacted(folder)}: no shard {pattern}.tar{held}")


Entry = tuple[str, int, int, str]
"""Name in the folder, bytes, time of change in ns, and what it is where it is no file ('')."""


def _stored(folder: Location) -> Iterator[Entry]:
    for name, size, changed in list_dated(folder, recursive=True):
        if name.split("/")[0] not in (PARTS_FOLDER, WORK_NAME):
            yield name, size, changed, ""


def _local(base: Path) -> Iterator[Entry]:
    """Also what a glob leaves out: links that lead nowhere or to a folder, folders that can't be read, sockets."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            entries = [*os.scandir(base / prefix)]
        except PermissionError:
            if not prefix:
                raise
            yield prefix, 0, 0, "unreadable folder"
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if not prefix and entry.name in (PARTS_FOLDER, WORK_NAME):
                    continue
                if companion(entry.name) or entry.name.endswith(".tar"):
                    yield name, 0, 0, "folder"
                else:
                    waiting.append(f"{name}/")
                continue
            try:
                status = entry.stat()
            except OSError:
                yield name, 0, 0, "broken link"
                continue
            regular, folder = stat.S_ISREG(status.st_mode), stat.S_ISDIR(status.st_mode)
            oddity = "" if regular else "linked folder" if folder else "no file"
            yield name, status.st_size, status.st_mtime_ns, oddity


def _is_ours(name: str) -> bool:
    """Whether we made it, but for indexes: tables beside them, and what is still being written."""
    if name == EMPTY_CAPTION_NAME or (name.startswith(".") and name.endswith(".partial")):
        return True
    return any(name == table or name.endswith(f".{table}") for table in _TABLES)


def _is_index(path: Location) -> bool:
    try:
        read_metadata(path)
    except DataError:
        return False
    return True


def _skipped(name: str, oddity: str) -> Skipped:
    base = PurePosixPath(name).name
    plain = base.casefold()
    unpack = next((command for ending, command in _UNPACK.items() if plain.endswith(ending)), "")
    if oddity:
        return Skipped(name, oddity, _ODD[oddity])
    if "/" in name:
        if plain.endswith(".tar") or unpack:
            remedy = "move them into the corpus's folder itself, or index theirs as a corpus of its own"
        else:
            remedy = "shards lie in the corpus's folder itself"
        return Skipped(name, "in a subfolder", remedy)
    if base.startswith("."):
        return Skipped(name, "hidden file", "unfinished copies have such names: copy them again, or remove them")
    if unpack:
        return Skipped(name, "packed shard", f"samples are read by offset: unpack them with {unpack}")
    if plain.endswith(".tar"):
        return Skipped(name, "upper-case ending", "rename them to NAME.tar")
    if plain.endswith(_ARCHIVES):
        return Skipped(name, "other format", "shards are WebDataset tars: pack their samples as NAME.tar")
    return Skipped(name, "other file", "samples are read of NAME.tar only")


_ODD = {
    "folder": "shards are files: pack what it holds with tar",
    "linked folder": "links to folders are not followed: index the folder itself",
    "broken link": "put back what it names, or remove it",
    "unreadable folder": "give yourself the right to read it, or remove it",
    "no file": "no regular file: remove it",
}
