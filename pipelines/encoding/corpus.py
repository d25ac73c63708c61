"""Encoding: raw shards become encoded shards (latents and text features) on a pool of Ray Data actors.

The plan of the work, not the pictures, goes through Ray: an actor holds the encoders, takes the rows of a unit
(`units`), reads those samples from their shards itself, and writes the encoded shards itself, on a disk or in a store.
So nothing large passes the object store. What was encoded before and is still right is copied. Samples that can't be
decoded or fitted go to the quarantine table with their reason.
"""

import ast
import json
import shlex
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray import cloudpickle
from ray.exceptions import RayTaskError
from torch import Tensor

from domainshuttle.model.encoder_sources import encoder_files, files_digest, tiling_rule
from domainshuttle.model.file_mode import save_tensors
from domainshuttle.pipelines.encoding.sample_encoder import SampleEncoder, Tally, encode_rows, load_encoders, timed
from domainshuttle.pipelines.encoding.throughput import WRITE, Throughput
from domainshuttle.pipelines.encoding.units import (
    NOTE_SUFFIX,
    SHARD_PATTERN,
    Before,
    Former,
    Note,
    Recipe,
    Unit,
    cut_units,
    note_place,
    read_notes,
    write_note,
)
from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.parts import CONVERTED_NAME, EMPTY_CAPTION_NAME, INDEX_NAME, WORK_NAME
from domainshuttle.pipelines.index.selection import CAPTIONED, uncaptioned
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import (
    SCHEMA,
    Index,
    IndexMetadata,
    IndexRow,
    read_metadata,
    write_index,
)
from domainshuttle.pipelines.media.decode import TRANSFORM
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.quarantine import (
    MOST_BAD_IN_CORPUS,
    QUARANTINE_NAME,
    BadSample,
    accepted_share,
    bad_share,
    fault_kind,
    fault_reason,
)
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.storage.files import delete, exists, list_dated, read_bytes, write_bytes, write_file
from domainshuttle.pipelines.storage.uri import is_remote, join, local_path, redacted
from domainshuttle.pipelines.values import ActorPool


@dataclass(frozen=True)
class EncodingJob:
    """One corpus to encode, from its raw form into its encoded one, each on a disk or in a store."""

    raw: CorpusSpec
    encoded: CorpusSpec
    where: str | None = None
    """The filter (`RowFilter`) of the raw samples that are encoded; None: all."""


@dataclass(frozen=True)
class Encoded:
    """An encoded corpus that is whole. `bad` samples are in quarantine, `left_out` by the filter. Against the index
    before: `new` samples, `changed` ones (of which the former copy is gone), `removed` and `unchanged` ones. Of this
    run: of how many samples the latents were `encoded`, only the `captions`, or nothing (`copied` to another shard)."""

    metadata: IndexMetadata
    bad: int
    left_out: int = 0
    new: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    encoded: int = 0
    captions: int = 0
    copied: int = 0
    throughput: Throughput | None = None


@dataclass(frozen=True)
class _Task:
    """What an actor needs to make a unit: its rows of the raw index, and what of them was encoded before."""

    job: int
    folder: str
    name: str
    rows: list[IndexRow]
    before: dict[int, Before]
    recipe: Recipe
    shard_bytes: int


