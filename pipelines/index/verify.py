"""Verifying: whether a corpus's shards, on a disk or in a store, are what its index says, on Ray tasks, a task a shard.

Every sample: its shard is there, its members lie within it, their bytes have the index's checksum, its description is
the row's, its files or tensors are complete and its bucket fits. Some or all samples are also decoded, as training
would. Every fault is a row of `verify.jsonl` beside the index, its reason 'kind: detail'.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa

from domainshuttle.pipelines.buckets import frames_at, parse_bucket
from domainshuttle.pipelines.errors import DataError, MissingError, counted
from domainshuttle.pipelines.index.folder import VERIFY_NAME, Skipped, beside, list_folder
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME
from domainshuttle.pipelines.index.samples import compare_with_index
from domainshuttle.pipelines.index.table import SCHEMA, Index, IndexMetadata, IndexRow
from domainshuttle.pipelines.media.claims import reference_pixels, target_pixels
from domainshuttle.pipelines.quarantine import BadSample, SampleFault, fault_kind, fault_reason
from domainshuttle.pipelines.ray_tasks import Progress, each_result
from domainshuttle.pipelines.sample import LABELS_MEMBER, Buffer, RawSample
from domainshuttle.pipelines.shards.checks import check_files, check_finite, check_tensors, read_description
from domainshuttle.pipelines.shards.tar import Member, ShardCache, check_shard_name, sample_checksum, shard_of
from domainshuttle.pipelines.storage.files import exists, read_ranges, size, writing
from domainshuttle.pipelines.storage.uri import Location, absolute, is_remote, join, parent, redacted

_RENAME = "rename them: letters, digits, _ and -, then .tar"
_MOST_BYTES = 64 << 20  # of samples that are asked of a store, and held, at once


@dataclass(frozen=True)
class Verified:
    """What verifying found: faults by kind, in how many samples and shards; `unindexed` names shards of the folder that
    the index does not have, `skipped` its files that are none."""

    samples: int
    decoded: int
    shards: int
    read_bytes: int
    path: Location
    faults: Counter[str] = field(default_factory=Counter)
    bad_samples: int = 0
    bad_shards: int = 0
    unindexed: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def verify_index(
    path: Location,
    progress: Progress,
    checksums: bool = True,
    decode: int | None = 0,
    where: str | None = None,
) -> Verified:
    """Checks the samples of an index, or those of them for which the filter `where` holds, on the cluster that is
    connected.

    `checksums`: read and compare every byte; without, only descriptions and headers are read (of a store: all that is
    in the index). `decode`: how many samples to decode, evenly spread (None: all). `progress` counts samples. Raises
    DataError where the index itself is not whole, StorageError where a store fails, which is no fault of a sample.
    """
    path = absolute(path)
    whole = Index.load(path)
    index = whole.filter(where) if where else whole
    if not len(index):
        raise DataError(f"{redacted(path)}: no sample for which {where!r} holds")
    count = len(index) if decode is None else min(decode, len(index))
    decoded = np.zeros(len(index), bool)
    if count:
        decoded[np.linspace(0, len(index) - 1, count).astype(np.int64)] = True
    folder = parent(path)
    report = beside(path, VERIFY_NAME)
    faults: Counter[str] = Counter()
    done = read = bad_samples = 0
    bad_shards: set[str] = set()
    work = _by_shard(index, decoded)
    with writing(report) as temporary, temporary.open("w") as lines:
        if index.parts[0].stage == "encoded" and not exists(join(folder, EMPTY_CAPTION_NAME)):
            reason = f"missing file: {EMPTY_CAPTION_NAME}, which steps without a caption need; copy it or encode again"
            lines.write(json.dumps(asdict(BadSample(index.parts[0].corpus, EMPTY_CAPTION_NAME, "", reason))) + "\n")
            faults[fault_kind(reason)] += 1
        for (table, *_), result in each_result(
            _verify_shard, ((table, index.parts[0], folder, chosen, checksums) for table, chosen in work)
        ):
            shard = table.column("shard")[0].as_py()
            if isinstance(result, Exception):
                died = f"unreadable shard: the task that read it died ({type(result).__name__})"
                result = [BadSample(index.parts[0].corpus, shard, "", died)], 0
            bad, bytes_read = result
            lines.writelines(json.dumps(asdict(row)) + "\n" for row in bad)
            faults.update(fault_kind(row.reason) for row in bad)
            bad_samples += len(table) if any(not row.key for row in bad) else len({row.key for row in bad})
            bad_shards.update(row.shard for row in bad)
            read += bytes_read
            done += len(table)
            progress(done, len(index))
    known, held = set(whole.codes("shard")[1]), list_folder(folder)
    return Verified(
        samples=len(index),
        decoded=int(decoded.sum()),
        shards=len(set(index.codes("shard")[0].tolist())),
        read_bytes=read,
        path=report,
        faults=faults,
        bad_samples=bad_samples,
        bad_shards=len(bad_shards),
        unindexed=tuple(sorted(held.shards.keys() - known)),
        skipped=(*held.skipped, *(Skipped(name, "unsafe name", _RENAME) for name in held.misnamed)),
    )


def _by_shard(index: Index, decoded: np.ndarray) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The rows of each shard, and which of them are to be decoded."""
    codes, _ = index.codes("shard")
    order = np.argsort(codes, kind="stable")
    table = index.table.select(SCHEMA.names)
    for rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        yield table.take(pa.array(rows)), decoded[rows]


