"""The step plan: exactly once, weights, any world size, any step. Run: pytest tests/pipelines/plan/test_step_plan.py"""

import json
import pickle
import runpy
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index, IndexMetadata, write_index
from domainshuttle.pipelines.plan.permutation import ROUNDS, permuted
from domainshuttle.pipelines.plan.step_plan import PlannedBatch, StepPlan

BUCKETS = ["1x64x64", "5x64x64", "5x64x96", "81x480x832"]
Counts = dict[tuple[str, str], int]

COUNTS = st.dictionaries(
    st.tuples(st.sampled_from(["uno", "musar", "phantom"]), st.sampled_from(BUCKETS)), st.integers(1, 60), min_size=1
)


def make_index(counts: Counts, digest: str = "d") -> Index:
    """An index of so many samples per (source, bucket), shuffled; with only the columns that a plan reads."""
    which = np.repeat(np.arange(len(counts)), list(counts.values()))
    which = which[np.argsort(np.arange(len(which)) * 2654435761 % 2**32, kind="stable")]
    columns = {
        name: pa.array([pair[place] for pair in counts]).take(pa.array(which)).dictionary_encode()
        for place, name in enumerate(("source", "bucket"))
    }
    return Index(pa.table(columns), (IndexMetadata(corpus="test", stage="raw"),), digest)


def streams_of(index: Index) -> list[tuple[str, str]]:
    return list(zip(index.column("source"), index.column("bucket"), strict=True))


def same(left: PlannedBatch, right: PlannedBatch) -> bool:
    arrays = all(np.array_equal(getattr(left, n), getattr(right, n)) for n in ("rows", "epochs", "slots"))
    return arrays and (left.step, left.bucket) == (right.step, right.bucket)