class _EncodingActor:
    """Holds the encoders; each call makes the units that it is given, and tells what became of them."""

    def __init__(self, described: Mapping[str, str], sources: EncoderSources, device: str, threads: int = 1) -> None:
        torch.set_num_threads(1)
        self.video, self.text = load_encoders(sources, device)
        self.threads = threads
        self.fault = _not_as_described(described, self.video.identity, self.text.identity)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for data in batch["task"]:
            task: _Task = cloudpickle.loads(bytes(data))
            if self.fault:
                yield _told(job=task.job, fault=self.fault)
                return
            try:
                yield from self.make(task)
            except (StorageError, OSError, torch.OutOfMemoryError) as error:
                kind = "store" if isinstance(error, StorageError) else "machine"
                yield _told(job=task.job, fault=f"on node {socket.gethostname()}: {error}", kind=kind)
                return

    def make(self, task: _Task) -> Iterator[dict[str, np.ndarray]]:
        """Writes the shards of a unit, then its note; tells of every few samples, and of all at the end."""
        began, tally = time.perf_counter(), Tally()
        samples, bad, told = {}, [], 0
        raw = {row.key: row for row in task.rows}
        with _writing(task.folder) as folder, ShardWriter(folder, task.name, task.shard_bytes) as writer:
            fps = task.recipe.fps
            found = encode_rows(task.rows, self.video, self.text, fps, task.before, tally, self.threads)
            for number, (row, sample) in enumerate(found, 1):
                if isinstance(sample, DataError):
                    bad.append(BadSample(row.source, row.shard, row.key, fault_reason(sample)))
                else:
                    with timed(tally.seconds, WRITE):
                        writer.write(sample.key, sample.members())
                    samples[sample.key] = sample
                if number - told >= _TOLD_EVERY:
                    yield _told(job=task.job, done=number - told)
                    told = number
            with timed(tally.seconds, WRITE):
                writer.finish()
                for shard in writer.shards if is_remote(task.folder) else ():
                    write_file(folder / shard, join(task.folder, shard))
        made, size = [], 0
        for entry in writer.entries:
            sample, row = samples[entry.key], raw[entry.key]
            encoded = IndexRow.of(entry, sample.info, row.bucket, len(sample.text), sample.whole_caption_tokens)
            made.append((row, encoded, sample))
            size += sum(member.size for member in entry.members)
        write_note(task.folder, task.name, made, bad, task.recipe)
        yield _told(
            job=task.job,
            done=len(task.rows) - told,
            encoded=tally.encoded,
            captions=tally.captions,
            copied=tally.copied,
            bytes=round(size * tally.encoded / max(len(made), 1)),
            busy=time.perf_counter() - began,
            seconds=dict(tally.seconds),
        )


_TOLD_EVERY = 4


def _told(**content: Any) -> dict[str, np.ndarray]:
    return {"told": np.array([json.dumps(content)])}


@contextmanager
def _writing(folder: str) -> Iterator[Path]:
    """Where the shards of a folder are written: in it, or for a store beside, from where they are uploaded."""
    if not is_remote(folder):
        yield local_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="domainshuttle-") as aside:
        yield Path(aside)


def _not_as_described(described: Mapping[str, str], video: str, text: str) -> str:
    """What to say where encoders that were loaded on this node are not those that the corpus is to name; '' if they
    are: a folder may hold other files on each node."""
    for kind, found in (("video", video), ("text", text)):
        if described[kind] != found:
            return (
                f"encoders.{kind} is {found} on node {socket.gethostname()}, and {described[kind]} where encoding was "
                "planned: give all nodes the same files, and run the command again"
            )
    return ""


def _describe_encoders(sources: EncoderSources, device: str) -> tuple[dict[str, str], Tensor]:
    """What both encoders call themselves, digests of their files, and the empty caption's bf16 states [l,d]. A task
    with an actor's resources, since the driver may have no room for UMT5-XXL."""
    video, text = load_encoders(sources, device)
    named: tuple[tuple[Literal["video", "text"], str], ...] = (("video", sources.video), ("text", sources.text))
    files = {f"{kind}_files": files_digest(found) for kind, source in named if (found := encoder_files(source, kind))}
    tiles = tiling_rule(sources.video, sources.tile_above)
    described = {"video": video.identity, "text": text.identity, **files, **({"tiles": tiles} if tiles else {})}
    return described, SampleEncoder(video, text).caption("")


