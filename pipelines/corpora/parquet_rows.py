"""Rows of Parquet files: read a few at a time, in order, also from files that have one row group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.corpora.downloads import check_download
from domainshuttle.pipelines.corpora.source import unknown_form
from domainshuttle.pipelines.errors import DataError


def parquet_rows(path: Path, columns: Sequence[str] | None = None, at_once: int = 64) -> Iterator[dict[str, Any]]:
    """Each row's columns, by name; maps as objects. Raises DataError for a file that is no whole Parquet file, and for
    values that Python has no objects for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_download(path)
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(at_once, columns=list(columns) if columns is not None else None):
                yield from batch.to_pylist(maps_as_pydicts="strict")
    except (KeyError, OverflowError, UnicodeDecodeError) as error:  # a map's key that comes twice, a date too far off
        raise DataError(f"{path} has a value that can't be read ({_text(error)}): correct it") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is no whole Parquet file ({_text(error)}): download it again")


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns. Raises DataError for a file that is no whole Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_download(path)
    try:
        names: list[str] = pq.read_schema(path).names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _not_whole(path, error) from error
    if len(set(names)) != len(names):
        raise same_names(path, names)
    return names


def same_names(path: Path, names: Sequence[str]) -> DataError:
    """What to raise for a table of which two columns have the same name."""
    again = sorted({name for name in names if list(names).count(name) > 1})
    return DataError(f"{path} has columns of one name, {', '.join(again) or 'the empty one'}: give each its own name")


def require_columns(path: Path, wanted: Sequence[str]) -> None:
    """Raises DataError where a file lacks columns."""
    names = parquet_columns(path)
    if missing := sorted(set(wanted) - set(names)):
        raise DataError(f"{path} has no column {', '.join(missing)}: it has {', '.join(names)[:300]}")


def picture_bytes(value: Any, where: str) -> bytes:
    """The bytes of a picture in a row: as they are or, as Hugging Face's, in a field `bytes`."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise unknown_form(where, f"{type(value).__name__} where a picture's bytes are expected")
    return data
