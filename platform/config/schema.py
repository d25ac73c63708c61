"""The sections of a run's configuration: every field is declared once, here or beside what it configures.

Nothing here imports torch or Ray, so that a typing mistake is answered at once.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from domainshuttle.model.domains import DOMAINS
from domainshuttle.model.encoder_sources import TILE_ABOVE
from domainshuttle.model.spec import LORA_A, LORA_B, LoraSpec, Product
from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.corpora.registry import CorpusConfig
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.pairs.config import PairConfig
from domainshuttle.pipelines.errors import UserFacingError, mask_secrets
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_RUN
from domainshuttle.pipelines.sample import LATENT_CHANNELS, READ_AHEAD
from domainshuttle.pipelines.storage.uri import absolute, join
from domainshuttle.pipelines.values import (
    MOST_BATCH,
    MOST_COUNT,
    MOST_STEPS,
    ActorPool,
    Batch,
    Count,
    Cpus,
    Fps,
    Gpus,
    Hours,
    Rate,
    Real,
    Seconds,
    Section,
    Share,
    Steps,
    Text,
    Time,
    Whole,
    whole,
)

if TYPE_CHECKING:
    from domainshuttle.pipelines.index.spec import CorpusSpec
    from domainshuttle.pipelines.plan.feed import EncoderSources


class ConfigError(UserFacingError, ValueError):
    """A configuration that can't be run. The message lists every fault: the key, its value and the remedy."""


ONE, SEVERAL = "<one>", "<several>"
"""Tags of a value that may be one or several: pydantic names them in the path of a fault."""


