"""What all ranks know alike at the end of a step: its mean loss, and whether they end after it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Attempt, Ledger
from domainshuttle.platform.run.segments import End, Segment
from domainshuttle.platform.training.collective_device import collective_device


class Stop(IntEnum):
    """Why all ranks end after this step, if they do."""

    NO = 0
    REQUESTED = 1
    BUDGET_SPENT = 2
    DURATION_REACHED = 3
    """The stage's own GPU-hours are used: it is finished."""
    REGROUP = 4
    """The driver has room for more workers."""
    PREEMPTED = 5
    """A node of the group is about to go."""

    @property
    def end(self) -> End | None:
        """How a segment ends that is stopped for this before its last step."""
        ends = {Stop.REQUESTED: End.STOPPED, Stop.BUDGET_SPENT: End.BUDGET_SPENT}
        return (ends | {Stop.REGROUP: End.REGROUPED, Stop.PREEMPTED: End.PREEMPTED}).get(self)


@dataclass(frozen=True)
class Agreement:
    """What all ranks know alike after a step's gradients, by one collective."""

    loss: float
    """Mean over all ranks and micro-batches; not finite where any is not."""
    stop: Stop


class EndOfStep:
    """Adds up a rank's losses of a step, and compares with the other ranks at its end.

    `preempted_nodes` is asked about once a second, by all ranks at the same step, which nodes of the group are about to
    go. `account` is the ledger with this attempt's hours, on rank 0; None on the others, which ask no questions.
    """

    def __init__(
        self,
        run: Run,
        segment: Segment,
        preempted_nodes: Callable[[], Sequence[str]],
        account: tuple[Ledger, Attempt] | None,
    ) -> None:
        self.nodes = tuple[str, ...]()
        """Those that were about to go when that was last asked."""
        self._run, self._segment, self._account = run, segment, account
        self._preempted_nodes, self._asked = preempted_nodes, time.monotonic()
        self._hours_read, self._hours_stop = 0.0, Stop.NO
        self._loss_sum, self._loss_count = torch.zeros((), dtype=torch.float64), 0
        self._waited = 0.0

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch, which stays on its device."""
        self._loss_sum = self._loss_sum.to(loss.device) + loss.detach().double()
        self._loss_count += 1

    def agree(self) -> Agreement:
        """One collective a step; all ranks must call together."""
        ask = self._account is not None and time.monotonic() - self._asked >= _ASK_SECONDS
        stop = self._reason(*self._account) if self._account is not None else Stop.NO
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # what is waited for from here on are the others
        began = time.perf_counter()
        total, count, reason, asked = _summed(self._loss_sum, float(self._loss_count), float(stop), float(ask))
        self._waited += time.perf_counter() - began
        self._loss_sum, self._loss_count = torch.zeros((), dtype=torch.float64), 0
        if asked:
            self._asked = time.monotonic()
            self.nodes = tuple(self._preempted_nodes())
            if self.nodes and not reason:
                reason = Stop.PREEMPTED
        return Agreement(total / count if count else float("nan"), Stop(int(reason)))

    def take_waited(self) -> float:
        """Seconds that this rank waited for the others at the ends of steps since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _reason(self, ledger: Ledger, attempt: Attempt) -> Stop:
        if self._run.stop_path.exists():
            return Stop.REQUESTED
        if self._run.regroup_path.exists():
            return Stop.REGROUP
        budget, hours = self._run.config.budget_gpu_hours, self._segment.stage.gpu_hours
        if (budget is None and hours is None) or time.monotonic() - self._hours_read < _ASK_SECONDS:
            return self._hours_stop
        self._hours_read = time.monotonic()
        now = attempt.hours_since_last_line()
        if budget is not None and ledger.summary().used + now >= budget:
            self._hours_stop = Stop.BUDGET_SPENT
        elif hours is not None and ledger.segment_hours(self._segment.name) + now >= hours:
            self._hours_stop = Stop.DURATION_REACHED
        return self._hours_stop


def mean_loss(loss: Tensor) -> float:
    """The mean over all ranks of the loss of one micro-batch each; not finite where any is not. All ranks must call."""
    return _summed(loss.detach().double())[0] / dist.get_world_size()


def _summed(first: Tensor, *more: float) -> list[float]:
    """The sums over all ranks."""
    mine = torch.stack([first, *(first.new_tensor(value) for value in more)]).to(collective_device())
    dist.all_reduce(mine)
    sums: list[float] = mine.tolist()
    return sums


_ASK_SECONDS = 1.0
"""Between looks at the ledger and questions after preemption."""
