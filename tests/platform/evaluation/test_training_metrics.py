"""Metrics by step of a training. Run: pytest tests/platform/evaluation/test_training_metrics.py"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.evaluation import training_metrics
from domainshuttle.platform.evaluation.metrics.choices import FrameChoices
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Score, Work
from domainshuttle.platform.evaluation.metrics.pixels import HueIdentity
from domainshuttle.platform.evaluation.training_metrics import (
    check_training_metrics,
    measure_samples,
    measured,
    read_metrics,
)
from domainshuttle.platform.generation.cases import Case, cases_of_file


def test_the_samples_of_a_step_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "name: small\nsources: {own: {kind: cases}}\nmetrics: {hue_identity: {}, steadiness: {}}\n"
    (tmp_path / "small.yaml").write_text(own)
    overrides = ["sampling.every=5", "sampling.cases=3", f"sampling.metrics={tmp_path}/small.yaml"]
    config = load_config("demo", overrides)
    check_training_metrics(config)
    colours = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250]], np.uint8)
    pictures = [np.broadcast_to(colour, (16, 16, 3)).copy() for colour in colours]
    cases = [Case(f"k{n}", "a ball", (picture,), (0,), (1,)) for n, picture in enumerate(pictures)]
    monkeypatch.setattr(training_metrics, "sample_cases", lambda _: cases)
    out = tmp_path / "step-000005"
    out.mkdir()
    for number, picture in enumerate(pictures, 1):
        shown = pictures[0] if number == 3 else picture  # the third case shows the first one's colour
        if number == 1:  # a picture's sample is a still alone
            Image.fromarray(shown).save(out / "case-01.png")
        else:
            (out / f"case-{number:02d}.mp4").write_bytes(encode_mp4(np.repeat(shown[None], 4, axis=0), 8))
    measure_samples(config, out, "cpu", tmp_path / "measured")
    values = read_metrics(out)
    assert values["samples/hue_identity"] == pytest.approx(2 / 3, abs=0.05)
    assert values["samples/hue_identity_low"] <= values["samples/hue_identity"] <= values["samples/hue_identity_high"]
    assert (values["samples/hue_identity_cases"], values["samples/steadiness_cases"]) == (3, 2)  # a still has none
    assert read_metrics(tmp_path) == {}
    with pytest.raises(ConfigError, match="no evaluation 'smal'"):
        check_training_metrics(load_config("demo", [*overrides[:2], "sampling.metrics=smal"]))


def test_what_is_not_asked_for_is_not_measured(tmp_path: Path) -> None:
    measure_samples(load_config("demo", ["sampling.every=5"]), tmp_path, "cpu", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_metric_sees_of_a_sample_what_an_evaluation_sees(tmp_path: Path) -> None:
    """Its word, whether it is a background, and its split: a judge of cross-domain cases grades samples of a corpus."""
    picture = np.full((16, 16, 3), 90, np.uint8)
    Image.fromarray(picture).save(tmp_path / "case-01.png")
    Image.fromarray(picture).save(tmp_path / "a.png")
    seen: list[MetricCase] = []

    class Watch(HueIdentity):
        def measure(self, work: Work) -> Score:
            seen.append(work.case)
            return Score("measured", 0.5)

    watch = Watch(FrameChoices(cases="cross_domain"))
    case = Case("k", "a dog", (picture, picture), (0, 1), (1, 3), words=("dog", "beach"))
    assert measured([watch], [case], tmp_path) == {"hue_identity": [0.5]}
    assert [(one.word, one.background, one.domain) for one in seen[0].references] == [
        ("dog", False, "object"), ("beach", True, "background"),
    ]  # fmt: skip
    line = {"prompt": "a dog", "seg_meta": [{"seg_file": ["a.png"]}], "labels": ["dog"], "split": "in_domain"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(line))
    (case,) = cases_of_file(tmp_path / "cases.jsonl")
    assert (case.words, case.split) == (("dog",), "in_domain")
    assert measured([watch], [case], tmp_path) == {"hue_identity": []}  # of a case that says its split that holds
    (tmp_path / "cases.jsonl").write_text(json.dumps({**line, "labels": "dog"}))
    (tmp_path / "small.yaml").write_text("name: small\nsources: {own: {kind: cases}}\nmetrics: {steadiness: {}}\n")
    overrides = [f"sampling.cases_file={tmp_path}/cases.jsonl", f"sampling.metrics={tmp_path}/small.yaml"]
    with pytest.raises(ConfigError, match="labels: expected a list"):
        check_training_metrics(load_config("demo", ["sampling.every=5", *overrides]))
