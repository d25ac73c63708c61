"""The hash under all randomness that is a function of numbers alone: noise, timesteps and the order of the samples.

Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Values = TypeVar("Values", np.ndarray, "Tensor")

GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # as signed integers of 64 bits


def mixed(values: Values) -> Values:
    """splitmix64's finaliser of int64 values, an array or a tensor: every bit of the result depends on every bit.

    ``>>`` keeps the sign, so the copied sign bits are masked off.
    """
    values = (values ^ ((values >> 30) & (2**34 - 1))) * _FACTORS[0]
    values = (values ^ ((values >> 27) & (2**37 - 1))) * _FACTORS[1]
    return values ^ ((values >> 31) & (2**33 - 1))


def mixed_int(value: int) -> int:
    """The same of a Python integer, of which the lowest 64 bits count, as a signed one."""
    return int(mixed(np.array([(value + 2**63) % 2**64 - 2**63]))[0])
