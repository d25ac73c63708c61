"""The product's loader as a run uses it, and the raw read that no loader of one process can pass.

Run in the product's environment: python -m loading.ours product|raw KIND FOLDER --consumers 1|2
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from loading.data import REFERENCE_SIZE, REFERENCES, TEXT_LENGTH
from loading.measure import Batch, Measured, measure, memory_bytes
from loading.peers import BATCH, shards

from domainshuttle.cluster.local import Connection
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.loading.loader import Loader
from domainshuttle.pipelines.loading.ray_source import Blocks, plan_dataset
from domainshuttle.pipelines.loading.reader import BadPlacesError, Drawn, Reader
from domainshuttle.pipelines.media.decode import decode_image
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.pipelines.shards.tar import read_members

STEPS = 4000
"""More than are reached; with one block of the plan for 32 of them, about a stage's."""
RAW_CHUNK = 4 << 20


def feed(kind: str, folder: Path, consumers: int) -> Feed:
    """A stage of training on the benchmark's samples."""
    return Feed(
        shares=(CorpusShare(kind, str(folder / INDEX_NAME), 1.0),),
        seed=0,
        global_batch=BATCH[kind] * consumers,
        micro_batch=BATCH[kind],
        text_len=TEXT_LENGTH,
        references=REFERENCES,
    )


class PictureReader(Reader[Drawn, Batch]):
    """Raw samples, their pictures decoded straight into the batch by the rank's threads."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(feed, lambda drawn: drawn, self.decode)
        self.staging = Staging()

    def decode(self, samples: list[Drawn]) -> Batch:
        """All pictures of the samples, one tensor a place; raises BadPlacesError for samples that can't be read."""
        target = parse_bucket(samples[0].row.bucket)
        sizes = [(target.height, target.width), *[REFERENCE_SIZE] * REFERENCES]
        batch = [self.staging.empty(len(samples), *size, 3, dtype=torch.uint8) for size in sizes]
        faults: dict[int, DataError] = {}
        for number, one in enumerate(samples):
            row = one.row
            wanted = [member for member in row.members if member.extension != "json"]
            try:
                members = read_members(row.folder, row.shard, wanted)
                for (name, data), tensor in zip(members.items(), batch, strict=True):
                    decode_image(data, f"{row.key}.{name}", out=tensor[number].numpy())
            except DataError as error:
                faults[number] = error
        if faults:
            raise BadPlacesError(faults)
        return batch


def batches(kind: str, blocks: Blocks, feed: Feed, rank: int, world_size: int) -> Iterator[Batch]:
    """A rank's batches, from where its Loader is made."""
    place = blocks, feed, rank, world_size, Path(os.devnull)
    if kind == "pictures":
        for pictures in Loader(*place, source=PictureReader(feed)):
            yield pictures.batch
        return
    for latents in Loader(*place):
        batch = latents.batch
        yield [batch.latents, batch.text, batch.references]


@ray.remote(num_cpus=0)
class Consumer:
    """Another rank: the process of a training worker without the training."""

    def ready(self) -> None:
        """Returns when the process runs and its imports are done."""

    def consume(self, shard: tuple[str, Blocks, Feed, int, int], *clock: Any) -> Measured:
        """What `measure` says of this rank's batches."""
        return measure(lambda: batches(*shard), *clock, staged=True)


def product(kind: str, folder: Path, consumers: int, seconds: float) -> Measured:
    """The plan through Ray Data to so many ranks, each a process with its Loader: this one and actors. Needs Ray to be
    connected."""
    actors = [Consumer.remote() for _ in range(consumers - 1)]
    ray.get([actor.ready.remote() for actor in actors])
    own = feed(kind, folder, consumers)
    clock = seconds, time.perf_counter(), os.getpid()
    ranks = [(kind, blocks, own, rank, consumers) for rank, blocks in enumerate(plan_dataset(own, 0, STEPS, consumers))]
    others = [actor.consume.remote(shard, *clock) for actor, shard in zip(actors, ranks[1:], strict=True)]
    first = measure(lambda: batches(*ranks[0]), *clock, staged=True)
    return Measured.together([first, *ray.get(others)])


def raw(kind: str, folder: Path, consumers: int, seconds: float) -> Measured:
    """The tars read from end to end into one small buffer."""
    samples, files = len(feed(kind, folder, 1).index()), shards(folder)
    share = samples / sum(Path(file).stat().st_size for file in files)
    buffer, size = bytearray(RAW_CHUNK), 0
    process = psutil.Process()
    began, cpu = time.perf_counter(), -sum(process.cpu_times()[:2])
    while time.perf_counter() - began < seconds:
        for name in files:
            with open(name, "rb", buffering=0) as file:  # noqa: PTH123
                while count := file.readinto(buffer):
                    size += count
    elapsed = time.perf_counter() - began
    cpu += sum(process.cpu_times()[:2])
    return Measured(0.0, size * share / elapsed, 1000 * cpu / (size * share), memory_bytes([process]), 1 / share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["product", "raw"])
    parser.add_argument("kind", choices=BATCH)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--consumers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    given = arguments.kind, arguments.folder, arguments.consumers, arguments.seconds
    if arguments.what == "raw":
        print(json.dumps(asdict(raw(*given))), flush=True)
        return
    # this process is a consumer as well: in a training all are Ray's workers, none nicer than another
    os.environ |= {"RAY_worker_niceness": "0"}
    with Connection():
        print(json.dumps(asdict(product(*given))), flush=True)
        # a thread of the loader still waits for Ray, whose library aborts a process that disconnects in this state;
        # Ray's own processes end with this one
        os._exit(0)


if __name__ == "__main__":
    main()
