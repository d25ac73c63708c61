"""Which metrics share a worker, and what the workers of a stage reserve.

Run: pytest tests/platform/evaluation/test_stages.py
"""

from collections.abc import Iterator
from importlib import resources

import pytest
import ray

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.values import ActorPool
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.evaluation.config import ScoringPool, load_evaluation
from domainshuttle.platform.evaluation.metrics.config import MetricsConfig
from domainshuttle.platform.evaluation.stages import Stage, require_fits, say_terms, stages_of

ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "m"}
METRICS = MetricsConfig.model_validate(
    {
        "models": {"one_align": __file__},
        "steadiness": {}, "sharpness": {}, "motion": {}, "ms": {"runs_model_code": True, "gpus": 0.5},
        "cd_score": {"endpoint": ENDPOINT, "questions": ["cross_domain", "subject_kept"]},
    }
)  # fmt: skip


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """Nodes of a cluster that is not there."""
    found: list[dict[str, float]] = [{"CPU": 4.0}, {"CPU": 8.0}]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in found])
    yield found


def named(stage: Stage) -> set[str]:
    digests = {metric.digest: metric.label for metric in METRICS.build()}
    return {digests[one] for one in stage.metrics}


def test_an_endpoint_has_one_actor_and_an_environment_its_own_stage(nodes: list[dict[str, float]]) -> None:
    metrics = METRICS.build()
    (whole,) = stages_of(metrics, None)
    assert whole.pool is None and named(whole) == {metric.label for metric in metrics}
    found = {frozenset(named(stage)): stage.pool for stage in stages_of(metrics, ScoringPool(actors=3, cpus=2))}
    assert found == {
        frozenset({"steadiness", "sharpness", "motion"}): ActorPool(actors=3, cpus=2, gpus=0),
        frozenset({"cd_score", "cd_score.subject_kept"}): ActorPool(actors=1, cpus=2, gpus=0),
        frozenset({"ms"}): ActorPool(actors=3, cpus=0, gpus=0),  # its model's actor reserves for itself
    }
    assert stages_of([], None) == []


@pytest.mark.parametrize(
    ("of", "gpus", "asked", "reserved"),
    [
        (("aes",), 0, None, 0), (("aes",), 4, None, 0.1), (("aes", "dino_i"), 4, None, 0.35),
        (("aes", "dino_i", "clip_i", "gme"), 4, None, 1), (("aes",), 4, 1, 1), (("gme",), 4, 0, 0),
        (("steadiness",), 4, None, 0),
    ],
)  # fmt: skip
def test_gpus_are_what_the_models_need_where_there_are_any(
    nodes: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch, of: tuple[str, ...], gpus: float,
    asked: float | None, reserved: float,
) -> None:  # fmt: skip
    nodes[0]["GPU"] = gpus
    monkeypatch.setattr("domainshuttle.platform.evaluation.metrics.metric.weights_digest", lambda *_: "w")
    metrics = MetricsConfig.model_validate({name: {} for name in of}).build()
    (stage,) = stages_of(metrics, ScoringPool(gpus=asked))
    assert stage.pool == ActorPool(gpus=reserved)


def test_an_actor_that_no_node_can_hold_is_refused_at_once(nodes: list[dict[str, float]]) -> None:
    metrics = MetricsConfig.model_validate({"steadiness": {}}).build()
    with pytest.raises(ConfigError, match=r"scoring\.gpus=1: .*has 0 GPUs: ask for 0 or less"):
        stages_of(metrics, ScoringPool(gpus=1))
    with pytest.raises(ConfigError, match=r"generation\.pool\.cpus=9: .*has 8 CPUs: ask for 8 or less"):
        require_fits(ActorPool(cpus=9), "generation.pool", {"CPU": 8.0})
    require_fits(ActorPool(cpus=8), "generation.pool", {"CPU": 8.0})


def test_terms_are_said_once_a_metric_before_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    say_terms([*METRICS.build(), *METRICS.build()])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("ms was asked for") == 1 and "LLaMA 2 Community License" in said and "cd_score" not in said
    with pytest.raises(DataError, match=r"LLaMA 2 Community License.*ms\.runs_model_code: true"):
        MetricsConfig.model_validate({"ms": {}}).build()[0].check()  # opt-in
    shipped = resources.files("domainshuttle.configs") / "evaluation"
    assert all(load_evaluation(name.name.removesuffix(".yaml")).metrics.ms is None for name in shipped.iterdir()
               if name.name.endswith(".yaml"))  # fmt: skip
