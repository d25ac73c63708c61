"""The configuration of a run: one YAML file, checked in full before anything starts.

The sections are in `schema`, what YAML means in `yaml_text`. Unknown keys are errors that name the nearest known key;
`--set a.b=c` overrides; the resolved configuration is saved with the run. Nothing here imports torch or Ray, so that a
typing mistake is answered at once.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import is_typeddict

from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.pairs.config import PairConfig
from domainshuttle.pipelines.errors import DataError, mask_secrets
from domainshuttle.pipelines.storage.uri import absolute, holds_keys, is_remote, redacted
from domainshuttle.platform.config.schema import (
    HORIZON,
    ConfigError,
    CorporaConfig,
    LabelOptions,
    PairOptions,
    RunConfig,
    nearest,
)
from domainshuttle.platform.config.yaml_text import YamlError, read_value, read_yaml

_Config = TypeVar("_Config", bound=BaseModel)


def load_config(source: str, overrides: list[str] | None = None) -> RunConfig:
    """Reads a YAML file, or by its name a configuration that ships with the package, and applies `a.b=c` overrides.

    Folders come out absolute, since Ray workers run elsewhere. Raises ConfigError with every fault found.
    """
    content, origin = _prepared(*_read(source), overrides)
    return _checked(content, origin)


def load_corpora(source: str, overrides: list[str] | None = None) -> RunConfig | CorporaConfig:
    """Reads as `load_config` does the configuration of a run, or one of corpora alone: without `model` and `stages`."""
    content, origin = _prepared(*_read(source, corpora=True), overrides)
    if "model" in content or "stages" in content or "experts" in content:
        return _checked(content, origin)
    return _validated(CorporaConfig, content, origin)


def load_cluster(source: str, overrides: list[str] | None = None) -> ClusterSpec:
    """Reads a cluster's description, or by its name one that ships with the package, and applies `a.b=c` overrides.

    Raises ConfigError with every fault found.
    """
    return load_shipped(ClusterSpec, source, "clusters", "description of a cluster", overrides)


def load_shipped(
    kind: type[_Config], source: str, folder: str, what: str, overrides: list[str] | None = None
) -> _Config:
    """Reads a configuration of another kind than a run's: a YAML file, or by its name one that ships in
    `configs/FOLDER`; applies `a.b=c` overrides. `what` is what a message calls it.

    Raises ConfigError with every fault found.
    """
    text, origin = _read(source, folder, what)
    content = read_mapping(text, origin)
    for override in overrides or []:
        _override(content, override)
    return _validated(kind, content, origin, "can't be used")


def load_pair(overrides: list[str] | None) -> PairConfig:
    """How a corpus is paired that is named by its folder, of overrides such as `pair.frames=8` alone.

    Raises ConfigError with every fault found.
    """
    content: dict[str, Any] = {"pair": {}}
    for override in overrides or []:
        _override(content, override)
    return _validated(PairOptions, content, "--set", "does not say how to pair").pair


def load_labels(overrides: list[str] | None) -> LabelConfig:
    """How a corpus is labelled that is named by its folder, of overrides such as `labels.labeller=words` alone.

    Raises ConfigError with every fault found.
    """
    content: dict[str, Any] = {"labels": {}}
    for override in overrides or []:
        _override(content, override)
    return _validated(LabelOptions, content, "--set", "does not say how to label").labels


def _prepared(text: str, origin: str, overrides: list[str] | None) -> tuple[dict[str, Any], str]:
    """The keys of a configuration with their overrides, and its name; folders are absolute."""
    content = _upgraded(read_mapping(text, origin))
    for override in overrides or []:
        _override(content, override)
    _refuse_keys(content, origin)
    _refuse_variables(content, origin)
    for key in ("data", "output"):
        if isinstance(content.get(key), str) and content[key]:
            content[key] = _place(key, content[key], origin)
    experts = content.get("experts")
    for section in (content.get("model"), content.get("encoders"), *(experts if isinstance(experts, list) else [])):
        _find_folders(section)
    return content, origin


def read_config(path: Path) -> RunConfig:
    """The configuration that a run saved of itself (`RunConfig.to_yaml`). Raises ConfigError for one that is damaged
    or that this version can't run."""
    return _checked(_upgraded(read_mapping(read_text(path), str(path))), str(path))


