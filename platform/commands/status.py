"""Where a run is, from its folder alone."""

import json
import math
import shlex
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from domainshuttle.pipelines.errors import counted
from domainshuttle.platform.checkpoint.backend import STORE_FAULTS
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, UnfinishedCheckpoint
from domainshuttle.platform.console import console
from domainshuttle.platform.report.text import Advice, Prose, Records, headline
from domainshuttle.platform.run.eta import remaining, span
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.journal import FAILED, MOVED, WAITING, Journal
from domainshuttle.platform.run.ledger import CATEGORIES, AttemptRecord, Ledger
from domainshuttle.platform.run.lock import HOLDER_NAME, PATIENCE_SECONDS
from domainshuttle.platform.run.segments import End, Segment
from domainshuttle.platform.run.workers import SLOW, WorkerState, attempts, beat_seconds, read_workers

_MOST_ATTEMPTS = 20
"""Attempts that are listed: the newest."""
_SPOOL_BYTES = 1 << 16
"""What waits of a run at work when its server answers is less."""


def status_record(folder: Path) -> dict[str, Any]:
    """What `print_status` prints, for programs: JSON-ready. Times are in seconds since 1970, or as their names say."""
    run = find_run(folder)
    state, alive, ledger = _read_state(run, tell=False), driver_lives(run), Ledger(run.ledger_path)
    word, why = run_state(run, state, alive)
    hours = ledger.summary(run.config.budget_gpu_hours)
    left = remaining(run, state, ledger) if state else None
    number = max(attempts(run), default=0)
    try:
        checkpoints = CheckpointStore.of(run.config, run.folder).list()
    except STORE_FAULTS:
        checkpoints = []
    whole = [found for _, found in checkpoints if isinstance(found, Checkpoint)]
    at = {segment.name: _reached(segment, state, whole) for segment in run.segments()}
    return {
        "run": run.config.name,
        "folder": str(run.folder),
        "state": word,
        "why": why,
        "attempt": number,
        "stages": [
            {
                "stage": segment.name,
                "finished": segment.finished,
                "step": at[segment.name],
                "steps": segment.stage.duration.steps,
                "checkpoint": last.where if (last := _newest(segment, whole)) else None,
                "checkpoint_step": last.state.step if last else None,
            }
            for segment in run.segments()
        ],
        "segment": state.get("segment"),
        "heard": state.get("time"),
        "step_seconds": state.get("recent_step_seconds"),
        "metrics": {name: _finite(value) for name, value in state.get("metrics", {}).items()},
        "seconds_left": {"stage": left.stage, "known_stages": left.known, "budget": left.budget} if left else None,
        "workers": [{**asdict(worker), "log": str(run.folder / worker.log)} for worker in _workers(run, alive)],
        "notices": _notices(run)[-_MOST_NOTICES:],
        "device_hours": {name: getattr(hours, name) for name in ("used", *CATEGORIES, "budget")},
        "goodput": hours.goodput,
        "damaged_checkpoints": {name: str(found) for name, found in checkpoints if isinstance(found, CheckpointError)},
        "quarantined": run.quarantined(),
        "converted": _converted(run),
        "dropped_steps": {segment.name: len(run.dropped_steps(segment.name)) for segment in run.segments()},
        "unsent_bytes": run.unsent_bytes(),
        "next": run.train_command if not alive and word != "finished" else None,
    }


def _notices(run: Run) -> list[dict[str, Any]]:
    """What the driver has told people, without lines that are damaged."""
    lines = Journal(run.notices_path).read()[0]
    return [one for one in lines if isinstance(one.get("time"), int | float) and isinstance(one.get("text"), str)]


def _finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None


def _newest(segment: Segment, kept: list[Checkpoint]) -> Checkpoint | None:
    mine = [checkpoint for checkpoint in kept if checkpoint.state.segment == segment.name]
    return max(mine, key=lambda checkpoint: (checkpoint.state.line, checkpoint.state.step), default=None)


def _reached(segment: Segment, state: Mapping[str, Any], kept: list[Checkpoint]) -> int:
    """The steps that a segment has made."""
    if segment.finished:
        return segment.last_step
    if state.get("segment") == segment.name:
        return int(state["step"])
    last = _newest(segment, kept)
    return last.state.step if last else 0


