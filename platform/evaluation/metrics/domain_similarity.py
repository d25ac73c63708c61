"""NANO-CLIP and Qwen-CLIP: does the video look like its references, carried to the other domain?

An image editor carries each reference to the domain that is wanted (`edits`). CLIP's image vectors of 16 frames, whole
as they are, are compared with that of each edit by their cosine; the mean is over frames and references. Where an edit
was refused the case is missing, for all models alike.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.pipelines.media.decode import Pixels
from domainshuttle.platform.evaluation.metrics.choices import DomainSimilarityChoices
from domainshuttle.platform.evaluation.metrics.edits import Edit, EditStore, edit_folder, edited, make_editor
from domainshuttle.platform.evaluation.metrics.metric import (
    Direction,
    Metric,
    MetricCase,
    Needs,
    Reference,
    Score,
    Trial,
    Work,
)


class DomainSimilarity(Metric[DomainSimilarityChoices]):
    """What the two share, but for their editor."""

    source = "the paper; editor, instructions and CLIP's size are choices"
    code_version = 1
    expects: ClassVar[Mapping[Trial, Direction]] = {
        "other_reference": "falls", "still_edit": "ceiling",
        "shuffled": "same", "no_references": "falls",
    }  # fmt: skip

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("clip",) if self.config.editor.endpoint is not None else ("clip", "image_editor")

    def needs(self) -> Needs:
        endpoint = self.config.editor.endpoint
        return Needs(gpus=1.0) if endpoint is None else Needs(gpus=0.1, endpoint=endpoint.url)

    def check(self) -> None:
        super().check()
        if self.config.editor.endpoint is not None:
            self.config.editor.endpoint.key()

    def measure(self, work: Work) -> Score:
        wanted = [one for one in work.case.references if not one.background]
        edits = [self._edit(one) for one in wanted]
        details: dict[str, Any] = {
            "edits": [None if one is None else {"digest": one.digest, "state": one.state} for one in edits]
        }
        if not wanted or any(one is None for one in edits):
            why = "no reference of a subject" if not wanted else "a reference without edit prompt and wanted domain"
            return Score("missing", reason=f"the case has {why}", details=details)
        refused = next((one for one in edits if one is not None and one.picture is None), None)
        if refused is not None:
            return Score("missing", reason=f"the edit of a reference is refused: {refused.reason}", details=details)
        folder, fit = self.model_folder("clip"), self.config.fit
        clip = self.models.once(("clip", folder, fit), lambda: Embedder(folder, "clip", self.models.device, fit))
        frames = work.once(
            ("clip", folder, fit, self.config.frames), lambda: clip.vectors(work.frames(self.config.frames))
        )
        pictures = [one.picture for one in edits if one is not None and one.picture is not None]
        table = frames.astype(np.float64) @ clip.vectors(pictures).T.astype(np.float64)
        values = table.max(axis=1) if self.config.references == "max" else table.mean(axis=1)
        details |= {"frames": values.tolist(), "references": table.mean(axis=0).tolist()}
        return Score("measured", float(values.mean()), details=details)

    def edited_references(self, case: MetricCase) -> list[Pixels]:
        edits = [self._edit(one) for one in case.references if not one.background]
        return [one.picture for one in edits if one is not None and one.picture is not None]

    def _edit(self, reference: Reference) -> Edit | None:
        choices = self.config.editor
        weights = self.weights().get("image_editor", "")
        store = EditStore(edit_folder(self.models))
        return edited(
            reference, choices, weights, store, lambda: make_editor(choices, self.folders, self.models, self.name)
        )


class NanoSimilarity(DomainSimilarity):
    """The paper's editor is Nano Banana Pro, behind an endpoint. 60K of the pictures of stage 1 are from its line."""

    name = "nano_clip"
    title = "NANO-CLIP"


class QwenSimilarity(DomainSimilarity):
    """The paper's editor is Qwen-Image-Edit: in process from models.image_editor, or behind an endpoint."""

    name = "qwen_clip"
    title = "Qwen-CLIP"
