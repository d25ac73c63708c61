"""Runs whose workers share the tokens of their samples, by the commands of a user.

Run: python -m pytest -m nightly tests/platform/driver/test_shared_tokens.py
"""

from pathlib import Path

import pytest
import yaml
from running import balanced, cli, losses, run_of, same_weights, start, wait_for_step, workers_of

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.run.sample_audit import audit_samples

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
SHARED = ("engine.sequence_parallel=2", "engine.precision=float32")


def test_a_run_of_shared_tokens_is_that_of_one_worker_and_resumes_with_the_same_bits(tiny: Path) -> None:
    alone, _, of_one = run_of(tiny, "alone", "cluster.workers=1", "engine.precision=float32")
    unbroken, _, of_two = run_of(tiny, "shared", *SHARED)
    cli("train", tiny, *of_one)
    cli("train", tiny, *of_two)
    for config in (alone, unbroken):
        balanced(config)
        assert audit_samples(config).planned == (4 + 24) * 8
    for (step, one), (_, two) in zip(losses(alone, "stage2"), losses(unbroken, "stage2"), strict=True):
        assert abs(two / one - 1) < 1e-3, step
    killed, run, arguments = run_of(tiny, "killed", *SHARED)
    driver = start(tiny, *arguments)
    wait_for_step(driver, run, "stage2", 10)
    workers_of(driver)[1].kill()
    assert driver.wait(timeout=300) == 0
    balanced(killed)
    same_weights(killed, unbroken)


def test_clips_of_720p_are_planned_and_trained_at_a_tiny_width(tiny: Path, tmp_path: Path) -> None:
    """3,600 tokens a frame, over two workers."""
    content = yaml.safe_load(tiny.read_text())
    build = {"builder": "sprites", "kind": "video", "samples": 4, "identities": 8, "side": 256, "frames": 5}
    content["corpora"] = {"clips": {"build": build, "buckets": ["5x720x1280"]}}
    stage = {"name": "a", "mixture": {"clips": 1}, "steps": 2, "global_batch": 1, "micro_batch": 1, "references": 1}
    content["stages"] = [stage | {"learning_rate": 1e-3, "trained": ["*"], "loss": {"cross_pair_weight": 0.1}}]
    content |= {"data": f"{tmp_path}/data", "output": f"{tmp_path}/runs", "engine": {"sequence_parallel": 2}}
    content["engine"]["precision"] = "float32"
    del content["evaluation"]
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(content))
    for verb in ("build", "encode"):
        cli("data", verb, path)
    assert "5x720x1280" in cli("plan", path)
    cli("train", path)
    config = load_config(str(path))
    balanced(config)
    assert [step for step, _ in losses(config, "a")] == [1, 2]