class _Target:
    """What a corpus is to be: its units, which of them are there, and what there is beside them."""

    def __init__(self, job: EncodingJob, recipe: Recipe, samples_per_part: int, shard_bytes: int) -> None:
        self.job, self.recipe, self.folder = job, recipe, job.encoded.folder
        whole = Index.load(job.raw.index)
        self.raw = whole.filter(job.where) if job.where else whole
        if not len(self.raw):
            raise DataError(f"corpus {job.raw.name!r}: {job.where!r} leaves none of its {len(whole)} samples")
        self.left_out = len(whole) - len(self.raw)
        self._all_ids = whole.table.column("sample_id").to_numpy()
        self.units = cut_units(self.raw, recipe, samples_per_part, shard_bytes)
        wanted = {unit.name for unit in self.units}
        there = {
            name.removesuffix(NOTE_SUFFIX)
            for name, *_ in list_dated(join(self.folder, WORK_NAME))
            if name.endswith(NOTE_SUFFIX)
        }
        self._has_notes, held = bool(there), self._shards()
        self.notes = read_notes(self.folder, sorted(there & wanted), held)
        notes = [*read_notes(self.folder, sorted(there - wanted), held).values(), *self._former_format(whole, held)]
        self.former = Former(self.folder, notes)
        self.before = Index.load(self.index_place) if exists(self.index_place) else None

    @property
    def index_place(self) -> str:
        return join(self.folder, INDEX_NAME)

    def missing(self) -> list[Unit]:
        """The units that are still to be made."""
        return [unit for unit in self.units if unit.name not in self.notes]

    def _shards(self) -> dict[str, int]:
        return {name: size for name, size, _ in list_dated(self.folder) if name.endswith(".tar")}

    def _former_format(self, whole: Index, held: Mapping[str, int]) -> Iterator[Note]:
        """The parts of a corpus that was encoded until November 2026, where they were made of these raw samples."""
        place = join(self.folder, f"{WORK_NAME}/recipe.json")
        if not exists(place):
            return
        raw_digest, _, made_by = str(json.loads(read_bytes(place)).get("recipe", "")).partition(" ")
        if raw_digest != whole.digest:
            return
        checksums = dict(zip(self._all_ids.tolist(), whole.table.column("checksum").to_pylist(), strict=True))
        recipe = Recipe(dict(ast.literal_eval(made_by)), whole.parts[0].fps)
        for name, *_ in list_dated(join(self.folder, WORK_NAME)):
            if not (name.startswith("part-") and name.endswith(".parquet")) or name.endswith(NOTE_SUFFIX):
                continue
            table = Index.load(join(self.folder, f"{WORK_NAME}/{name}"), verify=False).table.select(SCHEMA.names)
            if not set(table.column("shard").unique().to_pylist()) <= held.keys():
                continue
            converted: dict[str, list[str]] = {}
            if exists(listed := join(self.folder, f"{WORK_NAME}/{name.removesuffix('.parquet')}.converted")):
                for line in read_bytes(listed).splitlines():
                    converted.setdefault((one := json.loads(line))["key"], []).append(one["reason"])
            ids, keys = table.column("sample_id").to_pylist(), table.column("key").to_pylist()
            table = table.append_column("raw_checksum", pa.array([checksums.get(one, 0) for one in ids], pa.uint64()))
            table = table.append_column("pixels", pa.array([b""] * len(ids), pa.binary()))
            noted = pa.array([converted.get(key, []) for key in keys], pa.list_(pa.string()))
            yield Note(name, table.append_column("converted", noted), (), recipe, former=True)

    def require_wanted(self) -> None:
        """Raises DataError where a whole corpus, or much of it, would be removed that nobody asked to remove."""
        if self.before is None:
            return
        metadata, now = self.before.parts[0], Recipe(self.recipe.encoders, self.recipe.fps)
        buckets = {*self.before.codes("bucket")[1], *self.raw.codes("bucket")[1]}
        changed = now.changes(Recipe(metadata.encoders, metadata.fps), sorted(buckets))
        if changed:
            raise DataError(
                f"{redacted(self.folder)} is a whole encoded corpus, made by other encoders ({'; '.join(changed)}). "
                f"{_OVERWRITE}; what the change leaves as it is, such as latents where only `text` differs, is copied"
            )
        ids = self.before.table.column("sample_id").to_numpy()
        if not self._has_notes and not self.former.notes:
            raise DataError(
                f"{redacted(self.folder)} is a whole encoded corpus without notes ({WORK_NAME}/) that say of which raw "
                "samples it was made, or was encoded by an earlier version of other raw samples than those that are "
                f"there now: what is still right can't be told. Copy {WORK_NAME}/ of its origin too, or index the raw "
                f"samples of then and encode once, which converts it. Else: {_OVERWRITE}"
            )
        gone = ids[~np.isin(ids, self.raw.table.column("sample_id").to_numpy())]
        filtered = int(np.isin(gone, self._all_ids).sum())
        if filtered:
            raise DataError(
                f"{redacted(self.folder)}: {filtered} samples that are encoded would be removed, as --where "
                f"{self.job.where!r} leaves them out. {_OVERWRITE}"
            )
        own = dict(
            zip(
                self.raw.table.column("sample_id").to_pylist(), self.raw.table.column("bucket").to_pylist(), strict=True
            )
        )
        other = sum(
            own.get(one, bucket) != bucket
            for one, bucket in zip(ids.tolist(), self.before.table.column("bucket").to_pylist(), strict=True)
        )
        if 2 * (len(gone) + other) > len(ids):
            raise DataError(
                f"{redacted(self.folder)}: of {len(ids)} encoded samples {len(gone)} are not in the raw corpus any "
                f"more, and {other} have another bucket. {_OVERWRITE}"
            )

    def remove_useless(self) -> None:
        """Removes a former corpus of which nothing can be used, before its successor takes as much room."""
        rules = {json.dumps(self.recipe.pixels(bucket)) for bucket in self.raw.codes("bucket")[1]}
        for note in self.former.notes:
            buckets = note.table.column("bucket").unique().to_pylist()
            if any(json.dumps(note.recipe.pixels(bucket)) in rules for bucket in buckets):
                return
        if self.before is not None and not self.notes:
            delete(self.index_place)
            self.former = Former(self.folder)
            self._remove_others(set())

    def tasks(self, job: int, shard_bytes: int) -> Iterator[_Task]:
        """The work that is left."""
        for unit in self.missing():
            rows = self.raw.rows(unit.rows)
            yield _Task(job, self.folder, unit.name, rows, self.former.of(rows, self.recipe), self.recipe, shard_bytes)

    def finish(self, empty_caption: Tensor, most_bad: float, work: Counter[str], speed: Throughput | None) -> Encoded:
        """Makes the index and the tables of the units' notes, and removes what is wanted no more."""
        made = [unit.name for unit in self.missing()]
        self.notes |= read_notes(self.folder, made, self._shards())
        if lost := [unit.name for unit in self.missing()]:
            for name in lost:
                delete(note_place(self.folder, name))
            raise DataError(f"{redacted(self.folder)}: {len(lost)} units are not whole; run the command again")
        notes = [self.notes[unit.name] for unit in self.units]
        table = pa.concat_tables([note.table.select(SCHEMA.names) for note in notes]).unify_dictionaries()
        bad = [one for note in notes for one in note.bad]
        self._write_lines(QUARANTINE_NAME, bad, keep=True)
        share = bad_share(len(bad), len(table))
        if share > most_bad or not len(table):
            counted = ", ".join(
                f"{kind} {n}" for kind, n in Counter(fault_kind(one.reason) for one in bad).most_common()
            )
            accept = f", or accept them: --most-bad {accepted_share(share)} (nothing is made again)"
            raise DataError(
                f"{redacted(self.folder)}: {len(bad)} of {len(bad) + len(table)} samples are bad, at most "
                f"{most_bad:.0%} may be: {counted}. Shards, keys and reasons are in "
                f"{redacted(join(self.folder, QUARANTINE_NAME))}. {_REPAIR}{accept if len(table) else ''}"
            )
        self._write_lines(CONVERTED_NAME, [one for note in notes for one in note.converted()], keep=False)
        with tempfile.TemporaryDirectory() as aside:
            save_tensors({"text": empty_caption}, Path(aside) / EMPTY_CAPTION_NAME)
            write_bytes(join(self.folder, EMPTY_CAPTION_NAME), (Path(aside) / EMPTY_CAPTION_NAME).read_bytes())
        encoders = dict(self.recipe.encoders)
        metadata = IndexMetadata(corpus=self.job.encoded.name, stage="encoded", encoders=encoders, fps=self.recipe.fps)
        metadata = write_index(self.index_place, table.combine_chunks(), metadata)
        self._remove_others({shard for note in notes for shard in note.shards})
        return Encoded(
            metadata,
            len(bad),
            self.left_out,
            **self._compared(table),
            encoded=work["encoded"],
            captions=work["captions"],
            copied=work["copied"],
            throughput=speed,
        )

    def _write_lines(self, name: str, rows: Sequence[BadSample], keep: bool) -> None:
        place = join(self.folder, name)
        if rows or keep:
            write_bytes(place, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())
        else:
            delete(place)

    def _compared(self, table: pa.Table) -> dict[str, int]:
        """How many samples are new, changed, removed and unchanged against the index before."""
        names = ("sample_id", "checksum")
        now = dict(zip(*(table.column(name).to_pylist() for name in names), strict=True))
        then: dict[int, int] = {}
        if self.before is not None:
            then = dict(zip(*(self.before.table.column(name).to_pylist() for name in names), strict=True))
        both = now.keys() & then.keys()
        changed = sum(now[one] != then[one] for one in both)
        return {
            "new": len(now) - len(both),
            "changed": changed,
            "removed": len(then) - len(both),
            "unchanged": len(both) - changed,
        }

    def _remove_others(self, shards: set[str]) -> None:
        """Removes shards that no unit has, then their notes: a note whose shards are gone counts for nothing."""
        for name, *_ in list_dated(self.folder):
            plain = name.removeprefix(".").partition(".tar.")[0] + ".tar" if name.startswith(".") else name
            if SHARD_PATTERN.fullmatch(plain) and name not in shards:
                delete(join(self.folder, name))
        wanted = {f"{unit.name}{NOTE_SUFFIX}" for unit in self.units}
        for name, *_ in list_dated(join(self.folder, WORK_NAME)):
            ours = name.endswith(NOTE_SUFFIX) or name.startswith("part-") or name == "recipe.json"
            if ours and name not in wanted:
                delete(join(self.folder, f"{WORK_NAME}/{name}"))


