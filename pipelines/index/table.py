"""The index: one Parquet file a corpus, beside its shards, with one row a sample.

Training, planning, filtering and inspection read the index and never the shards. Loaded, it is an Arrow table: 10
million rows are columns, and Python objects are made only for rows that are asked for. The file's metadata say which
corpus it is, its stage ('raw' or 'encoded'), the encoders, and a digest of the content however it was written.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.errors import DataError, MissingError, StorageError, counted
from domainshuttle.pipelines.index.alterations import Alterations, count_alterations
from domainshuttle.pipelines.index.digest import combined_digest, table_digest
from domainshuttle.pipelines.index.filter import RowFilter, as_written
from domainshuttle.pipelines.index.summary import summarise
from domainshuttle.pipelines.sample import SampleInfo, sample_id
from domainshuttle.pipelines.shards.tar import Member, ShardEntry
from domainshuttle.pipelines.storage.files import open_parquet, writing
from domainshuttle.pipelines.storage.uri import Location, absolute, parent, redacted

FORMAT_VERSION, OLDEST_VERSION = 3, 2
"""Of index files that are written, and the oldest that are read."""
METADATA_KEY = b"domainshuttle.index"
ROWS_PER_BLOCK = 65536

_NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("source", _NAMES),
        ("shard", _NAMES),
        ("key", pa.string()),
        ("sample_id", pa.int64()),
        ("members", pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))),
        ("kind", _NAMES),
        ("frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("fps", pa.float64()),
        ("bucket", _NAMES),
        ("subjects", pa.list_(pa.string())),
        ("domains", pa.list_(pa.int8())),
        ("reference_subjects", pa.list_(pa.int8())),
        ("reference_origins", pa.list_(pa.string())),
        ("caption_length", pa.int32()),
        ("text_tokens", pa.int32()),
        ("caption_tokens", pa.int32()),
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("checksum", pa.uint64()),
    ]
)
_SCHEMAS = {
    FORMAT_VERSION: SCHEMA,
    2: pa.schema(
        [
            field.with_type(pa.float32()) if field.name == "fps" else field
            for field in SCHEMA
            if field.name != "caption_tokens"
        ]
    ),
}
"""What the columns of an index file are, by its format version."""
# Added on loading: where a row comes from, so that several corpora can stand in one index.
PLACES = ("corpus", "folder")


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One sample. Sizes in pixels, `frames` and `fps` (None for images) those of the file, `caption_length` in
    characters, `text_tokens` the rows of an encoded sample's `text` (0 for raw), `caption_tokens` what its whole
    caption has (0 where nobody counted: more than `text_tokens` where it was cut), `domains` one a subject,
    `reference_subjects` and `reference_origins` one a reference. `corpus` and `folder` are set on loading."""

    source: str
    shard: str
    key: str
    sample_id: int
    members: tuple[Member, ...]
    kind: str
    frames: int
    height: int
    width: int
    fps: float | None
    bucket: str
    subjects: tuple[str, ...]
    domains: tuple[int, ...]
    reference_subjects: tuple[int, ...]
    reference_origins: tuple[str, ...]
    caption_length: int
    scores: dict[str, float]
    checksum: int
    text_tokens: int = 0
    caption_tokens: int = 0
    corpus: str = ""
    folder: str = ""

    @classmethod
    def of(
        cls, entry: ShardEntry, info: SampleInfo, bucket: Bucket | str, text_tokens: int = 0, caption_tokens: int = 0
    ) -> "IndexRow":
        """The row of a sample that was written or scanned as `entry`, described by `info`, and trained in `bucket`."""
        return cls(
            source=info.source,
            shard=entry.shard,
            key=entry.key,
            sample_id=sample_id(info.source, entry.key),
            members=entry.members,
            kind=info.kind,
            frames=info.frames,
            height=info.size[0],
            width=info.size[1],
            fps=info.fps,
            bucket=str(bucket),
            subjects=tuple(subject.word for subject in info.subjects),
            domains=tuple(subject.domain for subject in info.subjects),
            reference_subjects=tuple(reference.subject for reference in info.references),
            reference_origins=tuple(reference.origin for reference in info.references),
            caption_length=info.caption_length,
            scores=dict(info.scores),
            checksum=entry.checksum,
            text_tokens=text_tokens,
            caption_tokens=caption_tokens,
        )


