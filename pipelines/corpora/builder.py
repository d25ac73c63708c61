"""Builds a corpus: samples of any source become raw shards and an index, on Ray tasks, in parts that survive a stop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from domainshuttle.pipelines.buckets import Bucket, choose_bucket, frames_at
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import Parts
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS, BadSample
from domainshuttle.pipelines.ray_tasks import Progress
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.shards.tar import ShardWriter


class CorpusBuilder(Protocol):
    """One source dataset. `len` is how many samples it has; sample i must not depend on which others are asked for."""

    def __len__(self) -> int: ...

    def build(self, start: int, stop: int) -> Iterator[RawSample]:
        """Samples start..stop-1, in order; raises DataError for one that can't be made."""
        ...


def make_builder(config: SpritesConfig, source: str) -> CorpusBuilder:
    """The builder that a corpus's configuration asks for; its samples name `source`, the corpus, as theirs."""
    return SpritesBuilder(config, source)


def build_part(
    parts: Parts, part: int, corpus: str, config: SpritesConfig, buckets: list[Bucket], samples_per_part: int,
    shard_bytes: int, fps: float | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Makes one part of a raw corpus; returns how many samples it has and how many went to quarantine."""
    builder = make_builder(config, corpus)
    start = part * samples_per_part
    bad: list[BadSample] = []
    infos = {}
    with ShardWriter(parts.folder, parts.prefix(part), shard_bytes) as writer:
        for sample in builder.build(start, min(start + samples_per_part, len(builder))):
            try:
                frames = frames_at(sample.info.frames, sample.info.fps, fps)
                bucket = choose_bucket(frames, *sample.info.size, buckets)
            except DataError as error:
                bad.append(BadSample(sample.info.source, "", sample.key, f"no bucket: {error}"))
                continue
            writer.write(sample.key, sample.members())
            infos[sample.key] = sample.info, bucket
    rows = [IndexRow.of(entry, *infos[entry.key]) for entry in writer.entries]
    return parts.finish(part, rows, bad, IndexMetadata(corpus=corpus, stage="raw", fps=fps))


def build_corpus(
    corpus: str,
    config: SpritesConfig,
    buckets: list[Bucket],
    folder: Path,
    progress: Progress,
    samples_per_part: int = 128,
    shard_bytes: int = 256 << 20,
    fps: float | None = None,
    most_bad: float = MOST_BAD_IN_CORPUS,
) -> tuple[IndexMetadata, int]:
    """Builds what is missing of a raw corpus on the Ray cluster that is connected, and its index.

    `fps` is the rate at which clips will be sampled, by which buckets are chosen (None: each clip's own).
    Returns the index's metadata and the number of samples in quarantine. Raises DataError when more than
    `most_bad` are.
    """
    import ray

    total = len(make_builder(config, corpus))
    recipe = f"{config.model_dump_json()} {[str(bucket) for bucket in buckets]} {fps}"
    parts = Parts(folder, -(-total // samples_per_part), recipe)
    parts.begin()
    make: Any = ray.remote(max_retries=3)(build_part)  # Ray's annotations end at seven arguments
    pending = [
        make.remote(parts, part, corpus, config, buckets, samples_per_part, shard_bytes, fps)
        for part in parts.missing()
    ]
    done = total - min(total, len(pending) * samples_per_part)
    while pending:
        finished, pending = ray.wait(pending)
        done = min(total, done + sum(sum(result) for result in ray.get(finished)))
        progress(done, total)
    return parts.merge(IndexMetadata(corpus=corpus, stage="raw", fps=fps), most_bad)
