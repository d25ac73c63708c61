"""The image's recipe is clean, pinned to what is tested, and its pip lines work in an environment of their own."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "cluster/image"
DOCKERFILE = IMAGE / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("wget=1.21.3-*", "wget"))
    done = subprocess.run([HADOLINT, broken], capture_output=True, text=True, timeout=60)
    assert done.returncode and "DL3008" in done.stdout


def pins() -> dict[str, str]:
    lines = [line for line in (IMAGE / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["gpu"], *extras["server"]):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == "torch":
            assert f"torch{requirement.specifier}" in DOCKERFILE.read_text()
        else:
            assert requirement.specifier.contains(pins()[name]), text
    for name, pinned in pins().items():
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of an extra that is not installed here
            continue
        for text in needs:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                other = canonicalize_name(needed.name)
                assert other == "torch" or needed.specifier.contains(pins()[other], prereleases=True), (name, text)
        assert pinned


def test_the_image_runs_as_nobody_special_and_has_all_rooms() -> None:
    text = DOCKERFILE.read_text()
    assert text.rindex("USER 1000") > text.rindex("pip install")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in line.split():
            assert source.split("/")[0] in kept and (ROOT / source).exists(), source


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_its_pip_lines_run_and_the_package_answers(tmp_path: Path) -> None:
    """The RUN lines of Python, as they stand, with the index of this machine."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"
    environment["HOME"] = str(tmp_path)
    environment.pop("PYTHONPATH", None)
    for name in ("constraints.txt", "dependencies.py"):
        shutil.copy(IMAGE / name, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for room in ("model", "pipelines", "cluster", "platform", "configs"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    lines = [line for line in re.findall(r"^RUN (.+)$", text, re.M) if line.startswith(("python", "domainshuttle"))]
    assert len(lines) == 4
    for line in lines:
        line = line.replace('--index-url "${TORCH_INDEX}" ', "")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "domainshuttle 0.1.0" in done.stdout
