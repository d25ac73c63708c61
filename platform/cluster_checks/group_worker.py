"""What a rank of the trial group does: collectives over nodes, pairs of nodes and all, then steps of the largest batch.

Bus bandwidth is as nccl-tests define it: S/t * 2(n-1)/n for an all-reduce of S bytes, S/t * (n-1)/n for an all-gather
of S bytes in all.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from ray.train.torch import get_device

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.platform.config.schema import RunConfig, StageSection
from domainshuttle.platform.engine.stage_model import StageModel
from domainshuttle.platform.run.weights_origin import WeightsOrigin
from domainshuttle.platform.training.collective_device import collective_device
from domainshuttle.platform.training.device_memory import MemoryUse, memory_error

_MOST_ROUNDS = 4
"""Of pairs: each node is paired with so many others."""


@dataclass(frozen=True)
class Trial:
    """What a trial group is asked."""

    config: dict[str, Any]
    stage: str
    """Whose steps are made."""
    bucket: tuple[int, int, int]
    """Frames, height and width."""
    expert: str | None
    origin: WeightsOrigin
    steps: int = 2


@dataclass(frozen=True)
class Link:
    """What a collective reached."""

    kind: str
    """all-reduce or all-gather."""
    nodes: tuple[str, ...]
    """Ray's ids; one: within it, two: between them, more: all."""
    ranks: int
    bytes: int
    bus_bandwidth: float
    """Bytes/s, of the slowest rank."""


@dataclass(frozen=True)
class Steps:
    """What the steps of the largest batch took."""

    seconds: float
    """Of the last one."""
    peak: int
    """Bytes, of the rank that used most."""
    total: int
    """Bytes of its device."""
    rank: int
    device: str


@dataclass(frozen=True)
class TrialResult:
    """Of all ranks; only rank 0's is returned by Ray Train."""

    links: list[Link]
    wrong: list[tuple[str, ...]]
    """Nodes over which a sum came out wrong."""
    steps: Steps
    nodes: dict[int, str]
    """Of each rank."""


def run_trial(trial: Trial, node: str) -> TrialResult:
    """All ranks call this; `node` is Ray's id of this one."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, node)
    links, wrong = _swept(found)
    try:
        steps = _made_steps(trial)
    except BaseException as raised:
        config = RunConfig.model_validate(trial.config)
        memory = memory_error(raised, config, _stage(config, trial), dist.get_rank(), None, None)
        if memory is None:
            raise
        raise memory from raised
    return TrialResult(links, wrong, steps, dict(enumerate(found)))


def _swept(nodes: Sequence[str]) -> tuple[list[Link], list[tuple[str, ...]]]:
    """Collectives within each node, between nodes two by two, and over all."""
    rank, device = dist.get_rank(), collective_device()
    size = (1 << 30) if device.type == "cuda" else (1 << 22)
    mine: list[tuple[str, tuple[str, ...], int, float, bool]] = []
    for names, ranks in _groups(nodes):
        group = dist.new_group(list(ranks)) if len(ranks) < len(nodes) else dist.group.WORLD
        if rank in ranks and len(ranks) > 1:
            right, reduced, gathered = _timed(group, len(ranks), ranks.index(rank), size, device)
            mine.append(("all-reduce", names, len(ranks), reduced, right))
            mine.append(("all-gather", names, len(ranks), gathered, True))
        dist.barrier()
        if group is not None and group is not dist.group.WORLD and rank in ranks:
            dist.destroy_process_group(group)
    everyones: list[Any] = [None] * len(nodes)
    dist.all_gather_object(everyones, mine)
    slowest: dict[tuple[str, tuple[str, ...], int], float] = {}
    wrong = set()
    for kind, names, count, bandwidth, right in (one for all_of in everyones for one in all_of):
        key = kind, names, count
        slowest[key] = min(bandwidth, slowest.get(key, bandwidth))
        if not right:
            wrong.add(names)
    links = [Link(kind, names, count, size, bandwidth) for (kind, names, count), bandwidth in slowest.items()]
    return links, sorted(wrong)


def _groups(nodes: Sequence[str]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Names of nodes and the ranks on them, the same on all ranks."""
    names = sorted(set(nodes))
    on = {name: tuple(rank for rank, node in enumerate(nodes) if node == name) for name in names}
    for name in names:
        yield (name,), on[name]
    for pairs in _rounds(names):
        for one, other in pairs:
            yield (one, other), (*on[one], *on[other])
    if len(names) > 2:
        yield tuple(names), tuple(range(len(nodes)))


def _rounds(names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Rounds in which each node meets another, as in a tournament; at most some."""
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(min(len(circle) - 1, _MOST_ROUNDS)):
        half = len(circle) // 2
        both = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in both if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _timed(group: Any, count: int, place: int, size: int, device: torch.device) -> tuple[bool, float, float]:
    """Whether a sum is right, and the bus bandwidths of an all-reduce and an all-gather of `size` bytes."""
    elements = size // 4 // count * count
    values = torch.full((elements,), float(place + 1), device=device)
    dist.all_reduce(values, group=group)
    right = bool((values == count * (count + 1) / 2).all())
    reduced = _seconds(functools.partial(dist.all_reduce, torch.zeros_like(values), group=group), device)
    part = torch.zeros(elements // count, device=device)
    parts = list(values.chunk(count))
    gathered = _seconds(functools.partial(dist.all_gather, parts, part, group=group), device)
    held = elements * 4
    return right, held / reduced * 2 * (count - 1) / count, held / gathered * (count - 1) / count


def _seconds(call: Any, device: torch.device, repeats: int = 5) -> float:
    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    call()
    times = [wait()]
    for _ in range(repeats):
        call()
        times.append(wait())
    return max(min(later - earlier for earlier, later in pairwise(times)), 1e-9)


def _stage(config: RunConfig, trial: Trial) -> StageSection:
    return next(stage for stage in config.stages if stage.name == trial.stage)


def _made_steps(trial: Trial) -> Steps:
    """Optimiser steps on batches of noise with the most references, at learning rates of the stage."""
    config = RunConfig.model_validate(trial.config)
    stage, device = _stage(config, trial), get_device()
    expert = next((one for one in config.experts if one.name == trial.expert), None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = StageModel(config, stage, expert, trial.origin, 1, seed=config.seed, flow=stage.flow)
    try:
        _, frames, height, width = Bucket(*trial.bucket).latent_shape
        batch = TrainingBatch.fake(
            stage.micro_batch,
            frames=frames,
            height=height,
            width=width,
            references=stage.references,
            text_tokens=config.encoders.text_len,
            text_dim=int(model.network_config["text_dim"]),
            paired=stage.loss.cross_pair_weight > 0,
            seed=dist.get_rank() // config.engine.sequence_parallel,  # ranks that share a sample have the same
        )
        seconds = 0.0
        for step in range(trial.steps):
            began = time.perf_counter()
            model.engine.backward(model.loss(batch, step).loss)
            model.engine.step(step)
            seconds = time.perf_counter() - began
        use = MemoryUse.now()
    finally:
        model.close()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (use.peak, use.total, dist.get_rank(), use.device, seconds))
    peak, total, rank, name, _ = max(everyones)
    return Steps(max(one[-1] for one in everyones), peak, total, rank, name)
