"""What runs have saved of themselves is read by later versions, and is the same run.

Run: python -m pytest tests/platform/config/test_saved.py
"""

import json
from pathlib import Path

import pytest

from domainshuttle.platform.config.loading import read_config

SAVED = Path(__file__).parent / "saved"
"""`config.yaml` of runs of November 2026, with the digests that their checkpoints hold."""
DIGESTS = json.loads((SAVED / "digests.json").read_text())


@pytest.mark.parametrize("name", DIGESTS)
def test_an_earlier_run_has_its_digest(name: str, tmp_path: Path) -> None:
    config = read_config(SAVED / f"{name}.yaml")
    assert (config.digest(), len(config.decisive())) == (DIGESTS[name]["digest"], DIGESTS[name]["decisive"])
    again = tmp_path / "config.yaml"
    again.write_text(config.to_yaml())
    assert read_config(again) == config
    assert read_config(again).digest() == config.digest()