def _verify_shard(
    table: pa.Table, metadata: IndexMetadata, folder: Location, decoded: np.ndarray, checksums: bool
) -> tuple[list[BadSample], int]:
    """The faults of one shard's samples, and the bytes that were read."""
    rows = Index(table, (metadata,), "").rows(range(len(table)))
    place = join(folder, rows[0].shard)
    try:
        held = size(place)
    except MissingError:
        reason = f"missing shard: {redacted(place)} is gone, with {counted(len(rows), 'sample')}"
        return [BadSample(metadata.corpus, rows[0].shard, "", reason)], 0
    bad: list[BadSample] = []
    read = 0
    for (row, members), whole in zip(_contents(rows, folder, held), decoded.tolist(), strict=True):
        try:
            if isinstance(members, SampleFault):
                raise members
            read += sum(map(len, members.values())) if checksums or whole else len(members.get("json", b""))
            if checksums and sample_checksum(members) != row.checksum:
                raise SampleFault("checksum differs", f"{row.key}: its bytes are not those that were indexed")
            if metadata.stage == "raw":
                _verify_raw(row, members, metadata.fps, whole)
            else:
                _verify_encoded(row, members, whole)
        except DataError as error:
            bad.append(BadSample(row.source, row.shard, row.key, fault_reason(error)))
    return bad, read


Contents = dict[str, memoryview] | SampleFault


def _contents(rows: Sequence[IndexRow], folder: Location, held: int) -> Iterator[tuple[IndexRow, Contents]]:
    """The bytes of the members of a shard's samples, whose shard has `held` bytes, or why they can't be read."""
    if is_remote(folder):
        yield from _stored(rows, join(folder, check_shard_name(rows[0].shard)), held)
        return
    cache = ShardCache(
        max_open=2
    )  # with the labels'; not the process's: a shard of this name may have been another before
    for row in rows:
        try:
            yield row, cache.read(folder, row.shard, row.members)
        except DataError as error:
            yield row, SampleFault("outside shard", str(error))


def _stored(rows: Sequence[IndexRow], place: Location, held: int) -> Iterator[tuple[IndexRow, Contents]]:
    """The same of a store: samples that lie together are asked for together."""
    total, groups = 0, []
    for row in rows:
        total += sum(member.size for member in row.members if _within(row, held))
        groups.append(total // _MOST_BYTES)
    for _, pairs in groupby(zip(rows, groups, strict=True), key=itemgetter(1)):
        group = [row for row, _ in pairs]
        fitting = [row for row in group if _within(row, held)]
        try:
            found = _read_group(fitting, parent(place))
        except DataError as error:  # it was replaced or removed meanwhile
            yield from ((row, SampleFault("outside shard", str(error))) for row in group)
            continue
        for row in group:
            if _within(row, held):
                yield row, {member.extension: found[shard_of(row.shard, member), member] for member in row.members}
            else:
                yield row, SampleFault("outside shard", f"{redacted(place)}: a member is not within its {held} bytes")


def _read_group(rows: Sequence[IndexRow], folder: Location) -> dict[tuple[str, Member], memoryview]:
    """The bytes of all members of some samples, by the shard and the place in it."""
    wanted = [(shard_of(row.shard, member), member) for row in rows for member in row.members]
    found: dict[tuple[str, Member], memoryview] = {}
    for shard in dict.fromkeys(name for name, _ in wanted):
        own = [one for one in wanted if one[0] == shard]
        read = read_ranges(join(folder, shard), [(member.offset, member.size) for _, member in own])
        found.update(zip(own, read, strict=True))
    return found


def _within(row: IndexRow, held: int) -> bool:
    return all(0 <= one.offset <= one.offset + one.size <= held for one in row.members if not one.shard)


def _verify_raw(row: IndexRow, members: dict[str, memoryview], fps: float | None, decode: bool) -> None:
    info = read_description(row.key, members, members.get(LABELS_MEMBER, members.get("json", b"")))
    check_files(row.key, info, members.keys() - {LABELS_MEMBER})
    compare_with_index(row, info)
    bucket = parse_bucket(row.bucket)
    try:
        frames = frames_at(info.frames, info.fps, fps)
    except DataError as error:
        raise SampleFault("wrong bucket", f"{row.key}: {error}") from error
    if bucket.frames > frames or (bucket.frames == 1) != (frames == 1):
        raise SampleFault("wrong bucket", f"{row.key}: its {counted(frames, 'frame')} can't fill its bucket {bucket}")
    if decode:
        sample = RawSample.from_members(row.key, members)
        # fitted, as training does: a clip of its full size may be gigabytes
        target_pixels(sample, bucket, fps)
        for number in range(len(info.references)):
            reference_pixels(sample, number)


def _verify_encoded(row: IndexRow, members: dict[str, memoryview], decode: bool) -> None:
    info = read_description(row.key, members, members.get("json", b""))
    data: Buffer = members.get("safetensors", b"")
    sample, bucket = check_tensors(row.key, info, members, data)
    compare_with_index(row, info, sample.text.shape[0], sample.whole_caption_tokens)
    if str(bucket) != row.bucket:
        raise SampleFault("wrong bucket", f"{row.key}: its latents are of {bucket}, the index says {row.bucket}")
    if decode:
        check_finite(sample)
