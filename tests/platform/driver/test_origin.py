"""The commit that a run is tagged with is that of this code: python -m pytest tests/platform/driver/test_origin.py"""

import subprocess
from pathlib import Path

import pytest

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver import driver

MODULE = Path("platform/driver/driver.py")


def repository(folder: Path, *files: Path) -> str:
    """A repository with a commit that has these files; returns the commit."""

    def git(*command: str) -> str:
        options = ["-c", "user.email=a@b", "-c", "user.name=n", "-c", "commit.gpgsign=false"]
        run = subprocess.run(["git", "-C", str(folder), *options, *command], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("# code\n")
    git("init", "-q", ".")
    if files:
        git("add", *map(str, files))
    git("commit", "-q", "--allow-empty", "-m", "one")
    return git("rev-parse", "HEAD")


@pytest.mark.parametrize("tracked", [False, True])
def test_a_package_in_somebody_elses_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool
) -> None:
    installed = Path(".venv/site-packages/domainshuttle") / MODULE
    repository(tmp_path, *([installed] if tracked else []))
    (tmp_path / installed).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / installed).touch()
    monkeypatch.setattr(driver, "__file__", str(tmp_path / installed))
    assert driver._git_commit() == ""


def test_an_own_checkout_has_its_commit_also_through_a_link_and_in_a_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours, theirs = repository(tmp_path / "ours", MODULE), repository(tmp_path / "theirs")
    (tmp_path / "domainshuttle").symlink_to(tmp_path / "ours")
    assert ours != theirs
    for root in ("ours", "domainshuttle"):
        monkeypatch.setattr(driver, "__file__", str(tmp_path / root / MODULE))
        assert driver._git_commit() == ours
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "theirs"))
    assert driver._git_commit() == ours


def test_code_that_lies_in_a_repository_of_its_own_name_but_not_in_its_history_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path)
    (tmp_path / MODULE).parent.mkdir(parents=True)
    (tmp_path / MODULE).touch()
    monkeypatch.setattr(driver, "__file__", str(tmp_path / MODULE))
    assert driver._git_commit() == ""


@pytest.mark.parametrize(
    ("own", "around", "told"),
    [
        (None, "http://server:5000", True),
        ("http://server:5000", "http://server:5000/", False),
        ("http://server:5000", "http://other:5000", True),
        (None, "", False),
        (None, "sqlite:////elsewhere/mlflow.db", True),
    ],
)
def test_mlflows_own_variable_is_not_left_aside_in_silence(
    monkeypatch: pytest.MonkeyPatch, own: str | None, around: str, told: bool
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", around)
    config = load_config("demo", [f"tracking.uri={own}"] if own else [])
    text = driver.other_tracking(config)
    assert (text is not None) == told
    assert text is None or (around in text and config.tracking_uri in text and "--set tracking.uri=" in text)


def test_without_git_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert driver._git_commit() == ""
