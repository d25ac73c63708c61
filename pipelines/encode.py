"""Encoding: raw shards become encoded shards (latents and text features) on a pool of Ray Data actors.

The plan of the work, not the pictures, goes through Ray: an actor holds the encoders, takes a range of index rows,
reads those samples from their shards itself, and writes the encoded shard itself. So nothing large passes the object
store. Samples that can't be decoded or fitted go to the quarantine table with their reason.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import save_file
from torch import Tensor

from domainshuttle.model.encoders import (
    TextEncoder,
    VideoEncoder,
    load_text_encoder,
    load_video_encoder,
    network_dtype,
)
from domainshuttle.pipelines.blame import of_sample
from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.corpora.builder import Progress
from domainshuttle.pipelines.feed import EncoderSources
from domainshuttle.pipelines.index import Index, IndexMetadata, IndexRow, read_metadata
from domainshuttle.pipelines.media import Pixels, apply_view, decode_image, decode_video, fit_reference, fit_target
from domainshuttle.pipelines.pairing import AugmentedView, augmented_view, single_pictures
from domainshuttle.pipelines.parts import EMPTY_CAPTION_NAME, MOST_BAD_RAW, BadSample, Parts
from domainshuttle.pipelines.sample import DataError, EncodedSample, RawSample
from domainshuttle.pipelines.shards import ShardWriter, read_members

TRANSFORM = (
    "pictures upright by EXIF, 16 bits scaled; target: cover and centre crop, sampled by time; references, single ones "
    "with a view: contain on white; v3"
)


@dataclass(frozen=True)
class EncodingJob:
    """One corpus to encode: from its raw index into a folder."""

    corpus: str
    raw_index: Path
    folder: Path


@dataclass(frozen=True)
class EncodingPool:
    """The actors that encode, and what each reserves (fractions are allowed)."""

    actors: int = 2
    cpus: float = 1.0
    gpus: float = 0.0

    @classmethod
    def of_nodes(
        cls,
        nodes: Sequence[Mapping[str, float]],
        actors: int | None = None,
        cpus: float = 1.0,
        gpus: float | None = None,
    ) -> "EncodingPool":
        """What is asked for; of what is not (None): a GPU an actor where a node has one, and as many actors as fit on
        the nodes, given by their resources as Ray names them."""
        if gpus is None:
            gpus = float(any(node.get("GPU", 0.0) >= 1 for node in nodes))
        if actors is None:
            needs = [(name, need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
            # a hair more, since 0.3 / 0.1 is below 3
            actors = sum(int(min((node.get(name, 0.0) / need for name, need in needs), default=1) + 1e-6)
                         for node in nodes)  # fmt: skip
        return cls(max(actors, 1), cpus, gpus)


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
            for row, sample in encode_rows(rows, self.video, self.text, work.metadata.fps):
                if isinstance(sample, DataError):
                    bad.append(BadSample(row.source, row.shard, row.key, str(sample)))
                    continue
                writer.write(sample.key, sample.members())
                infos[sample.key] = sample.info, row.bucket, len(sample.text)
        return work.parts.finish(part, [IndexRow.of(e, *infos[e.key]) for e in writer.entries], bad, work.metadata)


def load_encoders(sources: EncoderSources, device: str = "cpu") -> tuple[VideoEncoder, TextEncoder]:
    """Both encoders, on a device; the video encoder computes in float32 on each."""
    text = load_text_encoder(sources.text, sources.text_len, device, network_dtype(device))
    return load_video_encoder(sources.video, device), text


class SampleEncoder:
    """Both encoders, for one clip, picture or caption at a time.

    So what comes out depends on nothing that is encoded beside it: a corpus encoded beforehand and one encoded while it
    is trained on give the same bits, and one clip at a time is what a GPU's memory holds at full size anyway.
    """

    def __init__(self, video: VideoEncoder, text: TextEncoder) -> None:
        self._video, self._text = video, text
        self.caption = lru_cache(_CAPTIONS_KEPT)(self._caption)

    @torch.no_grad()
    def target(self, frames: Pixels) -> Tensor:
        """[F,H,W,3] uint8 to bf16 latents [16,f,h,w] on the CPU."""
        return self._video.encode(to_pixels(frames))[0].to("cpu", torch.bfloat16).contiguous()

    def picture(self, picture: Pixels) -> Tensor:
        """[H,W,3] uint8 to bf16 latents [16,h,w] on the CPU."""
        return self.target(picture[None])[:, 0]

    def _caption(self, caption: str) -> Tensor:
        """bf16 states [l,d] on the CPU; the last captions' are kept, as they come again in each epoch."""
        return self._text.encode([caption])[0].to("cpu", torch.bfloat16).contiguous()


_CAPTIONS_KEPT = 256


@dataclass(frozen=True)
class _Decoded:
    """A raw sample in pixels, fitted to its bucket: target [F,H,W,3], references and views [H,W,3]."""

    sample: RawSample
    target: Pixels
    references: list[Pixels]
    views: dict[int, Pixels]


def encode_rows(
    rows: list[IndexRow], video: VideoEncoder, text: TextEncoder, fps: float | None = None
) -> Iterator[tuple[IndexRow, EncodedSample | DataError]]:
    """Encodes raw samples, clips sampled at `fps`: each row comes back with its encoded sample, or with the reason why
    there is none. While one is encoded, a thread reads and decodes the next: no more than two are held in pixels."""
    encoder = SampleEncoder(video, text)
    waiting: deque[tuple[IndexRow, Future[_Decoded]]] = deque()
    with ThreadPoolExecutor(1, "decode") as pool:
        for row in rows:
            waiting.append((row, pool.submit(_decode_row, row, fps)))
            if len(waiting) > 1:
                yield _finished(encoder, *waiting.popleft())
        while waiting:
            yield _finished(encoder, *waiting.popleft())


