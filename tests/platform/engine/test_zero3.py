"""The engine's pure parts: what it is built from, what trains, its rate and checkpointing, DeepSpeed's configuration.

What it does under ZeRO-3 is tested by test_zero3_ranks.py and test_training.py.
Run: python -m pytest tests/platform/engine/test_zero3.py
"""

import json
import math
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.spec import ModelSpec
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.cli import app
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import (
    ActivationSection,
    AdapterTraining,
    ConfigError,
    EngineSection,
    ModelSection,
    StageSection,
)
from domainshuttle.platform.engine.activation_checkpointing import checkpoint_blocks
from domainshuttle.platform.engine.deepspeed_config import BlockSize, deepspeed_config
from domainshuttle.platform.engine.hub import resolve
from domainshuttle.platform.engine.initialization import Blueprint, blueprint, build_model
from domainshuttle.platform.engine.model_size import model_size
from domainshuttle.platform.engine.trained_parameters import select_trained, trained_of
from domainshuttle.platform.run.segments import learning_rate
from domainshuttle.platform.run.weights_origin import WeightsOrigin

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
    base = load_config("demo").stages[2]
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


def test_adapters_are_what_trains_and_plan_and_engine_say_the_same() -> None:
    lora = {"rank": 4, "targets": ["to_q", "blocks.*.attn1.to_*_ref", "ffn.net.2"]}
    wanted = AdapterTraining.model_validate({"lora": lora, "parameters": ["domain_embedding_ref*"]})
    network = model()
    selected, planned = select_trained(network, wanted), trained_of(ModelSpec(**SIZE), wanted)
    assert selected == planned
    # of 2 blocks: two queries (both attentions), three projections of references, the FFN's second
    per_block = 4 * ((2 + 3) * (24 + 24) + 48 + 24)
    assert selected.trained_count == 2 * per_block + 5 * 24
    assert {name for name, one in network.named_parameters() if one.requires_grad} == set(selected.trained)
    assert all("lora_" in name or name.startswith("domain_embedding_ref") for name in selected.trained)
    values = dict(Blueprint(network, blueprint(ModelSection(size=SIZE), WeightsOrigin(None, 1)).weights, 7).source()())
    assert list(values) == [name for name, _ in network.named_parameters()]
    assert all(not value.any() for name, value in values.items() if name.endswith("lora_B.weight"))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"lora": {"rank": 4, "targets": ["to_q", "self_attn.q"]}},
            r"targets: \['self_attn.q'\].*blocks\.\*\.attn1\.to_q,",
        ),
        ({"lora": {"rank": 4, "targets": ["norm_q"]}}, r"\['norm_q'\] name no linear layer"),
        ({"lora": {"rank": 4, "targets": ["to_q"]}, "parameters": ["nothing"]}, r"\['nothing'\] name no parameter"),
        (
            {"lora": {"rank": 4, "targets": ["attn1.*"]}, "parameters": ["*_ref*"]},
            r"attn1\.to_k_ref\.bias.*get adapters",
        ),
    ],
)
def test_adapters_of_what_is_not_there_are_refused_with_what_is(wanted: dict[str, Any], message: str) -> None:
    for select in (lambda one: select_trained(model(), one), lambda one: trained_of(ModelSpec(**SIZE), one)):
        with pytest.raises(ConfigError, match=message):
            select(AdapterTraining.model_validate(wanted))


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
    one, block = stage(micro_batch=4, gradient_clipping=0.7, betas=(0.8, 0.95), weight_decay=0.02), BlockSize(8, 2)
    config = deepspeed_config(one, EngineSection(persistent_parameters=0), accumulation=3, on_gpu=False, block=block)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.7
    assert config["optimizer"]["params"]["betas"] == [0.8, 0.95]
    assert config["optimizer"]["params"]["weight_decay"] == 0.02
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert config["bf16"] == {"enabled": True}
    assert "offload_optimizer" not in config["zero_optimization"]
    assert config["optimizer"]["params"]["torch_adam"] and not config["optimizer"]["params"]["fused"]
    offloaded = deepspeed_config(one, EngineSection(offload_optimizer=True), accumulation=3, on_gpu=True, block=block)
    assert offloaded["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert offloaded["zero_optimization"]["overlap_comm"]
    # no kernel of DeepSpeed's, which a node without CUDA's compiler could not build
    assert offloaded["optimizer"]["params"]["torch_adam"] and offloaded["optimizer"]["params"]["fused"]


def test_the_plan_prints_deepspeeds_configuration_of_every_stage() -> None:
    run = CliRunner().invoke(app, ["plan", "demo", "--deepspeed", "--set", "engine.persistent_parameters=17"])
    assert run.exit_code == 0, run.output
    printed = json.loads(run.stdout)
    demo = load_config("demo")
    assert list(printed) == [stage.name for stage in demo.stages]
    for one in demo.stages:
        batch = printed[one.name]["train_micro_batch_size_per_gpu"] * demo.cluster.most_workers
        assert batch * printed[one.name]["gradient_accumulation_steps"] == one.global_batch
        assert printed[one.name]["zero_optimization"]["stage3_param_persistence_threshold"] == 17


def test_buckets_are_as_large_as_a_block() -> None:
    """Of the 14B: 430 M parameters a block, 184 M of them trained in stage 2; and `plan` and engine say the same."""
    run = load_config("wan2.1-t2v-14b")
    block = BlockSize.planned(ModelSpec.preset("wan2.1-t2v-14b"), run.stages[1].trained)
    assert round(block.elements / 1e6) == 430 and round(block.trained / 1e6) == 184
    zero = deepspeed_config(run.stages[1], run.engine, 8, on_gpu=True, block=block)["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == block.elements
    assert zero["stage3_max_live_parameters"] == 3 * block.elements
    assert zero["reduce_bucket_size"] == block.trained
    network = build_model(ModelSection(size=SIZE), WeightsOrigin(None, 1))
    select_trained(network, run.stages[1].trained)
    built = BlockSize.of((name, one.numel(), one.requires_grad) for name, one in network.named_parameters())
    assert built == BlockSize.planned(model_size(ModelSection(size=SIZE)), run.stages[1].trained)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"mode": "every"}, "`every` goes with mode: every"),
        ({"mode": "full", "every": 2}, "`every` goes with mode: every"),
        ({"offload": True}, "set mode to full, every or attention"),
        ({"mode": "half"}, "none.*full.*every.*attention"),
        ({"mode": "products"}, "`keep` goes with mode: products"),
        ({"mode": "full", "keep": {"qkv": 3}}, "`keep` goes with mode: products"),
        ({"mode": "products", "keep": {"value": 3}}, "attention.*qkv.*ffn"),
    ],
)
def test_modes_of_activation_checkpointing_are_checked(section: dict[str, Any], told: str) -> None:
    settings = [f"engine.activations.{key}={json.dumps(value)}" for key, value in section.items()]
    with pytest.raises(ConfigError, match=told):
        load_config("demo", settings)


