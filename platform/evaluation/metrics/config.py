"""Which metrics an evaluation has, and their choices."""

from typing import Any

from pydantic import Field

from domainshuttle.pipelines.values import Section
from domainshuttle.platform.evaluation.metrics.metric import Metric, MetricConfig, Models
from domainshuttle.platform.evaluation.metrics.pixels import FramesConfig, HueIdentity, Sharpness, Steadiness


class MetricsConfig(Section):
    """The metrics that are measured: those that are named, with their choices; `{}` takes all defaults."""

    hue_identity: FramesConfig | None = Field(None, description="hue histograms of video and reference; no model")
    steadiness: MetricConfig | None = Field(None, description="1 - mean difference of neighbouring frames; no model")
    sharpness: FramesConfig | None = Field(None, description="detail that a 3x3 mean takes away; no model")

    def build(self, models: Models | None = None) -> list[Metric[Any]]:
        """The metrics, in the order above. Loads nothing."""
        models = models or Models()
        kinds: list[tuple[type[Metric[Any]], MetricConfig | None]] = [
            (HueIdentity, self.hue_identity),
            (Steadiness, self.steadiness),
            (Sharpness, self.sharpness),
        ]
        return [kind(choices, models) for kind, choices in kinds if choices is not None]


DESK = MetricsConfig(hue_identity=FramesConfig(), steadiness=MetricConfig(), sharpness=FramesConfig())
"""The desk-size set: no download, seconds for a test set."""
