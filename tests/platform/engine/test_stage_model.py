"""A stage's model, as training and preflight's trial build it.

What it computes is tested by test_zero3_ranks.py and test_training.py.
Run: python -m pytest tests/platform/engine/test_stage_model.py
"""

from pathlib import Path

import pytest

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.engine import stage_model
from domainshuttle.platform.engine.attention_kernels import UNAVAILABLE, AttentionKernels
from domainshuttle.platform.engine.stage_model import StageModel
from domainshuttle.platform.run.weights_origin import WeightsOrigin


def test_padded_references_need_a_mask_wherever_a_stage_is_built(
    tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preflight's trial refuses what training would; and what was made until then gives its memory back."""
    closed: list[str] = []

    class Unmasked:
        """An engine on a device whose kernels take no masks."""

        attention = AttentionKernels("flash", "flash", UNAVAILABLE)

        def __init__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            closed.append("engine")

    monkeypatch.setattr(stage_model, "Engine", Unmasked)
    monkeypatch.setattr(stage_model, "frozen_copy", lambda *_: "snapshot")
    monkeypatch.setattr(stage_model, "release", lambda model: closed.append(model))
    loss = "{cross_pair_weight: 0.5, cross_pair_target: snapshot}"
    config = load_config(str(tiny_yaml), [f"stages.stage2.loss={loss}"])
    stage = next(one for one in config.stages if one.name == "stage2")

    def build(micro_batch: int) -> StageModel:
        alike = stage.model_copy(update={"micro_batch": micro_batch})
        return StageModel(config, alike, None, WeightsOrigin(None, 1), 1, seed=1, flow=alike.flow)

    assert stage.references > 0
    with pytest.raises(ConfigError, match=r"takes no mask.*stages\.stage2\.micro_batch=1"):
        build(2)
    assert closed == ["engine", "snapshot"]
    model = build(1)
    assert closed == ["engine", "snapshot"]
    model.close()
    assert closed == ["engine", "snapshot"] * 2
