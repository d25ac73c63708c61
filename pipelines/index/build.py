"""Indexing: shards that exist already, on a disk or in a store, get an index, on Ray tasks, a task a shard.

Each shard's samples become a part beside the shards, `.index/<shard>.parquet`, which says of which size and time of
change the shard was. A part that still fits its shard is not made again: so a job that was stopped goes on, and after
shards were added, changed or removed only those are read. The index and the quarantine table are then the parts, joined
in the order of the shards' names. Rows stay columns on the way: an index of millions is not held as objects. Files of
the folder that are not read are listed beside the index (`folder`).

Buckets are chosen when the parts are joined. Other buckets or another frame rate make another index without reading
the shards again.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from domainshuttle.pipelines.buckets import Bucket, choose_bucket, frames_at
from domainshuttle.pipelines.errors import DataError, StorageError, counted
from domainshuttle.pipelines.index.alterations import Alterations, count_alterations
from domainshuttle.pipelines.index.folder import (
    PARTS_FOLDER,
    Skipped,
    beside,
    list_folder,
    no_shards,
    write_skipped,
)
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import (
    FORMAT_VERSION,
    SCHEMA,
    Index,
    IndexMetadata,
    IndexRow,
    rows_table,
    write_index,
)
from domainshuttle.pipelines.quarantine import (
    MOST_BAD_IN_CORPUS,
    QUARANTINE_NAME,
    BadSample,
    SampleFault,
    accepted_share,
    bad_share,
    fault_kind,
    fault_reason,
    kinds_of,
    percent,
)
from domainshuttle.pipelines.ray_tasks import Progress, each_result
from domainshuttle.pipelines.shards.checks import MOST_DESCRIPTION_BYTES, check_files, check_tensors, read_description
from domainshuttle.pipelines.shards.scan import Fault, scan_contents, scan_shard
from domainshuttle.pipelines.shards.scan import shown as printable
from domainshuttle.pipelines.shards.tar import ShardEntry
from domainshuttle.pipelines.storage.files import (
    delete,
    exists,
    list_dated,
    open_parquet,
    read_bytes,
    write_bytes,
    writing,
)
from domainshuttle.pipelines.storage.uri import Location, absolute, join, name_of, parent, redacted

_PART_KEY = b"domainshuttle.part"
_RULES = 2  # of what is a sample: a part that was made by others is made again
_AT_ONCE = 16  # parts that are read at a time: in a store each is some requests, which wait rather than work
_MOST_TENSOR_BYTES = 256 << 20  # of one sample's latents, which are held; real ones are megabytes


@dataclass(frozen=True)
class Indexed:
    """What indexing made: the index's metadata, how many samples and shards, of which `scanned` were read now and
    `unchanged` before; what was left out, by kind; what training changes of the samples; and what lies beside the
    shards, or in them, that is not read."""

    metadata: IndexMetadata
    path: Location
    samples: int
    shards: int
    scanned: int = 0
    scanned_bytes: int = 0
    unchanged: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    altered: Alterations = field(default_factory=Alterations)
    skipped: tuple[Skipped, ...] = ()


def index_folder(
    folder: Location,
    metadata: IndexMetadata,
    buckets: Sequence[Bucket],
    progress: Progress,
    most_bad: float = MOST_BAD_IN_CORPUS,
    shards: str = "*",
    name: str = INDEX_NAME,
) -> Indexed:
    """Makes or renews the index `name` of a folder's shards on the Ray cluster that is connected.

    `metadata` says the corpus, its stage, the rate at which clips are sampled, and for encoded shards their encoders;
    `buckets` are those for raw samples (encoded ones have theirs). `shards` restricts it to names of a pattern, without
    `.tar`. `progress` counts MiB. Raises DataError where there is nothing to index, encoded samples are met as raw
    ones, or more than `most_bad` of the samples or of the shards are bad; the index before then stays. Raises
    StorageError where a store fails: what was read until then is not read again.
    """
    folder = absolute(folder)
    if metadata.stage == "raw" and not buckets:
        raise DataError(f"{redacted(folder)}: no buckets for raw samples; give some, such as 81x480x832")
    if "/" in shards:
        raise DataError(
            f"shards {shards!r}: expected a pattern of names, of shards that lie in {redacted(folder)} itself"
        )
    held = list_folder(folder, shards)
    if not held.shards:
        raise no_shards(folder, shards, held)
    stamps: dict[str, dict[str, Any]] = {
        name: {"size": size, "mtime_ns": changed, "stage": metadata.stage, "format": FORMAT_VERSION, "rules": _RULES}
        for name, (size, changed) in held.shards.items()
    }
    faults = [Fault(printable(name), "", str(fault)) for name, fault in held.misnamed.items()]
    parts_folder = join(folder, PARTS_FOLDER)
    parts = {shard: _part_of(folder, shard) for shard in stamps}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        notes = dict(zip(parts, pool.map(_part_notes, parts.values()), strict=True))
    old = [shard for shard, stamp in stamps.items() if not stamp.items() <= (notes[shard] or {}).items()]
    if metadata.stage == "raw":
        _refuse_encoded(join(folder, shard) for shard in old)
    died = _scan([(join(folder, shard), stamps[shard], parts[shard]) for shard in old], progress)
    faults += died
    left = {part for part, *_ in list_dated(parts_folder)}
    if shards == "*":
        for stale in left:
            if stale.removesuffix(".parquet") not in parts:
                delete(join(parts_folder, stale))
    lost = {fault.shard for fault in died}
    whole = [shard for shard in stamps if name_of(parts[shard]) in left and shard not in lost]
    tables, companions = [], held.companions
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        read = pool.map(_part, [parts[shard] for shard in whole])
        for shard, (table, own) in zip(whole, read, strict=True):
            tables.append(table)
            faults += [Fault(shard, *fault) for fault in own["faults"]]
            companions.update(own["companions"])
    joined = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    quarantined = [BadSample(metadata.corpus, fault.shard, fault.key, fault.reason) for fault in faults]
    path = join(folder, name)
    skipped = write_skipped(path, held.skipped, companions)
    made = _join(joined, metadata, buckets, path, quarantined, most_bad)
    return replace(
        made,
        scanned=len(old),
        scanned_bytes=sum(stamps[shard]["size"] for shard in old),
        unchanged=len(stamps) - len(old),
        skipped=tuple(skipped),
    )


def _scan(work: Sequence[tuple[Location, dict[str, Any], Location]], progress: Progress) -> list[Fault]:
    """Has the cluster write the parts of shards: of each its place, its stamp and its part's place. Returns the shards
    whose task died."""
    total, done, died = sum(stamp["size"] for _, stamp, _ in work), 0, []
    for (place, stamp, _), result in each_result(_index_shard, work):
        if isinstance(result, Exception):
            reason = f"unreadable shard: its task died ({type(result).__name__}); run again"
            died.append(Fault(name_of(place), "", reason))
        done += stamp["size"]
        progress(done >> 20, total >> 20)
    return died


def merge_indexes(indexes: Sequence[Location], out: Location, most_bad: float = MOST_BAD_IN_CORPUS) -> Indexed:
    """Joins indexes of one folder, made of different shards, into one at `out` in that folder, in the order of the
    shards' names.

    A shard that several have alike counts once. Raises DataError where they are of several folders or corpora, or do
    not agree on a shard.
    """
    loaded = [Index.load(path) for path in indexes]
    folder = parent(absolute(out))
    if not loaded or {parent(absolute(path)) for path in indexes} != {folder}:
        raise DataError(
            f"indexes {[redacted(path) for path in indexes]}: expected some of the folder {redacted(folder)}"
        )
    if labelled := [redacted(path) for path, index in zip(indexes, loaded, strict=True) if index.parts[0].labels]:
        raise DataError(f"{labelled[0]} has labels, which are put in after indexes are joined: index the shards again")
    first = loaded[0].parts[0]
    for path, index in zip(indexes, loaded, strict=True):
        if index.parts[0].identity() != first.identity():
            raise DataError(
                f"{redacted(path)} and {redacted(indexes[0])} differ in corpus, stage, encoders or fps: "
                f"{index.parts[0].identity()} and {first.identity()}; index the shards again with the same"
            )
    held: dict[str, tuple[Location, pa.Table]] = {}
    for path, index in zip(indexes, loaded, strict=True):
        codes, names = index.codes("shard")
        rows = index.table.select(SCHEMA.names)
        for number, shard in enumerate(names):
            own = rows.filter(pa.array(codes == number)).unify_dictionaries().combine_chunks()
            if shard in held and held[shard][1].column("checksum") != own.column("checksum"):
                both = f"{redacted(path)} and {redacted(held[shard][0])}"
                raise DataError(f"{both} do not agree on {shard}; index that shard again")
            held.setdefault(shard, (path, own))
    quarantined: dict[str, None] = {}
    for path in indexes:
        if exists(table := beside(path, QUARANTINE_NAME)):
            quarantined.update(dict.fromkeys(read_bytes(table).decode().splitlines()))
    bad = [BadSample(**json.loads(line)) for line in quarantined]
    table = pa.concat_tables([held[shard][1] for shard in sorted(held)])
    found, known = list_folder(folder), sorted({*held, *(row.shard for row in bad)})
    left = [Skipped(name, "in none of these indexes", "index it too") for name in found.shards if name not in known]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for notes in pool.map(_part_notes, [_part_of(folder, shard) for shard in known]):
            found.companions.update(notes["companions"] if notes else {})
    skipped = write_skipped(absolute(out), [*left, *found.skipped], found.companions)
    made = _join(table, first, None, absolute(out), bad, most_bad)
    return replace(made, skipped=tuple(skipped))


def _part_of(folder: Location, shard: str) -> Location:
    return join(folder, f"{PARTS_FOLDER}/{shard}.parquet")


def _part_notes(part: Location) -> dict[str, Any] | None:
    """What a shard's part says of itself: the shard's stamp, `faults`, what was left out as (key, reason), and
    `companions`, by pattern; None where there is no whole part of these rules."""
    try:
        notes: dict[str, Any] = json.loads(open_parquet(part).metadata.metadata[_PART_KEY])
    except StorageError:  # of which nothing follows for the part
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return notes if notes.get("rules") == _RULES else None


def _part(part: Location) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of a shard's part, and its notes."""
    file = open_parquet(part)
    return file.read().replace_schema_metadata(None), json.loads(file.metadata.metadata[_PART_KEY])


