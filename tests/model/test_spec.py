"""Sizes against the network itself. Run: pytest tests/model/test_spec.py"""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import training_loss
from domainshuttle.model.spec import PRESETS, ModelSpec
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

TINY = replace(ModelSpec.preset("tiny"), num_layers=2)
STAGE_1 = ("patch_embedding*", "blocks.*.attn1.*", "*_ref*")
STAGE_2 = ("blocks.*.attn1.*", "*_ref*")
SIZE = (2, 8, 8)


def network(spec: ModelSpec, trained: tuple[str, ...]) -> DomainShuttleTransformer3DModel:
    model = DomainShuttleTransformer3DModel(**spec.transformer_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trained))
    return model


def test_needs_no_torch() -> None:
    code = "import sys; from domainshuttle.model.spec import PRESETS; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_config_holds_every_argument_of_the_network() -> None:
    arguments = inspect.signature(DomainShuttleTransformer3DModel.__init__).parameters
    defaults = {name: one.default for name, one in arguments.items() if name != "self"}
    assert ModelSpec().transformer_config() == defaults


@pytest.mark.parametrize(
    "value",
    [
        {"num_layers": 0},
        {"num_layers": "2"},
        {"num_attention_heads": 2.0},
        {"attention_head_dim": 13},
        {"ffn_dim": True},
        {"text_dim": -1},
        {"max_references": -1},
        {"patch_size": (1, 2)},
        {"patch_size": (1, 2, 0)},
        {"reference_gate": "wide"},
        {"reference_projections": "none"},
        {"reference_rope": "spiral"},
        {"timestep_angles": "float16"},
    ],
)
def test_a_size_that_no_network_has_is_refused(value: dict[str, Any]) -> None:
    (name,) = value
    with pytest.raises(ValueError, match=name):
        ModelSpec.of(TINY.transformer_config() | value)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"reference_projections": "shared"},
        {"domain_adaln": False},
        {"cross_attn_norm": False, "num_domains": 3, "patch_size": (1, 1, 1)},
    ],
)
def test_parameters_are_the_networks(switches: dict[str, Any]) -> None:
    spec = replace(TINY, **switches)
    with torch.device("meta"):
        model = DomainShuttleTransformer3DModel(**spec.transformer_config())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert spec.parameter_shapes() == shapes
    assert spec.parameters() == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "base", "total"),
    [("wan2.1-t2v-1.3b", 1_418_996_800, 1_636_574_272), ("wan2.1-t2v-14b", 14_288_491_584, 17_488_849_984)],
)
def test_known_sizes(name: str, base: int, total: int) -> None:
    spec = ModelSpec.preset(name)
    plain = replace(spec, reference_projections="shared", domain_adaln=False)
    assert plain.parameters() == base
    assert spec.parameters() == total
    with torch.device("meta"):
        wan = WanTransformer3DModel(
            num_attention_heads=spec.num_attention_heads, ffn_dim=spec.ffn_dim, num_layers=spec.num_layers
        )
    assert wan.num_parameters() == base
    assert spec.tokens((21, 60, 104)) == 32_760
    assert spec.reference_tokens((21, 60, 104)) == 1_560


def test_trained_parameters() -> None:
    spec = ModelSpec.preset("wan2.2-t2v-a14b")
    assert (spec.num_experts, spec.boundary) == (2, 0.875)
    attention, reference = spec.parameters(["blocks.*.attn1.*"]), spec.parameters(["*_ref*"])
    both = spec.parameters(STAGE_2)
    assert max(attention, reference) < both < attention + reference  # they overlap in to_q_ref, to_k_ref, to_v_ref
    with pytest.raises(ValueError, match=r"'blocks\.\*\.attention\.\*' matches no parameter"):
        spec.parameters(["blocks.*.attention.*"])
    with pytest.raises(ValueError, match=r"unknown model size 'huge'; choose one of wan2\.1-t2v-1\.3b"):
        ModelSpec.preset("huge")
    assert PRESETS["tiny"].parameters() < 1_000_000


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize(
    "trained", [("*",), STAGE_1, STAGE_2, ("blocks.1.ffn.*",), ("blocks.*.attn2.*",), ("proj_out*",)]
)
@pytest.mark.parametrize("switches", [{}, {"reference_projections": "shared"}], ids=["own", "shared"])
def test_flops_are_those_that_run(switches: dict[str, Any], trained: tuple[str, ...], references: int) -> None:
    """Frozen weights cost no weight gradient: the counter sees exactly what the specification says."""
    spec = replace(TINY, **switches)
    model = network(spec, trained)
    batch = TrainingBatch.fake(2, references=references, text_tokens=16, text_dim=64, paired=True)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the fused kernel of the CPU
        with FlopCounterMode(display=False) as forward:
            output = training_loss(model, batch, run_seed=0, step=0, flow=FlowConfig(), cross_pair_weight=0.1)
        with FlopCounterMode(display=False) as backward:
            output.loss.backward()
    expected = spec.step_flops(
        SIZE, batch=2, references=references, paired_references=references, text_tokens=16, trained=trained
    )
    assert forward.get_total_flops() == expected.forward + expected.frozen_forward
    assert backward.get_total_flops() == expected.backward


def test_freezing_saves_weight_gradients() -> None:
    every, stage = (TINY.step_flops(SIZE, references=2, trained=patterns) for patterns in (("*",), STAGE_2))
    assert stage.forward == every.forward
    assert stage.backward < 0.75 * every.backward
    assert every.backward < 2 * every.forward


def test_recomputation_is_counted() -> None:
    model = network(TINY, STAGE_2).train()
    model.enable_gradient_checkpointing()
    batch = TrainingBatch.fake(2, references=2, text_tokens=16, text_dim=64)
    with sdpa_kernel(SDPBackend.MATH):
        output = training_loss(model, batch, run_seed=0, step=0, flow=FlowConfig(), cross_pair_weight=0)
        with FlopCounterMode(display=False) as backward:
            output.loss.backward()
    flops = TINY.step_flops(SIZE, batch=2, references=2, text_tokens=16, trained=STAGE_2, recompute=True)
    assert flops.hardware == flops.model + flops.recompute
    # PyTorch stops a recomputation at the last tensor that is needed, so it may do a little less
    assert 0.9 < backward.get_total_flops() / (flops.backward + flops.recompute) <= 1
