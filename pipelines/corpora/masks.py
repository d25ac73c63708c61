"""Masks in COCO's compressed run lengths: decoded, compared, and used to cut a subject out on white."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.errors import DataError

Mask = NDArray[np.bool_]

MOST_MASK_PIXELS = 64_000_000


def _runs(counts: str, height: int, width: int) -> NDArray[np.int64]:
    """The run lengths of zeros and ones in turn, down the columns, of COCO's compressed string: each in groups of 5
    bits and, from the fourth on, as the difference to the one two before.

    Raises DataError for a string that is none, or is of another size.
    """
    if min(height, width) < 1 or height * width > MOST_MASK_PIXELS:
        raise DataError(f"a mask of {width}x{height} pixels: expected 1 to {MOST_MASK_PIXELS}")
    codes = np.frombuffer(counts.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        raise DataError("the mask's run lengths are no COCO string: a character is out of range, or the end is cut")
    last = (codes & 0x20) == 0
    number = np.concatenate([[0], np.cumsum(last)[:-1]])
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    shift = 5 * (np.arange(len(codes)) - starts[number])
    if shift.max() > 30:
        raise DataError("the mask's run lengths are no COCO string: a number is too long")
    runs = np.add.reduceat((codes & 0x1F) << shift, starts)
    runs = np.where(codes[last] & 0x10, runs - (np.int64(1) << (shift[last] + 5)), runs)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0 or runs.sum() != height * width:
        raise DataError(
            f"the mask's runs have {int(runs.sum())} pixels; its size {width}x{height} has {height * width}"
        )
    return runs


def decode_rle(counts: str, height: int, width: int) -> Mask:
    """[height,width] of COCO's compressed run lengths. Raises DataError for a string that is none."""
    runs = _runs(counts, height, width)
    ones = np.arange(len(runs)) % 2 == 1
    return np.repeat(ones, runs).reshape(width, height).T


def encode_rle(mask: Mask) -> str:
    """COCO's compressed run lengths of a mask [h,w]: the string that `decode_rle` reads."""
    flat = np.ascontiguousarray(mask.T).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0] if not len(flat) or not flat[0] else [0, 0], edges, [len(flat)]]))
    values = runs.astype(np.int64)
    values[3:] = runs[3:] - runs[1:-2]
    letters: list[int] = []
    for value in values.tolist():
        while True:
            bits, value = value & 0x1F, value >> 5
            more = value != (-1 if bits & 0x10 else 0)
            letters.append((bits | (0x20 if more else 0)) + 48)
            if not more:
                break
    return bytes(letters).decode("ascii")


def covered_share(counts: str, height: int, width: int) -> float:
    """The share of a frame that a mask covers, of which nothing is drawn. Raises DataError as `decode_rle` does."""
    return float(_runs(counts, height, width)[1::2].sum() / (height * width))


def overlap(one: Mask, other: Mask) -> float:
    """Intersection over union; 0 for two empty ones."""
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 0.0


@dataclass
class Candidate:
    """A mask with its name, that may be one of several of the same thing."""

    id: str
    word: str
    mask: Mask
    score: float
    others: list[tuple[str, str]] = field(default_factory=list)
    """Names (id, word) of those that it stands for."""

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))

    @property
    def ids(self) -> list[str]:
        return [self.id, *(id_ for id_, _ in self.others)]

    @property
    def words(self) -> list[str]:
        return [self.word, *(word for _, word in self.others)]


def without_duplicates(candidates: Sequence[Candidate], most_overlap: float) -> list[Candidate]:
    """The largest of each group of masks that overlap by more than `most_overlap`, which name the others; in the order
    given. Of equal areas the first stays."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda candidate: -candidate.area):
        same = next((other for other in kept if overlap(one.mask, other.mask) > most_overlap), None)
        if same is None:
            kept.append(one)
        else:
            same.others.append((one.id, one.word))
    return [one for one in candidates if any(one is other for other in kept)]


def cut_out(frame: Pixels, mask: Mask, margin: float = 0.0) -> Pixels:
    """The part of a frame [H,W,3] that a mask [H,W] covers, on white, cut to the mask and `margin` of its sides around.

    Raises DataError for an empty mask and for one of another size.
    """
    if frame.shape[:2] != mask.shape:
        raise DataError(f"a mask of {mask.shape[1]}x{mask.shape[0]} for a frame of {frame.shape[1]}x{frame.shape[0]}")
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise DataError("an empty mask")
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    down, across = round(margin * (bottom - top)), round(margin * (right - left))
    top, bottom = max(top - down, 0), min(bottom + down, mask.shape[0])
    left, right = max(left - across, 0), min(right + across, mask.shape[1])
    part = mask[top:bottom, left:right, None]
    return np.where(part, frame[top:bottom, left:right], np.uint8(255))
