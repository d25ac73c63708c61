"""Says which product of a block is being computed, for activation checkpointing, which may keep some of them.

Operators carry no names: the product of queries looks like that of the attention's output.
"""

from __future__ import annotations

import contextlib
import threading
from contextlib import AbstractContextManager

import torch

from domainshuttle.model.spec import Product

_now = threading.local()
"""The backward pass, which computes some of them again, has threads of its own."""


def computing(product: Product | None) -> AbstractContextManager[None]:
    """While it lasts, matrix products are those of ``product``, or of none. In compiled code nothing is named."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _Computing(product)


def computed() -> Product | None:
    """The product that this thread computes now."""
    return getattr(_now, "product", None)


class _Computing(contextlib.AbstractContextManager[None]):
    def __init__(self, product: Product | None) -> None:
        self._product = product

    def __enter__(self) -> None:
        self._outer, _now.product = computed(), self._product

    def __exit__(self, *_: object) -> None:
        _now.product = self._outer  # also where a recomputation ends within
