"""The records of large JSON and JSONL files, with where each lies, so that it is read again without the rest.

A file of 60 GB is scanned in pieces of some megabytes; what is held is one piece and the record that crosses its end.
numpy finds quotes and brackets faster than a parser makes objects of them, and a record is parsed where it is wanted.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from domainshuttle.pipelines.errors import DataError

_PIECE = 1 << 20
MOST_RECORD_BYTES = 256 << 20
"""Of one record: a file that seems to have a longer one is no list of records."""
_OPEN, _CLOSE = 1, -1
_KEY = re.compile(rb'\s*,?\s*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)
_COMMA = re.compile(rb"\s*,?\s*")


@dataclass(frozen=True, slots=True)
class Located:
    """A record of a file: its key ('' in a list), its first byte in the file, and its bytes."""

    key: str
    offset: int
    data: bytes

    def parse(self, where: str) -> Any:
        """Its value. Raises DataError, that names `where`, for what is no JSON."""
        return parse(self.data, where)


def parse(data: bytes, where: str, nan_is_null: bool = False) -> Any:
    """A JSON value. Raises DataError, that names `where`, for what is none; NaN and infinity are none, nor are numbers
    beyond a float's, halves of surrogate pairs, which no UTF-8 can hold, and keys that come twice, as where two records
    run together. `nan_is_null` reads NaN as null, of writers that mean it so."""
    try:
        constant = _nan_as_null if nan_is_null else _no_constant
        value = json.loads(data, parse_constant=constant, parse_float=_finite, object_pairs_hook=_once)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not valid JSON: a text with half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _nan_as_null(text: str) -> Any:
    return None if text == "NaN" else _no_constant(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        again = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {again[:40]!r} comes twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:40]} is beyond a float's")
    return number


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Some bytes of a file. Raises DataError where it has become shorter."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise DataError(f"{path}: ends before byte {offset + size}: it changed since it was surveyed; build again")
    return data


def json_records(path: Path) -> Iterator[Located]:
    """The entries of a JSON object, or the items of a list, all of them objects or lists, in order.

    Raises DataError for a file that is none, is cut short, or holds other values; what came before it was given.
    """
    with path.open("rb") as file:
        yield from _Scanner(file, path).records()


class _Scanner:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.held = b""
        """What follows the last record, from `base` in the file on."""
        self.base = 0
        self.depth, self.in_text, self.slashes = 0, False, 0
        self.in_object = False
        self.start = -1
        self.ended = False

    def records(self) -> Iterator[Located]:
        while piece := self.file.read(_PIECE):
            scanned = len(self.held)
            self.held += piece
            yield from self._scan(piece, scanned)
            if len(self.held) > MOST_RECORD_BYTES:
                raise self._fault(self.base, f"a record of more than {MOST_RECORD_BYTES >> 20} MB")
        if not self.ended:
            what = "empty" if not self.base + len(self.held) else "cut short: it ends inside a value"
            raise self._fault(self.base + len(self.held), f"{what}; download it again")
        self._check_rest(self.held)

    def _scan(self, piece: bytes, scanned: int) -> Iterator[Located]:
        places, classes = self._structure(piece)
        taken = 0  # of `held`: where the last record ended
        if (
            self.depth == 0
            and not self.ended
            and len(places)
            and self.held[: places[0] + scanned].strip(b" \t\r\n\xef\xbb\xbf")
        ):
            raise self._fault(0, f"it begins with {self.held[:20]!r}, and neither with {{ nor with [")
        levels = self.depth + np.cumsum(classes)
        # the file's outermost value opens and closes, and so do the values in it
        marks = np.flatnonzero(((classes == _OPEN) & (levels <= 2)) | ((classes == _CLOSE) & (levels <= 1)))
        for mark in marks:
            place, level, opens = int(places[mark]) + scanned, int(levels[mark]), classes[mark] == _OPEN
            if self.ended or level < 0:
                raise self._fault(self.base + place, "more follows the end of its value")
            if opens and level == 1:
                self.in_object = self.held[place : place + 1] == b"{"
                taken = place + 1
            elif opens:
                self.start = place
            elif level == 1:
                key = self._key(self.held[taken : self.start], self.base + taken)
                yield Located(key, self.base + self.start, self.held[self.start : place + 1])
                taken, self.start = place + 1, -1
            else:
                self.ended = True
                if self.held[taken:place].strip():
                    raise self._fault(
                        self.base + taken, f"{self.held[taken : taken + 40]!r} is neither object nor list"
                    )
                taken = place + 1
        if len(levels):
            self.depth = int(levels[-1])
        self.held = self.held[taken:]
        self.base += taken
        if self.start >= 0:
            self.start -= taken

    def _structure(self, piece: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Places and classes of the brackets of a piece that are in no text."""
        codes = np.frombuffer(piece, np.uint8)
        folded = codes | 0x20  # [ is { and ] is } without this bit
        opens = folded == ord("{")
        marked = (codes == ord('"')) | opens | (folded == ord("}"))
        places = np.flatnonzero(marked)
        quotes = codes[places] == ord('"')
        if self.slashes or b"\\" in piece:
            quotes, places = self._unescaped(codes, places, quotes)
        self._count_slashes(piece)
        texts = np.cumsum(quotes, dtype=np.int32)
        outside = ~quotes & (((texts + self.in_text) & 1) == 0)
        self.in_text ^= bool(len(texts) and texts[-1] & 1)
        places = places[outside]
        return places, np.where(opens[places], _OPEN, _CLOSE)

    def _unescaped(self, codes: np.ndarray, places: np.ndarray, quotes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is left of places and quotes without the quotes that follow an odd number of backslashes."""
        escaped = np.zeros(len(places), bool)
        after = np.flatnonzero(quotes & (places > 0) & (codes[places - 1] == ord("\\")))
        if len(after):
            slashes = np.flatnonzero(codes == ord("\\"))
            begins = np.maximum.accumulate(np.where(np.diff(slashes, prepend=-2) != 1, slashes, 0))
            first = begins[np.searchsorted(slashes, places[after] - 1)]
            # a run at the beginning goes on from the piece before
            escaped[after] = (places[after] - first + np.where(first == 0, self.slashes, 0)) % 2 == 1
        if len(places) and places[0] == 0 and quotes[0]:
            escaped[0] = self.slashes % 2 == 1
        return quotes[~escaped], places[~escaped]

    def _count_slashes(self, piece: bytes) -> None:
        tail = len(piece) - len(piece.rstrip(b"\\"))
        self.slashes = tail + (self.slashes if tail == len(piece) else 0)

    def _key(self, between: bytes, offset: int) -> str:
        match = (_KEY if self.in_object else _COMMA).fullmatch(between)
        if match is None:
            raise self._fault(
                offset, f"{between[:60]!r} stands where an entry that is an object or a list should begin"
            )
        return str(parse(match.group(1), f"{self.path}: the key at byte {offset}")) if self.in_object else ""

    def _check_rest(self, rest: bytes) -> None:
        if rest.strip():
            raise self._fault(self.base, f"{rest[:40]!r} follows the end of its value")

    def _fault(self, offset: int, what: str) -> DataError:
        return DataError(f"{self.path}: not a JSON object or list of records, at byte {offset}: {what}")


def jsonl_records(path: Path) -> Iterator[Located]:
    """The lines of a JSONL file that are not empty, with where they lie. Raises DataError for one that is too long."""
    offset = 0
    with path.open("rb") as file:
        while line := file.readline(MOST_RECORD_BYTES):
            if len(line) == MOST_RECORD_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{path}: a line of more than {MOST_RECORD_BYTES >> 20} MB at byte {offset}: no JSONL")
            if data := line.removeprefix(b"\xef\xbb\xbf" if not offset else b"").strip():
                yield Located("", offset + line.index(data), data)
            offset += len(line)
