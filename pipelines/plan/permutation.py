"""Pseudo-random permutations of 0..size-1 that are computed where they are asked for, and never written out.

The permutation of a large range is a Feistel network over the next power of two, walked until it lands within the
range; its round function is splitmix64's finaliser. Only integer arithmetic is used, so that it is the same on every
machine and with every version of numpy.
"""

import numpy as np

from domainshuttle.model.splitmix64 import mixed

ROUNDS = 8
_SMALL = 1024  # ranges up to this size are permuted by sorting: a network of few bits mixes poorly


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where the pseudo-random permutation of 0..size-1 that belongs to `keys` (uint64 [ROUNDS]) takes `places` [n]."""
    if size == 1:
        return np.zeros_like(places)
    if size <= _SMALL:
        return np.argsort(hashed(np.arange(size, dtype=np.uint64) ^ keys[0]), kind="stable")[places]
    bits = (size - 1).bit_length()
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    # The network permutes 0..2**bits-1; whoever lands beyond the stream walks on, which is still a permutation.
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """An unbalanced Feistel network on numbers of `bits` bits."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            high = high ^ (hashed(low ^ key) & high_mask)
        else:
            low = low ^ (hashed(high ^ key) & low_mask)
    return (high << low_bits) | low


def hashed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of uint64 values."""
    return mixed(values.view(np.int64)).view(np.uint64)
