"""The results of an evaluation: one row for each case, video and metric, which is never computed twice.

A row's key is (digest of the case, sha256 of the video, digest of the metric's decisions). So a stopped evaluation goes
on, a metric or a model that is added computes only its own rows, and scoring again what nobody changed computes none.
Rows are lines of a journal, each whole or skipped and then measured again; of two with one key the later one holds.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainshuttle.platform.evaluation.metrics.metric import Score
from domainshuttle.platform.run.journal import Journal

RowKey = tuple[str, str, str]
ROWS_NAME = "rows.jsonl"


@dataclass(frozen=True)
class Row:
    """What a metric said of a case and its video."""

    case: str
    """Digest of the case."""
    video: str
    """sha256."""
    metric: str
    """Digest of the metric's decisions."""
    name: str
    """The metric's label, for people."""
    score: Score
    seconds: float = 0.0

    @property
    def key(self) -> RowKey:
        return self.case, self.video, self.metric


class ResultStore:
    """All rows of a folder. One process writes, any reads."""

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(folder / ROWS_NAME)
        self._rows: dict[RowKey, Row] = {}
        self._offset = 0
        self.refresh()

    def refresh(self) -> None:
        """Reads what was written since."""
        records, self._offset = self._journal.read(self._offset)
        for record in records:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # of damage, or of another version
                row = _row_of(record)
                self._rows[row.key] = row

    def get(self, key: RowKey) -> Row | None:
        """The newest row of a key."""
        return self._rows.get(key)

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, keys: Iterable[RowKey], again: bool = False) -> list[RowKey]:
        """The keys without a row, in order; `again`: also those of which something failed."""
        return [key for key in keys if (row := self._rows.get(key)) is None or (again and row.score.in_part)]

    def add(self, rows: Iterable[Row]) -> None:
        """Writes rows, so that they outlive this process."""
        rows = list(rows)
        self._journal.append([_record_of(row) for row in rows])
        for row in rows:
            self._rows[row.key] = row


def _record_of(row: Row) -> dict[str, Any]:
    return {
        "case": row.case, "video": row.video, "metric": row.metric, "name": row.name, "seconds": round(row.seconds, 4),
        "score": row.score.to_dict(),
    }  # fmt: skip


def _row_of(record: dict[str, Any]) -> Row:
    return Row(**{**record, "score": Score.from_dict(record["score"])})