def _how_many(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


def _nothing_or(value: Any) -> Any:
    """An empty mapping for a key without a value."""
    return {} if value is None else value


class AblationSection(Section):
    """Parts of the method that the paper takes away to measure them (docs/comparing.md)."""

    reference_projections: Literal["own", "shared"] = Field(
        "own", description="patch embedding, query, key and value of references: their own, or the video's"
    )
    domain_adaln: bool = Field(True, description="references have their own modulation, with their domain")
    reference_rope: Literal["dual", "frames"] = Field(
        "dual", description="DualRoPE, or references follow as frames of the video"
    )


class ModelSize(TypedDict, total=False):
    """Arguments of a new DomainShuttleTransformer3DModel. Those that are left out have its defaults, and are left out
    of the saved configuration too."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[misc]

    patch_size: tuple[
        Annotated[Whole, Field(ge=1, le=1)], Annotated[Whole, Field(ge=1, le=2)], Annotated[Whole, Field(ge=1, le=2)]
    ]  # what divides the latents of every bucket
    num_attention_heads: Annotated[Whole, Field(ge=1, le=1024)]
    attention_head_dim: Annotated[Whole, Field(ge=2, le=4096, multiple_of=2)]  # RoPE turns pairs of channels
    in_channels: Annotated[Whole, Field(ge=LATENT_CHANNELS, le=LATENT_CHANNELS)]
    out_channels: Annotated[Whole, Field(ge=LATENT_CHANNELS, le=LATENT_CHANNELS)]
    text_dim: Annotated[Whole, Field(ge=1, le=1 << 17)]
    freq_dim: Annotated[Whole, Field(ge=1, le=1 << 17)]
    ffn_dim: Annotated[Whole, Field(ge=1, le=1 << 20)]
    num_layers: Annotated[Whole, Field(ge=1, le=1024)]
    cross_attn_norm: bool
    eps: Annotated[Real, Field(ge=1e-12, le=1)]  # what float32 holds beside squares of about 1e-6
    max_references: Annotated[Whole, Field(ge=0, le=1024)]
    num_domains: Annotated[Whole, Field(ge=len(DOMAINS), le=1024)]
    timestep_angles: Literal["float32", "float64"]
    text_len: Annotated[Whole, Field(ge=1, le=1 << 16)]
    boundary: Time | None


class ModelSection(Section):
    """Which transformer: the base to start from, or the size of a new one."""

    base: str | None = Field(
        None, description="folder or hub id to start from: Wan, a DomainShuttle folder, or a release"
    )
    size: Annotated[ModelSize, BeforeValidator(_nothing_or)] = Field(
        default_factory=ModelSize, description="arguments of DomainShuttleTransformer3DModel when there is no base"
    )
    reference_gate: Literal["own", "video"] = "own"
    ablation: AblationSection = AblationSection()

    @property
    def choices(self) -> dict[str, Any]:
        """Arguments of the transformer that are not its size: also of one that begins with a Wan's weights."""
        return {"reference_gate": self.reference_gate, **self.ablation.model_dump()}


class EncodersSection(Section):
    """What makes latents and text features."""

    video: str = Field("block-dct", description="`block-dct`, or folder or hub id of an AutoencoderKLWan")
    text: str = Field("byte-umt5", description="`byte-umt5`, or folder or hub id of a UMT5 encoder and its tokenizer")
    text_len: Whole = Field(512, ge=1, le=1 << 16, description="tokens a caption is cut and padded to")
    tile_above: Whole | None = Field(
        TILE_ABOVE, ge=1, le=MOST_COUNT, description="pixels of a frame above which a VAE encodes in tiles; none: never"
    )
    live: ActorPool | None = Field(
        None, description="encode raw corpora while they are trained on; none: they are encoded beforehand"
    )

    def sources(self) -> "EncoderSources":
        """Where the encoders come from, as encoding and the loader take it."""
        from domainshuttle.pipelines.plan.feed import EncoderSources  # brings pyarrow along

        return EncoderSources(self.video, self.text, self.text_len, self.tile_above)


class CorpusSection(Section):
    """One corpus: how it is built, and the buckets its samples are fitted to."""

    build: CorpusConfig | None = Field(
        None, description="its source; none: the shards are your own, indexed with `domainshuttle data index`"
    )
    pair: PairConfig | None = Field(
        None, description="cross pairs, which then are what is encoded; none: what was built is"
    )
    buckets: list[str] = Field(min_length=1, description="frames x height x width, such as 81x480x832")
    fps: Fps | None = Field(None, description="rate at which clips are sampled; none: each clip's own")

    @property
    def parsed_buckets(self) -> list[Bucket]:
        return [parse_bucket(text) for text in self.buckets]

    def spec(self, name: str, form: Literal["raw", "encoded"], data: str) -> "CorpusSpec":
        """The corpus in a form, below the folder or URI `data`; where it is paired, its raw form is the pairs'."""
        paired = form == "raw" and self.pair is not None
        return self._spec(name, form, join(data, f"{name}/{PAIRED if paired else form}"))

    def built(self, name: str, data: str) -> "CorpusSpec":
        """The corpus as it was built or indexed, which is what cross pairs are made of."""
        return self._spec(name, "raw", join(data, f"{name}/raw"))

    def _spec(self, name: str, form: Literal["raw", "encoded"], folder: str) -> "CorpusSpec":
        from domainshuttle.pipelines.index.spec import CorpusSpec  # brings pyarrow along

        return CorpusSpec(name, form, folder, tuple(self.parsed_buckets), self.fps)

    @model_validator(mode="after")
    def _samples_fit(self) -> "CorpusSection":
        buckets, build = self.parsed_buckets, self.build
        if large := [str(one) for one in buckets if max(one.frames, one.height, one.width) > _MOST_SIDE]:
            raise ValueError(f"buckets {large}: a side has more than {_MOST_SIDE:,} frames or pixels")
        if build is not None:
            build.check_buckets(buckets, self.fps)
        return self


_MOST_SIDE = 1 << 16
PAIRED = "paired"
"""The folder of a corpus's cross pairs, beside that of what was built."""


class FlowSection(Section):
    """Timesteps of flow matching (docs/method.md, "Flow matching")."""

    shift: Real = Field(5.0, gt=0, le=1e4)
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    low: Time = Field(0.0, lt=1, description="an expert's range of shifted t: from")
    high: Time = Field(1.0, gt=0, description="an expert's range of shifted t: to")


Beta = Annotated[Real, Field(ge=0, lt=1)]
Workers = Annotated[Whole, Field(gt=0, le=MOST_BATCH)]
CORPUS_NAME = r"^[^/\\.\x00-\x1f][^/\\\x00-\x1f]*$"
CorpusName = Annotated[str, Field(pattern=CORPUS_NAME)]
"""Also the name of its folder, in `data`."""


class LossSection(Section):
    """L = L_FM + cross_pair_weight * L_C."""

    cross_pair_weight: Real = Field(0.0, ge=0, le=1e6)
    cross_pair_target: Literal["stop_gradient", "snapshot"] = "stop_gradient"


@dataclass(frozen=True)
class Duration:
    """How long a stage is trained: to a number of steps, or until it has used so many device-hours; what comes first.

    One of them is given.
    """

    steps: int | None
    hours: float | None

    @property
    def planned_steps(self) -> int:
        """For how many steps the data are planned: where only the hours end the stage, more than they last for."""
        return HORIZON if self.steps is None else self.steps


HORIZON = 1_000_000


class LoraSection(Section):
    """Low-rank adapters, as PEFT's LoraConfig has them."""

    rank: Whole = Field(ge=1, le=4096)
    alpha: Real | None = Field(
        None, gt=0, le=1e6, description="what adapters add is multiplied by alpha / rank; none: by 1"
    )
    targets: list[str] = Field(
        min_length=1, description="patterns of linear layers' names, or of their ends, such as attn1.to_q or 'ffn.*'"
    )

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(self.rank, tuple(self.targets), 1.0 if self.alpha is None else self.alpha / self.rank)


class AdapterTraining(Section):
    """What a stage trains instead of the weights themselves: adapters, and beside them whole parameters."""

    lora: LoraSection
    parameters: list[str] = Field(
        default_factory=list, description="patterns of parameters that are trained themselves, beside the adapters"
    )


Trained = list[str] | AdapterTraining
"""What a stage trains: parameters by patterns of their names, or adapters."""


def _adapters_or_patterns(value: Any) -> str:
    return ONE if isinstance(value, dict | AdapterTraining) else SEVERAL


class StageSection(Section):
    """A segment of the schedule."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    mixture: Annotated[
        Annotated[dict[str, Annotated[Real, Field(ge=1e-9, le=1e9)]], Field(min_length=1), Tag(ONE)]
        | Annotated[list[str], Field(min_length=1), Tag(SEVERAL)],
        Discriminator(_how_many),
    ] = Field(
        description="corpus name to its weight among the samples of a batch; a list of names: by their sample counts"
    )
    where: dict[str, str] = Field(
        default_factory=dict,
        description='corpus name to the filter of its samples, such as "seconds >= 2 and scores.aesthetic > 4.5"; '
        "the others are left out",
    )
    steps: Steps | None = Field(
        None, description="optimiser steps, at most where gpu_hours ends the stage before; none: only the hours do"
    )
    samples: Count | None = Field(None, description="instead of steps: samples trained on, rounded up to a step")
    gpu_hours: Hours | None = Field(None, description="ends the stage when it has used so many device-hours")
    global_batch: Batch = Field(description="samples of one optimiser step over all workers")
    micro_batch: Batch = Field(description="samples of one forward on one worker")
    learning_rate: Rate = 1e-5
    final_learning_rate: Rate | None = Field(None, description="cosine decay to this; none: constant")
    warmup_steps: Whole = Field(0, ge=0, le=MOST_STEPS)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Real = Field(0.0, ge=0, le=1e6)
    gradient_clipping: Real = Field(1.0, ge=1e-6, le=1e20)
    trained: Annotated[
        Annotated[list[str], Field(min_length=1), Tag(SEVERAL)] | Annotated[AdapterTraining, Tag(ONE)],
        Discriminator(_adapters_or_patterns),
    ] = Field(
        description="patterns of parameter names, such as 'blocks.*.attn1.*'; or {lora: {rank, targets}} for adapters"
    )
    references: Whole = Field(5, ge=0, le=5, description="most reference pictures of a sample; 0: text to video")
    reference_dropout: Share = Field(0.0, description="share of samples without their references")
    text_dropout: Share = Field(0.0, description="share of samples without their caption")
    flow: FlowSection = FlowSection()
    loss: LossSection = LossSection()

    @property
    def lora(self) -> LoraSpec | None:
        """The adapters that are trained; None: weights themselves are."""
        return adapters_of(self.trained)

    @property
    def patterns(self) -> list[str]:
        """Patterns of the trained parameters' names, adapters' included."""
        return patterns_of(self.trained)

    @property
    def described_trained(self) -> str:
        """What is trained, in a line."""
        if isinstance(self.trained, list):
            return ", ".join(self.trained)
        lora = self.trained.lora
        return ", ".join([f"LoRA of rank {lora.rank} of {', '.join(lora.targets)}", *self.trained.parameters])

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each corpus, in the order of their names; empty: by their sample counts."""
        return dict(sorted(self.mixture.items())) if isinstance(self.mixture, dict) else {}

    @property
    def described_mixture(self) -> str:
        """The mixture in a line."""
        if not self.weights:
            return f"{', '.join(sorted(self.mixture))} by sample counts"
        return ", ".join(f"{name}: {weight:g}" for name, weight in self.weights.items())

    @property
    def duration(self) -> Duration:
        """How long it is trained."""
        return Duration(self.steps, self.gpu_hours)

    @model_validator(mode="before")
    @classmethod
    def _steps_of_samples(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("steps") is not None:
            return content
        if content.get("samples") is not None:
            try:
                steps = -(-int(whole(content["samples"])) // int(whole(content["global_batch"])))
            except (KeyError, TypeError, ValueError, ArithmeticError):
                steps = 1  # their own faults are reported
            return {**content, "steps": max(steps, 1)}
        return content

    @model_validator(mode="after")
    def _consistent(self) -> "StageSection":
        if self.samples is not None and self.steps != math.ceil(self.samples / self.global_batch):
            raise ValueError(
                f"steps={self.steps} and samples={self.samples} with global_batch={self.global_batch} differ: give one"
            )
        if self.steps is None and self.gpu_hours is None:
            raise ValueError("steps: missing: say how long it is trained, by `steps`, `samples` or `gpu_hours`")
        if self.final_learning_rate is not None and self.steps is None:
            raise ValueError("final_learning_rate needs an end that is known: give steps or samples beside gpu_hours")
        if self.weight_decay * self.learning_rate >= 1:
            raise ValueError(
                f"weight_decay={self.weight_decay:g} times learning_rate={self.learning_rate:g} is 1 or more: each "
                "step would take the whole weights away"
            )
        if self.loss.cross_pair_weight and not self.references:
            raise ValueError("loss.cross_pair_weight needs references: raise `references` or set the weight to 0")
        if self.loss.cross_pair_weight and self.reference_dropout == 1:
            raise ValueError("loss.cross_pair_weight needs references, and reference_dropout=1 leaves none: lower it")
        if len(set(self.mixture)) < len(self.mixture):
            raise ValueError(f"mixture names a corpus twice: {self.mixture}")
        if unknown := sorted(set(self.where) - set(self.mixture)):
            raise ValueError(f"where names {unknown}, which the mixture does not have: {sorted(self.mixture)}")
        if self.flow.low >= self.flow.high:
            raise ValueError(f"flow.low={self.flow.low} must lie below flow.high={self.flow.high}")
        if self.where:
            from domainshuttle.pipelines.index.filter import RowFilter  # brings pyarrow along

            for text in self.where.values():
                RowFilter.columns(text)
        return self


def adapters_of(trained: Trained) -> LoraSpec | None:
    """The adapters among what is trained."""
    return trained.lora.spec if isinstance(trained, AdapterTraining) else None


def patterns_of(trained: Trained) -> list[str]:
    """Patterns of the names of what is trained, in a network that has the adapters."""
    return [f"*.{LORA_A}", f"*.{LORA_B}", *trained.parameters] if isinstance(trained, AdapterTraining) else trained


class ExpertSection(Section):
    """One of the networks that share the timesteps, such as Wan2.2's for high and for low noise."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    base: str | None = Field(None, description="folder or hub id to start from; none: a new model of model.size")
    low: Time = Field(0.0, lt=1, description="its range of shifted t: from")
    high: Time = Field(1.0, gt=0, description="its range of shifted t: to")

    @model_validator(mode="after")
    def _ordered(self) -> "ExpertSection":
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must lie below high={self.high}")
        return self


class LoaderSection(Section):
    """How each worker reads its samples."""

    most_bad: Share = Field(MOST_BAD_IN_RUN, lt=1, description="share of unreadable samples above which the run ends")
    read_ahead: Whole = Field(
        READ_AHEAD, ge=0, le=MOST_COUNT, description="bytes of batches that a worker holds before they are needed"
    )
    threads: Whole = Field(2, ge=1, le=1024, description="that read, of each worker")


class GuardSection(Section):
    """What happens to steps that would harm the model, and to workers that hang."""

    spike_factor: Real | None = Field(
        10.0,
        gt=1,
        le=1e9,
        description="a loss above this many times the median loss drops the step; none: only one that is not finite",
    )
    window: Whole = Field(50, ge=1, le=1_000_000, description="good steps over which the median loss is taken")
    rollback_after: Count = Field(5, description="dropped steps in a row that send the run back to a checkpoint")
    most_rollbacks: Whole = Field(3, ge=0, le=MOST_COUNT, description="of a segment, before the run is given up")
    hang_seconds: Seconds = Field(1800.0, description="without a step for so long, a worker is restarted")


class EncodingSection(Section):
    """The actors with which `data encode` encodes corpora beforehand; what each reserves may be a fraction."""

    actors: Count | None = Field(None, description="how many; none: as many as the cluster has room for")
    cpus: Cpus = Field(1.0, description="CPUs of an actor, which decodes on one thread and encodes on another")
    gpus: Gpus | None = Field(None, description="GPUs of an actor; none: one where the cluster has any, else 0")

    def pool(self, nodes: Sequence[Mapping[str, float]]) -> ActorPool:
        """What is asked for; of what is not (None): a GPU an actor where a node has one, and as many actors as fit on
        the nodes, given by their resources as Ray names them."""
        actors, gpus = self.actors, self.gpus
        if gpus is None:
            gpus = float(any(node.get("GPU", 0.0) >= 1 for node in nodes))
        if actors is None:
            needs = [(name, need) for name, need in (("CPU", self.cpus), ("GPU", gpus)) if need]
            # a hair more, since 0.3 / 0.1 is below 3
            actors = sum(
                int(min((node.get(name, 0.0) / need for name, need in needs), default=1) + 1e-6) for node in nodes
            )
        return ActorPool(actors=max(actors, 1), cpus=self.cpus, gpus=gpus)


class ClusterSection(Section):
    """Which machines. In a Ray job its cluster is used; else `address`; without one, a cluster is started here."""

    address: str | None = Field(None, description="a running Ray cluster; none: start one here")
    workers: Annotated[
        Annotated[Workers, Tag(ONE)] | Annotated[tuple[Workers, Workers], Tag(SEVERAL)], Discriminator(_how_many)
    ] = Field(2, description="how many, or [least, most]: the run shrinks and grows with the cluster")
    resize_seconds: Real = Field(
        60.0, ge=0, le=1e9, description="with [least, most]: between looks for room for more; a resize is a restart"
    )
    cpus_per_worker: Cpus = Field(1.0, gt=0, description="what Ray reserves; data tasks need the rest")
    gpus_per_worker: Whole = Field(0, ge=0, le=1)
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="labels of the Ray nodes that workers are placed on; none: any nodes"
    )
    encoding: EncodingSection = EncodingSection()
    max_failures: Whole = Field(
        3, ge=0, le=MOST_COUNT, description="faults in a row, without a newer checkpoint between, to survive"
    )
    dashboard_port: Whole | None = Field(
        None, ge=1024, le=65535, description="of a cluster started here; none: no dashboard"
    )

    @property
    def hours(self) -> str:
        """What hours of its devices are called: a device is a worker where they have no GPU."""
        return "GPU-hours" if self.gpus_per_worker else "device-hours"

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @field_validator("workers")
    @classmethod
    def _range(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = (workers, workers) if isinstance(workers, int) else workers
        if least > most:
            raise ValueError("should be [least, most]")
        return workers


class ActivationSection(Section):
    """What is kept of a forward pass for the backward pass; what is not kept is computed again."""

    mode: Literal["none", "full", "every", "attention", "products"] = Field(
        "attention",
        description="recompute nothing; all blocks; each nth; all but self-attention; or all but what `keep` says",
    )
    keep: dict[Product, Count] | None = Field(
        None,
        description="with mode `products`: in how many blocks self-attention, its three projections and the first "
        "product of the FFN are kept, such as {attention: 40, qkv: 11}; `plan` says what fits",
    )
    every: Count | None = Field(None, description="with mode `every`: each nth block is recomputed")
    offload: bool = Field(False, description="the inputs of recomputed blocks wait in the host's memory")

    @model_validator(mode="after")
    def _nth(self) -> "ActivationSection":
        if (self.mode == "every") != (self.every is not None):
            raise ValueError("`every` goes with mode: every, and only with it")
        if self.offload and self.mode == "none":
            raise ValueError("offload needs recomputed blocks: set mode to full, every or attention")
        if (self.mode == "products") != bool(self.keep):
            raise ValueError("`keep` goes with mode: products, and only with it")
        return self

    def kept(self, layers: int) -> dict[Product, int]:
        """In how many of the first recomputed blocks each product is kept, of `layers` blocks."""
        if self.mode == "attention":
            return {"attention": layers}
        return {product: min(count, layers) for product, count in (self.keep or {}).items()}


class EngineSection(Section):
    """DeepSpeed ZeRO-3. Its own configuration is derived from this and the stage, and saved with the run."""

    persistent_parameters: Whole = Field(
        100_000, ge=0, le=MOST_COUNT, description="parameters of at most this many elements stay whole on every worker"
    )
    precision: Literal["bf16", "float32"] = Field(
        "bf16", description="of products; what is trained is float32 in both. CPUs may multiply bf16 far slower"
    )
    offload_optimizer: bool = Field(False, description="masters and optimiser states in the host's memory")
    activations: ActivationSection = ActivationSection()
    ema: Share | None = Field(
        None, gt=0, lt=1, description="decay a step of a moving average of the trained parameters; none: no average"
    )
    attention_backend: str | None = Field(
        None,
        description="fa3, fa4 (FlashAttention), or one of diffusers' dispatcher, such as native; none: torch's choice",
    )
    kernels: Literal["eager", "triton"] = Field(
        "eager", description="of what lies between a block's products: torch's own, or fused ones of ours, on a GPU"
    )
    float8: bool = Field(
        False, description="products of frozen layers in float8: they are some 3% off, and change what is learned"
    )
    sequence_parallel: Count = Field(
        1, description="workers that share the tokens of each sample, for long clips; cluster.workers is a multiple"
    )
    compile: str | None = Field(
        None, description="backend of torch.compile for the blocks, such as inductor; none: not compiled"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "EngineSection":
        if self.compile is not None and self.kernels != "eager":
            raise ValueError("compile and kernels=triton both fuse what lies between the products: set one of them")
        if self.compile is not None and set(self.activations.keep or ()) - {"attention"}:
            raise ValueError("compiled blocks can keep attention alone: leave qkv and ffn out of activations.keep")
        return self


class CheckpointSection(Section):
    every: Count = Field(description="steps between checkpoints")
    keep: Count = Field(2, description="newest checkpoints kept of a segment; the last of each segment stays")
    keep_every: Count | None = Field(None, description="steps whose multiples are kept for good")
    keep_best: Whole = Field(0, ge=0, le=MOST_COUNT, description="how many of the lowest loss are kept too")
    store: Text | None = Field(None, description="folder or URI, such as s3://bucket/runs; none: the run's folder")
    scratch: Text | None = Field(None, description="a node's folder for copies to and from a store; none: temporary")
    timeout: Seconds = Field(1800.0, description="seconds that all ranks have to write a checkpoint")
    max_failed: Count = Field(3, description="checkpoints in a row that may fail before the run ends")

    @field_validator("store", "scratch")
    @classmethod
    def _absolute(cls, place: str | None) -> str | None:
        # workers run in folders of their own
        return place if place is None else str(absolute(place))

    @model_validator(mode="after")
    def _reachable(self) -> "CheckpointSection":
        if self.keep_every and self.keep_every % self.every:
            raise ValueError(f"keep_every={self.keep_every} must be a multiple of every={self.every}")
        return self


HookEvent = Literal["failed", "restarted", "hung", "diverged", "budget", "finished"]
HOOK_EVENTS: tuple[HookEvent, ...] = get_args(HookEvent)
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SECRET_PLACES = re.compile(
    r"(?i)//(hooks\.slack\.com|(\w+\.)?discord(app)?\.com/api/webhooks|[\w.-]*webhook\.office\.com)/"
)
"""Services whose addresses are secrets by themselves."""


class HookSection(Section):
    """Who is told of what happens to a run: a command, or an address that gets a JSON object (docs/operating.md)."""

    on: list[HookEvent] = Field(list(HOOK_EVENTS), min_length=1, description="of which events")
    command: list[Text] | None = Field(
        None, min_length=1, description="a program and its arguments; it gets the JSON object as its input"
    )
    webhook: Text | None = Field(
        None, description="an address, or ${NAME}: what the environment of the command that trains has under a name"
    )
    headers: dict[Text, Text] = Field(default_factory=dict, description="of the request; secrets as ${NAME}")
    timeout: Seconds = Field(10.0, le=300, description="seconds for a try")
    retries: Whole = Field(3, ge=0, le=20, description="more tries after one that failed")

    @model_validator(mode="after")
    def _one_way_without_secrets(self) -> "HookSection":
        if (self.command is None) == (self.webhook is None):
            raise ValueError("give either `command` or `webhook`")
        if self.webhook is None:
            return self
        plain = _VARIABLE.sub("", self.webhook)
        if "${" not in self.webhook and not self.webhook.startswith(("http://", "https://")):
            raise ValueError("webhook: expected an address that begins with http:// or https://, or ${NAME}")
        if mask_secrets(plain) != plain or _SECRET_PLACES.search(plain):
            raise ValueError(f"webhook: its address has a secret, and the configuration is saved: {_BY_NAME}")
        for name, value in self.headers.items():
            if re.search(r"(?i)auth|token|key|secret|cookie", name) and not _VARIABLE.search(value):
                raise ValueError(f"headers.{name} is a secret, and the configuration is saved: {_BY_NAME}")
        return self

    def variables(self) -> list[str]:
        """The variables of the environment that it needs."""
        texts = (self.webhook or "", *self.headers.values())
        return sorted({name for text in texts for name in _VARIABLE.findall(text)})

    def resolved(self, text: str, environment: Mapping[str, str]) -> str:
        """A text of it with the values of its variables. Raises KeyError for one that is not there."""
        return _VARIABLE.sub(lambda found: environment[found[1]], text)


_BY_NAME = "put it into a variable of the environment, and give ${NAME} here"


_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]+)(\?.*)?")


def absolute_uri(uri: str) -> str:
    """An MLflow URI; one of an sqlite store with an absolute path, as Ray workers change their directory.

    Raises ConfigError for a path with %, which SQLAlchemy's versions read in different ways.
    """
    match = _SQLITE.fullmatch(uri)
    if match and "%" in match[2]:
        raise ConfigError(f"{uri}: MLflow would open another file for a path with %: name a folder without it")
    return f"{match[1]}{Path(match[2]).expanduser().resolve()}{match[3] or ''}" if match else uri


def sqlite_file(uri: str) -> Path | None:
    """The database of an sqlite URI; None for any other."""
    match = _SQLITE.fullmatch(uri)
    return Path(match[2]) if match else None


def server_or_store(uri: str) -> str:
    """What MLflow can be given as a server or store, absolute. Raises ValueError for what it would take for another."""
    address = urlsplit(uri)
    if address.scheme in ("http", "https"):
        if not address.hostname:
            raise ValueError("names no host: expected such as http://HOST:5000")
        address.port  # noqa: B018 - a ValueError where it is none
    elif address.scheme == "file" or not (_SQLITE.fullmatch(uri) or _DATABASE.match(uri) or uri == "databricks"):
        raise ValueError(
            "is neither a server nor a store that MLflow can keep runs in: expected http://HOST:5000 or "
            "sqlite:///FOLDER/mlflow.db"
        )
    found = absolute_uri(uri)
    if (store := sqlite_file(found)) is not None:
        if store.is_dir():
            raise ValueError(f"is a folder: name the file of the store, such as {found.rstrip('/')}/mlflow.db")
        if (there := next(one for one in store.parents if one.exists())).is_file():
            raise ValueError(f"lies in {there}, which is a file and no folder")
    return found


_DATABASE = re.compile(r"(postgresql|mysql|mssql|databricks|uc)(\+\w+)?://")


class TrackingSection(Section):
    uri: Annotated[Text, AfterValidator(server_or_store)] | None = Field(
        None, description="MLflow server or store; none: sqlite beside the runs"
    )
    experiment: Text = "domainshuttle"
    every: Count = Field(10, description="steps between logged metrics")
    hooks: list[HookSection] = Field(default_factory=list, description="who is told when the run needs somebody")


class GenerationSection(Section):
    """How clips are sampled for evaluation and sample grids."""

    steps: Whole = Field(50, ge=1, le=100_000)
    guidance: Real = Field(5.0, ge=1, le=1e4)
    shift: Real = Field(5.0, gt=0, le=1e4)
    fps: Fps = 16.0


class EvaluationSection(Section):
    """The held-out test of the demo: does a clip resemble its own references?"""

    corpus: str
    candidates: Count = Field(16, gt=1, description="references that a clip is compared with")
    groups: Count = Field(2, description="disjoint groups of candidates")


class SamplingSection(Section):
    """Clips of fixed cases while a run trains, made from a snapshot of the weights beside the training."""

    every: Count = Field(description="steps between them; a stage's last step is sampled too")
    cases: Count = Field(4, description="held-out samples of evaluation.corpus, evenly spread over it")
    cases_file: Text | None = Field(
        None, description="instead of them: a JSONL of cases, as `domainshuttle generate --cases` takes"
    )
    cpus: Cpus = Field(1.0, gt=0, description="what Ray reserves for it; where that is not free, rank 0 samples")
    gpus: Gpus = Field(0.0, description="share of a GPU, such as 1 or 0.5; 0: on the CPU")
    timeout: Seconds = Field(600.0, description="seconds until it is given up")
    metrics: Text | None = Field(
        None, description="an evaluation, a file or one that ships: its metrics measure the clips, as curves by step"
    )

    @field_validator("metrics")
    @classmethod
    def _found_anywhere(cls, source: str | None) -> str | None:
        # a file is named for workers in other folders; what is no file ships
        return str(Path(source).absolute()) if source is not None and Path(source).is_file() else source

    @field_validator("cases_file")
    @classmethod
    def _absolute(cls, place: str | None) -> str | None:
        # workers run in folders of their own
        return place if place is None else str(absolute(place))


class CorporaConfig(Section):
    """Corpora that are built and encoded, without a run: what `data build` and `data encode` need."""

    data: Text = Field(description="folder of the corpora")
    encoders: EncodersSection = EncodersSection()
    corpora: dict[CorpusName, CorpusSection] = Field(min_length=1)
    labels: LabelConfig | None = Field(None, description="how `data label` labels raw corpora; none: by word lists")
    cluster: ClusterSection = ClusterSection()

    def corpus(self, name: str, form: Literal["raw", "encoded"]) -> "CorpusSpec":
        """A corpus in a form."""
        return self.corpora[name].spec(name, form, self.data)

    def built(self, name: str) -> "CorpusSpec":
        """A corpus as it was built."""
        return self.corpora[name].built(name, self.data)


class PairOptions(Section):
    """What `--set` says of the cross pairs of a corpus that is named by its folder."""

    pair: PairConfig


class LabelOptions(Section):
    """What `--set` says of the labels of a corpus that is named by its folder."""

    labels: LabelConfig


class RunConfig(Section):
    """A complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Whole = Field(0, ge=0, le=MOST_COUNT)
    data: Text = Field(description="folder of the corpora")
    output: Text = Field(description="folder of the runs")
    model: ModelSection
    encoders: EncodersSection = EncodersSection()
    corpora: dict[CorpusName, CorpusSection] = Field(min_length=1)
    labels: LabelConfig | None = Field(None, description="how `data label` labels raw corpora; none: by word lists")
    experts: list[ExpertSection] = Field(
        default_factory=list, description="two for Wan2.2: each is trained in each stage, as a segment of its own"
    )
    stages: list[StageSection] = Field(min_length=1)
    budget_gpu_hours: Hours | None = Field(None, description="the run stops, with a checkpoint, when it is spent")
    loader: LoaderSection = LoaderSection()
    guard: GuardSection = GuardSection()
    cluster: ClusterSection = ClusterSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection
    tracking: TrackingSection = TrackingSection()
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationSection | None = None
    sampling: SamplingSection | None = None

    @model_validator(mode="after")
    def _names_and_batches(self) -> "RunConfig":
        faults = []
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            faults.append(f"stages have the same name twice: {names}")
        for stage in self.stages:
            for corpus in stage.mixture:
                if corpus not in self.corpora:
                    faults.append(f"stages.{stage.name}.mixture names {corpus!r}{nearest(corpus, self.corpora)}")
            faults += self._sharing_faults(stage)
        faults += self._origin_faults()
        if self.model.size and self.model.size.get("text_len") != self.encoders.text_len:
            faults.append(
                f"model.size.text_len={self.model.size.get('text_len')} must equal encoders.text_len="
                f"{self.encoders.text_len}: set both to the tokens of a caption"
            )
        if self.evaluation and self.evaluation.corpus not in self.corpora:
            faults.append(
                f"evaluation.corpus={self.evaluation.corpus!r} is no corpus"
                f"{nearest(self.evaluation.corpus, self.corpora)}"
            )
        faults += self._sampling_faults()
        if self.engine.sequence_parallel > 1 and self.encoders.live:
            faults.append(
                "engine.sequence_parallel needs encoded corpora, whose samples each of the workers reads: run "
                "`domainshuttle data encode CONFIG`, and leave encoders.live out"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _sharing_faults(self, stage: StageSection) -> list[str]:
        if self.worker_sizes(stage):
            return []
        workers, micro, sharing = self.cluster.workers, stage.micro_batch, self.engine.sequence_parallel
        fault = f"stages.{stage.name}.global_batch={stage.global_batch} can't be shared by cluster.workers={workers} x "
        fault += f"micro_batch={micro}"
        if sharing > 1:
            fault += f", of which each {sharing} share their samples (engine.sequence_parallel)"
        most = sharing * (stage.global_batch // micro)
        would = [size for size in range(sharing, most + 1, sharing) if self._can_share(stage, size)]
        if self.cluster.most_workers % sharing == 0:
            fault += f": use a multiple of {self.cluster.most_workers // sharing * micro}"
        else:
            fault += f": cluster.workers must be a multiple of {sharing}"
        if near := sorted(would, key=lambda size: abs(size - self.cluster.most_workers))[:6]:
            fault += f", or workers of which there are {', '.join(map(str, sorted(near)))}"
        return [fault]

    def worker_sizes(self, stage: StageSection) -> list[int]:
        """The numbers of workers, of those that `cluster.workers` allows, by which a stage's batch can be shared."""
        sizes = range(self.cluster.least_workers, self.cluster.most_workers + 1)
        return [size for size in sizes if self._can_share(stage, size)]

    def _can_share(self, stage: StageSection, workers: int) -> bool:
        groups, rest = divmod(workers, self.engine.sequence_parallel)
        return groups > 0 and rest == 0 and stage.global_batch % (groups * stage.micro_batch) == 0

    def accumulation(self, stage: StageSection, workers: int) -> int:
        """Micro-batches of a worker in a step of so many workers, which can share the stage's batch."""
        return stage.global_batch // (workers // self.engine.sequence_parallel * stage.micro_batch)

    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        cluster = self.cluster
        gpus = {"GPU": float(cluster.gpus_per_worker)} if cluster.gpus_per_worker else {}
        return {"CPU": cluster.cpus_per_worker, **gpus}

    def encoder_resources(self) -> dict[str, float]:
        """What Ray reserves for an actor that encodes while the workers train; nothing where none does."""
        live = self.encoders.live
        return {"CPU": live.cpus, **({"GPU": live.gpus} if live.gpus else {})} if live else {}

    @property
    def grace_seconds(self) -> float:
        """Seconds that a worker has for a save, an export, or to build and restore, before it counts as hanging.

        A save has a limit of its own, and at the next one the save before is waited for.
        """
        return max(self.guard.hang_seconds, 2 * self.checkpoint.timeout + 120)

    def _sampling_faults(self) -> list[str]:
        sampling = self.sampling
        if sampling is None:
            return []
        faults = []
        if sampling.cases_file is None and self.evaluation is None:
            faults.append("sampling takes its cases from evaluation.corpus: add `evaluation`, or give cases_file")
        if 2 * sampling.timeout >= self.guard.hang_seconds:
            faults.append(
                f"sampling.timeout={sampling.timeout:g} must be below half of guard.hang_seconds="
                f"{self.guard.hang_seconds:g}, since a stage may wait at its end for two generations"
            )
        return faults

    def _origin_faults(self) -> list[str]:
        names = [expert.name for expert in self.experts]
        if len(set(names)) < len(names):
            return [f"experts have the same name twice: {names}"]
        if not self.experts and (self.model.base is None) == (not self.model.size):
            return [
                "model: give either `base` (weights to start from) or `size` (a new model), not both and not neither"
            ]
        if self.experts and self.model.base is not None:
            return ["model.base: with experts each has its own `base`"]
        if faults := [*self._expert_ranges()]:
            return faults
        without = [expert.name for expert in self.experts if expert.base is None]
        return (
            [f"experts {without} have no `base`, and there is no model.size"] if without and not self.model.size else []
        )

    def _expert_ranges(self) -> Iterator[str]:
        """What is wrong with the times of the experts, which take the place of the stages'."""
        if not self.experts:
            return
        for stage in self.stages:
            if (stage.flow.low, stage.flow.high) != (0, 1):
                yield f"stages.{stage.name}.flow: with experts each has its own `low` and `high`, leave them out here"
        reached = 0.0
        for expert in sorted(self.experts, key=lambda one: one.low):
            if expert.low > reached:
                yield f"experts: no one is trained on t from {reached:g} to {expert.low:g}: let their ranges meet"
            reached = max(reached, expert.high)
        if reached < 1:
            yield f"experts: no one is trained on t from {reached:g} to 1: let their ranges meet"

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def tracking_uri(self) -> str:
        """MLflow's server or store. Raises ConfigError for an sqlite store in a folder that its URI can't name."""
        if self.tracking.uri:
            return self.tracking.uri
        if found := {one for one in self.output if one in "%?"}:
            raise ConfigError(
                f"output={self.output}: MLflow's store can't lie in a folder with {' and '.join(sorted(found))}, "
                "since MLflow would open another file: give another folder, or a server as tracking.uri"
            )
        return f"sqlite:///{Path(self.output) / 'mlflow.db'}"

    def corpus(self, name: str, form: Literal["raw", "encoded"] | None = None) -> "CorpusSpec":
        """A corpus in a form: by default in the one that training reads."""
        return self.corpora[name].spec(name, form or self.trained_form, self.data)

    def built(self, name: str) -> "CorpusSpec":
        """A corpus as it was built."""
        return self.corpora[name].built(name, self.data)

    @property
    def trained_form(self) -> Literal["raw", "encoded"]:
        """In which form training reads the corpora."""
        return "raw" if self.encoders.live else "encoded"

    def model_of(self, expert: ExpertSection | None) -> ModelSection:
        """The model of a segment: of its expert, where there are experts."""
        return self.model if expert is None else self.model.model_copy(update={"base": expert.base})

    def digest(self) -> str:
        """Of all that decides what is learned: the rest may change on resume."""
        return hashlib.blake2b(json.dumps(self._decisive(), sort_keys=True).encode(), digest_size=8).hexdigest()

    def decisive(self) -> dict[str, Any]:
        """What the digest is made of, by dotted keys, JSON-ready."""
        return dict(_flatten(self._decisive()))

    def _decisive(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude=_RESUMABLE_CHANGES)
        content["encoders"]["live"] = self.encoders.live is not None  # whether, not on what machines
        if not self.engine.float8:  # likewise
            del content["engine"]["float8"]
        if self.encoders.tile_above == TILE_ABOVE:  # as earlier versions had no word of it: runs keep their digests
            del content["encoders"]["tile_above"]
        for name, corpus in content["corpora"].items():
            pair = self.corpora[name].pair
            corpus.pop("pair")  # as above
            if pair is not None:
                corpus["pair"] = {**pair.finding(), **pair.choosing()}
            for key, unused in (("source_clip", False), ("source_video", None), ("empty_captions", "leave_out")):
                if corpus["build"] and corpus["build"].get(key, ...) == unused:
                    del corpus["build"][key]
        return self._with_planned_steps(content)

    def _with_planned_steps(self, content: dict[str, Any]) -> dict[str, Any]:
        """With the steps that earlier versions noted of a stage that only its hours end: runs keep their digests."""
        for stage, section in zip(content["stages"], self.stages, strict=True):
            stage["steps"] = section.duration.planned_steps
        return content

    def flattened(self) -> dict[str, Any]:
        """Dotted keys to values, as MLflow's params have them."""
        return dict(_flatten(self._with_planned_steps(self.model_dump(mode="json"))))

    def to_yaml(self) -> str:
        """The resolved configuration, as a run saves it of itself; of a stage's duration only what is given."""
        content = self.model_dump(mode="json")
        for stage in content["stages"]:
            for key in ("steps", "samples", "gpu_hours"):
                if stage[key] is None:
                    del stage[key]
        return yaml.safe_dump(content, sort_keys=False, width=120)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys of two `decisive` configurations that differ, with their values; empty where none do."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)


_RESUMABLE_CHANGES: dict[str, Any] = {
    # where and on what machines
    **dict.fromkeys(("cluster", "data", "output", "checkpoint", "tracking", "loader"), True),
    # evaluation and samples beside the training, and when it stops or rolls back
    **dict.fromkeys(("generation", "evaluation", "sampling", "budget_gpu_hours", "guard"), True),
    "labels": True,  # what they made of a corpus is in its index
    # how a step is computed, equal up to rounding: what a run that is out of memory must be able to change
    "engine": {
        "persistent_parameters",
        "offload_optimizer",
        "activations",
        "attention_backend",
        "compile",
        "sequence_parallel",
        "kernels",
    },
    "stages": {"__all__": {"micro_batch"}},
}


def nearest(word: str, known: Any) -> str:
    options = [str(name) for name in known]
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(options)}"


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
        for number, item in enumerate(content):
            yield from _flatten(item, f"{prefix}.{item.get('name', number)}")
    else:
        yield prefix, content