def _converted(run: Run) -> dict[str, int]:
    """Samples whose pixels live encoding converted, by what was done."""
    lines = {(line.get("shard"), line.get("key"), line.get("reason")) for line in _lines(run.folder / "converted")}
    return dict(Counter(str(kind) for *_, kind in lines).most_common())


def print_status(folder: Path) -> None:
    """Prints stages, progress, last losses, checkpoints, device-hours by attempt and quarantine of a run."""
    run = find_run(folder)
    state = _read_state(run)
    alive = driver_lives(run)
    try:
        checkpoints = CheckpointStore.of(run.config, run.folder).list()
    except STORE_FAULTS as error:  # the rest is in the run's folder
        checkpoints = []
        console.print(Prose(f"The store of the checkpoints does not answer: {error}"))
    word, why = run_state(run, state, alive)
    console.print(Prose(f"Now: {word}{f', because: {why}' if why else ''}"))
    console.print(_stages(run, state, word, [found for _, found in checkpoints if isinstance(found, Checkpoint)]))
    ledger = Ledger(run.ledger_path)
    _print_progress(run, state, word, alive, ledger)
    _print_workers(run, alive)
    for notice in _notices(run)[-_MOST_NOTICES:]:
        if notice["text"] != why:
            console.print(Prose(f"{_date(notice['time'])} {notice['text']}"))
    _print_hours(run, ledger, alive)
    for name, found in checkpoints:
        if isinstance(found, UnfinishedCheckpoint):
            console.print(Prose(f"Being written, or left by a kill: {name}"))
        elif not isinstance(found, Checkpoint):
            console.print(Prose(f"Damaged, never chosen: {name}: {found}"))
    waiting = run.unsent_bytes()
    if waiting > _SPOOL_BYTES or (waiting and not alive):
        command = f"domainshuttle flush {shlex.quote(str(run.folder))}"
        console.print(Advice(f"{waiting:,} bytes of metrics wait for MLflow. Next:", command))
    if bad := run.quarantined():
        console.print(Prose(f"{counted(bad, 'sample')} in quarantine: see {run.folder / 'quarantine'}"))
    if converted := _converted(run):
        kinds = ", ".join(f"{count} {kind}" for kind, count in converted.items())
        console.print(Prose(f"Of its samples, by what was done to pixels: {kinds}: see {run.folder / 'converted'}"))
    for segment in run.segments():
        if dropped := run.dropped_steps(segment.name):
            where = run.dropped_path(segment.name, 0).parent
            verb, whose = ("was", "its") if len(dropped) == 1 else ("were", "their")
            steps = f"{counted(len(dropped), 'step')} of {segment.name} {verb}"
            console.print(Prose(f"{steps} dropped for {whose} loss: see {where}"))


def watch_status(folder: Path, seconds: float, as_json: bool = False) -> None:
    """Prints the status again and again, on a terminal in one place, until the run is at work no more.

    As JSON it is a line each time.
    """
    run = find_run(folder)
    while True:
        living = driver_lives(run)
        if as_json:
            sys.stdout.write(json.dumps(status_record(folder), allow_nan=False) + "\n")
            sys.stdout.flush()
        else:
            if console.is_terminal:
                console.clear()
            console.print(Prose(datetime.now().strftime("%Y-%m-%d %H:%M:%S"), style="dim"))
            print_status(folder)
        if not living:
            return
        time.sleep(seconds)


def run_state(run: Run, state: Mapping[str, Any], alive: bool) -> tuple[str, str]:
    """What the run is doing, in a word or two, and why: `state` is what rank 0 wrote last, `alive` whether its driver
    is at work."""
    left = [segment.name for segment in run.segments() if not segment.finished]
    if not left:
        return "finished", ""
    if not alive:
        return _ended(run, state, left)
    since = _driver_started(run)
    told = [line for line in _notices(run)
            if line.get("kind") in (FAILED, MOVED, WAITING) and line["time"] >= since]  # fmt: skip
    number = max(attempts(run), default=0)
    workers = _workers(run, alive)
    newest = max((worker.started for worker in workers), default=0.0)
    ended = bool(told) and told[-1]["kind"] != WAITING and told[-1]["time"] > newest
    if workers and not ended:
        if any(worker.ended is not None for worker in workers):
            return "ending", ""
        if any(worker.segment for worker in workers):
            return _at_work(run, state, workers)
    if not any(line["kind"] in (FAILED, MOVED) for line in told):
        return "starting", told[-1]["text"] if told else ""
    return f"starting again (attempt {number + (ended and bool(workers))})", told[-1]["text"]


