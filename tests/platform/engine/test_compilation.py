"""Compiled blocks: a few graphs for all lengths, the same gradients, and an error where they can't be compiled.

Run: python -m pytest -m "nightly or not nightly" tests/platform/engine/test_compilation.py
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import training_loss
from domainshuttle.platform.config.schema import ActivationSection, ConfigError, ModelSection
from domainshuttle.platform.engine import compilation
from domainshuttle.platform.engine.activation_checkpointing import checkpoint_blocks
from domainshuttle.platform.engine.compilation import compile_blocks
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.run.weights_origin import WeightsOrigin

SIZE = {
    "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 48, "text_dim": 16, "freq_dim": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> Any:
    made = build_model(ModelSection(size=SIZE), WeightsOrigin(None, 1))
    nn.init.normal_(made.proj_out.weight, generator=torch.Generator().manual_seed(2))
    made.compute_in(torch.float32)
    checkpoint_blocks(made, ActivationSection(mode="full"))
    return made


def gradients(model: Any, frames: int, width: int, references: int, mask: bool = False) -> list[Tensor]:
    batch = TrainingBatch.fake(
        2, frames=frames, height=4, width=width, references=references, text_dim=SIZE["text_dim"], mask_tail=mask
    )
    loss = training_loss(model, batch, run_seed=1, step=0, flow=FlowConfig(), cross_pair_weight=0.1)
    model.zero_grad()
    loss.loss.backward()
    return [one.grad for one in model.parameters()]


@pytest.mark.nightly  # tracing takes a minute, and few runs are compiled
def test_blocks_are_compiled_for_all_lengths_and_train_alike() -> None:
    """Over buckets, numbers of references, masks: a few graphs, the same gradients, and no fall back to eager code."""
    plain, compiled, counter = network(), network(), CompileCounter()
    compile_blocks(compiled, counter)
    seen = []
    # lengths that are equal in the first would be taken for equal
    for shape in ((4, 10, 3), (3, 6, 3), (5, 8, 2), (2, 8, 4), (3, 4, 3, True)):
        for found, expected in zip(*(gradients(one, *shape) for one in (compiled, plain)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        seen.append(counter.frame_count)
    # of both kinds of block, with gradients and without them for the second set
    assert seen == [4, 4, 4, 4, 8]


def test_what_can_not_be_compiled_raises() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    broken = network()
    broken.blocks[0].ffn = Breaks()
    compile_blocks(broken, "eager")
    with pytest.raises(ConfigError, match=r"engine\.compile=eager can't compile .*raph.?break.*Leave"):
        gradients(broken, 2, 4, 2)


@pytest.mark.nightly
def test_a_graph_too_many_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "MOST_GRAPHS", 2)
    limited = network()
    compile_blocks(limited, "eager")
    gradients(limited, 2, 4, 2)
    with pytest.raises(ConfigError, match=r"can't compile .*limit"):
        gradients(limited, 2, 4, 2, True)
