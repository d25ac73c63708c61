"""Samples that were read become a batch: tensors as views of the shard, stacked once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.index import IndexRow
from domainshuttle.pipelines.pairing import Pairing
from domainshuttle.pipelines.sample import DataError, tensor_views


@dataclass
class ReadSample:
    """One sample, read: its tensors are views of the shard."""

    row: IndexRow
    tensors: dict[str, Tensor]
    text: Tensor
    pairing: Pairing


def read_tensors(data: Any, where: str) -> dict[str, Tensor]:
    """The bf16 tensors of safetensors bytes, as views."""
    tensors = {}
    for name, view in tensor_views(data, where).items():
        if view.dtype != "BF16":
            raise DataError(f"{where}: tensor {name} is {view.dtype}, expected BF16; encode the corpus again")
        # numpy first: torch.frombuffer warns about read-only memory, and a shard's map is read-only by intent
        bits = torch.from_numpy(_writable(np.frombuffer(view.buffer, np.uint16)))
        tensors[name] = bits.view(torch.bfloat16).reshape(view.shape)
    return tensors


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory under numpy's writable flag, so that torch takes it without a copy; nobody writes to it."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    holder = type("_Memory", (), {"__array_interface__": interface, "owner": array})()
    return np.asarray(holder)


def collate(samples: list[ReadSample], text_len: int, paired: bool) -> TrainingBatch:
    """Samples of one bucket as a batch; reference slots are as many as the fullest sample has."""
    first = samples[0].tensors["target"]
    channels, _, height, width = first.shape
    latents = torch.stack([one.tensors["target"] for one in samples])
    text = latents.new_zeros(len(samples), text_len, samples[0].text.shape[-1])
    for row, one in zip(text, samples, strict=True):
        length = min(len(one.text), text_len)
        row[:length] = one.text[:length]
    picture = torch.Size((channels, height, width))
    references = _reference_set(samples, [one.pairing.set_a for one in samples], picture)
    second: dict[str, Tensor] = {}
    if paired:
        pictures = _reference_set(samples, [one.pairing.set_b for one in samples], picture)
        second = {f"paired_{name}": value for name, value in pictures.items()}
    return TrainingBatch(
        latents=latents,
        text=text,
        sample_ids=torch.tensor([one.row.sample_id for one in samples], dtype=torch.int64),
        sources=tuple(one.row.source for one in samples),
        **references,
        **second,
    )


def _reference_set(samples: list[ReadSample], chosen: list[list[int]], shape: torch.Size) -> dict[str, Tensor]:
    slots = max((len(pictures) for pictures in chosen), default=0)
    count = len(samples)
    references = torch.zeros(count, slots, *shape, dtype=torch.bfloat16)
    subjects = torch.zeros(count, slots, dtype=torch.int64)
    domains = torch.full((count, slots), -1, dtype=torch.int64)
    mask = torch.zeros(count, slots, dtype=torch.bool)
    for number, (one, pictures) in enumerate(zip(samples, chosen, strict=True)):
        for slot, picture in enumerate(pictures):
            references[number, slot] = one.tensors[f"reference.{picture}"]
            subjects[number, slot] = one.row.reference_subjects[picture]
            domains[number, slot] = one.row.domains[one.row.reference_subjects[picture]]
            mask[number, slot] = True
    return {
        "references": references,
        "reference_subjects": subjects,
        "reference_domains": domains,
        "reference_mask": mask,
    }
