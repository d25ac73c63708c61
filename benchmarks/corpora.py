"""How fast public datasets become raw shards: the scan of a large JSON, and the build from files.

Run by hand: python benchmarks/corpora.py json [--gigabytes 4]
             python benchmarks/corpora.py build [--samples 64]

`json` makes a file in the form of OpenS2V's regular pairs and measures, each in a process of its own: reading it,
ours (`json_records`, alone and with each record parsed), ijson's fastest backend where it is installed, and the survey
of the source, with each one's highest memory.
`build` measures the building of a folder of clips and pictures beside what it can't be without: reading the files,
decoding each picture and each clip's first frame, and webdataset's writer. CPU seconds of one process, since the file
system's cache holds the files.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

MIB = 1 << 20


def record(rng: np.random.Generator) -> dict[str, object]:
    """A clip of OpenS2V's regular pairs, of the size that the published ones have (about 30 KB)."""
    words = [f"subject {number}" for number in range(6)]
    counts = "".join(chr(code) for code in rng.integers(48, 112, 700))
    frames = {
        str(frame): {
            word: {"bbox": rng.integers(0, 1280, 4).tolist(), "mask_rle": {"size": [720, 1280], "counts": counts},
                   "aesthetic_score": 5.1, "text": "a \\ in a \"text\" {of} [brackets]"}
            for word in words
        }
        for frame in range(5)
    }  # fmt: skip
    return {
        "metadata": {"path": "a/b.mp4", "fps": 24.0, "face_cap_qwen": "The video features " + "words " * 150},
        "annotation": {"mask_map": frames, "ann_frame_data": {"text_rules": words}},
    }


