"""Metrics of pixels alone, which need no model and no download: the desk-size set, for the demo and for tests.

They are no stand-ins for the paper's: each says one plain thing, and the sensitivity tests say whether it does.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from domainshuttle.pipelines.media.decode import Pixels
from domainshuttle.platform.evaluation.metrics.choices import FrameChoices, MetricConfig
from domainshuttle.platform.evaluation.metrics.hues import describe
from domainshuttle.platform.evaluation.metrics.metric import Direction, Metric, Score, Trial, Work

Luma = NDArray[np.float64]
"""[h,w], 0 to 1."""


class HueIdentity(Metric[FrameChoices]):
    """How near the video's colours are to each reference's: the Bhattacharyya coefficient of hue histograms weighted by
    chroma, 0 to 1; mean over the references that have colour. That of another case is the
    sensitivity test `other_reference`."""

    name = "hue_identity"
    title = "Hue identity"
    source = "ours: the demo's identity test, case by case"
    code_version = 2
    expects: ClassVar[Mapping[Trial, Direction]] = {
        "other_reference": "falls", "still_reference": "ceiling", "shuffled": "same", "no_references": "falls",
    }  # fmt: skip

    def measure(self, work: Work) -> Score:
        if not work.case.references:
            return Score("missing", reason="the case has no reference")
        frames = np.stack(work.frames(self.config.frames))
        found = work.once(("hues", self.config.frames), lambda: describe(frames))
        wanted = [describe(one.picture[None]) for one in work.case.references]
        values = [float(found @ one) if one.any() else None for one in wanted]
        coloured = [value for value in values if value is not None]
        if not coloured:
            return Score("missing", reason="no reference has any colour")
        return Score("measured", float(np.mean(coloured)), details={"references": values})


class Steadiness(Metric[MetricConfig]):
    """How little neighbouring frames differ: 1 - mean |luma difference|; all frames. A still has 1, so the motion
    stands beside it."""

    name = "steadiness"
    title = "Steadiness"
    source = "ours"
    code_version = 1
    expects: ClassVar[Mapping[Trial, Direction]] = {
        "shuffled": "falls", "noisy": "falls", "still_reference": "ceiling", "recompressed": "same",
    }  # fmt: skip

    def measure(self, work: Work) -> Score:
        if len(work.video.frames) < 2:
            return Score("missing", reason="the video has one frame")
        first = last = luma_of(work.video.frames[0])
        found = []
        for frame in work.video.frames[1:]:  # one at a time: a clip of 1080p takes gigabytes as floats
            before, last = last, luma_of(frame)
            found.append(np.abs(last - before).mean())
        steps, far = np.array(found), float(np.abs(last - first).mean())
        return Score(
            "measured", float(1 - steps.mean()), beside={"first_to_last": far}, details={"steps": steps.tolist()}
        )


class Sharpness(Metric[FrameChoices]):
    """How much of the detail a 3x3 mean takes away: 1 - gradient energy after it / before; mean over frames. A frame of
    one colour has no detail and counts 0."""

    name = "sharpness"
    title = "Sharpness"
    source = "ours"
    code_version = 1
    expects: ClassVar[Mapping[Trial, Direction]] = {"blurred": "falls", "shuffled": "same"}

    def measure(self, work: Work) -> Score:
        frames = work.frames(self.config.frames)
        height, width = frames[0].shape[:2]
        if min(height, width) < 4:
            return Score("missing", reason=f"frames of {width}x{height} pixels: at least 4x4 are needed")
        lumas = (luma_of(frame) for frame in frames)
        before, after = np.array([(_energy(luma), _energy(_mean_3x3(luma))) for luma in lumas]).T
        values = np.where(before > 1e-9, 1 - after / np.maximum(before, 1e-9), 0.0)
        return Score("measured", float(values.mean()), details={"frames": values.tolist()})


def luma_of(frame: Pixels) -> Luma:
    """Brightness of [h,w,3] by BT.601."""
    return frame @ (np.array([0.299, 0.587, 0.114]) / 255)


def _energy(luma: Luma) -> np.float64:
    """Mean square of the steps to the right and down."""
    return (np.diff(luma, axis=1) ** 2).mean() + (np.diff(luma, axis=0) ** 2).mean()


def _mean_3x3(luma: Luma) -> Luma:
    """The mean of each pixel and its 8 neighbours, without the border."""
    height, width = luma.shape[0] - 2, luma.shape[1] - 2
    return np.sum([luma[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0) / 9
