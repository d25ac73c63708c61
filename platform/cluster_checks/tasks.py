"""A Ray task on each node of the connected cluster."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from domainshuttle.platform.cluster_checks.findings import PreflightError, node_name


class Nodes:
    """The nodes that live, by Ray's id."""

    def __init__(self, seconds: float = 300.0) -> None:
        """`seconds` is what a task on each may take, its start included."""
        import ray

        self._seconds = seconds
        self._all = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self.ids = sorted(self._all)

    def named(self, node: str) -> str:
        """For people; of one that joined later its id alone."""
        one = self._all.get(node)
        if one is None:
            return f"node {node[:8]}"
        return node_name(one["NodeManagerHostname"], one["NodeManagerAddress"], node)

    def gpus(self, node: str) -> int:
        return int(self._all[node]["Resources"].get("GPU", 0))

    def labelled(self, labels: Mapping[str, str]) -> list[str]:
        """Those of these labels."""
        return [node for node in self.ids if labels.items() <= self._all[node].get("Labels", {}).items()]

    def start(self, function: Callable[..., Any], node: str, *arguments: Any, gpus: int = 0) -> Any:
        """Starts a function there; returns what `result` takes."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(function)
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return task.options(scheduling_strategy=there).remote(*arguments)

    def result(self, started: Any, node: str) -> Any:
        """What it returned. Raises PreflightError where the node does not answer in time."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return ray.get(started, timeout=self._seconds)
        except GetTimeoutError:
            raise PreflightError(
                f"{self.named(node)} has not answered for {self._seconds:g} s: its GPUs may be another job's (ray "
                "status), or it hangs: take it out"
            ) from None
        except RayError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
            raise PreflightError(f"{self.named(node)} failed: {reason}") from error

    def each(
        self, function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]], holding: Collection[str] = ()
    ) -> Any:
        """What a function returns on each node, all at once, by the node; on nodes of `holding` it has all GPUs."""
        started = {
            node: self.start(function, node, *mine, gpus=self.gpus(node) if node in holding else 0)
            for node, mine in arguments.items()
        }
        return {node: self.result(one, node) for node, one in started.items()}
