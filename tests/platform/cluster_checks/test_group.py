"""What is said of a trial group that did not end well: python -m pytest tests/platform/cluster_checks/test_group.py"""

from pathlib import Path

import pytest
from ray.train import WorkerGroupError

from domainshuttle.platform.cluster_checks import group
from domainshuttle.platform.cluster_checks.findings import Verdict
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.run.workers import DeviceMemoryError


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        (ConfigError("engine.attention_backend='x' takes no mask"), "engine.attention_backend='x' takes no mask", ""),
        (DeviceMemoryError("worker 1 ran out of memory of its GPU"), "worker 1 ran out of memory", "raise recomputat"),
        (RuntimeError("NCCL error:\nunhandled system error"), "worker 0 failed: RuntimeError: unhandled", "NCCL_DEBUG"),
    ],
)
def test_what_ended_the_trial_group_is_said_as_of_a_training(
    tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, remedy: str
) -> None:
    def run(*_: object) -> None:
        raise WorkerGroupError("Training failed due to worker errors:\n[Rank 0]\nTraceback ...", {0: error})

    monkeypatch.setattr(group, "_run", run)
    (finding,) = group.check_group(load_config(str(tiny_yaml)), None, str, 60.0)
    assert finding.verdict is Verdict.FAIL and finding.what.startswith(said)
    assert remedy in finding.remedy and bool(remedy) == bool(finding.remedy)