def _decode_row(row: IndexRow, fps: float | None) -> _Decoded:
    with of_sample(f"{row.source}/{row.key}"):
        sample = RawSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
        bucket = parse_bucket(row.bucket)
        target, pictures = decode_sample(sample, bucket, fps)
        # one view for the whole corpus: the pixels are gone when it is trained on
        views = {
            number: decode_reference(sample, number, bucket, augmented_view(0, 0, row.sample_id, number))
            for number in single_pictures([reference.subject for reference in sample.info.references])
        }
        return _Decoded(sample, target, pictures, views)


def _finished(
    encoder: SampleEncoder, row: IndexRow, decoding: Future[_Decoded]
) -> tuple[IndexRow, EncodedSample | DataError]:
    try:
        decoded = decoding.result()
        with of_sample(f"{row.source}/{row.key}"):
            return row, EncodedSample(
                key=decoded.sample.key,
                info=decoded.sample.info,
                target=_bits(encoder.target(decoded.target)),
                references=[_bits(encoder.picture(picture)) for picture in decoded.references],
                text=_bits(encoder.caption(decoded.sample.info.caption)),
                views={number: _bits(encoder.picture(picture)) for number, picture in decoded.views.items()},
            )
    except DataError as error:
        return row, error


def decode_sample(sample: RawSample, bucket: Bucket, fps: float | None = None) -> tuple[Pixels, list[Pixels]]:
    """Target [F,H,W,3], a clip sampled at `fps`, and references [H,W,3], decoded and fitted to the bucket; raises
    DataError."""
    pictures = [decode_reference(sample, number, bucket) for number in range(len(sample.info.references))]
    return decode_target(sample, bucket, fps), pictures


def decode_target(sample: RawSample, bucket: Bucket, fps: float | None = None) -> Pixels:
    """The target [F,H,W,3], a clip sampled at `fps`, decoded and fitted to the bucket; raises DataError."""
    name = f"{sample.key}.{sample.target_extension}"
    if sample.info.kind == "video":
        return decode_video(sample.target, bucket.frames, fps, name, fit=bucket)
    return fit_target(decode_image(sample.target, name)[None], bucket)


def decode_reference(sample: RawSample, number: int, bucket: Bucket, view: AugmentedView | None = None) -> Pixels:
    """Reference `number` [H,W,3], altered where a view is given, decoded and fitted to the bucket; raises DataError."""
    file = sample.info.references[number].file
    picture = decode_image(sample.files[file], f"{sample.key}.{file}")
    return fit_reference(picture if view is None else apply_view(picture, view), bucket)


def to_pixels(frames: Pixels) -> Tensor:
    """[F,H,W,3] uint8 to [1,3,F,H,W] float32 in -1..1."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2).unsqueeze(0).float().div_(127.5).sub_(1)


def _bits(tensor: Tensor) -> np.ndarray:
    """A bf16 tensor as its bit patterns."""
    bits: np.ndarray = tensor.contiguous().view(torch.uint16).numpy()
    return bits


def _describe_encoders(sources: EncoderSources, device: str) -> tuple[dict[str, str], Tensor]:
    """What both encoders call themselves, and the empty caption's bf16 states [l,d]. A task with an actor's resources,
    since the driver may have no room for UMT5-XXL."""
    video, text = load_encoders(sources, device)
    return {"video": video.identity, "text": text.identity}, SampleEncoder(video, text).caption("")


def encode(
    jobs: Sequence[EncodingJob],
    sources: EncoderSources,
    progress: Progress,
    pool: EncodingPool | None = None,
    samples_per_part: int = 64,
    shard_bytes: int = 1 << 30,
    anew: bool = False,
    most_bad: float = MOST_BAD_RAW,
) -> list[tuple[IndexMetadata, int]]:
    """Encodes what is missing of some corpora on the Ray cluster that is connected, with one pool of actors.

    Returns, for each job, its index's metadata and the number of samples in quarantine. Raises DataError for encoders
    that can't be loaded, for a whole corpus of other encoders or other raw samples unless it is to be made `anew`, and,
    when all others have their indexes, for those of which more than `most_bad` of the samples are bad.
    """
    pool = pool or EncodingPool()
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
    indexes = [Index.load(job.raw_index) for job in jobs]
    of_each = [
        Parts(job.folder, -(-len(raw) // samples_per_part), f"{raw.digest} {sorted(identity.items())}")
        for job, raw in zip(jobs, indexes, strict=True)
    ]
    others = [parts for parts in of_each if parts.index_path.exists() and not parts.complete()]
    if others and not anew:
        raise DataError(_would_be_lost(others[0], identity))
    for number, (job, raw, parts) in enumerate(zip(jobs, indexes, of_each, strict=True)):
        parts.begin()
        save_file({"text": empty_caption}, job.folder / EMPTY_CAPTION_NAME)
        metadata = IndexMetadata(corpus=job.corpus, stage="encoded", encoders=identity, fps=raw.parts[0].fps)
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
            done += int(result["done"].sum())
            progress(done, total)
    merged, faults = [], []
    for work in works:
        try:
            merged.append(work.parts.merge(work.metadata, most_bad))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    return merged


def _would_be_lost(parts: Parts, identity: dict[str, str]) -> str:
    before = read_metadata(parts.index_path).encoders
    changed = [f"{name} was {before.get(name)}, now {now}" for name, now in identity.items() if before.get(name) != now]
    return (
        f"{parts.folder} is a whole encoded corpus, made of other raw samples or by other encoders"
        f"{' (' + '; '.join(changed) + ')' if changed else ''}. Encoding removes it first: say so (domainshuttle "
        "data encode CONFIG --anew), or keep it and encode into another `data` folder"
    )
