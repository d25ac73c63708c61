"""AES: against OpenS2V's own lines with tiny weights, and against its published values where the weights are."""

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
from torch import nn

from domainshuttle.model.file_mode import save_tensors
from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.evaluation.metrics.aesthetics import Aesthetics, read_head
from domainshuttle.platform.evaluation.metrics.choices import AestheticChoices
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Video, Work
from domainshuttle.platform.evaluation.metrics.weights import MetricModels


class ReleasedHead(nn.Module):
    """The head as it is saved: dropouts between the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> MetricModels:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("aesthetics")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 16},
        vision_config={**small, "image_size": 32, "patch_size": 16, "projection_dim": 768},
        projection_dim=768,
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    head = ReleasedHead()
    with torch.no_grad():
        head.layers[-1].bias.fill_(5.5)
    torch.save(head.state_dict(), folder / "head.pth")
    save_tensors(dict(head.state_dict()), folder / "head.safetensors")
    return MetricModels(aesthetic_clip=str(folder / "clip"), aesthetic_head=str(folder / "head.pth"))


def released_score(folders: MetricModels, frames: list[Image.Image]) -> float:
    """OpenS2V's way: stock processor, vectors of length 1, the head with its dropouts off."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    clip = CLIPVisionModelWithProjection.from_pretrained(folders.aesthetic_clip).eval()
    head = ReleasedHead().eval()
    head.load_state_dict(torch.load(str(folders.aesthetic_head), weights_only=True))
    with torch.no_grad():
        pixels = CLIPImageProcessorPil.from_pretrained(folders.aesthetic_clip)(images=frames, return_tensors="pt")
        embed = clip(**pixels)[0]
        return head.layers(embed / torch.linalg.vector_norm(embed, dim=-1, keepdim=True)).mean().item()


def test_scores_are_opens2vs(folders: MetricModels) -> None:
    frames = clip(frames=40)
    found = Aesthetics(AestheticChoices(), Models(), folders).score(work(frames))
    numbers = np.linspace(0, 39, 32, dtype=int)
    expected = released_score(folders, [Image.fromarray(frames[number]) for number in numbers])
    assert 4 < expected < 7
    assert found.beside["raw"] == pytest.approx(expected, abs=1e-5)
    assert found.value == pytest.approx((expected - 4) / 3, abs=1e-5)
    assert len(found.details["frames"]) == 32


def test_scores_are_cut_to_their_range(folders: MetricModels) -> None:
    one = work(clip())
    assert Aesthetics(AestheticChoices(low=5.9, high=7), Models(), folders).score(one).value == 0
    assert Aesthetics(AestheticChoices(low=1, high=2), Models(), folders).score(one).value == 1


def test_a_head_is_read_from_both_formats_and_nothing_else(folders: MetricModels, tmp_path: Path) -> None:
    file = str(folders.aesthetic_head)
    vector = torch.randn(2, 768)
    assert torch.equal(read_head(file)(vector), read_head(file.replace(".pth", ".safetensors"))(vector))
    with pytest.raises(DataError, match="no such file"):
        read_head(str(tmp_path / "none.pth"))

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"layers.0.weight": Evil()}, tmp_path / "evil.pth")
    torch.save({"layers.0.weight": torch.zeros(1, 768)}, tmp_path / "other.pth")
    for name in ("evil.pth", "other.pth"):
        with pytest.raises(DataError, match="is not AES's head"):
            read_head(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_weights_are_part_of_the_digest(folders: MetricModels, tmp_path: Path) -> None:
    one = Aesthetics(AestheticChoices(), Models(), folders)
    head = {
        name: tensor * 1.01
        for name, tensor in load_file(str(folders.aesthetic_head).replace(".pth", ".safetensors")).items()
    }
    save_tensors(head, tmp_path / "head.safetensors")
    other = folders.model_copy(update={"aesthetic_head": str(tmp_path / "head.safetensors")})
    assert one.digest != Aesthetics(AestheticChoices(), Models(), other).digest
    with pytest.raises(DataError, match=r"aes needs models\.aesthetic_clip"):
        Aesthetics(AestheticChoices()).check()


@pytest.mark.skipif("DOMAINSHUTTLE_AESTHETIC_CLIP" not in os.environ, reason="needs the released weights")
@pytest.mark.parametrize("name", ["singleface_3", "faceobj_14"])
def test_released_weights_give_opens2vs_values(name: str) -> None:
    demo = SHARED / "media/opens2v_nexus/eval/demo_result"
    golden = json.loads((demo / "model_name_output_json/aesthetic_score.json").read_text())[name]["aes_score"]
    folders = MetricModels(
        aesthetic_clip=os.environ["DOMAINSHUTTLE_AESTHETIC_CLIP"],
        aesthetic_head=os.environ["DOMAINSHUTTLE_AESTHETIC_HEAD"],
    )
    video = Video.read(demo / f"model_name_input_video/{name}.mp4")
    found = Aesthetics(AestheticChoices(), Models(), folders).score(Work(MetricCase(name, ""), video))
    assert found.beside["raw"] == pytest.approx(golden, abs=5e-3)
