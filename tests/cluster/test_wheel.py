"""The wheel of this tree: pip takes it, and it has what the package's own build has."""

import subprocess
import sys
import zipfile
from pathlib import Path

from domainshuttle.cluster.wheel import build_wheel


def test_pip_installs_it_and_it_answers(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert build_wheel(tmp_path).read_bytes() == wheel.read_bytes()
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, check=True, timeout=120)
    code = (
        "import domainshuttle.platform.config.loading as c, importlib.metadata as m; "
        "print(c.__file__, m.version('domainshuttle'), c.load_config('demo').name, c.load_cluster('h100-8').name)"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
    )  # fmt: skip
    place, version, *names = asked.stdout.split()
    assert Path(place).is_relative_to(site) and version in wheel.name and names == ["demo", "h100-8"]


def test_it_has_all_files_that_the_build_lists(tmp_path: Path) -> None:
    import tomllib

    root = Path(__file__).resolve().parents[2]
    tool = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = set(zipfile.ZipFile(build_wheel(tmp_path)).namelist())
    for package in tool["packages"]:
        folder = root.joinpath(*package.split(".")[1:])
        for pattern in ("*.py", *tool["package-data"].get(package, [])):
            for path in folder.glob(pattern) if package != "domainshuttle" else ():
                assert f"domainshuttle/{path.relative_to(root).as_posix()}" in names
