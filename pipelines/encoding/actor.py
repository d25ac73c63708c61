"""An actor that encodes: it holds the encoders, reads the samples of its tasks itself, and writes their shards."""

import json
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import cloudpickle

from domainshuttle.pipelines.encoding.sample_encoder import Tally, encode_rows, load_encoders, timed
from domainshuttle.pipelines.encoding.throughput import WRITE
from domainshuttle.pipelines.encoding.units import Before, Recipe, write_note
from domainshuttle.pipelines.errors import DataError, UserFacingError, one_line
from domainshuttle.pipelines.index.table import IndexRow
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.quarantine import BadSample, fault_reason, of_machine
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.storage.files import write_file
from domainshuttle.pipelines.storage.uri import is_remote, join, local_path


@dataclass(frozen=True)
class Task:
    """What an actor needs to make a unit: its rows of the raw index, and what of them was encoded before."""

    job: int
    folder: str
    name: str
    rows: list[IndexRow]
    before: dict[int, Before]
    recipe: Recipe
    shard_bytes: int


class EncodingActor:
    """Holds the encoders; each call makes the units that it is given, and tells what became of them."""

    def __init__(self, described: Mapping[str, str], sources: EncoderSources, device: str, threads: int = 1) -> None:
        torch.set_num_threads(1)
        self.video, self.text = load_encoders(sources, device)
        self.threads = threads
        self.fault = _not_as_described(described, self.video.identity, self.text.identity)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for data in batch["task"]:
            task: Task = cloudpickle.loads(bytes(data))
            if self.fault:
                yield _told(job=task.job, fault=self.fault)
                return
            try:
                yield from self.make(task)
            except Exception as error:
                if not (isinstance(error, OSError) or of_machine(error)):
                    raise
                said = str(error) if isinstance(error, UserFacingError) else one_line(error)
                yield _told(job=task.job, fault=f"on node {socket.gethostname()}: {said}", of_machine=True)
                return

    def make(self, task: Task) -> Iterator[dict[str, np.ndarray]]:
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
