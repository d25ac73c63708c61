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
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

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


def choose_references(
    reference_subjects: Sequence[int],
    reference_origins: Sequence[str],
    seed: int,
    epoch: int,
    sample_id: int,
    max_references: int = 5,
    dropout: float = 0.0,
    text_dropout: float = 0.0,
) -> Pairing:
    """The reference sets of a sample in an epoch, by the rule above.

    `reference_subjects` and `reference_origins` are the index's columns: one a picture. A sample without pictures has
    empty sets. Raises DataError where the two differ in length or a number is out of range.
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
    first: dict[int, int] = {}
    second: dict[int, int] = {}
    rest: list[int] = []
    for picture in shuffled:
        subject = reference_subjects[picture]
        if subject not in first:
            first[subject] = picture
        elif subject not in second:
            second[subject] = picture
        else:
            rest.append(picture)

    single = set(first) - set(second)
    set_a = list(first.values())
    set_b = [second.get(subject, first[subject]) for subject in first]
    for picture in rest:
        choice = int(draws[2 * count + picture] * 3)
        chosen = (set_a, set_b, None)[choice]
        if chosen is not None and len(chosen) < max_references:
            chosen.append(picture)

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
