"""Imports without packages that they would take along and nobody here uses: seconds of each worker's start."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(*packages: str) -> Iterator[None]:
    """While it lasts, packages look as if they were not installed, which is what None in `sys.modules` says: what is
    imported meanwhile does without them where it can, and remembers that. Of those that are imported already nothing
    changes."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
