"""What tests of the engine share: a tiny model under ZeRO-3, its steps, and all that it holds."""

import contextlib
import gc
import os
import socket
import sys
import zlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

SIZE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "ffn_dim": 50,
    "text_dim": 64,
    "freq_dim": 32,
    "text_len": 8,
}
ATTENTION = ["blocks.*.attn1.*", "*_ref*"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone; DeepSpeed, which remembers the groups it made, forgets them at its end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", str(free_port()))
        # by a store of its own, and not by that port, which another program may take in the meantime
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
            if "deepspeed" in sys.modules:
                from deepspeed.comm import comm
                from deepspeed.utils import groups

                comm.cdb = groups._WORLD_GROUP = None


def environment(**more: str) -> dict[str, str]:
    """Of a program that a test starts: this one's, in which it also finds this module."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def stage(**changes: Any) -> Any:
    from domainshuttle.platform.config.schema import StageSection

    values = {"name": "a", "mixture": {"x": 1}, "steps": 100, "global_batch": 4, "micro_batch": 2}
    values |= {"learning_rate": 1e-2, "weight_decay": 0.01, "trained": ["*"]}
    return StageSection(**values | changes)


def design(trained: Any, seed: int = 3, origin: Path | None = None, size: dict[str, Any] | None = None) -> Any:
    """A blueprint of the tiny model, or of `origin`, with its trained parameters selected.

    The new model's weights are moved a little: with its output of zeros only the last layer would have gradients.
    """
    from domainshuttle.platform.config.schema import ModelSection
    from domainshuttle.platform.engine.initialization import Blueprint, blueprint
    from domainshuttle.platform.engine.trained_parameters import select_trained
    from domainshuttle.platform.run.weights_origin import WeightsOrigin

    section = ModelSection(base=str(origin)) if origin else ModelSection(size=SIZE | (size or {}))
    made = blueprint(section, WeightsOrigin(section.base, seed))

    def moved() -> Iterator[tuple[str, Tensor]]:
        for name, value in made.weights():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            yield name, value + 0.02 * torch.randn(value.shape, generator=generator)

    select_trained(made.outline, trained)
    return made if origin else Blueprint(made.outline, moved)


def engine(
    trained: Any, accumulation: int = 1, seed: int = 3, size: dict[str, Any] | None = None, **section: Any
) -> Any:
    from domainshuttle.platform.config.schema import EngineSection
    from domainshuttle.platform.engine.zero3 import Engine

    settings = EngineSection(**{"persistent_parameters": 0, "activations": {"mode": "none"}} | section)
    return Engine(design(trained, seed, size=size), stage(trained=trained), settings, accumulation)


def loss_of(model: Any, step: int, share: int | None = None, snapshot: Any = None, weight: float = 0.1) -> Tensor:
    """The training loss of two samples that only this share (a rank's, unless named) has."""
    from domainshuttle.model.batch import TrainingBatch

    batch = TrainingBatch.fake(2, height=4, width=4, seed=100 * step + (dist.get_rank() if share is None else share))
    return batch_loss(model, batch, step, snapshot, weight)


def batch_loss(model: Any, batch: Any, step: int = 0, snapshot: Any = None, weight: float = 0.1) -> Tensor:
    """The training loss of a micro-batch, of an engine or a plain model."""
    from domainshuttle.model.flow import FlowConfig
    from domainshuttle.model.objective import training_loss

    return training_loss(
        model,
        batch.to(model.device, model.dtype),
        run_seed=1,
        step=step,
        flow=FlowConfig(),
        cross_pair_weight=weight,
        cross_pair_target="snapshot" if snapshot is not None else "stop_gradient",
        snapshot_model=snapshot,
    ).loss


def rows(batch: Any, first: int, last: int) -> Any:
    """The samples [first, last) of a batch."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: value[first:last] for name, value in values.items() if value is not None})


def train(model: Any, first: int, last: int, weight: float = 0.1) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = loss_of(model, step, weight=weight)
        model.backward(loss)
        assert not model.step(step).dropped
        losses.append(loss.item())
    return losses


def everything(model: Any) -> dict[str, Tensor]:
    """Masters, optimiser states and averages, whole, and the weights that the next forward pass uses."""
    import deepspeed

    partition = model._partition
    found = {
        f"{kind}/{name}": partition.gather(name, kind).clone() for kind in partition.flats() for name in partition.parts
    }
    for name, parameter in model._engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[f"weight/{name}"] = parameter.detach().clone()
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"{len(different)} of {len(one)} differ, such as {different[:4]}"


def held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
