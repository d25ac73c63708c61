"""Encoding: raw shards become encoded shards (latents and text features) on a pool of Ray Data actors.

The plan of the work, not the pictures, goes through Ray: an actor holds the encoders, takes a range of index rows,
reads those samples from their shards itself, and writes the encoded shard itself. So nothing large passes the object
store. Samples that can't be decoded or fitted go to the quarantine table with their reason.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray.data
import torch
from safetensors.torch import save_file
from torch import Tensor

from domainshuttle.model.encoders import TextEncoder, VideoEncoder, load_text_encoder, load_video_encoder
from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.corpora.builder import Progress
from domainshuttle.pipelines.index import Index, IndexMetadata, IndexRow
from domainshuttle.pipelines.media import Pixels, decode_image, decode_video, fit_reference, fit_target
from domainshuttle.pipelines.parts import BadSample, Parts
from domainshuttle.pipelines.sample import DataError, EncodedSample, RawSample
from domainshuttle.pipelines.shards import ShardWriter, read_members

EMPTY_CAPTION_NAME = "empty_caption.safetensors"
TRANSFORM = "target: cover and centre crop; references: contain on white; LANCZOS; v1"


@dataclass(frozen=True)
class EncoderSources:
    """Where the encoders come from: names of the built-in ones, folders or hub ids."""

    video: str
    text: str
    text_len: int


@dataclass(frozen=True)
class EncodingJob:
    """One corpus to encode: from its raw index into a folder."""

    corpus: str
    raw_index: Path
    folder: Path


@dataclass(frozen=True)
class _Work:
    """A job with its parts, as the actors need it."""

    job: EncodingJob
    parts: Parts
    metadata: IndexMetadata


class _EncodingActor:
    """Holds the encoders; each call encodes the part of the job that its row names."""

    def __init__(self, works: list[_Work], sources: EncoderSources, samples_per_part: int, shard_bytes: int) -> None:
        torch.set_num_threads(1)
        self.works, self.samples_per_part, self.shard_bytes = works, samples_per_part, shard_bytes
        self.video, self.text = load_encoders(sources, "cuda" if torch.cuda.is_available() else "cpu")
        self.indexes = [Index.load(work.job.raw_index, verify=False) for work in works]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts = [self.encode_part(int(job), int(part)) for job, part in zip(batch["job"], batch["part"], strict=True)]
        return {"done": np.array([sum(count) for count in counts])}

    def encode_part(self, number: int, part: int) -> tuple[int, int]:
        work, index = self.works[number], self.indexes[number]
        start = part * self.samples_per_part
        rows = index.rows(range(start, min(start + self.samples_per_part, len(index))))
        infos, bad = {}, []
        with ShardWriter(work.parts.folder, work.parts.prefix(part), self.shard_bytes) as writer:
            for row, sample in encode_rows(rows, self.video, self.text):
                if isinstance(sample, DataError):
                    bad.append(BadSample(row.source, row.shard, row.key, str(sample)))
                    continue
                writer.write(sample.key, sample.members())
                infos[sample.key] = sample.info, row.bucket
        return work.parts.finish(part, [IndexRow.of(e, *infos[e.key]) for e in writer.entries], bad, work.metadata)


def load_encoders(sources: EncoderSources, device: str = "cpu") -> tuple[VideoEncoder, TextEncoder]:
    """Both encoders, on a device."""
    return load_video_encoder(sources.video, device), load_text_encoder(sources.text, sources.text_len, device)


def encode_rows(
    rows: list[IndexRow], video: VideoEncoder, text: TextEncoder, batch: int = 16
) -> Iterator[tuple[IndexRow, EncodedSample | DataError]]:
    """Encodes raw samples: each row comes back with its encoded sample, or with the reason why there is none."""
    for bucket_name, group in groupby(rows, key=lambda row: row.bucket):
        bucket = parse_bucket(bucket_name)
        waiting = list(group)
        for start in range(0, len(waiting), batch):
            yield from _encode_batch(waiting[start : start + batch], bucket, video, text)


def _encode_batch(
    rows: list[IndexRow], bucket: Bucket, video: VideoEncoder, text: TextEncoder
) -> Iterator[tuple[IndexRow, EncodedSample | DataError]]:
    good: list[tuple[IndexRow, RawSample]] = []
    targets: list[Tensor] = []
    references: list[list[Tensor]] = []
    for row in rows:
        try:
            sample = RawSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
            target, pictures = decode_sample(sample, bucket)
        except DataError as error:
            yield row, error
            continue
        good.append((row, sample))
        targets.append(to_pixels(target))
        references.append([to_pixels(picture[None]) for picture in pictures])
    if not good:
        return
    latents = video.encode(torch.cat(targets))
    flat = [picture for own in references for picture in own]
    encoded = iter(video.encode(torch.cat(flat))[:, :, 0]) if flat else iter(())
    texts = text.encode([sample.info.caption for _, sample in good])
    for (row, sample), target_latents, own, words in zip(good, latents, references, texts, strict=True):
        yield (
            row,
            EncodedSample(
                key=sample.key,
                info=sample.info,
                target=_bits(target_latents),
                references=[_bits(next(encoded)) for _ in own],
                text=_bits(words),
            ),
        )


def decode_sample(sample: RawSample, bucket: Bucket) -> tuple[Pixels, list[Pixels]]:
    """Target [F,H,W,3] and references [H,W,3], decoded and fitted to the bucket; raises DataError."""
    if sample.info.kind == "video":
        target = decode_video(sample.target, bucket.frames, name=f"{sample.key}.{sample.target_extension}")
    else:
        target = decode_image(sample.target, f"{sample.key}.{sample.target_extension}")[None]
    pictures = [
        fit_reference(decode_image(sample.files[one.file], f"{sample.key}.{one.file}"), bucket)
        for one in sample.info.references
    ]
    return fit_target(target, bucket), pictures


def to_pixels(frames: Pixels) -> Tensor:
    """[F,H,W,3] uint8 to [1,3,F,H,W] float32 in -1..1."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2).unsqueeze(0).float().div_(127.5).sub_(1)


