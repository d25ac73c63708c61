"""Pairing: the two reference sets. Run: pytest tests/pipelines/plan/test_pairing.py"""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.augment import augmented_view
from domainshuttle.pipelines.plan.pairing import (
    Pairing,
    StepDraw,
    _deals,
    choose_references,
    counts_of,
    reference_profiles,
    single_pictures,
)
from domainshuttle.pipelines.sample import ORIGINS

PICTURES = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(ORIGINS)), min_size=0, max_size=14)
SEEDS = st.integers(0, 2**63)
IDS = st.integers(-(2**63), 2**63 - 1)


@given(PICTURES, SEEDS, st.integers(0, 1000), IDS, st.integers(1, 6))
def test_the_contract(pictures: list[tuple[int, str]], seed: int, epoch: int, sample: int, most: int) -> None:
    subjects, origins = [p[0] for p in pictures], [p[1] for p in pictures]
    pairing = choose_references(subjects, origins, seed, epoch, sample, most)
    assert pairing == choose_references(tuple(subjects), tuple(origins), seed, epoch, sample, most)

    counts = Counter(subjects)
    shown = {subjects[picture] for picture in pairing.set_a}
    assert shown == {subjects[picture] for picture in pairing.set_b}
    assert len(shown) == min(len(counts), most)
    for chosen in (pairing.set_a, pairing.set_b):
        assert len(chosen) == len(set(chosen)) <= most
        # subjects in order, a subject's pictures together and in the sample's order
        assert chosen == sorted(chosen, key=lambda picture: (subjects[picture], picture))
    singles = {subject for subject in shown if counts[subject] == 1}
    assert {subjects[picture] for picture in set(pairing.set_a) & set(pairing.set_b)} == singles
    assert pairing.augment_b == [subjects[picture] in singles for picture in pairing.set_b]
    assert sum(pairing.kinds.values()) == len(shown)
    assert pairing.kinds.get("augmented", 0) == len(singles)


@given(PICTURES, SEEDS, IDS)
def test_views_are_wanted_of_single_pictures_and_of_no_others(
    pictures: list[tuple[int, str]], seed: int, sample: int
) -> None:
    """An encoded corpus holds views of these alone, so no pairing may ask for another."""
    subjects, origins = [p[0] for p in pictures], [p[1] for p in pictures]
    singles = single_pictures(subjects)
    assert singles == [picture for picture in range(len(subjects)) if subjects.count(subjects[picture]) == 1]
    pairing = choose_references(subjects, origins, seed, 0, sample)
    altered = [picture for picture, flag in zip(pairing.set_b, pairing.augment_b, strict=True) if flag]
    assert altered == [picture for picture in pairing.set_b if picture in singles]
    # shown unaltered in A, so that the two differ
    assert set(altered) <= set(pairing.set_a)


def test_the_order_is_frozen() -> None:
    """A resumed run must pair as the unbroken one did, also after an upgrade of numpy."""
    origins = ["photo", "edited", "same_clip", "photo", "photo"]
    assert choose_references([0, 1, 0, 2, 2], origins, 7, 3, -5) == FROZEN


FROZEN = Pairing([0, 1, 4], [2, 1, 3], [False, True, False], {"photo+same_clip": 1, "augmented": 1, "photo+photo": 1})


def test_kinds_name_the_pair_of_origins() -> None:
    assert choose_references([0, 0], ["same_clip", "other_clip"], 1, 1, 1).kinds == {"other_clip+same_clip": 1}
    assert choose_references([0], ["photo"], 1, 1, 1).kinds == {"augmented": 1}


@pytest.mark.parametrize("varied", ["seed", "epoch", "sample"])
def test_seed_epoch_and_sample_each_change_the_choice(varied: str) -> None:
    seen = set()
    for number in range(40):
        values = {"seed": 3, "epoch": 4, "sample": 5, varied: number}
        pairing = choose_references([0] * 6, ["photo"] * 6, values["seed"], values["epoch"], values["sample"])
        seen.add((tuple(pairing.set_a), tuple(pairing.set_b)))
    assert len(seen) > 25


def test_every_picture_is_used_about_equally_in_both_sets() -> None:
    in_a, in_b = Counter(), Counter()
    for sample in range(4000):
        pairing = choose_references([0, 0, 0, 1], ["photo"] * 4, 0, 0, sample)
        in_a.update(pairing.set_a)
        in_b.update(pairing.set_b)
    assert in_a[3] == in_b[3] == 4000
    for picture in range(3):  # (1 first + 1/3 of the rest) / 3 pictures = 4/9
        assert abs(in_a[picture] / 4000 - 4 / 9) < 0.04
        assert abs(in_b[picture] / 4000 - 4 / 9) < 0.04


def test_with_too_many_subjects_each_is_left_out_at_times() -> None:
    shown = Counter()
    for epoch in range(600):
        shown.update(choose_references(list(range(7)), ["photo"] * 7, 0, epoch, 1).set_a)
    assert all(abs(shown[subject] / 600 - 5 / 7) < 0.1 for subject in range(7))


def test_dropout_of_references_and_text_are_apart_and_met() -> None:
    drawn = [choose_references([0, 0], ["photo"] * 2, 1, 0, n, dropout=0.1, text_dropout=0.2) for n in range(5000)]
    assert abs(sum(p.dropped for p in drawn) / 5000 - 0.1) < 0.02
    assert abs(sum(p.text_dropped for p in drawn) / 5000 - 0.2) < 0.02
    assert abs(sum(p.dropped and p.text_dropped for p in drawn) / 5000 - 0.02) < 0.01
    assert all((not p.set_a and not p.set_b and not p.kinds) == p.dropped for p in drawn)
    kept = [choose_references([0, 0], ["photo"] * 2, 1, 0, n) for n in range(5000)]
    # dropout decides whether, never what: the others pair as without it
    assert all(p.dropped or p.set_a == k.set_a for p, k in zip(drawn, kept, strict=True))


