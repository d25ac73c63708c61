"""Small videos and cases for the tests of metrics."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Reference, Video, Work

SHARED = Path(__file__).resolve().parents[2] / "shared"


def clip(seed: int = 0, frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A square of one colour that moves over noise, [frames,height,width,3]."""
    random = np.random.default_rng(seed)
    found = np.repeat(random.integers(90, 110, (1, height, width, 3), np.uint8), frames, 0)
    colour = random.integers(0, 256, 3)
    for number in range(frames):
        left = number % (width - 12)
        found[number, 8:20, left : left + 12] = colour
    return found


def work(frames: np.ndarray, *references: np.ndarray, **options: Any) -> Work:
    """A case of references without words, and its video."""
    case = MetricCase("case", "a square", tuple(Reference(one) for one in references), **options)
    return Work(case, Video(frames, 8.0, hashlib.sha256(frames.tobytes()).hexdigest()))
