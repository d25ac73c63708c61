"""The schedule of a run: its folder, its segments, and where each of them starts.

A run is a folder. Everything that survives a stop is in it, and its name is its identity: starting the same
configuration again goes on with it. A segment (a stage of the configuration) is finished when its weights are exported;
the next one begins with these.
"""

import contextlib
import itertools
import json
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.errors import mask_secrets
from domainshuttle.pipelines.plan.step_plan import ORDER_VERSION
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.loading import read_config
from domainshuttle.platform.config.schema import (
    ConfigError,
    ExpertSection,
    RunConfig,
    differences,
)
from domainshuttle.platform.run.journal import Journal
from domainshuttle.platform.run.lock import HOLDER_NAME, LOCK_NAME
from domainshuttle.platform.run.segments import Segment, read_number
from domainshuttle.platform.run.weights_digest import Fingerprints

logger = logging.getLogger(__name__)


class Run:
    """A run on disk. `open` makes or resumes it, `find_run` finds one in a folder."""

    def __init__(self, config: RunConfig, folder: Path | None = None) -> None:
        """`folder` is where it lies, if that is not where its configuration says."""
        self.config = config
        self.folder = folder or config.run_folder

    @classmethod
    def open(cls, config: RunConfig, fresh: bool = False) -> "Run":
        """Makes the run's folder, or resumes it.

        Raises ConfigError when a run of this name was made with another configuration, naming the keys that differ.
        """
        run = cls(config)
        if fresh and run.folder.exists():
            for path in run.folder.iterdir():
                if path.name in (LOCK_NAME, HOLDER_NAME):
                    continue  # of the driver that asks for this
                # a link to a folder elsewhere goes, and what is there stays
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        run.require_same_configuration()
        for part in ("consumed", "quarantine", "converted", "dropped", "weights", "checkpoints"):
            (run.folder / part).mkdir(parents=True, exist_ok=True)
        content = config.to_yaml()
        if not run.config_path.exists() or run.config_path.read_text() != content:
            write_bytes(run.config_path, content.encode())
        for request in (run.stop_path, run.regroup_path, run.end_path):
            request.unlink(missing_ok=True)
        return run

    def require_same_configuration(self) -> None:
        """Raises ConfigError, with the keys that differ, where a run of this name has another configuration."""
        if not self.config_path.exists():
            return
        saved = read_config(self.config_path)
        if saved.digest() != self.config.digest():
            raise ConfigError(
                f"run {self.config.name!r} in {self.folder} was started with another configuration: "
                f"{differences(saved.decisive(), self.config.decisive())}. Give this one a name of its own (--set "
                f"name={self.next_name()}), to go on from a checkpoint of the other with --resume PATH besides; or "
                "start it anew with --fresh"
            )

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def train_command(self) -> str:
        """The command line that goes on with it, where it lies; its folder must have its name, by which it is known."""
        there = self.folder.with_name(self.config.name)
        rename = "" if there == self.folder else f"mv {shlex.quote(str(self.folder))} {shlex.quote(str(there))} && "
        output = str(there.parent)
        moved = "" if output == read_config(self.config_path).output else f" --set output={shlex.quote(output)}"
        return f"{rename}domainshuttle train {shlex.quote(str(there / 'config.yaml'))}{moved}"

    def next_name(self) -> str:
        """A name for a run beside it that goes on from it: the first of `name-2`, `name-3` and so on that is free."""
        names = (f"{self.config.name}-{number}" for number in itertools.count(2))
        return next(name for name in names if not self.folder.with_name(name).exists())

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def spool(self) -> Path:
        """Metrics on their way to MLflow."""
        return self.folder / "spool"

    @property
    def progress_path(self) -> Path:
        """Where the run is, for people: written by rank 0, small, and never needed to resume."""
        return self.folder / "progress.json"

    @property
    def starts_path(self) -> Path:
        """How long the parts of each start of the workers took, a line a start."""
        return self.folder / "starts.jsonl"

    @property
    def notices_path(self) -> Path:
        """What the driver has told people, a line each."""
        return self.folder / "notices.jsonl"

    @property
    def fingerprints_path(self) -> Path:
        """Digests of weights, so that they are not read whole at every start."""
        return self.folder / "fingerprints.json"

    @property
    def fingerprints(self) -> Fingerprints:
        """What the run remembers of the weights and corpora that it has read."""
        return Fingerprints(self.fingerprints_path)

    @property
    def failed_checkpoints_path(self) -> Path:
        """Checkpoints that could not be written, with the reason, a line each."""
        return self.folder / "failed_checkpoints.jsonl"

    @property
    def scores_path(self) -> Path:
        """What generated clips scored, a line a measuring: segment, step, and means by metric."""
        return self.folder / "scores.jsonl"

    def note_scores(self, segment: str, step: int, values: Mapping[str, float]) -> None:
        """Notes the means of a measuring, for the driver's metrics; their bounds and counts are MLflow's alone."""
        means = {name: value for name, value in values.items() if name.rpartition("_")[2] not in _BESIDE_MEANS}
        with contextlib.suppress(OSError):  # of a full disk: MLflow has them too
            line = {"segment": segment, "step": step, "values": means, "time": time.time()}
            Journal(self.scores_path).append([line])

    def plan_path(self, segment: str) -> Path:
        """What a segment's plan is made of: shares of sources and buckets, passes, tokens."""
        return self.folder / "plans" / f"{segment}.json"

    def order_path(self, segment: str) -> Path:
        """The version of the data order that a segment is trained in."""
        return self.folder / "orders" / f"{segment}.txt"

    def order_version(self, segment: str) -> int:
        """The version of the data order that a segment is, was or will be trained in; before versions were noted, it
        was the first."""
        path = self.order_path(segment)
        if path.exists():
            return read_number(path)
        return 1 if self.consumed_path(segment, 0).exists() else ORDER_VERSION

    def note_order(self, segment: str, version: int) -> None:
        """Notes the version of the data order, before a segment is trained in it."""
        self.order_path(segment).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.order_path(segment), str(version).encode())

    @property
    def stop_path(self) -> Path:
        """A file that asks the workers to write a checkpoint and stop."""
        return self.folder / "stop"

    @property
    def end_path(self) -> Path:
        """How the last driver ended."""
        return self.folder / "end.json"

    @property
    def regroup_path(self) -> Path:
        """A file that asks the workers to write a checkpoint and end, since there is room for more of them."""
        return self.folder / "regroup"

    def report_path(self, number: int) -> Path:
        """Ray's own report of the nth fault that ended a worker group."""
        return self.folder / "faults" / f"fault-{number:04d}.txt"

    def worker_path(self, attempt: int, rank: int) -> Path:
        """The newest sign of life of a worker (workers.py)."""
        return self.folder / "workers" / f"attempt-{attempt:04d}" / f"rank{rank:05d}.json"

    def worker_log_path(self, attempt: int, rank: int) -> Path:
        """What a worker printed."""
        return self.folder / "logs" / f"attempt-{attempt:04d}" / f"rank{rank:05d}.log"

    def consumed_path(self, segment: str, rank: int) -> Path:
        """Which samples a rank trained on, a line a micro-batch."""
        return self.folder / "consumed" / f"{segment}.rank{rank:05d}.jsonl"

    def dropped_path(self, segment: str, rank: int) -> Path:
        """Steps that were not applied, with the reason and this rank's samples, a line a step."""
        return self.folder / "dropped" / f"{segment}.rank{rank:05d}.jsonl"

    def hang_path(self, segment: str, rank: int) -> Path:
        """Stacks of a worker that hung."""
        return self.folder / "hangs" / f"{segment}.rank{rank:05d}.txt"

    @property
    def encoders_path(self) -> Path:
        """Digests of the files of the encoders that live encoding began with."""
        return self.folder / "encoders.json"

    def noted_encoders(self) -> dict[str, str]:
        """What is in that file; nothing before live encoding's first start."""
        noted: dict[str, str] = _read_json(self.encoders_path, {})
        return noted

    def converted_path(self, segment: str, rank: int) -> Path:
        """Samples whose pixels live encoding converted, a line a sample and conversion."""
        return self.folder / "converted" / f"{segment}.rank{rank:05d}.jsonl"

    def quarantine_path(self, segment: str, rank: int) -> Path:
        return self.folder / "quarantine" / f"{segment}.rank{rank:05d}.jsonl"

    def segments(self) -> list[Segment]:
        """The schedule in order."""
        segments: list[Segment] = []
        experts: list[ExpertSection | None] = [*self.config.experts] or [None]
        origins = {expert: expert.base if expert else self.config.model.base for expert in experts}
        for stage in self.config.stages:
            for expert in experts:
                number = len(segments)
                seed = (self.config.seed << 8) + number
                name = stage.name if expert is None else f"{stage.name}-{expert.name}"
                weights = self.folder / "weights" / name
                segments.append(Segment(number, stage, expert, seed, weights, origins[expert]))
                origins[expert] = str(weights)
        return segments

    def segment(self, name: str) -> Segment:
        """The segment of a name; raises ConfigError that lists those there are."""
        for segment in self.segments():
            if segment.name == name:
                return segment
        raise ConfigError(f"run {self.config.name!r} has no stage {name!r}; it has {[s.name for s in self.segments()]}")

    def step_in_schedule(self, segment: Segment, step: int) -> int:
        """The schedule's own step: that of the segment, after the steps that the segments before it have."""
        before = (one for one in self.segments() if one.number < segment.number)
        return step + sum(one.last_step for one in before if one.finished or one.stage.duration.steps is not None)

    def reached_before(self, segment: str) -> int:
        """Steps of a segment that earlier attempts began, as far as rank 0's newest lines of samples tell."""
        path = self.consumed_path(segment, 0)
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            return 0
        reached = 0
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the first of the tail, or one torn by a kill
                reached = max(reached, int(json.loads(line)["step"]) + 1)
        return reached

    def choose(self, stage: str | None) -> list[Segment]:
        """The segments of one stage, or the one of that name; None: all. Raises ConfigError for a name of neither."""
        if stage is None:
            return self.segments()
        chosen = [s for s in self.segments() if stage in (s.name, s.stage.name)]
        return chosen or [self.segment(stage)]

    def skipped(self, segment: str) -> list[list[int]]:
        """The steps of a segment that are not trained on, since they made it diverge: one list a rollback."""
        path = self.folder / "passed_over" / f"{segment}.json"
        steps: list[list[int]] = _read_json(path, [])
        return steps

    def skip(self, segment: str, *rollbacks: list[int]) -> None:
        """Adds the steps of a rollback, or of several, to those that are skipped."""
        path = self.folder / "passed_over" / f"{segment}.json"
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, json.dumps([*self.skipped(segment), *rollbacks]).encode())

    def dropped_steps(self, segment: str) -> set[int]:
        """The steps of a segment whose gradients were thrown away, in any attempt."""
        lines = Journal(self.dropped_path(segment, 0)).read()[0]
        return {line["step"] for line in lines if isinstance(line.get("step"), int)}

    def quarantined(self) -> int:
        """Samples that could not be read: attempts and epochs meet the same sample again, which counts once."""
        found = set()
        for path in (self.folder / "quarantine").glob("*.jsonl"):
            for line in Journal(path).read()[0]:
                if isinstance(line, dict):
                    found.add((line.get("source"), line.get("shard"), line.get("key")))
        return len(found)

    def unsent_bytes(self) -> int:
        """Of what waits for MLflow."""
        return sum(Journal(path).unread() for path in self.spool.glob("*.jsonl"))

    def heard_from(self) -> float:
        """When the workers last left a trace, in seconds since 1970; 0: never."""
        traces = [float(self.read_progress().get("time", 0.0))]
        for path in (self.folder / "consumed").glob("*.jsonl"):
            with contextlib.suppress(OSError):
                traces.append(path.stat().st_mtime)
        return max(traces)

    def read_progress(self) -> dict[str, Any]:
        """What rank 0 wrote last of where the run is; empty before it did."""
        try:
            state: dict[str, Any] = json.loads(self.progress_path.read_text())
        except (OSError, ValueError):
            return {}
        return state

    def note_end(self, how: str, error: BaseException | None = None) -> None:
        """Notes how the driver ended the run's schedule, for people; the next start removes it."""
        content = {"how": how, "error": mask_secrets(str(error)) if error is not None else "", "time": time.time()}
        with contextlib.suppress(OSError):
            write_bytes(self.end_path, json.dumps(content).encode())

    def read_end(self) -> dict[str, Any]:
        """What `note_end` noted last; empty while the run is at work, or where its driver was killed."""
        try:
            end: Any = json.loads(self.end_path.read_text())
        except (OSError, ValueError):
            return {}
        return end if isinstance(end, dict) and {"how", "error"} <= end.keys() else {}

    def read_ids(self) -> dict[str, Any] | None:
        """The ids of the run's MLflow runs, as they were saved last."""
        ids: dict[str, Any] | None = _read_json(self.folder / "mlflow.json", None)
        return ids

    def write_ids(self, ids: Mapping[str, Any]) -> None:
        write_bytes(self.folder / "mlflow.json", json.dumps(dict(ids), indent=2).encode())