@settings(max_examples=40, deadline=None)
@given(
    COUNTS,
    st.integers(0, 2**40),
    st.integers(1, 24),
    st.none() | st.tuples(*[st.floats(0.1, 5)] * 3),
)
def test_each_sample_comes_exactly_once_an_epoch_and_a_step_has_one_bucket(
    counts: Counts, seed: int, global_batch: int, weights: tuple[float, float, float] | None
) -> None:
    index = make_index(counts)
    sources = sorted({source for source, _ in counts})
    plan = StepPlan(index, dict(zip(sources, weights, strict=False)) if weights else None, seed, global_batch)
    streams = streams_of(index)
    order: dict[tuple[str, str], list[tuple[int, int]]] = {stream: [] for stream in counts}
    for batch in (plan[step] for step in range(min(3 * plan.steps_per_epoch + 3, 400))):
        assert len(batch.rows) == len(batch.epochs) == global_batch
        assert {streams[row][1] for row in batch.rows} == {str(batch.bucket)}
        by_stream: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for row, epoch in zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True):
            by_stream.setdefault(streams[row], []).append((epoch, row))
        for stream, shown in by_stream.items():
            order[stream] += sorted(shown)
    for stream, shown in order.items():
        members = {row for row, name in enumerate(streams) if name == stream}
        for epoch in range(len(shown) // len(members)):
            # epochs follow one another without a gap, and every whole one has each sample once
            part = shown[epoch * len(members) : (epoch + 1) * len(members)]
            assert {e for e, _ in part} == {epoch}
            assert {row for _, row in part} == members
        rest = shown[len(shown) // len(members) * len(members) :]
        assert len({row for _, row in rest}) == len(rest)


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.integers(0, 5), st.integers(0, 10**12))
def test_a_step_sought_is_the_step_reached(counts: Counts, seed: int, far: int) -> None:
    index = make_index(counts)
    plan, again = StepPlan(index, None, seed, 6), StepPlan(index, None, seed, 6)
    walked = [plan[step] for step in range(40)]
    for step in (39, 7, 0, 20):
        assert same(again[step], walked[step])
    assert same(pickle.loads(pickle.dumps(plan))[far], again[far])


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 16, 32, 64])
def test_the_batches_are_the_same_for_any_world_size_and_accumulation(world_size: int, accumulation: int) -> None:
    plan = StepPlan(make_index({("uno", "1x64x64"): 500, ("musar", "5x64x64"): 300}), None, 1, 1152)
    for step in (0, 5, 1000):
        whole = plan[step]
        parts = whole.micro_batches(world_size, accumulation)
        assert len(parts) == world_size * accumulation
        assert {len(part) for part in parts} == {1152 // len(parts)}
        np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
        np.testing.assert_array_equal(np.concatenate([part.slots for part in parts]), np.arange(1152))
        assert all(part.bucket == whole.bucket and part.step == step for part in parts)
        # a slot means the same sample to whoever holds it
        assert all(whole.rows[slot] == row for part in parts for slot, row in zip(part.slots, part.rows, strict=True))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    plan = StepPlan(make_index({("uno", "1x64x64"): 50}), None, 1, 12)
    with pytest.raises(DataError, match="12 does not divide into 5 ranks"):
        plan[0].micro_batches(5)
    with pytest.raises(DataError, match="0 ranks"):
        plan[0].micro_batches(0)


MIXTURES: dict[str, tuple[Counts, dict[str, float] | None]] = {
    "stage 1": ({(s, b): n for s, n in zip("abcd", (50, 60, 60, 30), strict=True) for b in BUCKETS[:3]}, None),
    "own buckets": (
        {("uno", BUCKETS[0]): 50, ("uno", BUCKETS[1]): 20, ("musar", BUCKETS[2]): 40, ("musar", BUCKETS[3]): 9},
        {"uno": 0.3, "musar": 0.7},
    ),
    "many own buckets": (
        {("abc"[n % 3], f"{1 + 4 * n}x64x64"): 3 + (9 * (n % 3) + 4 * (n // 3) ** 2) % 11 for n in range(21)},
        {"a": 3, "b": 2, "c": 1},
    ),
    "one rare": ({("uno", BUCKETS[0]): 500, ("musar", BUCKETS[1]): 20, ("echo", BUCKETS[2]): 1}, None),
    "skewed": ({(s, b): 7 + 5 * i * j for i, s in enumerate("abcde") for j, b in enumerate(BUCKETS)},
               {"a": 8, "b": 1, "c": 0.05, "d": 3, "e": 0.4}),
}  # fmt: skip


def test_what_survives_of_restarts_at_other_sizes_is_each_sample_once() -> None:
    """Attempts end at random steps and begin again at the last checkpoint with other world sizes."""
    counts = {("uno", "1x64x64"): 96, ("musar", "1x64x64"): 48, ("musar", "5x64x64"): 72}
    random = np.random.default_rng(0)
    surviving: dict[int, list[int]] = {}
    step = 0
    while step < 18:  # 216 samples in batches of 12
        plan, world_size = StepPlan(make_index(counts), None, 9, 12), int(random.choice([1, 2, 3, 4, 6, 12]))
        killed = step + int(random.integers(1, 7))
        for reached in range(step, killed):
            ranks = plan[reached].micro_batches(world_size)
            surviving[reached] = [row for rank in ranks for row in rank.rows.tolist()]
        step = max(step, killed // 4 * 4)  # checkpoints every 4 steps
    seen = Counter(row for reached in range(18) for row in surviving[reached])
    # all but what the buckets carry over the end of the epoch: less than a batch each
    assert sum(number == 1 for number in seen.values()) >= 216 - 2 * 12
    assert max(seen.values()) <= 2


@pytest.mark.parametrize("name", MIXTURES)
def test_weights_are_met_within_one_batch_at_every_step(name: str) -> None:
    counts, mixture = MIXTURES[name]
    index = make_index(counts)
    batch, steps = 16, 600
    plan = StepPlan(index, mixture, 3, batch)
    sizes = Counter(index.column("source"))
    total = sum(mixture.values()) if mixture else len(index)
    wanted = {source: (mixture[source] if mixture else size) / total for source, size in sizes.items()}
    assert plan.mixture == pytest.approx(wanted)
    codes, names = index.codes("source")
    shown = np.zeros(len(names))
    for step in range(steps):
        shown += np.bincount(codes[plan[step].rows], minlength=len(names))
        for number, source in enumerate(names):
            assert abs(shown[number] - wanted[source] * batch * (step + 1)) <= batch + 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_weights_and_buckets_stay_even_for_random_mixtures(seed: int) -> None:
    random = np.random.default_rng(seed)
    sources, buckets = random.integers(1, 6), random.integers(1, 12)
    counts = {
        (f"s{s}", f"{1 + 4 * b}x64x64"): int(random.integers(1, 400))
        for s in range(sources) for b in range(buckets) if random.random() < 0.6
    } or {("s0", "1x64x64"): 5}  # fmt: skip
    index = make_index(counts)
    mixture = {source: float(random.random() + 0.05) for source in {s for s, _ in counts}}
    plan = StepPlan(index, mixture, seed, 8)
    codes, names = index.codes("source")
    shown, held = np.zeros(len(names)), Counter()
    shares = {bucket: entry["share_of_steps"] for bucket, entry in plan.describe()["buckets"].items()}
    for step in range(300):
        batch = plan[step]
        held[str(batch.bucket)] += 1
        shown += np.bincount(codes[batch.rows], minlength=len(names))
        assert all(abs(held[bucket] - share * (step + 1)) < 2 for bucket, share in shares.items())
        assert all(abs(shown[n] / 8 - plan.mixture[names[n]] * (step + 1)) < 1.75 for n in range(len(names)))


def test_a_source_without_weight_never_comes() -> None:
    index = make_index({("uno", "1x64x64"): 30, ("musar", "1x64x64"): 30, ("musar", "5x64x64"): 30})
    plan = StepPlan(index, {"uno": 1, "musar": 0}, 0, 4)
    streams = streams_of(index)
    assert {streams[row] for step in range(50) for row in plan[step].rows} == {("uno", "1x64x64")}
    assert set(plan.describe()["buckets"]) == {"1x64x64"}


def test_the_order_is_frozen() -> None:
    """Resumed runs hang on it: a change of the order must raise ORDER_VERSION."""
    counts = {("uno", "1x64x64"): 3000, ("musar", "1x64x64"): 20, ("musar", "5x64x64"): 90}
    plan = StepPlan(make_index(counts), None, 42, 4)
    assert [(str(plan[s].bucket), plan[s].rows.tolist(), plan[s].epochs.tolist()) for s in (0, 17, 10**9)] == FROZEN


FROZEN: list[tuple[str, list[int], list[int]]] = [
    ("1x64x64", [2750, 2412, 838, 673], [0, 0, 0, 0]),
    ("5x64x64", [1652, 11, 2320, 505], [0, 0, 0, 0]),
    ("1x64x64", [2142, 1894, 3037, 588], [1286173, 1286173, 1286173, 1286173]),
]


def test_seeds_and_epochs_differ_and_are_well_shuffled() -> None:
    index = make_index({("uno", "1x64x64"): 4096})
    orders = []
    for seed in (0, 1):
        plan = StepPlan(index, None, seed, 64)
        orders += [np.concatenate([plan[e * 64 + s].rows for s in range(64)]) for e in (0, 1)]
    for number, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(4096))
        assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
        for other in orders[:number]:
            assert (order == other).sum() < 15  # 1 is expected of independent permutations


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6000), st.integers(0, 2**63))
def test_a_permutation_is_one_at_every_size(size: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**64, ROUNDS, np.uint64)
    assert np.array_equal(np.sort(permuted(np.arange(size), size, keys)), np.arange(size))
    some = np.array([size - 1, 0])
    assert np.array_equal(permuted(some, size, keys), permuted(np.arange(size), size, keys)[some])


@pytest.mark.parametrize("size", [3, 1500])
def test_every_place_is_equally_likely(size: int) -> None:
    """Both ways of permuting, over many keys: where the first goes is uniform (chi-square over at most 10 cells)."""
    cells = min(size, 10)
    where = [
        int(permuted(np.array([0]), size, np.random.default_rng(seed).integers(0, 2**64, ROUNDS, np.uint64))[0])
        for seed in range(2000)
    ]
    found = np.histogram(where, bins=cells, range=(0, size))[0]
    assert ((found - 2000 / cells) ** 2 / (2000 / cells)).sum() < 33  # p = 1e-4 at 9 degrees of freedom


def test_slots_do_not_give_a_rank_one_source() -> None:
    plan = StepPlan(make_index({("uno", "1x64x64"): 500, ("musar", "1x64x64"): 500}), None, 0, 2)
    streams = streams_of(make_index({("uno", "1x64x64"): 500, ("musar", "1x64x64"): 500}))
    first_rank = Counter(streams[plan[step].micro_batches(2)[0].rows[0]][0] for step in range(400))
    assert 150 < first_rank["uno"] < 250


COUNTED = {("uno", "1x64x64"): 40, ("musar", "1x64x64"): 25, ("musar", "5x64x64"): 3}


def test_substitutes_are_of_the_same_bucket_and_source_first_and_all_different() -> None:
    index = make_index(COUNTED)
    plan, streams = StepPlan(index, None, 5, 8), streams_of(make_index(COUNTED))
    seen_buckets = set()
    for step in range(12):
        batch = plan[step]
        bad = int(batch.rows[3])
        size = sum(n for (_, bucket), n in COUNTED.items() if bucket == str(batch.bucket))
        rows = [plan.substitute(step, 3, attempt) for attempt in range(size - 1)]
        assert bad not in rows and len(set(rows)) == size - 1
        assert {streams[row][1] for row in rows} == {str(batch.bucket)}
        own = COUNTED[streams[bad]] - 1
        assert {streams[row] for row in rows[:own]} <= {streams[bad]}
        # those that the batch shows already come last within a source
        fresh = own - len({row for row in batch.rows.tolist() if streams[row] == streams[bad]} - {bad})
        assert not set(rows[:fresh]) & set(batch.rows.tolist())
        assert rows == [StepPlan(index, None, 5, 8).substitute(step, 3, attempt) for attempt in range(size - 1)]
        with pytest.raises(DataError, match="no substitute"):
            plan.substitute(step, 3, size - 1)
        seen_buckets.add(str(batch.bucket))
    assert len(seen_buckets) == 2
    assert len({plan.substitute(0, slot, 0) for slot in range(8)}) > 4
    with pytest.raises(DataError, match="slot below 8"):
        plan.substitute(0, 8, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"digest": "e"}, "index_digest was 'd', now 'e'"),
        ({"seed": 2}, "seed was 1, now 2"),
        ({"global_batch": 4}, "global_batch was 8, now 4"),
        ({"mixture": {"uno": 1, "musar": 2}}, "mixture was"),
    ],
)
def test_a_changed_order_is_refused_on_resume_by_name(changes: dict[str, object], named: str) -> None:
    plan = StepPlan(make_index(COUNTED), None, 1, 8)
    saved = json.loads(json.dumps(plan.state()))
    StepPlan(make_index(COUNTED), None, 1, 8).check(saved)
    values = {"digest": "d", "mixture": None, "seed": 1, "global_batch": 8, **changes}
    digest = values.pop("digest")
    other = StepPlan(make_index(COUNTED, str(digest)), **values)  # type: ignore[arg-type]
    assert other.digest != plan.digest
    with pytest.raises(DataError, match=named):
        other.check(saved)
    with pytest.raises(DataError, match="order_version was None"):
        plan.check({})


