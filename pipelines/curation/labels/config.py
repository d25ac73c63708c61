"""What decides the labels of a corpus: who labels, what, and how much of a failure is accepted."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.values import ActorPool, Section, Share, Text, Whole

LabelName = Literal["caption", "words", "domains"]


def _folder(value: str) -> str:
    # workers run in folders of their own
    return str(Path(value).expanduser().absolute())


class LabelConfig(Section):
    """How `domainshuttle data label` labels raw samples (docs/datasets.md, "Labels")."""

    labeller: Literal["words", "endpoint", "transformers"] = Field(
        "words", description="word lists; an OpenAI-compatible endpoint; a model of transformers on the cluster's GPUs"
    )
    endpoint: EndpointConfig | None = Field(None, description="with labeller: endpoint")
    model: Annotated[Text, AfterValidator(_folder)] | None = Field(
        None, description="with labeller: transformers: the folder of an image-text-to-text model, on all nodes"
    )
    actors: ActorPool = Field(ActorPool(), description="with labeller: transformers: those that hold the model")
    readers: ActorPool = Field(
        ActorPool(actors=16, cpus=0.5), description="those that read and decode samples: at most so many, as they fit"
    )
    values: Annotated[list[LabelName], Field(min_length=1)] = Field(
        ["caption", "words", "domains"], description="what is labelled"
    )
    which: Literal["missing", "all"] = Field(
        "missing",
        description="missing: empty captions and edit commands, subjects without a word, domains that no source gave",
    )
    frames: Whole = Field(4, ge=1, le=32, description="frames of a clip that a model is shown")
    side: Whole = Field(512, ge=64, le=4096, description="pixels of the longer side of what a model is shown")
    least_score: Whole = Field(3, ge=1, le=5, description="of a model's own certainty, 1 to 5, below which none counts")
    answer_tokens: Whole = Field(768, ge=16, le=1 << 15, description="with labeller: transformers: of an answer, most")
    most_failed: Share = Field(0.2, description="share of refusals and bad answers, of 50 or more, above which it ends")
    answers: Annotated[Text, AfterValidator(_folder)] | None = Field(
        None, description="folder of what models answered, kept for good; none: labels/answers in the corpus's folder"
    )

    @model_validator(mode="after")
    def _labeller_is_there(self) -> Self:
        if self.labeller == "endpoint" and self.endpoint is None:
            raise ValueError(
                "labeller: endpoint needs `endpoint`: --set labels.endpoint.url=http://gpu-node:8000/v1 "
                "--set labels.endpoint.model=NAME"
            )
        if self.labeller == "transformers" and self.model is None:
            raise ValueError("labeller: transformers needs `model`: --set labels.model=FOLDER")
        return self
