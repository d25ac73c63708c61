"""Text for people, at any width: .venv/bin/python -m pytest tests/platform/report/test_text.py"""

import io
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from domainshuttle.platform.report.text import Prose, Records, headline, visible


def printed(what: object, width: int, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, soft_wrap=True)
    console.print(what)
    return file.getvalue().split("\n")


WORDS = st.text(st.characters(), min_size=1, max_size=12) | st.sampled_from(["[bold]", "[/]", "名前", "x" * 60, "0.25"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)


@st.composite
def records(draw: st.DrawFn) -> Records:
    count = draw(st.integers(2, 7))
    names = draw(st.lists(WORDS, min_size=count, max_size=count))
    rows = draw(st.lists(st.lists(TEXTS, min_size=count, max_size=count), min_size=1, max_size=4))
    return Records(names, rows, draw(TEXTS), numeric=names[1:2], heads=draw(st.integers(1, 2)))


@settings(max_examples=100, deadline=None)
@given(records(), st.integers(10, 200), st.booleans())
def test_nothing_is_cut_and_no_word_is_broken_at_any_width(what: Records, width: int, terminal: bool) -> None:
    lines = printed(what, width, terminal)
    together = "".join("".join(lines).split())
    for row in what.rows:
        for name, value in zip(what.fields, row, strict=True):
            assert "".join(visible(value).split()) in together
            assert not value or name == what.fields[0] or "".join(visible(name).split()) in together
    words = {word for line in lines for word in line.split()}
    table = any("┃" in line for line in lines)
    for row in what.rows if not table else []:
        for value in row:
            assert set(visible(value).split()) <= {word.rstrip(",") for word in words} | words
    for line in lines:
        if terminal or line[:1] in set("┏┃┡│└"):
            assert cell_len(line) <= width or " " not in line.strip(" ")


ATTEMPTS = Records(
    ("stage", "steps", "used", "lost", "checkpointing", "ended"),
    [
        ["base", "0-57", "123.0", "12.5", "0.5", "RuntimeError: a worker died of something that takes a line to tell"],
        ["stage1", "57-300", "4.0", "", "0.25", "finished"],
    ],
    "Attempts",
    numeric=["used", "lost", "checkpointing"],
    heads=2,
)


def test_records_are_rows_where_they_fit_and_else_blocks_in_columns() -> None:
    wide = printed(ATTEMPTS, 140)
    assert wide[0] == "Attempts" and wide[2].split("┃")[1].strip() == "stage"
    assert [cell.strip() for cell in wide[5].split("│")[1:-1]] == ["stage1", "57-300", "4.0", "", "0.25", "finished"]
    assert printed(ATTEMPTS, 80) == [
        "Attempts",
        "base, steps 0-57",
        "    used  123.0   lost  12.5   checkpointing  0.5",
        "    ended  RuntimeError: a worker died of something that takes a line to tell",
        "",
        "stage1, steps 57-300",
        "    used  4.0     checkpointing  0.25",
        "    ended  finished",
        "",
        "",
    ]
    assert printed(ATTEMPTS, 36)[:8] == [
        "Attempts",
        "base, steps 0-57",
        "    used           123.0",
        "    lost           12.5",
        "    checkpointing  0.5",
        "    ended  RuntimeError: a worker",
        "           died of something that",
        "           takes a line to tell",
    ]
    assert printed(Records(("a", "b"), [], "nothing"), 80) == [""]
    workers = Records(("rank", "doing"), [["0", "word " * 20], ["1", "waits"]], numeric=["rank"])
    assert [line for line in printed(workers, 60) if line[:1].strip()] == ["rank 0", "rank 1"]


def test_without_a_terminal_a_value_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert f"    ended  {ATTEMPTS.rows[0][-1]}" in printed(ATTEMPTS, 40, terminal=False)
    assert printed(Prose("word " * 30), 40, terminal=False)[0] == ("word " * 30).rstrip()
    monkeypatch.setenv("COLUMNS", "40")
    assert all(len(line) <= 40 for line in printed(ATTEMPTS, 40, terminal=False))


@given(st.text())
def test_what_is_printed_can_be_seen(text: str) -> None:
    seen = visible(text)
    assert not set(seen) & {
        chr(code) for code in [*range(32), *range(127, 160), 0x200B, 0x2028, 0x202E, 0x2066, 0xFEFF]
    }
    assert seen.encode().decode() == seen  # no lone surrogate is left
    assert all(character in seen for character in text if character.isprintable())


def test_escapes_say_which_character_it_was() -> None:
    assert visible("a\x1b[31m\n\u202e\ud800名é") == r"a\x1b[31m\n\u202e\ud800名é"
    assert visible("a\nb", but="\n") == "a\nb"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("one line", "one line"),
        ("first\nlast", "first last"),
        ("first\n a\n last\n", "first [1 more line] last"),
        ("first\na\nb\nlast", "first [2 more lines] last"),
    ],
)
def test_the_headline_of_an_error(text: str, line: str) -> None:
    assert headline(text) == line


def test_an_encoding_that_lacks_a_character_ends_no_command() -> None:
    code = "from domainshuttle.platform.console import console; console.print('\\u540d \\u2514', markup=False)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii", **PATHS}, check=True
    )
    assert run.stdout == b"\\u540d \\u2514\n"


PATHS = {"PYTHONPATH": ":".join(sys.path)}
