"""MS and motion amplitude: windows and artefacts against OpenS2V's rules, the flow against its published values."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_inputs import SHARED, clip, work
from PIL import Image

from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.evaluation.metrics.choices import MetricConfig, SmoothnessChoices
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Video, Work
from domainshuttle.platform.evaluation.metrics.motion import (
    MotionAmplitude,
    Smoothness,
    artefact_frames,
    motion_of,
    windows,
)
from domainshuttle.platform.evaluation.metrics.one_align import on_square
from domainshuttle.platform.evaluation.metrics.weights import MetricModels


def test_windows_are_padded_as_opens2v_pads_them() -> None:
    assert windows(5, 3) == [[0, 0, 0], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 3, 4]]
    assert windows(1, 3) == [[0, 0, 0]]
    assert windows(2, 3) == [[0, 0, 0], [0, 1, 1]]
    assert windows(6, 5) == [[0] * 5, [0] * 5, [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [2, 2, 3, 4, 5], [3, 3, 3, 4, 5]]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.001, 0.5))
def test_artefacts_are_both_frames_of_each_jump(scores: list[float], threshold: float) -> None:
    expected = {
        frame
        for frame in range(len(scores))
        for other in (frame - 1, frame + 1)
        if 0 <= other < len(scores) and abs(scores[frame] - scores[other]) > threshold
    }
    assert artefact_frames(scores, threshold) == sorted(expected)


class Scorer:
    """What a test says of each window, in place of a model of 16 GB."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def call(self, method: str, frames: np.ndarray, windows: list[list[int]]) -> list[float]:
        assert method == "scores" and len(windows) == len(frames)
        return self.values


def test_the_value_of_opens2vs_second_demo_clip_is_7_artefacts_of_69() -> None:
    golden = 0.8985507246376812
    scores = np.full(69, 0.5)
    scores[[10, 30, 31]] += 0.1  # two jumps by one frame: 3 artefacts; by two frames: 4
    models, folder = Models(), "/nowhere"
    models.once(("one_align", folder), lambda: Scorer(scores.tolist()))
    metric = Smoothness(SmoothnessChoices(), models, MetricModels(one_align=folder))
    found = metric.score(work(clip(frames=69)))
    assert found.value == pytest.approx(golden, abs=1e-12)
    assert found.details["artefacts"] == [9, 10, 11, 29, 30, 31, 32] and found.beside["mean_flow"] > 0


def test_code_of_a_models_folder_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    folders = MetricModels(one_align=str(tmp_path))
    with pytest.raises(DataError, match=r"ms\.runs_model_code: true"):
        Smoothness(SmoothnessChoices(), Models(), folders).check()
    allowed = Smoothness(SmoothnessChoices(runs_model_code=True), Models(), folders)
    allowed.check()
    (tmp_path / "modeling.py").write_text("a = 1")
    other = Smoothness(SmoothnessChoices(runs_model_code=True), Models(), folders)
    assert allowed.needs().packages and allowed.needs().licence
    assert other.digest != Smoothness(SmoothnessChoices(runs_model_code=True, threshold=0.1), Models(), folders).digest


def test_pictures_are_laid_on_a_square_of_the_mean_colour() -> None:
    square = np.asarray(on_square(Image.new("RGB", (40, 20), (1, 2, 3)), (9, 8, 7)))
    assert square.shape == (40, 40, 3)
    assert (square[10:30] == [1, 2, 3]).all() and (square[:10] == [9, 8, 7]).all() and (square[30:] == [9, 8, 7]).all()


def test_flow_is_the_distance_that_things_move() -> None:
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (14, 22, 3), np.uint8))
    large = np.asarray(coarse.resize((220, 140), Image.Resampling.BICUBIC))
    moved = np.stack([large[20:100, 20 + 2 * number : 160 + 2 * number] for number in range(5)])
    found = motion_of(moved)
    assert found["mean_flow"] == pytest.approx(2, abs=0.25)
    assert found["motion_fb"] == pytest.approx(1, abs=0.15)  # the mean of -2 across and 0 down
    still = MotionAmplitude(MetricConfig()).score(work(moved[[0] * 4]))
    assert still.value == pytest.approx(0, abs=5e-3)


@pytest.mark.nightly
@pytest.mark.skipif(not (SHARED / "media").is_dir(), reason="needs ../shared/media")
@pytest.mark.parametrize("name", ["singleface_3", "faceobj_14"])
def test_flow_is_what_opens2v_published(name: str) -> None:
    demo = SHARED / "media/opens2v_nexus/eval/demo_result"
    golden = json.loads((demo / "model_name_output_json/motion_amplitude.json").read_text())[name]["motion_fb"]
    video = Video.read(demo / f"model_name_input_video/{name}.mp4")
    found = MotionAmplitude(MetricConfig()).score(Work(MetricCase(name, ""), video))
    assert found.value == pytest.approx(golden, rel=1e-6)
