"""MS: how smoothly a video moves, as OpenS2V-Eval 1.1 has it; and how much it moves, which has to stand beside.

For every frame a window of 3 is scored by one-align ("how would you rate the quality of this video?", five words from
excellent to bad: 1, .75, .5, .25, 0). Where neighbours differ by more than 0.025 both frames are artefacts;
MS = 1 - artefacts / frames. It depends on the number of frames and their rate, and a frozen clip has 1. It is not
VBench's motion smoothness, which interpolates frames.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import Pixels
from domainshuttle.platform.evaluation.metrics.choices import MetricConfig, SmoothnessChoices
from domainshuttle.platform.evaluation.metrics.isolated import Isolated
from domainshuttle.platform.evaluation.metrics.metric import Direction, Metric, Needs, Score, Trial, Work
from domainshuttle.platform.evaluation.metrics.one_align import LICENCE, PACKAGES, OneAlign

_SIDE = 16
"""Width that flow is averaged to, as OpenS2V-Eval does."""


class Smoothness(Metric[SmoothnessChoices]):
    """MS with its motion amplitude."""

    name = "ms"
    title = "MS"
    source = "OpenS2V-Eval 1.1 (q-future/one-align)"
    code_version = 1
    uses = ("one_align",)
    expects: ClassVar[Mapping[Trial, Direction]] = {
        "shuffled": "falls", "still_reference": "ceiling", "recompressed": "same",
    }  # fmt: skip

    def needs(self) -> Needs:
        return Needs(gpus=self.config.gpus, packages=PACKAGES, licence=LICENCE)

    def check(self) -> None:
        if not self.config.runs_model_code:
            raise DataError(
                "ms runs Python files of the folder models.one_align in an environment of its own "
                f"({', '.join(PACKAGES)}; {LICENCE}): read them, then allow it with ms.runs_model_code: true, or leave "
                "the metric out"
            )
        super().check()
        _cv2()

    def measure(self, work: Work) -> Score:
        frames = work.video.frames
        amount = work.once("motion", lambda: motion_of(frames))
        folder = self.model_folder("one_align")
        at_once = self.config.at_once
        model = self.models.once(
            ("one_align", folder), lambda: Isolated(self.label, OneAlign, (folder, at_once), self.needs())
        )
        scores: list[float] = model.call("scores", frames, windows(len(frames), self.config.window))
        artefacts = artefact_frames(scores, self.config.threshold)
        value = 1 - len(artefacts) / len(scores)
        return Score("measured", value, beside=amount, details={"scores": scores, "artefacts": artefacts})


class MotionAmplitude(Metric[MetricConfig]):
    """How much a video moves: the mean of Farneback's optical flow over all frames, which OpenS2V-Eval takes with its
    signs, so that opposite motions cancel; the mean length stands beside. Neither is better when higher."""

    name = "motion"
    title = "Motion amplitude"
    source = "OpenS2V-Eval 1.1 (motion_fb)"
    code_version = 1
    expects: ClassVar[Mapping[Trial, Direction]] = {}

    def check(self) -> None:
        _cv2()

    def measure(self, work: Work) -> Score:
        amount = work.once("motion", lambda: motion_of(work.video.frames))
        return Score("measured", amount["motion_fb"], beside={"mean_flow": amount["mean_flow"]})


def windows(count: int, size: int) -> list[list[int]]:
    """The window around each frame, as OpenS2V-Eval pads it: those before the middle of the first window are their own
    first frame alone; at the end the first frame is repeated."""
    left = (size - 1) // 2
    right = size - 1 - left
    made = []
    for frame in range(count):
        first = max(0, frame - left)
        numbers = list(range(first, min(count, frame + right + 1)))
        if frame < left:
            made.append([numbers[0]] * size)
            continue
        while len(numbers) < size:
            numbers = [*numbers, numbers[-1]] if first == 0 else [numbers[0], *numbers]
        made.append(numbers)
    return made


def artefact_frames(scores: Sequence[float], threshold: float) -> list[int]:
    """Both frames of each two neighbours whose scores differ by more than `threshold`."""
    jumps = np.flatnonzero(np.abs(np.diff(np.asarray(scores))) > threshold)
    return sorted({*jumps.tolist(), *(jumps + 1).tolist()})


def motion_of(frames: Pixels) -> dict[str, float]:
    """Pixels a frame: `motion_fb`, the absolute mean of the flow's two components, and the flow's mean length."""
    cv2, maps = _cv2(), list[NDArray[np.float32]]()
    if len(frames) < 2:
        return {"motion_fb": 0.0, "mean_flow": 0.0}
    # OpenS2V-Eval reads RGB as if it were BGR: the weights of red and blue are exchanged
    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames]
    for one, other in pairwise(grey):
        flow = cv2.calcOpticalFlowFarneback(one, other, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        height = max(1, int(flow.shape[0] * (_SIDE / flow.shape[1])))
        maps.append(cv2.resize(flow, (_SIDE, height), interpolation=cv2.INTER_AREA))
    every = np.array(maps)
    lengths = np.linalg.norm(every, axis=-1)
    return {"motion_fb": abs(float(np.mean(np.mean(every, axis=0)))), "mean_flow": float(lengths.mean())}


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            "the flow of ms and motion needs OpenCV: install the extra `eval` (pip install 'domainshuttle[eval]')"
        ) from error
    return cv2
