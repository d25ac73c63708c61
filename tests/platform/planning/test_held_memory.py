"""What `plan` says of weights, gradients, optimiser and buckets, against what a running engine holds.

Run: python -m pytest tests/platform/planning/test_held_memory.py
"""

from typing import Any

import pytest
from engines import ATTENTION, SIZE, engine, held, one_rank, stage, train

from domainshuttle.model.spec import ModelSpec
from domainshuttle.platform.config.schema import EngineSection
from domainshuttle.platform.engine.trained_parameters import with_adapters
from domainshuttle.platform.planning.memory import States

WIDER = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 6, "ffn_dim": 1024}
ADAPTERS = {"lora": {"rank": 16, "targets": ["attn1.*", "ffn.*"]}}


@pytest.mark.parametrize(
    ("trained", "options"),
    [
        (ATTENTION, {}),
        pytest.param(["*"], {"ema": 0.9}, marks=pytest.mark.nightly),
        pytest.param(ADAPTERS, {}, marks=pytest.mark.nightly),
        pytest.param(ATTENTION, {"precision": "float32"}, marks=pytest.mark.nightly),
    ],
    ids=["half", "all, averaged", "adapters", "float32"],
)
def test_an_engine_holds_what_plan_says(trained: Any, options: dict[str, Any]) -> None:
    spec, of_stage = ModelSpec(**SIZE | WIDER), stage(trained=trained)
    states = States.of(with_adapters(spec, of_stage.trained), of_stage, EngineSection(**options), 1)
    with one_rank():
        before = held()
        model = engine(of_stage.trained, size=WIDER, **options)
        train(model, 0, 2)
        found = held() - before
        model.close()
    # a block is gathered, and has gradients, only within a step
    said = {name: size for name, size in states.parts.items() if name not in ("gathered blocks", "a block's gradients")}
    assert found == pytest.approx(sum(said.values()), rel=0.05), (found, said)