def _refuse_encoded(shards: Iterable[Location]) -> None:
    """Raises DataError where the first sample that can be found is an encoded one."""
    entries = (found for path in shards for found in scan_shard(path) if isinstance(found, ShardEntry))
    if (first := next(entries, None)) and any(member.extension == "safetensors" for member in first.members):
        raise DataError(
            f"{first.shard}: sample {first.key!r} is encoded, and the folder has no index that names its encoders: "
            f"copy the {INDEX_NAME} of the job that encoded it (of any part of it) here, or encode the raw corpus "
            "again with `domainshuttle data encode`"
        )


def _index_shard(shard: Location, stamp: dict[str, Any], part: Location) -> int:
    """Makes the part of one shard; returns how many samples it has. The stamp is older than what is read, so a change
    meanwhile makes the part an old one."""
    rows: list[IndexRow] = []
    faults: list[tuple[str, str]] = []
    companions = Counter[str]()
    read = ("json",) if stamp["stage"] == "raw" else ("json", "safetensors")
    for found in scan_contents(shard, read, _MOST_TENSOR_BYTES, companions):
        if isinstance(found, Fault):
            faults.append((found.key, found.reason))
            continue
        entry, contents = found
        try:
            rows.append(_row(entry, contents, stamp["stage"]))
        except DataError as error:
            faults.append((entry.key, fault_reason(error)))
    table = _table(rows, faults)
    notes = {**stamp, "faults": faults, "companions": companions}
    with writing(part) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_PART_KEY: json.dumps(notes).encode()})
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


