"""The step plan and the index at 10 million samples: time and memory of each thing that a run does with them.

    python benchmarks/plan.py                  # 10 corpora of a million rows, about 3 minutes, 4 GB of disk
    python benchmarks/plan.py --corpora 2      # smaller

Each line is measured in a process of its own, so that the peaks of its memory are its own: the largest resident set,
the libraries' 200 MB and mapped pages of files included, and the most of it that is anonymous, which no process shares.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from domainshuttle.pipelines.buckets import standard_buckets
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import SCHEMA, Index, IndexMetadata, write_index
from domainshuttle.pipelines.plan.feed import PLAN_COLUMNS, Feed
from domainshuttle.pipelines.plan.step_plan import StepPlan

GLOBAL_BATCH = 64
SEEKS, FARTHEST_STEP = 1000, 10**7
SUBJECTS, REFERENCES = 2, 4
ROWS_PER_SHARD = 1000
FILTER = "references >= 2 and scores.aesthetic > 4.5 and 'human' in domains"
FILTER_COLUMNS = ("source", "bucket", "reference_subjects", "scores", "domains")
LIMITS = {"seek": 0.05, "memory": 1e9}
"""What is promised: any step in 50 ms, the plan's process and what a rank holds of its own within 1 GB."""


def rows(corpus: int, count: int) -> pa.Table:
    """`count` rows of a corpus as columns, without a Python object a row."""
    rng = np.random.default_rng(corpus)
    numbers = np.arange(count)
    buckets = [str(bucket) for bucket in standard_buckets("480p", (1, 49, 81))]
    kinds = rng.integers(0, 2, count, np.int32)
    sizes = rng.integers(300_000, 6_000_000, (count, 2))
    members = pa.StructArray.from_arrays(
        [
            pa.DictionaryArray.from_arrays(np.tile([0, 1], count).astype(np.int32), ["json", "safetensors"]).cast(
                pa.string()
            ),
            pa.array(np.cumsum(sizes).astype(np.int64)),
            pa.array(sizes.ravel().astype(np.int64)),
        ],
        fields=list(SCHEMA.field("members").type.value_type),
    )
    scores = pa.MapArray.from_arrays(
        _offsets(count, 2),
        pa.DictionaryArray.from_arrays(np.tile([0, 1], count).astype(np.int32), ["aesthetic", "motion"]).cast(
            pa.string()
        ),
        pa.array(rng.normal(5, 1, 2 * count)),
    )
    columns: dict[str, Any] = {
        "source": _names(np.zeros(count, np.int32), [f"corpus-{corpus}"]),
        "shard": _names(
            (numbers // ROWS_PER_SHARD).astype(np.int32),
            [f"clips-{shard:06d}.tar" for shard in range(-(-count // ROWS_PER_SHARD))],
        ),
        "key": pc.binary_join_element_wise(f"clip-{corpus}", pc.cast(pa.array(numbers), pa.string()), "-"),
        "sample_id": pa.array((numbers + corpus * count) * 0x9E3779B97F4A7C1),
        "members": pa.ListArray.from_arrays(_offsets(count, 2), members),
        "kind": _names(kinds, ["image", "video"]),
        "frames": pa.array(np.where(kinds == 0, 1, 81).astype(np.int32)),
        "height": pa.array(np.full(count, 480, np.int32)),
        "width": pa.array(np.full(count, 832, np.int32)),
        "fps": pa.array(np.full(count, 16, np.float32), mask=kinds == 0),
        "bucket": _names(rng.integers(0, len(buckets), count, np.int32), buckets),
        "subjects": _lists(pa.array(["dog", "woman"] * count), SUBJECTS),
        "domains": _lists(pa.array(rng.integers(0, 5, SUBJECTS * count).astype(np.int8)), SUBJECTS),
        "reference_subjects": _lists(pa.array(np.tile([0, 0, 1, 1], count).astype(np.int8)), REFERENCES),
        "reference_origins": _lists(pa.array(["same_clip", "other_clip"] * (2 * count)), REFERENCES),
        "caption_length": pa.array(rng.integers(50, 900, count, np.int32)),
        "scores": scores,
        "checksum": pa.array(rng.integers(0, 1 << 63, count, np.uint64)),
    }
    for field in SCHEMA:  # columns that were added later: zeros
        if field.name not in columns:
            columns[field.name] = pa.array(np.zeros(count, field.type.to_pandas_dtype()))
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _offsets(count: int, each: int) -> pa.Array:
    return pa.array(np.arange(count + 1, dtype=np.int32) * each)


def _lists(values: pa.Array, each: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(len(values) // each, each), values)


def _names(codes: np.ndarray, names: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(codes, pa.array(names))


def paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/index.parquet"))


def write(folder: Path, corpora: int, count: int) -> Iterator[tuple[str, float]]:
    """Writing the index files, checks and digest included; the columns are made outside of the time."""
    seconds = 0.0
    for corpus in range(corpora):
        table = rows(corpus, count)
        began = time.perf_counter()
        path = folder / f"corpus-{corpus:03d}" / "index.parquet"
        write_index(path, table, IndexMetadata(corpus=f"corpus-{corpus}", stage="encoded"))
        seconds += time.perf_counter() - began
    yield "write", seconds


def joined(folder: Path, columns: tuple[str, ...]) -> Index:
    return Index.concat([Index.load(path, columns, verify=False) for path in paths(folder)])


def plan(folder: Path, *_: int) -> Iterator[tuple[str, float]]:
    """What the plan needs of the index, the plan, and random steps of it."""
    began = time.perf_counter()
    index = joined(folder, PLAN_COLUMNS)
    yield "load the plan's columns", time.perf_counter() - began
    began = time.perf_counter()
    steps = StepPlan(index, None, 0, GLOBAL_BATCH, by="corpus")
    yield "build the plan", time.perf_counter() - began
    yield from _seeks(steps)


def _seeks(steps: StepPlan) -> Iterator[tuple[str, float]]:
    times = []
    for step in np.random.default_rng(0).integers(0, FARTHEST_STEP, SEEKS):
        began = time.perf_counter()
        steps[int(step)]
        times.append(time.perf_counter() - began)
    yield f"seek a step, median of {SEEKS} random ones", statistics.median(times)
    yield "seek a step, slowest of them", max(times)


def filtered(folder: Path, *_: int) -> Iterator[tuple[str, float]]:
    """A stage's filter on the columns it names, and the plan of what is left."""
    began = time.perf_counter()
    index = joined(folder, FILTER_COLUMNS)
    yield "load the filter's five columns", time.perf_counter() - began
    began = time.perf_counter()
    kept = index.filter(FILTER)
    yield f"filter ({len(kept) / len(index):.0%} kept)", time.perf_counter() - began


def first_rank(folder: Path, *_: int) -> Iterator[tuple[str, float]]:
    """A rank on a node where no other was: it makes the file that all of them map."""
    yield from reader(folder, "make and map what ranks read by")


def further_rank(folder: Path, *_: int) -> Iterator[tuple[str, float]]:
    """Every other rank of the node, also of later runs."""
    yield from reader(folder, "map what ranks read by")


def reader(folder: Path, what: str) -> Iterator[tuple[str, float]]:
    """What a rank holds: the feed's index, of which it asks the rows of its samples."""
    feed = Feed(
        shares=tuple(CorpusShare(path.parent.name, str(path)) for path in paths(folder)),
        seed=0,
        global_batch=GLOBAL_BATCH,
        micro_batch=1,
        text_len=1,
        references=1,
    )
    began = time.perf_counter()
    index = feed.index()
    yield what, time.perf_counter() - began
    wanted = np.random.default_rng(os.getpid()).integers(0, len(index), (50, GLOBAL_BATCH))
    began = time.perf_counter()
    for numbers in wanted:
        index.rows(numbers)
    yield f"rows of {GLOBAL_BATCH} samples", (time.perf_counter() - began) / len(wanted)


PARTS: dict[str, Callable[..., Iterator[tuple[str, float]]]] = {
    "write": write,
    "plan": plan,
    "filter": filtered,
    "first rank of a node": first_rank,
    "further rank": further_rank,
}


class AnonymousMemory:
    """The most anonymous memory that this process had, in bytes, looked at every 5 ms."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            kilobytes = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            self.peak = max(self.peak, int(kilobytes[1]) * 1024 if kilobytes else 0)
            time.sleep(0.005)


def in_its_own_process(part: str, folder: Path, corpora: int, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
    command += ["--corpora", str(corpora), "--rows", str(count)]
    # the mapped index lies in the temporary folder: in one of its own, the first rank is a node's first
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, dict[str, Any]], total: int, size: int, mapped: int) -> None:
    title = f"Plan and index at {total:,} samples ({size / 1e6:,.0f} MB of Parquet, {mapped / 1e6:,.0f} MB mapped)"
    table = Table(title=title, title_justify="left")
    for name in ("process", "what", "time", "peak memory", "of it anonymous"):
        table.add_column(name, justify="left" if name in ("process", "what") else "right")
    for part, result in results.items():
        memory = [f"{result[kind] / 1e6:,.0f} MB" for kind in ("memory", "anonymous")]
        for number, (what, seconds) in enumerate(result["times"].items()):
            shown = f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.2f} ms"
            table.add_row("" if number else part, what, shown, *(["", ""] if number else memory))
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    slowest, memory = max(list(results["plan"]["times"].values())[2:]), results["plan"]["memory"]
    for name, value, limit, unit in (
        ("any step sought", slowest * 1000, LIMITS["seek"] * 1000, "ms"),
        ("memory of the plan", memory / 1e6, LIMITS["memory"] / 1e6, "MB"),
        ("memory of a rank's index", results["further rank"]["anonymous"] / 1e6, LIMITS["memory"] / 1e6, "MB"),
    ):
        print(f"{'kept  ' if value <= limit else 'broken'} {name}: {value:.1f} {unit}, promised {limit:.0f} {unit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=int, default=10)
    parser.add_argument("--rows", type=int, default=10**6, help="of each corpus")
    parser.add_argument("--folder", type=Path, help="where the index files go; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        anonymous = AnonymousMemory()
        times = dict(PARTS[arguments.part](arguments.folder, arguments.corpora, arguments.rows))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"times": times, "memory": peak, "anonymous": anonymous.peak}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        results = {part: in_its_own_process(part, folder, arguments.corpora, arguments.rows) for part in PARTS}
        size = sum(path.stat().st_size for path in paths(folder))
        mapped = sum(path.stat().st_size for path in folder.rglob("*.arrow"))
    report(results, arguments.corpora * arguments.rows, size, mapped)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
