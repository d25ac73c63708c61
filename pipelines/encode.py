"""Encoding: raw shards become encoded shards (latents and text features) on a pool of Ray Data actors.

The plan of the work, not the pictures, goes through Ray: an actor holds the encoders, takes a range of index rows,
reads those samples from their shards itself, and writes the encoded shard itself. So nothing large passes the object
store. Samples that can't be decoded or fitted go to the quarantine table with their reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

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
class _Work:
    """What an actor has to know."""

    corpus: str
    raw_index: Path
    parts: Parts
    sources: EncoderSources
    identity: dict[str, Any]
    samples_per_part: int
    shard_bytes: int


class _EncodingActor:
    """Holds the encoders; each call encodes the parts named in its batch."""

    def __init__(self, work: _Work) -> None:
        torch.set_num_threads(1)
        self.work = work
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.video, self.text = load_encoders(work.sources, self.device)
        self.index = Index.load(work.raw_index, verify=False)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts = [self.encode_part(int(part)) for part in batch["part"]]
        return {"samples": np.array([c[0] for c in counts]), "bad": np.array([c[1] for c in counts])}

    def encode_part(self, part: int) -> tuple[int, int]:
        work = self.work
        start = part * work.samples_per_part
        numbers = range(start, min(start + work.samples_per_part, len(self.index)))
        infos, bad = {}, []
        with ShardWriter(work.parts.folder, work.parts.prefix(part), work.shard_bytes) as writer:
            for row, sample in encode_rows(self.index.rows(list(numbers)), self.video, self.text):
                if isinstance(sample, DataError):
                    bad.append(BadSample(row.source, row.shard, row.key, str(sample)))
                    continue
                writer.write(sample.key, sample.members())
                infos[sample.key] = sample.info, row.bucket
        rows = [IndexRow.of(entry, *infos[entry.key]) for entry in writer.entries]
        metadata = IndexMetadata(corpus=work.corpus, stage="encoded", encoders=work.identity)
        return work.parts.finish(part, rows, bad, metadata)


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
    flat = [picture for pictures in references for picture in pictures]
    encoded = iter(video.encode(torch.cat(flat))[:, :, 0]) if flat else iter(())
    texts = text.encode([sample.info.caption for _, sample in good])
    for (row, sample), target_latents, pictures, words in zip(good, latents, references, texts, strict=True):
        yield row, EncodedSample(
            key=sample.key,
            info=sample.info,
            target=_bits(target_latents),
            references=[_bits(next(encoded)) for _ in pictures],
            text=_bits(words),
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


def encode_corpus(
    corpus: str,
    raw_index: Path,
    folder: Path,
    sources: EncoderSources,
    progress: Progress,
    actors: int = 2,
    gpus_per_actor: float = 0.0,
    samples_per_part: int = 64,
    shard_bytes: int = 1 << 30,
) -> tuple[IndexMetadata, int]:
    """Encodes what is missing of a corpus on the Ray cluster that is connected, and makes the encoded index.

    Returns the index's metadata and the number of samples in quarantine. Raises DataError when too many are bad.
    """
    raw = Index.load(raw_index)
    video, text = load_encoders(sources)
    identity = {"video": video.identity, "text": text.identity, "transform": TRANSFORM}
    parts = Parts(folder, -(-len(raw) // samples_per_part), f"{raw.digest} {sorted(identity.items())}")
    parts.begin()
    save_file({"text": text.encode([""])[0].to(torch.bfloat16).contiguous()}, folder / EMPTY_CAPTION_NAME)
    missing = parts.missing()
    if missing:
        work = _Work(corpus, raw_index, parts, sources, identity, samples_per_part, shard_bytes)
        table = pa.table({"part": pa.array(missing, pa.int64())})
        done = len(raw) - len(missing) * samples_per_part
        # one block a part, so that any actor can take the next one
        encoded = ray.data.from_arrow([table.slice(row, 1) for row in range(len(missing))]).map_batches(
            _EncodingActor,
            fn_constructor_args=(work,),
            batch_size=1,
            concurrency=min(actors, len(missing)),
            num_cpus=1 if not gpus_per_actor else None,
            num_gpus=gpus_per_actor or None,
        )
        for result in encoded.iter_batches(batch_size=1, batch_format="numpy"):
            done += int(result["samples"].sum() + result["bad"].sum())
            progress(max(0, min(done, len(raw))), len(raw))
    return parts.merge(IndexMetadata(corpus=corpus, stage="encoded", encoders=identity))


