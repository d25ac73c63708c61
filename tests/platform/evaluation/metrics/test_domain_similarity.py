"""NANO-CLIP and Qwen-CLIP: edits are made once, frozen and shared; values against the models one by one."""

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metric_inputs import clip, work
from openai_server import Reply, openai_server
from PIL import Image
from tiny_models import save_clip, save_image_editor

from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.pipelines.endpoints.client import EndpointError
from domainshuttle.platform.evaluation.metrics.choices import EditorChoices
from domainshuttle.platform.evaluation.metrics.config import MetricsConfig
from domainshuttle.platform.evaluation.metrics.edits import QwenImageEditor, edit_instruction
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Reference, Work


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


def metric(url: str, clip_folder: Path, folder: Path, name: str = "nano_clip", **choices: Any) -> Any:
    editor = {"endpoint": {"url": url, "model": "editor-1", "patience": 0.3, "answers": 1}, **choices.pop("editor", {})}
    config = {"models": {"clip": str(clip_folder)}, name: {"editor": editor, "frames": 3, **choices}}
    (built,) = MetricsConfig.model_validate(config).build(Models(folder=folder))
    return built


def case(*references: Reference) -> Work:
    return Work(MetricCase("a", "a dog", references, "mixed"), work(clip(frames=7)).video)


def inverted(request: dict[str, Any], in_list: bool = False) -> Reply:
    """An editor that gives the negative of the picture that it is shown."""
    data = request["messages"][-1]["content"][0]["image_url"]["url"].split(",")[1]
    picture = 255 - np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    url = {"image_url": {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}}
    message = {"content": [{"type": "text", "text": "Here"}, {"type": "image_url", **url}]} if in_list else {
        "content": "Here", "images": [url],
    }  # fmt: skip
    return Reply(body=json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}).encode())


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("rule", ["mean", "max"])
def test_values_are_cosines_with_the_edited_references(clip_folder: Path, tmp_path: Path, fit: Any, rule: str) -> None:
    references = [
        Reference(clip(seed)[0], "dog", seed, domain="fantasy", edit_prompt="Make it of clay." if seed else "")
        for seed in range(2)
    ]
    with openai_server(lambda request, number: inverted(request, number == 0)) as server:
        found = metric(server.url, clip_folder, tmp_path, fit=fit, references=rule).score(case(*references))
        asked = [request["messages"][-1]["content"][1]["text"] for request in server.requests]
        assert all(request["modalities"] == ["image", "text"] for request in server.requests)
    assert asked[0].startswith("Turn the dog into the fantasy domain") and asked[1] == "Make it of clay."
    embedder = Embedder(str(clip_folder), "clip", fit=fit)
    frames = embedder.vectors([clip(frames=7)[number] for number in (0, 3, 6)])
    table = frames @ embedder.vectors([255 - one.picture for one in references]).T
    expected = (table.max(axis=1) if rule == "max" else table.mean(axis=1)).mean()
    assert found.value == pytest.approx(float(expected), abs=1e-5), found.reason


def test_edits_are_made_once_and_shared_and_never_change(clip_folder: Path, tmp_path: Path) -> None:
    one = case(Reference(clip(1)[0], "dog", domain="fantasy"))
    other = Work(one.case, work(clip(4, frames=7)).video)
    with openai_server(lambda request, number: inverted(request)) as server:
        first = metric(server.url, clip_folder, tmp_path)
        assert first.score(one).state == first.score(other).state == "measured"
        assert metric(server.url, clip_folder, tmp_path).score(other).value == first.score(other).value
        assert len(server.requests) == 1
        (edited,) = first.edited_references(one.case)
        assert np.array_equal(edited, 255 - one.case.references[0].picture) and len(server.requests) == 1
        metric(server.url, clip_folder, tmp_path, editor={"seed": 1}).score(one)
        assert len(server.requests) == 2  # another edit
    for picture in (tmp_path / "edits").glob("*/picture.png"):
        Image.fromarray(clip(9)[0]).save(picture)
    changed = metric("http://127.0.0.1:9/v1", clip_folder, tmp_path).score(one)
    assert changed.state == "failed" and "not the edit that was frozen" in changed.reason


def test_a_refused_edit_is_missing_for_all_and_an_absent_editor_says_nothing(clip_folder: Path, tmp_path: Path) -> None:
    one = case(Reference(clip(1)[0], "dog", domain="fantasy"), Reference(clip(2)[0], "cat", 1, domain="fantasy"))
    with openai_server(
        lambda request, number: inverted(request) if number else Reply(refusal="not this one")
    ) as server:
        found = metric(server.url, clip_folder, tmp_path).score(one)
        again = metric(server.url, clip_folder, tmp_path).score(Work(one.case, work(clip(5, frames=7)).video))
        assert len(server.requests) == 2
    assert found.state == again.state == "missing" and "not this one" in found.reason
    with openai_server(lambda *_: Reply("I made no picture")) as server:
        bad = metric(server.url, clip_folder, tmp_path / "b").score(one)
    assert bad.state == "failed" and "no picture" in bad.reason
    with pytest.raises(EndpointError):
        metric("http://127.0.0.1:9/v1", clip_folder, tmp_path / "c").score(one)
    nothing = case(Reference(clip(1)[0], "dog"))
    assert metric("http://127.0.0.1:9/v1", clip_folder, tmp_path).score(nothing).state == "missing"


def test_an_instruction_is_the_cases_own_or_the_template() -> None:
    picture = clip()[0]
    assert edit_instruction(Reference(picture, "cup", edit_prompt=" Of clay. "), EditorChoices()) == "Of clay."
    assert edit_instruction(Reference(picture, "cup"), EditorChoices()) == ""
    template = EditorChoices(template="{subject} as {domain}, {odd}")
    assert edit_instruction(Reference(picture, "cup", domain="fantasy"), template) == "cup as fantasy, {odd}"
    assert edit_instruction(Reference(picture, domain="fantasy"), template).startswith("main subject")
    assert edit_instruction(Reference(picture, "cup", domain="fantasy"), EditorChoices(template="")) == ""


def test_in_process_editors_are_part_of_the_digest(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor/model_index.json").write_text("{}")
    models = {"clip": str(clip_folder), "image_editor": str(tmp_path / "editor")}
    build = lambda: MetricsConfig.model_validate({"models": models, "qwen_clip": {}}).build(Models(folder=tmp_path))[0]  # noqa: E731
    digest = build().digest
    (tmp_path / "editor/model_index.json").write_text('{"a": 1}')
    assert build().digest != digest and "image_editor" in build().weights()
    found = build().score(case(Reference(clip()[0], "dog", domain="fantasy")))
    assert found.state == "failed" and "models.image_editor" in found.reason


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_qwen_image_edit_runs_in_process(clip_folder: Path, tmp_path: Path) -> None:
    editor = QwenImageEditor(str(save_image_editor(tmp_path)), EditorChoices(steps=2, side=64, dtype="float32"), "cpu")
    picture = clip()[0]
    one, same, other = (editor.edit(picture, text) for text in ("Make it of clay.", "Make it of clay.", "Of glass."))
    assert isinstance(one, np.ndarray) and one.shape == (64, 64, 3) and one.dtype == np.uint8
    assert np.array_equal(one, same) and not np.array_equal(one, other)
