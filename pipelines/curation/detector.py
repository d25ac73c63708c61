"""Boxes of what words name, by Grounding DINO.

One word is asked at a time: of several words in one text the model joins neighbours into one phrase.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.curation.model_folders import check_model_folder, load_model

_FRAMES_AT_ONCE = 8

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the frame."""


@dataclass(frozen=True, slots=True)
class Detection:
    """A box of a word, with the detector's confidence, 0 to 1."""

    box: Box
    score: float


class Detector:
    """Grounding DINO from a local folder."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, GroundingDinoImageProcessorPil, GroundingDinoProcessor

        path = check_model_folder(folder, "detector")
        # Pillow's resizing everywhere: torchvision's differs by some levels
        pictures = GroundingDinoImageProcessorPil.from_pretrained(path, local_files_only=True)
        self.processor = GroundingDinoProcessor(pictures, AutoTokenizer.from_pretrained(path, local_files_only=True))
        self.model, self.device = load_model(folder, "detector", device), device

    def find(self, frames: Sequence[Pixels], word: str, least_score: float) -> list[list[Detection]]:
        """The boxes of a word in each of some frames [h,w,3] of one size, the surest first: those of more than
        `least_score`, within the frame, at least a pixel high and wide."""
        found: list[list[Detection]] = []
        for start in range(0, len(frames), _FRAMES_AT_ONCE):
            found += self._find([*frames[start : start + _FRAMES_AT_ONCE]], word, least_score)
        return found

    @torch.inference_mode()
    def _find(self, frames: list[Pixels], word: str, least_score: float) -> list[list[Detection]]:
        images = [Image.fromarray(frame) for frame in frames]
        text = [f"{word.strip().lower()}."] * len(frames)
        inputs = self.processor(images=images, text=text, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        sizes = [(frame.shape[0], frame.shape[1]) for frame in frames]
        results = self.processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=least_score, target_sizes=sizes
        )
        return [_sorted(result["boxes"], result["scores"], size) for result, size in zip(results, sizes, strict=True)]


def _sorted(boxes: torch.Tensor, scores: torch.Tensor, size: tuple[int, int]) -> list[Detection]:
    height, width = size
    limits = np.array([width, height, width, height], np.float32)
    clamped = np.clip(boxes.float().cpu().numpy().reshape(-1, 4), 0, limits)
    found = [
        Detection((float(left), float(top), float(right), float(bottom)), float(score))
        for (left, top, right, bottom), score in zip(clamped, scores.float().cpu().numpy(), strict=True)
        if right - left >= 1 and bottom - top >= 1
    ]
    return sorted(found, key=lambda one: (-one.score, one.box))


def box_overlaps(boxes: Sequence[Box]) -> NDArray[np.float64]:
    """Intersection over union of each two boxes, [n,n]."""
    sides = np.array(boxes, np.float64).reshape(-1, 4)
    areas = (sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1])
    least = np.minimum(sides[:, None, 2:], sides[None, :, 2:])
    most = np.maximum(sides[:, None, :2], sides[None, :, :2])
    shared = np.prod(np.clip(least - most, 0, None), axis=-1)
    union = areas[:, None] + areas[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def without_repeats(found: Sequence[Detection], most_overlap: float) -> list[Detection]:
    """Detections, the surest first, without those that overlap a surer one that is kept by more than `most_overlap`."""
    if not found:
        return []
    overlaps, kept = box_overlaps([one.box for one in found]), list[int]()
    for number in range(len(found)):
        if not (overlaps[number, kept] > most_overlap).any():
            kept.append(number)
    return [found[number] for number in kept]
