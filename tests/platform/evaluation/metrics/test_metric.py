"""What every metric is given and gives, and the desk-size set against plain definitions."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_inputs import clip, work

from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.evaluation.metrics.choices import FrameChoices, MetricConfig
from domainshuttle.platform.evaluation.metrics.config import DESK, MetricsConfig
from domainshuttle.platform.evaluation.metrics.metric import (
    Metric,
    MetricCase,
    Models,
    Score,
    Video,
    Work,
    frame_numbers,
)
from domainshuttle.platform.evaluation.metrics.pixels import HueIdentity, Sharpness, Steadiness


def test_frames_are_those_of_opens2v() -> None:
    assert frame_numbers(81, 16).tolist() == [0, 5, 10, 16, 21, 26, 32, 37, 42, 48, 53, 58, 64, 69, 74, 80]
    assert frame_numbers(5, None).tolist() == [0, 1, 2, 3, 4]
    assert frame_numbers(1, 16).tolist() == [0] * 16


@given(st.integers(1, 400), st.integers(1, 64))
def test_frames_are_even_from_first_to_last(count: int, sampled: int) -> None:
    numbers = frame_numbers(count, sampled)
    assert numbers.tolist() == np.linspace(0, count - 1, sampled, dtype=int).tolist()
    assert len(numbers) == sampled and numbers[0] == 0 and (sampled == 1 or numbers[-1] == count - 1)
    assert (np.diff(numbers) >= 0).all()


def test_a_video_is_every_frame_that_a_decoder_gives(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_mp4(clip(frames=13), 7.0))
    video = Video.read(path)
    with av.open(str(path)) as container:
        every = sum(1 for _ in container.decode(video=0))
    assert video.frames.shape == (every, 32, 48, 3) and every == 13 and video.frames.dtype == np.uint8
    assert video.fps == pytest.approx(7)
    assert video.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.mp4"):
        Video.read(path)
    with pytest.raises(DataError, match="no such file"):
        Video.read(tmp_path / "b.mp4")


def test_what_metrics_share_is_made_once() -> None:
    one, made = work(clip()), list[int]()
    for _ in range(3):
        assert one.once(("masks", 16), lambda: made.append(1) or "masks") == "masks"
    assert made == [1]
    models = Models()
    assert models.once("a", dict) is models.once("a", dict)


def test_a_score_is_a_value_or_a_reason_and_outlives_json() -> None:
    score = Score("measured", 0.5, beside={"detection_rate": 1.0}, details={"frames": [0.5]})
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
    for arguments in (("measured",), ("measured", float("nan")), ("failed", 0.0, "why"), ("missing",)):
        with pytest.raises(ValueError):
            Score(*arguments)  # type: ignore[arg-type]


class Faulty(Metric[MetricConfig]):
    name: ClassVar = "faulty"
    title: ClassVar = "Faulty"
    source: ClassVar = "a test"
    code_version: ClassVar = 1
    error: Exception

    def measure(self, work: Work) -> Score:
        raise self.error


def test_a_fault_of_one_case_is_its_score_and_one_of_the_place_is_raised() -> None:
    metric = Faulty(MetricConfig())
    for error in (ValueError("shape"), DataError("shape"), RuntimeError("shape")):
        metric.error = error
        found = metric.score(work(clip()))
        assert found.state == "failed" and found.value is None and "shape" in found.reason
    metric.error = StorageError("the endpoint is away")
    with pytest.raises(StorageError):
        metric.score(work(clip()))


def test_a_digest_is_of_what_decides_a_value_alone() -> None:
    one = HueIdentity(FrameChoices())
    assert one.digest == HueIdentity(FrameChoices(frames=16)).digest
    assert one.digest == HueIdentity(FrameChoices(cases="in_domain")).digest
    assert one.digest != HueIdentity(FrameChoices(frames=8)).digest
    assert one.digest != Sharpness(FrameChoices()).digest

    class Newer(HueIdentity):
        code_version: ClassVar = HueIdentity.code_version + 1

    assert one.digest != Newer(FrameChoices()).digest


def test_cases_are_chosen_by_their_domains() -> None:
    inside, across = MetricCase("a", "", split="in_domain"), MetricCase("b", "", split="mixed")
    for wanted, expected in (("all", (True, True)), ("in_domain", (True, False)), ("cross_domain", (False, True))):
        metric = HueIdentity(FrameChoices(cases=wanted))
        assert (metric.applies(inside), metric.applies(across)) == expected


def test_the_desk_set_is_of_the_named_metrics() -> None:
    assert [metric.name for metric in DESK.build()] == ["hue_identity", "steadiness", "sharpness"]
    assert [metric.name for metric in MetricsConfig.model_validate({"sharpness": {"frames": 4}}).build()] == [
        "sharpness"
    ]
    assert all(metric.score(work(clip(), clip(1)[0])).state == "measured" for metric in DESK.build())


def test_hue_identity_is_highest_for_the_own_reference() -> None:
    metric = HueIdentity(FrameChoices())
    clips = [clip(seed) for seed in range(4)]
    values = [[metric.measure(work(one, other[0])).value for other in clips] for one in clips]
    assert np.argmax(values, axis=1).tolist() == [0, 1, 2, 3]  # type: ignore[arg-type]
    still = np.repeat(clips[0][:1], 5, 0)
    assert metric.measure(work(still, clips[0][0])).value == pytest.approx(1, abs=1e-9)
    assert metric.measure(work(clips[0])).state == "missing"
    grey = np.full_like(clips[0][0], 128)  # says nothing of hues: neither 0 nor 1
    assert metric.measure(work(clips[0], grey)).reason == "no reference has any colour"
    assert metric.measure(work(clips[0], clips[0][0], grey)).value == values[0][0]
    assert metric.measure(work(np.repeat(grey[None], 5, 0), clips[0][0])).value == 0


def test_steadiness_is_the_mean_step_of_luma() -> None:
    frames = clip()
    steps = [
        np.abs((frames[n + 1].astype(float) - frames[n].astype(float)) @ np.array([0.299, 0.587, 0.114]) / 255).mean()
        for n in range(len(frames) - 1)
    ]
    metric = Steadiness(MetricConfig())
    assert metric.measure(work(frames)).value == pytest.approx(1 - np.mean(steps), abs=1e-12)
    still = metric.measure(work(frames[[0] * 5]))
    assert still.value == 1 and still.beside["first_to_last"] == 0
    assert metric.measure(work(frames[:1])).state == "missing"


def test_sharpness_is_what_a_mean_takes_away() -> None:
    from scipy.ndimage import uniform_filter

    metric, frames = Sharpness(FrameChoices(frames=3)), clip(frames=3)
    values = []
    for frame in frames:
        luma = frame.astype(float) @ np.array([0.299, 0.587, 0.114]) / 255
        smooth = uniform_filter(luma, 3)[1:-1, 1:-1]
        before, after = (
            (np.diff(one, axis=1) ** 2).mean() + (np.diff(one, axis=0) ** 2).mean() for one in (luma, smooth)
        )
        values.append(1 - after / before)
    assert metric.measure(work(frames)).value == pytest.approx(np.mean(values), abs=1e-9)
    assert metric.measure(work(np.full((3, 8, 8, 3), 7, np.uint8))).value == 0


def test_variants_are_the_same_metrics_with_other_choices_and_names(tmp_path: Path) -> None:
    config = MetricsConfig.model_validate(
        {
            "models": {"dino": "/m/dino", "clip": "/m/clip"},
            "clip_i": {},
            "variants": {"large": {"models": {"clip": "/m/large"}, "clip_i": {"not_found": "left_out"}}},
        }
    )
    first, second = config.build()
    assert (first.label, second.label) == ("clip_i", "clip_i.large")
    assert (first.folders.clip, second.folders.clip, second.folders.dino) == ("/m/clip", "/m/large", "/m/dino")
    assert second.config.not_found == "left_out" and first.config.not_found == "zero"
    with pytest.raises(DataError, match=r"clip_i needs models\.detector"):
        first.check()


def test_a_long_clip_is_not_held_as_floats() -> None:
    """Baselines come in 1080p: eight times their pixels' bytes would not fit into memory."""
    frames = np.random.default_rng(0).integers(0, 255, (40, 90, 160, 3), dtype=np.uint8)
    one = Work(MetricCase("a", ""), Video(frames, 8.0, ""))
    for metric in (Steadiness(MetricConfig()), Sharpness(FrameChoices(frames=40))):
        tracemalloc.start()
        try:
            assert metric.measure(one).state == "measured"
            assert tracemalloc.get_traced_memory()[1] < frames.nbytes * 1.5
        finally:
            tracemalloc.stop()