def _row(entry: ShardEntry, contents: dict[str, bytes], stage: str) -> IndexRow:
    members = {member.extension: member for member in entry.members}
    for name, kind, most in (
        ("json", "bad description", MOST_DESCRIPTION_BYTES),
        ("safetensors", "bad tensors", _MOST_TENSOR_BYTES),
    ):
        if name in members and members[name].size > most:
            raise SampleFault(kind, f"{entry.key}.{name} has {members[name].size} bytes, expected at most {most}")
    info = read_description(entry.key, members, contents.get("json", b""))
    if stage == "raw":
        check_files(entry.key, info, members)
        return IndexRow.of(entry, info, "")
    sample, bucket = check_tensors(entry.key, info, members, contents.get("safetensors", b""))
    return IndexRow.of(entry, info, bucket, sample.text.shape[0], sample.whole_caption_tokens)


def _join(
    table: pa.Table,
    metadata: IndexMetadata,
    buckets: Sequence[Bucket] | None,
    path: Location,
    bad: list[BadSample],
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
    write_bytes(quarantine, "".join(json.dumps(asdict(row)) + "\n" for row in bad).encode())
    faults = Counter(fault_kind(row.reason) for row in bad)
    samples, broken = len({(row.shard, row.key) for row in bad if row.key}), {row.shard for row in bad if not row.key}
    # each shard has rows, or a fault that says why it has none
    shards = {*pc.unique(table.column("shard")).to_pylist(), *(row.shard for row in bad)}
    share = max(bad_share(samples, len(table)), len(broken) / max(1, len(shards)))
    if share > most_bad or not len(table):
        accept = f", or accept them: --most-bad {accepted_share(share)}" if len(table) else ""
        of_samples = f"{samples} of {counted(samples + len(table), 'sample')}"
        raise DataError(
            f"{redacted(parent(path))}: {of_samples} and {len(broken)} of {counted(len(shards), 'shard')} are "
            f"bad, at most {percent(most_bad)} may be: {kinds_of(row.reason for row in bad)}. Shards, keys and reasons "
            f"are in {redacted(quarantine)}. Repair what they name and run the command again (only changed shards are "
            f"read){accept}"
        )
    written = write_index(path, table, metadata)
    altered = count_alterations(table, metadata.fps)
    return Indexed(written, path, len(table), len(shards), faults=faults, altered=altered)


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
