"""The engine on a GPU, which most machines that test lack: one rank over NCCL, in a process of its own.

This file is also its program. What two ranks do, whichever their device, is in test_zero3_ranks.py.
Run: python -m pytest tests/platform/engine/test_zero3_cuda.py
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import ATTENTION, design, engine, environment, everything, free_port, loss_of, same, train
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CHECKS: list[Callable[[Path], None]] = []


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS.append(function)
    return function


@check
def a_step_is_that_of_plain_adamw_on_the_cpu(folder: Path) -> None:
    """The masters after two clipped steps of two micro-batches, in float32, against torch on the CPU."""
    model = engine(["*"], accumulation=2, precision="float32", attention_backend="_native_math")
    assert model.device.type == "cuda"
    assert all(flat.is_cuda for flat in model._partition._masters)
    plain = design(["*"]).build()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.01)
    for step in range(2):
        for micro in range(2):
            model.backward(loss_of(model, 2 * step + micro))
            (loss_of(plain, 2 * step + micro) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result = model.step(step)
        assert not result.dropped
        assert abs(result.grad_norm / norm.item() - 1) < 1e-3
    start = dict(design(["*"]).build().named_parameters())
    moved = torch.cat([(v - start[n]).flatten() for n, v in model.full_parameters()])
    expected = torch.cat([(v - start[n]).flatten() for n, v in plain.named_parameters()])
    # Adam's first steps are signs of gradients: those near zero may go either way
    assert (moved - expected).norm() / expected.norm() < 0.02


@check
def bf16_learns_as_on_the_cpu(folder: Path) -> None:
    model = engine(ATTENTION, attention_backend="_native_math")
    losses = train(model, 0, 4)
    plain = design(ATTENTION).build().bfloat16()
    assert abs(losses[0] / loss_of(plain, 0).item() - 1) < 0.01
    assert all(parameter.ds_tensor.is_cuda for parameter in model._engine.module.parameters())


@check
def a_resumed_run_is_the_unbroken_one(folder: Path) -> None:
    """Bit for bit, with the optimiser on the device and in the host's memory, from a snapshot in pinned memory."""
    for offload in (False, True):
        # plain products: the fused attention's gradients are sums in no fixed order
        section = {"ema": 0.9, "offload_optimizer": offload, "attention_backend": "_native_math"}
        model = engine(ATTENTION, **section)
        assert all(flat.is_cuda != offload for flat in model._partition._masters)
        train(model, 0, 3)
        saved, write = everything(model), model.snapshot()
        assert model.checkpoint_bytes(1) == 16
        after = train(model, 3, 5)
        final = everything(model)
        write(folder / f"at-3-{offload}")
        fresh = engine(ATTENTION, seed=3, **section)
        fresh.load(folder / f"at-3-{offload}")
        same(everything(fresh), saved)
        assert fresh._partition.steps == 3
        assert train(fresh, 3, 5) == after
        same(everything(fresh), final)


@check
def what_the_cpu_saved_goes_on_here(folder: Path) -> None:
    """A checkpoint has no device in it: an optimiser in the host's memory and one on the device exchange theirs."""
    host, device = engine(ATTENTION, offload_optimizer=True), engine(ATTENTION)
    train(host, 0, 2)
    host.snapshot()(folder / "host")
    device.load(folder / "host")
    same(*({n: v.cpu() for n, v in everything(model).items()} for model in (host, device)))
    train(device, 2, 3)


@check
def activations_recomputed_or_kept_on_the_host_change_no_bit(folder: Path) -> None:
    def run(**section: Any) -> dict[str, Tensor]:
        model = engine(ATTENTION, **{"attention_backend": "_native_math"} | section)
        train(model, 0, 2)
        return everything(model)

    none = run()
    for activations in ({"mode": "full"}, {"mode": "full", "offload": True}, {"mode": "every", "every": 2}):
        same(run(activations=activations), none)
    kept = run(attention_backend="native", activations={"mode": "attention"})
    for name, value in kept.items():
        if name.startswith("master/"):
            torch.testing.assert_close(value, none[name], rtol=0, atol=5e-2)


@check
def a_bad_step_changes_nothing(folder: Path) -> None:
    model = engine(ATTENTION, ema=0.9)
    train(model, 0, 2)
    before = everything(model)
    model.backward(loss_of(model, 5) * float("nan"))
    assert model.step(5).dropped
    model.backward(loss_of(model, 6))
    assert model.drop(6).dropped
    same(everything(model), before)
    train(model, 2, 3)


@check
def compiled_blocks_train_alike(folder: Path) -> None:
    plain, compiled = (engine(ATTENTION, compile=name, activations={"mode": "full"}) for name in (None, "inductor"))
    torch.testing.assert_close(train(compiled, 0, 2), train(plain, 0, 2), rtol=2e-2, atol=0)


@check
def the_weights_are_exported(folder: Path) -> None:
    from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

    model = engine(ATTENTION, ema=0.9)
    train(model, 0, 2)
    for ema in (False, True):
        model.export(folder / f"export-{ema}", ema=ema)
        exported = DomainShuttleTransformer3DModel.from_pretrained(folder / f"export-{ema}")
        for name, value in model.full_parameters(ema=ema):
            assert exported.get_parameter(name).detach().equal(value), name


def main(port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    results = {}
    for function in CHECKS:
        began = time.monotonic()
        try:
            function(folder)
            results[function.__name__] = "passed"
        except Exception:  # with one rank none waits for it: the others go on
            results[function.__name__] = traceback.format_exc()
        sys.stderr.write(f"{function.__name__}: {time.monotonic() - began:.1f} s\n")
    (folder / "results.json").write_text(json.dumps(results))
    os._exit(0)  # DeepSpeed's threads need no farewell


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, __file__, str(free_port()), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=450, check=False, env=environment())
    path = folder / "results.json"
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return found | {"log": run.stderr[-3000:]}


@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_on_a_gpu(results: dict[str, str], name: str) -> None:
    assert results.get(name) == "passed", results.get(name) or results["log"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
