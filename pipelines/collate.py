"""Samples that were read become a batch: each tensor is copied once, to its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.index import IndexRow
from domainshuttle.pipelines.pairing import Pairing
from domainshuttle.pipelines.sample import DataError, tensor_views
from domainshuttle.pipelines.staging import Staging


@dataclass
class ReadSample:
    """One sample in bf16 as a step shows it: `target` [16,f,h,w], `text` [l,d], and [16,h,w] latents of the pictures
    of both sets, in the order of `pairing` (set B empty where the stage has no pairs)."""

    row: IndexRow
    pairing: Pairing
    target: Tensor
    text: Tensor
    set_a: list[Tensor]
    set_b: list[Tensor]


def read_tensors(data: Any, where: str) -> dict[str, Tensor]:
    """The bf16 tensors of safetensors bytes, as views."""
    tensors = {}
    for name, view in tensor_views(data, where).items():
        if view.dtype != "BF16":
            raise DataError(f"{where}: tensor {name} is {view.dtype}, expected BF16; encode the corpus again")
        tensors[name] = memory_tensor(view.buffer, np.uint16).view(torch.bfloat16).reshape(view.shape)
    return tensors


def memory_tensor(buffer: Any, dtype: Any) -> Tensor:
    """A buffer as a flat tensor, without a copy; nobody may write to it.

    Read-only memory is passed under numpy's writable flag, since torch warns about the other: a shard's map and Ray's
    objects are read-only by intent.
    """
    array = np.frombuffer(buffer, dtype)
    if not len(array):
        return torch.from_numpy(array.copy())
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    holder = type("_Memory", (), {"__array_interface__": interface, "owner": array})()
    return torch.from_numpy(np.asarray(holder))


def all_finite(latents: Tensor) -> bool:
    """Whether a bf16 tensor has neither NaN nor infinity: their exponent is all ones, so as integers they are the
    largest of their sign."""
    bits = latents.view(torch.int16).numpy()
    return bool(bits.max(initial=0) < _INFINITY and bits.view(np.uint16).max(initial=0) < _INFINITY + 0x8000)


_INFINITY = 0x7F80


def collate(samples: Sequence[ReadSample], text_len: int, paired: bool, staging: Staging) -> TrainingBatch:
    """Samples of one bucket as a batch; reference slots are as many as the fullest sample has."""
    first = samples[0].target
    latents = staging.empty(len(samples), *first.shape)
    text = staging.empty(len(samples), text_len, samples[0].text.shape[-1])
    for number, one in enumerate(samples):
        latents[number] = one.target
        length = min(len(one.text), text_len)
        text[number, :length] = one.text[:length]
        text[number, length:] = 0
    channels, _, height, width = first.shape
    picture = channels, height, width
    rows = [one.row for one in samples]
    references = _reference_set(
        rows, [one.pairing.set_a for one in samples], [one.set_a for one in samples], picture, staging
    )
    second: dict[str, Tensor] = {}
    if paired:
        pictures = _reference_set(
            rows, [one.pairing.set_b for one in samples], [one.set_b for one in samples], picture, staging
        )
        second = {f"paired_{name}": value for name, value in pictures.items()}
    return TrainingBatch(
        latents=latents,
        text=text,
        sample_ids=torch.tensor([row.sample_id for row in rows], dtype=torch.int64),
        sources=tuple(row.corpus for row in rows),
        **references,
        **second,
    )


def _reference_set(
    rows: list[IndexRow],
    chosen: list[list[int]],
    pictures: list[list[Tensor]],
    shape: tuple[int, int, int],
    staging: Staging,
) -> dict[str, Tensor]:
    slots = max((len(numbers) for numbers in chosen), default=0)
    references = staging.empty(len(rows), slots, *shape)
    subjects, domains, mask = [], [], []
    for place, row, numbers, latents in zip(references, rows, chosen, pictures, strict=True):
        for slot, own in zip(place, latents, strict=False):
            slot.copy_(own)
        place[len(numbers) :].zero_()
        shown, empty = [row.reference_subjects[number] for number in numbers], slots - len(numbers)
        subjects.append([*shown, *[0] * empty])
        domains.append([*[row.domains[subject] for subject in shown], *[-1] * empty])
        mask.append([True] * len(numbers) + [False] * empty)
    labels = len(rows), slots
    return {
        "references": references,
        "reference_subjects": torch.tensor(subjects, dtype=torch.int64).view(labels),
        "reference_domains": torch.tensor(domains, dtype=torch.int64).view(labels),
        "reference_mask": torch.tensor(mask, dtype=torch.bool).view(labels),
    }
