"""What the workers of a run do at this moment: their stacks, and a profile of a step, without stopping them."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from domainshuttle.platform.commands.status import driver_lives
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import console
from domainshuttle.platform.report.text import Advice, Prose, Records
from domainshuttle.platform.run.eta import span
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.requests import ask, read_answer, withdraw
from domainshuttle.platform.run.workers import (
    WorkerState,
    attempts,
    beat_seconds,
    innermost,
    read_workers,
    training_stack,
)

_PAUSE = 0.2


def print_stacks(folder: Path, rank: int | None = None) -> bool:
    """Prints where each worker is, or of one the stacks of all its threads; False where one did not answer.

    Raises ConfigError where no worker is at work, or none has this rank.
    """
    run = find_run(folder)
    workers = _at_work(run, rank)
    asked = {worker.rank: ask(run, "stacks", worker.rank) for worker in workers}
    deadline = time.monotonic() + 3 * beat_seconds(workers[0].world_size) + 5
    files: dict[int, Path] = {}
    while len(files) < len(asked) and time.monotonic() < deadline:
        for worker in workers:
            if worker.rank not in files and (found := read_answer(run, asked[worker.rank])) is not None:
                files[worker.rank] = Path(found["file"])
        time.sleep(_PAUSE)
    if rank is not None and rank in files:
        console.print(files[rank].read_text(), markup=False)
    rows = [[str(one.rank), one.host, str(one.pid), _place(files.get(one.rank)), one.place] for one in workers]
    console.print(Records(("rank", "machine", "process", "at", "doing"), rows, "", ["rank", "process"]))
    for worker in workers:
        if worker.rank not in files:
            withdraw(run, "stacks", worker.rank)
            silence = span(max(0.0, time.time() - worker.beat))
            console.print(
                Prose(f"{worker.name} did not answer; its last heartbeat was {silence} ago: it is stopped, or hangs")
            )
    if files:
        console.print(Prose(f"Stacks of all threads: {next(iter(files.values())).parent}"))
    return len(files) == len(asked)


def _place(file: Path | None) -> str:
    """The innermost place of the thread that trains."""
    if file is None:
        return "no answer"
    return innermost(training_stack(file.read_text(errors="replace"))) or "not known"


def print_profile(folder: Path, rank: int, timeout: float) -> None:
    """Has a worker profile its next step, and prints the operations that took the most time.

    Raises ConfigError where it is not at work, or did not answer within `timeout` seconds.
    """
    run = find_run(folder)
    (worker,) = _at_work(run, rank)
    token, began = ask(run, "profile", rank), time.monotonic()
    console.print(Prose(f"{worker.name} profiles its next step; the others wait for it as long."))
    while (found := read_answer(run, token)) is None:
        if time.monotonic() - began > timeout or not driver_lives(run):
            withdraw(run, "profile", rank)
            raise ConfigError(
                f"no profile of worker {rank}: it made no whole step within {span(time.monotonic() - began)}. Where it "
                f"is: domainshuttle stacks {shlex.quote(str(run.folder))} --rank {rank}"
            )
        time.sleep(_PAUSE)
    if "error" in found:
        raise ConfigError(f"no profile of worker {rank}: {found['error']}")
    console.print(Path(found["table"]).read_text(), markup=False)
    console.print(Prose(f"Step {found['step']} of {found['segment']}, worker {rank}. Table: {found['table']}"))
    console.print(Advice("Trace, to be opened at https://ui.perfetto.dev or chrome://tracing:", found["trace"]))


def _at_work(run: Run, rank: int | None) -> Sequence[WorkerState]:
    number = max(attempts(run), default=0)
    workers = [one for one in read_workers(run, number) if one.ended is None] if driver_lives(run) else []
    if not workers:
        raise ConfigError(
            f"no worker of {run.config.name} is at work: domainshuttle status {shlex.quote(str(run.folder))} says why"
        )
    chosen = [one for one in workers if rank is None or one.rank == rank]
    if not chosen:
        raise ConfigError(f"no worker {rank} is at work; there are ranks 0 to {max(one.rank for one in workers)}")
    return chosen
