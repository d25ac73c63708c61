"""Indexing: shards that exist already get an index, on Ray tasks, a task a shard.

Each shard's samples become a part beside the shards, `.index/<shard>.parquet`, which says of which size and time of
change the shard was. A part that still fits its shard is not made again: so a job that was stopped goes on, and after
shards were added, changed or removed only those are read. The index and the quarantine table are then the parts, joined
in the order of the shards' names. Rows stay columns on the way: an index of millions is not held as objects.

Buckets are chosen when the parts are joined. Other buckets or another frame rate make another index without reading
the shards again.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domainshuttle.pipelines.buckets import Bucket, choose_bucket, frames_at
from domainshuttle.pipelines.corpora.builder import Progress
from domainshuttle.pipelines.index import (
    FORMAT_VERSION,
    SCHEMA,
    Index,
    IndexMetadata,
    IndexRow,
    read_metadata,
    rows_table,
    write_index,
)
from domainshuttle.pipelines.parts import INDEX_NAME, QUARANTINE_NAME, BadSample
from domainshuttle.pipelines.sample import DataError
from domainshuttle.pipelines.sample_checks import (
    MOST_DESCRIPTION_BYTES,
    check_files,
    check_tensors,
    read_description,
)
from domainshuttle.pipelines.scan import Fault, SampleFault, fault_kind, scan_shard, shown
from domainshuttle.pipelines.shards import ShardCache, ShardEntry, check_shard_name
from domainshuttle.pipelines.tasks import each_result

PARTS_FOLDER = ".index"
_PART_KEY = b"domainshuttle.part"


@dataclass(frozen=True)
class Indexed:
    """What indexing made: the index's metadata, how many samples and shards, and what was left out, by kind."""

    metadata: IndexMetadata
    path: Path
    samples: int
    shards: int
    scanned: int = 0
    scanned_bytes: int = 0
    faults: Counter[str] = field(default_factory=Counter)


def beside(index: Path, name: str) -> Path:
    """Where the file `name` of an index lies: beside `index.parquet`, and under its name beside another."""
    return index.with_name(name if index.name == INDEX_NAME else f"{index.stem}.{name}")


def index_folder(
    folder: Path,
    metadata: IndexMetadata,
    buckets: Sequence[Bucket],
    progress: Progress,
    most_bad: float = 0.05,
    shards: str = "*",
    name: str = INDEX_NAME,
) -> Indexed:
    """Makes or renews the index `name` of a folder's shards on the Ray cluster that is connected.

    `metadata` says the corpus, its stage, the rate at which clips are sampled, and for encoded shards their encoders;
    `buckets` are those for raw samples (encoded ones have theirs). `shards` restricts it to names of a pattern, without
    `.tar`. `progress` counts MiB. Raises DataError where there is nothing to index, encoded samples are met as raw
    ones, or more than `most_bad` of the samples or of the shards are bad; the index before then stays.
    """
    folder = folder.absolute()
    if metadata.stage == "raw" and not buckets:
        raise DataError(f"{folder}: no buckets for raw samples; give some, such as 81x480x832")
    found, faults = _shards(folder, shards)
    parts = {path.name: folder / PARTS_FOLDER / f"{path.name}.parquet" for path in found}
    parts_folder = folder / PARTS_FOLDER
    parts_folder.mkdir(exist_ok=True)
    stamps = {path.name: _stamp(path, metadata.stage) for path in found}
    old = [path for path in found if _part_stamp(parts[path.name]) != stamps[path.name]]
    if metadata.stage == "raw":
        _refuse_encoded(old)
    sizes = {path: stamps[path.name]["size"] for path in old}
    total, done = sum(sizes.values()), 0
    for (path, *_), result in each_result(_index_shard, [(path, metadata.stage, parts[path.name]) for path in old]):
        if isinstance(result, Exception):
            faults.append(Fault(path.name, "", f"unreadable shard: its task died ({type(result).__name__}); run again"))
        done += sizes[path]
        progress(done >> 20, total >> 20)
    if shards == "*":
        for stale in parts_folder.iterdir():
            if stale.name.removesuffix(".parquet") not in parts:
                stale.unlink(missing_ok=True)
    tables = []
    for path in found:
        if parts[path.name].exists():
            part = pq.ParquetFile(parts[path.name], memory_map=True)
            tables.append(part.read().replace_schema_metadata(None))
            faults += [Fault(path.name, *fault) for fault in _part_notes(part.metadata)["faults"]]
    joined = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    quarantined = [BadSample(metadata.corpus, fault.shard, fault.key, fault.reason) for fault in faults]
    made = _join(joined, metadata, buckets, folder / name, quarantined, len(found), most_bad)
    return Indexed(**{**made.__dict__, "scanned": len(old), "scanned_bytes": total})


