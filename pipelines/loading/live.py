"""Live encoding: raw corpora are decoded and encoded while they are trained on, on actors beside the trainers.

An actor holds the encoders, reads the raw samples of a micro-batch itself, and gives one row: the finished batch as
safetensors bytes, with its place and its account. So only what is encoded passes through the object store, once; the
rank opens the bytes in place.
"""

import json
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.encoder_sources import encoder_files, files_digest
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.encoding.sample_encoder import (
    SampleEncoder,
    decode_reference,
    decode_target,
    load_encoders,
)
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.loading.collate import ReadSample, check_tensor, collate, memory_tensor
from domainshuttle.pipelines.loading.ray_source import unpacked
from domainshuttle.pipelines.loading.reader import Drawn, MicroBatch, Reader, Work
from domainshuttle.pipelines.media.augment import augmented_view
from domainshuttle.pipelines.plan.feed import EncoderSources, Feed
from domainshuttle.pipelines.quarantine import BadSample
from domainshuttle.pipelines.shards.tensors import tensor_views


class RawReader(Reader[ReadSample, TrainingBatch]):
    """Reads raw shards: decodes the target and the chosen references, and encodes them."""

    def __init__(self, feed: Feed, sources: EncoderSources, device: str) -> None:
        super().__init__(feed, self.read_sample, self.collate)
        self.staging = Staging()
        self._encoder = SampleEncoder(*load_encoders(sources, device))
        self._fps = {part.corpus: part.fps for part in self.index.parts}

    def collate(self, samples: list[ReadSample]) -> TrainingBatch:
        return collate(samples, self.feed.text_len, self.feed.paired, self.staging)

    def read_sample(self, drawn: Drawn) -> ReadSample:
        """One sample, encoded; raises DataError, or what a decoder does, where it can't be read, decoded or fitted."""
        row, pairing, encoder = drawn.row, drawn.pairing, self._encoder
        sample = read_raw_sample(row)
        bucket = parse_bucket(row.bucket)
        target = encoder.target(decode_target(sample, bucket, self._fps[row.corpus]))
        check_tensor(target, bucket.latent_shape, f"{row.source}/{row.key}: target")
        set_a = {picture: encoder.picture(decode_reference(sample, picture, bucket)) for picture in pairing.set_a}
        set_b: list[Tensor] = []
        for picture, altered in zip(pairing.set_b, pairing.augment_b, strict=True):
            if self.feed.paired:
                # pictures are at hand here, so each epoch shows another view
                view = augmented_view(self.feed.seed, drawn.epoch, row.sample_id, picture) if altered else None
                set_b.append(encoder.picture(decode_reference(sample, picture, bucket, view)))
        caption = "" if pairing.text_dropped else sample.info.caption
        pictures = [set_a[picture] for picture in pairing.set_a]
        tokens = encoder.caption_tokens(caption)
        return ReadSample(row, pairing, target, encoder.caption(caption), pictures, set_b, tokens)

    def has_cut_caption(self, sample: ReadSample) -> bool:
        return sample.caption_tokens > len(sample.text)


class LiveEncoder:
    """The actor: planned rows in, packed micro-batches out."""

    def __init__(self, feed: Feed, device: str = "cpu") -> None:
        assert feed.encoders is not None
        if device == "cpu":
            torch.set_num_threads(1)
        require_files(feed.encoders)
        self._reader = RawReader(feed, feed.encoders, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.concat_tables([pack(work.rank, work.make()) for work in self._reader.works(unpacked(table))])


def require_files(sources: EncoderSources) -> None:
    """Raises DataError where the encoders' files on this node are others than those that `sources` names: a folder may
    hold other files on each node."""
    for kind, source in sources.by_kind:
        expected = dict(sources.files).get(f"{kind}_files")
        if expected and (found := encoder_files(source, kind)) and files_digest(found) != expected:
            raise DataError(
                f"encoders.{kind}={source} has other files on node {socket.gethostname()} than where the run was "
                "started: give all nodes the same files, and run the command again"
            )


class Unpacked:
    """The rank's side: micro-batches that actors made. With pinned staging they are copied to it, else opened in
    place."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging if staging.pinned else None

    def works(self, table: pa.Table) -> Iterator[Work[TrainingBatch]]:
        """The micro-batches of packed rows."""
        for number in range(len(table)):
            row = table.slice(number, 1)
            place = {name: row.column(name)[0].as_py() for name in ("step", "part", "rank")}
            yield Work(**place, size=_packed_bytes(row).size, make=partial(unpack, row, self.staging))


def pack(rank: int, micro: MicroBatch[TrainingBatch]) -> pa.Table:
    """A micro-batch as a table of one row."""
    tensors = {name: value for name, value in vars(micro.batch).items() if isinstance(value, Tensor)}
    data = safetensors.torch.save(tensors)
    offsets = pa.py_buffer(np.array([0, len(data)], np.int64))
    return pa.table(
        {
            "step": pa.array([micro.step], pa.int64()),
            "rank": pa.array([rank], pa.int32()),
            "part": pa.array([micro.part], pa.int32()),
            "keys": pa.array([micro.keys], pa.list_(pa.string())),
            # the corpora's names, which are not those of the samples' sources where a corpus is the user's own
            "sources": pa.array([micro.batch.sources], pa.list_(pa.string())),
            "pair_kinds": pa.array([json.dumps(micro.pair_kinds)], pa.string()),
            "bad": pa.array([json.dumps([asdict(one) for one in micro.bad])], pa.string()),
            "replaced": pa.array([json.dumps(micro.replaced)], pa.string()),
            "cut_captions": pa.array([micro.cut_captions], pa.int32()),
            "converted": pa.array([json.dumps([asdict(one) for one in micro.converted])], pa.string()),
            # no copy: the bytes are the column's memory
            "batch": pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)]),
        }
    )


def unpack(row: pa.Table, staging: Staging | None = None) -> MicroBatch[TrainingBatch]:
    """The micro-batch of a packed row: its tensors are views of the row's memory, or copies in `staging`."""
    values = {name: row.column(name)[0].as_py() for name in row.column_names if name not in ("batch", "rank")}
    tensors: dict[str, Any] = {field.name: None for field in fields(TrainingBatch)}
    for name, view in tensor_views(memoryview(_packed_bytes(row)), "a packed batch").items():
        stored, dtype = _DTYPES[view.dtype]
        tensor = memory_tensor(view.buffer, stored).view(dtype).reshape(view.shape)
        tensors[name] = tensor if staging is None else staging.empty(*tensor.shape, dtype=dtype).copy_(tensor)
    tensors["sources"] = tuple(values["sources"])
    return MicroBatch(
        step=values["step"],
        part=values["part"],
        batch=TrainingBatch(**tensors),
        keys=values["keys"],
        pair_kinds=Counter(json.loads(values["pair_kinds"])),
        bad=[BadSample(**one) for one in json.loads(values["bad"])],
        replaced=[(planned, found) for planned, found in json.loads(values["replaced"])],
        cut_captions=values["cut_captions"],
        converted=[BadSample(**one) for one in json.loads(values["converted"])],
    )


def _packed_bytes(row: pa.Table) -> pa.Buffer:
    """The batch's bytes in the row's memory (a scalar's `as_buffer` would copy them)."""
    column = row.column("batch").chunk(0)
    _, offsets, data = column.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2].tolist()
    return data.slice(start, stop - start)


_DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "BF16": (np.uint16, torch.bfloat16),
    "I64": (np.int64, torch.int64),
    "BOOL": (np.bool_, torch.bool),
}
