"""How many workers a start has: the largest number that shares the batch and fits the cluster as it is now."""

import time
from collections.abc import Callable, Collection, Mapping

import ray

_ROUNDING = 1e-6
"""0.3 / 0.1 is below 3."""


def group_size(
    sizes: Collection[int],
    need: Mapping[str, float],
    without: Collection[str] = (),
    held: int = 0,
    labels: Mapping[str, str] | None = None,
) -> int:
    """The largest of `sizes` for which there is room, or else the least: Ray Train then waits for it.

    `need` are the resources of a worker, `without` the ids of nodes that are about to go, `held` the number of workers
    that run now, `labels` those of the nodes that workers are placed on.
    """
    room = min(_whole(need, without, labels or {}), held + _free(need))
    return max((size for size in sizes if size <= room), default=min(sizes))


def settled_size(
    sizes: Collection[int],
    need: Mapping[str, float],
    without: Collection[str],
    watch: Callable[[], None],
    seconds: float = 15.0,
    labels: Mapping[str, str] | None = None,
) -> int:
    """The same at a start: for so long it waits for what a group that has just ended still holds."""
    whole = max((size for size in sizes if size <= _whole(need, without, labels or {})), default=min(sizes))
    until = time.monotonic() + seconds
    while (size := group_size(sizes, need, without, labels=labels)) < whole and time.monotonic() < until:
        watch()
        time.sleep(0.5)
    return size


def _whole(need: Mapping[str, float], without: Collection[str], labels: Mapping[str, str]) -> int:
    """Workers that fit on the living nodes of these labels when nothing else runs."""
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in without and labels.items() <= node.get("Labels", {}).items()
    ]
    return sum(_fit(node["Resources"], need) for node in nodes)


def _free(need: Mapping[str, float]) -> int:
    """Workers that fit in what nobody uses."""
    return _fit(ray.available_resources(), need)


def _fit(there: Mapping[str, float], need: Mapping[str, float]) -> int:
    return int(min(there.get(name, 0.0) / amount for name, amount in need.items() if amount) + _ROUNDING)
