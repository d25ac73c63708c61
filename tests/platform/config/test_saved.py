"""What runs have saved of themselves is read by later versions, and is the same run.

Run: python -m pytest tests/platform/config/test_saved.py
"""

import json
from pathlib import Path

import pytest

from domainshuttle.platform.config.loading import load_config, read_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig

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


HOURS = ["stages.stage1.steps=null", "stages.stage1.gpu_hours=2", "stages.stage1.final_learning_rate=null"]


def again(config: RunConfig, folder: Path) -> RunConfig:
    """What is read of the file that a run saves, by the run and by a person who trains with it."""
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    read = read_config(path)
    assert load_config(str(path)) == read
    return read


def test_a_stage_that_only_its_hours_end_is_no_number_of_steps(tmp_path: Path) -> None:
    """A million steps that are typed are a million steps; a million that an earlier version saved were none."""
    earlier = read_config(SAVED / "demo-hours.yaml")
    assert [(s.duration.steps, s.duration.hours) for s in earlier.stages] == [(None, 2.5), (16, None), (120, 3.0)]
    endless = load_config("demo", HOURS)
    assert endless.stages[1].duration.steps is None
    million = load_config("demo", [*HOURS, "stages.stage1.steps=1000000", "stages.stage1.final_learning_rate=1e-4"])
    assert million.stages[1].duration.steps == 1_000_000
    alone = load_config("demo", ["stages.stage1.steps=1000000"])
    assert alone.stages[1].duration.steps == 1_000_000
    samples = load_config("demo", ["stages.stage1.steps=null", "stages.stage1.samples=6401"])
    for config in (earlier, endless, million, alone, samples):
        assert again(config, tmp_path) == config
        # as the workers are told
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config
        assert all(value > 0 for key, value in config.decisive().items() if key.endswith(".steps"))
    assert "samples: null" not in earlier.to_yaml() and "steps: 1000000" not in earlier.to_yaml()
    assert earlier.digest() == DIGESTS["demo-hours"]["digest"]


def test_how_long_a_stage_lasts_must_be_said() -> None:
    with pytest.raises(ConfigError, match="steps: missing: say how long it is trained"):
        load_config("demo", ["stages.stage1.steps=null"])
    with pytest.raises(ConfigError, match="final_learning_rate needs an end"):
        load_config("demo", HOURS[:2])
