"""A command whose reader goes away ends without a word, and lines of jobs have times.

Run: python -m pytest tests/platform/test_output.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CLI = [sys.executable, "-m", "domainshuttle.platform.cli"]


def without_reader(command: list[str], errors_too: bool = False) -> tuple[int, str]:
    """The exit code of a command whose output nobody reads, and what it says of that."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run(command, stdout=writer, stderr=writer if errors_too else subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    return run.returncode, (run.stderr or b"").decode()


@pytest.mark.parametrize(
    ("arguments", "errors_too"),
    [
        (["train", "--help"], False),  # printed by typer
        (["--version"], True),  # by sys.stdout, from whose buffer it is written at the end
        (["plan", "demo"], False),  # by rich
        (["status", "/nowhere"], True),  # a message to standard error
    ],
)
def test_a_command_without_a_reader_ends_silently(arguments: list[str], errors_too: bool) -> None:
    assert without_reader([*CLI, *arguments], errors_too) == (141, "")


def test_a_mistake_keeps_its_code_where_only_the_output_has_no_reader() -> None:
    code, said = without_reader([*CLI, "status", "/nowhere"])
    assert code == 2 and "no run in /nowhere" in said


def test_work_that_turns_ctrl_c_into_a_stop_goes_on_to_its_end(tmp_path: Path) -> None:
    """As training does, which writes a checkpoint: it is told once, and what it prints then is lost."""
    program = (
        "import signal, sys; from pathlib import Path; from domainshuttle.platform import output\n"
        "told = []; signal.signal(signal.SIGINT, lambda *_: told.append(output.reader_gone()))\n"
        "output.watch_readers()\n"
        "for number in range(3): print(number, flush=True); print(number, file=sys.stderr, flush=True)\n"
        "Path(sys.argv[1]).write_text(repr(told))"
    )
    end = tmp_path / "end"
    assert without_reader([sys.executable, "-c", program, str(end)], errors_too=True) == (0, "")
    assert end.read_text() == "[True]"


def test_each_line_of_a_job_has_one_time() -> None:
    program = (
        "import sys; from domainshuttle.platform import output\n"
        "output.watch_readers(); output.date_lines()\n"
        "print('a'); print('b', end=' '); print('c\\n\\n2026-11-29T10:00:00 d\\ne'); raise SystemExit('f')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{time} a\n{time} b c\n\n2026-11-29T10:00:00 d\n{time} e\n", run.stdout), run.stdout
    assert re.fullmatch(rf"{time} f\n", run.stderr)


def test_a_mistake_in_a_job_has_a_time() -> None:
    job = os.environ | {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    run = subprocess.run([*CLI, "train", "/nowhere.yaml"], capture_output=True, text=True, check=False, env=job)
    assert run.returncode == 2 and re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d Error: ", run.stderr), run.stderr
