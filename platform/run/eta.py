"""How long a run still takes, from what it has shown so far; what nobody can know is said to be unknown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import AttemptRecord, Ledger
from domainshuttle.platform.run.segments import Segment


@dataclass(frozen=True)
class Remaining:
    """Seconds from now on."""

    stage: float | None
    """Of the stage that is trained; None: not known yet."""
    known: float
    """Of all stages together whose time is known."""
    unknown: tuple[str, ...]
    """Stages whose time is not known, since they have made no steps."""
    budget: float | None
    """Until the budget of device-hours is spent; None: there is none, or it outlasts the schedule."""


def remaining(run: Run, state: Mapping[str, Any], ledger: Ledger) -> Remaining:
    """What is left of the schedule, when rank 0 wrote `state` last (`Run.read_progress`)."""
    attempts = ledger.attempts()
    devices = attempts[-1].devices if attempts and attempts[-1].devices else run.config.cluster.least_workers
    known, unknown = 0.0, []
    current: float | None = None
    for segment in run.segments():
        if segment.finished:
            continue
        here = segment.name == state.get("segment")
        recent = state.get("recent_step_seconds") if here else None
        rate = recent or _seconds_a_step([one for one in attempts if one.segment == segment.name])
        done = state["step"] if here else max((one.last for one in attempts if one.segment == segment.name), default=0)
        left = _left(segment, done, rate, ledger.segment_hours(segment.name), devices)
        current = left if here else current
        if left is None:
            unknown.append(segment.name)
        else:
            known += left
    budget = ledger.summary(run.config.budget_gpu_hours).left
    seconds = None if budget is None else max(0.0, budget) * 3600 / devices
    if seconds is not None and seconds >= known and not unknown:
        seconds = None
    return Remaining(current, known, tuple(unknown), seconds)


def _left(segment: Segment, done: int, rate: float | None, used: float, devices: int) -> float | None:
    """Seconds until the steps are made or the hours are used, whichever is first."""
    stage, ends = segment.stage, []
    if stage.gpu_hours is not None:
        ends.append(max(0.0, stage.gpu_hours - used) * 3600 / devices)
    if rate is not None and stage.duration.steps is not None:
        ends.append(max(0, segment.last_step - done) * rate)
    return min(ends, default=None)


def _seconds_a_step(attempts: list[AttemptRecord]) -> float | None:
    """Mean of what was preserved, waiting and saves included; None before there are steps."""
    steps = max((one.last for one in attempts), default=0) - min((one.first for one in attempts), default=0)
    if not steps:
        return None
    spent = (sum(one.hours[key] for key in _OF_STEPS) * 3600 / one.devices for one in attempts if one.devices)
    return sum(spent) / steps


_OF_STEPS = ("productive", "waiting", "checkpointing", "sampling")


def span(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    for unit, of, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= of:
            rest = int(seconds % of // part)
            return f"{int(seconds // of)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
