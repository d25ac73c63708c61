"""Origins: where the weights are that a model begins with, a folder or an id of the model hub.

An id is `owner/name`, with the folder of one transformer where there are two, and with a branch, tag or commit:
`owner/name/transformer_2@main`. A branch may move, so a run notes the commit, and its workers load that one.
"""

import hashlib
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from domainshuttle.model.layouts import expert_folders
from domainshuttle.pipelines.errors import one_line
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_digest import ChangedError, Fingerprints
from domainshuttle.platform.run.weights_origin import WeightsOrigin

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*(?:/\w[\w.-]*)*))?(?:@(\w[\w./-]*))?")
_DESCRIPTIONS = ["config.json", "transformer*/config.json", "*_noise_model/config.json"]


def resolve(place: str | None, seed: int = 0) -> WeightsOrigin:
    """The origin that a place means now: a new model, a folder, or of an id of the hub its present commit.

    Raises ConfigError for a place that is neither a folder nor on the hub.
    """
    if place is None or Path(place).expanduser().is_dir():
        return WeightsOrigin(place and str(Path(place).expanduser()), seed)
    return WeightsOrigin(place, seed, _described(place).name)


def resolve_all(run: Run) -> dict[str, WeightsOrigin]:
    """The origin of each segment of a run; raises as `resolve`."""
    made = {str(segment.weights) for segment in run.segments()}  # they may not be there yet
    return {
        segment.name: WeightsOrigin(segment.origin, segment.seed)
        if segment.origin in made
        else resolve(segment.origin, segment.seed)
        for segment in run.segments()
    }


def weights_folder(origin: WeightsOrigin) -> Path:
    """The folder of an origin's transformer, fetched from the hub where it is there.

    Raises ConfigError where the hub does not give it, it holds two experts, or the folder is without a model.
    """
    assert origin.place is not None
    if origin.kind == "folder":
        return _one_expert(origin.place, Path(origin.place))
    described = _described(origin.place, origin.commit)
    found = _one_expert(origin.place, described)
    inside = found.relative_to(described)
    patterns = [f"{inside}/*"] if inside.parts else ["config.json", "diffusion_pytorch_model*"]
    _fetch(origin.place, described.name, patterns)
    return found


def description_folder(origin: WeightsOrigin) -> Path:
    """The folder with the `config.json` of an origin's transformer; of one on the hub nothing else is fetched."""
    assert origin.place is not None
    described = Path(origin.place) if origin.kind == "folder" else _described(origin.place, origin.commit)
    return _one_expert(origin.place, described)


def require_as_downloaded(folder: Path) -> None:
    """Compares the large files of a snapshot of the hub with the SHA-256 by which its cache names them; each is read
    once, and again where it has changed.

    Raises ChangedError for one that is not what the hub gave. Files that are no links into the cache have no such name.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        stored = path.resolve()
        if not path.is_symlink() or not re.fullmatch("[0-9a-f]{64}", stored.name):
            continue
        fingerprints = Fingerprints(stored.parent.parent / ".domainshuttle-read.json")
        if (found := fingerprints.of_file(stored, hashlib.sha256)) != stored.name:
            raise ChangedError(
                f"{path} is not the file that the hub gave: its SHA-256 is {found}, expected {stored.name}. Remove "
                f"{stored}; it is then fetched again"
            )


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
        away = f"; where the hub can't be reached, fetch it elsewhere (hf download {repository}) and give its folder"
        raise ConfigError(
            f"base {origin!r} is no folder, and the hub does not give it: {one_line(error)}{away}"
        ) from error


def _one_expert(origin: str, checkpoint: Path) -> Path:
    on_hub = not Path(origin).is_dir()
    folder = _parts(origin)[1] if on_hub else None
    try:
        found = expert_folders(checkpoint / folder if folder else checkpoint)
    except FileNotFoundError as error:
        raise ConfigError(f"base {origin!r}: {error}") from error
    if len(found) > 1:
        repository = _parts(origin)[0] if on_hub else origin
        names = " and ".join(f"{repository}/{path.name}" for path in found)
        raise ConfigError(f"base {origin!r} holds two experts: name one of {names}")
    return found[0]
