"""The models of metrics: where their folders are, and what of their files decides a value."""

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from domainshuttle.pipelines.curation.model_folders import ModelRole, check_model_folder, model_digest
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.pipelines.values import Section, Text
from domainshuttle.platform.evaluation.metrics.cache import cache_folder


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


ModelFolder = Annotated[Text, AfterValidator(_absolute)]
"""Whole, since an actor on another node has another working directory, and a report is read from anywhere."""


class MetricModels(Section):
    """Folders of models, downloaded with `hf download ID --local-dir FOLDER`. Only those that a metric uses are needed;
    the metrics share them."""

    detector: ModelFolder | None = Field(None, description="Grounding DINO: IDEA-Research/grounding-dino-tiny")
    segmenter: ModelFolder | None = Field(None, description="SAM 2: facebook/sam2.1-hiera-large")
    dino: ModelFolder | None = Field(None, description="DINOv2: facebook/dinov2-base (the paper does not say the size)")
    clip: ModelFolder | None = Field(
        None, description="CLIP: openai/clip-vit-base-patch32 (the paper does not say the size)"
    )
    aesthetic_clip: ModelFolder | None = Field(None, description="CLIP of AES: openai/clip-vit-large-patch14")
    aesthetic_head: ModelFolder | None = Field(
        None, description="file of AES's head: aesthetic-model.pth of BestWishYsh/OpenS2V-Weight, or as safetensors"
    )
    gme: ModelFolder | None = Field(None, description="GME: Alibaba-NLP/gme-Qwen2-VL-7B-Instruct")
    one_align: ModelFolder | None = Field(
        None, description="one-align: q-future/one-align (opt-in: see the metric `ms`)"
    )
    image_editor: ModelFolder | None = Field(
        None, description="pipeline that edits references: Qwen/Qwen-Image-Edit-2509"
    )

    def folder(self, name: str, metric: str) -> str:
        """A folder that a metric needs. Raises DataError where none is named."""
        found: str | None = getattr(self, name)
        if found is None:
            about = type(self).model_fields[name].description
            raise DataError(f"{metric} needs models.{name} ({about}): name its folder under metrics.models")
        return found

    def over(self, other: "MetricModels") -> "MetricModels":
        """These, and those of `other` where none is named."""
        return other.model_copy(update=self.model_dump(exclude_none=True))


ROLES: dict[str, ModelRole] = {
    "detector": "detector", "segmenter": "segmenter", "dino": "dino", "clip": "clip", "aesthetic_clip": "clip",
    "gme": "gme",
}  # fmt: skip
"""The roles of the models that are folders of transformers."""


def weights_digest(models: MetricModels, name: str, metric: str) -> str:
    """A digest of a model's files. Raises DataError as `check_model_folder` does."""
    folder = models.folder(name, metric)
    if role := ROLES.get(name):
        check_model_folder(folder, role)
        return _role_digest(folder, role, _stamp(Path(folder)))
    return _tree_digest(folder, _stamp(Path(folder)))


def hub_commit(folder: str) -> str:
    """The commit of the hub that a folder was downloaded at, as `hf download` notes it; empty where it can't be told.
    For people alone: what decides a value is the weights, which another commit need not change."""
    path = Path(folder).expanduser()
    for part in reversed(path.parts[:-1] if path.is_file() else path.parts):
        if _COMMIT.fullmatch(part):
            return part
    top = path.parent if path.is_file() else path
    notes = [*top.glob(f".cache/huggingface/download/{path.name if path.is_file() else '**/*'}.metadata")]
    commits = {note.read_text(errors="replace").split("\n", 1)[0].strip() for note in notes}
    return commits.pop() if len(commits) == 1 else ""


_COMMIT = re.compile(r"[0-9a-f]{40}")


@functools.lru_cache(maxsize=64)
def _role_digest(folder: str, role: ModelRole, stamp: Sequence[object]) -> str:
    return _remembered(("role", role, stamp), lambda: model_digest(folder, role))


@functools.lru_cache(maxsize=64)
def _tree_digest(path: str, stamp: Sequence[object]) -> str:
    return _remembered(("tree", path, stamp), lambda: _digest_of_tree(path))


def _remembered(key: object, make: Callable[[], str]) -> str:
    """A digest that this machine keeps of files as they are, so that gigabytes are read once and not at each start."""
    name = hashlib.blake2b(repr((_VERSION, key)).encode(), digest_size=16).hexdigest()
    kept = cache_folder("weights") / name
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if _DIGEST.fullmatch(text := kept.read_text()):
            return text
    digest = make()
    with contextlib.suppress(OSError):  # a home that can't be written
        write_bytes(kept, digest.encode())
    return digest


_VERSION = 1
"""Of how digests are made."""
_DIGEST = re.compile(r"[0-9a-f]{16,64}")


def _digest_of_tree(path: str) -> str:
    """Of a file, or of all files in a folder by name."""
    digest, top = hashlib.blake2b(digest_size=16), Path(path)
    for file in _files(top):
        digest.update(str(file.relative_to(top)).encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def _files(top: Path) -> list[Path]:
    if top.is_file():
        return [top]
    hidden = (path for path in top.rglob("*") if path.is_file())
    return sorted(path for path in hidden if not any(part.startswith(".") for part in path.relative_to(top).parts))


def _stamp(top: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when files are changed."""
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(top))
