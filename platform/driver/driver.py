"""The driver of a training run: opens run and tracking, follows the workers, and turns signals into a clean stop."""

import contextlib
import functools
import getpass
import importlib
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from domainshuttle.pipelines.errors import mask_secrets, without_user
from domainshuttle.pipelines.storage.uri import absolute
from domainshuttle.platform.checkpoint.resume import AUTO, NONE, begin, require_resumable
from domainshuttle.platform.checkpoint.store import CheckpointStore
from domainshuttle.platform.config.schema import ConfigError, HookEvent, RunConfig
from domainshuttle.platform.console import console, progress, say
from domainshuttle.platform.driver.preflight import require_data, require_model
from domainshuttle.platform.driver.ray_cluster import connected, training_needs
from domainshuttle.platform.driver.recovery import recover_run
from domainshuttle.platform.driver.run_metrics import DriverMetrics
from domainshuttle.platform.engine.deepspeed_config import deepspeed_configs
from domainshuttle.platform.output import reader_gone
from domainshuttle.platform.run.eta import span
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger, LedgerSummary
from domainshuttle.platform.run.lock import RunLock, RunLockedError
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.tracking.hooks import Hooks
from domainshuttle.platform.tracking.mlflow import NOTE_TAG, RunIds, Tracker, open_schedule, page_of, preload

if TYPE_CHECKING:
    from domainshuttle.platform.driver.schedule_loop import Outcome

HOOKS_SECONDS = 60.0
"""How long the end of a run waits until all hooks are told."""

STOPPED = 3
"""Exit code of a run that was stopped, by a person or by its budget, and can be resumed."""


def train_run(config: RunConfig, fresh: bool = False, stage: str | None = None, resume: str = AUTO) -> int:
    """Makes or resumes a run and trains what is left of it, as the only driver of it; returns the exit code.

    `resume` is `auto`, a checkpoint's name, path or URI, or `none` (resume.py). Nothing is removed for `fresh` before
    all else is checked and the cluster is there. Raises RunLockedError when there is another driver.
    """
    _require_ray_train()
    require_data(config)
    chosen = Run(config).choose(stage)
    if fresh:
        _require_nothing_of_it(Run(config), chosen, resume)
    else:
        require_resumable(Run(config), CheckpointStore.of(config), resume, chosen)
    with RunLock(config.run_folder, say) as lock, contextlib.ExitStack() as stack:
        if not fresh:
            Run(config).require_same_configuration()
        stack.enter_context(connected(config, training_needs(config), meanwhile=functools.partial(_load, config)))
        from domainshuttle.platform.driver.group_size import require_room  # which imports Ray

        require_room(config)
        return run_training(prepare_run(config, fresh), lock, fresh, stage, resume)


def _require_ray_train() -> None:
    """Raises ConfigError where the environment chooses the Ray Train of before, which has other workers."""
    if os.environ.get("RAY_TRAIN_V2_ENABLED", "1").lower() not in ("1", "true"):
        raise ConfigError(
            f"RAY_TRAIN_V2_ENABLED={os.environ['RAY_TRAIN_V2_ENABLED']} is set, and training needs Ray Train's second "
            "version, which is its default: unset it"
        )


def _load(config: RunConfig) -> None:
    """Checks the model and imports what the driver needs, while Ray starts: each takes seconds."""
    require_model(config)
    preload()
    importlib.import_module("domainshuttle.platform.driver.schedule_loop")


def _require_nothing_of_it(run: Run, chosen: list[Segment], resume: str) -> None:
    """Raises ConfigError where a run shall be removed and yet something of it is to be used."""
    before = [segment.name for segment in run.segments() if chosen[0].origin == str(segment.weights)]
    if before:
        raise ConfigError(
            f"--fresh removes the weights of stage {before[0]}, with which stage {chosen[0].name} begins: leave out "
            f"--stage, or --fresh (--stage {chosen[0].name} --resume none begins this stage anew)"
        )
    place = str(absolute(resume))
    inside = [str(run.folder), *([run.config.checkpoint.store] if run.config.checkpoint.store else [])]
    if resume not in (AUTO, NONE) and ("/" not in resume or any(place.startswith(f"{one}/") for one in inside)):
        raise ConfigError(f"--fresh removes what --resume {resume} is to go on from: give one of them")


def prepare_run(config: RunConfig, fresh: bool = False) -> Run:
    """The run on disk, made or resumed; its lock is held. Raises ConfigError for another run of this name."""
    run = Run.open(config, fresh)
    if not fresh:
        recover_run(run, say)
    elif config.checkpoint.store:
        # in a store of its own the checkpoints outlive the run's folder: nothing goes on from them
        for segment in run.segments():
            begin(CheckpointStore.of(config), segment.name, NONE, None)
    return run


