"""Who ended a worker group: by the workers' signs of life, their last words, and the stacks of those that hung.

Ray tells of the worker that it saw end first, which is often one that a dead or a hanging one took along.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainshuttle.platform.run.eta import span
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.workers import WorkerState, beat_seconds, innermost, read_workers, training_stack

_WAITING = re.compile(
    r"distributed_c10d\.py|deepspeed/comm/|in synchronize\b"
    # on a GPU a collective returns at once, and what waits is the line that reads its result
    r"|training/(end_of_step|rank_rates|loss_metrics)\.py\", line \d+ in (_summed|gathered|compare_ranks|reduce)\b"
)
"""In the stack of a worker that waits for the others."""


@dataclass(frozen=True)
class Evidence:
    """What the workers of an attempt left."""

    run: Run
    workers: Sequence[WorkerState] = ()
    stacks: dict[int, Path] | None = None
    """By rank, the files with the stacks of workers that their watchdog ended."""

    @classmethod
    def of(cls, run: Run, attempt: int) -> "Evidence":
        """Reads it from the run's folder."""
        workers = read_workers(run, attempt)
        stacks = {}
        for worker in workers:
            path = run.hang_path(worker.segment, worker.rank)
            if worker.segment and path.exists() and path.stat().st_size and path.stat().st_mtime >= worker.started:
                stacks[worker.rank] = path
        return cls(run, workers, stacks)

    def name(self, rank: int) -> str:
        """A worker for people."""
        return next((worker.name for worker in self.workers if worker.rank == rank), f"worker {rank}")

    def log(self, rank: int) -> str:
        """Where a worker's log is, for people; empty where it is not known."""
        found = next((worker for worker in self.workers if worker.rank == rank), None)
        return "" if found is None else f"its log: {self.run.folder / found.log}"

    def hang(self) -> str | None:
        """Who hung, where, and where the stacks are; None where no watchdog ended a worker."""
        if not self.stacks:
            return None
        waiting = [rank for rank, path in self.stacks.items() if _WAITING.search(_training_stack(path))]
        suspects = [worker for worker in self.workers if worker.rank not in waiting]
        silent = [worker for worker in suspects if self._silence(worker) > 3 * beat_seconds(worker.world_size)]
        folder = next(iter(self.stacks.values())).parent
        if silent:
            said = "; ".join(
                f"{worker.name} sent no heartbeat for {span(self._silence(worker))}, after {worker.place}"
                for worker in silent
            )
            return f"{said}: it was stopped, or its machine does not answer. The others waited for it; stacks: {folder}"
        if suspects and len(suspects) < len(self.workers):
            said = "; ".join(f"{worker.name} hung in {worker.place}{self._frame(worker.rank)}" for worker in suspects)
            return f"{said}, and the others waited for it; stacks: {folder}"
        places = {worker.place for worker in self.workers}
        return f"all workers hung, in {'; '.join(sorted(places))}; stacks: {folder}"

    def dead(self) -> list[WorkerState]:
        """Of the workers that said no last word those that fell silent first: one, where that can be told."""
        silent = sorted((one for one in self.workers if one.ended is None), key=lambda worker: worker.beat)
        if not silent:
            return []
        margin = beat_seconds(silent[0].world_size) / 2
        return [worker for worker in silent if worker.beat - silent[0].beat <= margin]

    def _silence(self, worker: WorkerState) -> float:
        return max(other.beat for other in self.workers) - worker.beat

    def _frame(self, rank: int) -> str:
        """The innermost place of a worker's stack, for people."""
        path = (self.stacks or {}).get(rank)
        found = innermost(_training_stack(path)) if path else ""
        return f" (in {found})" if found else ""


def _training_stack(path: Path) -> str:
    return training_stack(path.read_text(errors="replace"))