def _read_json(path: Path, absent: Any) -> Any:
    """What a file of the run says, `absent` where there is none; raises ConfigError where it is damaged."""
    if not path.exists():
        return absent
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): bring it back from a copy of the run, or remove it") from error


def find_run(folder: str | Path) -> Run:
    """The run in a folder, wherever that was moved or copied to; raises ConfigError where there is none.

    What its configuration says to lie in the folder, or beside it in `output`, is meant where the folder is now.
    """
    path = Path(folder).expanduser().absolute()
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes that Python could not decode
        raise ConfigError(f"{path} is no name in UTF-8: rename the folder, or set LANG=C.UTF-8") from None
    saved = path / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"no run in {path}; {_where_runs_are(path)}")
    config = read_config(saved)
    if config.run_folder.exists() and config.run_folder.samefile(path):
        return Run(config)
    path = path.resolve()
    return Run(_moved(config, path), path)


def _where_runs_are(path: Path) -> str:
    """What helps who named a folder that is no run's."""
    if around := next((one for one in path.parents if (one / "config.yaml").is_file()), None):
        return f"it lies in that of a run: {around}"
    for where, folder in (("in", path), ("beside", path.parent)):
        if found := sorted(one.parent.name for one in folder.glob("*/config.yaml") if one.is_file()):
            return f"runs {where} it: {', '.join(found)}"
    return "a run's folder is <output>/<name> of its configuration"


