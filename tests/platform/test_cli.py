"""The command line answers quickly because it imports little.

Run: python -m pytest tests/platform/test_cli.py
"""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from domainshuttle.platform.cli import _goes_on

HEAVY = ("torch", "ray", "mlflow", "diffusers", "transformers", "numpy", "pyarrow")


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys; import domainshuttle.platform.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "verb",
    [["--help"], ["data", "build", "--help"], ["train", "--help"], ["compare", "--help"], ["generate", "--help"]],
)
def test_every_verb_explains_itself(verb: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "domainshuttle.platform.cli", *verb], capture_output=True, text=True, check=True
    )
    assert "Usage" in run.stdout


def test_the_version_is_the_packages() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "domainshuttle.platform.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"domainshuttle {version('domainshuttle')}"


def test_a_mistake_ends_with_one_message_and_code_2() -> None:
    code = (
        "import sys; from domainshuttle.platform.cli import main\n"
        "sys.argv = ['domainshuttle', *sys.argv[1:]]\n"
        f"try: main()\nfinally: print([m for m in {HEAVY[:5]!r} if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "train", "demo", "--set", "clster.workers=3"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "did you mean 'cluster'" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout.strip() == "[]", "it was not answered at once"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_a_library_makes_another_error_of_is_one(number: str) -> None:
    """As pydantic does while it builds a model, which is most of the first second of a command."""
    code = (
        "import signal, sys; from domainshuttle.platform import cli\n"
        "def work(**options):\n"
        f"    try: signal.raise_signal(signal.{number})\n"
        "    except KeyboardInterrupt: raise ValueError('KeyboardInterrupt: ') from None\n"
        "cli.app = work; sys.argv = ['domainshuttle', 'train', 'demo']; cli.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (130, "Stopped. The same command goes on where it was.\n")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train demo", "The same command goes on where it was."),
        ("train demo --fresh --set name=x", "The same command without --fresh goes on where it was."),
        ("train demo --resume auto", "The same command goes on where it was."),
        ("train demo --resume=none", "The same command without --resume goes on where it was."),
        ("demo", "The same command with --no-fresh goes on where it was."),
        ("demo --no-fresh", "The same command goes on where it was."),
        ("data encode demo", "The same command goes on where it was."),
        ("data inspect corpus", ""),
        ("evaluate exported --cases paper", "The same command goes on where it was."),
        ("evaluate report folder", ""),
        ("status run --watch 5", ""),
        ("", ""),
    ],
)
def test_an_interrupt_names_the_command_that_goes_on(command: str, told: str) -> None:
    """`demo` and `--fresh` begin anew, and what only reads has nothing to go on with."""
    assert _goes_on(command.split()) == told


def test_ray_is_quiet_in_every_command_whichever_of_our_modules_imports_it() -> None:
    """Of a worker that was killed it would print its guesses, above what the driver found out."""
    code = (
        "import os, sys; from domainshuttle.platform import cli\n"
        "def work(**options):\n"
        "    print('ray' in sys.modules, 'A worker died' in os.environ['RAY_DEDUP_LOGS_SKIP_REGEX'])\n"
        "cli.app = work; cli.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False True"


def test_a_terminal_without_a_known_width_shows_everything() -> None:
    """As `COLUMNS=0` in the shells of some containers and editors."""
    code = "from domainshuttle.platform.console import console, errors; console.print('shown'); errors.print('said')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"COLUMNS": "0", "LINES": "0"},
    )  # fmt: skip
    assert (run.stdout, run.stderr) == ("shown\n", "said\n")
