"""Even ranks: a step's samples show equally many references. Run: pytest tests/pipelines/plan/test_even_ranks.py"""

import json
from collections import Counter
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.model.spec import ModelSpec
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index, IndexMetadata
from domainshuttle.pipelines.plan.pairing import StepDraw, choose_references, reference_profiles
from domainshuttle.pipelines.plan.step_plan import _STRIDES, PROFILE, PlannedBatch, StepPlan

SHARES = {1: 0.5, 2: 0.25, 3: 0.15, 4: 0.07, 5: 0.03}
"""Of samples, by their references: a guess at the paper's corpora."""
SPEC = replace(ModelSpec.preset("wan2.1-t2v-14b"), num_layers=2)
TRAINED = ("blocks.*.attn1.*", "*_ref*")


def index_of(lists: list[list[int]], source: list[str] | None = None, bucket: list[str] | None = None) -> Index:
    """An index of samples with these subjects of references, as a plan for sets of at most five loads it."""
    columns = {
        "source": pa.array(source or ["phantom"] * len(lists)).dictionary_encode(),
        "bucket": pa.array(bucket or ["81x480x832"] * len(lists)).dictionary_encode(),
        PROFILE: pa.array(reference_profiles(pa.chunked_array([lists], pa.list_(pa.int8())), 5)),
    }
    return Index(pa.table(columns), (IndexMetadata(corpus="test", stage="raw"),), "d")


def of_shares(count: int, pictures: int) -> list[list[int]]:
    """Samples of 1 to 5 subjects by `SHARES`, each with so many pictures, in random order."""
    random = np.random.default_rng(0)
    subjects = random.choice(list(SHARES), count, p=list(SHARES.values()))
    return [sorted([*range(number)] * pictures) for number in subjects]


@cache
def cost(a: int, b: int) -> int:
    return SPEC.step_flops((21, 60, 104), references=a, paired_references=b, trained=TRAINED).model


def counts(plan: StepPlan, batch: PlannedBatch, lists: list[list[int]], dropout: float) -> list[tuple[int, int]]:
    """References of each sample in both sets, as the pairing draws them."""
    pairings = (
        choose_references(lists[row], ["photo"] * len(lists[row]), 1, int(epoch), int(row), 5, dropout, step=batch.draw)
        for row, epoch in zip(batch.rows, batch.epochs, strict=True)
    )
    return [(len(one.set_a), len(one.set_b)) for one in pairings]


@pytest.mark.parametrize("pictures", [1, 4])
def test_sixty_four_ranks_are_loaded_alike(pictures: int) -> None:
    """Mean over longest of 64 samples: 0.82 where each draws by itself, at least 0.97 where the step draws."""
    lists = of_shares(20_000, pictures)
    found = {}
    for version in (1, 2):
        plan = StepPlan(index_of(lists), None, 3, 64, references=5, version=version)
        ratios = []
        for step in range(60):
            costs = [cost(*one) for one in counts(plan, plan[step], lists, 0.1)]
            ratios.append(sum(costs) / 64 / max(costs))
        found[version] = float(np.mean(ratios))
    assert found[1] < 0.88
    assert found[2] > 0.99


def test_small_corpora_and_many_profiles_stay_even_too() -> None:
    """Groups are joined where they are too small; with accumulation the micro-steps are alike all the same."""
    random = np.random.default_rng(1)
    lists = [sorted(random.integers(0, 6, random.integers(0, 12)).tolist()) for _ in range(1500)]
    plan = StepPlan(index_of(lists), None, 3, 64, references=5)
    assert not plan.describe()["buckets"]["81x480x832"]["repeats_within_batch"]
    mean = longest = 0
    for step in range(60):
        for micro in range(4):
            parts = plan[step].micro_batches(16, 4)[16 * micro : 16 * micro + 16]
            costs = [cost(*one) for part in parts for one in counts(plan, part, lists, 0.1)]
            mean, longest = mean + sum(costs) / 16, longest + max(costs)
    assert mean / longest > 0.97