_OVERWRITE = (
    "Encoding removes it: say so (domainshuttle data encode CONFIG --overwrite), or keep it and encode into another "
    "`data` folder"
)
_REPAIR = "Repair their raw samples, index the raw corpus again (domainshuttle data index), and encode again"


def encode(
    jobs: Sequence[EncodingJob],
    sources: EncoderSources,
    progress: Callable[..., None],
    pool: ActorPool | None = None,
    samples_per_part: int = 64,
    shard_bytes: int = 1 << 30,
    overwrite: bool = False,
    most_bad: float = MOST_BAD_IN_CORPUS,
    grows: bool = False,
) -> list[Encoded]:
    """Encodes what is missing of some corpora on the Ray cluster that is connected, with one pool of actors.

    `progress` is told of samples done, of all, and a note on the throughput. `grows`: the pool takes more actors than
    `pool` says where the cluster gets room for them. Raises DataError for samples without a caption, for encoders that
    can't be loaded, where a whole corpus, or much of it, would be removed unless it is to be (`overwrite`), and, when
    all others have their indexes, for those of which more than `most_bad` of the samples are bad. Raises StorageError
    where a store or a node fails.
    """
    for job in jobs:
        _require_captions(job)
    pool = pool or ActorPool(actors=2)
    device, threads = "cuda" if pool.gpus else "cpu", max(1, int(pool.cpus))
    describe = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(_describe_encoders)
    try:
        encoders, empty_caption = ray.get(describe.remote(sources, device))
    except RayTaskError as error:
        if isinstance(error.cause, OSError | ValueError):  # not there, or no encoder
            raise DataError(f"the encoders can't be loaded: {error.cause}") from error
        raise
    identity = encoders | {"transform": TRANSFORM}
    targets = []
    for job in jobs:
        recipe = Recipe(identity, read_metadata(job.raw.index).fps)
        targets.append(_Target(job, recipe, samples_per_part, shard_bytes))
    for target in targets:
        if not overwrite:
            target.require_wanted()
    for target in targets:
        target.remove_useless()
    tasks = [task for number, target in enumerate(targets) for task in target.tasks(number, shard_bytes)]
    work = [Counter[str]() for _ in jobs]
    speeds = [Throughput(actors=0, cpus=pool.cpus, gpus=pool.gpus, threads=threads) for _ in jobs]
    if tasks:
        total = sum(len(target.raw) for target in targets)
        actors = min(pool.actors, len(tasks))
        for speed in speeds:
            speed.actors = actors
        try:
            _run(tasks, encoders, sources, pool, actors, len(tasks) if grows else actors, total, work, speeds, progress)
        finally:  # also of a part that was encoded before it was stopped
            for target, speed in zip(targets, speeds, strict=True):
                if speed.samples:
                    speed.save(target.folder)
    finished, faults = [], []
    for target, own, speed in zip(targets, work, speeds, strict=True):
        try:
            finished.append(target.finish(empty_caption, most_bad, own, speed))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    return finished