def recomputed_blocks(section: ActivationSection) -> tuple[list[int], dict[str, Tensor]]:
    """How often each block runs in a forward and a backward pass, and the gradients."""
    network = build_model(ModelSection(size=SIZE | {"num_layers": 5}), WeightsOrigin(None, 1))
    nn.init.normal_(network.proj_out.weight, generator=torch.Generator().manual_seed(2))  # else no gradient flows
    network.set_attention_backend("native")
    checkpoint_blocks(network, section)
    runs = [0] * 5
    for number, block in enumerate(network.blocks):

        def count(*_: Any, number: int = number) -> None:
            runs[number] += 1

        block.attn1.register_forward_pre_hook(count)  # a block is called once; what it computes may run again
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 3, 16, generator=generator)
    network(latents, torch.tensor([300.0]), text).sample.square().mean().backward()
    return runs, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("mode", "every", "expected"),
    [
        ("full", None, [2, 2, 2, 2, 2]),
        ("every", 2, [2, 1, 2, 1, 2]),
        ("every", 3, [2, 1, 1, 2, 1]),
        ("attention", None, [2, 2, 2, 2, 2]),
    ],
)
def test_only_the_chosen_blocks_are_recomputed_and_gradients_stay(
    mode: Any, every: int | None, expected: list[int], offload: bool
) -> None:
    runs, gradients = recomputed_blocks(ActivationSection(mode=mode, every=every, offload=offload))
    plain_runs, plain = recomputed_blocks(ActivationSection(mode="none"))
    assert plain_runs == [1] * 5
    assert runs == expected
    assert gradients.keys() == plain.keys()
    assert all(gradients[name].equal(plain[name]) for name in plain)


