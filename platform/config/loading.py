"""The configuration of a run: one YAML file, checked in full before anything starts.

The sections are in `sections`. Unknown keys are errors that name the nearest known key; `--set a.b=c` overrides; the
resolved configuration is saved with the run. Nothing here imports torch or Ray, so that a typing mistake is answered at
once.
"""

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.storage.uri import absolute, holds_keys, is_remote, redacted
from domainshuttle.platform.config.schema import ConfigError, RunConfig, nearest


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
        raise ConfigError(f"{origin}: output={redacted(place)} is in a store: give a folder that all workers share")
    try:
        return str(absolute(place))
    except DataError as error:
        raise ConfigError(f"{origin}: {key}: {error}") from None


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
        return f"{path}: unknown key{nearest(str(fault['loc'][-1]), known)}"
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
