"""GMEScore: tiny Qwen2-VL weights against what GME's own code does, and its published values where the weights are."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_inputs import SHARED, clip, work
from PIL import Image
from safetensors.torch import load_file
from tiny_models import save_gme

from domainshuttle.model.file_mode import save_tensors
from domainshuttle.platform.evaluation.metrics.choices import TextMatchChoices
from domainshuttle.platform.evaluation.metrics.gme import Gme, TextMatch, gme_size
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Video, Work
from domainshuttle.platform.evaluation.metrics.weights import MetricModels

SMALL = TextMatchChoices(frames=3, dtype="float32", least_tokens=4, most_tokens=16, at_once=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gme(tmp_path_factory.mktemp("gme"))


def own_code(folder: Path, text: str, picture: Image.Image | None) -> np.ndarray:
    """What GME's own code does: embeddings, a picture's put in their places, the language model without positions."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
    inputs = None
    if picture is not None:
        processor = Qwen2VLImageProcessorPil.from_pretrained(
            folder, size={"shortest_edge": 4 * 784, "longest_edge": 16 * 784}
        )
        inputs = processor(images=[picture.resize(gme_size(*picture.size[::-1])[::-1])], return_tensors="pt")
        count = int(inputs["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        if inputs is not None:
            shown = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            embeds[ids == model.config.image_token_id] = shown
        last = model.model.language_model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).last_hidden_state
        vectors: np.ndarray = torch.nn.functional.normalize(last[:, -1], dim=1)[0].numpy()
        return vectors


def test_vectors_are_those_of_gmes_own_code(folder: Path) -> None:
    frames, gme = clip(frames=3, height=60, width=90), Gme(str(folder), SMALL)
    end = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    picture = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    picture += "<|vision_start|><|image_pad|><|vision_end|>" + end
    expected = np.stack([own_code(folder, picture, Image.fromarray(frame)) for frame in frames])
    np.testing.assert_allclose(gme.pictures([*frames]), expected, atol=1e-5)
    asked = "Find an image that matches the given text.<|im_end|>\n<|im_start|>user\na red square"
    query = f"<|im_start|>system\n{asked}{end}"
    text = own_code(folder, query, None)
    np.testing.assert_allclose(gme.text("a red square"), text, atol=1e-5)
    one = work(frames)
    metric = TextMatch(SMALL, Models(), MetricModels(gme=str(folder)))
    found = metric.score(Work(MetricCase("a", "a red square"), one.video))
    assert found.value == pytest.approx(float((expected @ text).mean()), abs=1e-5)
    assert metric.score(Work(MetricCase("a", " "), one.video)).state == "missing"


def test_positions_are_a_choice_that_changes_values(folder: Path) -> None:
    frames = [*clip(frames=2, height=60, width=90)]
    other = Gme(str(folder), SMALL.model_copy(update={"positions": "two_dimensional"}))
    assert np.abs(other.pictures(frames) - Gme(str(folder), SMALL).pictures(frames)).max() > 1e-5
    np.testing.assert_allclose(other.text("a"), Gme(str(folder), SMALL).text("a"), atol=1e-6)


def test_weights_as_they_are_released_are_read(folder: Path, tmp_path: Path) -> None:
    """Under the names of an older transformers, and without the language head, which is not used."""
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    older = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if name != "lm_head.weight"
    }
    save_tensors(older, tmp_path / "model.safetensors")
    assert np.array_equal(Gme(str(tmp_path), SMALL).text("a"), Gme(str(folder), SMALL).text("a"))


def test_sizes_are_multiples_of_28_in_about_the_same_shape() -> None:
    assert gme_size(480, 832) == (476, 840)  # 510 tokens
    assert gme_size(10, 10) == (56, 56) and gme_size(28, 28) == (56, 56)
    for height, width in ((100, 1000), (9000, 3000), (33, 57)):
        found = gme_size(height, width)
        assert not found[0] % 28 and not found[1] % 28
        assert 4 * 784 <= found[0] * found[1] <= 16384 * 784


@pytest.mark.skipif("DOMAINSHUTTLE_GME" not in os.environ, reason="needs the released weights")
@pytest.mark.parametrize("name", ["singleface_3", "faceobj_14"])
def test_released_weights_give_opens2vs_values(name: str) -> None:
    demo = SHARED / "media/opens2v_nexus/eval/demo_result"
    golden = json.loads((demo / "model_name_output_json/gmescore.json").read_text())[name]["gme_score"]
    prompt = json.loads((demo / "input_json/Open-Domain_Eval.json").read_text())[name]["prompt"]
    video = Video.read(demo / f"model_name_input_video/{name}.mp4")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metric = TextMatch(TextMatchChoices(), Models(device), MetricModels(gme=os.environ["DOMAINSHUTTLE_GME"]))
    assert metric.score(Work(MetricCase(name, prompt), video)).value == pytest.approx(golden, abs=3e-3)