def test_plans_of_equal_state_are_equal() -> None:
    """Scaled weights, counts given as weights, and numpy numbers make no other plan."""
    index = make_index(COUNTED)
    for mixtures in (
        (None, {}),
        ({"uno": 1, "musar": 3}, {"uno": 0.25, "musar": 0.75}),
        (None, {"uno": 40.0, "musar": 28}),
    ):
        plans = [StepPlan(index, mixture, 1, 8) for mixture in mixtures]
        assert plans[0].state() == plans[1].state() and plans[0].digest == plans[1].digest
        assert all(same(plans[0][step], plans[1][step]) for step in (*range(20), 10**9))
    plan, typed = StepPlan(index, None, 1, 8), StepPlan(index, None, np.int64(1), 8)  # type: ignore[arg-type]
    assert same(plan[10**9], typed[np.int64(10**9)])  # type: ignore[index]


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ({"uno": 1, "musar": 1, "phantom": 1}, "mixture names"),
        ({"uno": 1}, "no weight for"),
        ({"uno": 1, "musar": -1}, "finite weights"),
        ({"uno": float("nan"), "musar": 1}, "finite weights"),
        ({"uno": 0, "musar": 0}, "at least one above 0"),
    ],
)
def test_wrong_mixtures_are_refused(mixture: dict[str, float], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        StepPlan(make_index(COUNTED), mixture, 0, 8)


def test_wrong_arguments_are_refused() -> None:
    index = make_index(COUNTED)
    with pytest.raises(DataError, match="global_batch = 0"):
        StepPlan(index, None, 0, 0)
    with pytest.raises(DataError, match="no rows"):
        StepPlan(replace(index, table=index.table.slice(0, 0)), None, 0, 8)
    with pytest.raises(DataError, match="step -1"):
        StepPlan(index, None, 0, 8)[-1]


def test_description_has_shares_costs_and_warnings() -> None:
    plan = StepPlan(make_index(COUNTED), None, 0, 8)
    described = json.loads(json.dumps(plan.describe()))
    assert described["steps_per_epoch"] == plan.steps_per_epoch == 9  # 68 samples in batches of 8
    assert sum(entry["share_of_steps"] for entry in described["buckets"].values()) == pytest.approx(1)
    assert described["buckets"]["5x64x64"] == {
        "samples": 3,
        "share_of_steps": pytest.approx(3 / 68),
        "video_tokens": 32,
        "reference_tokens": 16,
        "repeats_within_batch": True,
    }
    assert described["mean_video_tokens"] == pytest.approx((65 * 16 + 3 * 32) / 68)
    assert described["sources"]["uno"] == {
        "samples": 40,
        "weight": pytest.approx(40 / 68),
        "steps_per_epoch": pytest.approx(8.5),
    }


def test_any_step_of_ten_million_samples_is_found_at_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = [f"source{n}" for n in range(7)]
    buckets = [f"{f}x{h}x{w}" for f in (1, 81) for h, w in ((480, 832), (832, 480), (624, 624), (544, 704))]
    columns = {
        "source": pa.DictionaryArray.from_arrays(random.integers(0, 7, 10**7, np.int32), pa.array(names)),
        "bucket": pa.DictionaryArray.from_arrays(random.integers(0, 8, 10**7, np.int32), pa.array(buckets)),
    }
    index = Index(pa.table(columns), (IndexMetadata(corpus="large", stage="raw"),), "d")
    plan = StepPlan(index, {name: n + 1 for n, name in enumerate(names)}, 0, 64)
    times = []
    for step in random.integers(0, 10**8, 50):
        start = time.thread_time()  # of the processor: others may have it in between
        batch = plan[int(step)]
        times.append(time.thread_time() - start)
        assert len(set(batch.rows.tolist())) == 64
    assert max(times) < 0.05
    assert len(pickle.dumps(plan)) < 100 * 2**20  # four bytes a sample, and no order


PLANNING = r"""
import json, re, sys, time
from pathlib import Path
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.plan.feed import Feed
# not getrusage's, which begins with that of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
feed = Feed(shares=(CorpusShare("large", sys.argv[1], 1.0),), seed=0, global_batch=64, micro_batch=1, text_len=1,
            references=1)
plan = feed.plan()
times = []
for step in range(0, 10**8, 10**6):
    start = time.thread_time()
    plan[step]
    times.append(time.thread_time() - start)
print(json.dumps({"bytes": peak(), "slowest": max(times)}))
"""


def test_a_process_that_plans_keeps_its_promises(tmp_path: Path) -> None:
    """1 GB at 10 million samples, libraries included, by what more samples take more; 50 ms for any step."""
    make_rows = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "plan.py"))["rows"]
    peaks, counts = [], (200_000, 1_000_000)
    for count in counts:
        path = tmp_path / f"{count}.parquet"
        write_index(path, make_rows(0, count), IndexMetadata(corpus="large", stage="encoded"))
        run = subprocess.run([sys.executable, "-c", PLANNING, str(path)], capture_output=True, text=True, check=True)
        found = json.loads(run.stdout)
        peaks.append(found["bytes"])
        assert found["slowest"] < 0.05
    each = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    assert each > 4  # a sample's number at least: else nothing was measured
    assert peaks[0] + each * (10**7 - counts[0]) < 1e9, f"{peaks} bytes of {counts} samples"
