"""The engine under ZeRO-3: two processes over gloo, without Ray, that run every check once, and a third alone.

This file is also their program. Run: python -m pytest tests/platform/engine/test_zero3_ranks.py
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import (
    ATTENTION,
    SIZE,
    batch_loss,
    design,
    engine,
    environment,
    everything,
    held,
    loss_of,
    rows,
    same,
    stage,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from domainshuttle.model.batch import TrainingBatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHECKS: list[Callable[[Path], None]] = []
RARE: list[Callable[[Path], None]] = []
PATIENCE = 800.0
M_MMAP_THRESHOLD = -3  # of malloc.h


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS.append(function)
    return function


def rare(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """A check that takes too long for each day."""
    RARE.append(function)
    return function


def peak_memory() -> int:
    """Most bytes that this process had in use since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def in_use() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@check
def masters_are_the_float32_source(folder: Path) -> None:
    import deepspeed

    from domainshuttle.platform.config.schema import EngineSection
    from domainshuttle.platform.engine.zero3 import Engine

    source = dict(design(["*"]).build().named_parameters())
    base = folder / "base"
    if dist.get_rank() == 0:
        from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

        whole = DomainShuttleTransformer3DModel(**SIZE)
        whole.load_state_dict({name: value.detach() for name, value in source.items()})
        whole.save_pretrained(base, max_shard_size="40KB")
        assert len(list(base.glob("*.safetensors"))) > 3
    dist.barrier()
    for persistent in (0, 10_000):
        made = design(ATTENTION, origin=base)
        model = Engine(made, stage(), EngineSection(persistent_parameters=persistent), 1)
        for name, value in model.full_parameters():
            assert value.equal(source[name].detach()), name
        for name, parameter in model._engine.module.named_parameters():
            # what is trained and what generation keeps in float32 is float32, all else bf16
            exact = trained(name) or made.outline.keeps_float32(name)
            assert parameter.dtype == parameter.ds_tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
            with deepspeed.zero.GatheredParameters([parameter]):
                assert parameter.detach().equal(source[name].detach().to(parameter.dtype)), name
        train(model, 0, 1)
        moved = {name for name, value in model.full_parameters() if not value.equal(source[name].detach())}
        assert any("attn1.to_q.weight" in name for name in moved)
        # frozen parameters have neither gradients nor optimiser states
        held = sum(flat.numel() for flat in model._optimizer.fp32_partitioned_groups_flat)
        count = sum(p.numel() for n, p in source.items() if "attn1" in n or "_ref" in n)
        assert count / 2 <= held < count / 2 + len(source)
        assert len(model._optimizer.optimizer.state) == len(model._optimizer.fp32_partitioned_groups_flat)
        for name, parameter in model._engine.module.named_parameters():
            assert parameter.requires_grad == ("attn1" in name or "_ref" in name)
            assert parameter.grad is None


@check
def nothing_is_left_in_shared_memory(folder: Path) -> None:
    """With the variables of DeepSpeed's launcher too (`main`), by which ranks know that they share a node: what a rank
    made there would stay, since workers are killed as often as not."""
    engine(ATTENTION)
    assert os.environ["LOCAL_SIZE"] == str(dist.get_world_size())
    assert not [path for path in Path("/dev/shm").iterdir() if os.environ["MASTER_PORT"] in path.name]


@check
def no_worker_holds_the_model_whole(folder: Path) -> None:
    from domainshuttle.platform.config.schema import ModelSection
    from domainshuttle.platform.engine.initialization import blueprint
    from domainshuttle.platform.engine.zero3 import _materialise
    from domainshuttle.platform.run.weights_origin import WeightsOrigin

    size = SIZE | {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 10, "ffn_dim": 1400}
    made, warm = (blueprint(ModelSection(size=size), WeightsOrigin(None, 3)) for _ in range(2))
    for each in (made, warm):
        each.outline.requires_grad_(False)
    count = sum(parameter.numel() for parameter in made.outline.parameters())
    assert count > 30e6
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
    _materialise(warm, config)  # the buffers of the collectives, which stay
    allocator = ctypes.CDLL(None)  # frees at once what it frees, so that what is measured is what is used
    allocator.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    peak_memory()
    before = in_use()
    _materialise(made, config)
    rise = peak_memory() - before
    allocator.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    held = sum(parameter.ds_tensor.numel() for parameter in made.outline.parameters())
    assert count / 2 <= held < count / 2 + len(list(made.outline.parameters()))
    assert all(parameter.numel() == 0 for parameter in made.outline.parameters())
    # half of the bf16 weights; whole, they would be 2 bytes a parameter, and 4 in float32
    assert rise < 1.5 * count, f"{rise / count:.2f} bytes a parameter"


@check
def a_step_is_that_of_plain_adamw(folder: Path) -> None:
    """Mean over ranks and micro-batches, clipping, AdamW on float32 masters, against torch without DeepSpeed.

    Also where nothing before the blocks is trained, so that no gradient goes into the first of them.
    """
    for patterns in (["*"], ["blocks.*.attn1.*"]):
        compare_step(patterns, "bf16", 0.02)
        compare_step(patterns, "float32", 1e-3)


