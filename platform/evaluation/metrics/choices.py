"""The choices of the metrics. What the paper leaves open is a field, whose value the report prints.

Without torch, so that a configuration is checked at once.
"""

from typing import Literal

from pydantic import Field

from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.values import Count, Gpus, Real, Section, Share, Whole


class MetricConfig(Section):
    """The choices of a metric."""

    cases: Literal["all", "in_domain", "cross_domain"] = Field("all", description="those that it is measured on")


class FrameChoices(MetricConfig):
    """Of metrics that look at single frames."""

    frames: Count = 16
    """How many, evenly over the video."""


class AestheticChoices(MetricConfig):
    """Of AES."""

    frames: Count = Field(32, description="evenly over the video; not stated by the paper, 32 in OpenS2V-Eval")
    low: Real = Field(4.0, description="raw score that counts 0")
    high: Real = Field(7.0, description="raw score that counts 1")
    backend: Literal["pil"] = "pil"
    dtype: Literal["float32"] = "float32"


class SubjectChoices(MetricConfig):
    """How subjects are found and compared."""

    cases: Literal["all", "in_domain", "cross_domain"] = "in_domain"
    frames: Count = Field(16, description="evenly over the video; of the paper")
    least_box: Share = Field(0.4, description="confidence of Grounding DINO below which nothing was found")
    least_mask: Share = Field(0.9, description="SAM 2's own guess of its mask's overlap, below which nothing was found")
    most_overlap: Share = Field(0.7, description="of two boxes of a word, above which they are one")
    candidates: Literal["surest", "all"] = Field(
        "surest", description="surest: as many boxes of a word as it has subjects; all: the best of all boxes"
    )
    background_fill: Literal["white", "keep"] = Field("white", description="what is around a subject in its box")
    reference: Literal["cut_out", "whole"] = Field(
        "cut_out", description="whether a subject is cut out of its reference too, where its word is found there"
    )
    references: Literal["mean", "max"] = Field("mean", description="over the references of one subject")
    not_found: Literal["zero", "left_out"] = Field(
        "zero", description="a frame without the subject: a 0, or left out (then flicker is not punished)"
    )
    backgrounds: Literal["whole_frame", "left_out"] = "whole_frame"
    backend: Literal["pil"] = "pil"
    dtype: Literal["float32"] = "float32"


class JudgeChoices(MetricConfig):
    """Of a judge: which endpoint, what it is asked, and how often."""

    cases: Literal["all", "in_domain", "cross_domain"] = "cross_domain"
    endpoint: EndpointConfig = Field(description="pin a dated model; logprobs: true where the endpoint gives them")
    questions: list[Literal["cross_domain", "domain_reached", "subject_kept"]] = Field(
        ["cross_domain", "domain_reached", "subject_kept"],
        min_length=1,
        description="cross_domain: the paper's rubric; the others tell apart the two failures that its 1 mixes",
    )
    frames: Count = Field(16, description="evenly over the video, one a call")
    repeats: Count = Field(1, description="answers of each question: hosted models differ from call to call")
    normalise: Literal["from_0", "fifth"] = Field(
        "from_0", description="from_0: (x - 1) / 4; fifth: x / 5; the paper does not say which"
    )
    most_side: Count = Field(1024, description="pixels of a picture's longer side; larger ones are made smaller")
    most_failed: Share = Field(0.05, description="share of refusals and unparsable answers above which it is void")


class TextMatchChoices(MetricConfig):
    """Of GMEScore."""

    frames: Count = Field(32, description="evenly over the video; not stated by the paper, 32 in OpenS2V-Eval")
    instruction: str = Field("Find an image that matches the given text.", description="system text of the prompt")
    system: str = Field("You are a helpful assistant.", description="system text of frames")
    least_tokens: Count = 256
    most_tokens: Count = Field(1280, description="of a frame, which is made larger or smaller for it")
    most_length: Count = Field(1800, description="tokens of a text")
    positions: Literal["sequential", "two_dimensional"] = Field(
        "sequential", description="of a picture's tokens: counted on, as GME's own code does, or as Qwen2-VL does"
    )
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    backend: Literal["pil"] = "pil"
    at_once: Count = Field(4, description="frames at a time")


class SmoothnessChoices(MetricConfig):
    """Of MS."""

    window: Count = Field(3, description="frames that are rated together")
    threshold: Real = Field(0.025, gt=0, le=1, description="difference of neighbours above which both are artefacts")
    runs_model_code: bool = Field(False, description="allow the Python files of models.one_align, in its environment")
    gpus: Gpus = Field(1.0, description="of its actor")
    at_once: Count = Field(16, description="windows at a time")


class EditorChoices(Section):
    """Who carries references to the wanted domain, and how."""

    endpoint: EndpointConfig | None = Field(
        None, description="whose chat answers with a picture; none: models.image_editor, in process"
    )
    revision: str = Field("", description="of a hosted editor, as it is to be printed")
    seed: Whole = Field(0, ge=0, le=1 << 31)
    template: str = Field(
        "Turn the {subject} into the {domain} domain. Keep its identity, shape, colours and pose.",
        description="where a case has no edit prompt of its own; the paper does not show its prompts",
    )
    steps: Count = Field(50, description="in process")
    guidance: Real = Field(4.0, ge=0, le=100, description="true_cfg_scale, in process")
    side: Count | None = Field(None, description="of the edit, a square, in process; none: about 1024 x 1024")
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class DomainSimilarityChoices(MetricConfig):
    """Of NANO-CLIP and Qwen-CLIP."""

    cases: Literal["all", "in_domain", "cross_domain"] = "cross_domain"
    editor: EditorChoices = EditorChoices()
    frames: Count = Field(16, description="evenly over the video; of the paper")
    fit: Literal["crop", "pad"] = Field("crop", description="of pictures to CLIP's square: its own way, or on white")
    references: Literal["mean", "max"] = "mean"
    backend: Literal["pil"] = "pil"
    dtype: Literal["float32"] = "float32"


class PairChoices(Section):
    """Of pairs: a judge is shown two models' frames in both orders."""

    cases: Literal["all", "in_domain", "cross_domain"] = "cross_domain"
    endpoint: EndpointConfig
    frames: Count = Field(4, description="evenly over the video, of both at the same places")
    repeats: Count = Field(1, description="answers of each question")
    most_side: Count = Field(1024, description="pixels of a picture's longer side; larger ones are made smaller")
