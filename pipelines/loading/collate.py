"""Samples that were read become a batch: each tensor is copied once, to its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import IndexRow
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.plan.pairing import Pairing


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
    caption_tokens: int = 0
    """Of the whole caption that is shown; more than `text` has where it is cut."""


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


def check_tensor(tensor: Tensor, expected: tuple[int, ...], where: str) -> None:
    """Raises DataError for another shape, or values that are not finite."""
    if tuple(tensor.shape) != expected:
        raise DataError(f"{where} has shape {list(tensor.shape)}, expected {list(expected)}; encode the corpus again")
    check_finite(tensor, where)


def check_finite(tensor: Tensor, where: str) -> None:
    """Raises DataError for a bf16 tensor with values that are not finite."""
    if not all_finite(tensor):
        raise DataError(f"{where} holds NaN or infinity; encode the corpus again")


def all_finite(latents: Tensor) -> bool:
    """Whether a bf16 tensor has neither NaN nor infinity: their exponent is all ones, so as integers they are the
    largest of their sign."""
    bits = latents.view(torch.int16).numpy()
    return bool(bits.max(initial=0) < _INFINITY and bits.view(np.uint16).max(initial=0) < _INFINITY + 0x8000)


_INFINITY = 0x7F80


@dataclass(frozen=True)
class Places:
    """Where one sample's tensors go in a batch: `target` [16,f,h,w], `text` [l,d], each picture [16,h,w]."""

    target: Tensor
    text: Tensor
    set_a: list[Tensor]
    set_b: list[Tensor]


def collate(samples: Sequence[ReadSample], text_len: int, paired: bool, staging: Staging) -> TrainingBatch:
    """Samples of one bucket as a batch."""
    shown = [(one.row, one.pairing) for one in samples]
    shape = text_len, samples[0].text.shape[-1]
    batch, places = empty_batch(shown, tuple(samples[0].target.shape), shape, paired, staging)
    for one, place in zip(samples, places, strict=True):
        place.target.copy_(one.target)
        fill_text(place.text, one.text)
        for slot, picture in zip([*place.set_a, *place.set_b], [*one.set_a, *one.set_b], strict=True):
            slot.copy_(picture)
    return batch


def fill_text(place: Tensor, text: Tensor) -> None:
    """Puts a caption's states [n,d] into their place [l,d], cut or padded with zeros."""
    length = min(len(text), len(place))
    place[:length] = text[:length]
    place[length:] = 0


def empty_batch(
    shown: Sequence[tuple[IndexRow, Pairing]],
    target: tuple[int, ...],
    text: tuple[int, int],
    paired: bool,
    staging: Staging,
) -> tuple[TrainingBatch, list[Places]]:
    """A batch of samples that are still to be filled in, and their places; reference slots are as many as the fullest
    sample has, and empty ones are zero. `target` [16,f,h,w] and `text` [l,d] are the shapes of one sample."""
    rows = [row for row, _ in shown]
    latents, states = staging.empty(len(rows), *target), staging.empty(len(rows), *text)
    channels, _, height, width = target
    picture = channels, height, width
    references, set_a = _reference_set(rows, [pairing.set_a for _, pairing in shown], picture, staging)
    second: dict[str, Tensor] = {}
    set_b: list[list[Tensor]] = [[] for _ in rows]
    if paired:
        pictures, set_b = _reference_set(rows, [pairing.set_b for _, pairing in shown], picture, staging)
        second = {f"paired_{name}": value for name, value in pictures.items()}
    batch = TrainingBatch(
        latents=latents,
        text=states,
        sample_ids=torch.tensor([row.sample_id for row in rows], dtype=torch.int64),
        sources=tuple(row.corpus for row in rows),
        **references,
        **second,
    )
    return batch, [Places(*place) for place in zip(latents, states, set_a, set_b, strict=True)]


def _reference_set(
    rows: list[IndexRow], chosen: list[list[int]], shape: tuple[int, int, int], staging: Staging
) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    slots = max((len(numbers) for numbers in chosen), default=0)
    references = staging.empty(len(rows), slots, *shape)
    subjects, domains, mask, places = [], [], [], []
    for place, row, numbers in zip(references, rows, chosen, strict=True):
        places.append([*place[: len(numbers)]])
        place[len(numbers) :].zero_()
        shown, empty = [row.reference_subjects[number] for number in numbers], slots - len(numbers)
        subjects.append([*shown, *[0] * empty])
        domains.append([*[row.domains[subject] for subject in shown], *[-1] * empty])
        mask.append([True] * len(numbers) + [False] * empty)
    labels = len(rows), slots
    tensors = {
        "references": references,
        "reference_subjects": torch.tensor(subjects, dtype=torch.int64).view(labels),
        "reference_domains": torch.tensor(domains, dtype=torch.int64).view(labels),
        "reference_mask": torch.tensor(mask, dtype=torch.bool).view(labels),
    }
    return tensors, places
