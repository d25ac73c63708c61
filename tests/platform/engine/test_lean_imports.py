"""What workers import, and what they leave out. Run: python -m pytest tests/platform/engine/test_lean_imports.py"""

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest

from domainshuttle.platform.engine.lean_imports import without


def test_packages_look_absent_while_it_lasts_and_loaded_ones_stay() -> None:
    sys.modules.pop("wave", None)
    with without("wave", "json"):
        assert importlib.util.find_spec("wave") is None
        with pytest.raises(ImportError):
            importlib.import_module("wave")
        assert importlib.import_module("json") is json
    assert "wave" not in sys.modules
    assert importlib.import_module("wave") is sys.modules["wave"]


def test_they_are_there_again_after_an_error() -> None:
    sys.modules.pop("wave", None)
    with pytest.raises(ValueError, match="broken"), without("wave"):
        raise ValueError("broken")
    assert importlib.util.find_spec("wave") is not None


@pytest.mark.nightly
def test_workers_load_neither_scipy_nor_mlflow_and_schedulers_work() -> None:
    """As `platform/driver/worker_group.py` imports, and then samples as rank 0 may have to."""
    code = """
import json, sys
from domainshuttle.platform.engine.lean_imports import without
with without("scipy"):
    import domainshuttle.platform.train
from domainshuttle.platform.engine import zero3
zero3.import_deepspeed()
came = sorted({"scipy", "mlflow", "torch", "deepspeed", "diffusers"} & {*sys.modules})
import domainshuttle.platform.generation.training_samples
from domainshuttle.model.sampling import make_scheduler
import scipy.optimize, mlflow
print(json.dumps(came))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == ["deepspeed", "diffusers", "torch"]
