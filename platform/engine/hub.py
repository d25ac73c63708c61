"""Origins: where the weights are that a model begins with, a folder or an id of the model hub.

An id is `owner/name`, with the folder of one transformer where there are two, and with a branch, tag or commit:
`owner/name/transformer_2@main`. A branch may move, so a run notes the commit, and its workers load that one.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from domainshuttle.model.convert import expert_folders
from domainshuttle.platform.config.schema import ConfigError

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*(?:/\w[\w.-]*)*))?(?:@(\w[\w./-]*))?")
_DESCRIPTIONS = ["config.json", "transformer*/config.json", "*_noise_model/config.json"]


def weights_folder(origin: str, commit: str | None = None) -> Path:
    """The folder of an origin's transformer, fetched from the hub where it is there; `commit` is that of a run.

    Raises ConfigError for an origin that is neither a folder nor on the hub, or that holds two experts,
    FileNotFoundError for a folder without a model.
    """
    if Path(origin).is_dir():
        return _one_expert(origin, Path(origin))
    described = _described(origin, commit)
    found = _one_expert(origin, described)
    inside = found.relative_to(described)
    patterns = [f"{inside}/*"] if inside.parts else ["config.json", "diffusion_pytorch_model*"]
    _fetch(origin, described.name, patterns)
    return found


def description_folder(origin: str) -> Path:
    """The folder with the `config.json` of the transformer that an id of the hub means; nothing else is fetched."""
    return _one_expert(origin, _described(origin))


def commit_of(origin: str | None) -> str | None:
    """The commit that an id of the hub means now; None for folders and for a new model."""
    return None if origin is None or Path(origin).is_dir() else _described(origin).name


def _described(origin: str, commit: str | None = None) -> Path:
    """The snapshot of an origin's repository, which is called as its commit, with the descriptions of its models."""
    _, folder, _ = _parts(origin)
    return _fetch(origin, commit, [f"{folder}/config.json"] if folder else _DESCRIPTIONS)


def _parts(origin: str) -> tuple[str, str | None, str | None]:
    """Repository, folder and revision of an id."""
    match = _ID.fullmatch(origin)
    if match is None:
        raise ConfigError(f"base {origin!r} is no folder, and no id of the hub, such as owner/name/transformer@main")
    return match[1], match[2], match[3]


def _fetch(origin: str, commit: str | None, patterns: list[str]) -> Path:
    repository, _, revision = _parts(origin)
    try:
        return Path(snapshot_download(repository, revision=commit or revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ConfigError(f"base {origin!r} is no folder, and the hub does not give it: {error}") from error


def _one_expert(origin: str, checkpoint: Path) -> Path:
    on_hub = not Path(origin).is_dir()
    folder = _parts(origin)[1] if on_hub else None
    found = expert_folders(checkpoint / folder if folder else checkpoint)
    if len(found) > 1:
        repository = _parts(origin)[0] if on_hub else origin
        names = " and ".join(f"{repository}/{path.name}" for path in found)
        raise ConfigError(f"base {origin!r} holds two experts: name one of {names}")
    return found[0]
