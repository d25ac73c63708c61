"""Text for people at any width: records of the same fields, and prose. Nothing is cut and no word is broken."""

import os
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_UNLIMITED = 1_000_000
_INDENT, _GAP = 4, 3
_SHORT = 28
"""Cells of the longest value of a field that shares its line with others."""
_JOINERS = "\u200c\u200d"
"""Invisible, but part of words in some scripts and of some emoji."""


@dataclass(frozen=True)
class Records:
    """Prints a table with a row a record where that fits the width, else a block of `field  value` lines a record.

    Values are plain text: neither markup nor control characters in them have an effect. In a block, short fields share
    lines, in columns; an empty value is left out.
    """

    fields: Sequence[str]
    rows: Sequence[Sequence[str]]
    """A value for each field; an empty one is not known."""
    title: str = ""
    numeric: Collection[str] = ()
    """Fields whose values stand on the right in a table."""
    styles: Mapping[str, str] = field(default_factory=dict)
    """Colours of values that are words of ours, such as `failed`."""
    heads: int = 1
    """How many of the first fields name a record: they are the heading of its block, with their names but for the first
    where that is no number."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.rows:
            return
        if self.title:
            yield Prose(self.title, style="bold")
        rows = [[visible(value) for value in row] for row in self.rows]
        table = self._table(rows)
        needed = Measurement.get(console, options.update(max_width=_UNLIMITED), table).maximum
        if needed <= options.max_width:
            yield table
        else:
            yield from self._blocks(rows, options.max_width, _breaks_lines(console))

    def _table(self, rows: Sequence[Sequence[str]]) -> Table:
        table = Table()
        for name in self.fields:
            right = name in self.numeric
            table.add_column(Text(visible(name)), justify="right" if right else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(self._styled, row))
        return table

    def _blocks(self, rows: Sequence[Sequence[str]], width: int, breaks: bool) -> Iterator[Text]:
        room = width if breaks else _UNLIMITED
        names = [visible(name) for name in self.fields]
        cells = {place: max(cell_len(row[place]) for row in rows) for place in range(self.heads, len(names))}
        shared = [_Cell(place, cell_len(names[place]), size) for place, size in cells.items() if size]
        shared = [cell for cell in shared if max(cell.label, cell.value) <= _SHORT and _INDENT + cell.width <= width]
        patterns = {tuple(cell for cell in shared if row[cell.place]) for row in rows}
        lines = {pattern: _lay_out(pattern, width) for pattern in patterns}  # records with the same fields look alike
        own_line = [place for place, size in cells.items() if size and place not in {cell.place for cell in shared}]
        label = max((size for place in own_line if (size := cell_len(names[place])) <= _SHORT), default=0)
        apart = max(map(len, lines.values())) + len(own_line) > 1
        for number, row in enumerate(rows):
            if number and apart:
                yield Text()
            first = f"{names[0]} {row[0]}" if self.fields[0] in self.numeric else row[0]  # a number says nothing
            heading = ", ".join([first, *(f"{names[place]} {row[place]}" for place in range(1, self.heads))])
            yield from _wrapped(Text(heading, "bold"), room)
            for line in lines[tuple(cell for cell in shared if row[cell.place])]:
                text = Text()
                for place, label_at, value_at in line:
                    text.append(" " * (label_at - text.cell_len) + names[place])
                    text.append(" " * (value_at - text.cell_len))
                    text.append_text(self._styled(row[place]))
                yield text
            for place in own_line:
                if row[place]:
                    yield from _labelled(names[place], self._styled(row[place]), label, room)
        yield Text()

    def _styled(self, value: str) -> Text:
        return Text(value, self.styles.get(value, ""))


@dataclass(frozen=True)
class _Cell:
    """A field that shares its line: its place among the fields, and the widths of its label and its longest value."""

    place: int
    label: int
    value: int

    @property
    def width(self) -> int:
        return self.label + 2 + self.value


def _lay_out(cells: Sequence[_Cell], width: int) -> list[list[tuple[int, int, int]]]:
    """The cells in their order, in as few lines as fit, with no more columns than these need.

    Of each cell of a line: its place, and where its label and its value begin.
    """
    if not cells:
        return []
    fitting = next((count for count in range(len(cells), 1, -1) if _columns(cells, count)[1] <= width), 1)
    count = -(-len(cells) // -(-len(cells) // fitting))
    starts, _ = _columns(cells, count)
    placed = [(cell.place, *starts[number % count]) for number, cell in enumerate(cells)]
    return [placed[first : first + count] for first in range(0, len(placed), count)]


def _columns(cells: Sequence[_Cell], count: int) -> tuple[list[tuple[int, int]], int]:
    """Where the labels and the values of each of `count` columns begin, and the width of a line."""
    starts, at = [], _INDENT
    for column in (cells[first::count] for first in range(count)):
        value_at = at + max(cell.label for cell in column) + 2
        starts.append((at, value_at))
        at = value_at + max(cell.value for cell in column) + _GAP
    return starts, at - _GAP


def _labelled(name: str, value: Text, label: int, width: int) -> Iterator[Text]:
    """A field on lines of its own: the value behind its label, or below it where one of the two needs the room."""
    indent = _INDENT + label + 2
    if cell_len(name) <= label and max(map(cell_len, value.plain.split(" "))) <= width - indent:
        lead = " " * _INDENT + name + " " * (indent - _INDENT - cell_len(name))
    else:
        for line in _wrapped(Text(name), width - _INDENT):
            yield Text.assemble(" " * _INDENT, line)
        indent = _INDENT + 2
        lead = " " * indent
    for line in _wrapped(value, width - indent):
        yield Text.assemble(lead, line)
        lead = " " * indent


@dataclass(frozen=True)
class Prose:
    """Prints plain text, on a terminal in lines that break between words."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width if _breaks_lines(console) else _UNLIMITED
        yield from _wrapped(Text(visible(self.text), self.style), width)


