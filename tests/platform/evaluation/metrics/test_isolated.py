"""A model with packages of its own: installed once and whole, or a reason.

Run: pytest tests/platform/evaluation/metrics/test_isolated.py; with -m nightly also in an actor
"""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from metric_inputs import SHARED, work
from ray import cloudpickle

from domainshuttle.cluster.local import Connection
from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.evaluation.metrics.choices import SmoothnessChoices
from domainshuttle.platform.evaluation.metrics.isolated import Isolated, installed
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Needs, Video, Work
from domainshuttle.platform.evaluation.metrics.motion import Smoothness, artefact_frames, windows
from domainshuttle.platform.evaluation.metrics.one_align import WEIGHTS, WORDS
from domainshuttle.platform.evaluation.metrics.weights import MetricModels

NAME = "domainshuttle_tiny_probe"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that nothing here has, as a requirement that needs no network; the cache of packages is the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / f"{NAME}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(f"{NAME}.py", "VALUE = 42\n")
        made.writestr(f"{NAME}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        made.writestr(
            f"{NAME}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        made.writestr(f"{NAME}-1.0.dist-info/RECORD", "")
    assert importlib.util.find_spec(NAME) is None
    return f"{NAME} @ {path.as_uri()}"


def test_packages_are_installed_once_and_whole_or_there_is_a_reason(
    wheel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = installed((wheel,))
    assert (folder / f"{NAME}.py").is_file()
    code = f"import {NAME}; print({NAME}.VALUE)"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert run.stdout == "42\n"
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # what is there is not installed again
        assert installed((wheel,)) == folder
    with pytest.raises(DataError, match=r"can't be installed: .*nowhere.*PIP_INDEX_URL.*--again"):
        installed((f"other @ file://{tmp_path}/nowhere.whl",))
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


class Probe:
    """What runs in the actor: it has what the product has not."""

    def __init__(self, times: int) -> None:
        import domainshuttle_tiny_probe  # type: ignore[import-not-found]

        self.value = times * domainshuttle_tiny_probe.VALUE

    def scores(self, frames: np.ndarray, windows: list[list[int]]) -> list[float]:
        if len(windows) > 3:
            raise ValueError("too many\nwindows")
        if not windows:
            os._exit(1)
        return [float(self.value + len(frames))] * len(windows)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_model_runs_in_an_actor_with_its_own_packages(wheel: str, tmp_path: Path) -> None:
    # as the product's classes are there without what tests import
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Connection():
        model = Isolated("ms", Probe, (2,), Needs(gpus=1, packages=(wheel,)))
        assert model.call("scores", np.zeros((5, 8, 8, 3), np.uint8), [[0], [1]]) == [89.0, 89.0]
        with pytest.raises(DataError, match="ms: its model raised ValueError: windows"):
            model.call("scores", np.zeros((5, 8, 8, 3), np.uint8), [[0]] * 4)
        assert model.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [[0]]) == [85.0]
        with pytest.raises(DataError, match="ms: the actor of its model died"):
            model.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [])
        assert model.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [[0]]) == [85.0]
        absent = Isolated("ms", Probe, (2,), Needs(packages=(f"other @ file://{tmp_path}/nowhere.whl",)))
        for _ in range(2):
            with pytest.raises(DataError, match=r"^ms: its own packages \(other .*can't be installed: .*nowhere"):
                absent.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [[0]])
        broken = Isolated("ms", Probe, (), Needs(packages=(wheel,)))
        with pytest.raises(DataError, match=r"ms: its model can't be loaded: .*times"):
            broken.call("scores", np.zeros((1, 8, 8, 3), np.uint8), [[0]])


MODEL_CODE = '''
import torch
from icecream import ic  # as the released code does
from transformers import PretrainedConfig, PreTrainedModel, __version__

assert __version__ == "4.36.1"


class TinyConfig(PretrainedConfig):
    model_type = "tiny_align"


class TinyAlign(PreTrainedModel):
    """Brighter windows are "excellent": the logit of each word is its share of the brightness."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Parameter(torch.zeros(16))

    def forward(self, input_ids, images):
        assert (input_ids == -200).sum() == len(images)
        light = torch.stack([one.mean() for one in images])
        return {"logits": (light[:, None] * self.words)[:, None].expand(-1, input_ids.shape[1], -1)}
'''


def save_one_align(folder: Path) -> dict[str, float]:
    """A folder as one-align's, with code of its own; the weight of each word's logit."""
    import torch
    from safetensors.torch import save

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "user", ":", *WORDS]
    weight = dict(zip(WORDS, (2.0, 1.0, 0.0, -1.0, -2.0), strict=True))
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(MODEL_CODE)
    auto = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyAlign"}
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny_align", "auto_map": auto}))
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    picture = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "image_mean": [0.5] * 3,
               "crop_size": {"height": 16, "width": 16}, "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    logits = torch.tensor([weight.get(word, 0.0) for word in words] + [0.0] * (16 - len(words)))
    (folder / "model.safetensors").write_bytes(save({"words": logits}, {"format": "pt"}))
    return weight


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_one_align_runs_with_what_it_is_pinned_to(tmp_path: Path) -> None:
    weight = save_one_align(tmp_path / "one-align")
    choices = SmoothnessChoices(runs_model_code=True)
    metric = Smoothness(choices, Models(), MetricModels(one_align=str(tmp_path / "one-align")))
    metric.check()
    levels = np.array([40, 40, 40, 220, 220, 220], np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (6, 24, 24, 3)).copy()
    with Connection():
        score = metric.score(work(frames))
    if score.state == "failed" and "can't be installed" in score.reason:
        pytest.skip(score.reason)
    assert score.state == "measured", score.reason
    light = levels / 255 * 2 - 1
    expected = []
    for window in windows(6, 3):
        logits = light[window].mean() * np.array([weight[word] for word in WORDS])
        expected.append(float(np.exp(logits) / np.exp(logits).sum() @ WEIGHTS))
    assert score.details["scores"] == pytest.approx(expected, abs=1e-5)
    assert score.details["artefacts"] == artefact_frames(expected, 0.025) and 0 < (score.value or 0) < 1


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.skipif("DOMAINSHUTTLE_ONE_ALIGN" not in os.environ, reason="needs the released weights")
@pytest.mark.parametrize("name", ["singleface_3", "faceobj_14"])
def test_released_weights_give_opens2vs_smoothness(name: str) -> None:
    demo = SHARED / "media/opens2v_nexus/eval/demo_result"
    golden = json.loads((demo / "model_name_output_json/motion_smoothness.json").read_text())[name]
    video = Video.read(demo / f"model_name_input_video/{name}.mp4")
    folders = MetricModels(one_align=os.environ["DOMAINSHUTTLE_ONE_ALIGN"])
    with Connection():
        score = Smoothness(SmoothnessChoices(runs_model_code=True), Models(), folders).score(
            Work(MetricCase(name, ""), video)
        )
    assert score.value == pytest.approx(golden["motion_smoothness"], abs=1e-6), score.reason
