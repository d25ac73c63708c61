"""A run whose first stage is finished, without any training."""

from pathlib import Path

import pytest

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_origin import WeightsOrigin


@pytest.fixture
def run(tiny_yaml: Path, tmp_path: Path) -> Run:
    made = Run.open(load_config(str(tiny_yaml), [f"output={tmp_path / 'runs'}"]))
    stage1 = made.segment("stage1")
    build_model(made.config.model, WeightsOrigin(None, 3)).save_pretrained(stage1.weights)
    stage1.finish(4)
    return made
