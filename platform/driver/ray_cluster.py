"""The cluster that a command of a configuration runs on."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from domainshuttle.cluster.local import Connection, Resources
from domainshuttle.platform.config.schema import CorporaConfig, RunConfig
from domainshuttle.platform.console import errors
from domainshuttle.platform.report.text import Prose

_A_TASK = Resources(cpus=1.0)


@contextlib.contextmanager
def connected(
    config: RunConfig | CorporaConfig, needs: Resources = _A_TASK, meanwhile: Callable[[], None] | None = None
) -> Iterator[None]:
    """Connects to the configuration's cluster, or starts one here, which takes seconds; `meanwhile` is done in them.

    Raises ClusterError when it is too small, and what `meanwhile` raises.
    """
    with ThreadPoolExecutor(1, "meanwhile") as pool:
        work = pool.submit(meanwhile) if meanwhile else None
        cluster = Connection(config.cluster.address, needs, config.cluster.dashboard_port)
        if cluster.note:
            errors.print(Prose(cluster.note))
        with cluster:
            if cluster.open_warning:
                errors.print(Prose(cluster.open_warning))
            if work is not None:
                work.result()
            yield


def training_needs(config: RunConfig) -> Resources:
    """What a run needs at once: its least workers, and beside them a CPU for the data tasks, or what encodes in their
    place while they train."""
    lighter = {}
    for key, value in (("workers", 1), ("cpus_per_worker", 0.5)):
        content = config.model_dump(mode="json")
        content["cluster"][key] = value
        with contextlib.suppress(ValidationError):  # a batch that one worker can't have, for example
            lighter[f"cluster.{key}={value}"] = _needs(RunConfig.model_validate(content))
    needs = _needs(config)
    return Resources(needs.cpus, needs.gpus, lighter=lighter)


def trial_needs(config: RunConfig) -> Resources:
    """What preflight's trial group needs: the least workers of a run."""
    cluster = config.cluster
    return Resources(cluster.least_workers * cluster.cpus_per_worker, cluster.least_workers * cluster.gpus_per_worker)


def _needs(config: RunConfig) -> Resources:
    workers, encoder = trial_needs(config), config.encoder_resources()
    return Resources(workers.cpus + max(1.0, encoder.get("CPU", 0.0)), workers.gpus + encoder.get("GPU", 0.0))
