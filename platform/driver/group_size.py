"""How many workers a start has: the largest number that shares the batch and fits the cluster as it is now."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from domainshuttle.cluster.local import ClusterError
from domainshuttle.pipelines.errors import counted
from domainshuttle.platform.config.schema import RunConfig

_ROUNDING = 1e-6
"""0.3 / 0.1 is below 3."""


def group_size(
    sizes: Collection[int],
    need: Mapping[str, float],
    without: Collection[str] = (),
    held: int = 0,
    labels: Mapping[str, str] | None = None,
    beside: Mapping[str, float] | None = None,
) -> int:
    """The largest of `sizes` for which there is room, or else the least: Ray Train then waits for it.

    `need` are the resources of a worker, `without` the ids of nodes that are about to go, `held` the number of workers
    that run now, `labels` those of the nodes that workers are placed on. What encodes for the workers needs `beside`
    on some node: where workers took all, they would wait for it for ever.
    """
    places, beside = [node["NodeID"] for node in _nodes(labels or {}, without)], beside or {}
    free = available_resources_per_node()
    free = {node["NodeID"]: free.get(node["NodeID"], {}) for node in _nodes({}, without)}
    # with workers what encodes for them is there too
    room = min(_whole(places, need, without, beside), held + _room(free, places, need, {} if held else beside))
    return max((size for size in sizes if size <= room), default=min(sizes))


def settled_size(
    sizes: Collection[int],
    need: Mapping[str, float],
    without: Collection[str],
    watch: Callable[[], None],
    seconds: float = 15.0,
    labels: Mapping[str, str] | None = None,
    beside: Mapping[str, float] | None = None,
) -> int:
    """The same at a start: for so long it waits for what a group that has just ended still holds."""
    places = [node["NodeID"] for node in _nodes(labels or {}, without)]
    there = _whole(places, need, without, beside or {})
    whole = max((size for size in sizes if size <= there), default=min(sizes))
    until = time.monotonic() + seconds
    while (size := group_size(sizes, need, without, labels=labels, beside=beside)) < whole and time.monotonic() < until:
        watch()
        time.sleep(0.5)
    return size


def require_room(config: RunConfig) -> None:
    """Raises ClusterError where the least workers would not fit the nodes of their labels, even if nothing else ran
    there: Ray would wait for such nodes without a word."""
    cluster, need = config.cluster, config.worker_resources()
    places = [node["NodeID"] for node in _nodes(cluster.node_labels)]
    if (fit := _whole(places, need, (), config.encoder_resources())) >= cluster.least_workers:
        return
    encoder = config.encoder_resources()
    worker = f"{_amounts(need)} for each of {counted(cluster.least_workers, 'worker')}"
    worker += f" beside {_amounts(encoder)} for an actor of encoders.live" if encoder else ""
    if not cluster.node_labels:
        raise ClusterError(
            f"the nodes have room for {counted(fit, 'worker')}, and this needs {worker}, each on one node: add nodes, "
            "or lower cluster.workers or cluster.cpus_per_worker"
        )
    found = {
        f"{key}={value}" for node in _nodes({}) for key, value in node.get("Labels", {}).items()
        if key in cluster.node_labels
    }  # fmt: skip
    raise ClusterError(
        f"nodes of the labels {labels_text(cluster.node_labels)} (cluster.node_labels) have room for "
        f"{counted(fit, 'worker')}, and this needs {worker}; of these labels the living nodes have "
        f"{', '.join(sorted(found)) or 'none'}. Start such nodes (ray start --labels), or correct cluster.node_labels"
    )


def free_text(config: RunConfig) -> str:
    """What a worker needs, and what is free on the nodes where it may be, for people."""
    need, labels = config.worker_resources(), config.cluster.node_labels
    by_node = available_resources_per_node()
    there = [by_node.get(node["NodeID"], {}) for node in _nodes(labels)]
    free = {name: sum(one.get(name, 0.0) for one in there) for name in need}
    of = f"nodes of the labels {labels_text(labels)} have" if labels else "the cluster has"
    return f"each with {_amounts(need)}; {of} {_amounts(free)} free"


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels for people, as `ray start --labels` takes them."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in resources.items())


def _nodes(labels: Mapping[str, str], without: Collection[str] = ()) -> list[dict[str, Any]]:
    """The living nodes of these labels."""
    return [
        node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in without and labels.items() <= node.get("Labels", {}).items()
    ]


def _whole(
    places: Collection[str], need: Mapping[str, float], without: Collection[str], beside: Mapping[str, float]
) -> int:
    """Workers that fit on nodes when nothing else runs there."""
    return _room({node["NodeID"]: node["Resources"] for node in _nodes({}, without)}, places, need, beside)


def _room(
    there: Mapping[str, Mapping[str, float]],
    places: Collection[str],
    need: Mapping[str, float],
    beside: Mapping[str, float],
) -> int:
    """Workers that fit in the resources that are `there` of each node, each on one of `places`, with what needs
    `beside` on that node where it takes the fewest workers' room."""
    fits = {node: _fit(there[node], need) for node in places}
    if not beside:
        return sum(fits.values())
    taken = [
        fits[node] - _fit({name: amount - beside.get(name, 0.0) for name, amount in free.items()}, need)
        if node in fits
        else 0
        for node, free in there.items()
        if _fit(free, beside)
    ]
    return sum(fits.values()) - min(taken, default=0)


def _fit(there: Mapping[str, float], need: Mapping[str, float]) -> int:
    return int(min(there.get(name, 0.0) / amount for name, amount in need.items() if amount) + _ROUNDING)