def compare_step(patterns: list[str], precision: str, tolerance: float) -> None:
    model = engine(patterns, accumulation=2, precision=precision)
    plain = design(patterns).build()
    masters = {name: value.detach().clone() for name, value in plain.named_parameters()}
    plain.to(model.dtype)
    for share in range(4):  # of rank 0, then of rank 1
        (loss_of(plain, 0, share) / 4).backward()
    gradients = {name: value.grad.float() for name, value in plain.named_parameters() if value.requires_grad}
    norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
    clipping = norm.item() / 3
    model._engine._config.gradient_clipping = clipping
    model._optimizer.clip_grad = clipping
    for micro in range(2):
        model.backward(loss_of(model, 0, 2 * dist.get_rank() + micro))
    result = model.step(0)
    assert not result.dropped
    assert abs(result.grad_norm / norm.item() - 1) < tolerance
    for name, value in model.full_parameters():
        if name not in gradients:
            continue
        moment = model._partition.gather(name, "exp_avg")
        expected = 0.1 * gradients[name] / 3
        error = (moment - expected).norm() / (0.1 * norm / 3)
        assert error < tolerance, (name, error)
        second = model._partition.gather(name, "exp_avg_sq")
        update = 1e-2 * (moment / 0.1) / ((second / 0.001).sqrt() + 1e-8) + 1e-2 * 0.01 * masters[name]
        torch.testing.assert_close(value, masters[name] - update, rtol=1e-4, atol=1e-6)


