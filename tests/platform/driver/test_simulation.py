"""The whole driver with simulated ranks, clock and failures: a short one of benchmarks/simulation.py.

Run: python -m pytest tests/platform/driver/test_simulation.py
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulation", ROOT / "benchmarks" / "simulation.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["simulation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_lost_or_repeated_and_the_goodput_is_as_predicted(simulation: ModuleType, tmp_path: Path) -> None:
    """Dozens of failures of 64 ranks, also within starts and while checkpoints are written."""
    found = simulation.simulate(tmp_path / "run", 64, steps=500, every=20, hours=0.02, experts=1)
    assert found.audit is not None and found.whole
    assert found.audit.planned == found.audit.trained == 500 * 64
    assert found.audit.recomputed > 0 and found.failures > 5 and found.starts > found.failures
    # each failure's losses vary as much as they are: their mean by the root of their number
    spread = 3 * (1 - found.predicted) / found.failures**0.5
    assert found.goodput == pytest.approx(found.predicted, abs=spread)