def test_a_kept_attention_is_not_computed_again() -> None:
    class Attentions(TorchDispatchMode):
        forwards = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            Attentions.forwards += "attention" in name and "backward" not in name
            return func(*args, **kwargs or {})

    counts = {}
    for mode in ("none", "full", "attention"):
        Attentions.forwards = 0
        with Attentions():
            recomputed_blocks(ActivationSection(mode=mode))  # type: ignore[arg-type]
        counts[mode] = Attentions.forwards
    # two attentions in each of five blocks; that to the text, which costs little, is not kept
    assert counts == {"none": 10, "full": 20, "attention": 15}


class Products(TorchDispatchMode):
    """Notes the sizes of the matrix products that run, meta tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.sizes.append((left.shape[0], left.shape[1], right.shape[1]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("trained", "again"), [(["blocks.*.attn1.*", "*_ref*"], 0), (["*"], 2)])
def test_the_second_product_of_the_feed_forward_is_not_run_again(trained: list[str], again: int) -> None:
    """On meta tensors; with what stage 2 trains, and with everything, where its weight's gradient needs no output
    either, but the gate of the video does."""
    width, hidden, tokens = 24, 52, 4 * 4
    batch = TrainingBatch.fake(1, height=4, width=4, text_dim=SIZE["text_dim"], text_tokens=3)
    inputs = [one.to("meta") for one in (batch.latents, torch.zeros(1), batch.text, batch.references)]
    labels = [one.to("meta") for one in (batch.reference_subjects, batch.reference_domains)]
    with torch.device("meta"):
        network = DomainShuttleTransformer3DModel(**SIZE | {"num_layers": 3, "ffn_dim": hidden})
    network.compute_in(torch.float32)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in trained))
    checkpoint_blocks(network, ActivationSection(mode="full"))
    forward, backward = Products(), Products()
    with forward:
        loss = network(*inputs, *labels).sample.square().mean()
    with backward:
        loss.backward()
    second = (tokens, hidden, width)
    assert forward.sizes.count(second) == 2  # the last block has fewer tokens
    assert backward.sizes.count(second) == 2 + again  # the gradient of the first has the same sizes
    assert backward.sizes.count((tokens, width, hidden)) == 2 + 2  # the first again, and the gradient of the second


def test_a_size_that_no_model_has_is_refused_before_a_cluster_is_asked() -> None:
    section = load_config("demo").model
    assert model_size(section).parameter_shapes() == {
        name: tuple(one.shape) for name, one in build_model(section, WeightsOrigin(None, 1)).named_parameters()
    }
    for size in ({**section.size, "num_leyers": 3}, {**section.size, "reference_rope": "spiral"}):
        with pytest.raises(ConfigError, match=r"model.size can't be built.*(num_leyers|reference_rope)"):
            model_size(section.model_copy(update={"size": size}))


def test_a_base_is_loaded_in_every_layout(tmp_path: Path) -> None:
    """A Wan in diffusers' layout becomes our model with its weights, and the reference branch copies them."""
    torch.manual_seed(1)
    wan = WanTransformer3DModel(**SIZE)
    wan.save_pretrained(tmp_path / "wan")
    section = ModelSection(base=str(tmp_path / "wan"), reference_gate="video")
    loaded = build_model(section, resolve(section.base))
    parameters = dict(loaded.named_parameters())
    for name, parameter in wan.named_parameters():
        assert parameters[name].equal(parameter), name
    assert parameters["blocks.1.attn1.to_k_ref.weight"].equal(parameters["blocks.1.attn1.to_k.weight"])
    assert loaded.config.reference_gate == "video"
    loaded.save_pretrained(tmp_path / "next")
    again = build_model(section, resolve(str(tmp_path / "next")))
    assert all(parameter.equal(parameters[name]) for name, parameter in again.named_parameters())


