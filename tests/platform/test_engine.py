"""The engine's pure parts: which parameters train, the learning rate, DeepSpeed's derived configuration.

What it does under ZeRO-3 is tested by test_training.py. Run: python -m pytest tests/platform/test_engine.py
"""

import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.build import build_model, outline_model
from domainshuttle.platform.config import ConfigError, EngineSection, ModelSection, StageSection, load_config
from domainshuttle.platform.engine import deepspeed_config, learning_rate, select_trained

SIZE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "ffn_dim": 48,
    "text_dim": 16,
    "freq_dim": 32,
}


def model() -> DomainShuttleTransformer3DModel:
    return DomainShuttleTransformer3DModel(**SIZE)


def stage(**changes: object) -> StageSection:
    base = load_config("demo").stage("stage2")
    return base.model_copy(update=changes)


def test_the_recipe_trains_self_attention_and_references_and_nothing_else() -> None:
    network = model()
    selected = select_trained(network, ["blocks.*.attn1.*", "*_ref*"])
    assert selected.trained_count + selected.frozen_count == sum(p.numel() for p in network.parameters())
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == ("attn1" in name or "_ref" in name), name
    assert any("attn2" in name for name in selected.frozen)
    assert any("ffn" in name for name in selected.frozen)


def test_a_pattern_that_names_nothing_is_an_error_with_the_names_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"\['blocks.\*.self_attn'\] name no parameter.*blocks\.\*\.attn1\.to_q\.weight"
    ):
        select_trained(model(), ["*_ref*", "blocks.*.self_attn"])


def test_selecting_again_frees_what_was_frozen() -> None:
    network = model()
    select_trained(network, ["proj_out.*"])
    assert select_trained(network, ["*"]).frozen == {}
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_learning_rate_warms_up_then_follows_the_cosine() -> None:
    one = stage(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10, steps=100)
    assert learning_rate(one, 0) == pytest.approx(0.1 * (0.1 + 0.9 * 1.0))
    assert learning_rate(one, 50) == pytest.approx(0.55)
    assert learning_rate(one, 100) == pytest.approx(0.1)
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25))
    assert learning_rate(one, 25) == pytest.approx(expected)
    constant = stage(learning_rate=2.0, final_learning_rate=None, warmup_steps=0)
    assert {learning_rate(constant, step) for step in range(5)} == {2.0}


def test_deepspeed_is_told_what_the_stage_says() -> None:
    one = stage(micro_batch=4, gradient_clipping=0.7, betas=(0.8, 0.95), weight_decay=0.02)
    config = deepspeed_config(one, EngineSection(persistent_parameters=0), accumulation=3)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.7
    assert config["optimizer"]["params"]["betas"] == [0.8, 0.95]
    assert config["optimizer"]["params"]["weight_decay"] == 0.02
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert config["bf16"] == {"enabled": True}


def test_a_size_that_no_model_has_is_refused_before_a_cluster_is_asked() -> None:
    section = load_config("demo").model
    outline = outline_model(section)
    assert outline is not None
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert {n: p.shape for n, p in outline.named_parameters()} == {
        n: p.shape for n, p in build_model(section, None, 1).named_parameters()
    }
    for size in ({**section.size, "num_leyers": 3}, {**section.size, "reference_rope": "spiral"}):
        with pytest.raises(ConfigError, match=r"model.size can't be built.*(num_leyers|reference_rope)"):
            outline_model(section.model_copy(update={"size": size}))


def test_a_base_is_loaded_in_every_layout(tmp_path: Path) -> None:
    """A Wan in diffusers' layout becomes our model with its weights, and the reference branch copies them."""
    torch.manual_seed(1)
    wan = WanTransformer3DModel(**SIZE)
    wan.save_pretrained(tmp_path / "wan")
    section = ModelSection(base=str(tmp_path / "wan"), reference_gate="video")
    loaded = build_model(section, section.base, seed=0)
    parameters = dict(loaded.named_parameters())
    for name, parameter in wan.named_parameters():
        assert parameters[name].equal(parameter), name
    assert parameters["blocks.1.attn1.to_k_ref.weight"].equal(parameters["blocks.1.attn1.to_k.weight"])
    assert loaded.config.reference_gate == "video"
    loaded.save_pretrained(tmp_path / "next")
    again = build_model(section, str(tmp_path / "next"), seed=0)
    assert all(parameter.equal(parameters[name]) for name, parameter in again.named_parameters())


def test_a_new_model_depends_on_the_seed_and_starts_at_zero_output() -> None:
    section = load_config("demo").model
    first, again, other = (build_model(section, None, seed) for seed in (1, 1, 2))
    one, two, three = (dict(m.named_parameters()) for m in (first, again, other))
    assert all(one[name].equal(two[name]) for name in one)
    assert not one["blocks.0.attn1.to_q.weight"].equal(three["blocks.0.attn1.to_q.weight"])
    assert one["blocks.0.attn1.to_q_ref.weight"].equal(one["blocks.0.attn1.to_q.weight"])
    assert float(one["proj_out.weight"].detach().abs().max()) == 0.0
