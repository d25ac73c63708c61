"""The frame of what is done to a raw corpus before it is encoded: raw shards in, raw shards out.

A stage is a list of steps, each a class that a pool of Ray Data actors holds, with CPUs and GPUs (or shares of them) of
its own. The samples of the corpus pass through them in parts of a few dozen: a step is called with the samples of one
part, as `Work`, and changes what they say of themselves and their reference pictures. The targets do not travel: the
last step's actor copies them from the shards that went in. While one step has a part, the others have the next ones.

    class Crop:
        def __init__(self, model: str) -> None: ...          # once an actor: loads weights
        def __call__(self, works: list[Work]) -> None:       # the samples of a part, in order
            attempt(works, self.crop)                        # a sample that fails is left out with its reason

    run_stage(raw, folder, recipe, [Step(Crop, ("model",), ActorPool(actors=2, cpus=1, gpus=0.5))], progress)

What a step must keep to: the result is a function of the samples, the step's arguments and `recipe` alone, and not of
which part came first. Then a stage can be killed at any time, and the same command makes what is missing (`Parts`), and
the corpus has the bytes that it would have had without the stop. Nothing is dropped without a word: a sample that a
step leaves out is in `quarantine.jsonl`, and `report.json` counts reasons and notes.
"""

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa
import ray.data  # which sets log levels: commands set theirs after they import this
from ray.exceptions import RayActorError, RayTaskError

from domainshuttle.pipelines.errors import DataError, StorageError, UserFacingError
from domainshuttle.pipelines.index.parts import REPORT_NAME, TRACE_NAME, Parts
from domainshuttle.pipelines.index.samples import read_info, read_raw_sample
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow
from domainshuttle.pipelines.quarantine import (
    MOST_BAD_IN_CORPUS,
    QUARANTINE_NAME,
    BadSample,
    fault_kind,
    fault_reason,
    of_sample,
)
from domainshuttle.pipelines.ray_tasks import Progress
from domainshuttle.pipelines.sample import Buffer, RawSample, SampleInfo
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.pipelines.values import ActorPool

_VERSION = 1
"""Of what the frame itself writes; a change makes all stages anew."""


@dataclass
class Work:
    """One sample on its way through a stage.

    `info` is what its `key.json` will say, and `files` the reference pictures that are new, by their name in `info`;
    those that `info` names and `files` has not are copied from the sample as it came, and those that `info` does not
    name any more are not written. Its key, source and target stay.
    """

    row: IndexRow
    info: SampleInfo
    files: dict[str, bytes] = field(default_factory=dict)
    left_out: str = ""
    """Why it is no sample any more, as 'kind: detail'."""
    notes: list[str] = field(default_factory=list)
    """What was done to it that one should know of: counted in the report."""
    trace: dict[str, Any] = field(default_factory=dict)
    """Plain JSON that is written beside the index, such as the boxes that were found, also where it is left out."""
    carried: dict[str, Any] = field(default_factory=dict)
    """What a step hands on to the next ones, such as decoded frames; not written."""

    def sample(self) -> RawSample:
        """The sample as it came, read from its shard. Raises DataError, StorageError."""
        return read_raw_sample(self.row)

    def finished(self, before: RawSample) -> RawSample:
        """The sample as it will be written, of what it was `before`. Raises DataError where its references and files do
        not fit."""
        files: dict[str, Buffer] = {before.target_extension: before.target}
        for reference in self.info.references:
            if (data := self.files.get(reference.file, before.files.get(reference.file))) is None:
                raise DataError(f"{self.row.key}: {reference.file} is named, and no step made it")
            files[reference.file] = data
        if self.info.source_clip is not None:
            files[self.info.source_clip] = before.files[self.info.source_clip]
        return RawSample(self.row.key, self.info, files)


def attempt(works: Iterable[Work], function: Callable[[Work], None]) -> None:
    """Calls `function` with each sample. One for which it raises what bytes can make it raise is left out, with the
    reason; errors of the machine (a store, the memory, a GPU) are raised."""
    for work in works:
        if work.left_out:
            continue
        try:
            with of_sample(work.row.key):
                function(work)
        except DataError as error:
            work.left_out = fault_reason(error)


@dataclass(frozen=True)
class Step:
    """A step of a stage: `make(*arguments)` is made once an actor, and called with the samples of a part at a time.

    An actor has `parts_at_once` parts at the same time, on threads, where waiting, as for an endpoint, is what takes
    the time; the step must then be safe for threads.
    """

    make: Callable[..., Callable[[list[Work]], None]]
    arguments: tuple[Any, ...] = ()
    pool: ActorPool = field(default_factory=ActorPool)
    parts_at_once: int = 1