def _require_captions(job: EncodingJob) -> None:
    """Raises DataError where samples that are to be encoded have no caption."""
    if not (mute := uncaptioned(job.raw.index, job.where)):
        return
    where = f"({job.where}) and {CAPTIONED}" if job.where else CAPTIONED
    raise DataError(
        f"corpus {job.raw.name!r}: {mute} of its samples have no caption, and training learns from captions. Let a "
        "model write them: domainshuttle data label CONFIG with labels.labeller=endpoint or transformers "
        f"(docs/datasets.md). Or leave them out: domainshuttle data encode CONFIG --where {shlex.quote(where)}"
    )


def _run(
    tasks: Sequence[_Task],
    encoders: Mapping[str, str],
    sources: EncoderSources,
    pool: ActorPool,
    actors: int,
    most: int,
    total: int,
    work: list[Counter[str]],
    speeds: list[Throughput],
    progress: Callable[..., None],
) -> None:
    """Hands the tasks to actors and counts what they tell."""
    done, whole = total - sum(len(task.rows) for task in tasks), Throughput(threads=speeds[0].threads)
    # one block a unit, so that any actor can take the next one
    blocks = [pa.table({"task": pa.array([cloudpickle.dumps(task)], pa.binary())}) for task in tasks]
    told = ray.data.from_arrow(blocks).map_batches(
        _EncodingActor,
        fn_constructor_args=(dict(encoders), sources, "cuda" if pool.gpus else "cpu", speeds[0].threads),
        batch_size=1,
        # of one that finds no room at once the others do not wait
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=most),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    told.context.target_max_block_size = 1  # what an actor tells is heard at once
    for batch in told.iter_batches(batch_size=1, batch_format="numpy"):
        said = json.loads(str(batch["told"][0]))
        if fault := said.get("fault"):
            if "kind" in said:
                raise StorageError(f"encoding failed {fault}; what is finished stays: run the command again")
            raise DataError(fault)
        done += said["done"]
        if "busy" in said:
            work[said["job"]].update({name: said[name] for name in ("encoded", "captions", "copied")})
            for speed in (whole, speeds[said["job"]]):
                if said["encoded"]:
                    speed.add(said["encoded"], said["bytes"], said["busy"], said["seconds"])
        progress(done, total, whole.note())