def merge_indexes(indexes: Sequence[Path], out: Path, most_bad: float = 0.05) -> Indexed:
    """Joins indexes of one folder, made of different shards, into one at `out` in that folder, in the order of the
    shards' names.

    A shard that several have alike counts once. Raises DataError where they are of several folders or corpora, or do
    not agree on a shard.
    """
    loaded = [Index.load(path) for path in indexes]
    if not loaded or {path.absolute().parent for path in [*indexes, out]} != {out.absolute().parent}:
        raise DataError(
            f"indexes {[str(path) for path in indexes]}: expected some of the folder {out.absolute().parent}"
        )
    first = loaded[0].parts[0]
    for path, index in zip(indexes, loaded, strict=True):
        if index.parts[0].identity() != first.identity():
            raise DataError(
                f"{path} and {indexes[0]} differ in corpus, stage, encoders or fps: {index.parts[0].identity()} and "
                f"{first.identity()}; index the shards again with the same"
            )
    held: dict[str, tuple[Path, pa.Table]] = {}
    for path, index in zip(indexes, loaded, strict=True):
        codes, names = index.codes("shard")
        rows = index.table.select(SCHEMA.names)
        for number, shard in enumerate(names):
            own = rows.filter(pa.array(codes == number)).unify_dictionaries().combine_chunks()
            if shard in held and held[shard][1].column("checksum") != own.column("checksum"):
                raise DataError(f"{path} and {held[shard][0]} do not agree on {shard}; index that shard again")
            held.setdefault(shard, (path, own))
    quarantined: dict[str, None] = {}
    for path in indexes:
        if (table := beside(path, QUARANTINE_NAME)).exists():
            quarantined.update(dict.fromkeys(table.read_text().splitlines()))
    bad = [BadSample(**json.loads(line)) for line in quarantined]
    table = pa.concat_tables([held[shard][1] for shard in sorted(held)])
    return _join(table, first, None, out.absolute(), bad, len(held), most_bad)


def _shards(folder: Path, pattern: str) -> tuple[list[Path], list[Fault]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give the folder of the shards (*.tar)")
    found, faults = [], []
    for path in sorted(folder.glob(f"{pattern}.tar")):
        if path.name.startswith("."):
            continue
        try:
            found.append(path.with_name(check_shard_name(path.name)))
        except DataError as error:
            faults.append(Fault(shown(path.name), "", f"unsafe name: {error}; rename the shard"))
    if not found:
        packed = [path.name for path in folder.iterdir() if path.name.endswith((".tar.gz", ".tgz", ".tar.zst"))]
        remedy = "unpack them (gunzip): samples are read by offset" if packed else "shards are WebDataset tars"
        raise DataError(f"{folder}: no shard {pattern}.tar; it has {packed[:3] or 'none'}: {remedy}")
    return found, faults


def _stamp(path: Path, stage: str) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "stage": stage, "format": FORMAT_VERSION}


def _part_notes(metadata: pq.FileMetaData) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads(metadata.metadata[_PART_KEY])
    return notes


def _part_stamp(part: Path) -> dict[str, Any] | None:
    try:
        notes = _part_notes(pq.read_metadata(part))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return {name: value for name, value in notes.items() if name != "faults"}


def _refuse_encoded(shards: Iterable[Path]) -> None:
    """Raises DataError where the first sample that can be found is an encoded one."""
    entries = (found for path in shards for found in scan_shard(path) if isinstance(found, ShardEntry))
    if (first := next(entries, None)) and any(member.extension == "safetensors" for member in first.members):
        raise DataError(
            f"{first.shard}: sample {first.key!r} is encoded, and the folder has no index that names its encoders: "
            f"copy the {INDEX_NAME} of the job that encoded it (of any part of it) here, or encode the raw corpus "
            "again with `domainshuttle data encode`"
        )


def _index_shard(shard: Path, stage: str, part: Path) -> int:
    """Makes the part of one shard; returns how many samples it has."""
    stamp = _stamp(shard, stage)  # taken before reading: a change meanwhile makes the part an old one
    rows: list[IndexRow] = []
    faults: list[tuple[str, str]] = []
    cache = ShardCache(max_open=1)  # not the process's: a shard of this name may have been another before
    for found in scan_shard(shard):
        if isinstance(found, Fault):
            faults.append((found.key, found.reason))
            continue
        try:
            rows.append(_row(found, shard, stage, cache))
        except SampleFault as fault:
            faults.append((found.key, str(fault)))
        except DataError as error:
            faults.append((found.key, f"unreadable sample: {error}"))
    table = _table(rows, faults)
    temporary = part.with_name(f".{part.name}.{os.getpid()}.partial")
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_PART_KEY: json.dumps({**stamp, "faults": faults}).encode()})
    temporary.rename(part)
    return len(table)


def _table(rows: list[IndexRow], faults: list[tuple[str, str]]) -> pa.Table:
    """The rows as a table; those with values that no column can hold (2**40 frames) become faults."""
    try:
        return rows_table(rows)
    except (pa.ArrowException, OverflowError, UnicodeError):
        held = []
        for row in rows:
            try:
                rows_table([row])
                held.append(row)
            except (pa.ArrowException, OverflowError, UnicodeError) as error:
                faults.append((row.key, f"bad description: {row.key}.json: a value is out of range ({error})"))
        return rows_table(held)