@dataclass(frozen=True)
class Staged:
    """A corpus that a stage made: what its index says of itself, and the report of how it came about."""

    metadata: IndexMetadata
    report: dict[str, Any]

    @property
    def bad(self) -> int:
        """Samples in quarantine."""
        return int(self.report["in_quarantine"])


def run_stage(
    name: str,
    raw: CorpusSpec,
    folder: Path,
    recipe: Mapping[str, Any],
    steps: Sequence[Step],
    progress: Progress,
    samples_per_part: int = 32,
    shard_bytes: int = 256 << 20,
    most_bad: float = MOST_BAD_IN_CORPUS,
) -> Staged:
    """Does what is missing of a stage on the Ray cluster that is connected; its corpus, index and report lie in
    `folder`.

    `recipe` says, in plain JSON, all that decides what the steps make of the same samples: when it changes, all is made
    anew, and the report shows it. Raises DataError where the raw corpus is not there, when more than `most_bad` of the
    samples are left out, and what a step raises as a fault of the environment: what is finished stays.
    """
    index = Index.load(raw.index)
    metadata = IndexMetadata(corpus=raw.name, stage="raw", fps=index.parts[0].fps)
    made_by = json.dumps({"frame": _VERSION, "stage": name, "raw": index.digest, **recipe}, sort_keys=True)
    parts = Parts(folder, -(-len(index) // samples_per_part), made_by)
    parts.begin()
    missing, total = parts.missing(), len(index)
    done = total - sum(min(samples_per_part, total - part * samples_per_part) for part in missing)
    progress(done, total)
    if missing:
        job = _Job(raw, parts, metadata, samples_per_part, shard_bytes)
        for finished in pass_through(job, missing, steps):
            done += finished
            progress(done, total)
    merged, bad = parts.merge(metadata, most_bad, _REPAIR)
    _join_traces(parts)
    report = {
        "corpus": raw.name,
        "stage": name,
        "settings": dict(recipe),
        "from": index.digest,
        "from_folder": str(raw.folder),
        "samples": total - bad,
        "in_quarantine": bad,
        "left_out": dict(_reasons(folder).most_common()),
        "notes": dict(parts.notes().most_common()),
        "digest": merged.digest,
    }
    write_bytes(folder / REPORT_NAME, json.dumps(report, indent=1, ensure_ascii=False).encode())
    return Staged(merged, report)


_REPAIR = "Repair what the reasons name, or change the stage's settings, and run the command again"


_PASSED = pa.schema(
    [("part", pa.int64()), ("passing", pa.large_binary()), ("fault", pa.large_binary()), ("done", pa.int64())]
)
"""What goes from step to step: a part, its samples, what a step raised, and how many of its samples are finished."""


class PartsJob(Protocol):
    """What the parts that pass through steps have in common, and what is written of them in the end."""

    @property
    def raw(self) -> CorpusSpec:
        """The corpus that they are of."""
        ...

    @property
    def folder(self) -> Path:
        """Where it is written, for messages."""
        ...

    def rows(self, index: Index, part: int) -> list[IndexRow]:
        """The samples of a part."""
        ...

    def write(self, part: int, passed: "Passing") -> int:
        """Writes what the steps made of a part, whole or not at all; returns how many samples that finishes."""
        ...


@dataclass(frozen=True)
class _Job:
    """A stage that makes shards."""

    raw: CorpusSpec
    parts: Parts
    metadata: IndexMetadata
    samples_per_part: int
    shard_bytes: int

    @property
    def folder(self) -> Path:
        return self.parts.folder

    def rows(self, index: Index, part: int) -> list[IndexRow]:
        start = part * self.samples_per_part
        return index.rows(range(start, min(start + self.samples_per_part, len(index))))

    def write(self, part: int, passed: "Passing") -> int:
        infos = {}
        traces = []
        with ShardWriter(self.parts.folder, self.parts.prefix(part), self.shard_bytes) as writer:
            for number, work in passed.works:
                try:
                    before = work.sample()
                except DataError as error:  # no step has read it
                    passed.leave_out(number, work.row, fault_reason(error), work.trace)
                    continue
                writer.write(work.row.key, work.finished(before).members())
                infos[work.row.key] = work.info, work.row.bucket
                traces.append((number, work.row.key, work.trace))
        traces += [(number, bad.key, trace) for number, bad, trace in passed.out]
        lines = [json.dumps({"key": key, **trace}) + "\n" for _, key, trace in sorted(traces, key=_place) if trace]
        write_bytes(self.parts.beside(part, TRACE_NAME), "".join(lines).encode())
        self.parts.note(part, passed.notes)
        rows = [IndexRow.of(entry, *infos[entry.key]) for entry in writer.entries]
        bad = [one for _, one, _ in sorted(passed.out, key=_place)]
        return sum(self.parts.finish(part, rows, bad, self.metadata))


@dataclass
class Passing:
    """A part between two steps: samples that are still in, and those that were left out, both by their place in it."""

    works: list[tuple[int, Work]]
    out: list[tuple[int, BadSample, dict[str, Any]]]
    notes: Counter[str]

    def call(self, step: Callable[[list[Work]], None]) -> None:
        step([work for _, work in self.works])
        for number, work in self.works:
            self.notes.update(work.notes)
            work.notes = []
            if work.left_out:
                self.leave_out(number, work.row, work.left_out, work.trace)
        self.works = [(number, work) for number, work in self.works if not work.left_out]

    def leave_out(self, number: int, row: IndexRow, reason: str, trace: dict[str, Any]) -> None:
        self.out.append((number, BadSample(row.source, row.shard, row.key, reason), trace))


class _StepActor:
    """Holds a step. The first one reads the samples' descriptions, and the last one writes the shards."""

    def __init__(self, job: PartsJob, step: Step, first: bool, last: bool) -> None:
        self.job, self.first, self.last = job, first, last
        self.fault: UserFacingError | None = None
        try:
            self.step = step.make(*step.arguments)
            self.index = Index.load(job.raw.index, verify=False) if first else None
        except UserFacingError as error:  # Ray would show a traceback of its own
            self.fault = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        (row,) = batch.to_pylist()
        part, passing, fault, done = row["part"], row["passing"], self.fault, 0
        if fault is None and not row["fault"]:
            try:
                came = self._read(part) if self.first else pickle.loads(passing)
                came.call(self.step)
                if self.last:
                    done = self.job.write(part, came)
                else:
                    passing = pickle.dumps(came, protocol=5)
            except UserFacingError as error:
                fault = error
        told = pickle.dumps(fault) if fault is not None else row["fault"]
        passing = b"" if self.last or told else passing
        return pa.Table.from_pylist([{"part": part, "passing": passing, "fault": told, "done": done}], _PASSED)

    def _read(self, part: int) -> Passing:
        passing = Passing([], [], Counter())
        assert self.index is not None
        for number, row in enumerate(self.job.rows(self.index, part)):
            try:
                passing.works.append((number, Work(row, read_info(row))))
            except DataError as error:
                passing.leave_out(number, row, fault_reason(error), {})
        return passing


def _place(numbered: tuple[Any, ...]) -> int:
    return int(numbered[0])


def pass_through(job: PartsJob, missing: Sequence[int], steps: Sequence[Step]) -> Iterable[int]:
    """Sends parts through the steps; gives how many samples each part had that is finished. Raises a step's fault."""
    # one block a part, so that any actor can take the next one
    rows = [[{"part": part, "passing": b"", "fault": b"", "done": 0}] for part in missing]
    flow: ray.data.Dataset = ray.data.from_arrow([pa.Table.from_pylist(row, _PASSED) for row in rows])
    for number, step in enumerate(steps):
        actors = min(step.pool.actors, len(missing))
        flow = flow.map_batches(
            _StepActor,
            fn_constructor_args=(job, step, number == 0, number == len(steps) - 1),
            batch_size=1,
            batch_format="pyarrow",
            # of one that finds no room at once the others do not wait
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=actors,
                max_size=actors,
                max_tasks_in_flight_per_actor=step.parts_at_once + 1,
                max_concurrent_calls_per_actor=step.parts_at_once,
                enable_true_multi_threading=step.parts_at_once > 1,
            ),
            num_cpus=step.pool.cpus,
            num_gpus=step.pool.gpus or None,
        )
    try:
        for batch in flow.iter_batches(batch_size=1, batch_format="pyarrow"):
            (result,) = cast(pa.Table, batch).to_pylist()
            if result["fault"]:
                raise pickle.loads(result["fault"])
            yield result["done"]
    except RayTaskError:
        raise  # a fault of ours, with its traceback
    except RayActorError as error:
        raise StorageError(
            f"{job.folder}: a worker died each time its part was tried: {error}. The node's memory may be too "
            "small; what is finished stays: run the command again"
        ) from error


def _join_traces(parts: Parts) -> None:
    """One file of the parts'; none where no step noted anything."""
    lines = b"".join(parts.beside(part, TRACE_NAME).read_bytes() for part in range(parts.count))
    path = parts.folder / TRACE_NAME
    if lines:
        write_bytes(path, lines)
    else:
        path.unlink(missing_ok=True)


def _reasons(folder: Path) -> Counter[str]:
    rows = (folder / QUARANTINE_NAME).read_text().splitlines()
    return Counter(fault_kind(json.loads(row)["reason"]) for row in rows)