def _ended(run: Run, state: Mapping[str, Any], left: Sequence[str]) -> tuple[str, str]:
    """How a run ended whose driver is gone, of which some stages are left, and why."""
    if end := run.read_end():
        if end["how"] == "finished":  # of a part of the schedule (train --stage)
            return "stopped", f"the stage that was asked for is finished; left: {', '.join(left)}"
        return str(end["how"]), str(end["error"])
    if not state and not started(run):
        return "not begun", ""
    last = state.get("state", "training")
    if last in _LAST_ENDS:
        return last, ""
    told = "" if last == "training" or last in set(End) else f"; worker 0 ended with {headline(last)}"
    return "probably dead", f"its driver recorded no result{told}"


_LAST_ENDS = (End.STOPPED, End.BUDGET_SPENT, End.DIVERGED, End.UNSAVED)
"""Ends of the workers after which their driver starts no others."""


def _at_work(run: Run, state: Mapping[str, Any], workers: Sequence[WorkerState]) -> tuple[str, str]:
    """What workers do of which none has ended; what they wait for where one is silent, or no step is made."""
    heard = max(worker.beat for worker in workers)
    quiet = max(_QUIET_SECONDS, 3 * beat_seconds(workers[0].world_size))
    if silent := [worker for worker in workers if heard - worker.beat > quiet]:
        who = ", ".join(worker.name for worker in silent[:_MOST_WORKERS])
        ranks = ", ".join(str(worker.rank) for worker in silent[:_MOST_WORKERS])
        return f"waiting for worker{'s' if len(silent) > 1 else ''} {ranks}", (
            f"{who} sent no heartbeat for {span(heard - min(worker.beat for worker in silent))}: stopped, or the "
            f"machine does not answer. The workers start again after {span(run.config.guard.hang_seconds)} without a "
            "step"
        )
    still = time.time() - max(worker.since for worker in workers)
    computing = all(worker.doing not in ("checkpointing", "sampling", "starting") for worker in workers)
    if computing and (pace := state.get("recent_step_seconds")) and still > max(_STILL_SECONDS, _STILL_STEPS * pace):
        return "making no step", (
            f"for {span(still)} no worker has got further, and a step took {pace:.3g} s. Where they are: domainshuttle "
            f"stacks {shlex.quote(str(run.folder))}. They start again after {span(run.config.guard.hang_seconds)}"
        )
    doing = next((worker.doing for worker in workers if worker.rank == 0), "training")
    return {"checkpointing": "saving", "sampling": "sampling", "starting": "starting"}.get(doing, "training"), ""


_QUIET_SECONDS, _STILL_SECONDS, _STILL_STEPS = 10.0, 60.0, 10
"""Without a heartbeat for so long a worker is named; without a step for so long, or so many steps, it is said."""