def test_a_sample_without_pictures_is_not_called_dropped() -> None:
    assert choose_references([], [], 1, 1, 1, dropout=1.0) == Pairing([], [], [], {}, False, False)


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(DataError, match="2 reference subjects and 1 origins"):
        choose_references([0, 1], ["photo"], 1, 1, 1)
    with pytest.raises(DataError, match="max_references = 0"):
        choose_references([0], ["photo"], 1, 1, 1, max_references=0)
    with pytest.raises(DataError, match=r"dropout = 1\.5"):
        choose_references([0], ["photo"], 1, 1, 1, dropout=1.5)


@given(SEEDS, st.integers(0, 100), IDS, st.integers(0, 20))
def test_an_augmented_view_lies_within_the_picture(seed: int, epoch: int, sample: int, picture: int) -> None:
    view = augmented_view(seed, epoch, sample, picture)
    assert view == augmented_view(seed, epoch, sample, picture) != augmented_view(seed, epoch, sample, picture + 1)
    top, left, height, width = view.crop
    assert 0 <= top <= 1 - height and 0 <= left <= 1 - width
    assert 0.75 <= height <= 0.95 and 0.75 <= width <= 0.95
    assert all(0.8 <= value <= 1.2 for value in (view.brightness, view.contrast, view.saturation))


def test_half_of_the_augmented_views_are_mirrored() -> None:
    assert 400 < sum(augmented_view(0, 0, sample, 0).flip for sample in range(1000)) < 600


DRAWS = st.builds(StepDraw, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))


@given(PICTURES, SEEDS, IDS, st.integers(1, 6), DRAWS)
def test_a_steps_draw_decides_the_counts_and_nothing_else(
    pictures: list[tuple[int, str]], seed: int, sample: int, most: int, draw: StepDraw
) -> None:
    """Samples of one profile show equally many references, by the same rules."""
    subjects, origins = [p[0] for p in pictures], [p[1] for p in pictures]
    pairing = choose_references(subjects, origins, seed, 0, sample, most, 0.3, step=draw)
    (profile,) = reference_profiles(pa.chunked_array([[subjects]], pa.list_(pa.int8())), most)
    if draw.drop < 0.3:
        assert (pairing.set_a, pairing.set_b, pairing.dropped) == ([], [], bool(subjects))
        return
    rest = sum(max(0, number - 2) for number in Counter(subjects).values())
    if rest <= 15 or len(set(subjects)) >= most:
        assert counts_of(int(profile), most, draw.deal) == (len(pairing.set_a), len(pairing.set_b))
    shown = {subjects[picture] for picture in pairing.set_a}
    assert shown == {subjects[picture] for picture in pairing.set_b}
    assert len(shown) == min(len(set(subjects)), most)
    both = set(pairing.set_a) & set(pairing.set_b)
    assert both == {picture for picture in pairing.set_a if subjects.count(subjects[picture]) == 1}
    for chosen in (pairing.set_a, pairing.set_b):
        assert len(chosen) == len(set(chosen)) <= most
        assert chosen == sorted(chosen, key=lambda picture: (subjects[picture], picture))


@pytest.mark.parametrize("subjects", [[0] * 5, [0, 0, 0, 1, 1, 1, 2], [0] * 9 + [1], [0, 1, 2, 3, 4, 4, 4]])
def test_counts_drawn_by_step_have_the_distribution_of_those_drawn_by_sample(subjects: list[int]) -> None:
    """The exact one of `dealt` against the rule's own draws, and each picture as often in each set as before."""
    drawn: dict[str, Counter[tuple[int, int]]] = {"sample": Counter(), "step": Counter()}
    shown: dict[str, Counter[tuple[str, int]]] = {"sample": Counter(), "step": Counter()}
    count = 3000
    for number in range(count):
        steps = {"sample": None, "step": StepDraw(0.5, (number * 0.6180339887498949) % 1)}
        for kind, draw in steps.items():
            pairing = choose_references(subjects, ["photo"] * len(subjects), 5, 0, number, 5, step=draw)
            drawn[kind][len(pairing.set_a), len(pairing.set_b)] += 1
            shown[kind].update([*(("a", one) for one in pairing.set_a), *(("b", one) for one in pairing.set_b)])
    for found in (drawn, shown):
        for key in {*found["sample"], *found["step"]}:
            # five standard deviations of a share of so many draws
            assert abs(found["sample"][key] - found["step"][key]) < 5 * (2 * count * 0.25) ** 0.5, key
    for key, times in drawn["step"].items():
        outcomes, cumulated = _deals(sum(max(0, n - 2) for n in Counter(subjects).values()), 5 - len(set(subjects)))
        own = len(set(subjects))
        place = outcomes.index((key[0] - own, key[1] - own))
        exact = cumulated[place] - (cumulated[place - 1] if place else 0)
        assert abs(times / count - exact) < 0.005


def test_the_order_of_a_step_is_frozen() -> None:
    origins = ["photo", "edited", "same_clip", "photo", "photo", "photo"]
    assert choose_references([0, 1, 0, 2, 2, 0], origins, 7, 3, -5, step=StepDraw(0.4, 0.7)) == FROZEN_BY_STEP


FROZEN_BY_STEP = Pairing([0, 2, 1, 4], [5, 1, 3], [False, True, False], {"photo+photo": 2, "augmented": 1})