class IndexMetadata(BaseModel):
    """What an index file says of itself. `encoders` identifies what made an encoded corpus (names, hashes of weights,
    transform), so that a cache is never mixed with another's; `fps` is the rate at which clips are sampled (None: each
    at its own), by which their buckets were chosen; `labels` names the settings of the labels that its rows have (none:
    ''); `digest` is set by `write_index`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    corpus: str = Field(min_length=1)
    stage: Literal["raw", "encoded"]
    encoders: dict[str, Any] = Field(default_factory=dict)
    fps: float | None = Field(None, gt=0)
    labels: str = ""
    digest: str = ""

    def identity(self) -> list[Any]:
        """What the digest covers beside the rows."""
        return [self.corpus, self.stage, self.encoders, self.fps]


def read_metadata(place: Location) -> IndexMetadata:
    """What an index file says of itself, of any format version; raises DataError where it is no index, StorageError."""
    with reading_index(place):
        return _described(open_parquet(place).metadata, redacted(place))


@contextlib.contextmanager
def reading_index(place: Location) -> Iterator[None]:
    """Within it, whatever pyarrow finds wrong with an index file is a DataError that names it."""
    try:
        yield
    except MissingError as error:
        raise MissingError(
            f"the index can't be read: {redacted(place)} is missing: correct the folder, or make its index "
            "(domainshuttle data index of shards that are there, else data build or data encode)"
        ) from error
    except (DataError, StorageError):
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # pydantic's and Unicode's are ValueErrors
        raise DataError(f"index {redacted(place)} can't be read ({error}); index the shards again") from error


def _described(metadata: pq.FileMetaData, path: Location) -> IndexMetadata:
    if (described := (metadata.metadata or {}).get(METADATA_KEY)) is None:
        raise DataError(f"index {path}: a Parquet file, but no index; make one with `domainshuttle data index`")
    return IndexMetadata.model_validate_json(described)


def write_index(place: Location, rows: Iterable[IndexRow] | pa.Table, metadata: IndexMetadata) -> IndexMetadata:
    """Write an index file, whole or not at all, and return its metadata with the digest.

    `rows` may be any iterable, or a table of SCHEMA; it is taken in blocks. Raises DataError on no rows, a sample that
    comes twice, a bucket that is none, or references that name no subject. Raises StorageError where a store fails.
    """
    path = redacted(place)
    ids: list[np.ndarray] = []

    def written(writer: pq.ParquetWriter) -> Iterator[pa.Table]:
        for block in _blocks(rows):
            _check_block(block, path)
            ids.append(block.column("sample_id").to_numpy())
            writer.write_table(block)
            yield block

    with (
        writing(place) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        digest = table_digest(written(writer), metadata.identity())
        if not ids:
            raise DataError(f"index {path}: no rows; expected at least one sample, or write no index")
        check_unique(np.concatenate(ids), f"index {path}")
        metadata = metadata.model_copy(update={"digest": digest, "format_version": FORMAT_VERSION})
        without = None if metadata.labels else {"labels"}  # so that versions before labels read the others
        writer.add_key_value_metadata({METADATA_KEY: metadata.model_dump_json(exclude=without).encode()})
    return metadata


def _blocks(rows: Iterable[IndexRow] | pa.Table, schema: pa.Schema = SCHEMA) -> Iterator[pa.Table]:
    """Tables of ROWS_PER_BLOCK rows, each column in one chunk: the unit in which the digest is taken."""
    if isinstance(rows, pa.Table):
        absent = sorted(set(schema.names) - set(rows.column_names))
        if absent:
            raise DataError(f"a table of index rows without {absent}: expected the columns {schema.names}")
        table = rows.select(schema.names).cast(schema)
        for start in range(0, len(table), ROWS_PER_BLOCK):
            yield table.slice(start, ROWS_PER_BLOCK).combine_chunks()
        return
    iterator = iter(rows)
    while batch := list(islice(iterator, ROWS_PER_BLOCK)):
        yield rows_table(batch)


def rows_table(rows: Sequence[IndexRow]) -> pa.Table:
    """A table of SCHEMA with these rows, unchecked."""
    columns = []
    for column in SCHEMA:
        values: list[Any] = [getattr(row, column.name) for row in rows]
        if column.name == "members":
            values = [[{"name": m.name, "offset": m.offset, "size": m.size} for m in row] for row in values]
        elif column.name == "scores":
            values = [sorted(scores.items()) for scores in values]
        if pa.types.is_dictionary(column.type):
            columns.append(pa.array(values, pa.string()).dictionary_encode())
        else:
            columns.append(pa.array(values, column.type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _check_block(block: pa.Table, path: str) -> None:
    for name in SCHEMA.names:
        if name != "fps" and block.column(name).null_count:
            raise DataError(
                f"index {path}: {name} is missing in {counted(block.column(name).null_count, 'row')}: expected a value"
            )
    for bucket in pc.unique(block.column("bucket")).to_pylist():
        parse_bucket(bucket)
    for left, right in (("subjects", "domains"), ("reference_subjects", "reference_origins")):
        if not pc.all(
            pc.equal(pc.list_value_length(block.column(left)), pc.list_value_length(block.column(right)))
        ).as_py():
            raise DataError(
                f"index {path}: a row's {left} and {right} differ in length: expected one {right} value for each"
            )
    domains = pc.list_flatten(block.column("domains"))
    if len(domains) and not -1 <= pc.min(domains).as_py() <= pc.max(domains).as_py() < len(DOMAINS):
        raise DataError(f"index {path}: a domain outside -1 to {len(DOMAINS) - 1}")
    parents = pc.list_parent_indices(block.column("reference_subjects")).to_numpy()
    named = pc.list_flatten(block.column("reference_subjects")).to_numpy()
    bad = (named < 0) | (named >= pc.list_value_length(block.column("subjects")).to_numpy()[parents])
    if bad.any():
        row = int(parents[bad.argmax()])
        raise DataError(
            f"index {path}: sample {block.column('key')[row]} has a reference to subject {named[bad.argmax()]}, "
            f"but its subjects are {block.column('subjects')[row].as_py()}"
        )


def check_unique(ids: np.ndarray, where: str) -> None:
    """Raises DataError where a sample id comes twice."""
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DataError(
            f"{where}: {len(twice)} sample ids come twice, the first {twice[0]}: expected each (source, key) once; "
            "was a corpus given twice, or do two shards hold the same key?"
        )


@dataclass(frozen=True)
class Index:
    """The rows of one or more corpora as an Arrow table.

    `parts` are the metadata of the files it came from. `digest` stands for the rows and their order: a file's own, and
    for joined and filtered ones a hash of what they were made of, so it does not depend on which columns were loaded.
    """

    table: pa.Table
    parts: tuple[IndexMetadata, ...]
    digest: str

    @classmethod
    def load(cls, path: Location, columns: Sequence[str] | None = None, verify: bool = True) -> "Index":
        """Read an index file; `columns` restricts it to some, such as ('source', 'bucket') for a plan of millions.

        Raises DataError where the file is missing, corrupt, no index, of another format version, or where its rows are
        not those that were written. For that last check all columns are hashed (a second a million rows), so it is left
        out where only some are loaded, and with `verify=False` by those who load what their driver verified. Raises
        StorageError where a store fails.
        """
        place = absolute(path)
        path = redacted(place)
        with reading_index(place):
            file = open_parquet(place)
            metadata = _described(file.metadata, path)
            if (schema := _SCHEMAS.get(metadata.format_version)) is None:
                raise DataError(
                    f"index {path}: format version {metadata.format_version}, this code reads {FORMAT_VERSION}; "
                    "index the shards again"
                )
            table = file.read(columns=list(columns or SCHEMA.names)).replace_schema_metadata(None)
            table = table.unify_dictionaries().combine_chunks()
            whole = verify and columns is None
            if whole and table_digest(_blocks(table, schema), metadata.identity()) != metadata.digest:
                raise DataError(f"index {path}: its rows are not those it was written with; index the shards again")
            table = upgraded(table, columns or SCHEMA.names, file.metadata.num_rows)
        return cls(with_place(table, metadata.corpus, str(parent(place))), (metadata,), metadata.digest)

    @classmethod
    def concat(cls, indexes: Sequence["Index"]) -> "Index":
        """One index of several corpora, in the order given; each row keeps its folder.

        Raises DataError where stages or encoders differ, or a sample comes twice.
        """
        if not indexes:
            raise DataError("no indexes to join: expected at least one corpus")
        if len(indexes) == 1:
            return indexes[0]
        loaded = {tuple(index.table.column_names) for index in indexes}
        if len(loaded) > 1:
            raise DataError(f"indexes with different columns can't be joined: {sorted(loaded)}; load the same of each")
        parts = tuple(part for index in indexes for part in index.parts)
        for part in parts[1:]:
            for name in ("stage", "encoders"):
                if getattr(part, name) != getattr(parts[0], name):
                    raise DataError(
                        f"corpora {parts[0].corpus!r} and {part.corpus!r} differ in {name}: "
                        f"{getattr(parts[0], name)} and {getattr(part, name)}; encode both in the same way"
                    )
        table = pa.concat_tables([index.table for index in indexes]).unify_dictionaries().combine_chunks()
        if "sample_id" in table.column_names:
            check_unique(table.column("sample_id").to_numpy(), f"corpora {[part.corpus for part in parts]}")
        return cls(table, parts, combined_digest("concat", *(index.digest for index in indexes)))

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> np.ndarray:
        """A column as numpy: a view for numbers, one Python object a row for names and lists (see `codes`)."""
        return _single(self._column(name)).to_numpy(zero_copy_only=False)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of names as (codes int32 [rows], the names): no object a row. Names are sorted."""
        column = _single(self._column(name))
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        names = column.dictionary.to_pylist()
        rank = np.argsort(np.argsort(np.array(names, dtype=object))).astype(np.int32)
        return rank[column.indices.to_numpy()] if names else np.zeros(0, np.int32), sorted(names)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise DataError(f"the index has no column {name!r}: it has {self.table.column_names}")
        return self.table.column(name)

    def row(self, number: int) -> IndexRow:
        """The row of a number from 0; raises DataError outside the index."""
        return self.rows([number])[0]

    def rows(self, numbers: Sequence[int] | np.ndarray) -> list[IndexRow]:
        """The rows of these numbers, in their order; far cheaper than one by one."""
        absent = sorted(set(SCHEMA.names) - set(self.table.column_names))
        if absent:
            raise DataError(f"the index was loaded without {absent}: load all columns to read rows")
        wanted = np.asarray(numbers, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise DataError(
                f"rows {wanted.min()} to {wanted.max()} of an index of {len(self)}: expected 0 to {len(self) - 1}"
            )
        return [
            IndexRow(**{name: _python_value(name, value) for name, value in row.items()}) for row in self._taken(wanted)
        ]

    def _taken(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        # batch by batch: a table's `take` first makes one chunk of each nested column, which would read all of them
        batches, starts = self._batches
        batch = np.searchsorted(starts, numbers, side="right") - 1
        order = np.argsort(batch, kind="stable")
        found: list[dict[str, Any]] = [{}] * len(numbers)
        for places in np.split(order, np.flatnonzero(np.diff(batch[order])) + 1):
            if len(places):
                of = batch[places[0]]
                rows = batches[of].take(pa.array(numbers[places] - starts[of])).to_pylist()
                for place, row in zip(places.tolist(), rows, strict=True):
                    found[place] = row
        return found

    @cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """The record batches, and the number of each one's first row."""
        batches = self.table.to_batches()
        return batches, np.cumsum([0, *(len(batch) for batch in batches)])[:-1]

    def filter(self, expression: str | pc.Expression) -> "Index":
        """The rows for which an expression holds, in their order; see `RowFilter` for what a string may say."""
        if isinstance(expression, pc.Expression):
            numbered = self.table.append_column("_row", pa.array(np.arange(len(self))))
            mask = np.zeros(len(self), bool)
            mask[numbered.filter(expression).column("_row").to_numpy()] = True
        else:
            mask = RowFilter(self.table, expression).chosen()
        if mask.all():
            return self
        return Index(
            self.table.filter(mask).combine_chunks(), self.parts, combined_digest("filter", self.digest, mask.tobytes())
        )

    def alterations(self) -> Alterations:
        """What training changes of the samples; needs `alterations.COLUMNS`, and all columns of several corpora."""
        if len(self.parts) == 1:
            return count_alterations(self.table, self.parts[0].fps)
        of_each = (self.table.filter(pc.equal(self.table.column("corpus"), part.corpus)) for part in self.parts)
        counted = (count_alterations(rows, part.fps) for rows, part in zip(of_each, self.parts, strict=True))
        return sum(counted, Alterations())

    def summary(self) -> dict[str, Any]:
        """Counts and quantiles for people and trackers, ready for JSON; see `summarise`."""
        first = self.parts[0]
        of = {"corpora": [part.corpus for part in self.parts], "stage": first.stage, "fps": first.fps}
        held = pa.table({name: self._column(name) for name in SCHEMA.names})
        return {**of, "digest": self.digest, **summarise(held)}


def upgraded(table: pa.Table, columns: Sequence[str], rows: int) -> pa.Table:
    """So many rows of an index file of any version that is read, of which `columns` were asked for, as of the newest:
    rates in float64, and no tokens counted where none were."""
    if "fps" in table.column_names and pa.types.is_float32((fps := table.column("fps")).type):
        table = table.set_column(table.column_names.index("fps"), "fps", as_written(_single(fps)))
    if "caption_tokens" in columns and "caption_tokens" not in table.column_names:
        held = {name: table.column(name) for name in table.column_names}
        held["caption_tokens"] = pa.array(np.zeros(rows, np.int32))
        table = pa.table({name: held[name] for name in SCHEMA.names if name in held})
    return table


def _single(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def with_place(table: pa.Table, corpus: str, folder: str) -> pa.Table:
    """The rows with the columns of PLACES."""
    for name, value in zip(PLACES, (corpus, folder), strict=True):
        places = pa.DictionaryArray.from_arrays(np.zeros(len(table), np.int32), pa.array([value], pa.string()))
        table = table.append_column(name, places)
    return table


def _python_value(name: str, value: Any) -> Any:
    if name == "members":
        return tuple(Member.of(m["name"], m["offset"], m["size"]) for m in value)
    if name == "scores":
        return dict(value)
    return tuple(value) if isinstance(value, list) else value
