"""What pictures look like, as unit vectors whose products are similarities: DINOv2 for a subject's looks, CLIP for what
it is.

Pictures are laid on a white square first: the processors' own way, which cuts out the centre, loses heads and feet. It
is there too (`fit="crop"`), for metrics that are defined so.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from domainshuttle.model.pictures import Pixels, fit_reference
from domainshuttle.pipelines.curation.model_folders import check_model_folder, load_model
from domainshuttle.pipelines.errors import DataError

_AT_ONCE = 32

Vectors = NDArray[np.float32]
"""[n,d], each of length 1."""


class Embedder:
    """DINOv2 or CLIP from a local folder."""

    def __init__(
        self, folder: str, role: Literal["dino", "clip"], device: str = "cpu", fit: Literal["pad", "crop"] = "pad"
    ) -> None:
        import transformers

        path = check_model_folder(folder, role)
        kind: Any = transformers.BitImageProcessorPil if role == "dino" else transformers.CLIPImageProcessorPil
        processor: Any = kind.from_pretrained(path, local_files_only=True)
        size = processor.crop_size or processor.size
        try:
            self.side = int(size["height"])
        except (KeyError, TypeError) as error:
            raise DataError(f"models.{role} = {folder}: its processor names no size of its pictures") from error
        self.processor, self.role, self.device, self.fit = processor, role, device, fit
        self.model: Any = load_model(folder, role, device)

    def vectors(self, pictures: Sequence[Pixels]) -> Vectors:
        """[n,d] of n pictures [h,w,3]."""
        found = [self._vectors(pictures[start : start + _AT_ONCE]) for start in range(0, len(pictures), _AT_ONCE)]
        return np.concatenate(found) if found else np.empty((0, 0), np.float32)

    @torch.inference_mode()
    def _vectors(self, pictures: Sequence[Pixels]) -> Vectors:
        outputs = self.model(pixel_values=self.prepared(pictures).to(self.device))
        raw = outputs.last_hidden_state[:, 0] if self.role == "dino" else outputs.image_embeds
        unit: Vectors = torch.nn.functional.normalize(raw.float(), dim=-1).cpu().numpy()
        return unit

    def prepared(self, pictures: Sequence[Pixels]) -> torch.Tensor:
        """Pictures as the model takes them, [n,3,side,side]."""
        if self.fit == "crop":
            return self._processed(pictures)
        squares = [_on_square(picture) for picture in pictures]
        return self._processed(squares, size={"height": self.side, "width": self.side}, do_center_crop=False)

    def _processed(self, pictures: Sequence[Pixels], **more: Any) -> torch.Tensor:
        # told where the colours are, since it would guess it of a cut-out that is 3 pixels high
        prepared = self.processor([*pictures], input_data_format="channels_last", return_tensors="pt", **more)
        values: torch.Tensor = prepared["pixel_values"]
        return values


def _on_square(picture: Pixels) -> Pixels:
    side = max(picture.shape[:2])
    return fit_reference(picture, side, side)