@dataclass(frozen=True)
class Advice:
    """Prints plain text and the command that it names, behind it or on a line of its own: one line, to be copied."""

    text: str
    command: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        together = Text(f"{visible(self.text)} {visible(self.command)}")
        if together.cell_len <= options.max_width or not _breaks_lines(console):
            yield together
        else:
            yield Prose(self.text)
            yield Text(f"  {visible(self.command)}")


def visible(text: str, but: str = "") -> str:
    """The text with an escape (`\\x1b`) for each character that is not seen, moves the cursor or turns the direction.

    Those in `but` stay.
    """
    if text.isprintable():  # no character of those kinds is: a report has megabytes of such text
        return text
    return "".join(c if c in but or _is_seen(c) else c.encode("unicode_escape").decode() for c in text)


def _is_seen(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def headline(text: str) -> str:
    """An error's text in one line: of a traceback the first and the last line, and how many are left out."""
    first, *rest = text.strip().splitlines() or [""]
    if not rest:
        return first
    between = f" [{len(rest) - 1} more line{'s' if len(rest) > 2 else ''}]" if len(rest) > 1 else ""
    return f"{first}{between} {rest[-1].strip()}"


def _breaks_lines(console: Console) -> bool:
    """Whether somebody looks at lines of a known width; elsewhere, such as in a pipe, a value stays in one line."""
    return console.is_terminal or os.environ.get("COLUMNS", "").isdigit()


def _wrapped(text: Text, width: int) -> Iterator[Text]:
    """Lines of at most `width` cells, broken at spaces; a longer word stays whole, and the terminal folds it."""
    offsets, used, at = [], 0, 0
    for word in text.plain.split(" "):
        size = cell_len(word)
        if at and used + size > width and text.plain[:at].strip():
            offsets.append(at)
            used = 0
        at, used = at + len(word) + 1, used + size + 1
    for line in text.divide(offsets):
        line.rstrip()
        yield line
