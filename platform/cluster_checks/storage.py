"""Whether all nodes see the same storage: written, listed and read by all at once, locked and renamed across nodes."""

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from domainshuttle.pipelines.errors import counted, one_line
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.files import delete, list_files, read_bytes, write_bytes
from domainshuttle.pipelines.storage.uri import is_remote, join, redacted
from domainshuttle.platform.cluster_checks.findings import Finding, failure, passed
from domainshuttle.platform.cluster_checks.tasks import Nodes

_BYTES = 8 << 20
_SEEN_SECONDS = 15.0
"""How long a folder's change may take to be seen elsewhere: NFS caches names for seconds."""


def check_storage(nodes: Nodes, places: dict[str, str]) -> Iterator[Finding]:
    """Each place, by what it is for: a folder or URI that all nodes use."""
    for purpose, place in places.items():
        # below the place, as other jobs have it too
        yield from _check_place(nodes, purpose, join(place, f".preflight-{uuid.uuid4().hex[:8]}"), redacted(place))


def _check_place(nodes: Nodes, purpose: str, place: str, shown: str) -> Iterator[Finding]:
    check = f"storage of {purpose}"
    began = time.monotonic()
    written = nodes.each(_write, {node: (place, node) for node in nodes.ids})
    seconds = time.monotonic() - began
    faults = list(_faults(nodes, check, shown, written))
    if not faults:
        # each reads what another has written
        others = dict(zip(nodes.ids, [*nodes.ids[1:], nodes.ids[0]], strict=True))
        read = nodes.each(_read, {node: (place, other, sorted(nodes.ids)) for node, other in others.items()})
        faults = list(_faults(nodes, check, shown, read))
    if not faults and not is_remote(place) and len(nodes.ids) > 1:
        faults = list(_locks(nodes, place, check, shown))
    _remove(place)
    if faults:
        yield from faults
        return
    locks = "" if is_remote(place) or len(nodes.ids) < 2 else ", locked and renamed"
    rate = len(nodes.ids) * _BYTES / max(seconds, 1e-9) / 1e6
    yield passed(
        check,
        f"{shown}: written, listed and read{locks} by {counted(len(nodes.ids), 'node')} ({rate:.0f} MB/s written)",
    )


def _faults(nodes: Nodes, check: str, shown: str, answers: dict[str, str]) -> Iterator[Finding]:
    for node, answer in answers.items():
        if answer:
            yield failure(
                check, f"{shown}: {answer}", nodes.named(node),
                "mount the same storage on every node, with rights and keys for the user of Ray",
            )  # fmt: skip


def _content(node: str) -> bytes:
    return (node.encode() * (_BYTES // len(node) + 1))[:_BYTES]


def _write(place: str, node: str) -> str:
    try:
        write_bytes(join(place, node), _content(node))
    except (OSError, ValueError) as error:
        return f"can't be written: {one_line(error)}"
    return ""


def _read(place: str, other: str, all_nodes: Sequence[str]) -> str:
    deadline = time.monotonic() + _SEEN_SECONDS
    try:
        while missing := set(all_nodes) - {name.rpartition("/")[2] for name, _ in list_files(place)}:
            if time.monotonic() > deadline:
                unseen = counted(len(missing), "node")
                return f"what was written by {unseen} is not seen: it is not the same storage, or lists late"
            time.sleep(0.5)
        if read_bytes(join(place, other)) != _content(other):
            return f"what node {other[:8]} has written is read otherwise"
    except (OSError, ValueError) as error:
        return f"can't be read: {one_line(error)}"
    return ""


def _locks(nodes: Nodes, place: str, check: str, shown: str) -> Iterator[Finding]:
    """A lock that one node holds, another must not get; and a file that is renamed is seen there under its new name."""
    first, second = nodes.ids[:2]
    holds = nodes.start(_hold, first, place)
    refused = nodes.each(_try, {second: (place,)})[second]
    (Path(place) / "release").touch()
    held = nodes.result(holds, first)
    for node, answer in ((first, held), (second, refused)):
        if answer:
            yield failure(
                check, f"{shown}: {answer}", nodes.named(node),
                "mount it with locks (Lustre -o flock, NFS 4) and not through s3fs or gcsfuse: two drivers of one run "
                "would not see each other",
            )  # fmt: skip


def _hold(place: str) -> str:
    folder = Path(place)
    try:
        with FileLock(folder / "lock", timeout=10):
            with atomic_file(folder / "held") as path:
                path.write_text("held")
            deadline = time.monotonic() + 60
            while not (folder / "release").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
    except (OSError, Timeout) as error:
        return f"can't be locked: {one_line(error)}"
    return ""


def _try(place: str) -> str:
    folder = Path(place)
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (folder / "held").exists():
        if time.monotonic() > deadline:
            return "a file that another node has renamed is not seen under its new name"
        time.sleep(0.1)
    try:
        with FileLock(folder / "lock", timeout=1):
            return "a lock that another node holds is given here too"
    except Timeout:
        return ""
    except OSError as error:
        return f"can't be locked: {one_line(error)}"


def _remove(place: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        if not is_remote(place):
            shutil.rmtree(place)
            return
        for name, _ in list_files(place):
            delete(join(place, name.rpartition("/")[2]))
