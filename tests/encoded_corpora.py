"""Corpora that are encoded in this process, without Ray: for tests of encoding."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.encoding import corpus as corpus_module
from domainshuttle.pipelines.encoding.actor import EncodingActor
from domainshuttle.pipelines.encoding.corpus import encode
from domainshuttle.pipelines.encoding.target import Encoded, EncodingJob
from domainshuttle.pipelines.encoding.throughput import Throughput
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.shards.tar import ShardWriter

SOURCES = EncoderSources("block-dct", "byte-umt5", 48)
SAMPLES = list(
    SpritesBuilder(SpritesConfig(kind="image", samples=20, identities=72, side=48, seed=4), "p").build(0, 20)
)


def silent(*_: Any) -> None:
    """No progress."""


@dataclass
class Ran:
    """What stands in Ray Data's place, and what it was given."""

    units: int = 0
    most: int | None = None


class KilledError(Exception):
    """As the driver's end."""


def inline_actors(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Actors run here, in this process: the cluster's part is tested elsewhere."""
    found = Ran()

    def run(
        tasks: Any, encoders: Any, sources: Any, pool: Any, actors: int, most: int, total: int,
        work: list[Counter[str]], speeds: list[Throughput], progress: Any,
    ) -> None:  # fmt: skip
        actor = EncodingActor(encoders, sources, "cpu", 2)
        for task in tasks:
            if found.most is not None and found.units >= found.most:
                raise KilledError
            found.units += 1
            for told in actor({"task": np.array([cloudpickle.dumps(task)], object)}):
                said = json.loads(str(told["told"][0]))
                assert "fault" not in said, said
                work[task.job].update({name: said.get(name, 0) for name in ("encoded", "captions", "copied")})
                if said.get("encoded"):
                    speeds[task.job].add(said["encoded"], said["bytes"], said["busy"], said["seconds"])

    class Remote:
        def __init__(self, function: Any) -> None:
            self.function = function

        def remote(self, *args: Any) -> Any:
            return self.function(*args)

    monkeypatch.setattr(corpus_module, "_run", run)
    monkeypatch.setattr(corpus_module.ray, "remote", lambda **_: Remote)
    monkeypatch.setattr(corpus_module.ray, "get", lambda value: value)
    return found


def write_raw(folder: Path, shards: dict[str, Iterable[RawSample]], bucket: str = "1x32x32") -> None:
    """A raw corpus of these shards, in the order of their names, as `data index` leaves one."""
    shutil.rmtree(folder / "raw", ignore_errors=True)
    rows = []
    for name, samples in sorted(shards.items()):
        infos = {}
        with ShardWriter(folder / "raw", name, 1 << 30) as writer:
            for sample in samples:
                writer.write(sample.key, sample.members())
                infos[sample.key] = sample.info
        rows += [IndexRow.of(entry, infos[entry.key], parse_bucket(bucket)) for entry in writer.entries]
    write_index(folder / "raw" / INDEX_NAME, rows, IndexMetadata(corpus="p", stage="raw"))


def run(folder: Path, sources: EncoderSources = SOURCES, where: str | None = None, **options: Any) -> Encoded:
    job = EncodingJob(
        CorpusSpec("p", "raw", str(folder / "raw")), CorpusSpec("p", "encoded", str(folder / "encoded")), where
    )
    (made,) = encode([job], sources, silent, samples_per_part=4, **options)
    return made


def files(folder: Path) -> dict[str, bytes]:
    """All that lies openly in the encoded corpus."""
    return {path.name: path.read_bytes() for path in (folder / "encoded").iterdir() if path.is_file()}


def captioned(sample: RawSample, caption: str) -> RawSample:
    return RawSample(sample.key, sample.info.model_copy(update={"caption": caption}), sample.files)
