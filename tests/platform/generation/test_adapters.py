"""The adapters of a run, merged into a pipeline and alone.

Run: python -m pytest tests/platform/generation/test_adapters.py
"""

from pathlib import Path

import pytest
import torch
from running import in_process
from safetensors.torch import load_file
from written_checkpoint import NAME, begun_with, save_checkpoint

from domainshuttle.model.lora import LORA_FILE, LORA_FOLDER, LoraWeights
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.generation import adapters
from domainshuttle.platform.generation.adapters import export_lora
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_origin import WeightsOrigin

FILE = Path("transformer") / "diffusion_pytorch_model.safetensors"


def test_adapters_leave_merged_into_a_pipeline_and_alone(tmp_path: Path, tiny_yaml: Path) -> None:
    """Two stages of adapters, one after the other: alone they are one adapter on the weights below both."""
    lora = "{lora: {rank: 2, alpha: 3, targets: [attn1.to_*]}, parameters: [domain_embedding_ref*]}"
    stages = [f"stages.{name}.trained={lora}" for name in ("stage1", "stage2")]
    made = Run.open(load_config(str(tiny_yaml), [f"output={tmp_path / 'runs'}", *stages]))
    stage1 = made.segment("stage1")
    build_model(made.config.model, WeightsOrigin(None, 3)).save_pretrained(stage1.weights)
    width = made.config.model.size["num_attention_heads"] * made.config.model.size["attention_head_dim"]
    a, b = torch.randn(3, width), torch.randn(width, 3)
    LoraWeights({"blocks.0.attn1.to_q": (a, b)}).save(stage1.weights / LORA_FOLDER)
    stage1.finish(4)
    values, before = save_checkpoint(made)["master"], begun_with(made)
    in_process("export", made.folder, tmp_path / "whole", "--checkpoint", NAME)
    whole = load_file(tmp_path / "whole" / FILE)
    assert whole.keys() == before.keys()
    for name, value in whole.items():
        own = f"{name.removesuffix('.weight')}.lora_A.weight"
        if own in values and name.endswith(".weight"):
            added = 1.5 * values[own.replace("lora_A", "lora_B")] @ values[own]
            torch.testing.assert_close(value, before[name] + added)
        else:
            assert torch.equal(value, values.get(name, before[name])), name
    printed = in_process("export", made.folder, tmp_path / "alone", "--checkpoint", NAME, "--lora")
    told = " ".join(printed.split())
    assert "stage2, a LoRA of rank 5 of" in told and "what was trained beside it (domain_embedding_ref*)" in told
    alone = load_file(tmp_path / "alone" / LORA_FILE)
    key = "transformer.blocks.0.attn1.to_q.lora"
    trained = [values[f"blocks.0.attn1.to_q.lora_{kind}.weight"] for kind in "AB"]
    assert torch.equal(alone[f"{key}_A.weight"], torch.cat([a, trained[0]]))
    torch.testing.assert_close(alone[f"{key}_B.weight"], torch.cat([b, 1.5 * trained[1]], 1))
    assert torch.equal(
        load_file(tmp_path / "whole" / LORA_FOLDER / LORA_FILE)[f"{key}_A.weight"], alone[f"{key}_A.weight"]
    )
    with pytest.raises(ConfigError, match="is not empty"):
        export_lora(made, tmp_path / "alone", checkpoint=NAME)
    export_lora(made, tmp_path / "alone", checkpoint=NAME, overwrite=True)


def test_a_lora_of_the_expert_for_low_noise_alone_is_replaced(
    tmp_path: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a folder of its own within that which was asked for."""
    lora = "{lora: {rank: 3, targets: [attn1.to_q]}}"
    experts = "experts=[{name: high, low: 0.875}, {name: low, high: 0.875}]"
    run = Run.open(load_config(str(tiny_yaml), [f"output={tmp_path}", experts, f"stages.stage2.trained={lora}"]))
    own = LoraWeights({"blocks.0.attn1.to_q": (torch.randn(3, 8), torch.randn(8, 3))})
    monkeypatch.setattr(adapters, "_of_checkpoint", lambda *_: (run.segment("stage2-low"), own))
    for overwrite in (False, True):
        export_lora(run, tmp_path / "alone", checkpoint=NAME, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["transformer_2"]


def test_a_stage_without_adapters_has_none_to_export(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no adapters \(trained.lora\); no stage trains them"):
        export_lora(run, tmp_path / "alone", "stage1")
    save_checkpoint(run)
    with pytest.raises(ConfigError, match="stage stage2 does not train any"):
        export_lora(run, tmp_path / "alone", checkpoint=NAME)
