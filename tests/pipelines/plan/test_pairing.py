"""Pairing: the two reference sets. Run: pytest tests/pipelines/plan/test_pairing.py"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.augment import augmented_view
from domainshuttle.pipelines.plan.pairing import Pairing, choose_references, single_pictures
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
