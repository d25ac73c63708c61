"""The configuration of a run: one YAML file, checked in full before anything starts.

Every field is declared once, here or beside what it configures (`SpritesConfig`). Unknown keys are errors that name
the nearest known key; `--set a.b=c` overrides; the resolved configuration is saved with the run. Nothing here
imports torch or Ray, so that a typing mistake is answered at once.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.corpora.sprites import SpritesConfig


class ConfigError(ValueError):
    """A configuration that can't be run. The message lists every fault: the key, its value and the remedy."""


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """Which transformer: the base to start from, or the size of a new one."""

    base: str | None = Field(
        None, description="folder or hub id to start from: Wan, a DomainShuttle folder, or a release"
    )
    size: dict[str, Any] = Field(
        default_factory=dict, description="arguments of DomainShuttleTransformer3DModel when there is no base"
    )
    reference_gate: Literal["own", "video"] = "own"

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.base is None) == (not self.size):
            raise ValueError(
                "give either `base` (weights to start from) or `size` (a new model), not both and not neither"
            )
        return self


class EncodersSection(Section):
    """What makes latents and text features."""

    video: str = Field("block-dct", description="`block-dct`, or folder or hub id of an AutoencoderKLWan")
    text: str = Field("byte-umt5", description="`byte-umt5`, or folder or hub id of a UMT5 encoder and its tokenizer")
    text_len: int = Field(512, gt=0, description="tokens a caption is cut and padded to")


class CorpusSection(Section):
    """One corpus: how it is built, and the buckets its samples are fitted to."""

    build: SpritesConfig
    buckets: list[str] = Field(min_length=1, description="frames x height x width, such as 81x480x832")

    @property
    def parsed_buckets(self) -> list[Bucket]:
        return [parse_bucket(text) for text in self.buckets]

    @model_validator(mode="after")
    def _buckets_parse(self) -> "CorpusSection":
        _ = self.parsed_buckets
        return self


class FlowSection(Section):
    """Timesteps of flow matching (RECIPE.md, "Flow matching")."""

    shift: float = Field(5.0, gt=0)
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    low: float = Field(0.0, ge=0, lt=1, description="an expert's range of shifted t: from")
    high: float = Field(1.0, gt=0, le=1, description="an expert's range of shifted t: to")


class LossSection(Section):
    """L = L_FM + cross_pair_weight * L_C."""

    cross_pair_weight: float = Field(0.0, ge=0)
    cross_pair_target: Literal["stop_gradient", "snapshot"] = "stop_gradient"


