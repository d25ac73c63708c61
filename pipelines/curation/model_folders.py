"""Models of transformers in local folders: checked before they are loaded, loaded whole or not at all.

`from_pretrained` fills weights that a folder lacks with random ones, and takes a folder of another model with no more
than a warning. Here each is an error, as are weights that are pickles, which are never read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from domainshuttle.model.encoder_sources import files_digest
from domainshuttle.pipelines.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelRole = Literal["detector", "segmenter", "dino", "clip", "gme", "labeller"]


@dataclass(frozen=True)
class _Model:
    """A class of transformers, the `model_type`s of the folders that it loads (none: those that transformers says), one
    to name as an example, and the key of a configuration that names the folder."""

    name: str
    types: tuple[str, ...]
    example: str
    key: str
    texts: bool = False
    """Whether it needs a tokenizer."""
    unused: tuple[str, ...] = ()
    """Weights that folders may lack, since what is asked of the model does not use them."""


_MODELS: dict[ModelRole, _Model] = {
    "detector": _Model(
        "GroundingDinoForObjectDetection",
        ("grounding-dino",),
        "IDEA-Research/grounding-dino-tiny",
        "models.detector",
        texts=True,
    ),
    # the released SAM2 says that it is a model of videos; its part for pictures is the same
    "segmenter": _Model("Sam2Model", ("sam2", "sam2_video"), "facebook/sam2.1-hiera-large", "models.segmenter"),
    "dino": _Model("Dinov2Model", ("dinov2",), "facebook/dinov2-base", "models.dino"),
    "clip": _Model(
        "CLIPVisionModelWithProjection", ("clip", "clip_vision_model"), "openai/clip-vit-base-patch32", "models.clip"
    ),
    "gme": _Model(
        "Qwen2VLForConditionalGeneration",
        ("qwen2_vl",),
        "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct",
        "models.gme",
        texts=True,
        unused=("lm_head.weight",),
    ),
    "labeller": _Model("AutoModelForImageTextToText", (), "Qwen/Qwen3-VL-8B-Instruct", "labels.model", texts=True),
}
_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZERS = ("tokenizer.json", "vocab.txt")


def check_model_folder(folder: str, role: ModelRole) -> Path:
    """The folder of a model, which has its configuration, weights and what it needs of a processor.

    Raises DataError that says what is missing and how to get it.
    """
    model, path = _MODELS[role], Path(folder).expanduser()
    named = f"{model.key} = {folder}"
    download = f"download a whole one: hf download {model.example} --local-dir {folder}"
    if not path.is_dir():
        raise DataError(f"{named}: there is no such folder; {download}")
    config = _json(path / "config.json", named, download)
    found = config.get("model_type")
    if found not in (types := model.types or _image_text_types()):
        listed = f" ({' or '.join(types)})" if model.types else ""
        raise DataError(
            f"{named} is a folder of {found or 'a model that does not say its type'}, not of {model.name}{listed}: "
            f"name another folder, such as that of {model.example}"
        )
    if not [*path.glob("*.safetensors")]:
        pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        why = f"{pickles[0].name} is a pickle, which is not read" if pickles else "it has no *.safetensors"
        raise DataError(f"{named} has no weights: {why}; {download}")
    if not any((path / name).is_file() for name in _SETTINGS):
        raise DataError(f"{named} has no {_SETTINGS[0]}, which says how pictures are prepared; {download}")
    if model.texts and not any((path / name).is_file() for name in _TOKENIZERS):
        raise DataError(f"{named} has no {_TOKENIZERS[0]}; {download}")
    return path


def model_digest(folder: str, role: ModelRole) -> str:
    """A digest of the files that decide what a model gives. Raises DataError as `check_model_folder` does, and for
    weights that are cut short."""
    path = check_model_folder(folder, role)
    names = {*path.glob("*.json"), *path.glob("vocab.txt"), *path.glob("*.safetensors")}
    try:
        return files_digest(sorted(path for path in names if not path.name.endswith(".index.json")))
    except ValueError as error:
        raise _unreadable(folder, role, error) from error


def load_labeller(folder: str, device: str) -> tuple[Any, Any]:
    """An image-text-to-text model in the type of its weights, and its processor. Raises DataError as `load_model`
    does."""
    from transformers import AutoProcessor

    path = check_model_folder(folder, "labeller")
    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, "labeller", error) from error
    if processor.chat_template is None:
        raise DataError(
            f"{_MODELS['labeller'].key} = {folder} has no chat template, which says how it is asked: name a folder of "
            f"a model that was made to follow instructions, such as {_MODELS['labeller'].example}"
        )
    return load_model(folder, "labeller", device, dtype="auto"), processor


def load_model(
    folder: str, role: ModelRole, device: str, dtype: Literal["float32", "float16", "bfloat16", "auto"] = "float32"
) -> "PreTrainedModel":
    """A model for use alone; `auto`: in the type of its weights. Raises DataError as `check_model_folder` does, and for
    weights that can't be read or are not all there."""
    import transformers

    path = check_model_folder(folder, role)
    kind: Any = getattr(transformers, _MODELS[role].name)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what of it matters is an error below
    try:
        model, info = kind.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            dtype=dtype,
        )
    except Exception as error:  # of transformers, safetensors and torch, each with types of its own
        raise _unreadable(folder, role, error) from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = sorted(
        {*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])} - {*_MODELS[role].unused}
    )
    if missing:
        raise DataError(
            f"{_MODELS[role].key} = {folder}: {len(missing)} weights of {_MODELS[role].name} are missing or of another "
            f"shape, such as {missing[0]}; download it again"
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False).to(device)
    return loaded


def _image_text_types() -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def picture_settings(path: Path) -> dict[str, Any]:
    """How a folder's processor prepares pictures. Raises DataError where it does not say."""
    for name in _SETTINGS:
        if (path / name).is_file():
            content = _json(path / name, str(path), "download it again")
            settings: dict[str, Any] = content.get("image_processor", content)
            if "image_mean" in settings:
                return settings
    raise DataError(f"{path}: {_SETTINGS[0]} does not say how pictures are prepared; download it again")


def _json(path: Path, named: str, download: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{named} has no {path.name}; {download}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{named}: {path.name} is not JSON ({error}); {download}") from error
    if not isinstance(content, dict):
        raise DataError(f"{named}: {path.name} is no JSON object; {download}")
    return content


def _unreadable(folder: str, role: ModelRole, error: Exception) -> DataError:
    text = " ".join(str(error).split())[:300]
    return DataError(
        f"{_MODELS[role].key} = {folder} can't be loaded ({type(error).__name__}: {text}); download it again"
    )