def run_training(run: Run, lock: RunLock, fresh: bool, stage: str | None, resume: str) -> int:
    """Trains what is left of a run, or of one stage, on the connected cluster; returns the exit code. `fresh` and
    `resume` are what the command was given: with these it would not go on where it was."""
    config = run.config
    ids = run.read_ids()
    tracker = open_schedule(
        config.tracking_uri,
        config.tracking.experiment,
        config.name,
        params=config.flattened(),
        tags=describe_origin(config),
        spool=run.spool,
        artifacts=[run.config_path, *write_deepspeed_configs(run)],
        ids=RunIds.from_dict(ids, config.tracking_uri) if ids else None,
    )
    run.write_ids(tracker.ids.to_dict())
    if told := other_tracking(config):
        say(told)
    hooks = Hooks(run, say, lambda: page_of(tracker.ids))
    for text in hooks.missing():
        say(text)
    began, since = time.monotonic(), time.time()

    metrics = DriverMetrics(run)

    def watch() -> None:
        lock.check()
        metrics.update()
        _show_progress(run, show, since)

    from domainshuttle.platform.driver.schedule_loop import DivergedError, Schedule

    with contextlib.closing(metrics), _StopOnSignal(run), progress("Training", "steps") as show:
        try:
            outcome = Schedule(run, tracker, watch, say, hooks.tell).train(stage, resume)
        except RunLockedError:
            raise  # ledger and tracking are the other driver's now
        except BaseException as error:
            run.note_end("diverged" if isinstance(error, DivergedError) else "failed", error)
            if not isinstance(error, KeyboardInterrupt):
                hooks.tell(failure_events(error), f"The run ended: {error}", error=type(error).__name__)
            with contextlib.suppress(OSError):  # of a full disk: people are told, and the next start tells the books
                Ledger(run.ledger_path).end_open(f"{type(error).__name__}")
                track_hours(run, tracker)
                tracker.fail(error)
            hooks.close(HOOKS_SECONDS)
            raise
    again = run.train_command if fresh or resume != AUTO else ""
    return _end_run(run, tracker, hooks, outcome, time.monotonic() - began, again)


def _end_run(run: Run, tracker: Tracker, hooks: Hooks, outcome: "Outcome", seconds: float, again: str) -> int:
    """Ends books and tracking of a schedule that no error ended, and says what is next; returns the exit code. `again`
    is the command that goes on; empty: the same."""
    config, left = run.config, [segment.name for segment in run.segments() if not segment.finished]
    whole = outcome == "finished" and not left
    run.note_end(outcome)
    summary = track_hours(run, tracker)
    delivered = tracker.finish("FINISHED" if whole else "KILLED")
    say(
        f"{outcome.capitalize()} after {seconds:.0f} s; device-hours used {summary.used:.3f}, of these productive "
        f"{summary.goodput:.0%}. Run folder: {run.folder}"
    )
    if not delivered:
        console.print(
            f"MLflow at {mask_secrets(config.tracking_uri)} does not have everything yet; the rest waits in "
            f"{run.spool}. When it answers again: domainshuttle flush {shlex.quote(str(run.folder))} (this command "
            "would send it too)",
            markup=False,
        )
    budget, hours = config.budget_gpu_hours or 0.0, config.cluster.hours
    if whole:
        hooks.tell(("finished",), f"The run is finished, after {summary.used:.3f} {hours} in all")
    if outcome == "budget spent":
        hooks.tell(("budget",), f"The budget of {budget:g} {hours} is spent; the run can go on with more")
    hooks.close(HOOKS_SECONDS)
    if page := page_of(tracker.ids):
        console.print(f"MLflow's page of the run: {page}", markup=False)
    console.print(_next(run, outcome, left, again), markup=False)
    return 0 if outcome == "finished" else STOPPED


def _next(run: Run, outcome: "Outcome", left: list[str], again: str) -> str:
    """What a person can do next, of a run in which some segments may be left."""
    config = run.config
    if outcome == "budget spent":
        budget = config.budget_gpu_hours or 0.0
        return (
            f"The budget of {budget:g} {config.cluster.hours} is spent; the newest checkpoint is whole. To go on with "
            f"it, raise the budget: --set budget_gpu_hours={2 * budget:g}"
        )
    if outcome == "stopped":
        return f"To go on with the newest checkpoint: {again}" if again else _SAME_COMMAND
    if left:
        return f"Next: the stages that are left, {', '.join(left)}"
    return (
        f"Next: domainshuttle export {shlex.quote(str(run.folder))} exported, and domainshuttle compare "
        f"{shlex.quote(config.tracking.experiment)} --uri {shlex.quote(mask_secrets(config.tracking_uri))}"
    )


_SAME_COMMAND = "The same command goes on with the newest checkpoint."


