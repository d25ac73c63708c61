"""The configuration of a run: one YAML file, checked in full before anything starts.

The sections are in `sections`. Unknown keys are errors that name the nearest known key; `--set a.b=c` overrides; the
resolved configuration is saved with the run. Nothing here imports torch or Ray, so that a typing mistake is answered at
once.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from domainshuttle.pipelines.places import absolute, holds_keys, is_remote, join, shown
from domainshuttle.platform.sections import (
    CheckpointSection,
    ClusterSection,
    CorpusSection,
    EncodersSection,
    EngineSection,
    EvaluationSection,
    ExpertSection,
    GenerationSection,
    GuardSection,
    LoaderSection,
    ModelSection,
    SamplingSection,
    Section,
    StageSection,
    TrackingSection,
)


class ConfigError(ValueError):
    """A configuration that can't be run. The message lists every fault: the key, its value and the remedy."""


class RunConfig(Section):
    """A complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    data: str = Field(description="folder of the corpora")
    output: str = Field(description="folder of the runs")
    model: ModelSection
    encoders: EncodersSection = EncodersSection()
    corpora: dict[str, CorpusSection] = Field(min_length=1)
    experts: list[ExpertSection] = Field(
        default_factory=list, description="two for Wan2.2: each is trained in each stage, as a segment of its own"
    )
    stages: list[StageSection] = Field(min_length=1)
    budget_gpu_hours: float | None = Field(None, gt=0, description="the run stops, with a checkpoint, when it is spent")
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
                    faults.append(f"stages.{stage.name}.mixture names {corpus!r}{_nearest(corpus, self.corpora)}")
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
                f"{_nearest(self.evaluation.corpus, self.corpora)}"
            )
        faults += self._sampling_faults()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _sharing_faults(self, stage: StageSection) -> list[str]:
        if self.worker_sizes(stage):
            return []
        workers, micro = self.cluster.workers, stage.micro_batch
        fault = f"stages.{stage.name}.global_batch={stage.global_batch} can't be shared by cluster.workers={workers} x "
        fault += f"micro_batch={micro}: use a multiple of {self.cluster.most_workers * micro}"
        most = stage.global_batch // micro
        would = [size for size in range(1, most + 1) if stage.global_batch % (size * micro) == 0]
        if near := sorted(would, key=lambda size: abs(size - self.cluster.most_workers))[:6]:
            fault += f", or workers of which there are {', '.join(map(str, sorted(near)))}"
        return [fault]

    def worker_sizes(self, stage: StageSection) -> list[int]:
        """The numbers of workers, of those that `cluster.workers` allows, by which a stage's batch can be shared."""
        sizes = range(self.cluster.least_workers, self.cluster.most_workers + 1)
        return [size for size in sizes if stage.global_batch % (size * stage.micro_batch) == 0]

    @property
    def patience(self) -> float:
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
        without = [expert.name for expert in self.experts if expert.base is None]
        return (
            [f"experts {without} have no `base`, and there is no model.size"] if without and not self.model.size else []
        )

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or f"sqlite:///{Path(self.output) / 'mlflow.db'}"

    def corpus_folder(self, corpus: str, stage: Literal["raw", "encoded"]) -> str:
        """Where a corpus is: a folder, or a URI where `data` is one."""
        return join(self.data, f"{corpus}/{stage}")

    @property
    def trained_form(self) -> Literal["raw", "encoded"]:
        """In which form training reads the corpora."""
        return "raw" if self.encoders.live else "encoded"

    def model_of(self, expert: ExpertSection | None) -> ModelSection:
        """The model of a segment: of its expert, where there are experts."""
        return self.model if expert is None else self.model.model_copy(update={"base": expert.base})

    def stage(self, name: str) -> StageSection:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"no stage {name!r}{_nearest(name, [s.name for s in self.stages])}")

    def digest(self) -> str:
        """Of all that decides what is learned: the rest may change on resume."""
        return hashlib.blake2b(json.dumps(self._decisive(), sort_keys=True).encode(), digest_size=8).hexdigest()

    def decisive(self) -> dict[str, Any]:
        """What the digest is made of, by dotted keys, JSON-ready."""
        return dict(_flatten(self._decisive()))

    def _decisive(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude=_RESUMABLE_CHANGES)
        content["encoders"]["live"] = self.encoders.live is not None  # whether, not on what machines
        return content

    def flattened(self) -> dict[str, Any]:
        """Dotted keys to values, as MLflow's params have them."""
        return dict(_flatten(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys of two `decisive` configurations that differ, with their values; empty where none do."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)


_RESUMABLE_CHANGES: dict[str, Any] = {
    # where and on what machines
    **dict.fromkeys(("cluster", "data", "output", "checkpoint", "tracking", "loader"), True),
    # what is looked at beside the training, and when it stops or goes back
    **dict.fromkeys(("generation", "evaluation", "sampling", "budget_gpu_hours", "guard"), True),
    # how a step is computed, equal up to rounding: what a run that is out of memory must be able to change
    "engine": {"persistent_parameters", "offload_optimizer", "activations", "attention_backend", "compile"},
    "stages": {"__all__": {"micro_batch"}},
    "encoders": {"encoding"},
}


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
    _refuse_keys(content, origin)
    for key in ("data", "output"):
        if isinstance(content.get(key), str):
            content[key] = _place(key, content[key], origin)
    experts = content.get("experts")
    for section in (content.get("model"), content.get("encoders"), *(experts if isinstance(experts, list) else [])):
        _find_folders(section)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ConfigError(f"{origin} can't be run:\n{faults}") from None


def _refuse_keys(content: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError for secrets in places: the configuration is saved with the run, and in MLflow."""
    aws = "give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the job, or give its machines a role"
    mlflow = (
        "give them as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or of a database in its own way, such as "
        "PGPASSWORD, to the job"
    )
    places = (("data", aws), ("output", aws), ("checkpoint.store", aws), ("checkpoint.scratch", aws))
    for path, remedy in (*places, ("tracking.uri", mlflow)):
        *sections, key = path.split(".")
        section: Any = content.get(sections[0]) if sections else content
        place = section.get(key) if isinstance(section, dict) else None
        if isinstance(place, str) and holds_keys(place):
            raise ConfigError(
                f"{origin}: {path} has access keys in it, and it is saved with the run and shown in MLflow: {remedy}"
            )


def _place(key: str, place: str, origin: str) -> str:
    if key == "output" and is_remote(place):
        raise ConfigError(f"{origin}: output={shown(place)} is in a store: give a folder that all workers share")
    return str(absolute(place))


def _find_folders(section: Any) -> None:
    """Makes the folders of weights that a section names absolute; what is no folder here may be an id of the hub."""
    for key in ("base", "video", "text"):
        named = section.get(key) if isinstance(section, dict) else None
        if isinstance(named, str) and (folder := Path(named).expanduser()).is_dir():
            section[key] = str(folder.absolute())


def _read(source: str) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        return path.read_text(), source
    shipped = resources.files("domainshuttle.configs")
    names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    name = path.name.removesuffix(".yaml")  # not its stem: there are dots in names
    if name in names and str(path.parent) in (".", "configs"):
        return (shipped / f"{name}.yaml").read_text(), f"{name}.yaml (shipped)"
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
