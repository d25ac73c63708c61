"""Sensitivity tests: they pass a metric that measures what it says, and flag one that does not."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metric_inputs import clip
from PIL import Image

from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.evaluation.cases import EvaluationCase, ReferencePicture
from domainshuttle.platform.evaluation.metrics.config import DESK
from domainshuttle.platform.evaluation.metrics.metric import Metric, MetricCase, Reference, Video, Work
from domainshuttle.platform.evaluation.scoring import score_missing
from domainshuttle.platform.evaluation.sensitivity import (
    Sensitivity,
    SensitivitySettings,
    altered_work,
    choose_column,
    judge_trial,
)
from domainshuttle.platform.evaluation.store import ResultStore
from domainshuttle.platform.evaluation.videos import Clip, Column

COUNT = 8


def coloured(hue: float, frames: int = 9) -> np.ndarray:
    """A square of a hue that moves over grey noise."""
    found = clip(3, frames, 32, 48)
    square = np.asarray(Image.new("HSV", (12, 12), (int(hue * 255), 220, 200)).convert("RGB"))
    for number in range(frames):
        found[number, 8:20, number : number + 12] = square
    return found


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[EvaluationCase], list[Column], list[Clip]]:
    """Cases of one colour each, whose videos show it, and videos that were made without a reference."""
    folder = tmp_path_factory.mktemp("evaluation")
    cases, clips = [], []
    columns = [Column("model", "", True), Column("model~none", "", True, "none", "model")]
    for number in range(COUNT):
        frames = coloured(number / COUNT)
        picture = folder / f"{number}.png"
        Image.fromarray(frames[0, 8:20, 0:12]).save(picture)
        sha256 = hashlib.sha256(picture.read_bytes()).hexdigest()
        cases.append(
            EvaluationCase(f"c{number}", "in_domain", "a square", (ReferencePicture(picture, sha256, 0, "", -1),))
        )
        for column, shown in (("model", frames), ("model~none", coloured(((number + 3) % COUNT) / COUNT))):
            path = folder / f"{column}-{number}.mp4"
            path.write_bytes(encode_mp4(shown, 8, crf=10))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            clips.append(Clip(column, f"c{number}", 0, path, digest, "", {}))
    return folder, cases, columns, clips


def measured(evaluation: Any, metrics: list[Metric[Any]], folder: Path, **settings: Any) -> tuple[Sensitivity, int]:
    _, cases, columns, clips = evaluation
    store = ResultStore(folder)
    score_missing(cases, clips, DESK, store, None, folder)
    tests = Sensitivity(
        SensitivitySettings(**settings), cases, columns, clips, metrics, store, ResultStore(folder / "altered")
    )
    return tests, tests.measure(DESK, folder, None)


def test_the_desk_set_passes_its_tests_and_nothing_is_measured_twice(evaluation: Any, tmp_path: Path) -> None:
    tests, count = measured(evaluation, DESK.build(), tmp_path)
    verdicts = {(one.metric, one.trial): one for one in tests.verdicts()}
    failed = [one for one in verdicts.values() if one.state != "passed"]
    assert not failed
    assert count == COUNT * (len(verdicts) - 1)  # the floor's videos are the control's, and measured already
    assert verdicts["hue_identity", "other_reference"].hits == 1
    assert verdicts["hue_identity", "still_reference"].altered > verdicts["hue_identity", "still_reference"].own
    assert verdicts["hue_identity", "no_references"].cases == COUNT
    again, none = measured(evaluation, DESK.build(), tmp_path)
    assert none == 0 and again.verdicts() == tests.verdicts()


def test_a_metric_that_does_not_look_at_references_is_flagged() -> None:
    settings = SensitivitySettings()
    values = np.linspace(0.2, 0.8, 9)
    verdict = judge_trial("blind", "other_reference", "falls", values, values, settings)
    assert (verdict.state, verdict.hits, verdict.auc) == ("failed", 0.5, 0.5)


def test_verdicts_are_those_of_their_definitions() -> None:
    settings, random = SensitivitySettings(), np.random.default_rng(2)
    own = random.uniform(0.4, 0.9, 10)
    auc = judge_trial("m", "blurred", "falls", own, own[::-1] - 0.05, settings).auc
    assert auc == pytest.approx(np.mean([[a > b - 0.05 for b in own] for a in own]))
    states = {
        ("falls", 0.1): "passed", ("falls", -0.1): "failed", ("same", 0.019): "passed", ("same", -0.03): "failed",
        ("ceiling", -0.1): "passed", ("ceiling", 0.0): "passed", ("ceiling", 0.1): "failed",
    }  # fmt: skip
    for (expected, fall), state in states.items():
        assert judge_trial("m", "noisy", expected, own, own - fall, settings).state == state, (expected, fall)  # type: ignore[arg-type]
    for left, state in ((0.5, "passed"), (0.6, "passed"), (1.0, "failed"), (0.2, "failed")):
        assert judge_trial("m", "noisy", "halves", own, own * left, settings).state == state
    assert judge_trial("m", "noisy", "falls", own[:4], own[:4] - 1, settings).state == "undecided"
    none = judge_trial("m", "no_references", "falls", own[:0], own[:0], settings)
    assert none.state == "undecided" and "`none` to controls" in none.reason
    # one-sided sign test at 5%: 8 of 10 is p = 0.0547, 9 of 10 is 0.0107
    for wins, state in ((8, "failed"), (9, "passed")):
        altered = own - np.where(np.arange(10) < wins, 0.1, -0.1)
        assert judge_trial("m", "noisy", "falls", own, altered, settings).state == state


def test_the_tests_take_the_real_clips_where_there_are_some() -> None:
    model, control, real = Column("a", "", True), Column("a~none", "", True, "none", "a"), Column("real", "", False)
    assert choose_column([model, control], SensitivitySettings()) == model
    assert choose_column([model, control, real], SensitivitySettings()) == real
    assert choose_column([model, control, real], SensitivitySettings(column="a")) == model
    assert choose_column([], SensitivitySettings()) is None
    with pytest.raises(ConfigError, match=r"no model of that name, there are: a, real"):
        choose_column([model, real], SensitivitySettings(column="A"))


def altered(trial: Any, frames: np.ndarray, *references: np.ndarray) -> np.ndarray:
    case = MetricCase("a", "", tuple(Reference(one, "cup", n) for n, one in enumerate(references)))
    work = altered_work(trial, Work(case, Video(frames, 8.0, "")), None, SensitivitySettings())
    assert work is not None and work.video.digest
    return work.video.frames


def test_what_is_altered_is_what_the_name_says() -> None:
    frames = clip(1, 12, 32, 48)
    shuffled = altered("shuffled", frames)
    assert sorted(one.tobytes() for one in shuffled) == sorted(one.tobytes() for one in frames)
    assert not np.array_equal(shuffled, frames) and np.array_equal(shuffled, altered("shuffled", frames))
    half = altered("half_without_subject", frames)
    assert np.array_equal(half[:6], frames[:6]) and len(np.unique(half[6:].reshape(-1, 3), axis=0)) == 1
    noisy = altered("noisy", np.full((4, 64, 64, 3), 128, np.uint8)).astype(float) - 128
    assert abs(noisy.mean()) < 1 and noisy.std() == pytest.approx(25, abs=0.5)
    energy = [np.abs(np.diff(one.astype(int), axis=2)).mean() for one in (frames, altered("blurred", frames))]
    assert energy[1] < energy[0] / 1.5
    coded = altered("recompressed", frames[:, :31, :47])
    assert coded.shape == (12, 30, 46, 3) and 0 < np.abs(coded.astype(int) - frames[:, :30, :46]).mean() < 12


def test_stills_show_every_reference_side_by_side() -> None:
    red, blue = np.full((32, 24, 3), (200, 0, 0), np.uint8), np.full((32, 24, 3), (0, 0, 200), np.uint8)
    still = altered("still_reference", clip(1, 5, 32, 48), red, blue)
    assert still.shape == (5, 32, 48, 3)
    assert (still[:, :, :24] == [200, 0, 0]).all() and (still[:, :, 24:] == [0, 0, 200]).all()


def test_another_reference_has_the_words_of_the_own() -> None:
    own = MetricCase("a", "one", (Reference(clip(0)[0], "cup", 0), Reference(clip(1)[0], "park", 1, background=True)))
    other = MetricCase("b", "two", (Reference(clip(2)[0], "dog", 0),))
    work = Work(own, Video(clip(), 8.0, "x"))
    swapped = altered_work("other_reference", work, other, SensitivitySettings())
    assert swapped is not None and swapped.video is work.video
    first, background = swapped.case.references
    assert first.word == "cup" and np.array_equal(first.picture, other.references[0].picture)
    assert background is own.references[1]
    prompted = altered_work("other_prompt", work, other, SensitivitySettings())
    assert prompted is not None and prompted.case.prompt == "two" and prompted.case.references == own.references
    assert altered_work("other_prompt", work, None, SensitivitySettings()) is None
