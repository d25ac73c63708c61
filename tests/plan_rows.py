"""Rows of the plan without Ray, for tests of what is behind them."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa


class Rows:
    """Stands where Ray's iterator stands: hands out tables."""

    def __init__(self, *tables: pa.Table) -> None:
        self.tables = tables

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        yield from self.tables
