"""What a source of samples is to the frame that builds corpora (`builder`), and what both speak of.

A source names its pieces (files that are read from beginning to end), surveys each of them for its records, and makes
raw samples of the records that were selected. A survey is cheap: it reads descriptions and no media. Every step is a
pure function of the files and the configuration, so it can be done anywhere, stopped, and done again.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

from pydantic import AfterValidator, Field

from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.pipelines.corpora.json_records import Located
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason, of_sample
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.storage.uri import absolute, is_remote
from domainshuttle.pipelines.values import MOST_COUNT, Count, Section, Text, Whole

UNKNOWN_FORM = "unknown form"
"""The kind of fault of a record that no known variant of the source's format explains."""
_NUMBERS = (int, float, Decimal)  # the last of Parquet
SAMPLES = "samples"
"""The role of pieces whose records become samples; records of other roles are looked up by name."""


def _folder(value: str) -> str:
    if is_remote(value):
        raise ValueError("sources are read from a local or shared folder: download them first")
    return str(absolute(value))  # workers run in folders of their own


class SourceConfig(Section):
    """What all sources that lie in a folder are told. Each has a `builder`, the name by which it is registered."""

    folder: Annotated[Text, AfterValidator(_folder)] = Field(description="where the source was downloaded to")
    samples: Count | None = Field(None, description="how many to take, drawn by `seed`; none: all")
    seed: Whole = Field(0, ge=0, le=MOST_COUNT, description="of the selection")
    empty_captions: Literal["leave_out", "keep"] = Field(
        "leave_out", description="what becomes of records without a caption; keep: `data label` writes it"
    )

    def check_buckets(self, buckets: list[Bucket], fps: float | None) -> None:
        """Raises DataError where samples are known to fit no bucket."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a source that is surveyed on its own. `name` is the same wherever the source lies, `stamp` changes when
    its content does, and `role` says what its records are for."""

    name: str
    stamp: str
    role: str = SAMPLES
    in_order: bool = False
    """Whether it can only be read from its beginning, so that all of its samples are made at once."""

    @classmethod
    def of(cls, path: Path, root: Path, role: str = SAMPLES, in_order: bool = False) -> "Piece":
        """A file, stamped with its size and time of change."""
        status = path.stat()
        return cls(path.relative_to(root).as_posix(), f"{status.st_size} {status.st_mtime_ns}", role, in_order)


@dataclass(frozen=True, slots=True)
class Record:
    """What a survey found: a name that no other record of its role has, what is needed to make the sample (plain JSON
    values), and the group by which it can be found beside others."""

    id: str
    payload: Mapping[str, Any]
    group: str = ""
    uncaptioned: str = ""
    """Why it has no caption, as 'kind: detail', where it has none: such records are left out of the survey unless the
    source keeps them."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A record that becomes no sample, and why, as 'kind: detail'."""

    id: str
    reason: str


class Tables(Protocol):
    """Records of a survey, looked up by name."""

    def find(self, role: str, name: str) -> Record | None:
        """The record of that name."""
        ...

    def group(self, role: str, name: str) -> list[Record]:
        """The records of that group, in the order of the survey."""
        ...


@dataclass
class Notes:
    """What was done to samples that one should know of: counted, by what."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, count: int = 1) -> None:
        self.counts[what] += count


class Source(Protocol):
    """One source dataset."""

    wanted: int | None
    """How many records are selected; None for all."""
    seed: int
    keeps_uncaptioned: bool
    """Whether records without a caption are selected too."""

    def pieces(self) -> list[Piece]:
        """The pieces, in a fixed order. Raises DataError where the source is not laid out as it should be."""
        ...

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        """What a piece holds, in order. Raises DataError where it can't be read as a whole."""
        ...

    def make(self, records: Sequence[Record], tables: Tables, notes: Notes) -> Iterator[RawSample | LeftOut]:
        """The samples of records, in order. They are of pieces that can be read in any order, or all of one piece that
        can't."""
        ...


class RecordSource(ABC):
    """A source whose records are each made on their own: give it `raw_sample`."""

    wanted: int | None = None
    seed = 0
    keeps_uncaptioned = False

    @abstractmethod
    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        """Raises DataError with the reason where the sample can't be made."""
        ...

    def make(self, records: Sequence[Record], tables: Tables, notes: Notes) -> Iterator[RawSample | LeftOut]:
        """See `Source.make`."""
        for record in records:
            try:
                with of_sample(record.id):
                    sample = self.raw_sample(record, tables, notes)
            except DataError as error:
                yield LeftOut(record.id, fault_reason(error))
                continue
            yield sample