def write_json(path: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    records = [json.dumps(record(rng)).encode() for _ in range(64)]
    number = written = 0
    with path.open("wb") as file:
        file.write(b"{")
        while written < size:
            data = records[number % len(records)]
            written += file.write(b'%s"key_%d": %s' % (b", " if number else b"", number, data))
            number += 1
        file.write(b"}")


def read_only(path: Path) -> int:
    count = 0
    with path.open("rb") as file:
        while file.read(MIB):
            count += 1
    return count


def scan(path: Path) -> int:
    from domainshuttle.pipelines.corpora.json_records import json_records

    return sum(1 for _ in json_records(path))


def scan_and_parse(path: Path) -> int:
    from domainshuttle.pipelines.corpora.json_records import json_records

    return sum(1 for located in json_records(path) if located.parse("a record"))


def with_ijson(path: Path) -> int:
    import ijson

    with path.open("rb") as file:
        return sum(1 for _ in ijson.kvitems(file, "", use_float=True))


JSON_WAYS: dict[str, Callable[[Path], int]] = {
    "reading": read_only,
    "json_records": scan,
    "json_records, parsed": scan_and_parse,
    "ijson": with_ijson,
}


def measure_json(gigabytes: float, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.json"
        write_json(path, int(gigabytes * (1 << 30)))
        size = path.stat().st_size
        print(f"{size / (1 << 30):.2f} GiB")
        rates: dict[str, list[float]] = {name: [] for name in JSON_WAYS}
        memory: dict[str, float] = {}
        for _ in range(rounds):  # in turns, so that what else the machine does meets all of them
            for name in JSON_WAYS:
                command = [sys.executable, __file__, "one", name, str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    memory[name] = float("nan")
                    continue
                seconds, memory[name] = json.loads(done.stdout.splitlines()[-1])
                rates[name].append(size / MIB / seconds)
        for name, found in rates.items():
            if found:
                print(f"{name:22} {statistics.median(found):7.0f} MiB a CPU second, {memory[name]:6.0f} MiB at most")
            else:
                print(f"{name:22} is not installed")


def run_one(name: str, path: Path) -> None:
    """One way in this process: its CPU seconds and highest memory, as JSON."""
    began = time.process_time()
    JSON_WAYS[name](path)
    print(json.dumps([time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def make_folder(folder: Path, samples: int) -> None:
    """Clips of 81x480x832 and two pictures of each, in a manifest."""
    from decoding import moving_clip
    from PIL import Image

    clip = moving_clip(81, 480, 832, 16.0)
    rng = np.random.default_rng(0)
    with (folder / "all.jsonl").open("w") as manifest:
        for number in range(samples):
            (folder / f"{number}.mp4").write_bytes(clip + bytes(8) + number.to_bytes(8, "big"))
            pictures = []
            for which in range(2):
                coarse = rng.integers(0, 256, (64, 64, 3), np.uint8)
                picture = Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)
                picture.save(buffer := io.BytesIO(), "JPEG", quality=92)
                pictures.append(f"{number}-{which}.jpg")
                (folder / pictures[-1]).write_bytes(buffer.getvalue())
            row = {"target": f"{number}.mp4", "caption": "a clip", "subjects": ["thing"],
                   "references": [{"path": path, "subject": 0} for path in pictures]}  # fmt: skip
            manifest.write(json.dumps(row) + "\n")


def limit(folder: Path, out: Path) -> None:
    """What no builder can be without."""
    import webdataset

    from domainshuttle.pipelines.media.decode import decode_image, decode_video

    with webdataset.TarWriter(str(out / "limit.tar")) as writer:
        for line in (folder / "all.jsonl").open():
            row = json.loads(line)
            sample = {"__key__": Path(row["target"]).stem, "mp4": (folder / row["target"]).read_bytes(), "json": row}
            decode_video(sample["mp4"], 1)
            for number, one in enumerate(row["references"]):
                sample[f"ref{number}.jpg"] = (folder / one["path"]).read_bytes()
                decode_image(sample[f"ref{number}.jpg"])
            writer.write(sample)


def build(folder: Path, out: Path) -> None:
    """As a task of `data build` makes a part."""
    from domainshuttle.pipelines.buckets import parse_bucket
    from domainshuttle.pipelines.corpora.builder import PartJob, build_part
    from domainshuttle.pipelines.corpora.manifest import ManifestConfig
    from domainshuttle.pipelines.corpora.registry import make_source
    from domainshuttle.pipelines.corpora.survey import open_survey
    from domainshuttle.pipelines.index.parts import Parts

    config = ManifestConfig(folder=str(folder), manifests=["all.jsonl"], samples=None)
    source = make_source(config, "benchmark")
    survey = open_survey(out / "work", source, "benchmark")
    for number in survey.missing():
        survey.take(number, source)
    rows, _, _ = survey.select(None)
    survey.write_tables()
    parts = Parts(out, 1, "benchmark")
    parts.begin()
    job = PartJob("benchmark", config, survey, [parse_bucket("81x480x832")], 1 << 30, None)
    good, bad = build_part(parts, 0, job, rows)
    assert good == len(rows) and not bad


def measure_build(samples: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        folder.mkdir()
        make_folder(folder, samples)
        size = sum(path.stat().st_size for path in folder.iterdir()) / MIB
        found: dict[str, list[float]] = {"limit": [], "build": []}
        for number, way in alternately(rounds):
            out = Path(place) / f"{way}{number}"
            out.mkdir()
            began = time.process_time()
            {"limit": limit, "build": build}[way](folder, out)
            if number:  # the first round imports and warms up
                found[way].append(time.process_time() - began)
        limits, ours = (statistics.median(found[way]) for way in ("limit", "build"))
        print(f"{samples} samples of {size / samples:.2f} MiB: CPU milliseconds a sample, medians of {rounds}")
        print(f"limit {1000 * limits / samples:7.1f}   {size / limits:6.0f} MiB/s")
        print(f"build {1000 * ours / samples:7.1f}   {size / ours:6.0f} MiB/s, {limits / ours:.0%} of the limit's rate")


def alternately(rounds: int) -> Iterator[tuple[int, str]]:
    for number in range(rounds + 1):
        for way in ("limit", "build") if number % 2 else ("build", "limit"):
            yield number, way


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="what", required=True)
    of_json = ways.add_parser("json")
    of_json.add_argument("--gigabytes", type=float, default=4.0)
    of_json.add_argument("--rounds", type=int, default=3)
    of_build = ways.add_parser("build")
    of_build.add_argument("--samples", type=int, default=64)
    of_build.add_argument("--rounds", type=int, default=5)
    of_one = ways.add_parser("one")
    of_one.add_argument("name", choices=[*JSON_WAYS])
    of_one.add_argument("path", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.what == "json":
        measure_json(options.gigabytes, options.rounds)
    elif options.what == "build":
        measure_build(options.samples, options.rounds)
    else:
        run_one(options.name, options.path)
