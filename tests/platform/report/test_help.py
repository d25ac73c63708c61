"""Help pages have all that is written of a command, whole: python -m pytest tests/platform/report/test_help.py"""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from domainshuttle.platform.cli import app

ROOT: Any = typer.main.get_command(app)


def pages() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command, with the words that call it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), ROOT)]
    while waiting:
        name, command = waiting.pop()
        yield name, command
        waiting += [((*name, verb), one) for verb, one in getattr(command, "commands", {}).items()]


PAGES = dict(pages())


def page_of(name: tuple[str, ...]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as page:
        ROOT.main([*name, "--help"], prog_name="domainshuttle", standalone_mode=False)
    return page.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_of_a_page_is_cut_and_no_line_is_too_long(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name, command in PAGES.items():
        page = page_of(name)
        said, options = words(page), command.params
        for text in [command.help, *(one.help for one in options if not getattr(one, "hidden", False))]:
            assert words(text or "") in said, f"{name}: {text}"
        for option in (one for one in options if not getattr(one, "hidden", False)):
            assert (option.metavar or "") in page and all(one in page for one in option.opts if one.startswith("-"))
        for line in page.splitlines():
            command_line = line.startswith("    ") or line.startswith("Usage: ")  # to be copied: stays as it is
            long_word = len(line.split()) <= 1 or line.strip().startswith("--")
            assert len(line) <= (80 if command_line and width < 80 else width) or long_word, f"{name}: {line!r}"
        assert not re.search(r"\*\*|…|<\w+>|\bTODO\b", page), name


def test_a_page_says_what_may_be_given_and_what_holds_without_it() -> None:
    page = words(page_of(("logs",)))
    assert page.startswith("Usage: domainshuttle logs [OPTIONS] RUN Show what a worker")
    assert "--rank N The worker's rank. Default: 0." in page and "At least 1." in page
    page = words(page_of(("cluster", "render")))
    assert "One of: kuberay, vm, mlflow, monitoring." in page and "Repeat it for more." in page and "Required." in page
    page = words(page_of(("submit",)))
    assert "--preflight / --no-preflight Check the cluster first" in page and "Default: --preflight." in page
    assert "--fresh Remove" in page and "--address" not in page  # a former name


def test_a_mistake_in_the_command_line_names_what_is_missing_or_unknown() -> None:
    for given, wanted in (
        (["train"], "Missing argument 'CONFIG'"),
        (["trian", "demo"], "No such command 'trian'"),
        (["train", "demo", "--frsh"], "--frsh"),
        (["logs", "x", "--rank", "-1"], "'--rank'"),
    ):
        result = CliRunner().invoke(app, given, env={"COLUMNS": "80"}, prog_name="domainshuttle")
        assert result.exit_code == 2 and wanted in result.output and "--help" in result.output, result.output


def test_each_command_says_what_it_does_in_its_first_sentence_and_each_option_what_for() -> None:
    for name, command in PAGES.items():
        assert (command.help or "").strip()[:1].isupper(), name
        assert all(one.help for one in command.params if not getattr(one, "hidden", False)), name