LISTS = st.lists(st.lists(st.integers(0, 6), max_size=12).map(sorted), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(LISTS, st.integers(0, 2**40), st.integers(1, 8), st.data())
def test_each_sample_comes_once_an_epoch_and_any_step_is_found(
    lists: list[list[int]], seed: int, global_batch: int, data: st.DataObject
) -> None:
    several = st.lists(st.sampled_from(["a", "b"]), min_size=len(lists), max_size=len(lists))
    source, bucket = data.draw(several), [{"a": "1x64x64", "b": "5x64x64"}[one] for one in data.draw(several)]
    index = index_of(lists, source, bucket)
    plan, again = (StepPlan(index, None, seed, global_batch, references=5) for _ in range(2))
    batches = [plan[step] for step in range(min(3 * plan.steps_per_epoch + 3, 200))]
    seen: dict[int, list[int]] = {}
    for batch in batches:
        assert {bucket[row] for row in batch.rows} == {str(batch.bucket)}
        assert batch.draw is not None and 0 <= batch.draw.drop < 1 and 0 <= batch.draw.deal < 1
        for row, epoch in sorted(zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True)):
            seen.setdefault(row, []).append(epoch)
        expected = [] if batch.draw.drop < 0.1 else counts(plan, batch, lists, 0.0)
        if expected:
            assert plan.reference_counts(batch, 0.1).tolist() == [list(one) for one in expected]
        else:
            assert not plan.reference_counts(batch, 0.1).any()
    assert all(epochs == list(range(len(epochs))) for epochs in seen.values())
    last = batches[-1]
    found = again[last.step]
    assert found.rows.tolist() == last.rows.tolist() and found.draw == last.draw
    parts = last.micro_batches(global_batch)
    assert [int(part.rows[0]) for part in parts] == last.rows.tolist() and parts[0].draw == last.draw


def test_weights_are_met_within_two_batches() -> None:
    random = np.random.default_rng(2)
    lists = [sorted(random.integers(0, 5, random.integers(1, 9)).tolist()) for _ in range(6000)]
    source = random.choice(["a", "b", "c"], 6000, p=[0.6, 0.3, 0.1]).tolist()
    bucket = random.choice(["1x64x64", "5x64x64", "5x64x96"], 6000).tolist()
    plan = StepPlan(index_of(lists, source, bucket), {"a": 1, "b": 1, "c": 2}, 3, 16, references=5)
    shown = Counter[str]()
    for step in range(400):
        shown.update(source[row] for row in plan[step].rows)
        for name, weight in {"a": 0.25, "b": 0.25, "c": 0.5}.items():
            assert abs(shown[name] - weight * 16 * (step + 1)) <= 2 * 16


def test_dropout_and_deals_are_spread_evenly_over_the_steps() -> None:
    plan = StepPlan(index_of(of_shares(4000, 4)), None, 8, 16, references=5)
    draws = [plan[step].draw for step in range(500)]
    for number, values in enumerate(zip(*((one.drop, one.deal) for one in draws if one), strict=True)):
        assert abs(sum(value < 0.1 for value in values) - 50) <= 10, number
        assert abs(np.mean(values) - 0.5) < 0.01
    both = sum(one.drop < 0.5 and one.deal < 0.5 for one in draws if one)
    assert abs(both - 125) < 12  # together, too
    shown = np.concatenate([plan.reference_counts(plan[step], 0.1) for step in range(500)])
    drops = (shown.sum(1) == 0).mean()
    assert abs(drops - 0.1) < 0.02


def test_the_strides_are_those_of_the_plastic_number() -> None:
    with localcontext() as context:
        context.prec = 60
        p = Decimal("1.3")
        for _ in range(200):
            p = (p + 1) ** (Decimal(1) / 3)
        assert tuple(int(2**64 / p**power) for power in (1, 2)) == _STRIDES


def test_a_run_that_began_with_the_first_order_goes_on_with_it() -> None:
    index = index_of(of_shares(300, 2))
    old = StepPlan(index, None, 1, 8, references=5, version=1)
    bare = StepPlan(Index(index.table.drop_columns([PROFILE]), index.parts, "d"), None, 1, 8, version=1)
    assert old[5].draw is None and old[5].rows.tolist() == bare[5].rows.tolist()
    saved = {"order_version": 1, "index_digest": "d", "mixture": {"phantom": 1.0}, "seed": 1, "global_batch": 8}
    assert old.state() == saved  # the digest of its rows stays
    old.check(json.loads(json.dumps(saved)))
    new = StepPlan(index, None, 1, 8, references=5)
    with pytest.raises(DataError, match="order_version was 1, now 2"):
        new.check(saved)
    new.check(new.state())
    with pytest.raises(DataError, match="order version 3: this program makes 1, 2"):
        StepPlan(index, None, 1, 8, references=5, version=3)


def test_the_order_is_frozen() -> None:
    lists = [[0], [0, 0, 0], [0, 1], [0, 0, 1, 1, 1]] * 20
    plan = StepPlan(index_of(lists), None, 42, 4, references=5)
    assert [(plan[s].rows.tolist(), plan[s].draw) for s in (0, 17, 10**9)] == FROZEN


FROZEN = [
    ([39, 71, 43, 19], StepDraw(drop=0.11400995866529329, deal=0.3930650775850483)),
    ([57, 73, 33, 69], StepDraw(drop=0.8433285533377558, deal=0.004821151414751701)),
    ([35, 51, 43, 23], StepDraw(drop=0.6756831486741071, deal=0.1425783940516634)),
]
