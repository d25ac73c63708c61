"""The models of cross pairs: whole or one clear message, and what they give against transformers' own way."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import save_models

from domainshuttle.model.file_mode import save_tensors
from domainshuttle.pipelines.curation.detector import Detection, Detector, box_overlaps, without_repeats
from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.pipelines.curation.model_folders import check_model_folder, load_model, model_digest
from domainshuttle.pipelines.curation.segmenter import Segmenter
from domainshuttle.pipelines.errors import DataError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def _frames(count: int, height: int = 72, width: int = 96) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    coarse = random.integers(0, 256, (count, 6, 8, 3), np.uint8)
    return [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse]


def test_boxes_are_those_of_transformers_pipeline(models: dict[str, str]) -> None:
    from transformers import AutoTokenizer, GroundingDinoImageProcessorPil, pipeline

    detector, frames = Detector(models["detector"]), _frames(2)
    folder = models["detector"]
    asked: Any = pipeline(
        "zero-shot-object-detection",
        model=detector.model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        image_processor=GroundingDinoImageProcessorPil.from_pretrained(folder),
        processor=detector.processor,
    )
    every = detector.find(frames, "Dog", 0.0)
    middle = sorted(one.score for one in every[0])[len(every[0]) // 2]
    for frame, found in zip(frames, detector.find(frames, "Dog", middle), strict=True):
        rows = asked(Image.fromarray(frame), candidate_labels=["dog."], threshold=middle)  # it adds no end
        assert len(found) == len(rows) > 0
        for one, row in zip(found, sorted(rows, key=lambda row: -row["score"]), strict=True):
            assert one.score == pytest.approx(row["score"], abs=1e-5)
            sides = [row["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")]
            np.testing.assert_allclose(one.box, np.clip(sides, 0, [96, 72, 96, 72]), atol=1.01)  # it cuts to integers


def test_boxes_do_not_depend_on_the_frames_beside(models: dict[str, str]) -> None:
    detector, frames = Detector(models["detector"]), _frames(3)
    together = detector.find(frames, "person", 0.0)
    for frame, found in zip(frames, together, strict=True):
        (alone,) = detector.find([frame], "person", 0.0)
        np.testing.assert_allclose([one.score for one in alone], [one.score for one in found], atol=1e-5)
    assert detector.find([], "person", 0.0) == []
    assert detector.find(frames, "person", 1.0) == [[], [], []]


def test_masks_are_those_of_the_model_with_pictures_that_pillow_resized(models: dict[str, str]) -> None:
    segmenter, (frame,) = Segmenter(models["segmenter"]), _frames(1)
    boxes = [(10.0, 8.0, 60.0, 50.0), (0.0, 0.0, 96.0, 72.0)]
    found = segmenter.masks(frame, boxes)

    resized = np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BILINEAR), np.float32) / 255
    normal = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = torch.from_numpy(normal.astype(np.float32)).permute(2, 0, 1)[None]
    assert (segmenter.prepared(frame) - pixels).abs().max() < 1.01 / 255 / 0.224  # a level, of rounding
    scaled = torch.tensor(boxes) * torch.tensor([64 / 96, 64 / 72] * 2)
    with torch.inference_mode():
        output = segmenter.model(segmenter.prepared(frame), input_boxes=scaled[None], multimask_output=False)
    logits = torch.nn.functional.interpolate(output.pred_masks[0], (72, 96), mode="bilinear", align_corners=False)
    assert len(found) == 2
    for one, own, score in zip(found, logits[:, 0], output.iou_scores[0, :, 0], strict=True):
        assert one.mask.shape == (72, 96)
        assert np.array_equal(one.mask, own.numpy() > 0)
        assert one.score == pytest.approx(float(score.clamp(0, 1)), abs=1e-6)
    assert segmenter.masks(frame, []) == []


@pytest.mark.parametrize("role", ["dino", "clip"])
def test_vectors_are_the_models_of_the_whole_picture_on_white(models: dict[str, str], role: Any) -> None:
    embedder = Embedder(models[role], role)
    tall = _frames(1, 60, 20)[0]
    square = np.full((60, 60, 3), 255, np.uint8)
    square[:, 20:40] = tall
    side = embedder.side
    values = np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255
    mean, deviation = embedder.processor.image_mean, embedder.processor.image_std
    expected = torch.from_numpy(((values - mean) / deviation).transpose(2, 0, 1)).float()
    assert torch.allclose(embedder.prepared([tall])[0], expected, atol=1e-5)
    with torch.inference_mode():
        output = embedder.model(pixel_values=expected[None])
    raw = output.pooler_output if role == "dino" else output.image_embeds
    np.testing.assert_allclose(embedder.vectors([tall])[0], (raw / raw.norm())[0].numpy(), atol=1e-5)
    small = _frames(1, 3, 3)[0]  # its height could be taken for its colours
    values = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255
    expected = torch.from_numpy(((values - mean) / deviation).transpose(2, 0, 1)).float()
    assert torch.allclose(embedder.prepared([small])[0], expected, atol=1e-5)
    both = embedder.vectors([tall, square])
    assert both[0] @ both[1] == pytest.approx(1, abs=1e-5)  # on white they are the same picture


def test_repeated_boxes_are_left_out_as_by_brute_force() -> None:
    random = np.random.default_rng(5)
    corners = random.uniform(0, 20, (40, 2))
    found = [
        Detection((x, y, x + w, y + h), 1 - number / 50)
        for number, ((x, y), (w, h)) in enumerate(zip(corners, random.uniform(1, 20, (40, 2)), strict=True))
    ]

    def overlap(one: Detection, other: Detection) -> float:
        (a, b, c, d), (e, f, g, h) = one.box, other.box
        shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
        return shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)

    kept: list[Detection] = []
    for one in found:
        if all(overlap(one, other) <= 0.3 for other in kept):
            kept.append(one)
    assert 1 < len(kept) < 40
    assert without_repeats(found, 0.3) == kept
    assert without_repeats([], 0.3) == []
    table = box_overlaps([one.box for one in found])
    np.testing.assert_allclose(table, [[overlap(one, other) for other in found] for one in found], atol=1e-12)


ROLES = ["detector", "segmenter", "dino", "clip"]


@pytest.mark.parametrize("role", ROLES)
def test_a_folder_that_lacks_something_is_one_message(models: dict[str, str], role: Any, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(models[role], tmp_path / name))

    with pytest.raises(DataError, match="no such folder"):
        check_model_folder(str(tmp_path / "absent"), role)
    for name, match in (
        ("config.json", "has no config.json"),
        ("model.safetensors", r"no weights: it has no \*.safetensors"),
        ("preprocessor_config.json", "no preprocessor_config.json"),
    ):
        folder = broken(f"without-{name}")
        (folder / name).unlink()
        with pytest.raises(DataError, match=match):
            load_model(str(folder), role, "cpu")
    folder = broken("pickles")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="is a pickle, which is not read"):
        load_model(str(folder), role, "cpu")
    other = "clip" if role != "clip" else "dino"
    with pytest.raises(DataError, match="is a folder of "):
        load_model(models[other], role, "cpu")
    folder = broken("cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match="can't be loaded"):
        load_model(str(folder), role, "cpu")
    with pytest.raises(DataError, match="can't be loaded"):
        model_digest(str(folder), role)
    folder = broken("text")
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not JSON"):
        load_model(str(folder), role, "cpu")


@pytest.mark.parametrize("role", ROLES)
def test_missing_weights_are_not_made_up(models: dict[str, str], role: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models[role], tmp_path / "partial"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_") and "text" not in name}
    left_out = sorted(name for name in kept if name.endswith("weight"))[0]
    del tensors[left_out]
    save_tensors(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match="missing or of another shape"):
        load_model(str(folder), role, "cpu")


def test_a_digest_is_of_what_decides(models: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["dino"], tmp_path / "dino"))
    before = model_digest(str(folder), "dino")
    assert before == model_digest(models["dino"], "dino")
    (folder / "README.md").write_text("notes")
    assert model_digest(str(folder), "dino") == before
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    assert model_digest(str(folder), "dino") != before


def test_the_released_form_of_the_segmenter_is_taken(models: dict[str, str], tmp_path: Path) -> None:
    """facebook/sam2.1-* say that they are models of videos."""
    folder = Path(shutil.copytree(models["segmenter"], tmp_path / "sam2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "sam2_video"}))
    frame = _frames(1)[0]
    (there,) = Segmenter(str(folder)).masks(frame, [(5, 5, 60, 60)])
    (here,) = Segmenter(models["segmenter"]).masks(frame, [(5, 5, 60, 60)])
    assert np.array_equal(there.mask, here.mask)
