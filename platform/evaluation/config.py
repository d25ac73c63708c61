"""The configuration of an evaluation: its cases, how clips are generated, and what is measured.

Whatever the paper leaves open is a field here, and its value is in the report.
"""

from typing import Annotated, Literal

from pydantic import Field

from domainshuttle.pipelines.values import ActorPool, Count, Fps, Gpus, Real, Section, Share, Text, Whole
from domainshuttle.platform.config.loading import load_shipped
from domainshuttle.platform.evaluation.metrics.choices import PairChoices
from domainshuttle.platform.evaluation.metrics.config import MetricsConfig
from domainshuttle.platform.evaluation.sources import Source

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Control = Literal["other", "none"]
"""Clips of the same cases and noise with the references of another case, or with none: what a metric of subjects must
tell from those with their own."""


class GenerationSettings(Section):
    """How clips are made. What is left out is as the model's folder says (generation.json), else as Wan's own."""

    height: Count | None = None
    width: Count | None = None
    frames: Count | None = None
    steps: Count | None = None
    guidance_high: Annotated[Real, Field(ge=0, le=1e4)] | None = Field(
        None, description="guidance of the expert for high noise, or of the only network"
    )
    guidance_low: Annotated[Real, Field(ge=0, le=1e4)] | None = Field(
        None, description="guidance of the expert for low noise; none: as guidance_high"
    )
    reference_guidance: Annotated[Real, Field(ge=0, le=1e4)] | None = None
    negative_prompt: str = Field("", description="what to move away from; wan: the negative prompt of Wan")
    fps: Fps | None = Field(None, description="rate at which the MP4 is written")
    crf: Whole = Field(16, ge=0, le=51, description="of H.264; metrics see the decoded file")
    batch: Count = Field(1, description="cases that are generated together; latency is measured with 1")
    pool: ActorPool | None = Field(None, description="Ray actors, one pipeline each; none: in this process")


class ScoringPool(ActorPool):
    """The actors that measure, and what each reserves."""

    gpus: Gpus | None = Field(  # type: ignore[assignment]
        None, description="of an actor; none: as the models of its metrics need, where the cluster has GPUs"
    )


class StatisticsSettings(Section):
    """How sure a figure is."""

    confidence: Share = Field(0.95, gt=0, lt=1)
    resamples: Count = Field(9999, description="of the bootstrap, and of sign-flip tests beyond exact ones")
    most_missing: Share = Field(
        0.02, description="share of cases without a value above which worst-case bounds are said"
    )
    seed: Whole = Field(0, ge=0, le=1 << 53)


class IdentitySettings(Section):
    """The retrieval test: is a clip closest to its own reference? It needs the control `other`."""

    candidates: Annotated[Whole, Field(ge=2, le=100_000)] = Field(16, description="references of a group")


class SensitivitySettings(Section):
    """How metrics are tested: does each do what it says when a case is altered?"""

    cases: Whole = Field(12, ge=0, le=10_000, description="how many cases; 0: no tests")
    column: str = Field("", description="whose videos; none: the real clips, else those of the first model")
    least_cases: Count = Field(5, description="below which a test is undecided")
    level: Share = Field(0.05, description="of the one-sided sign test over cases, of `falls` and `ceiling`")
    tolerance: Real = Field(0.02, ge=0, description="how far a mean may move that is to stay the `same`")
    halves_within: Share = Field(0.15, description="how far from a half a mean may be that `halves`")
    blur: Share = Field(0.02, description="radius of the Gaussian, as a share of the shorter side")
    noise: Real = Field(25.0, gt=0, le=255, description="standard deviation, in levels of 255")
    crf: Whole = Field(30, ge=0, le=51, description="of the second H.264 coding")


class EvaluationConfig(Section):
    """An evaluation."""

    name: Name
    seed: Whole = Field(0, ge=0, le=1 << 53)
    repeats: Annotated[Whole, Field(ge=1, le=100)] = Field(1, description="clips a case, each from noise of its own")
    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    generation: GenerationSettings = GenerationSettings()
    controls: list[Control] = Field(
        default_factory=list, description="further clips of each model, to test the metrics"
    )
    metrics: MetricsConfig = Field(description="name to its choices; {}: the defaults")
    identity: IdentitySettings | None = None
    statistics: StatisticsSettings = StatisticsSettings()
    sensitivity: SensitivitySettings = SensitivitySettings()
    pairs: PairChoices | None = Field(None, description="a judge that compares each two models, in both orders")
    scoring: ScoringPool | None = Field(None, description="Ray actors that measure; none: in this process")
    notes: list[Text] = Field(default_factory=list, description="what a reader of the report must know")


def load_evaluation(source: str, overrides: list[str] | None = None) -> EvaluationConfig:
    """Reads a YAML file, or by its name one that ships with the package; raises ConfigError with every fault."""
    return load_shipped(EvaluationConfig, source, "evaluation", "evaluation", overrides)
