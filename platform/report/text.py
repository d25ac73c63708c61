"""Text for people at any width: records of the same fields, and prose. Nothing is cut and no word is broken."""

import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    lines, in columns that are the same for all records; an empty value is left out.
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
    """How many of the first fields name a record: they are the heading of its block."""

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
            table.add_row(*(Text(value, self.styles.get(value, "")) for value in row))
        return table

    def _blocks(self, rows: Sequence[Sequence[str]], width: int, breaks: bool) -> Iterator[Text]:
        fields = {name: [row[place] for row in rows] for place, name in enumerate(self.fields) if place >= self.heads}
        longest = {name: max(map(cell_len, values)) for name, values in fields.items() if any(values)}
        short = [name for name in longest if longest[name] <= _SHORT]
        lines = _lay_out(short, longest, width) if short else []
        own_line = [name for name in longest if name not in short]
        label = max(map(cell_len, own_line), default=0)
        apart = len(lines) + len(own_line) > 1
        for number, row in enumerate(rows):
            if number and apart:
                yield Text()
            heading = [row[0], *(f"{self.fields[place]} {row[place]}" for place in range(1, self.heads))]
            # the indent of a name says what it belongs to
            yield from _wrapped(Text(", ".join(heading), "bold"), width if breaks else _UNLIMITED)
            for line in lines:
                if any(fields[name][number] for name, _, _ in line):
                    yield self._line((name, fields[name][number], at, end) for name, at, end in line)
            for name in own_line:
                if value := fields[name][number]:
                    value_text = Text(value, self.styles.get(value, ""))
                    yield from _labelled(name, value_text, label, width if breaks else _UNLIMITED)
        yield Text()

    def _line(self, cells: Iterable[tuple[str, str, int, int]]) -> Text:
        """A line of labels and values; those of empty values stay blank. `at` is where the label, `end` the value is."""
        line = Text()
        for name, value, label_at, value_at in cells:
            if value:
                line.append(" " * (label_at - line.cell_len) + visible(name))
                line.append(" " * (value_at - line.cell_len))
                line.append(value, self.styles.get(value))
        return line


_Line = list[tuple[str, int, int]]
"""Fields of a line: name, and where its label and its value begin."""


def _lay_out(fields: Sequence[str], longest: Mapping[str, int], width: int) -> list[_Line]:
    """Fields in their order, in as few lines as fit the width, with no more columns than that needs."""
    fitting = next((n for n in range(len(fields), 1, -1) if _columns(fields, longest, n)[-1] <= width), 1)
    lines = -(-len(fields) // fitting)
    columns = -(-len(fields) // lines)
    *starts, _ = _columns(fields, longest, columns)
    labels = _label_widths(fields, columns)
    placed = [(name, starts[n % columns], starts[n % columns] + labels[n % columns] + 2) for n, name in enumerate(fields)]
    return [placed[first : first + columns] for first in range(0, len(placed), columns)]


def _columns(fields: Sequence[str], longest: Mapping[str, int], count: int) -> list[int]:
    """Where each of `count` columns begins, and the width of all."""
    starts, at = [], _INDENT
    for column, label in enumerate(_label_widths(fields, count)):
        starts.append(at)
        at += label + 2 + max(longest[name] for name in fields[column::count]) + _GAP
    return [*starts, at - _GAP]


def _label_widths(fields: Sequence[str], count: int) -> list[int]:
    return [max(cell_len(visible(name)) for name in fields[column::count]) for column in range(count)]


def _labelled(name: str, value: Text, label: int, width: int) -> Iterator[Text]:
    """A field on lines of its own: the value behind its label, or below it where its longest word needs the room."""
    name, indent = visible(name), _INDENT + label + 2
    room = width - indent
    if max(map(cell_len, value.plain.split(" "))) > room:
        yield Text(" " * _INDENT + name)
        lead, indent = " " * (_INDENT + 2), _INDENT + 2
    else:
        lead = " " * _INDENT + name + " " * (indent - _INDENT - cell_len(name))
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
    return "".join(c if c in but or _is_seen(c) else c.encode("unicode_escape").decode() for c in text)


def _is_seen(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def headline(text: str) -> str:
    """An error's text in a line: of a traceback what failed and its cause, and how many lines are left out."""
    lines = text.strip().splitlines() or [""]
    between = f" [{len(lines) - 2} lines] " if len(lines) > 2 else " "
    return lines[0] if len(lines) == 1 else f"{lines[0]}{between}{lines[-1].strip()}"


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
