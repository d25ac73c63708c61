"""`domainshuttle ablate`: variants of one configuration, trained one after the other, evaluated and compared.

An ablation is a file that names a configuration and, for each variant, the keys it sets. Stages that all variants
share are trained once, as a plain video model; the variants begin with its weights as they would with Wan's. Every part
is one of the commands that a user would type, and goes on where it was when the ablation is started again.
"""

import inspect
import json
import shutil
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from diffusers import WanTransformer3DModel
from pydantic import Field, ValidationError

from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.pipelines.values import Section, Whole
from domainshuttle.platform.commands.demo import Timer
from domainshuttle.platform.config.loading import explain, load_config, read_mapping, read_text
from domainshuttle.platform.config.schema import AblationSection, ConfigError, RunConfig, differences
from domainshuttle.platform.console import console
from domainshuttle.platform.driver.preflight import require_encoded
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.weights_digest import verified_digest

_PLAIN = AblationSection(reference_projections="shared", domain_adaln=False)
"""Without anything of its own for references: what a Wan is."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SharedSection(Section):
    """What all variants have in common before they differ."""

    stages: list[str] = Field(min_length=1, description="the first stages of the configuration")


class Ablation(Section):
    """The file of an ablation."""

    name: Name
    config: str = Field(description="a configuration: beside the file, or by name one that ships with the package")
    set: dict[str, Any] = Field(default_factory=dict, description="keys of all variants, such as stages.stage1.steps")
    seeds: list[Whole] = Field(
        default_factory=list, description="every variant is trained once with each; none: with the configuration's"
    )
    shared: SharedSection | None = None
    variants: dict[Name, dict[str, Any]] = Field(min_length=1, description="name to the keys that it sets")


@dataclass(frozen=True)
class Plan:
    """The runs of an ablation: that of the shared stages, then each variant's."""

    name: str
    folder: Path
    """Of everything but corpora and runs: exported models, evaluations, pictures."""
    shared: RunConfig | None
    variants: dict[str, RunConfig]
    """The runs by their name: a variant's is its own, with several seeds also the seed's."""
    rows: dict[str, list[str]] = field(default_factory=dict)
    """The runs of each variant, one a seed."""

    @property
    def base(self) -> Path:
        """Where the variants find the shared weights, as a folder of a Wan."""
        return self.folder / "base"


def load_ablation(source: str, overrides: list[str] | None = None) -> Plan:
    """Reads an ablation, a file or by name one that ships with the package; `overrides` hold for all variants.

    Raises ConfigError with the variant and what is wrong with it.
    """
    path = Path(source)
    if not path.is_file():
        shipped = resources.files("domainshuttle.configs") / "ablations"
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        if source not in names:
            raise ConfigError(f"no ablation {source!r}: give a YAML file, or one that ships: {', '.join(names)}")
        path = Path(str(shipped)) / f"{source}.yaml"
    try:
        ablation = Ablation.model_validate(read_mapping(read_text(path), str(path)))
    except ValidationError as error:
        faults = "; ".join(explain(fault) for fault in error.errors())
        raise ConfigError(f"{path} is no ablation: {faults}") from None
    beside = path.parent / ablation.config
    common = [*_as_overrides(ablation.set), *(overrides or []), f"tracking.experiment={ablation.name}"]

    def load(name: str, keys: dict[str, Any]) -> RunConfig:
        try:
            chosen = [*common, *_as_overrides(keys), f"name={name}"]
            return load_config(str(beside) if beside.is_file() else ablation.config, chosen)
        except ConfigError as error:
            raise ConfigError(f"variant {name!r} of {path}: {error}") from error

    seeds: list[int | None] = [*ablation.seeds] or [None]
    rows = {name: [name if seed is None else f"{name}-seed{seed}" for seed in seeds] for name in ablation.variants}
    whole = {
        run: load(run, keys | ({"seed": seed} if seed is not None else {}))
        for name, keys in ablation.variants.items()
        for run, seed in zip(rows[name], seeds, strict=True)
    }
    folder = Path(next(iter(whole.values())).output).parent
    if ablation.shared is None:
        return Plan(ablation.name, folder, None, whole, rows)
    plain = load("base", {})
    first = ablation.shared.stages
    names = [stage.name for stage in plain.stages]
    if names[: len(first)] != first or len(names) == len(first):
        raise ConfigError(f"{path}: shared.stages={first} must be the first, and not all, of the stages {names}")
    if "base" in whole:
        raise ConfigError(f"{path}: a variant can't be called 'base', as the run of the shared stages is")
    model = plain.model.model_copy(update={"ablation": _PLAIN})
    shared = _changed(plain, model=model.model_dump(), stages=plain.stages[: len(first)])
    plan = Plan(ablation.name, folder, shared, {}, rows)
    for name, config in whole.items():
        begins = config.model.model_copy(update={"base": str(plan.base), "size": {}})
        plan.variants[name] = _changed(config, model=begins.model_dump(), stages=config.stages[len(first) :])
    return plan


