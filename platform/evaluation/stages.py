"""Stages of measuring: which metrics share a worker, and so decoded videos, masks and embeddings; and what the workers
of a stage reserve of the cluster."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from domainshuttle.pipelines.values import ActorPool
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import say
from domainshuttle.platform.evaluation.config import ScoringPool
from domainshuttle.platform.evaluation.metrics.metric import Metric


@dataclass(frozen=True)
class Stage:
    """Metrics by their digest, and their actors; None: they are measured in this process."""

    metrics: frozenset[str]
    pool: ActorPool | None

    def of(self, metrics: Iterable[str]) -> tuple[str, ...]:
        """Those of `metrics` that are this stage's."""
        return tuple(one for one in metrics if one in self.metrics)


def stages_of(metrics: Sequence[Metric[Any]], pool: ScoringPool | None) -> list[Stage]:
    """The stages that metrics are measured in.

    All share one, but for those that ask an endpoint, whose limits one actor alone can keep, and those whose model has
    an environment of its own. Raises ConfigError for actors that no node of the cluster can hold.
    """
    if pool is None:
        return [Stage(frozenset(metric.digest for metric in metrics), None)] if metrics else []
    largest = largest_node()
    together: dict[tuple[str, tuple[str, ...]], list[Metric[Any]]] = {}
    for metric in metrics:
        needs = metric.needs()
        together.setdefault((needs.endpoint, needs.packages), []).append(metric)
    found = []
    for (endpoint, packages), members in sorted(together.items(), key=lambda one: one[0]):
        gpus = pool.gpus
        if gpus is None:  # as the models need, where there is a GPU at all; a share above one is a whole one
            wanted = min(1.0, round(sum(metric.needs().gpus for metric in members), 3))
            gpus = wanted if largest.get("GPU", 0) else 0.0
        actors, cpus = (1 if endpoint else pool.actors), pool.cpus
        if packages:  # its workers wait for the actors of the model, which reserve for themselves
            cpus, gpus = 0.0, 0.0
        require_fits(ActorPool(actors=actors, cpus=cpus, gpus=gpus), "scoring", largest)
        found.append(
            Stage(frozenset(one.digest for one in members), ActorPool(actors=actors, cpus=cpus, gpus=gpus))
        )  # fmt: skip
    return found


def say_terms(metrics: Iterable[Metric[Any]]) -> None:
    """Says the terms of metrics whose models have some that bind, before they run."""
    terms = {metric.name: licence for metric in metrics if (licence := metric.needs().licence)}
    for name, licence in terms.items():
        say(f"{name} was asked for: {licence}")


def largest_node() -> dict[str, float]:
    """The most of each resource that a node of the connected cluster has."""
    import ray

    found: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"]:
            for name, amount in node["Resources"].items():
                found[name] = max(found.get(name, 0.0), float(amount))
    return found


def require_fits(pool: ActorPool, key: str, largest: dict[str, float]) -> None:
    """Raises ConfigError for an actor that no node can hold: Ray would wait for one for good."""
    for name, field, wanted in (("CPU", "cpus", pool.cpus), ("GPU", "gpus", pool.gpus)):
        if wanted > (there := largest.get(name, 0.0)):
            raise ConfigError(
                f"{key}.{field}={wanted:g}: an actor runs on one node, and the largest of the cluster has {there:g} "
                f"{name}s: ask for {there:g} or less, or add a node"
            )