def _row(entry: ShardEntry, shard: Path, stage: str, cache: ShardCache) -> IndexRow:
    members = {member.extension: member for member in entry.members}
    description = [members[name] for name in ("json",) if name in members]
    if any(member.size > MOST_DESCRIPTION_BYTES for member in description):
        raise SampleFault("bad description", f"{entry.key}.json has {description[0].size} bytes")
    data = cache.read(shard.parent, shard.name, description)
    info = read_description(entry.key, members, data.get("json", b""))
    if stage == "raw":
        check_files(entry.key, info, members)
        return IndexRow.of(entry, info, "")
    tensors = [members[name] for name in ("safetensors",) if name in members]
    held = cache.read(shard.parent, shard.name, tensors).get("safetensors", b"")
    sample, bucket = check_tensors(entry.key, info, members, held)
    return IndexRow.of(entry, info, bucket, sample.text.shape[0])


def _join(
    table: pa.Table,
    metadata: IndexMetadata,
    buckets: Sequence[Bucket] | None,
    path: Path,
    bad: list[BadSample],
    shards: int,
    most_bad: float,
) -> Indexed:
    """Writes the index of rows in the order of their shards, and its quarantine table."""
    table, repeated = _first_of_each(table.unify_dictionaries().combine_chunks(), metadata.corpus)
    bad = bad + repeated
    if metadata.stage == "raw" and buckets is not None:
        table, unfitting = _with_buckets(table, buckets, metadata)
        bad = bad + unfitting
    bad.sort(key=lambda row: (row.shard, row.key, row.reason))
    quarantine = beside(path, QUARANTINE_NAME)
    temporary = quarantine.with_name(f".{quarantine.name}.{os.getpid()}.partial")
    temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in bad))
    temporary.rename(quarantine)
    faults = Counter(fault_kind(row.reason) for row in bad)
    samples, broken = sum(bool(row.key) for row in bad), len({row.shard for row in bad if not row.key})
    share = max(samples / max(1, samples + len(table)), broken / max(1, shards))
    if share > most_bad or not len(table):
        counted = ", ".join(f"{kind} {count}" for kind, count in faults.most_common())
        accept = f", or accept them: --most-bad {math.ceil(share * 100) / 100:g}" if len(table) else ""
        raise DataError(
            f"{path.parent}: {samples} of {samples + len(table)} samples and {broken} of {shards} shards are bad, at "
            f"most {most_bad:.0%} may be: {counted}. Shards, keys and reasons are in {quarantine}. Repair what they "
            f"name and run the command again (only changed shards are read){accept}"
        )
    written = write_index(path, table, metadata)
    return Indexed(written, path, len(table), shards, faults=faults)


def _first_of_each(table: pa.Table, corpus: str) -> tuple[pa.Table, list[BadSample]]:
    """The rows without those whose sample an earlier shard has."""
    ids = table.column("sample_id").to_numpy()
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    keep = np.zeros(len(ids), bool)
    keep[first] = True
    again = np.flatnonzero(~keep)
    shards, keys = table.column("shard"), table.column("key")
    bad = []
    for number in again.tolist():
        winner = shards[int(first[inverse[number]])].as_py()
        shard, key = shards[number].as_py(), keys[number].as_py()
        bad.append(BadSample(corpus, shard, key, f"duplicate key: {key!r} is in {winner} too; the first shard's stays"))
    return (table.filter(pa.array(keep)) if bad else table), bad


def _with_buckets(
    table: pa.Table, buckets: Sequence[Bucket], metadata: IndexMetadata
) -> tuple[pa.Table, list[BadSample]]:
    """The rows with their buckets, without those that fit none."""
    rates = np.nan_to_num(table.column("fps").to_numpy().astype(np.float64))
    columns = [table.column(name).to_numpy().astype(np.float64) for name in ("frames", "height", "width")]
    # few clips differ in all four, so the choice is made once for each that does
    kinds, inverse = np.unique(np.stack([*columns, rates], 1), axis=0, return_inverse=True)
    names: list[str | None] = []
    reasons: dict[int, str] = {}
    for number, (frames, height, width, fps) in enumerate(kinds.tolist()):
        try:
            count = frames_at(int(frames), fps or None, metadata.fps)
            names.append(str(choose_bucket(count, int(height), int(width), buckets)))
        except DataError as error:
            names.append(None)
            reasons[number] = f"no bucket: {error}"
    inverse = inverse.reshape(-1)
    chosen = pa.array(names, pa.string()).dictionary_encode().take(pa.array(inverse))
    place = SCHEMA.names.index("bucket")
    table = table.set_column(place, SCHEMA.field("bucket"), chosen.cast(SCHEMA.field("bucket").type))
    if not reasons:
        return table, []
    bad = [
        BadSample(metadata.corpus, table.column("shard")[row].as_py(), table.column("key")[row].as_py(), reasons[kind])
        for row, kind in enumerate(inverse.tolist())
        if kind in reasons
    ]
    return table.filter(table.column("bucket").is_valid()), bad


def known_identity(folder: Path) -> IndexMetadata | None:
    """What the index that a folder has says of itself, of any format version; None where it has none."""
    path = folder / INDEX_NAME
    return read_metadata(path) if path.exists() else None
