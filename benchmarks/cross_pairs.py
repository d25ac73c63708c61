"""How busy the models of cross pairs are kept: a made model takes its time, and what stands beside it is real.

Clips are read and decoded on CPUs as `data pair` does it, travel through Ray Data's actors, and a made model sleeps for
`--seconds` a sample instead of finding boxes. The share of time in which it sleeps is what a GPU would be busy for.
Run: python benchmarks/cross_pairs.py --samples 400 --seconds 0.25
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from domainshuttle.cluster.local import Connection, quiet_ray
from domainshuttle.pipelines.curation.pairs.candidates import CandidateStore, names_in
from domainshuttle.pipelines.curation.pairs.config import PairConfig, PairModels
from domainshuttle.pipelines.curation.pairs.find import FindJob, Look
from domainshuttle.pipelines.curation.stage import Step, Work, pass_through
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.pipelines.sample import RawSample, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.values import ActorPool

FRAMES, SIZE = 49, (480, 832)


def made_corpus(folder: Path, samples: int) -> CorpusSpec:
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 30, 52, 3), np.uint8)
    clip = encode_mp4(noise.repeat(16, 1).repeat(16, 2), 16)
    info = SampleInfo(
        caption="A dog.", source="made", kind="video", fps=16, frames=FRAMES, size=SIZE,
        subjects=[Subject(id=0, word="dog", domain=1)], references=[],
    )  # fmt: skip
    with ShardWriter(folder, "made", 256 << 20) as writer:
        for number in range(samples):
            sample = RawSample(f"s{number}", info, {"mp4": clip})
            writer.write(sample.key, sample.members())
    rows = [IndexRow.of(entry, info, "49x480x832") for entry in writer.entries]
    write_index(folder / "index.parquet", rows, IndexMetadata(corpus="made", stage="raw"))
    return CorpusSpec("made", "raw", str(folder))


class Model:
    """Takes its time, and notes when."""

    def __init__(self, seconds: float, log: Path) -> None:
        self.seconds, self.log = seconds, log / f"{os.getpid()}.jsonl"

    def __call__(self, works: list[Work]) -> None:
        with self.log.open("a") as file:
            for work in works:
                begin = time.time()
                time.sleep(self.seconds)
                work.carried = {"candidates": [], **{k: v for k, v in work.carried.items() if k == "fault"}}
                file.write(json.dumps([begin, time.time()]) + "\n")


def spans(log: Path) -> Iterator[list[list[float]]]:
    for path in log.iterdir():
        yield [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=0.25, help="of the made model for a sample")
    parser.add_argument("--decode", type=int, default=1, help="actors that decode")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, Connection():
        quiet_ray()
        folder = Path(place)
        raw = made_corpus(folder / "raw", options.samples)
        (log := folder / "log").mkdir()
        config = PairConfig(models=PairModels(detector="/x", segmenter="/x", dino="/x", clip="/x"))
        job = FindJob(raw, CandidateStore(folder / "store"), tuple(range(options.samples)))
        (folder / "store").mkdir()
        steps = [
            Step(Look, (config,), ActorPool(actors=options.decode, cpus=0.5)),
            Step(Model, (options.seconds, log), ActorPool(cpus=0.5)),
        ]
        began = time.monotonic()
        done = sum(pass_through(job, range(job.parts), steps))
        took = time.monotonic() - began
        assert done == options.samples == len(job.store.gather(names_in(Index.load(raw.index))))
        for calls in spans(log):
            busy = sum(end - begin for begin, end in calls)
            print(f"busy {busy / (calls[-1][1] - calls[0][0]):.1%} from its first sample to its last of {len(calls)}")
        print(f"{done} samples in {took:.1f} s, of which {options.samples * options.seconds:.1f} s are the model's")


if __name__ == "__main__":
    main()