def _driver_started(run: Run) -> float:
    """When the process that trains the run began, in seconds since 1970; 0: not known."""
    try:
        return float(json.loads((run.folder / HOLDER_NAME).read_text())["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _workers(run: Run, alive: bool) -> list[WorkerState]:
    """The workers of the newest attempt; of a run at work only those that its driver has started."""
    since = _driver_started(run) if alive else 0.0
    return [worker for worker in read_workers(run, max(attempts(run), default=0)) if worker.started >= since]


def started(run: Run) -> bool:
    """Whether workers were ever asked for."""
    return bool(attempts(run))


def _print_workers(run: Run, alive: bool) -> None:
    """Who the workers of the newest attempt are, what each does, and where its log is."""
    number = max(attempts(run), default=0)
    workers = _workers(run, alive)
    if not workers or (not alive and all(segment.finished for segment in run.segments())):
        return
    rows = [
        [
            str(worker.rank),
            worker.host,
            str(worker.pid),
            worker.node[:8],
            worker.place,
            f"{span(max(0.0, time.time() - worker.beat))} ago",
            worker.log,
        ]
        for worker in workers[:_MOST_WORKERS]
    ]
    fields = ("rank", "machine", "process", "node", "doing", "last update", "log")
    console.print(Records(fields, rows, f"Workers of attempt {number}", ["rank", "process"]))
    if len(workers) > _MOST_WORKERS:
        console.print(
            Prose(f"{counted(len(workers) - _MOST_WORKERS, 'more worker')}: see {run.worker_path(number, 0).parent}")
        )
    console.print(Advice("What they printed:", f"domainshuttle logs {shlex.quote(str(run.folder))}"))


_MOST_WORKERS, _MOST_NOTICES = 16, 3


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%m-%d %H:%M:%S")


def _read_state(run: Run, tell: bool = True) -> dict[str, Any]:
    """What rank 0 wrote last; empty before it did, and where that is not of this version or of these stages, which is
    told."""
    state: object = run.read_progress()
    if isinstance(state, dict) and (not state or _is_state(state, [segment.name for segment in run.segments()])):
        return state
    if tell:
        console.print(
            Prose(
                f"{run.progress_path} is left out: it was written by another version, or for a stage that is not in "
                f"{run.config_path}."
            )
        )
    return {}


def _is_state(state: dict[str, Any], segments: Sequence[str]) -> bool:
    metrics, numbers = state.get("metrics"), [state.get("step"), state.get("time")]
    return (
        state.get("segment") in segments
        and isinstance(state.get("state"), str)
        and isinstance(metrics, dict)
        and all(isinstance(number, int | float) for number in [*numbers, *metrics.values()])
    )


def driver_lives(run: Run) -> bool:
    """Whether the driver is at work: its process where it runs on this machine, else its last sign of life."""
    try:
        holder = json.loads((run.folder / HOLDER_NAME).read_text())
        if holder["host"] == socket.gethostname():
            return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1.0
        return time.time() - float(holder["beat"]) < PATIENCE_SECONDS
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):  # no driver, or one that is just ending
        return False


def _stages(run: Run, state: dict[str, Any], now: str, kept: list[Checkpoint]) -> Records:
    rows = []
    for segment in run.segments():
        last = _newest(segment, kept)
        here = state if state.get("segment") == segment.name else None
        if segment.finished:
            doing = "finished"
        elif here:
            doing = now.partition(" (")[0]  # what the run does, not what a worker said last of another's end
        else:
            doing = "stopped" if last else "not begun"
        rows.append(
            [
                segment.name,
                headline(doing),
                f"{_reached(segment, state, kept)} of {_end(run, segment)}",
                _losses(here["metrics"] if here else {}),
                f"step {last.state.step}" if last else "none",
                f"{last.size / 2**20:.1f} MiB" if last else "",
            ]
        )
    fields = ("stage", "state", "steps", "last losses", "last checkpoint", "size")
    return Records(fields, rows, f"Run {run.config.name} ({run.folder})", styles=_STYLES)


_STYLES = {"finished": "green", "training": "cyan", "running": "cyan", "probably dead": "red"}


def _losses(metrics: dict[str, float]) -> str:
    """The whole loss, and its parts where it has more than one."""
    parts = [f"{name.removeprefix('loss/')} {metrics[name]:.4f}" for name in _LOSSES if name in metrics]
    whole = f"{metrics['loss']:.4f}" if "loss" in metrics else ""
    return f"{whole} ({', '.join(parts)})" if len(parts) > 1 else whole


_LOSSES = ("loss/flow", "loss/cross_pair")


def _end(run: Run, segment: Segment) -> str:
    """Where a stage ends: at a step, or only when its hours are used."""
    if segment.stage.duration.steps is None and not segment.finished:
        return f"those in {segment.stage.gpu_hours:g} {run.config.cluster.hours}"
    return str(segment.last_step)


def _print_progress(run: Run, state: dict[str, Any], word: str, alive: bool, ledger: Ledger) -> None:
    if word == "finished":
        return
    heard = f"Last update {span(max(0.0, time.time() - state['time']))} ago" if state else ""
    if not alive:
        console.print(Advice(f"{heard}. Next:" if heard else "Next:", run.train_command))
        return
    if not state or run.segment(state["segment"]).finished:
        return
    left = remaining(run, state, ledger)
    stage = f"about {span(left.stage)} left" if left.stage is not None else "the time left is not known yet"
    schedule = ""
    if len(run.segments()) > 1:
        schedule = f"; of the whole schedule {'at least' if left.unknown else 'about'} {span(left.known)}"
        if others := [name for name in left.unknown if name != state["segment"]]:
            schedule += f" (how long {', '.join(others)} will take is not known before the first steps)"
    budget = f". The budget is spent in about {span(left.budget)}" if left.budget is not None else ""
    console.print(Prose(f"{heard}. Stage {state['segment']}: {stage}{schedule}{budget}."))
    if pace := _pace(state):
        console.print(Prose(pace))


def _pace(state: Mapping[str, Any]) -> str:
    """What a step takes, and which worker the others wait for; empty before steps are known."""
    metrics, rate = state["metrics"], state.get("recent_step_seconds")
    if rate is None:
        return ""
    named, ranks = [], state.get("ranks", {})
    if (share := ranks.get("slowest_share", 1.0)) < SLOW:
        named.append(f"worker {ranks['slowest_rank']} computes at {share:.0%} of the others' rate")
    if (lag := metrics.get("speed/slowest_rank_lag_s", 0.0)) > _LAG * rate:
        named.append(f"worker {metrics['speed/slowest_rank']:.0f} is the last, by {lag:.3g} s a step")
    alike = ["all workers are equally fast"] if "speed/slowest_rank" in metrics else []
    rates = ", ".join(text.format(metrics[name]) for name, text in _RATES.items() if name in metrics)
    step = f"A step takes {rate:.3g} s{f' ({rates})' if rates else ''}"
    return "; ".join([step, *(named or alike)]) + "."


_RATES = {
    "tokens/s/device": "{:,.0f} tokens/s a device",
    "mfu": "MFU {:.1%}",
    "data_wait_fraction": "{:.1%} of the time waiting for data",
}
"""Of the metrics of the last logged steps, as Prometheus has them too."""


_LAG = 0.05
"""Share of a step by which a worker is late before it is named."""


def _print_hours(run: Run, ledger: Ledger, alive: bool) -> None:
    hours = ledger.summary(run.config.budget_gpu_hours)
    attempts = ledger.attempts()
    listed = [one for one in attempts[-_MOST_ATTEMPTS:] if one.devices]
    causes = [line for line in _notices(run) if line.get("kind") == FAILED and "cause" in line]
    rows = [_attempt(one, one is attempts[-1] and alive, _cause(one, attempts, causes)) for one in listed]
    columns = ("stage", "steps", "workers", "began", "used", *CATEGORIES, "ended")
    title, numeric = "Attempts at each stage, in seconds of the wall clock", columns[2:3] + columns[4:-1]
    console.print(Records(columns, rows, title, numeric, _STYLES, heads=2))
    if not attempts and run.read_progress():  # workers note a start before their first step
        console.print(
            Prose(
                f"{run.ledger_path} has no attempt that can be read, though steps were made: their hours are those "
                "that the newest checkpoint knows, which the next start takes"
            )
        )
    if earlier := [one for one in attempts if one not in listed]:
        used = sum(sum(one.hours.values()) for one in earlier)
        known = counted(len(earlier), "earlier attempt") if all(one.devices for one in earlier) else "Earlier attempts"
        console.print(Prose(f"{known} used {used:.3f} device-hours: see {run.ledger_path}"))
    budget = "" if hours.left is None else f", {max(0.0, hours.left):.3f} of the budget's {hours.budget:g} left"
    parts = ", ".join(f"{_PARTS.get(name, name)} {getattr(hours, name):.3f}" for name in CATEGORIES)
    console.print(
        Prose(
            f"Device-hours: used {hours.used:.3f} = {parts}; {counted(hours.attempts, 'attempt')} at stages, "
            f"goodput {hours.goodput:.0%}{budget}."
        )
    )


_PARTS = {"waiting": "waiting for data"}


def _cause(one: AttemptRecord, attempts: Sequence[AttemptRecord], causes: Sequence[Mapping[str, Any]]) -> str | None:
    """What the driver found out of the end of an attempt, of which the ledger may have only what rank 0 saw of it."""
    following = next((other.began for other in attempts if other.began > one.began), math.inf)
    return next((str(line["cause"]) for line in causes if one.began <= line["time"] <= following), None)


def _attempt(one: AttemptRecord, running: bool, cause: str | None) -> Sequence[str]:
    seconds = {name: hours * 3600 / one.devices for name, hours in one.hours.items()}
    began = _date(one.began)
    # of many lines the first and the last; the ledger has all of them
    ended = headline(cause or one.reason) if one.reason is not None else "running" if running else "no last line"
    numbers = (sum(seconds.values()), *(seconds[name] for name in CATEGORIES))
    return one.segment, f"{one.first}-{one.last}", str(one.devices), began, *(f"{n:.1f}" for n in numbers), ended


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        yield from (line for line in Journal(path).read()[0] if isinstance(line, dict))
