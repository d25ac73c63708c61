"""Where a machine keeps what is made once on it for all evaluations: packages of models, digests of weights."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of this user's cache; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "domainshuttle" / name
