"""References carried to another domain by an image editor: made once, kept for good, shared by all models.

An edit is frozen under a digest of the picture, the instruction, the editor's model and revision, and the seed. One
that an editor refuses is kept as refused: it is missing for every model alike.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from domainshuttle.pipelines.endpoints.client import ChatClient, PictureForm, Question
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import Pixels, decode_image
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.platform.evaluation.metrics.choices import EditorChoices
from domainshuttle.platform.evaluation.metrics.metric import Models, Reference
from domainshuttle.platform.evaluation.metrics.weights import MetricModels

_PICTURE, _NOTE = "picture.png", "edit.json"


@dataclass(frozen=True)
class Edit:
    """An edited reference [h,w,3], or why there is none."""

    digest: str
    state: Literal["edited", "refused"]
    picture: Pixels | None
    reason: str = ""


class Editor(Protocol):
    """Edits a picture as an instruction says."""

    def edit(self, picture: Pixels, instruction: str) -> Pixels | str:
        """The edited picture, or why it is refused. Raises where nothing can be said, as for an endpoint that is
        away."""


class EditStore:
    """The edits of an evaluation's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, digest: str) -> Edit | None:
        """An edit that is kept. Raises DataError where its picture was changed."""
        place = self.folder / digest
        if not (place / _NOTE).is_file():
            return None
        note = json.loads((place / _NOTE).read_text())
        if note["state"] == "refused":
            return Edit(digest, "refused", None, note["reason"])
        data = (place / _PICTURE).read_bytes()
        if hashlib.sha256(data).hexdigest() != note["sha256"]:
            raise DataError(
                f"{place / _PICTURE} is not the edit that was frozen: restore it, or remove the folder and measure anew"
            )
        return Edit(digest, "edited", decode_image(data, str(place / _PICTURE)))

    def keep(self, digest: str, made: Pixels | str, about: Mapping[str, Any]) -> Edit:
        """Freezes what an editor gave; where another process was faster, its edit stands."""
        if (kept := self.find(digest)) is not None:
            return kept
        with atomic_folder(self.folder / digest) as aside:
            note = {**about, "state": "refused" if isinstance(made, str) else "edited"}
            if isinstance(made, str):
                note["reason"] = made
            else:
                buffer = io.BytesIO()
                Image.fromarray(made).save(buffer, "PNG")
                (aside / _PICTURE).write_bytes(buffer.getvalue())
                note["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
            (aside / _NOTE).write_text(json.dumps(note, indent=1, ensure_ascii=False))
        found = self.find(digest)
        assert found is not None
        return found


def edited(
    reference: Reference,
    choices: EditorChoices,
    weights: str,
    store: EditStore,
    editor: Callable[[], Editor],
) -> Edit | None:
    """The edit of a reference, made where it is not kept; None where nothing says how it is to be edited.

    `weights`: a digest of the editor's own, for one that runs here.
    """
    instruction = edit_instruction(reference, choices)
    if not instruction:
        return None
    about = {
        "reference": reference.digest, "instruction": instruction, "editor": editor_decisions(choices),
        "weights": weights,
    }  # fmt: skip
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()
    found = store.find(digest)
    return found if found is not None else store.keep(digest, editor().edit(reference.picture, instruction), about)


def edit_instruction(reference: Reference, choices: EditorChoices) -> str:
    """The case's own edit prompt; without one the template, where the wanted domain is known; else nothing."""
    if reference.edit_prompt.strip():
        return reference.edit_prompt.strip()
    if not reference.domain.strip() or not choices.template.strip():
        return ""
    subject = reference.word.strip() or "main subject"
    return choices.template.replace("{subject}", subject).replace("{domain}", reference.domain.strip())


def editor_decisions(choices: EditorChoices) -> dict[str, Any]:
    """What of an editor decides its pictures."""
    if choices.endpoint is None:
        return choices.model_dump(mode="json", exclude={"endpoint", "template"})
    endpoint = choices.endpoint
    return {
        "model": endpoint.model, "revision": choices.revision, "seed": choices.seed,
        "temperature": endpoint.temperature, "answers": endpoint.answers,
    }  # fmt: skip


class EndpointEditor:
    """An editor behind an endpoint whose chat answers with a picture."""

    def __init__(self, choices: EditorChoices, folder: Path) -> None:
        assert choices.endpoint is not None
        self.seed = choices.seed
        endpoint = choices.endpoint.model_copy(update={"seed": choices.seed, "logprobs": False})
        self.client = ChatClient(endpoint, folder)

    def edit(self, picture: Pixels, instruction: str) -> Pixels | str:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        answer = self.client.ask(Question("edit.v1", "", instruction, PictureForm, (buffer.getvalue(),)))
        if answer.state == "answered":
            return decode_image(answer.value, "the editor's answer")
        if answer.state == "refused":
            return answer.reason
        raise DataError(f"the editor's answer has no picture: {answer.reason}")


class QwenImageEditor:
    """Qwen-Image-Edit (the 2509 line) in this process, by diffusers."""

    def __init__(self, folder: str, choices: EditorChoices, device: str) -> None:
        import torch
        from diffusers import QwenImageEditPlusPipeline

        try:
            self.pipeline: Any = QwenImageEditPlusPipeline.from_pretrained(
                folder, dtype=getattr(torch, choices.dtype), local_files_only=True
            ).to(device)
        except Exception as error:  # of diffusers, transformers and their parts, each with types of its own
            text = " ".join(str(error).split())[:300]
            raise DataError(
                f"models.image_editor = {folder} can't be loaded ({type(error).__name__}: {text}); it is a folder of "
                "QwenImageEditPlusPipeline, and needs torchvision of the extra `eval`"
            ) from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.choices = choices

    def edit(self, picture: Pixels, instruction: str) -> Pixels | str:
        import torch

        options: dict[str, Any] = {} if self.choices.side is None else {
            "height": self.choices.side, "width": self.choices.side,
        }  # fmt: skip
        made = self.pipeline(
            image=[Image.fromarray(picture)],
            prompt=instruction,
            negative_prompt=" ",
            num_inference_steps=self.choices.steps,
            true_cfg_scale=self.choices.guidance,
            generator=torch.Generator("cpu").manual_seed(self.choices.seed),
            **options,
        ).images[0]
        return np.asarray(made.convert("RGB"))


def make_editor(choices: EditorChoices, folders: MetricModels, models: Models, metric: str) -> Editor:
    """The editor of these choices, loaded once a process."""
    if choices.endpoint is not None:
        assert models.folder is not None
        folder = edit_answers(models.folder)
        key = ("editor", choices.model_dump_json())
        return models.once(key, lambda: EndpointEditor(choices, folder))
    path = folders.folder("image_editor", metric)
    return models.once(("editor", path, choices.dtype), lambda: QwenImageEditor(path, choices, models.device))


def edit_folder(models: Models) -> Path:
    """Where the edits of an evaluation lie."""
    if models.folder is None:
        raise ValueError("edits are kept in the folder of the evaluation: Models(folder=)")
    return models.folder / "edits"


def edit_answers(folder: Path) -> Path:
    """Where what hosted editors answered lies in an evaluation's folder."""
    return folder / "edits" / "answers"
