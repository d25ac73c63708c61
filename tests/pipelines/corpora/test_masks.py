"""Masks of COCO. Run: python -m pytest tests/pipelines/corpora/test_masks.py"""

import numpy as np
import pytest
from built import encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.corpora.masks import (
    Candidate,
    covered_share,
    cut_out,
    decode_rle,
    encode_rle,
    without_duplicates,
)
from domainshuttle.pipelines.errors import DataError


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.floats(0, 1))
def test_masks_come_back(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    text = encoded(mask)
    np.testing.assert_array_equal(decode_rle(text, height, width), mask)
    assert covered_share(text, height, width) == pytest.approx(mask.mean())


def test_long_runs_come_back() -> None:
    mask = np.zeros((720, 1280), bool)
    mask[100:600, 3:1200] = True
    np.testing.assert_array_equal(decode_rle(encoded(mask), 720, 1280), mask)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.integers(-5, 50), st.integers(-5, 50))
def test_no_text_breaks_it(text: str, height: int, width: int) -> None:
    try:
        mask = decode_rle(text, height, width)
    except DataError:
        return
    assert mask.shape == (height, width)


def test_of_overlapping_masks_the_largest_stays() -> None:
    masks = np.zeros((4, 20, 20), bool)
    masks[0, :10, :10], masks[1, :10, :11], masks[2, 12:, 12:], masks[3, :, :] = True, True, True, True
    named = [Candidate(str(n), word, mask, 5.0) for n, (word, mask) in enumerate(zip("abcd", masks, strict=True))]
    kept = without_duplicates(named, 0.8)
    assert [(one.id, one.ids, one.words) for one in kept] == [
        ("1", ["1", "0"], ["b", "a"]), ("2", ["2"], ["c"]), ("3", ["3"], ["d"]),
    ]  # fmt: skip


def test_a_subject_is_cut_out_on_white() -> None:
    frame = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), bool)
    mask[1, 2:5] = mask[2, 3] = True
    cut = cut_out(frame, mask)
    np.testing.assert_array_equal(cut[0], frame[1, 2:5])
    np.testing.assert_array_equal(cut[1], [[255] * 3, frame[2, 3], [255] * 3])
    with pytest.raises(DataError, match="empty mask"):
        cut_out(frame, np.zeros((6, 8), bool))
    with pytest.raises(DataError, match="mask of 8x5"):
        cut_out(frame, mask[:5])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_are_written_as_cocos_code_writes_them(share: float) -> None:
    mask = np.random.default_rng(7).random((37, 53)) < share
    mask[10:30, 5:50] = share > 0
    assert encode_rle(mask) == encoded(mask)
    np.testing.assert_array_equal(decode_rle(encode_rle(mask), 37, 53), mask)
