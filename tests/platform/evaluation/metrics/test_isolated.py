"""A model with packages of its own: installed once and whole, or a reason.

Run: pytest tests/platform/evaluation/metrics/test_isolated.py; with -m nightly also in an actor
"""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from domainshuttle.cluster.local import Connection
from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.evaluation.metrics.isolated import Isolated, installed
from domainshuttle.platform.evaluation.metrics.metric import Needs

NAME = "domainshuttle_tiny_probe"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that nothing here has, as a requirement that needs no network; the cache of packages is the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / f"{NAME}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(f"{NAME}.py", "VALUE = 42\n")
        made.writestr(f"{NAME}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        made.writestr(
            f"{NAME}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        made.writestr(f"{NAME}-1.0.dist-info/RECORD", "")
    assert importlib.util.find_spec(NAME) is None
    return f"{NAME} @ {path.as_uri()}"


def test_packages_are_installed_once_and_whole_or_there_is_a_reason(
    wheel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = installed((wheel,))
    assert (folder / f"{NAME}.py").is_file()
    code = f"import {NAME}; print({NAME}.VALUE)"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert run.stdout == "42\n"
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # what is there is not installed again
        assert installed((wheel,)) == folder
    with pytest.raises(DataError, match=r"can't be installed: .*nowhere.*PIP_INDEX_URL.*--again"):
        installed((f"other @ file://{tmp_path}/nowhere.whl",))
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


class Probe:
    """What runs in the actor: it has what the product has not."""

    def __init__(self, times: int) -> None:
        import domainshuttle_tiny_probe  # type: ignore[import-not-found]

        self.value = times * domainshuttle_tiny_probe.VALUE

    def scores(self, frames: np.ndarray, windows: list[list[int]]) -> list[float]:
        if len(windows) > 3:
            raise ValueError("too many\nwindows")
        return [float(self.value + len(frames))] * len(windows)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_model_runs_in_an_actor_with_its_own_packages(wheel: str, tmp_path: Path) -> None:
    with Connection():
        model = Isolated("ms", Probe, (2,), Needs(gpus=1, packages=(wheel,)))
        assert model.call("scores", np.zeros((5, 8, 8, 3), np.uint8), [[0], [1]]) == [89.0, 89.0]
        with pytest.raises(DataError, match="ms: its model raised ValueError: windows"):
            model.call("scores", np.zeros((5, 8, 8, 3), np.uint8), [[0]] * 4)
        assert model.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [[0]]) == [85.0]
        absent = Isolated("ms", Probe, (2,), Needs(packages=(f"other @ file://{tmp_path}/nowhere.whl",)))
        for _ in range(2):
            with pytest.raises(DataError, match=r"^ms: its own packages \(other .*can't be installed: .*nowhere"):
                absent.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [[0]])
        broken = Isolated("ms", Probe, (), Needs(packages=(wheel,)))
        with pytest.raises(DataError, match=r"ms: its model can't be loaded: .*times"):
            broken.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [[0]])
