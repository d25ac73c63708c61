"""Which rows of an index are trained on: a corpus as its index has it, or those of its samples that a filter leaves."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.digest import combined_digest
from domainshuttle.pipelines.index.filter import RowFilter
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import PLACES, SCHEMA, Index, IndexMetadata, reading_index
from domainshuttle.pipelines.storage.files import open_parquet
from domainshuttle.pipelines.storage.uri import Location, absolute, redacted


def selected_rows(place: Location, where: str, known: bool = False) -> np.ndarray:
    """bool [rows] of an index file, True where the filter `where` (`RowFilter`) holds.

    Only the columns that it reads are loaded. Raises DataError for a filter that is not understood or leaves nothing,
    with `known` also for one that names a text that no sample has, and what `Index.load` raises.
    """
    columns = RowFilter.columns(where)
    there = set(columns) <= {*SCHEMA.names, *PLACES}
    # with all columns, the error of an unknown name can say which there are
    index = Index.load(place, columns if there else None, verify=False)
    condition = RowFilter(index.table, where)
    mask = condition.chosen() if known else condition.mask()
    if not mask.any():
        corpus, quoted = index.parts[0].corpus, shlex.quote(redacted(absolute(place)))
        raise DataError(
            f"filter {where!r} leaves none of the {len(mask)} samples of corpus {corpus!r}: try it with "
            f"`domainshuttle data inspect {quoted} --where FILTER`"
        )
    return mask


CAPTIONED = "caption_length > 0"
"""The filter that leaves samples with a caption."""


def uncaptioned(place: Location, where: str | None, known: bool = False) -> int:
    """How many samples of an index file, or of those that a filter leaves, have no caption. Raises what `selected_rows`
    does."""
    empty = Index.load(place, ["caption_length"], verify=False).column("caption_length") == 0
    return int(np.count_nonzero(empty & selected_rows(place, where, known) if where else empty))


def selected_digest(part: IndexMetadata, where: str | None) -> str:
    """The digest of an index file's rows, or of those that a filter leaves."""
    return combined_digest("where", part.digest, where) if where else part.digest


def load_selected(
    share: CorpusShare,
    columns: tuple[str, ...],
    derived: Mapping[str, tuple[str, Callable[[pa.ChunkedArray], np.ndarray]]] | None = None,
) -> Index:
    """Some columns of a corpus's index file, unverified, of the rows that its filter leaves.

    `derived` are columns of numbers that are made of others, by name: of which column, and how. That one is read in
    parts and never held: lists take many times the memory of a number.
    """
    index = Index.load(share.index, columns, verify=False)
    table = index.table
    for name, (column, make) in (derived or {}).items():
        with reading_index(share.index):
            file = open_parquet(share.index)
            parts = [make(part) for part in _parts(file, column)]
        table = table.append_column(name, pa.array(np.concatenate(parts)))
    if not share.where:
        return replace(index, table=table)
    table = table.filter(selected_rows(share.index, share.where)).combine_chunks()
    return Index(table, index.parts, selected_digest(index.parts[0], share.where))


def _parts(file: pq.ParquetFile, column: str) -> Iterator[pa.ChunkedArray]:
    for group in range(file.num_row_groups):
        yield file.read_row_group(group, columns=[column]).column(column)