def _bits(tensor: Tensor) -> np.ndarray:
    """A tensor as bf16 bit patterns."""
    bits: np.ndarray = tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return bits


def encode(
    jobs: Sequence[EncodingJob],
    sources: EncoderSources,
    progress: Progress,
    actors: int = 2,
    gpus_per_actor: float = 0.0,
    samples_per_part: int = 64,
    shard_bytes: int = 1 << 30,
) -> list[tuple[IndexMetadata, int]]:
    """Encodes what is missing of some corpora on the Ray cluster that is connected, with one pool of actors.

    Returns, for each job, its index's metadata and the number of samples in quarantine. Raises DataError when too many
    are bad.
    """
    video, text = load_encoders(sources)
    identity = {"video": video.identity, "text": text.identity, "transform": TRANSFORM}
    works, missing, total, left = [], [], 0, 0
    for number, job in enumerate(jobs):
        raw = Index.load(job.raw_index)
        parts = Parts(job.folder, -(-len(raw) // samples_per_part), f"{raw.digest} {sorted(identity.items())}")
        parts.begin()
        save_file({"text": text.encode([""])[0].to(torch.bfloat16).contiguous()}, job.folder / EMPTY_CAPTION_NAME)
        works.append(_Work(job, parts, IndexMetadata(corpus=job.corpus, stage="encoded", encoders=identity)))
        missing += [{"job": number, "part": part} for part in parts.missing()]
        total += len(raw)
        left += sum(min(samples_per_part, len(raw) - part * samples_per_part) for part in parts.missing())
    if missing:
        done = total - left
        # one block a part, so that any actor can take the next one
        encoded = ray.data.from_arrow([pa.Table.from_pylist([row]) for row in missing]).map_batches(
            _EncodingActor,
            fn_constructor_args=(works, sources, samples_per_part, shard_bytes),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(missing))),
            num_cpus=None if gpus_per_actor else 1,
            num_gpus=gpus_per_actor or None,
        )
        for result in encoded.iter_batches(batch_size=1, batch_format="numpy"):
            done += int(result["done"].sum())
            progress(done, total)
    return [work.parts.merge(work.metadata) for work in works]
