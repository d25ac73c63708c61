"""What a run asks of a cluster, as manifests need it."""

import hashlib
import re
from dataclasses import dataclass

RAY_VERSION = "2.60.0"
"""Of the image, the clients and the manifests: they must be the same."""
_LONGEST = 47


@dataclass(frozen=True)
class Workload:
    """A run. `cluster` knows no run's configuration: `platform/commands/cluster` makes this from one."""

    name: str
    config_yaml: str
    """Its resolved configuration."""
    workers: tuple[int, int]
    """Least and most."""
    cpus_per_worker: float
    gpus_per_worker: int
    stop_seconds: int
    """That its driver may take for the last checkpoint, when it is asked to stop."""
    drain_seconds: float
    """For two steps and a save, as predicted or measured."""
    options: tuple[str, ...] = ()
    """Of `domainshuttle train`."""

    @property
    def resource_name(self) -> str:
        """The name that Kubernetes takes: of RayJobs at most 47 characters, small letters, digits and dashes.

        Where more than a dot or an underscore is lost, a digest keeps it apart from those of other runs.
        """
        name = re.sub(r"[._]", "-", self.name)
        if re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= _LONGEST:
            return name
        digest = hashlib.blake2b(self.name.encode(), digest_size=4).hexdigest()
        name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        name = name if name[:1].isalpha() else f"run-{name}"
        return f"{name[: _LONGEST - 1 - len(digest)].rstrip('-')}-{digest}"
