"""Encoded shards: a rank's threads read latents and text states from the shards straight into the batch.

A sample's header says where its tensors lie; one read puts those that the step shows into their places in the batch's
memory, which is page-locked where a GPU waits for it. So each byte is moved once, by the kernel, and is looked at for
NaN while it is still in the processor's cache. (Over maps of the shards a sample of 5.5 MB costs three times as much:
a page fault every few KiB, then the copy, then the look.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.tensor_file import TensorExtent
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError, MissingError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME
from domainshuttle.pipelines.index.table import IndexRow
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.loading.collate import Places, check_finite, empty_batch, fill_text, memory_tensor
from domainshuttle.pipelines.loading.reader import BadPlacesError, Drawn, Reader
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.pipelines.plan.pairing import Pairing
from domainshuttle.pipelines.shards.tar import MemberReader, open_member
from domainshuttle.pipelines.shards.tensors import read_extents, tensor_views
from domainshuttle.pipelines.storage.files import read_bytes
from domainshuttle.pipelines.storage.uri import join


@dataclass(frozen=True)
class Located:
    """A sample whose header was read: where the tensors lie that a step shows of it, set B only of pairs."""

    row: IndexRow
    pairing: Pairing
    member: MemberReader
    target: TensorExtent
    text: TensorExtent
    set_a: list[TensorExtent]
    set_b: list[TensorExtent]

    @property
    def where(self) -> str:
        return f"{self.row.source}/{self.row.key}"


class EncodedReader(Reader[Located, TrainingBatch]):
    """Reads encoded shards: latents and text states."""

    def __init__(self, feed: Feed, staging: Staging) -> None:
        super().__init__(feed, self.locate, self.fill)
        self.staging = staging
        first = self.index.row(0)
        try:
            data = read_bytes(join(first.folder, EMPTY_CAPTION_NAME))
            view = tensor_views(data, EMPTY_CAPTION_NAME)["text"]
            self._empty_caption = memory_tensor(view.buffer, "<u2").view(torch.bfloat16).reshape(view.shape).clone()
            self._width = view.shape[-1]
        except MissingError:
            if feed.text_dropout:
                raise
            self._empty_caption, self._width = torch.empty(0), self._extents(first)[1]["text"].shape[-1]

    def held_bytes(self, samples: list[IndexRow]) -> int:
        """Bytes that a batch of these samples holds, at most, padding included."""
        bucket = parse_bucket(samples[0].bucket)
        sets = 2 if self.feed.paired else 1
        values = math.prod(bucket.latent_shape) + self.feed.text_len * self._width
        pictures = max(min(len(one.reference_subjects), self.feed.references) for one in samples)
        return 2 * len(samples) * (values + sets * pictures * math.prod(bucket.reference_shape))

    def locate(self, drawn: Drawn) -> Located:
        """Reads a sample's header; raises DataError where it lacks a tensor, or has one of another shape or type."""
        row, pairing = drawn.row, drawn.pairing
        where = f"{row.source}/{row.key}"
        member, extents = self._extents(row)
        set_a = [f"reference.{picture}" for picture in pairing.set_a]
        set_b = [
            f"{'view' if altered else 'reference'}.{picture}"
            for picture, altered in zip(pairing.set_b, pairing.augment_b, strict=True)
            if self.feed.paired
        ]
        if other := sorted(own.name for own in extents.values() if own.dtype != "BF16"):
            raise DataError(
                f"{where}: tensor {other[0]} is {extents[other[0]].dtype}, expected BF16; encode the corpus again"
            )
        names = {"target", "text", *set_a, *set_b}
        if missing := sorted(names - set(extents)):
            raise DataError(f"{where}: tensors {missing} are missing; encode the corpus again")
        bucket = parse_bucket(row.bucket)
        for name in sorted(names):
            own = extents[name]
            fixed = {"target": bucket.latent_shape, "text": (*own.shape[:1], self._width)}
            expected = fixed.get(name, bucket.reference_shape)
            if own.shape != expected:
                raise DataError(
                    f"{where}: {name} has shape {list(own.shape)}, expected {list(expected)}; encode the corpus again"
                )
        return Located(
            row, pairing, member, extents["target"], extents["text"],
            [extents[name] for name in set_a], [extents[name] for name in set_b],
        )  # fmt: skip

    def _extents(self, row: IndexRow) -> tuple[MemberReader, dict[str, TensorExtent]]:
        members = [member for member in row.members if member.extension == "safetensors"]
        if not members:
            raise DataError(f"{row.source}/{row.key}: no safetensors member; encode the corpus again")
        member = open_member(row.folder, row.shard, members[0])
        return member, read_extents(member.read, members[0].size, f"{row.source}/{row.key}")

    def has_cut_caption(self, sample: Located) -> bool:
        return not sample.pairing.text_dropped and sample.row.caption_tokens > sample.row.text_tokens

    def fill(self, samples: list[Located]) -> TrainingBatch:
        """Reads the tensors into a batch; raises BadPlacesError for samples that are cut short or not finite."""
        bucket = parse_bucket(samples[0].row.bucket)
        batch, places = empty_batch(
            [(one.row, one.pairing) for one in samples],
            bucket.latent_shape,
            (self.feed.text_len, self._width),
            self.feed.paired,
            self.staging,
        )
        faults: dict[int, DataError] = {}
        for number, (one, place) in enumerate(zip(samples, places, strict=True)):
            try:
                self._fill_one(one, place)
            except DataError as error:
                faults[number] = error
        if faults:
            raise BadPlacesError(faults)
        return batch

    def _fill_one(self, one: Located, place: Places) -> None:
        wanted = [
            (one.target, place.target),
            *zip(one.set_a, place.set_a, strict=True),
            *zip(one.set_b, place.set_b, strict=True),
        ]
        if one.pairing.text_dropped:
            fill_text(place.text, self._empty_caption)
        else:
            length = min(one.text.shape[0], len(place.text))
            wanted.append((one.text, place.text[:length]))
            place.text[length:] = 0
        one.member.read_into([(extent.start, _bytes_of(slot)) for extent, slot in wanted])
        for extent, slot in wanted:
            check_finite(slot, f"{one.where}: {extent.name}")


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
