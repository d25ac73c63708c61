"""Which metrics an evaluation has, and their choices."""

from typing import Annotated, Any

from pydantic import Field

from domainshuttle.pipelines.values import Section
from domainshuttle.platform.evaluation.metrics.choices import (
    AestheticChoices,
    DomainSimilarityChoices,
    FrameChoices,
    JudgeChoices,
    MetricConfig,
    SmoothnessChoices,
    SubjectChoices,
    TextMatchChoices,
)
from domainshuttle.platform.evaluation.metrics.metric import Metric, Models
from domainshuttle.platform.evaluation.metrics.weights import MetricModels

VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")]


class MetricsConfig(Section):
    """The metrics that are measured: those that are named, with their choices; `{}` takes all defaults."""

    models: MetricModels = MetricModels()
    aes: AestheticChoices | None = Field(None, description="aesthetic predictor of LAION on CLIP")
    ms: SmoothnessChoices | None = Field(None, description="motion smoothness by one-align, isolated")
    gme: TextMatchChoices | None = Field(None, description="cosine of prompt and frames by GME")
    nano_clip: DomainSimilarityChoices | None = Field(
        None, description="CLIP similarity to edited references; the paper's editor is Nano Banana Pro"
    )
    qwen_clip: DomainSimilarityChoices | None = Field(
        None, description="CLIP similarity to edited references; the paper's editor is Qwen-Image-Edit"
    )
    cd_score: JudgeChoices | None = Field(None, description="grades of a judge; the paper's is GPT-5.2")
    qwen_score: JudgeChoices | None = Field(None, description="grades of a judge; the paper's is Qwen3-VL-8B-Instruct")
    dino_i: SubjectChoices | None = Field(None, description="DINOv2 similarity of cut-out subjects")
    clip_i: SubjectChoices | None = Field(None, description="CLIP similarity of cut-out subjects")
    hue_identity: FrameChoices | None = Field(None, description="hue histograms of video and reference; no model")
    motion: MetricConfig | None = Field(None, description="motion amplitude: optical flow, to stand beside smoothness")
    steadiness: MetricConfig | None = Field(None, description="1 - mean difference of neighbouring frames; no model")
    sharpness: FrameChoices | None = Field(None, description="detail that a 3x3 mean takes away; no model")
    variants: "dict[VariantName, MetricsConfig]" = Field(
        default_factory=dict,
        description="the same metrics with other choices, such as another CLIP, beside them: does the winner change?",
    )

    def build(self, models: Models | None = None) -> list[Metric[Any]]:
        """The metrics, in the order above, then the variants. Loads nothing."""
        models, built = models or Models(), list[Metric[Any]]()
        for name, kind in _kinds().items():
            if (choices := getattr(self, name)) is not None:
                built += kind.every(choices, models, self.models)
        for name, variant in self.variants.items():
            of_it = variant.model_copy(update={"models": variant.models.over(self.models)}).build(models)
            for metric in of_it:
                metric.variant = ".".join(part for part in (name, metric.variant) if part)
            built += of_it
        return built


def _kinds() -> dict[str, type[Metric[Any]]]:
    """The kinds of metrics by the names of MetricsConfig."""
    from domainshuttle.platform.evaluation.judges.judge import CDScore, QwenScore
    from domainshuttle.platform.evaluation.metrics.aesthetics import Aesthetics
    from domainshuttle.platform.evaluation.metrics.domain_similarity import NanoSimilarity, QwenSimilarity
    from domainshuttle.platform.evaluation.metrics.gme import TextMatch
    from domainshuttle.platform.evaluation.metrics.motion import MotionAmplitude, Smoothness
    from domainshuttle.platform.evaluation.metrics.pixels import HueIdentity, Sharpness, Steadiness
    from domainshuttle.platform.evaluation.metrics.subject_similarity import ClipSimilarity, DinoSimilarity

    kinds: tuple[type[Metric[Any]], ...] = (
        Aesthetics, Smoothness, TextMatch, NanoSimilarity, QwenSimilarity, CDScore, QwenScore, DinoSimilarity,
        ClipSimilarity, MotionAmplitude, HueIdentity, Steadiness, Sharpness,
    )  # fmt: skip
    return {kind.name: kind for kind in kinds}


DESK = MetricsConfig(hue_identity=FrameChoices(), steadiness=MetricConfig(), sharpness=FrameChoices())
"""The desk-size set: no download, seconds for a test set."""
