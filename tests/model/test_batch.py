"""The batch that the loader and the objective share. Run: pytest tests/model/test_batch.py"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from domainshuttle.model.batch import TrainingBatch


def test_fake_has_the_shapes_of_the_design() -> None:
    batch = TrainingBatch.fake(4, frames=3, height=6, width=10, references=5, text_tokens=7, text_dim=32)
    assert batch.latents.shape == (4, 16, 3, 6, 10)
    assert batch.text.shape == (4, 7, 32)
    assert batch.references.shape == batch.paired_references.shape == (4, 5, 16, 6, 10)
    assert batch.sample_ids.dtype == torch.int64
    assert batch.bucket == (3, 6, 10)
    assert batch.has_pairs
    assert not torch.equal(batch.references, batch.paired_references)
    assert not TrainingBatch.fake(paired=False).has_pairs
    assert TrainingBatch.fake(references=0).references.shape == (2, 0, 16, 8, 8)


def test_fake_is_deterministic() -> None:
    first, second = TrainingBatch.fake(seed=3), TrainingBatch.fake(seed=3)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.sample_ids, second.sample_ids)


def test_to_casts_floats_only() -> None:
    batch = TrainingBatch.fake(mask_tail=True).to("cpu", torch.bfloat16)
    assert batch.latents.dtype == batch.text.dtype == batch.paired_references.dtype == torch.bfloat16
    assert batch.reference_subjects.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.reference_mask.dtype == torch.bool
    assert batch.sources == ("fake", "fake")


def test_a_mask_that_masks_nothing_is_dropped_on_the_way() -> None:
    batch = replace(TrainingBatch.fake(references=2), reference_mask=torch.ones(2, 2, dtype=torch.bool))
    assert batch.reference_mask is not None
    assert batch.to("cpu").reference_mask is None
    masked = replace(batch, reference_mask=torch.tensor([[True, True], [True, False]]))
    assert masked.to("cpu").reference_mask is not None


def test_contradictions_are_listed_together() -> None:
    batch = TrainingBatch.fake()
    with pytest.raises(ValueError, match=r"sources 1.*reference_subjects must be \[2, 2\], not \[2, 3\].*paired_") as e:
        replace(
            batch,
            sources=("one",),
            reference_subjects=torch.zeros(2, 3, dtype=torch.long),
            paired_references=torch.zeros(2, 2, 16, 4, 4),
        )
    assert "paired_references must be [2, r, 16, 8, 8]" in str(e.value)
    with pytest.raises(ValueError, match=r"latents must be \[b, c, f, h, w\], not \[2, 16, 8, 8\]"):
        replace(batch, latents=batch.latents[:, :, 0])
    with pytest.raises(ValueError, match="given without paired_references"):
        replace(batch, paired_references=None)
