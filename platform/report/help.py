"""Help pages of the command line: plain text with whole words at any width, and commands on lines of their own."""

import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
import typer.core
from rich.cells import cell_len

_INDENT, _GAP = 2, 3
_LONGEST_LABEL = 26
"""Cells of the longest label that has its text behind it; that of a longer one begins on the next line."""
_WIDEST = 100
"""Cells of the longest line: longer ones are hard to read."""
_VALUES = {"str": "TEXT", "int": "N", "float": "NUMBER", "path": "PATH", "file": "PATH"}
"""What a value is called that its option gives no name, by its type."""


class _Pages:
    """A command of typer with such a page."""

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        arguments = [_argument(one) for one in _shown(self, ctx) if _is_argument(one)]
        more = [self.subcommand_metavar] if isinstance(self, typer.core.TyperGroup) else []
        return [self.options_metavar, *arguments, *more]

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        formatter.write("\n".join(_page(self, ctx, shutil.get_terminal_size().columns)) + "\n")


class Command(_Pages, typer.core.TyperCommand):
    """A command whose help is such a page."""

    def __init__(self, *names: Any, **options: Any) -> None:
        super().__init__(*names, **options)
        for one in filter(_is_argument, self.params):  # called the same on its page and in messages
            one.metavar = one.metavar or str(one.name).upper()


class Group(_Pages, typer.core.TyperGroup):
    """A group of commands whose help is such a page."""


class Application(typer.Typer):
    """Commands whose help are such pages."""

    def __init__(self, *, cls: type[Group] = Group, **options: Any) -> None:
        super().__init__(cls=cls, rich_markup_mode=None, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": Command} | options)


def _page(command: Any, ctx: Any, width: int) -> Iterator[str]:
    room = min(width, _WIDEST)
    yield f"Usage: {ctx.command_path} {' '.join(command.collect_usage_pieces(ctx))}"
    for paragraph in _paragraphs(command.help):
        yield ""
        yield from _paragraph(paragraph, room)
    shown = _shown(command, ctx)
    arguments = [(_argument(one).strip("[]"), _about(one)) for one in shown if _is_argument(one)]
    options = [(_option(one), _about(one)) for one in shown if not _is_argument(one)]
    commands = [(name, _first(one)) for name, one in getattr(command, "commands", {}).items() if not one.hidden]
    for title, entries in (("Arguments", arguments), ("Commands", commands), ("Options", options)):
        if entries:
            yield from ("", f"{title}:", *_entries(entries, room))


def _shown(command: Any, ctx: Any) -> list[Any]:
    return [one for one in command.get_params(ctx) if not getattr(one, "hidden", False)]


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar) + ("..." if parameter.nargs != 1 else "")
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    others = parameter.secondary_opts if parameter.default else ()  # what is off is switched on, and needs no more
    names = " / ".join((*parameter.opts, *others))
    return names if parameter.is_flag else f"{names} {parameter.metavar or _value(parameter)}"


def _value(parameter: Any) -> str:
    kind = parameter.type_descriptor
    if kind.is_choice:
        return "|".join(str(getattr(one, "value", one)) for one in kind.choices)
    if kind.is_path:
        return "PATH"
    return next((name for word, name in _VALUES.items() if word in parameter.bare_type().lower()), "TEXT")


def _about(parameter: Any) -> str:
    """What a parameter is for, and which values it takes."""
    parts = [parameter.help or ""]
    kind = parameter.type_descriptor
    if _is_argument(parameter) and kind.is_choice:
        parts.append(f"One of: {', '.join(str(getattr(one, 'value', one)) for one in kind.choices)}.")
    if not _is_argument(parameter) and (parameter.multiple or kind.is_list):
        parts.append("Repeat it for more.")
    least, most = parameter.min, parameter.max
    if least is not None and most is not None:
        parts.append(f"From {least:g} to {most:g}.")
    elif least is not None and least > 0:
        parts.append(f"At least {least:g}.")
    if parameter.envvar:
        parts.append(f"Without it the environment's {parameter.envvar}.")
    default = parameter.default
    if parameter.secondary_opts and default:
        parts.append(f"Default: {parameter.opts[0]}.")
    elif default is not None and default is not False and not callable(default):
        parts.append(f"Default: {default:g}." if isinstance(default, float) else f"Default: {default}.")
    if parameter.required and not _is_argument(parameter):
        parts.append("Required.")
    *before, last = [part for part in parts if part]
    return " ".join([*(part if part.endswith((".", "?")) else f"{part}." for part in before), last])


def _first(command: Any) -> str:
    """What a command does, in the sentence that its page begins with."""
    return " ".join(next(iter(_paragraphs(command.help)), "").split())


def _paragraphs(text: str | None) -> list[str]:
    return [one for one in re.split(r"\n\s*\n", inspect.cleandoc(text or "").partition("\f")[0]) if one.strip()]


def _paragraph(text: str, width: int) -> Iterator[str]:
    """One that is indented is commands, which stay as they are."""
    if text.startswith(" "):
        yield from text.splitlines()
    else:
        yield from _filled(text, width)


def _entries(entries: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    fitting = [size for label, _ in entries if (size := cell_len(label)) <= _LONGEST_LABEL]
    at = _INDENT + max(fitting, default=_LONGEST_LABEL) + _GAP
    for label, about in entries:
        head, lines = " " * _INDENT + label, list(_filled(about, width - at))
        if cell_len(head) + _GAP <= at and lines:
            yield head + " " * (at - cell_len(head)) + lines.pop(0)
        else:
            yield head
        yield from (" " * at + line for line in lines)


def _filled(text: str, width: int) -> Iterator[str]:
    """Lines that break between words; a longer word stays whole."""
    line = ""
    for word in text.split():
        if line and cell_len(line) + 1 + cell_len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    if line:
        yield line
