"""Which weights a segment begins with: one decision of the driver, carried to all who need it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from domainshuttle.platform.run.weights_digest import Fingerprints, verified_digest


@dataclass(frozen=True)
class WeightsOrigin:
    """The weights that a segment begins with: a new model of a seed, a folder, or a model of the hub at a commit.

    `engine.hub.resolve` makes one of what a configuration or a schedule names.
    """

    place: str | None
    """The folder, or the id on the hub; None: a new model."""
    seed: int = 0
    """Of a new model."""
    commit: str | None = None
    """What the id on the hub meant when the driver started: a branch may move on; None: no id of the hub."""
    identity: str = ""
    """A digest of the weights, by which a checkpoint is never put on others; empty before `identified`."""

    @property
    def kind(self) -> Literal["new", "folder", "hub"]:
        return "new" if self.place is None else "folder" if self.commit is None else "hub"

    def identified(self, fingerprints: Fingerprints) -> "WeightsOrigin":
        """The same with its identity. Of a folder the weights are read, unless `fingerprints` knows them.

        Raises ChangedError for a folder whose weights are not those that the digest beside them stands for.
        """
        if self.place is None:
            identity = f"new:{self.seed}"
        elif self.commit is not None:
            identity = f"hub:{self.place.partition('@')[0]}@{self.commit}"
        else:
            identity = verified_digest(Path(self.place), fingerprints)
        return dataclasses.replace(self, identity=identity)
