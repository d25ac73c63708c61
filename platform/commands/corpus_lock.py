"""The lock of a corpus that is being made."""

import contextlib
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.index.parts import WORK_NAME
from domainshuttle.pipelines.storage.uri import Location, is_remote, local_path
from domainshuttle.platform.console import console
from domainshuttle.platform.run.lock import RunLock, holder_named


def being_made(place: Location) -> contextlib.AbstractContextManager[Any]:
    """A lock on a corpus, so that two commands do not take each other's parts away; in a store nobody can hold one
    (docs/corpus.md)."""
    if is_remote(place):
        return contextlib.nullcontext()
    folder = local_path(place)

    def held(_: Path, holder: dict[str, Any]) -> str:
        return f"{folder} is being made by {holder_named(holder)}: wait until it has ended, or stop it"

    return RunLock(folder / WORK_NAME, console.print, held)
