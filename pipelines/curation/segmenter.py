"""Masks of what is in boxes, by SAM 2.

transformers prepares its pictures by torchvision alone, which has to match torch's build and is not needed otherwise:
the few lines of it that a box needs are here, and a test compares them with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.corpora.masks import Mask
from domainshuttle.pipelines.curation.detector import Box
from domainshuttle.pipelines.curation.model_folders import check_model_folder, load_model, picture_settings
from domainshuttle.pipelines.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """A mask [h,w] of a frame, and the segmenter's own guess of its overlap with the truth, 0 to 1."""

    mask: Mask
    score: float


class Segmenter:
    """SAM 2 from a local folder."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        path = check_model_folder(folder, "segmenter")
        settings = picture_settings(path)
        try:
            self.size = int(settings["size"]["height"]), int(settings["size"]["width"])
            self.mean, self.deviation = (
                torch.tensor(settings[name], dtype=torch.float32).reshape(3, 1, 1)
                for name in ("image_mean", "image_std")
            )
            scale = settings.get("rescale_factor")
            self.scale = 1 / 255 if scale is None else float(scale)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"models.segmenter = {folder}: its settings of pictures have no size, mean and deviation ({error}); "
                "download it again"
            ) from error
        self.model, self.device = load_model(folder, "segmenter", device), device

    @torch.inference_mode()
    def masks(self, frame: Pixels, boxes: Sequence[Box]) -> list[Segment]:
        """A mask of a frame [h,w,3] for each box."""
        if not boxes:
            return []
        height, width = frame.shape[:2]
        scale = torch.tensor([self.size[1] / width, self.size[0] / height] * 2)
        prompts = (torch.tensor(boxes, dtype=torch.float32) * scale)[None]
        outputs = self.model(
            pixel_values=self.prepared(frame).to(self.device),
            input_boxes=prompts.to(self.device),
            multimask_output=False,
        )
        logits = outputs.pred_masks[0].float().cpu()  # [n,1,h/4,w/4]
        found = functional.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[:, 0] > 0
        scores = outputs.iou_scores[0, :, 0].float().clamp(0, 1).cpu().tolist()
        return [Segment(mask.numpy(), score) for mask, score in zip(found, scores, strict=True)]

    def prepared(self, frame: Pixels) -> Tensor:
        """A frame [h,w,3] as the model takes it, [1,3,H,W]."""
        levels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
        resized = functional.interpolate(levels, self.size, mode="bilinear", antialias=True, align_corners=False)
        return (resized.float() * self.scale - self.mean) / self.deviation
