"""The rules of the rooms: what may import what, and who alone may import a library.

Run: python -m pytest tests/test_architecture.py
"""

import ast
import functools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "pipelines", "cluster", "platform", "configs")

MAY_IMPORT = {
    "model": ("model",),
    "pipelines": (
        "pipelines", "model.batch", "model.encoders", "model.domains", "model.file_mode", "model.splitmix64",
        "model.tensor_file", "model.pictures", "model.encoder_sources",
    ),
    "cluster": ("cluster", "pipelines.values"),
    "platform": ("platform", "model", "pipelines", "cluster", "configs"),
    "configs": (),
}  # fmt: skip
ORDER = {
    "platform": [
        {"report", "output"}, {"console"}, {"config"}, {"run"}, {"engine", "checkpoint", "tracking"},
        {"generation", "planning"}, {"evaluation"}, {"training"}, {"train"}, {"driver"}, {"cluster_checks"},
        {"commands"}, {"cli"},
    ],
    "pipelines": [
        {"errors"}, {"sample"}, {"values"}, {"buckets", "quarantine", "ray_tasks"}, {"storage"},
        {"shards", "endpoints"}, {"media"}, {"index"}, {"plan", "corpora"}, {"curation"}, {"encoding"}, {"loading"},
    ],
}  # fmt: skip
"""The sub-rooms of a room, each line after what it may import. Those of one line do not import each other."""

ONLY_IMPORTER = {
    "deepspeed": ("platform/engine/",),
    "mlflow": ("platform/tracking/mlflow.py",),
    "ray.train": ("platform/train.py", "platform/driver/", "platform/cluster_checks/"),
    "ray.data": (
        "pipelines/loading/ray_source.py", "pipelines/loading/loader.py", "pipelines/encoding/corpus.py",
        "pipelines/curation/", "platform/driver/",
    ),
}  # fmt: skip


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file names in an import, also inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        if name.startswith("domainshuttle."):
            inner = name.removeprefix("domainshuttle.")
            allowed = any(inner == one or inner.startswith(one + ".") for one in MAY_IMPORT[room])
            assert allowed or inner in ROOMS, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_one_way(room: str) -> None:
    """Each sub-room imports only itself and what stands before it in the order."""
    rank = {name: number for number, names in enumerate(ORDER[room]) for name in names}
    faults = []
    for path in sorted((ROOT / room).rglob("*.py")):
        inside = path.relative_to(ROOT / room)
        here = inside.parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        assert here in rank, f"{room}/{here} has no place in the order"
        for name in imports(path):
            if name.startswith(f"domainshuttle.{room}."):
                other = name.split(".")[2]
                if other != here and rank.get(other, 99) >= rank[here]:
                    faults.append(f"{room}/{inside} imports {name}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_a_library_is_imported_in_its_place_alone(library: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name == library or name.startswith(library + ".") for name in imports(path))
    }
    assert found
    others = {path for path in found if not path.startswith(ONLY_IMPORTER[library])}
    assert not others, f"{library} is imported by {others}"


def test_safetensors_writes_in_one_place_alone() -> None:
    """Its files have mode 0600, which is mended there."""
    writing = [path for path in sources() if "save_file" in path.read_text() and "safetensors" in path.read_text()]
    assert [str(path.relative_to(ROOT)) for path in writing] == ["model/file_mode.py"]


def test_model_knows_no_ray_and_spec_no_torch() -> None:
    for path in (ROOT / "model").rglob("*.py"):
        assert not any(name.split(".")[0] == "ray" for name in imports(path)), path
    assert "torch" not in {name.split(".")[0] for name in imports(ROOT / "model" / "spec.py")}


WITHOUT_TORCH = (
    "pipelines.loading.ray_source",
    "platform.config.loading",
    "platform.driver.driver",
    "platform.driver.schedule_loop",
    "platform.commands.plan",
    "platform.engine.trained_parameters",
)


@pytest.fixture(scope="module")
def brought() -> dict[str, list[str]]:
    """Of one process that imports these modules one after the other: the heavy libraries that came with each."""
    code = f"""
import importlib, json, sys
came = {{}}
for module in {WITHOUT_TORCH}:
    before = {{*sys.modules}}
    importlib.import_module(f"domainshuttle.{{module}}")
    came[module] = sorted({{"torch", "deepspeed", "mlflow"}} & {{*sys.modules}} - before)
print(json.dumps(came))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, list[str]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_controllers_and_what_checks_a_configuration_bring_no_torch(module: str, brought: dict[str, list[str]]) -> None:
    """It would cost each of Ray's processes seconds at every start of the workers, and the driver its first answer."""
    assert brought[module] == []


def test_the_driver_imports_ray_after_its_settings() -> None:
    """Ray reads what it shall not print when it is imported, and the cluster's connection sets that."""
    code = "import sys, domainshuttle.platform.cli, domainshuttle.platform.driver.driver; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "False"


def test_no_file_is_called_utils() -> None:
    assert not [path for path in sources() if path.stem in ("utils", "helpers", "misc")]


def test_the_standard_library_keeps_its_platform_module() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()
    for folder in (ROOT, ROOT / "tests"):
        code = "import platform, domainshuttle.platform.config.loading; print(platform.python_version())"
        run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert run.stdout.startswith("3.")


def test_every_package_is_listed() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in sources()} | {Path("configs")}
    assert listed == {"domainshuttle", *("domainshuttle." + ".".join(folder.parts) for folder in folders)}


@pytest.mark.slow
def test_the_wheel_works_where_the_sources_are_not(tmp_path: Path) -> None:
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, timeout=200)
    wheel = next(tmp_path.glob("domainshuttle-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"domainshuttle/configs/demo.yaml", "domainshuttle/configs/ablations/demo.yaml"} <= set(names)
    assert "domainshuttle/platform/train.py" in names
    assert not any(name.startswith("domainshuttle/tests") for name in names)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.meta_path = [f for f in sys.meta_path if 'editable' not in "
        "str(getattr(f, '__module__', f)).lower()]; import platform; platform.system(); "
        "import domainshuttle.platform.config.loading as c; print(c.__file__); print(c.load_config('demo').name)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "site") in run.stdout
    assert run.stdout.strip().endswith("demo")


def test_the_page_of_the_architecture_says_this_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room, order in ORDER.items():
        names = " < ".join(", ".join(sorted(level)) for level in order)
        written = re.search(rf"^- {room}: (.*)$", page, re.MULTILINE)
        assert written and written[1].replace(".py", "") == names


def test_the_page_of_the_architecture_explains_each_sub_room_and_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    explained = page.split("## What each sub-room holds")[1].split("## From a shard")[0]
    for room in ("pipelines", "platform"):
        folders = {path.name for path in (ROOT / room).iterdir() if (path / "__init__.py").exists()}
        assert {name for name in folders if f"`{name}/`" not in explained} == set()
    places = [ROOT, *(ROOT / room for room in ROOMS)]
    named = set(re.findall(r"[a-z_0-9/]+/[a-z_0-9]+\.py", page))
    assert named > {"model/pictures.py", "driver/schedule_loop.py"}
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()
