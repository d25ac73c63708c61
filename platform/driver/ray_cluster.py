"""The cluster that a command of a configuration runs on."""

import contextlib
from collections.abc import Iterator

from domainshuttle.cluster.local import Connection, Resources
from domainshuttle.platform.config.schema import RunConfig


@contextlib.contextmanager
def connected(config: RunConfig, cpus: float, gpus: float = 0.0) -> Iterator[None]:
    """Connects to the configuration's cluster, or starts one here. Raises ClusterError when it is too small."""
    remedy = "Add nodes, or ask for less: --set cluster.workers=1, or --set cluster.cpus_per_worker=0.5"
    with Connection(config.cluster.address, Resources(cpus, gpus, remedy), config.cluster.dashboard_port):
        yield
