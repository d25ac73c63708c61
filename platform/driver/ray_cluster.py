"""The cluster that a command of a configuration runs on."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from domainshuttle.cluster.local import Connection, Resources
from domainshuttle.platform.config.schema import CorporaConfig, RunConfig
from domainshuttle.platform.console import errors
from domainshuttle.platform.report.text import Prose


@contextlib.contextmanager
def connected(
    config: RunConfig | CorporaConfig, cpus: float, gpus: float = 0.0, meanwhile: Callable[[], None] | None = None
) -> Iterator[None]:
    """Connects to the configuration's cluster, or starts one here, which takes seconds; `meanwhile` is done in them.

    Raises ClusterError when it is too small, and what `meanwhile` raises.
    """
    remedy = "Add nodes, or ask for less: --set cluster.workers=1, or --set cluster.cpus_per_worker=0.5"
    with ThreadPoolExecutor(1, "meanwhile") as pool:
        work = pool.submit(meanwhile) if meanwhile else None
        cluster = Connection(config.cluster.address, Resources(cpus, gpus, remedy), config.cluster.dashboard_port)
        if cluster.note:
            errors.print(Prose(cluster.note))
        with cluster:
            if cluster.open_warning:
                errors.print(Prose(cluster.open_warning))
            if work is not None:
                work.result()
            yield
