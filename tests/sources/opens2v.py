"""OpenS2V-5M in the form of its files, made small."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from built import encoded

from domainshuttle.pipelines.corpora.opens2v import OpenS2VConfig
from domainshuttle.pipelines.media.decode import encode_mp4


def mask(top: int, bottom: int, left: int, right: int) -> dict[str, Any]:
    drawn = np.zeros((64, 96), bool)
    drawn[top:bottom, left:right] = True
    return {"size": [64, 96], "counts": encoded(drawn), "score": [0.9]}


def entry(**changes: Any) -> dict[str, Any]:
    """An entry in the form of the files, of a clip of 12 frames of 112x72 of which 9 of 96x64 are wanted."""
    words = ["person", "dog"]
    masks = [mask(0, 40, 0, 40), mask(30, 64, 50, 96)]
    content = {
        "metadata": {
            "path": "a.mp4", "cut": [0, 12], "face_cut": [2, 11], "crop": [8, 104, 4, 68], "fps": 8.0,
            "num_frames": 9, "resolution": {"height": 64, "width": 96}, "tech": 2.0, "motion": 0.1,
            "aesthetic": 5.0, "face_cap_qwen": "A person and a dog.",
        },
        "word_tags": {"background": [], "subject": ["person", "dog"], "object": [], "pre_define": ["person"]},
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": 2,
                "annotations": [{"class_name": word, "bbox": [0.0, 0.0, 5.0, 5.0], "gme_score": 0.4, "aes_score": 5.0}
                                for word in words],
                "box_format": "xyxy", "img_width": 96, "img_height": 64,
            },
            "mask_map": {str(n): {"class_name": word} for n, word in enumerate(words, 1)},
            "mask_annotation": {"2": {str(n): one for n, one in enumerate(masks, 1)}},
        },
    }  # fmt: skip
    content["metadata"].update(changes)
    return content


def clip() -> np.ndarray:
    y, x = np.mgrid[:72, :112]
    frames = [np.stack([x * 2, y * 3, np.full_like(x, 20 * number)], -1) for number in range(12)]
    return np.array(frames, np.uint8)


def source(root: Path, entries: Any) -> OpenS2VConfig:
    (root / "Jsons" / "mask_and_bbox_High-Quality").mkdir(parents=True)
    (root / "Jsons" / "mask_and_bbox_High-Quality" / "total_part1.json").write_text(json.dumps(entries))
    (root / "Videos" / "total_part1" / "deep").mkdir(parents=True)
    (root / "Videos" / "total_part1" / "deep" / "a.mp4").write_bytes(encode_mp4(clip(), 8))
    return OpenS2VConfig(folder=str(root))