def require_meant(source: str, overrides: Sequence[str], config: RunConfig) -> None:
    """Raises ConfigError where `source` is what a run saved of itself, and lies with that run elsewhere than it says:
    by it the run at the old place would be trained, and not the one that was named.

    Overrides of `name` or `output` say which is meant.
    """
    path = Path(source).expanduser().absolute()
    if {override.partition("=")[0].strip() for override in overrides} & {"name", "output"}:
        return
    if path.name != "config.yaml" or not (path.is_file() and (path.parent / "checkpoints").is_dir()):
        return
    if config.run_folder.exists() and config.run_folder.samefile(path.parent):
        return
    raise ConfigError(
        f"{source} is of the run in {path.parent}, which was moved or copied there: it says that its run is "
        f"{config.run_folder}. To go on with the one that was named: {find_run(path.parent).train_command}; to train "
        f"the other: --set output={shlex.quote(config.output)}"
    )


def _moved(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration of a run that was moved, or copied, to `folder`."""
    inside, beside = f"{config.run_folder}/", f"{config.output}/"

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: place(one) for key, one in value.items()}
        if isinstance(value, list):
            return [place(one) for one in value]
        if not isinstance(value, str):
            return value
        scheme = _SQLITE if value.startswith(_SQLITE) else ""
        path = value.removeprefix(scheme)
        if path.startswith(inside):
            return f"{scheme}{folder / path.removeprefix(inside)}"
        along = folder.parent / path.removeprefix(beside)  # moved along with it
        return f"{scheme}{along}" if path.startswith(beside) and along.exists() else value

    return RunConfig.model_validate({**place(config.model_dump(mode="json")), "output": str(folder.parent)})


_SQLITE = "sqlite:///"
_TAIL_BYTES = 1 << 18
"""Of a file of samples: the lines of many steps."""


_BESIDE_MEANS = ("low", "high", "cases")
"""Ends of names of a mean's bounds, and of how many cases it is of."""


class ProgressFile:
    """Writes a run's `progress.json`. A full disk is warned about, once until there is room, and ends nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._full = False

    def write(self, content: dict[str, Any], last: bool = False) -> None:
        """Replaces what was there; `last` says how it ended, for which there is room where the last one was."""
        text = json.dumps(content)
        with self.suppressed():
            try:
                with atomic_file(self.path, sync=False) as aside:
                    aside.write_text(text)
            except OSError:
                if not last:
                    raise
                with self.path.open("r+") as file:
                    file.write(text)
                    file.truncate()

    @contextlib.contextmanager
    def suppressed(self) -> Iterator[None]:
        """What only people read is no reason to end a step."""
        try:
            yield
            self._full = False
        except OSError as error:
            if not self._full:
                logger.warning("where the run is can not be written: %s", error)
            self._full = True