class StageSection(Section):
    """A segment of the schedule."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="corpus name to its weight among the samples of a batch"
    )
    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0, description="samples of one optimiser step over all workers")
    micro_batch: int = Field(gt=0, description="samples of one forward on one worker")
    learning_rate: float = Field(1e-5, gt=0)
    final_learning_rate: float | None = Field(None, gt=0, description="cosine decay to this; none: constant")
    warmup_steps: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clipping: float = Field(1.0, gt=0)
    trained: list[str] = Field(min_length=1, description="patterns of parameter names, such as 'blocks.*.attn1.*'")
    references: int = Field(5, ge=0, le=5, description="most reference pictures of a sample; 0: text to video")
    reference_dropout: float = Field(0.0, ge=0, le=1, description="share of samples without their references")
    text_dropout: float = Field(0.0, ge=0, le=1, description="share of samples without their caption")
    flow: FlowSection = FlowSection()
    loss: LossSection = LossSection()

    @model_validator(mode="after")
    def _consistent(self) -> "StageSection":
        if self.loss.cross_pair_weight and not self.references:
            raise ValueError("loss.cross_pair_weight needs references: raise `references` or set the weight to 0")
        if self.flow.low >= self.flow.high:
            raise ValueError(f"flow.low={self.flow.low} must lie below flow.high={self.flow.high}")
        return self


class ClusterSection(Section):
    """Which machines. In a Ray job its cluster is used; else `address`; without one, a cluster is started here."""

    address: str | None = Field(None, description="a running Ray cluster; none: start one here")
    workers: int = Field(2, gt=0)
    cpus_per_worker: float = Field(1.0, gt=0, description="what Ray reserves; data tasks need the rest")
    gpus_per_worker: int = Field(0, ge=0, le=1)
    max_failures: int = Field(3, ge=0, description="restarts of the worker group before the run is given up")
    dashboard_port: int | None = Field(
        None, ge=1024, le=65535, description="of a cluster started here; none: no dashboard"
    )


class EngineSection(Section):
    """DeepSpeed ZeRO-3. Its own configuration is derived from this and the stage, and saved with the run."""

    persistent_parameters: int = Field(
        100_000, ge=0, description="parameters of at most this many elements stay whole on every worker"
    )
    offload_optimizer: bool = False
    activation_checkpointing: bool = False


class CheckpointSection(Section):
    every: int = Field(gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="newest checkpoints kept of a segment; the last of each segment stays")


class TrackingSection(Section):
    uri: str | None = Field(None, description="MLflow server or store; none: sqlite beside the runs")
    experiment: str = "domainshuttle"
    every: int = Field(10, gt=0, description="steps between logged metrics")


class GenerationSection(Section):
    """How clips are sampled for evaluation and sample grids."""

    steps: int = Field(50, gt=0)
    guidance: float = Field(5.0, ge=1)
    shift: float = Field(5.0, gt=0)
    fps: float = Field(16.0, gt=0)


class EvaluationSection(Section):
    """The held-out test of the demo: does a clip resemble its own references?"""

    corpus: str
    candidates: int = Field(16, gt=1, description="references that a clip is compared with")
    groups: int = Field(2, gt=0, description="disjoint groups of candidates")


class RunConfig(Section):
    """A complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    data: str = Field(description="folder of the corpora")
    output: str = Field(description="folder of the runs")
    model: ModelSection
    encoders: EncodersSection = EncodersSection()
    corpora: dict[str, CorpusSection] = Field(min_length=1)
    stages: list[StageSection] = Field(min_length=1)
    cluster: ClusterSection = ClusterSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection
    tracking: TrackingSection = TrackingSection()
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationSection | None = None

    @model_validator(mode="after")
    def _names_and_batches(self) -> "RunConfig":
        faults = []
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            faults.append(f"stages have the same name twice: {names}")
        for stage in self.stages:
            for corpus in stage.mixture:
                if corpus not in self.corpora:
                    faults.append(f"stages.{stage.name}.mixture names {corpus!r}{_nearest(corpus, self.corpora)}")
            per_pass = self.cluster.workers * stage.micro_batch
            if stage.global_batch % per_pass:
                faults.append(
                    f"stages.{stage.name}.global_batch={stage.global_batch} can't be shared by "
                    f"cluster.workers={self.cluster.workers} x micro_batch={stage.micro_batch}: "
                    f"use a multiple of {per_pass}"
                )
        if self.model.size and self.model.size.get("text_len") != self.encoders.text_len:
            faults.append(
                f"model.size.text_len={self.model.size.get('text_len')} must equal encoders.text_len="
                f"{self.encoders.text_len}: set both to the tokens of a caption"
            )
        if self.evaluation and self.evaluation.corpus not in self.corpora:
            faults.append(
                f"evaluation.corpus={self.evaluation.corpus!r} is no corpus"
                f"{_nearest(self.evaluation.corpus, self.corpora)}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or f"sqlite:///{Path(self.output) / 'mlflow.db'}"

    def corpus_folder(self, corpus: str, stage: Literal["raw", "encoded"]) -> Path:
        return Path(self.data) / corpus / stage

    def stage(self, name: str) -> StageSection:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"no stage {name!r}{_nearest(name, [s.name for s in self.stages])}")

    def digest(self) -> str:
        """Of all that decides what is learned: machines, paths, checkpoints and tracking may change on resume."""
        content = self.model_dump(mode="json", exclude=set(_RESUMABLE_CHANGES))
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def flattened(self) -> dict[str, Any]:
        """Dotted keys to values, as MLflow's params have them."""
        return dict(_flatten(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


_RESUMABLE_CHANGES = ("cluster", "tracking", "checkpoint", "output", "data", "generation", "evaluation")


def load_config(source: str, overrides: list[str] | None = None) -> RunConfig:
    """Reads a YAML file, or by its name a configuration that ships with the package, and applies `a.b=c` overrides.

    Folders come out absolute, since Ray workers run elsewhere. Raises ConfigError with every fault found.
    """
    text, origin = _read(source)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} holds {type(content).__name__}, not a mapping of configuration keys")
    for override in overrides or []:
        _override(content, override)
    for key in ("data", "output"):
        if isinstance(content.get(key), str):
            content[key] = str(Path(content[key]).expanduser().absolute())
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ConfigError(f"{origin} can't be run:\n{faults}") from None


def _read(source: str) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        return path.read_text(), source
    shipped = resources.files("domainshuttle.configs")
    names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    if path.stem in names and path.suffix in ("", ".yaml") and str(path.parent) in (".", "configs"):
        return (shipped / f"{path.stem}.yaml").read_text(), f"{path.stem}.yaml (shipped)"
    raise ConfigError(
        f"no configuration {source!r}: give a YAML file, or one that ships with the package: {', '.join(names)}"
    )


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r}: expected key.key=value, for example --set cluster.workers=4")
    target: Any = content
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        target = _step_into(target, key, ".".join(parents[: depth + 1]), override)
    if isinstance(target, list):
        _step_into(target, last, path, override)
        target[_position(target, last) or 0] = yaml.safe_load(value)
    else:
        target[last] = yaml.safe_load(value)


def _step_into(target: Any, key: str, path: str, override: str) -> Any:
    if isinstance(target, list):
        position = _position(target, key)
        if position is None:
            names = [item.get("name") for item in target if isinstance(item, dict)]
            raise ConfigError(f"--set {override!r}: {path!r} is no entry; known: {', '.join(map(str, names))}")
        return target[position]
    child = target.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {override!r}: {path!r} is a value ({child!r}), not a section")
    return child


def _position(entries: list[Any], key: str) -> int | None:
    """Entries of a list are addressed by their name or their position."""
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    return next((n for n, item in enumerate(entries) if isinstance(item, dict) and item.get("name") == key), None)


def _explain(fault: ErrorDetails) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1])
        return f"{path}: unknown key{_nearest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{path}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], dict | list) else f" (given: {fault['input']!r})"
    return f"{path + ': ' if path else ''}{message}{given}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        model = next(iter(_models(field.annotation)), None)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _nearest(word: str, known: Any) -> str:
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
