"""Pairing: which reference pictures a sample shows in a step, as two sets for the cross-pair consistency loss.

Set A conditions the forward pass that is trained, set B the one it is held against. `choose_references` is a pure
function of (run seed, epoch, sample), so a resumed run, at any number of workers, pairs as the unbroken one would have.

The rule:

1. Each subject that has pictures stands in both sets, with one picture each, and B's is another than A's. A subject
   with a single picture has it in both; B's is then to be shown as an augmented view (`augmented_view`), and is flagged
   and counted.
2. With more subjects than `max_references`, that many are drawn; the others are left out of both sets.
3. Pictures left over are dealt, in random order: to A, to B or to neither with a third each, where the set has room. So
   the number of pictures of a subject varies, and no picture stands in both sets but by rule 1.
4. In each set subjects come in order, and the pictures of one subject together in the sample's order.

With probability `dropout` a sample shows no reference at all, with `text_dropout` no text: guidance needs both.

All ranks wait for the longest sample of a micro-step, so the samples of a step shall have equally many references. How
many pictures rule 3 deals to A and to B, and whether references are left out, is therefore drawn once a step
(`StepDraw`), from the distribution that each sample would draw from by itself; which pictures they are stays the
sample's own draw. `reference_profiles` says which samples can have the same counts: those with as many subjects and as
many pictures left over.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np
import pyarrow as pa

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.augment import uniforms

# Streams of random numbers of one sample and epoch, apart so that one more draw here does not shift the others.
_CHOICE, _DROPOUT = 0, 1


@dataclass(frozen=True, slots=True)
class Pairing:
    """The two sets as positions in the sample's list of references; `augment_b[i]` says that `set_b[i]` is to be
    augmented.

    `kinds` counts the pairs by kind, one a subject: 'augmented', or the two origins in alphabetical order, such as
    'other_clip+same_clip'. `dropped`: the references were left out for guidance; `text_dropped`: the text is to be.
    """

    set_a: list[int]
    set_b: list[int]
    augment_b: list[bool]
    kinds: dict[str, int] = field(default_factory=dict)
    dropped: bool = False
    text_dropped: bool = False


@dataclass(frozen=True, slots=True)
class StepDraw:
    """What the samples of a step draw together, two numbers in [0, 1): references are left out where `drop` is below
    the dropout, and `deal` says how many pictures left over each set is given."""

    drop: float
    deal: float


def choose_references(
    reference_subjects: Sequence[int],
    reference_origins: Sequence[str],
    seed: int,
    epoch: int,
    sample_id: int,
    max_references: int = 5,
    dropout: float = 0.0,
    text_dropout: float = 0.0,
    step: StepDraw | None = None,
) -> Pairing:
    """The reference sets of a sample in an epoch, by the rule above.

    `reference_subjects` and `reference_origins` are the index's columns: one a picture. A sample without pictures has
    empty sets. `step` is what its step draws for all; None, as orders of version 1 have it: each draws by itself.
    Raises DataError where the two differ in length or a number is out of range.
    """
    reference_subjects = [int(subject) for subject in reference_subjects]
    if len(reference_subjects) != len(reference_origins):
        raise DataError(
            f"sample {sample_id}: {len(reference_subjects)} reference subjects and {len(reference_origins)} origins: "
            "expected one of each a picture; index the corpus again"
        )
    if max_references < 1 or not 0 <= dropout <= 1 or not 0 <= text_dropout <= 1:
        raise DataError(
            f"max_references = {max_references}, dropout = {dropout}, text_dropout = {text_dropout}: expected at least "
            "1 and two probabilities"
        )
    drop_references, drop_text = uniforms(seed, epoch, sample_id, _DROPOUT, 2)
    if step is not None:
        drop_references = step.drop
    text_dropped = bool(drop_text < text_dropout)
    if drop_references < dropout or not reference_subjects:
        return Pairing([], [], [], {}, bool(reference_subjects), text_dropped)

    count = len(reference_subjects)
    draws = uniforms(seed, epoch, sample_id, _CHOICE, 3 * count)
    subjects = _drawn_subjects(reference_subjects, draws[:count], max_references)
    # Pictures of the drawn subjects in random order: a subject's first is A's, its second B's, the others are left
    # over.
    shuffled = [
        int(p) for p in np.argsort(draws[count : 2 * count], kind="stable") if reference_subjects[p] in subjects
    ]
    first, second, rest = _dealt_out(shuffled, reference_subjects)
    single = set(first) - set(second)
    more_a, more_b = _dealt_rest(rest, draws[2 * count :], max_references - len(first), step)
    set_a = [*first.values(), *more_a]
    set_b = [*(second.get(subject, first[subject]) for subject in first), *more_b]

    order = sorted(range(count), key=lambda picture: (reference_subjects[picture], picture))
    set_a = [picture for picture in order if picture in set_a]
    set_b = [picture for picture in order if picture in set_b]
    kinds = Counter(
        "augmented"
        if subject in single
        else "+".join(sorted((reference_origins[first[subject]], reference_origins[second[subject]])))
        for subject in subjects
    )
    augment_b = [reference_subjects[picture] in single for picture in set_b]
    return Pairing(set_a, set_b, augment_b, dict(kinds), False, text_dropped)


def _dealt_out(
    pictures: Sequence[int], reference_subjects: Sequence[int]
) -> tuple[dict[int, int], dict[int, int], list[int]]:
    """Of pictures in this order: each subject's first, its second where it has one, and those left over."""
    first: dict[int, int] = {}
    second: dict[int, int] = {}
    rest: list[int] = []
    for picture in pictures:
        subject = reference_subjects[picture]
        if subject not in first:
            first[subject] = picture
        elif subject not in second:
            second[subject] = picture
        else:
            rest.append(picture)
    return first, second, rest