def read_mapping(text: str, origin: str) -> dict[str, Any]:
    """The keys of a YAML file, with texts as values. Raises ConfigError that names `origin` and the line."""
    try:
        content = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else "a list" if isinstance(content, list) else "a single text"
        raise ConfigError(f"{origin} holds {kind}, not a mapping of configuration keys")
    return content


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """What earlier versions saved, in the form of this one.

    A stage that only its hours end had a million steps. Such a file also has `samples: null`, which nobody types and
    which is left out now.
    """
    stages = content.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if not isinstance(stage, dict) or stage.get("gpu_hours") is None:
            continue
        if stage.get("steps") == str(HORIZON) and "samples" in stage and stage["samples"] is None:
            stage["steps"] = None
    return content


def _checked(content: dict[str, Any], origin: str) -> RunConfig:
    return _validated(RunConfig, content, origin)


def _validated(kind: type[_Config], content: dict[str, Any], origin: str, fault: str = "can't be run") -> _Config:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {explain(one, kind)}" for one in error.errors())
        raise ConfigError(f"{origin} {fault}:\n{faults}") from None


def read_text(path: Path) -> str:
    """The text of a file; raises ConfigError for one that can't be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editors write a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error


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
                f"{origin}: {path} has access keys in it, and it is saved with the run and logged to MLflow: {remedy}"
            )


def _refuse_variables(content: Any, origin: str, path: str = "") -> None:
    """Raises ConfigError for the name of a variable in a place, which only a shell would fill in: a folder of that very
    name would be made."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            _refuse_variables(value, origin, f"{path}.{key}" if path else str(key))
        return
    if not isinstance(content, str) or path.rpartition(".")[2] not in _PLACES:
        return
    if (named := re.search(r"\$(\w+|\{\w+\})", content)) and not Path(content).exists():
        raise ConfigError(
            f"{origin}: {path}={content}: {named[0]} is not filled in here: write out what it stands for, or let the "
            f'shell do it: --set {path}="{content}"'
        )


_PLACES = ("data", "output", "store", "scratch", "base", "folder", "video", "text", "cases_file")
"""Keys whose values are places."""


def _place(key: str, place: str, origin: str) -> str:
    if key == "output" and is_remote(place):
        raise ConfigError(f"{origin}: output={redacted(place)} is in a store: give a folder that all workers share")
    try:
        found = str(absolute(place))
    except DataError as error:
        raise ConfigError(f"{origin}: {key}: {error}") from None
    if any(part.startswith(_JOBS_COPY) for part in Path(found).parts):
        raise ConfigError(
            f"{origin}: {key}={place} is a folder of this job's working directory, of which Ray makes a copy on each "
            f"node and removes it later: name one that all nodes see and that stays, such as --set {key}=/shared/{key}"
        )
    return found


_JOBS_COPY = "_ray_pkg_"
"""With this begins the name of the folder into which Ray puts a job's working directory."""


def _find_folders(section: Any) -> None:
    """Makes the folders of weights that a section names absolute; what is no folder here may be an id of the hub."""
    for key in ("base", "video", "text"):
        named = section.get(key) if isinstance(section, dict) else None
        if isinstance(named, str) and (folder := Path(named).expanduser()).is_dir():
            section[key] = str(folder.absolute())


def _read(source: str, folder: str = "", what: str = "configuration", corpora: bool = False) -> tuple[str, str]:
    """The text of a file or of a configuration that ships in a folder, with `corpora` also of those of corpora alone,
    and its name."""
    path = Path(source)
    if path.is_file():
        return read_text(path), source
    configs = resources.files("domainshuttle.configs")
    shipped = _in_folder(configs / folder if folder else configs)
    if corpora:
        shipped |= {f"corpora/{name}": entry for name, entry in _in_folder(configs / "corpora").items()}
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")  # not its stem: there are dots in names
    name = name.removeprefix(f"{folder}/")
    if name in shipped:
        return shipped[name].read_text(), f"{name}.yaml (shipped)"
    known = ", ".join(sorted(shipped))
    raise ConfigError(f"no {what} {source!r}: give a YAML file, or one that ships with the package: {known}")


