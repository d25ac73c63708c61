"""Block-wise compilation: no graph breaks, one compilation a bucket.

Run: pytest -m nightly tests/model/test_compile.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]
# latent frames, height, width, references
BUCKETS = [(3, 4, 6, 4), (5, 6, 4, 2)]
KINDS = 2  # blocks, and the last block


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_compilation_a_bucket(dynamic: bool, make_model: MakeModel) -> None:
    model, plain, counter = make_model().train(), make_model(), CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, backend=counter)  # a graph break would raise

    def pass_over_buckets() -> int:
        for frames, height, width, references in BUCKETS:
            batch = TrainingBatch.fake(
                1, frames=frames, height=height, width=width, references=references, text_tokens=7, text_dim=32
            )
            inputs = batch.latents, torch.tensor([421.0]), batch.text
            given = batch.references, batch.reference_subjects, batch.reference_domains
            output = model(*inputs, *given).sample
            output.square().mean().backward()
            torch.testing.assert_close(output, plain(*inputs, *given).sample, atol=1e-5, rtol=1e-5)
        return counter.frame_count

    first = pass_over_buckets()
    assert first <= len(BUCKETS) * KINDS
    assert pass_over_buckets() == first  # a bucket seen before costs nothing