_Config = TypeVar("_Config", bound=SourceConfig)


class FolderSource(Generic[_Config]):
    """What a source that lies in a folder is told."""

    def __init__(self, config: _Config, corpus: str) -> None:
        self.config, self.corpus = config, corpus
        self.root = Path(config.folder)
        self.wanted, self.seed = config.samples, config.seed
        self.keeps_uncaptioned = config.empty_captions == "keep"


def surveyed(
    piece: Piece, found: Iterable[Located], record_of: Callable[["Fields"], Record | LeftOut]
) -> Iterator[Record | LeftOut]:
    """The records of a piece that `record_of` makes of the JSON objects found in it; one that it can't is left out."""
    for located in found:
        where = f"{piece.name} at byte {located.offset}"
        try:
            yield record_of(Fields(located.parse(where), where))
        except DataError as error:
            yield LeftOut(where, fault_reason(error))


class Fields:
    """A JSON object's fields, taken by name and type; what is not as expected is an `UNKNOWN_FORM` fault that names the
    record."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise unknown_form(where, f"{_type_of(content)} where an object is expected")
        self.content: dict[str, Any] = content
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.content.get(name) is not None

    def text(self, *names: str) -> str:
        """The first of these fields that is there, a text."""
        return self._first(names, (str,), "a text")

    def caption(self, *names: str) -> str:
        """The first of these fields that is not blank, a text, without spaces around it; '' where there is none, and
        yet one of the fields."""
        if not any(name in self.content for name in names):
            return self.text(*names)  # which raises
        return next((text for name in names if name in self and (text := self.text(name).strip())), "")

    def number(self, *names: str) -> float:
        """The first of these fields that is there, a number."""
        return self._finite(self._first(names, _NUMBERS, "a number"), names[0])

    def whole(self, *names: str) -> int:
        """The first of these fields that is there, a whole number."""
        return int(self._first(names, (int,), "a whole number"))

    def texts(self, *names: str) -> list[str]:
        """The first of these fields that is there, a list of texts."""
        found: list[str] = self._first(names, (list,), "a list of texts")
        if not all(isinstance(one, str) for one in found):
            raise unknown_form(self.where, f"{names[0]} is {_shown(found)}: expected a list of texts")
        return found

    def numbers(self, name: str, count: int) -> list[float]:
        """A list of `count` numbers."""
        found = self._first((name,), (list,), f"{count} numbers")
        if len(found) != count or not all(_is(one, _NUMBERS) for one in found):
            raise unknown_form(self.where, f"{name} is {_shown(found)}: expected {count} numbers")
        return [self._finite(one, name) for one in found]

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        found: list[Any] = self._first((name,), (list,), "a list")
        return found

    def fields(self, name: str) -> "Fields":
        """An object."""
        return Fields(self._first((name,), (dict,), "an object"), f"{self.where}: {name}")

    def _finite(self, number: float | Decimal, name: str) -> float:
        """A float of a number: whole ones may be beyond them, and Parquet holds NaN and infinity."""
        try:
            value = float(number)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise unknown_form(self.where, f"{name} is {str(number)[:40]}: expected a finite number")
        return value

    def _first(self, names: Sequence[str], types: tuple[type, ...], what: str) -> Any:
        for name in names:
            if (value := self.content.get(name)) is not None:
                if not _is(value, types):
                    raise unknown_form(self.where, f"{name} is {_shown(value)}: expected {what}")
                return value
        asked = " or ".join(names)
        raise unknown_form(self.where, f"no {asked} ({what}); it has {sorted(self.content)[:20]}")


def uncaptioned(caption: str, what: str = "caption") -> str:
    """What `Record.uncaptioned` is of a record with this caption."""
    return "" if caption else f"empty {what}"


def draw(seed: int, name: str) -> int:
    """The number by which a record is drawn: those with the least are selected. Of seed and name alone."""
    return name_hash(f"{seed}\0{name}")


def name_hash(name: str) -> int:
    """An unsigned 64-bit number of a name, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def unknown_form(where: str, detail: str) -> SampleFault:
    """What is raised for a record that is in no known variant of its source's format."""
    return SampleFault(UNKNOWN_FORM, f"{where}: {detail}")


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _type_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:80]  # Parquet has dates and bytes