def _in_folder(folder: Traversable) -> dict[str, Traversable]:
    """The YAML files of a folder of the package, by their names without ending."""
    return {one.name.removesuffix(".yaml"): one for one in folder.iterdir() if one.name.endswith(".yaml")}


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {override!r}: expected key.key=value, for example --set cluster.workers=4")
    try:
        value = read_value(text)
    except YamlError as error:
        raise ConfigError(
            f"--set {override!r}: the value is no YAML list or mapping ({error}): put texts with special characters in "
            "quotes, such as ['*_ref*']"
        ) from error
    target: Any = content
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        target = _step_into(target, key, ".".join(parents[: depth + 1]), override)
    if isinstance(target, list):
        _step_into(target, last, path, override)
        target[_position(target, last) or 0] = value
    else:
        target[last] = value


def _step_into(target: Any, key: str, path: str, override: str) -> Any:
    if isinstance(target, list):
        position = _position(target, key)
        if position is None:
            names = [str(item.get("name", number)) for number, item in enumerate(target) if isinstance(item, dict)]
            known = ", ".join(names) or f"positions 0 to {len(target) - 1}"
            raise ConfigError(f"--set {override!r}: {path!r} is no entry; known: {known}")
        child = target[position]
    else:
        child = target.get(key)
        if child is None:
            child = target[key] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {override!r}: {path!r} is a value ({child!r}), not a section")
    return child


def _position(entries: list[Any], key: str) -> int | None:
    """Entries of a list are addressed by their name or their position."""
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    return next((n for n, item in enumerate(entries) if isinstance(item, dict) and item.get("name") == key), None)


def explain(fault: ErrorDetails, kind: type[BaseModel] = RunConfig) -> str:
    """A fault that pydantic found, in a line: the key, what is wrong, what was given, and the nearest known key."""
    path = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("<"))  # without unions' tags
    given = fault["input"]
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1], kind)
        return f"{path}: unknown key{nearest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "union_tag_invalid":
        named = [str(tag).strip("'<> ") for tag in fault["ctx"]["expected_tags"].split(",")]
        tag = str(fault["ctx"]["tag"]).strip("<>")
        return f"{path}.builder: there is no {tag!r}{nearest(tag, named)}"
    if fault["type"] == "missing":
        return f"{path}: missing"
    if given is None:
        return f"{path}: has no value: give it one, or leave the key out"
    message = _MESSAGES.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    shown_input = "" if isinstance(given, dict | list | tuple | BaseModel) else f" (given: {mask_secrets(str(given))})"
    return f"{path + ': ' if path else ''}{message}{shown_input}"


_MESSAGES = {
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "int_type": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be a text",
    "list_type": "should be a list, such as [a, b]",
    "tuple_type": "should be a list, such as [a, b]",
    "dict_type": "should be a section of keys, such as {key: value}",
    "model_type": "should be a section of keys, such as {key: value}",
}


def _known_keys(location: tuple[int | str, ...], kind: type[BaseModel]) -> list[str]:
    """The keys of the section at a place of the configuration."""
    section: Any = kind
    annotation: Any = None
    for part in location:
        if isinstance(part, int):
            continue
        if part.startswith("<"):
            section = next(_tagged(annotation, part), section)
        elif (found := _fields(section).get(part)) is not None:
            annotation = found
            section = next(_sections(annotation), None)
        # otherwise a name in a mapping, such as a corpus: its section comes next
    return list(_fields(section))


def _tagged(annotation: Any, tag: str) -> Iterator[Any]:
    """The section that has a tag among those of a union."""
    parts = get_args(annotation)
    if any(isinstance(part, Tag) and part.tag == tag for part in parts):
        yield from _sections(parts[0])
    for part in parts:
        yield from _tagged(part, tag)


def _fields(section: Any) -> dict[str, Any]:
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return get_type_hints(section, include_extras=True) if is_typeddict(section) else {}


def _sections(annotation: Any) -> Iterator[Any]:
    if is_typeddict(annotation) or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