def _as_overrides(keys: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def _changed(config: RunConfig, model: dict[str, Any], stages: list[Any]) -> RunConfig:
    content = config.model_dump(mode="json")
    return RunConfig.model_validate({**content, "model": model, "stages": [s.model_dump(mode="json") for s in stages]})


def write_base(weights: Path, folder: Path) -> None:
    """Makes a folder of a diffusers Wan from the weights of a plain model of ours; they are the same tensors.

    The folder appears whole or not at all.
    """
    ours = json.loads((weights / "config.json").read_text())
    wans = set(inspect.signature(WanTransformer3DModel.__init__).parameters)
    # Wan does not say how long its captions are, and ours need not be as long as its own
    kept = {key: value for key, value in ours.items() if key in wans or key == "text_len"}
    with atomic_folder(folder) as aside:
        for path in [*weights.glob("*.safetensors"), *weights.glob("*.index.json")]:
            shutil.copyfile(path, aside / path.name)
        config = {"_class_name": WanTransformer3DModel.__name__, **kept}
        (aside / "config.json").write_text(json.dumps(config, indent=2))


def run_ablation(source: str, overrides: list[str], only: list[str]) -> None:
    """Trains and evaluates what is left of an ablation, or of the variants named, and compares those that are done.

    Raises ConfigError for a variant that is not there, for runs that were begun with another configuration, and when a
    part of it fails.
    """
    plan = load_ablation(source, overrides)
    if unknown := [name for name in only if name not in plan.rows]:
        raise ConfigError(f"no variant {unknown}; the ablation has {list(plan.rows)}")
    chosen = {run for name, runs in plan.rows.items() if not only or name in only for run in runs}
    for config in (*([plan.shared] if plan.shared else []), *plan.variants.values()):
        _require_begun_alike(plan, config)
    timer = Timer({})
    settings = plan.folder / "configs"
    settings.mkdir(parents=True, exist_ok=True)
    for config in (*([plan.shared] if plan.shared else []), *plan.variants.values()):
        (settings / f"{config.name}.yaml").write_text(config.to_yaml())
    first = plan.shared or next(iter(plan.variants.values()))
    if not _has_corpora([first, *plan.variants.values()]):
        timer.run("Build the corpora", "data", "build", str(settings / f"{first.name}.yaml"))
        timer.run("Encode them", "data", "encode", str(settings / f"{first.name}.yaml"))
    if plan.shared is not None:
        run = Run(plan.shared)
        last = run.segments()[-1]
        if not last.finished:
            timer.run("Train what the variants share", "train", str(settings / f"{plan.shared.name}.yaml"))
        if not (plan.base / "config.json").exists():
            verified_digest(last.weights, run.fingerprints)
            write_base(last.weights, plan.base)
    for name, config in plan.variants.items():
        if name in chosen:
            _run_variant(plan, name, config, timer)
    from domainshuttle.platform.commands.ablation_report import report

    report(plan)


def _require_begun_alike(plan: Plan, config: RunConfig) -> None:
    """Raises ConfigError where a run is there with another configuration: its figures would be those of the old one."""
    folder = config.run_folder
    if (folder / "config.yaml").exists() and (before := find_run(folder).config).digest() != config.digest():
        raise ConfigError(
            f"run {config.name!r} of the ablation in {plan.folder} was begun with another configuration: "
            f"{differences(before.decisive(), config.decisive())}. Restore it, give this one a folder of its own "
            f"(--set output=FOLDER), or remove {plan.folder}"
        )


def _has_corpora(configs: list[RunConfig]) -> bool:
    try:
        for config in configs:
            require_encoded(config)
            if config.evaluation and not Path(config.corpus(config.evaluation.corpus, "raw").folder).exists():
                return False
    except ValueError:
        return False
    return True


def _run_variant(plan: Plan, name: str, config: RunConfig, timer: Timer) -> None:
    done = result_of(plan, name)
    judged = config.model_dump(mode="json", include={"evaluation", "generation"})
    if done and (done["config"], done.get("judged")) == (config.digest(), judged):
        console.print(f"Variant [bold]{name}[/] is done: {done['own']:.0%} of its clips show their own subject")
        return
    run, exported, evaluation = Run(config), plan.folder / "exported" / name, plan.folder / "evaluation" / name
    settings = str(plan.folder / "configs" / f"{name}.yaml")
    timer.run(f"Train {name}", "train", settings)  # nothing where it is done; the run then has today's evaluation
    timer.run(f"Export {name}", "export", str(run.folder), str(exported), "--overwrite")
    timer.run(f"Evaluate {name}", "evaluate", str(exported), "--run", str(run.folder), "--out", str(evaluation))
    result = json.loads((evaluation / "identity.json").read_text())
    content = {**result, "config": config.digest(), "judged": judged}
    write_bytes(evaluation / "done.json", json.dumps(content).encode())


def result_of(plan: Plan, name: str) -> dict[str, Any] | None:
    """The evaluation of a variant that is done, and the digest of its configuration."""
    path = plan.folder / "evaluation" / name / "done.json"
    return json.loads(path.read_text()) if path.exists() else None
