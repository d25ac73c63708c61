"""Encoding: raw shards become encoded shards (latents and text features) on a pool of Ray Data actors.

The plan of the work, not the pictures, goes through Ray: an actor holds the encoders, takes a range of index rows,
reads those samples from their shards itself, and writes the encoded shard itself. So nothing large passes the object
store. Samples that can't be decoded or fitted go to the quarantine table with their reason.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from domainshuttle.model.encoder_sources import encoder_files, files_digest
from domainshuttle.model.file_mode import save_tensors
from domainshuttle.pipelines.encoding.sample_encoder import SampleEncoder, encode_rows, load_encoders
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, Parts
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, read_metadata
from domainshuttle.pipelines.media.decode import TRANSFORM
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS, BadSample, fault_reason
from domainshuttle.pipelines.ray_tasks import Progress
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.values import ActorPool


@dataclass(frozen=True)
class EncodingJob:
    """One corpus to encode, from its raw form into its encoded one; both are local."""

    raw: CorpusSpec
    encoded: CorpusSpec


@dataclass(frozen=True)
class _Work:
    """A job with its parts, as the actors need it."""

    job: EncodingJob
    parts: Parts
    metadata: IndexMetadata


class _EncodingActor:
    """Holds the encoders; each call encodes the part of the job that its row names."""

    def __init__(
        self, works: list[_Work], sources: EncoderSources, device: str, samples_per_part: int, shard_bytes: int
    ) -> None:
        torch.set_num_threads(1)
        self.works, self.samples_per_part, self.shard_bytes = works, samples_per_part, shard_bytes
        self.video, self.text = load_encoders(sources, device)
        self.fault = _not_as_described(works[0].metadata.encoders, self.video.identity, self.text.identity)
        self.indexes = [Index.load(work.job.raw.index, verify=False) for work in works]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = [] if self.fault else zip(batch["job"], batch["part"], strict=True)
        counts = [self.encode_part(int(job), int(part)) for job, part in parts]
        return {"done": np.array([sum(sum(count) for count in counts)]), "fault": np.array([self.fault])}

    def encode_part(self, number: int, part: int) -> tuple[int, int]:
        work, index = self.works[number], self.indexes[number]
        start = part * self.samples_per_part
        rows = index.rows(range(start, min(start + self.samples_per_part, len(index))))
        infos, bad, converted = {}, [], []
        with ShardWriter(work.parts.folder, work.parts.prefix(part), self.shard_bytes) as writer:
            for row, sample in encode_rows(rows, self.video, self.text, work.metadata.fps):
                if isinstance(sample, DataError):
                    bad.append(BadSample(row.source, row.shard, row.key, fault_reason(sample)))
                    continue
                writer.write(sample.key, sample.members())
                converted += [BadSample(row.source, row.shard, row.key, one) for one in sample.converted]
                infos[sample.key] = sample.info, row.bucket, len(sample.text), sample.whole_caption_tokens
        rows = [IndexRow.of(entry, *infos[entry.key]) for entry in writer.entries]
        return work.parts.finish(part, rows, bad, work.metadata, converted)


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
    return {"video": video.identity, "text": text.identity, **files}, SampleEncoder(video, text).caption("")


def encode(
    jobs: Sequence[EncodingJob],
    sources: EncoderSources,
    progress: Progress,
    pool: ActorPool | None = None,
    samples_per_part: int = 64,
    shard_bytes: int = 1 << 30,
    overwrite: bool = False,
    most_bad: float = MOST_BAD_IN_CORPUS,
) -> list[tuple[IndexMetadata, int]]:
    """Encodes what is missing of some corpora on the Ray cluster that is connected, with one pool of actors.

    Returns, for each job, its index's metadata and the number of samples in quarantine. Raises DataError for encoders
    that can't be loaded, for a whole corpus of other encoders or other raw samples unless it is to be removed
    (`overwrite`), and, when all others have their indexes, for those of which more than `most_bad` of the samples are
    bad.
    """
    pool = pool or ActorPool(actors=2)
    device = "cuda" if pool.gpus else "cpu"
    describe = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(_describe_encoders)
    try:
        encoders, empty_caption = ray.get(describe.remote(sources, device))
    except RayTaskError as error:
        if isinstance(error.cause, OSError | ValueError):  # not there, or no encoder
            raise DataError(f"the encoders can't be loaded: {error.cause}") from error
        raise
    identity = encoders | {"transform": TRANSFORM}
    works, missing, total, left = [], [], 0, 0
    indexes = [Index.load(job.raw.index) for job in jobs]
    of_each = [
        Parts(Path(job.encoded.folder), -(-len(raw) // samples_per_part), f"{raw.digest} {sorted(identity.items())}")
        for job, raw in zip(jobs, indexes, strict=True)
    ]
    others = [parts for parts in of_each if parts.index_path.exists() and not parts.complete()]
    if others and not overwrite:
        raise DataError(_would_be_lost(others[0], identity))
    for number, (job, raw, parts) in enumerate(zip(jobs, indexes, of_each, strict=True)):
        parts.begin()
        save_tensors({"text": empty_caption}, Path(job.encoded.folder) / EMPTY_CAPTION_NAME)
        metadata = IndexMetadata(corpus=job.encoded.name, stage="encoded", encoders=identity, fps=raw.parts[0].fps)
        works.append(_Work(job, parts, metadata))
        missing += [{"job": number, "part": part} for part in parts.missing()]
        total += len(raw)
        left += sum(min(samples_per_part, len(raw) - part * samples_per_part) for part in parts.missing())
    if missing:
        done, actors = total - left, min(pool.actors, len(missing))
        # one block a part, so that any actor can take the next one
        encoded = ray.data.from_arrow([pa.Table.from_pylist([row]) for row in missing]).map_batches(
            _EncodingActor,
            fn_constructor_args=(works, sources, device, samples_per_part, shard_bytes),
            batch_size=1,
            # of one that finds no room at once the others do not wait
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
        for result in encoded.iter_batches(batch_size=1, batch_format="numpy"):
            if fault := str(result["fault"][0]):
                raise DataError(fault)
            done += int(result["done"].sum())
            progress(done, total)
    merged, faults = [], []
    for work in works:
        try:
            merged.append(work.parts.merge(work.metadata, most_bad, _REPAIR))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    return merged


_REPAIR = "Repair their raw samples, index the raw corpus again (domainshuttle data index), and encode again"


def _would_be_lost(parts: Parts, identity: dict[str, str]) -> str:
    before = read_metadata(parts.index_path).encoders
    changed = [f"{name} was {before.get(name)}, now {now}" for name, now in identity.items() if before.get(name) != now]
    return (
        f"{parts.folder} is a whole encoded corpus, made of other raw samples or by other encoders"
        f"{' (' + '; '.join(changed) + ')' if changed else ''}. Encoding removes it first: say so (domainshuttle "
        "data encode CONFIG --overwrite), or keep it and encode into another `data` folder"
    )
