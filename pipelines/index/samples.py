"""Samples by their rows of an index: read from their shards, and compared with what the index says of them."""

from typing import Any

import numpy as np

from domainshuttle.pipelines.index.table import SCHEMA, IndexRow
from domainshuttle.pipelines.quarantine import SampleFault
from domainshuttle.pipelines.sample import LABELS_MEMBER, RawSample, SampleInfo, description
from domainshuttle.pipelines.shards.tar import ShardEntry, checksum_of, member_digest, read_members


def read_raw_sample(row: IndexRow) -> RawSample:
    """The raw sample of a row. Raises DataError where it can't be read or is not valid, or is another than the index
    says, StorageError where a store fails."""
    sample = RawSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
    compare_with_index(row, sample.info)
    return sample


def read_info(row: IndexRow) -> SampleInfo:
    """What a raw sample of a row says of itself, without its pictures and clips. Raises as `read_raw_sample` does."""
    wanted = [member for member in row.members if member.extension in ("json", LABELS_MEMBER)]
    members = read_members(row.folder, row.shard, wanted)
    info = SampleInfo.from_json(description(row.key, members), f"{row.key}.json")
    compare_with_index(row, info)
    return info


def read_verified_sample(row: IndexRow) -> tuple[RawSample, dict[str, bytes]]:
    """`read_raw_sample`, and the digest of each member by its extension. Also raises SampleFault where its bytes are
    not those that were indexed."""
    members = read_members(row.folder, row.shard, row.members)
    sample = RawSample.from_members(row.key, members)
    compare_with_index(row, sample.info)
    digests = {name: member_digest(name, len(data), [data]) for name, data in members.items()}
    if checksum_of(digests) != row.checksum:
        raise SampleFault(
            "checksum differs", f"{row.key}: its bytes are not those that were indexed; index the shards again"
        )
    return sample, digests


def compare_with_index(row: IndexRow, info: SampleInfo, text_tokens: int = 0, caption_tokens: int = 0) -> None:
    """Raises SampleFault where a row says another than its sample's description, or than how many tokens it has: size,
    frames, rate, subjects, references, scores, source and what follows of them."""
    entry = ShardEntry(row.shard, row.key, row.members, row.checksum)
    there = _comparable(IndexRow.of(entry, info, row.bucket, text_tokens, caption_tokens))
    held = _comparable(row)
    if not row.caption_tokens:  # nobody counted
        held["caption_tokens"] = there["caption_tokens"]
    if wrong := sorted(name for name in there if there[name] != held[name]):
        name = wrong[0]
        raise SampleFault(
            "index differs", f"{row.key}: {name} is {held[name]!r} in the index and {there[name]!r} in the shard"
        )


def _comparable(row: IndexRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in _COMPARED}
    return {**values, "fps": None if row.fps is None else float(np.float32(row.fps))}  # as files of version 2 have it


_COMPARED = [name for name in SCHEMA.names if name not in ("members", "checksum")]
