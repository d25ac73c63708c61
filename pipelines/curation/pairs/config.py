"""What cross pairs are made with: models, how they are looked for, and what a pair must be like."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from domainshuttle.pipelines.curation.model_folders import ModelRole, check_model_folder
from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.storage.uri import absolute, is_remote
from domainshuttle.pipelines.values import ActorPool, Count, Cpus, Gpus, Real, Section, Share, Text, Whole


def _folder(value: str) -> str:
    if is_remote(value):
        raise ValueError("models are read from a local or shared folder: download them first")
    return str(absolute(value))  # workers run in folders of their own


ROLES: tuple[ModelRole, ...] = ("detector", "segmenter", "dino", "clip")
ModelFolder = Annotated[Text, AfterValidator(_folder)]


class PairModels(Section):
    """Folders of models that were downloaded; all nodes see them."""

    detector: ModelFolder = Field(description="Grounding DINO, such as IDEA-Research/grounding-dino-tiny")
    segmenter: ModelFolder = Field(description="SAM 2, such as facebook/sam2.1-hiera-large")
    dino: ModelFolder = Field(description="DINOv2, such as facebook/dinov2-base")
    clip: ModelFolder = Field(description="CLIP, such as openai/clip-vit-base-patch32")

    def check(self) -> None:
        """Raises DataError for the first folder that is missing, or is not that of a whole model."""
        for role in ROLES:
            check_model_folder(getattr(self, role), role)


class PairPool(Section):
    """Actors of a step of cross pairs."""

    actors: Count = 1
    cpus: Cpus = Field(0.5, description="CPUs of an actor")
    gpus: Gpus | None = Field(None, description="share of a GPU; none: a quarter where the cluster has any, else 0")


def _pattern(value: str) -> str:
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    if pattern.groups != 1:
        raise ValueError(f"should have one group, which is the video's name, such as '(.+)_clip', not {pattern.groups}")
    return value


class PairConfig(Section):
    """How reference pictures are cut out of frames, and which of them make a pair."""

    models: PairModels
    references: Literal["keep", "anew"] = Field(
        "keep", description="keep: those that samples have stay, and pairs are added; anew: all are cut out of frames"
    )
    frames: Whole = Field(4, ge=1, le=64, description="of a clip, evenly spread, in which subjects are looked for")
    other_clips: Whole = Field(4, ge=0, le=64, description="other clips of its video that are looked into; 0: none")
    video: Annotated[Text, AfterValidator(_pattern)] | None = Field(
        None, description="of keys, where samples do not name their video: its one group is the video's name"
    )
    words: list[Text] = Field(default_factory=list, description="looked for in samples that have no subjects")
    pictures: Whole = Field(3, ge=1, le=16, description="most pictures of a subject")
    least_pictures: Whole = Field(1, ge=1, le=16, description="subjects with fewer are left out")
    least_detection: Share = Field(0.35, description="confidence of a box")
    most_found: Whole = Field(6, ge=1, le=64, description="boxes of a word in a frame, the surest")
    same_overlap: Share = Field(0.8, description="intersection over union above which two boxes or masks are one thing")
    least_mask: Share = Field(0.8, description="the segmenter's own guess of its mask's quality")
    least_area: Share = Field(0.01, description="of a frame, that a subject covers")
    most_area: Share = Field(0.9, description="of a frame, that a subject covers")
    least_side: Whole = Field(64, ge=1, le=4096, description="pixels of a picture's shorter side")
    least_dino: Share = Field(0.45, description="similarity by DINOv2, below which it is another subject")
    most_dino: Share = Field(0.97, description="similarity by DINOv2, above which it is a near-duplicate")
    least_clip: Share = Field(0.7, description="similarity by CLIP, below which it is another kind of thing")
    quality: EndpointConfig | None = Field(None, description="a multimodal model that looks at each pair; none: no one")
    least_quality: Real = Field(3.0, ge=0, le=4, description="of a pair, by `quality`, of 0 to 4")
    decode: PairPool = Field(default_factory=lambda: PairPool(actors=2, cpus=1.0, gpus=0.0))
    find: PairPool = Field(default_factory=PairPool, description="boxes and masks")
    embed: PairPool = Field(default_factory=PairPool, description="similarities")
    choose: PairPool = Field(
        default_factory=lambda: PairPool(actors=2, cpus=1.0, gpus=0.0), description="pairs, and what is written"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "PairConfig":
        for name in ("area", "dino"):
            least, most = getattr(self, f"least_{name}"), getattr(self, f"most_{name}")
            if least >= most:
                raise ValueError(f"least_{name}={least} must lie below most_{name}={most}")
        if self.least_pictures > self.pictures:
            raise ValueError(f"least_pictures={self.least_pictures} is more than pictures={self.pictures}")
        return self

    def finding(self) -> dict[str, Any]:
        """What decides which candidates are found, beside the models: when it changes, they are looked for again."""
        names = {"frames", "words", "least_detection", "most_found", "same_overlap", "references"}
        return self.model_dump(mode="json", include=names)

    def choosing(self) -> dict[str, Any]:
        """What decides which candidates are taken: when it changes, pairs are chosen anew of what was found."""
        pools = {"decode", "find", "embed", "choose"}
        content = self.model_dump(mode="json", exclude={*pools, "models", "quality"})
        if self.quality is not None:
            asked = ("model", "answers", "answer_tokens", "temperature", "seed", "json_form")
            content["quality"] = self.quality.model_dump(mode="json", include=set(asked))
        return content


def fit_pools(
    pools: Mapping[str, PairPool | ActorPool], nodes: Sequence[Mapping[str, float]], name: str = "pair"
) -> dict[str, ActorPool]:
    """Pools of one pipeline for the cluster's nodes, given by their resources as Ray names them: an actor of each must
    fit at the same time, and of more as many as there is room for. Raises DataError that says what is missing."""
    whole = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    quarter = 0.25 if whole["GPU"] >= 1 else 0.0
    needs = {of: {"CPU": p.cpus, "GPU": quarter if p.gpus is None else p.gpus} for of, p in pools.items()}
    left = {kind: whole[kind] - sum(need[kind] for need in needs.values()) for kind in whole}
    for kind, room in left.items():
        if room < -1e-6:
            asked = " + ".join(f"{of} {need[kind]:g}" for of, need in needs.items())
            raise DataError(
                f"{name}: an actor of each step needs {asked} {kind}s at the same time, and the cluster has "
                f"{whole[kind]:g}: lower {name}.{next(iter(needs))}.{kind.lower()}s and the others', or add nodes"
            )
    counts = dict.fromkeys(pools, 1)
    while True:
        fits = [
            of for of, need in needs.items()
            if counts[of] < pools[of].actors and all(need[kind] <= left[kind] + 1e-6 for kind in left)
        ]  # fmt: skip
        if not fits:
            break
        of = min(fits, key=lambda of: counts[of])
        counts[of] += 1
        left = {kind: left[kind] - needs[of][kind] for kind in left}
    return {of: ActorPool(actors=counts[of], cpus=p.cpus, gpus=needs[of]["GPU"]) for of, p in pools.items()}