def other_tracking(config: RunConfig) -> str | None:
    """What to tell people where MLflow's own variable names another server or store than a run is tracked at."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "").strip().rstrip("/")
    if not named or named == config.tracking_uri.rstrip("/"):
        return None
    shown = without_user(named)
    return (
        f"This run is tracked at {mask_secrets(config.tracking_uri)}; MLFLOW_TRACKING_URI={shown} in the environment "
        f"is left aside. To use it: --set tracking.uri={shlex.quote(shown)}"
    )


def failure_events(error: BaseException) -> tuple[HookEvent, ...]:
    """What hooks may call the end of a run by an error, the most telling first."""
    from domainshuttle.platform.driver.schedule_loop import DivergedError, WorkersFailedError

    if isinstance(error, DivergedError):
        return "diverged", "failed"
    return ("hung", "failed") if isinstance(error, WorkersFailedError) and error.hung else ("failed",)


def track_hours(run: Run, tracker: Tracker) -> LedgerSummary:
    """Tells the tracking of every device-hour, also of those since the last logged step: each segment of its own, the
    schedule of all, each at its last step; and the ledger itself."""
    ledger = Ledger(run.ledger_path)
    summary, attempts = ledger.summary(run.config.budget_gpu_hours), ledger.attempts()
    if attempts:
        for segment in run.segments():
            if mine := [one.last for one in attempts if one.segment == segment.name]:
                tracker.log(ledger.segment_summary(segment.name).metrics(), max(mine), segment.name, last=True)
            if segment.name == attempts[-1].segment:
                tracker.log(summary.metrics(), run.step_in_schedule(segment, max(mine)), last=True)
        tracker.artifact(run.ledger_path)
    return summary


def write_deepspeed_configs(run: Run) -> list[Path]:
    """What the engine derives for DeepSpeed, for people: a JSON file a stage in the run's folder."""
    folder = run.folder / "deepspeed"
    folder.mkdir(exist_ok=True)
    paths = []
    for stage, content in deepspeed_configs(run.config).items():
        paths.append(folder / f"{stage}.json")
        paths[-1].write_text(json.dumps(content, indent=2))
    return paths


def describe_origin(config: RunConfig) -> dict[str, str]:
    """Tags that say what made a run: code, configuration, job, machines, base."""
    import ray  # here: it reads its settings (cluster/local.quiet_ray) when it is imported

    tags = {
        "domainshuttle.version": importlib.metadata.version("domainshuttle"),
        "mlflow.source.git.commit": _git_commit(),
        "config.digest": config.digest(),
        "ray.job_id": ray.get_runtime_context().get_job_id() if ray.is_initialized() else "",
        "ray.submission_id": _submission_id(),
        "cluster.workers": str(config.cluster.workers),
        "base": ", ".join(expert.base or "new" for expert in config.experts) or config.model.base or "new",
        # by MLflow's names: what its pages show of a run beside its curves
        "mlflow.user": _user(),
        "mlflow.source.name": "domainshuttle train",
        "mlflow.source.type": "JOB" if _submission_id() else "LOCAL",
        NOTE_TAG: describe_commands(Run(config)),
    }
    return {name: value for name, value in tags.items() if value}


def describe_commands(run: Run) -> str:
    """What MLflow's page of a run says of it, in Markdown: the commands that look at it, stop it and go on."""
    quoted = shlex.quote(str(run.folder))
    return (
        f"What it does now, and why: `domainshuttle status {quoted}`; what a worker printed: `domainshuttle logs "
        f"{quoted}`; a stop with a checkpoint: `domainshuttle stop {quoted}`; to go on: `{run.train_command}`"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a number without a name, as in many containers
        return ""


def _submission_id() -> str:
    """By which `ray job` knows this command; empty where it is no job."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        return ""


def _git_commit() -> str:
    """The commit of this code, where it runs from a checkout of its own; else empty.

    git looks upwards for a repository, and an installed package often lies in one of somebody else's.
    """
    root = Path(__file__).resolve().parents[2]
    # a hook, for example, names another repository to all programs that it starts
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def ask(*question: str) -> str:
        command = ["git", "-C", str(root), *question]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True, env=environment
        ).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        return ask("rev-parse", "HEAD") if Path(ask("rev-parse", "--show-toplevel")).samefile(root) else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def _show_progress(run: Run, show: Callable[..., None], since: float) -> None:
    """Moves the bar to where rank 0 says the segment is, but for what it said before its workers ended, or before this
    driver began, `since` then."""
    told = run.notices_path.stat().st_mtime if run.notices_path.exists() else 0.0
    if (state := run.read_progress()) and state["time"] > max(told, since):
        show(state["step"], state["steps"], f"of {state['segment']} {_figures(state)}".rstrip())


def _figures(state: Mapping[str, Any]) -> str:
    """The newest numbers of a run, for a line of progress; beside a bar there is room for few."""
    metrics = state["metrics"]
    if "loss" not in metrics:
        return ""
    figures = [f"loss {metrics['loss']:.4f}", f"{metrics['step_seconds']:.3g} s a step"]
    if not console.is_terminal:
        figures.insert(1, f"learning rate {metrics['learning_rate']:.3g}, gradient norm {metrics['grad_norm']:.3g}")
        figures.append(f"{metrics['tokens/s/device']:,.0f} tokens/s a device")
        if (rate := state.get("recent_step_seconds")) and state["steps"] > state["step"]:
            figures.append(f"about {span((state['steps'] - state['step']) * rate)} left in this stage")
    return ", ".join(figures)


class _StopOnSignal:
    """While active, the first SIGINT or SIGTERM asks the workers for a checkpoint; a second one ends the driver."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.run.stop_path.exists():
            raise KeyboardInterrupt
        self.run.stop_path.touch()
        if not reader_gone():
            say("Stopping: workers that are at work write a checkpoint after this step. Again to stop at once.")
