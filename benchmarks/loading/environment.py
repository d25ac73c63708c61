"""The peers' own virtual environment, made on first use.

They can't share the product's: mosaicml-streaming wants an older numpy, and torchvision, for which pip replaces torch.
Here torch and the decoders are held to the versions of the product's environment, and torchvision, of which nothing is
used, is a stub.
"""

import importlib.metadata
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("torch", "psutil", "safetensors", "simplejpeg")
"""What reads and measures in both environments, so that nobody wins by another version."""
STUB = {
    "pyproject.toml": '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
    '[project]\nname = "torchvision"\nversion = "0.28.0"\n[tool.setuptools]\n'
    'packages = ["torchvision", "torchvision.transforms"]\n',
    "torchvision/__init__.py": "",
    # the names that mosaicml-streaming imports, for vision classes that are not used here
    "torchvision/datasets.py": "class VisionDataset: ...\n",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "to_tensor = None\n",
}


def requirements() -> list[str]:
    """The `bench` extra of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"]["bench"])


def held() -> list[str]:
    """The shared libraries at this environment's versions (without a build's label, such as +cpu)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in SHARED]


def peers_python() -> Path:
    """The interpreter of the environment under build/peers; made where it is missing or made for other versions."""
    folder = ROOT / "build" / "peers"
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join([*requirements(), *held()])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the peers' environment in {folder} (some minutes)", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(held()))
    stub = folder / "torchvision-stub"
    for name, text in STUB.items():
        (stub / name).parent.mkdir(parents=True, exist_ok=True)
        (stub / name).write_text(text)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch alone and first: beside other packages pip may take another build of it
    for packages in (held()[:1], [str(stub), *held()], requirements()):
        subprocess.run([*pip, "--constraint", str(constraints), *packages], check=True)
    stamp.write_text(wanted)
    return python
