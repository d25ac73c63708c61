"""Work in parts: how building and encoding a corpus survive being stopped.

A corpus is made in numbered parts. A part writes its shards under its own prefix, then its quarantine and, last of all,
its own index. A part whose index is there is finished and is not made again; when all are, their indexes become the
corpus's. So a job that was killed goes on where it was, and a corpus has an index only when it is whole.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.table import OLDEST_VERSION, SCHEMA, Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.quarantine import (
    MOST_BAD_IN_CORPUS,
    QUARANTINE_NAME,
    BadSample,
    require_good,
)
from domainshuttle.pipelines.storage.files import write_bytes

INDEX_NAME = "index.parquet"
CONVERTED_NAME = "converted.jsonl"
"""Beside an encoded corpus's index: what was done to the pixels of which samples."""
REPORT_NAME = "report.json"
"""Beside an index: how its corpus came about, with settings and counts."""
TRACE_NAME = "trace.jsonl"
"""Beside a stage's index: what its steps noted of each sample, one JSON object a line, in the order of the samples."""
WORK_NAME = ".parts"
"""The folder, in a corpus's, of what is known of its parts."""
EMPTY_CAPTION_NAME = "empty_caption.safetensors"
"""The text encoder's states of an empty caption, beside an encoded corpus's index."""


_NOTES = "notes.json"
_REPAIR = "Change what builds them (the corpus's `build` and `buckets`) and run the command again"


@dataclass(frozen=True)
class Parts:
    """The parts of one corpus in `folder`. `recipe` says what makes them; a change of it makes all parts anew."""

    folder: Path
    count: int
    recipe: str

    @property
    def index_path(self) -> Path:
        """The corpus's index, there when all parts are finished."""
        return self.folder / INDEX_NAME

    @property
    def quarantine_path(self) -> Path:
        return self.folder / QUARANTINE_NAME

    def prefix(self, part: int) -> str:
        """The beginning of the names of a part's shards."""
        return f"part-{part:06d}"

    def beside(self, part: int, name: str) -> Path:
        """A file of a part's own, which goes when another recipe makes the parts."""
        return self._work / f"{self.prefix(part)}.{name}"

    def note(self, part: int, counts: Mapping[str, int]) -> None:
        """Keeps what was done to a part's samples that one should know of: counted, by what."""
        write_bytes(self.beside(part, _NOTES), json.dumps(dict(counts)).encode())

    def notes(self) -> Counter[str]:
        """The notes of all parts."""
        whole: Counter[str] = Counter()
        for part in range(self.count):
            whole.update(json.loads(self.beside(part, _NOTES).read_text()))
        return whole

    def begin(self) -> None:
        """Makes the folder, and clears it of parts that another recipe made."""
        self._work.mkdir(parents=True, exist_ok=True)
        recipe = self._work / "recipe.json"
        content = json.dumps(self._made_by)
        if recipe.exists() and recipe.read_text() == content:
            return
        recipe.unlink(missing_ok=True)
        self.index_path.unlink(missing_ok=True)
        for pattern in ("part-*.tar", f"{self._work.name}/part-*"):
            for stale in self.folder.glob(pattern):
                stale.unlink()
        write_bytes(recipe, content.encode())

    def missing(self) -> list[int]:
        """The parts that are not finished."""
        return [part for part in range(self.count) if not self._done(part).exists()]

    def finish(
        self, part: int, rows: Sequence[IndexRow], bad: Sequence[BadSample], metadata: IndexMetadata
    ) -> tuple[int, int]:
        """Notes that a part's shards are whole. Returns how many samples it has and how many are in quarantine."""
        lines = "".join(json.dumps(asdict(row)) + "\n" for row in bad)
        write_bytes(self._work / f"{self.prefix(part)}.quarantine", lines.encode())
        if rows:
            write_index(self._rows(part), rows, metadata)
        self._done(part).touch()
        return len(rows), len(bad)

    def merge(
        self, metadata: IndexMetadata, most_bad: float = MOST_BAD_IN_CORPUS, repair: str = _REPAIR
    ) -> tuple[IndexMetadata, int]:
        """Makes the corpus's index and quarantine table of the parts'. Returns the index's metadata and the bad count.

        Raises DataError when parts are missing or more than `most_bad` of the samples are bad, which is repaired as
        `repair` says.
        """
        if missing := self.missing():
            made = f"{len(missing)} of {counted(self.count, 'part')} not made"
            raise DataError(f"{self.folder}: {made}; run the command again")
        lines = self._quarantined()
        write_bytes(self.quarantine_path, lines.encode())
        table = pa.concat_tables(self._tables()) if any(True for _ in self._tables()) else SCHEMA.empty_table()
        bad = [json.loads(line)["reason"] for line in lines.splitlines()]
        require_good(str(self.folder), bad, len(table), most_bad, str(self.quarantine_path), repair)
        return write_index(self.index_path, table.unify_dictionaries().combine_chunks(), metadata), len(bad)

    def _quarantined(self) -> str:
        paths = (self._work / f"{self.prefix(part)}.quarantine" for part in range(self.count))
        return "".join(path.read_text() for path in paths if path.exists())  # parts of before may have none

    def _tables(self) -> Iterator[pa.Table]:
        for part in range(self.count):
            if self._rows(part).exists():
                yield Index.load(self._rows(part), verify=False).table.select(SCHEMA.names)

    @property
    def _made_by(self) -> dict[str, str | int]:
        # the oldest: parts of every version that is read can be joined
        return {"recipe": self.recipe, "parts": self.count, "format": OLDEST_VERSION}

    @property
    def _work(self) -> Path:
        return self.folder / WORK_NAME

    def _rows(self, part: int) -> Path:
        return self._work / f"{self.prefix(part)}.parquet"

    def _done(self, part: int) -> Path:
        return self._work / f"{self.prefix(part)}.done"