def test_the_blueprint_of_a_base_has_no_memory_and_reads_one_tensor_at_a_time(tmp_path: Path) -> None:
    WanTransformer3DModel(**SIZE).save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="20KB")
    section = ModelSection(base=str(tmp_path / "pipeline"))
    made = blueprint(section, resolve(section.base))
    assert all(parameter.is_meta for parameter in made.outline.parameters())
    stream = made.weights()
    first, _ = next(stream)
    order = [first, *(name for name, _ in stream)]
    assert order == [name for name, _ in made.outline.named_parameters()]
    assert model_size(section).parameter_shapes() == {
        name: tuple(one.shape) for name, one in made.outline.named_parameters()
    }
    # two experts are no base
    shutil.copytree(tmp_path / "pipeline" / "transformer", tmp_path / "pipeline" / "transformer_2")
    with pytest.raises(ConfigError, match=r"two experts: name one of .*transformer and .*transformer_2"):
        blueprint(section, resolve(section.base))


def test_a_base_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("./no/such/folder", "nobody/nothing"):
        with pytest.raises(ConfigError, match=f"base '{name}' is no folder"):
            blueprint(ModelSection(base=name), resolve(name))


@torch.no_grad()
def wans_initialisation(section: ModelSection, seed: int) -> DomainShuttleTransformer3DModel:
    """The reference: construct the whole model, then go over its layers, with the global generator."""
    torch.manual_seed(seed)
    network = DomainShuttleTransformer3DModel(**section.size, **section.choices)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d) and "film_" not in name:
            if any(part in name for part in ("text_embedder", "time_embedder")):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(network.proj_out.weight)
    network.initialise_references()
    return network


@pytest.mark.parametrize("changes", [{}, {"reference_projections": "shared"}, {"domain_adaln": False}])
def test_a_new_model_made_tensor_by_tensor_is_that_made_whole(changes: dict[str, Any]) -> None:
    section = ModelSection(size=SIZE, ablation=changes)
    state = torch.get_rng_state()
    made = dict(build_model(section, WeightsOrigin(None, 11)).named_parameters())
    assert torch.get_rng_state().equal(state)
    whole = dict(wans_initialisation(section, seed=11).named_parameters())
    assert list(made) == list(whole)
    assert all(value.dtype == torch.float32 and value.equal(whole[name]) for name, value in made.items())


def test_a_new_model_depends_on_the_seed_and_starts_at_zero_output() -> None:
    section = load_config("demo").model
    first, again, other = (build_model(section, WeightsOrigin(None, seed)) for seed in (1, 1, 2))
    one, two, three = (dict(m.named_parameters()) for m in (first, again, other))
    assert all(one[name].equal(two[name]) for name in one)
    assert not one["blocks.0.attn1.to_q.weight"].equal(three["blocks.0.attn1.to_q.weight"])
    assert one["blocks.0.attn1.to_q_ref.weight"].equal(one["blocks.0.attn1.to_q.weight"])
    assert float(one["proj_out.weight"].detach().abs().max()) == 0.0