def _dealt_rest(
    rest: Sequence[int], draws: np.ndarray, room: int, step: StepDraw | None
) -> tuple[list[int], list[int]]:
    """Which pictures left over A and B are given, with room for `room` each; `draws` has a number a picture."""
    if step is not None:
        more_a, more_b = dealt(len(rest), room, step.deal)
        order = sorted(rest, key=lambda picture: draws[picture])
        return order[:more_a], order[more_a : more_a + more_b]
    sets: tuple[list[int], list[int]] = ([], [])
    for picture in rest:
        choice = int(draws[picture] * 3)  # A, B, or none
        if choice < 2 and len(sets[choice]) < room:
            sets[choice].append(picture)
    return sets


def _drawn_subjects(reference_subjects: Sequence[int], draws: np.ndarray, max_references: int) -> list[int]:
    present = sorted(set(reference_subjects))
    if len(present) <= max_references:
        return present
    order = np.argsort(draws[: len(present)], kind="stable")
    return sorted(present[number] for number in order[:max_references])


def single_pictures(reference_subjects: Sequence[int]) -> list[int]:
    """The pictures that are the only ones of their subjects: those that set B can show as augmented views alone."""
    counts = Counter(reference_subjects)
    return [picture for picture, subject in enumerate(reference_subjects) if counts[subject] == 1]


def dealt(rest: int, room: int, deal: float) -> tuple[int, int]:
    """How many of `rest` pictures left over rule 3 gives to A and to B, where each has room for `room` more: the
    quantile `deal`, in [0, 1), of its distribution, the cheapest counts first."""
    outcomes, cumulated = _deals(rest, room)
    return outcomes[int(np.searchsorted(cumulated, deal, side="right"))]


@lru_cache(maxsize=1024)
def _deals(rest: int, room: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The counts (A, B) that rule 3 can give, by what they cost, and their cumulated probabilities."""
    ways = {(0, 0): 1}  # of 3**rest
    for _ in range(rest):
        more: Counter[tuple[int, int]] = Counter()
        for (a, b), count in ways.items():
            for counts in ((min(a + 1, room), b), (a, min(b + 1, room)), (a, b)):
                more[counts] += count
        ways = dict(more)
    # A passes forward and backward, B forward alone
    outcomes = sorted(ways, key=lambda counts: (3 * counts[0] + counts[1], counts))
    cumulated = np.array(
        [total / 3**rest for total in accumulate(ways[one] for one in outcomes)]
    )  # whole numbers: exact
    return outcomes, cumulated


_MOST_REST = 15
"""Pictures left over by which samples are told apart; more make hardly another distribution."""


def reference_profiles(reference_subjects: pa.ChunkedArray, max_references: int) -> np.ndarray:
    """uint16 [rows] of the index's column: how many subjects a sample shows, times 16, and the pictures left over.

    A sample with more subjects than `max_references` shows that many and has no room for others.
    """
    profiles = [np.zeros(0, np.uint16)]
    for chunk in reference_subjects.chunks:
        for first in range(0, len(chunk), _ROWS_AT_ONCE):
            lists = chunk.slice(first, _ROWS_AT_ONCE)
            lengths = np.asarray(lists.value_lengths())
            parents, named = np.repeat(np.arange(len(lists)), lengths), np.asarray(lists.flatten())
            subjects, rest = np.zeros(len(lists), np.int64), np.zeros(len(lists), np.int64)
            for subject in np.unique(named):
                pictures = np.bincount(parents[named == subject], minlength=len(lists))
                subjects += pictures > 0
                rest += np.maximum(pictures - 2, 0)
            shown = np.minimum(subjects, max_references)
            rest = np.where(shown < max_references, np.minimum(rest, _MOST_REST), 0)
            profiles.append((shown * (_MOST_REST + 1) + rest).astype(np.uint16))
    return np.concatenate(profiles)


def counts_of(profile: int, max_references: int, deal: float) -> tuple[int, int]:
    """How many references samples of a profile show in A and in B."""
    subjects, rest = divmod(profile, _MOST_REST + 1)
    more_a, more_b = dealt(rest, max_references - subjects, deal)
    return subjects + more_a, subjects + more_b


_ROWS_AT_ONCE = 1 << 20
