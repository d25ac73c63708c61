"""Adapters of linear layers: what they compute, and that PEFT and diffusers compute the same of them.

Run: python -m pytest tests/model/test_lora.py. What compares with PEFT runs in make test-nightly, which installs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.convert import from_wan
from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.lora import LORA_FILE, LoraLinear, LoraWeights, adapt, initial_value
from domainshuttle.model.objective import training_loss
from domainshuttle.model.sampling import make_scheduler
from domainshuttle.model.spec import LORA_B, PRESETS, LoraSpec, ModelSpec, lora_layer
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]
ADAPTERS = ["*.lora_A.weight", "*.lora_B.weight"]
OF_WAN = LoraSpec(3, ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"), 0.5)
ALL_KINDS = LoraSpec(3, ("blocks.*", "film_*", "time_proj", "proj_out"), 2.0)


def given(r: int = 3, seed: int = 0) -> dict[str, Any]:
    batch = TrainingBatch.fake(2, frames=2, height=4, width=6, references=r, text_tokens=5, text_dim=32, seed=seed)
    return {
        "hidden_states": batch.latents,
        "timestep": torch.tensor([10.0, 990.0]),
        "encoder_hidden_states": batch.text,
    } | ({} if not r else {
        "reference_latents": batch.references,
        "reference_subjects": batch.reference_subjects,
        "reference_domains": batch.reference_domains,
    })  # fmt: skip


def adapted(model: DomainShuttleTransformer3DModel, lora: LoraSpec, seed: int = 1, large: bool = True) -> LoraWeights:
    """Gives a model adapters; with `large`, which show in what it computes."""
    adapt(model, lora)
    values = {}
    for name, parameter in list(model.named_parameters()):
        if lora_layer(name):
            value = initial_value(name, tuple(parameter.shape), seed)
            if large and name.endswith(LORA_B):
                value = 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(values)))
            owner, _, short = name.rpartition(".")
            setattr(model.get_submodule(owner), short, torch.nn.Parameter(value))
            values[name] = value
    return LoraWeights.of(values, lora.scale)


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).sample  # type: ignore[no-any-return]


def test_a_new_adapter_changes_nothing_and_a_trained_one_is_a_product(make_model: MakeModel) -> None:
    model, other = make_model(), make_model()
    before = run(model, given())
    adapted(model, ALL_KINDS, large=False)
    assert torch.equal(run(model, given()), before)
    weights = adapted(other, ALL_KINDS)
    assert (run(other, given()) - before).abs().max() > 1e-3
    # merged into the weights, which layers without adapters have
    merged = make_model()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(weights.merged(name, parameter))
    torch.testing.assert_close(run(merged, given()), run(other, given()), atol=2e-5, rtol=1e-4)


def test_several_adapters_are_joined_into_one(make_model: MakeModel) -> None:
    one, two = (adapted(make_model(), replace(ALL_KINDS, rank=rank), seed) for rank, seed in ((3, 1), (2, 9)))
    joined = LoraWeights.joined([one, two])
    assert joined.rank == 5
    for name, parameter in make_model().named_parameters():
        both = one.merged(name, two.merged(name, parameter.detach()))
        torch.testing.assert_close(joined.merged(name, parameter.detach()), both, atol=1e-5, rtol=1e-5)


def test_the_specification_counts_what_the_network_gets(make_model: MakeModel, tiny_config: dict[str, Any]) -> None:
    model = make_model()
    spec = replace(ModelSpec.of(model.config), lora=ALL_KINDS)
    layers = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    assert sorted(layers) == sorted(spec.linear_layers())
    chosen = adapt(model, ALL_KINDS)
    assert all(isinstance(model.get_submodule(name), LoraLinear) for name in chosen)
    assert {name: tuple(one.shape) for name, one in model.named_parameters()} == spec.parameter_shapes()
    assert spec.transformer_config() == replace(spec, lora=None).transformer_config()


def test_a_rank_of_32_on_the_14b_is_the_closed_form() -> None:
    spec = replace(PRESETS["wan2.1-t2v-14b"], lora=LoraSpec(32, ("attn1.to_q", "ffn.net.0.proj")))
    assert spec.parameters(ADAPTERS) == 40 * 32 * ((5120 + 5120) + (5120 + 13824))


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("lora", [OF_WAN, ALL_KINDS, LoraSpec(2, ("attn2.to_k",))], ids=["wan", "all", "text"])
def test_flops_are_those_that_run(lora: LoraSpec, references: int) -> None:
    size = (2, 8, 8)
    spec = replace(PRESETS["tiny"], num_layers=2, lora=lora)
    torch.manual_seed(0)
    model = DomainShuttleTransformer3DModel(**spec.transformer_config())
    adapted(model, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lora_layer(name) is not None)
    batch = TrainingBatch.fake(
        2, frames=2, height=8, width=8, references=references, text_tokens=16, text_dim=64, paired=True
    )
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the fused kernel of the CPU
        with FlopCounterMode(display=False) as forward:
            output = training_loss(model, batch, run_seed=0, step=0, flow=FlowConfig(), cross_pair_weight=0.1)
        with FlopCounterMode(display=False) as backward:
            output.loss.backward()
    expected = spec.step_flops(
        size, batch=2, references=references, paired_references=references, text_tokens=16, trained=ADAPTERS
    )
    assert forward.get_total_flops() == expected.forward + expected.frozen_forward
    assert backward.get_total_flops() == expected.backward


def test_in_bf16_an_adapter_has_float32_gradients(make_model: MakeModel) -> None:
    model = make_model().bfloat16()
    adapted(model, OF_WAN)
    model.compute_in(torch.bfloat16)
    inputs = given()
    sample = model(**inputs).sample
    assert sample.dtype == torch.bfloat16
    sample.square().mean().backward()
    gradients = [one.grad for name, one in model.named_parameters() if lora_layer(name)]
    assert gradients and all(one is not None and one.dtype == torch.float32 for one in gradients)


def test_with_kernels_the_adapters_are_computed_too(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from domainshuttle.model import fused

    model = make_model()
    adapted(model, OF_WAN)
    attn = model.blocks[0].attn1
    x = torch.randn(1, 20, 48)
    for found, expected in zip(fused.project(attn, x, 8), attn.project(x, 8), strict=True):
        assert torch.equal(found, expected)


def test_peft_computes_the_same_bit_for_bit_lora(make_model: MakeModel) -> None:
    peft = pytest.importorskip("peft", reason="make test-nightly installs it, apart")
    ours, theirs = make_model(), make_model()
    weights = adapted(ours, ALL_KINDS)
    layers = sorted(weights.layers)
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=layers))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            layer, _, kind = name.rpartition(".lora_")
            if layer:
                own = ours.get_parameter(f"{layer}.lora_{kind.replace('.default', '')}")
                # PEFT's own beginnings: A uniform within the same bound, B zero
                assert (parameter.abs().max() == 0) == kind.startswith("B")
                if kind.startswith("A"):
                    bound = own.shape[1] ** -0.5
                    assert 0.8 * bound < parameter.abs().max() < bound and own.abs().max() < bound
                parameter.copy_(own)
    for r in (0, 3):
        inputs = given(r)
        assert torch.equal(run(theirs, inputs), run(ours, inputs))
        for model in (ours, theirs):
            model.zero_grad()
            model(**inputs).sample.square().mean().backward()
        for name, parameter in theirs.named_parameters():
            layer, _, kind = name.rpartition(".lora_")
            if layer:
                own = ours.get_parameter(f"{layer}.lora_{kind.replace('.default', '')}")
                assert torch.equal(parameter.grad, own.grad), name


@pytest.mark.parametrize("lora", [OF_WAN, replace(OF_WAN, targets=("blocks.*.attn1.*", "ffn.*"))], ids=["wan", "refs"])
def test_diffusers_pipeline_loads_what_is_saved_lora(
    lora: LoraSpec, tmp_path: Path, tiny_config: dict[str, Any]
) -> None:
    """Wan's pipeline, and our network, from the file; Wan, without references, passes over their adapters."""
    pytest.importorskip("peft", reason="make test-nightly installs it, apart")
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**tiny_config).eval()
    with torch.no_grad():
        for parameter in wan.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
    base = from_wan(wan)
    ours = from_wan(wan)
    weights = adapted(ours, lora)
    assert weights.save(tmp_path).name == LORA_FILE
    pipeline: Any = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=make_scheduler("euler", 5.0), transformer=wan
    )
    inputs = given(0)
    before = run(wan, inputs)
    pipeline.load_lora_weights(tmp_path)
    found = run(wan, inputs)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, run(ours, inputs), atol=1e-5, rtol=1e-5)
    base.load_lora_adapter(tmp_path, weight_name=LORA_FILE)
    torch.testing.assert_close(run(base, given()), run(ours, given()), atol=1e-5, rtol=1e-5)