@check
def a_step_does_not_depend_on_how_its_batch_is_cut(folder: Path) -> None:
    """Into micro-batches and over ranks, but for float32's rounding: every group of parameters, in bf16 and float32."""
    from domainshuttle.platform.engine.trained_parameters import group_name

    both = TrainingBatch.fake(8, height=4, width=4)
    own = rows(both, 4 * dist.get_rank(), 4 * dist.get_rank() + 4)

    def gradients(batch: TrainingBatch, micro: int, **section: Any) -> dict[str, Tensor]:
        model = engine(["*"], accumulation=batch.batch_size // micro, **section)
        model._engine._config.gradient_clipping = model._optimizer.clip_grad = 0.0
        for first in range(0, batch.batch_size, micro):
            model.backward(batch_loss(model, rows(batch, first, first + micro)))
        model.step(0)
        return {name: 10 * model._partition.gather(name, "exp_avg").double() for name in model._partition.parts}

    def difference(one: dict[str, Tensor], two: dict[str, Tensor], names: Iterable[str]) -> float:
        left, right = (torch.cat([each[name].flatten() for name in names]) for each in (one, two))
        return float((left - right).norm() / right.norm())

    groups: dict[str, list[str]] = {}
    cuts = {"bf16": ((both, 1, False), (own, 4, False), (own, 2, True)), "float32": ((both, 2, True), (own, 1, False))}
    # in bf16 a product of another shape may add up in another order and so round a number otherwise
    for precision, whole_tolerance, tolerance in (("bf16", 5e-4, 5e-3), ("float32", 1e-6, 3e-6)):
        expected = gradients(both, 8, precision=precision)  # on each rank the samples of both
        groups = groups or {g: [n for n in expected if group_name(n) == g] for g in map(group_name, expected)}
        for batch, micro, offload in cuts[precision]:
            found = gradients(batch, micro, precision=precision, offload_optimizer=offload)
            assert difference(found, expected, found) < whole_tolerance, (precision, micro)
            for group, names in groups.items():
                assert difference(found, expected, names) < tolerance, (precision, micro, group)


@check
def what_is_frozen_leaves_as_it_came(folder: Path) -> None:
    """Over two stages that train other parts, from a base in bf16 and from none, with average and without."""
    from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
    from domainshuttle.platform.config.schema import EngineSection
    from domainshuttle.platform.engine.zero3 import Engine

    base = folder / "frozen" / "base"
    if dist.get_rank() == 0:
        half = design(["*"], seed=8).build()
        for name, parameter in half.named_parameters():
            parameter.data = parameter.data if half.keeps_float32(name) else parameter.data.bfloat16()
        half.save_pretrained(base)
    dist.barrier()
    for number, (origin, persistent) in enumerate(((base, 0), (None, 10_000))):
        before = {n: v.detach().float() for n, v in design(["*"], seed=9, origin=origin).build().named_parameters()}
        for stage_number, patterns in enumerate((["blocks.0.*", "*scale_shift_table"], ATTENTION)):
            made = design(patterns, seed=9, origin=origin)
            model = Engine(made, stage(), EngineSection(persistent_parameters=persistent, ema=0.9), 1)
            train(model, 0, 2)
            after = {}
            for average in (False, True):
                out = folder / "frozen" / f"{number}-{stage_number}-{average}"
                model.export(out, ema=average)
                after = load_file(out / "diffusion_pytorch_model.safetensors")
                exported = DomainShuttleTransformer3DModel.from_pretrained(out)
                for name, value in exported.named_parameters():
                    assert value.detach().equal(after[name]) and after[name].dtype == torch.float32
                    frozen = name not in model._partition.parts
                    assert after[name].equal(before[name]) == frozen, name
            origin, before = folder / "frozen" / f"{number}-{stage_number}-True", after
            dist.barrier()


@check
def an_export_from_a_model_that_has_changed_is_refused(folder: Path) -> None:
    from domainshuttle.platform.config.schema import EngineSection
    from domainshuttle.platform.engine.zero3 import Engine

    base = folder / "changing"
    weights = base / "diffusion_pytorch_model.safetensors"
    if dist.get_rank() == 0:
        design(["*"]).build().save_pretrained(base)
    dist.barrier()
    model = Engine(design(ATTENTION, origin=base), stage(), EngineSection(persistent_parameters=0), 1)
    content = weights.read_bytes()
    good = load_file(weights)
    changed = good | {"blocks.1.ffn.net.2.weight": good["blocks.1.ffn.net.2.weight"] + 1}
    for damage in ("other", "cut", "gone"):
        dist.barrier()
        if dist.get_rank() == 0:
            if damage == "other":
                save_file(changed, weights)
            else:
                weights.write_bytes(content[: len(content) // 2]) if damage == "cut" else weights.unlink()
        dist.barrier()
        words = {
            "other": r"blocks\.1\.ffn\.net\.2\.weight is frozen.*Restore it",
            "cut": "cut off",
            "gone": "safetensors",
        }
        with pytest.raises(OSError, match=words[damage]):
            model.export(folder / "refused")
        dist.barrier()
    if dist.get_rank() == 0:
        weights.write_bytes(content)
    dist.barrier()
    model.export(folder / "accepted")  # and all ranks are still in step
    for name, value in load_file(folder / "accepted" / weights.name).items():
        assert value.equal(good[name]), name


@check
def training_computes_what_generation_computes(folder: Path) -> None:
    """In bf16 bit for bit, whatever is trained: the time embedding, the tables and the norms are float32 in both."""
    from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

    batch = TrainingBatch.fake(2, height=4, width=4, seed=5).to("cpu", torch.bfloat16)
    given = batch.latents, torch.tensor([999.0, 3.3]), batch.text, batch.references
    labels = batch.reference_subjects, batch.reference_domains
    for number, patterns in enumerate((["*"], ATTENTION, ["blocks.*.norm2.*", "*time_embedder*", "*table*"])):
        model = engine(patterns)
        train(model, 0, 2)
        seen: list[torch.dtype] = []

        def note(_: Any, inputs: tuple[Tensor, ...], seen: list[torch.dtype] = seen) -> None:
            seen.append(inputs[0].dtype)

        for name in ("condition_embedder.time_embedder.linear_1", "blocks.0.norm2"):
            module = model._engine.module.get_submodule(name)
            module.register_forward_pre_hook(note)
        with torch.no_grad():
            found = model(*given, *labels, return_dict=False)[0]
        assert seen == [torch.float32, torch.float32]
        out = folder / f"generation-{number}"
        model.export(out)
        generation = DomainShuttleTransformer3DModel.from_pretrained(out, torch_dtype=torch.bfloat16)
        with torch.no_grad():
            expected = generation(*given, *labels, return_dict=False)[0]
        assert found.dtype == expected.dtype == torch.bfloat16
        assert found.equal(expected), (patterns, (found - expected).abs().max())


@check
def a_checkpoint_of_before_is_loaded(folder: Path) -> None:
    """Of the engine that held its parameters in bf16, after two steps: the precision is no part of a checkpoint."""
    old = Path(__file__).with_name("data") / "before-float32"
    shards = [load_file(path) for path in sorted((old / "zero").iterdir())]
    patterns = ["blocks.1.attn1.norm_*", "scale_shift_table", "domain_embedding_ref*"]
    for section in ({"precision": "bf16"}, {"precision": "float32"}, {"offload_optimizer": True}):
        model = engine(patterns, ema=0.9, seed=7, **section)
        model.load(old)
        assert model._partition.steps == 2
        for kind in ("master", "ema", "exp_avg", "exp_avg_sq"):
            for name in model._partition.parts:
                stored = torch.cat([shard[f"{kind}/{name}"] for shard in shards if f"{kind}/{name}" in shard])
                assert model._partition.gather(name, kind).flatten().equal(stored), (kind, name)
        train(model, 2, 3)
        model.snapshot()(folder / f"new-{'-'.join(section)}")
        again = load_file(
            folder / f"new-{'-'.join(section)}" / "zero" / f"rank-{dist.get_rank():05d}-of-00002.safetensors"
        )
        mine = shards[dist.get_rank()]
        assert {n: (v.dtype, v.shape) for n, v in again.items()} == {n: (v.dtype, v.shape) for n, v in mine.items()}


@check
def checkpointing_changes_no_bit(folder: Path) -> None:
    def run(**section: Any) -> dict[str, Tensor]:
        model = engine(ATTENTION, **section)
        train(model, 0, 2)
        return everything(model)

    none = run()
    for activations in (
        {"mode": "full"},
        {"mode": "every", "every": 2, "offload": True},
        {"mode": "attention", "offload": True},
        {"mode": "products", "keep": {"attention": 2, "qkv": 1, "ffn": 3}},
    ):
        same(run(activations=activations), none)
    # another backend is taken: the kernel of bf16, which rounds otherwise
    other = run(attention_backend="native")
    assert not torch.equal(other["master/blocks.0.attn1.to_q.weight"], none["master/blocks.0.attn1.to_q.weight"])


@check
def shards_resume_bit_for_bit_and_at_another_size(folder: Path) -> None:
    """Here 2 -> 2 and 1 -> 2; the process of its own does 1 -> 1 and 2 -> 1."""
    section = {"ema": 0.9, "persistent_parameters": 600}  # the attention's weights stay gathered, others do not
    model = engine(ATTENTION, **section)
    model.snapshot()(folder / "empty")
    first = everything(model)
    train(model, 0, 3)
    saved = everything(model)
    model.snapshot()(folder / "two")
    after = train(model, 3, 5)
    final = everything(model)
    fresh = engine(ATTENTION, seed=4, **section)
    dist.barrier()
    frozen = {n: v for n, v in everything(fresh).items() if n.startswith("weight/") and not trained(n)}
    fresh.load(folder / "two")
    same(everything(fresh), saved | frozen)
    fresh = engine(ATTENTION, **section)
    fresh.load(folder / "two")
    assert train(fresh, 3, 5) == after
    same(everything(fresh), final)
    # at the same size a rank's own shard is enough: a node need not fetch those of others
    own = folder / f"own-{dist.get_rank()}" / "zero"
    own.mkdir(parents=True)
    shard = f"rank-{dist.get_rank():05d}-of-00002.safetensors"
    (own / shard).write_bytes((folder / "two" / "zero" / shard).read_bytes())
    fresh.load(own.parent, own=True)
    same(everything(fresh), saved)
    fresh.load(folder / "empty")  # as a rollback does: the optimiser's states go too
    same(everything(fresh), first)
    train(fresh, 0, 3)
    same(everything(fresh), saved)
    if dist.get_rank() == 0:
        save_file(saved, folder / "two-whole.safetensors")
        (folder / "two-ready").touch()
    wait_for(folder / "one-ready")
    model = engine(ATTENTION, ema=0.9, seed=5)
    model.load(folder / "one")
    expected = load_file(folder / "one-whole.safetensors")
    found = everything(model)
    same(*({n: v for n, v in each.items() if trained(n)} for each in (found, expected)))
    assert model._partition.steps == 3
    train(model, 3, 4)


def trained(name: str) -> bool:
    return "attn1" in name or "_ref" in name


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline and not (path.parent / "failed").exists(), f"{path} did not come"
        time.sleep(0.05)


@check
def wrong_shards_are_refused_by_name(folder: Path) -> None:
    model = engine(ATTENTION)
    train(model, 0, 1)
    before = everything(model)

    def refused(place: Path, *words: str) -> None:
        with pytest.raises(RuntimeError) as caught:
            model.load(place)
        assert all(word in str(caught.value) for word in words), caught.value

    refused(folder / "nothing", "holds no shards")
    other = engine(["blocks.*.attn2.*"])
    other.snapshot()(folder / "other")
    good = folder / "good"
    model.snapshot()(good)
    dist.barrier()
    refused(folder / "other", "other parameters", "attn2", "`trained`")
    names = [f"rank-{rank:05d}-of-00002.safetensors" for rank in range(2)]
    for kind in ("missing", "truncated"):
        copy = folder / f"{kind}{dist.get_rank()}" / "zero"
        copy.mkdir(parents=True)
        (copy / names[0]).write_bytes((good / "zero" / names[0]).read_bytes())
        if kind == "truncated":
            (copy / names[1]).write_bytes((good / "zero" / names[1]).read_bytes()[:-100])
        refused(copy.parent, "1 shard," if kind == "missing" else names[1])
    same(everything(model), before)


@check
def a_snapshot_is_the_checkpoint_of_its_step(folder: Path) -> None:
    model = engine(ATTENTION, ema=0.9)
    train(model, 0, 2)
    name = f"zero/rank-{dist.get_rank():05d}-of-00002.safetensors"
    model.snapshot()(folder / "now")
    write = model.snapshot()
    train(model, 2, 4)
    second = model.snapshot()  # before the first is written
    train(model, 4, 5)
    write(folder / "later")
    assert (folder / "later" / name).read_bytes() == (folder / "now" / name).read_bytes()
    third = model.snapshot()
    second(folder / "second")
    third(folder / "third")
    tensors = load_file(folder / "third" / name)
    assert {key.split("/")[0] for key in tensors} == {"master", "ema", "exp_avg", "exp_avg_sq"}
    assert all(trained(key) for key in tensors)
    assert not load_file(folder / "second" / name)["master/blocks.0.attn1.to_q.weight"].equal(
        tensors["master/blocks.0.attn1.to_q.weight"]
    )
    # memory is used again: two snapshots were open at a time
    assert len(model._partition._spare) == 2
    model.snapshot()(folder / "third-now")
    assert (folder / "third-now" / name).read_bytes() == (folder / "third" / name).read_bytes()


@check
def the_average_is_that_of_the_masters(folder: Path) -> None:
    from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

    decay = 0.8
    model = engine(ATTENTION, ema=decay)
    average = {name: value.double() for name, value in model.full_parameters()}
    for step in range(4):
        train(model, step, step + 1)
        for name, value in model.full_parameters():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    masters = dict(model.full_parameters())
    for name, value in model.full_parameters(ema=True):
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
        if trained(name) and "norm" not in name:
            assert not value.equal(masters[name]), name
    model.export(folder / "average", ema=True)
    exported = DomainShuttleTransformer3DModel.from_pretrained(folder / "average")
    for name, value in model.full_parameters(ema=True):
        assert exported.get_parameter(name).detach().equal(value), name
    with pytest.raises(RuntimeError, match=r"engine\.ema"):
        next(engine(ATTENTION).full_parameters(ema=True))
    (folder / "file").touch()
    dist.barrier()
    with pytest.raises(OSError, match="could not be written"):
        model.export(folder / "file")


@check
def adapters_train_are_saved_alone_and_resume_bit_for_bit(folder: Path) -> None:
    """Under ZeRO-3, beside parameters that are trained themselves, with an average; merged and alone where exported."""
    from domainshuttle.model.lora import LORA_FOLDER, LoraWeights
    from domainshuttle.platform.config.schema import AdapterTraining

    wanted = AdapterTraining.model_validate(
        {"lora": {"rank": 2, "alpha": 3, "targets": ["attn1.to_*", "ffn.*"]}, "parameters": ["*scale_shift_table_ref"]}
    )
    before = {name: value.detach().clone() for name, value in design(["*"]).build().named_parameters()}
    model = engine(wanted, ema=0.9)
    own = set(model._partition.parts)
    assert all("lora_" in name or name.endswith("scale_shift_table_ref") for name in own)
    assert {f"blocks.1.attn1.to_q_ref.lora_{kind}.weight" for kind in "AB"} <= own
    train(model, 0, 3)
    model.snapshot()(folder / "lora")
    shard = load_file(folder / "lora" / "zero" / f"rank-{dist.get_rank():05d}-of-00002.safetensors")
    assert {name.partition("/")[2] for name in shard} <= own
    after = train(model, 3, 5)
    final = everything(model)
    fresh = engine(wanted, ema=0.9)
    dist.barrier()
    fresh.load(folder / "lora")
    assert train(fresh, 3, 5) == after
    same(everything(fresh), final)
    for averaged in (False, True):
        out = folder / f"lora-whole-{averaged}"
        model.export(out, ema=averaged)
        whole = load_file(out / "diffusion_pytorch_model.safetensors")
        held = dict(model.full_parameters(ema=averaged))
        adapters = LoraWeights.load(out / LORA_FOLDER)
        assert whole.keys() == before.keys() and {f"{one}.lora_B.weight" for one in adapters.layers} <= own
        for name, value in whole.items():
            layer = name.removesuffix(".weight")
            if name in own:
                assert value.equal(held[name]) and not value.equal(before[name]), name
            elif f"{layer}.lora_A.weight" in own:
                # alpha / rank, in float64
                added = 1.5 * held[f"{layer}.lora_B.weight"].double() @ held[f"{layer}.lora_A.weight"].double()
                torch.testing.assert_close(value.double(), before[name].double() + added, rtol=1e-6, atol=1e-7)
                # the last block's references are dropped behind its attention: their queries have no gradient
                assert (added.abs().max() > 0) == (layer != "blocks.2.attn1.to_q_ref"), name
            else:
                assert value.equal(before[name]), name
    with pytest.raises(RuntimeError, match="other parameters than are trained"):
        engine(ATTENTION).load(folder / "lora")


@check
def a_step_that_is_not_finite_changes_nothing(folder: Path) -> None:
    def steps(model: Any, *pairs: tuple[int, int]) -> None:
        for pair in pairs:
            for micro in pair:
                model.backward(loss_of(model, micro))
            assert not model.step(2).dropped

    for offload, precision in ((False, "bf16"), (True, "bf16"), (False, "float32")):
        model = engine(ATTENTION, accumulation=2, ema=0.9, offload_optimizer=offload, precision=precision)
        steps(model, (0, 1), (2, 3))
        before, count = everything(model), model._partition.steps
        for bad in (float("nan"), float("inf"), None):
            scale = bad if bad and dist.get_rank() == 1 else 1.0
            model.backward(loss_of(model, 10) * scale)
            model.backward(loss_of(model, 11))
            assert (model.step(2) if bad else model.drop(2)).dropped
        same(everything(model), before)
        assert model._partition.steps == count == 2
        steps(model, (12, 13))
        if not offload:  # no gradient of a dropped step is left: a run without them takes the same step
            other = engine(ATTENTION, accumulation=2, ema=0.9, precision=precision)
            steps(other, (0, 1), (2, 3), (12, 13))
            same(everything(other), everything(model))


@check
def a_drop_that_changed_something_is_an_error(folder: Path) -> None:
    """As with another DeepSpeed, whose check of the norm were another."""
    model = engine(ATTENTION)
    train(model, 0, 1)
    model.backward(loss_of(model, 1))
    norms = model._optimizer._get_norm_groups
    model._optimizer._get_norm_groups = lambda: [torch.tensor(1.0)]
    with pytest.raises(RuntimeError, match=r"step 1 was to be dropped.*last checkpoint is not"):
        model.drop(1)
    model._optimizer._get_norm_groups = norms


@check
def the_snapshot_target_stays(folder: Path) -> None:
    from domainshuttle.platform.config.schema import EngineSection
    from domainshuttle.platform.engine.zero3 import frozen_copy

    model = engine(["*"])
    target = frozen_copy(design(["*"]), EngineSection(persistent_parameters=0))
    assert not any(parameter.requires_grad for parameter in target.parameters())
    # with one origin the snapshot's prediction is the model's own at first
    own, other = loss_of(model, 0), loss_of(model, 0, snapshot=target)
    assert own.item() == other.item()
    shards = [parameter.ds_tensor.clone() for parameter in target.parameters()]
    for step in range(3):
        loss = loss_of(model, step, snapshot=target)
        model.backward(loss)
        assert not model.step(step).dropped
    assert all(p.ds_tensor.equal(shard) for p, shard in zip(target.parameters(), shards, strict=True))
    assert loss_of(model, 0).item() != loss_of(model, 0, snapshot=target).item()
    # the reference: plain torch, no partitions
    plain = design(["*"]).build().bfloat16()
    moved = design(["*"]).build()
    with torch.no_grad():
        for name, value in model.full_parameters():
            moved.get_parameter(name).copy_(value)
    expected = loss_of(moved.bfloat16(), 5, snapshot=plain, weight=10.0).item()
    assert abs(loss_of(model, 5, snapshot=target, weight=10.0).item() / expected - 1) < 0.01


@check
def linear_layers_hold_no_gathered_weight_and_keep_what_they_need(folder: Path) -> None:
    """DeepSpeed's own linear is not at work: gradients are torch's bit for bit, weights that were gathered are gone
    after the forward pass, what is kept is what the specification says, and the FFN's second product runs once."""
    from deepspeed.runtime.zero import partition_parameters
    from torch.multiprocessing.reductions import StorageWeakRef

    from domainshuttle.model import mixed_precision
    from domainshuttle.model.spec import ModelSpec

    original, ours = partition_parameters._dist_allgather_fn, mixed_precision.linear

    def torchs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias) if x.dtype == weight.dtype else ours(x, weight, bias)

    for section in ({"precision": "float32"}, {"activations": {"mode": "full"}}):
        found = []
        for linear in (ours, torchs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mixed_precision, "linear", linear)
                model = engine(ATTENTION, **section)
                found.append({"losses": torch.tensor(train(model, 0, 2)), **everything(model)})
                model.close()
        same(*found)

    size = {"attention_head_dim": 128, "ffn_dim": 512}
    batch = TrainingBatch.fake(1, frames=4, height=16, width=16, references=2)
    tokens, width = 6 * 64, 256
    kept, wholes, products = [], [], Products()
    with pytest.MonkeyPatch.context() as patch:

        def note(shard: Tensor, whole: Tensor, *rest: Any) -> Any:
            wholes.append(StorageWeakRef(whole.untyped_storage()))
            return original(shard, whole, *rest)

        patch.setattr(partition_parameters, "_dist_allgather_fn", note)
        for layers in (3, 5):
            model = released_at_once(size=size | {"num_layers": layers}, attention_backend="native")
            wholes.clear()
            held: dict[int, Any] = {}

            def pack(tensor: Tensor, held: dict[int, Any] = held) -> Tensor:
                storage = tensor.untyped_storage()
                if not isinstance(tensor, torch.nn.Parameter):
                    held[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = batch_loss(model, batch, weight=0.0)
            assert len(wholes) > layers  # each block at once, and what lies around them
            assert all(whole.expired() for whole in wholes)
            kept.append(sum(held.values()))
            del loss
            model.close()
        spec = ModelSpec(**SIZE | size)
        expected = spec.block_kept_bytes(tokens, tuple(ATTENTION), reference_share=2 / 6)
        expected -= 4 * tokens * 2 // 6 * width  # what is gated of references is kept beside autograd's tensors
        assert abs((kept[1] - kept[0]) / 2 / expected - 1) < 0.03, (kept, expected)

        model = released_at_once(size=size | {"num_layers": 3}, activations={"mode": "full"})
        loss = batch_loss(model, batch, weight=0.0)
        with products:
            model.backward(loss)
        # the gradient of the first product has the same sizes, and the last block has no references
        assert products.sizes.count((tokens, 512, width)) == 2
        assert products.sizes.count((tokens, width, 512)) == 2 + 2
        model.step(0)
        model.close()
    assert torch.nn.functional.linear is torch._C._nn.linear


@rare
def compiled_blocks_train_alike(folder: Path) -> None:
    """With all of torch.compile but the last stage, the code generator, which takes minutes here."""
    from torch._dynamo.utils import counters

    activations = {"mode": "every", "every": 2}
    plain, compiled = (engine(ATTENTION, activations=activations, compile=name) for name in (None, "aot_eager"))
    torch.testing.assert_close(train(compiled, 0, 2, weight=0), train(plain, 0, 2, weight=0), rtol=1e-4, atol=0)
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]
    expected = dict(plain.full_parameters())
    for name, value in compiled.full_parameters():
        assert (value - expected[name]).abs().max() < 1e-3, name


@check
def ranks_that_share_tokens_train_as_one(folder: Path) -> None:
    """Loss, norm and gradients are those of plain torch on the same samples; a resumed run ends with the same bits."""
    model = engine(ATTENTION, precision="float32", sequence_parallel=2, ema=0.9, activations={"mode": "full"})
    plain = design(ATTENTION).build()
    loss = loss_of(plain, 0, share=0)
    loss.backward()
    gradients = {name: one.grad for name, one in plain.named_parameters() if one.requires_grad}
    norm = torch.stack([one.norm() for one in gradients.values()]).norm().item()
    model._engine._config.gradient_clipping = model._optimizer.clip_grad = 0.0
    own = loss_of(model, 0, share=0)
    assert abs(own.item() / loss.item() - 1) < 1e-6
    model.backward(own)
    assert abs(model.step(0).grad_norm / norm - 1) < 1e-5
    for name, expected in gradients.items():
        found = 10 * model._partition.gather(name, "exp_avg")
        assert (found - expected).norm() < 1e-5 * norm, name
    model.snapshot()(folder / "shared-tokens")

    def further(one: Any) -> dict[str, Tensor]:
        for step in (1, 2):
            one.backward(loss_of(one, step, share=0))
            one.step(step)
        return everything(one)

    unbroken = further(model)
    dist.barrier()
    resumed = engine(ATTENTION, precision="float32", sequence_parallel=2, ema=0.9)
    resumed._engine._config.gradient_clipping = resumed._optimizer.clip_grad = 0.0
    resumed.load(folder / "shared-tokens")
    same(*({n: v for n, v in each.items() if trained(n)} for each in (further(resumed), unbroken)))
    for one in (model, resumed):
        one.close()


@check
def a_block_is_gathered_twice_in_a_step(folder: Path) -> None:
    """Once for both forwards of the cross-pair loss, once for the backward; and the order of modules that ZeRO-3 has
    recorded, which it prefetches by, holds from step to step, over micro-batches, buckets and numbers of references."""
    from deepspeed.runtime.zero import partition_parameters

    original = partition_parameters._dist_allgather_fn
    for mode in ("none", "full", "attention"):
        model = released_at_once(accumulation=2, activations={"mode": mode})
        coordinator = model._optimizer.parameter_offload.get_param_coordinator()
        block = sum(one.ds_numel for one in model._engine.module.blocks[0].parameters())
        others = sum(one.ds_numel for one in model._engine.module.parameters()) - 3 * block
        gathered: list[int] = []

        def note(shard: Tensor, whole: Tensor, *rest: Any, gathered: list[int] = gathered) -> Any:
            gathered.append(whole.numel())
            return original(shard, whole, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(partition_parameters, "_dist_allgather_fn", note)
            for step in range(4):
                for micro in range(2):
                    size = {"frames": 2 + micro, "references": (step + micro) % 3, "height": 4, "width": 4}
                    model.backward(batch_loss(model, TrainingBatch.fake(2, seed=step, **size), step))
                    if step >= 2:
                        assert coordinator.is_complete_trace(), (mode, step, micro)
                    if step == 2:
                        total, gathered[:] = sum(gathered), []
                        # padded to the ranks; what lies outside of the blocks is needed in forward and backward too
                        assert 2 * 3 * block <= total < 2 * 3 * block + 2.2 * others, (mode, total, block, others)
                assert not model.step(step).dropped
                gathered.clear()
        model.close()


def released_at_once(**section: Any) -> Any:
    """An engine that lets go of small weights at once, too: it would keep them for their next use."""
    from domainshuttle.platform.engine import zero3

    derived = zero3.deepspeed_config

    def config(*given: Any) -> dict[str, Any]:
        made = derived(*given)
        made["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero3, "deepspeed_config", config)
        return engine(ATTENTION, **section)


class Products(TorchDispatchMode):
    """Notes the sizes of the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.sizes.append((left.shape[0], left.shape[1], right.shape[1]))
        return func(*args, **kwargs or {})


def run_pair(folder: Path, checks: list[Callable[[Path], None]]) -> dict[str, str]:
    results = {}
    for function in checks:
        began = time.monotonic()
        try:
            function(folder)
            results[function.__name__] = "passed"
        except BaseException:
            results[function.__name__] = traceback.format_exc()
            (folder / "failed").touch()
            break  # the ranks are no longer in step
        finally:
            sys.stderr.write(f"{function.__name__}: {time.monotonic() - began:.1f} s\n")
    return results


def a_closed_engine_gives_its_memory_back() -> None:
    """DeepSpeed keeps engines alive, and a schedule trains its segments in one process."""
    from domainshuttle.platform.config.schema import EngineSection
    from domainshuttle.platform.engine.zero3 import frozen_copy, release

    before = held()
    for options in ({}, {"ema": 0.9}, {"precision": "float32"}, {"offload_optimizer": True}):
        model: Any = engine(["*"], **options)
        train(model, 0, 2)
        for kind, flats in model._partition.flats().items():
            value, flats[0][5] = float(flats[0][5]), float("inf")
            assert model.weights_finite() == (kind not in ("master", "ema")), kind
            flats[0][5] = value
        assert model.weights_finite()
        at_work = held()
        model.close()
        del model
        snapshot: Any = frozen_copy(design([]), EngineSection())
        release(snapshot)
        del snapshot
        left = held()
        assert left - before < 0.01 * (at_work - before), (options, before, at_work, left)
        before = left


def run_alone(folder: Path) -> dict[str, str]:
    a_closed_engine_gives_its_memory_back()
    model = engine(ATTENTION, ema=0.9)
    train(model, 0, 3)
    saved = everything(model)
    model.snapshot()(folder / "one")
    save_file(saved, folder / "one-whole.safetensors")
    (folder / "one-ready").touch()
    after = train(model, 3, 4)
    fresh = engine(ATTENTION, ema=0.9)
    fresh.load(folder / "one")
    same(everything(fresh), saved)
    assert train(fresh, 3, 4) == after
    wait_for(folder / "two-ready")
    fresh = engine(ATTENTION, ema=0.9, seed=6)
    fresh.load(folder / "two")
    expected = load_file(folder / "two-whole.safetensors")
    found = everything(fresh)
    same(*({n: v for n, v in each.items() if trained(n)} for each in (found, expected)))
    train(fresh, 3, 4)
    return {"closed": "passed", "alone": "passed"}


def main(rank: int, ranks: int, folder: Path, part: str) -> None:
    # by MASTER_PORT nothing is sent: DeepSpeed would name what it shares by it, and another program may take a port
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getppid() + ranks)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    dist.init_process_group(
        "gloo", f"file://{folder}/store-{ranks}", timedelta(seconds=PATIENCE), rank=rank, world_size=ranks
    )
    results = run_pair(folder, RARE if part == "rare" else CHECKS) if ranks == 2 else run_alone(folder)
    (folder / f"results-{ranks}-{rank}.json").write_text(json.dumps(results))


def fork(folder: Path, part: str, groups: list[int]) -> None:
    """Groups of so many ranks, which work side by side; they share what this process has imported."""
    from domainshuttle.platform.engine import zero3

    torch.set_num_threads(1)
    zero3.import_deepspeed()
    gc.freeze()  # DeepSpeed collects garbage for each engine, and all that was imported would be looked through
    ranks = [(rank, of) for of in groups for rank in range(of)]
    for rank, of in ranks:
        if os.fork():
            continue
        log = os.open(folder / f"log-{of}-{rank}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            main(rank, of, folder, part)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # DeepSpeed's and gloo's threads need no farewell
    for _ in ranks:
        if os.wait()[1]:
            (folder / "failed").touch()


@contextlib.contextmanager
def results_of(folder: Path, groups: list[int], part: str) -> Iterator[dict[str, Any]]:
    """What groups of so many ranks found of a part of the checks."""
    own = environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # two ranks need two GPUs, or none
    command = [sys.executable, __file__, str(folder), part, *map(str, groups)]
    with (folder / "log.txt").open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=own, start_new_session=True)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        found: dict[str, Any] = {"logs": {log.stem: log.read_text()[-3000:] for log in folder.glob("log*.txt")}}
        for rank, of in [(rank, count) for count in groups for rank in range(count)]:
            path = folder / f"results-{of}-{rank}.json"
            found[f"{of}-{rank}"] = json.loads(path.read_text()) if path.exists() else {}
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with results_of(tmp_path_factory.mktemp("ranks"), [2, 1], "daily") as found:
        yield found


@pytest.fixture(scope="module")
def rare_results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with results_of(tmp_path_factory.mktemp("ranks"), [2], "rare") as found:
        yield found


def assert_passed(results: dict[str, Any], name: str) -> None:
    for rank in ("2-0", "2-1"):
        assert results[rank].get(name) == "passed", results[rank].get(name) or results["logs"]


@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_on_two_ranks(results: dict[str, Any], name: str) -> None:
    assert_passed(results, name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [function.__name__ for function in RARE])
def test_rarely_on_two_ranks(rare_results: dict[str, Any], name: str) -> None:
    assert_passed(rare_results, name)


def test_on_one_rank(results: dict[str, Any]) -> None:
    assert results["1-0"] == {"closed": "passed", "alone": "passed"}, results["logs"]["log-1-0"]


if __name__ == "__main__":
    fork(Path(sys.argv[1]), sys.argv[2], [int(of) for of in sys.argv[3:]])
