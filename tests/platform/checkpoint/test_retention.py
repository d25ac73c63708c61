"""Retention: the rule against a brute-force statement of it, and that the store follows it and nothing else.

Run: python -m pytest tests/platform/checkpoint/test_retention.py
"""

import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.platform.checkpoint.names import Name
from domainshuttle.platform.checkpoint.retention import Retention
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState, write_manifest

LOSS = st.none() | st.sampled_from([0.5, 0.25, math.nan, math.inf]) | st.floats(0, 10)
LOSSES = st.dictionaries(st.integers(1, 60), LOSS, min_size=1, max_size=20)
RULE = st.builds(Retention, st.integers(1, 5), st.none() | st.integers(1, 12), st.integers(0, 4))


@settings(max_examples=300, deadline=None)
@given(LOSSES, RULE)
def test_the_rule_is_what_it_says(losses: dict[int, float | None], rule: Retention) -> None:
    def better(a: int, b: int) -> bool:
        x, y = losses[a], losses[b]
        return x is not None and y is not None and (x < y or (x == y and a > b))

    scored = [step for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    expected: dict[int, set[str]] = {}
    for step in losses:
        reasons = set()
        if sum(other > step for other in losses) < rule.last:
            reasons.add("last")
        if rule.every is not None and step % rule.every == 0:
            reasons.add("every")
        if step in scored and sum(better(other, step) for other in scored) < rule.best:
            reasons.add("best")
        if reasons:
            expected[step] = reasons
    assert {step: set(reasons) for step, reasons in rule.kept(losses).items()} == expected


def put(store: CheckpointStore, name: Name, loss: float | None = None, whole: bool = True) -> None:
    store.place.write(f"{name}/zero/a.pt", b"shard")
    if whole:
        state = TrainingState(name.segment, name.step, 1, 1, "d", {}, {}, {}, loss=loss, line=name.line)
        write_manifest(store.place, state, str(name), {})


def test_the_store_follows_it_in_one_line_of_one_segment(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    put(store, Name("base", 900))
    put(store, Name("base", 950), whole=False)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.4)):
        put(store, Name("stage1", step), loss)
        put(store, Name("stage1", step, line=1), loss)
    put(store, Name("stage1", 25), whole=False)
    put(store, Name("stage1", 60), whole=False)  # the next one, being written
    put(store, Name("stage1", 70, line=1), whole=False)  # left by an attempt that was killed
    store.retire(Name("stage1", 50), Retention(2, 30, 1), {})
    left = {str(name) for name in store.names()}
    other_line = {str(Name("stage1", step, 1)) for step in (10, 20, 30, 40, 50)}
    mine = {str(Name("stage1", step)) for step in (20, 30, 40, 50, 60)}
    assert left == {"base-step00000900", "base-step00000950"} | other_line | mine


def test_a_damaged_one_does_not_count_and_is_left_for_people(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4):
        put(store, Name("stage1", step))
    (tmp_path / "stage1-step00000003" / "state.json").unlink()
    store.retire(Name("stage1", 4), Retention(2), {})
    assert {name.step for name in store.names()} == {2, 3, 4}
