"""What makes the clips: our pipeline and diffusers' WanVACEPipeline by the same command, as each does alone.

Run: pytest tests/platform/evaluation/test_generators.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel
from PIL import Image

from domainshuttle.model.encoders import byte_umt5
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.evaluation.config import EvaluationConfig
from domainshuttle.platform.evaluation.evaluate import run_evaluation
from domainshuttle.platform.evaluation.generators import Latency, Settings, load_generator, model_digest
from domainshuttle.platform.evaluation.latency import latency_rows
from domainshuttle.platform.evaluation.videos import Clip, Column
from domainshuttle.platform.generation.cases import case_seed


@pytest.fixture(scope="module")
def vace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved VACE of two experts with random weights."""
    folder = tmp_path_factory.mktemp("vace") / "vace"
    text_encoder, tokenizer = byte_umt5()
    torch.manual_seed(0)
    networks = [
        WanVACETransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=48, text_dim=64, freq_dim=32,
            vace_layers=[0], vace_in_channels=96,
        )
        for _ in range(2)
    ]  # fmt: skip
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1, dim_mult=[1, 1, 1, 1], z_dim=16)
    pipeline = WanVACEPipeline(
        tokenizer, text_encoder, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), *networks, boundary_ratio=0.9
    )
    pipeline.save_pretrained(folder)
    return folder


def test_vace_is_a_baseline_by_the_same_command(vace: Path, config: EvaluationConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generation = {"height": 32, "width": 32, "frames": 5, "steps": 3, "guidance_high": 4, "guidance_low": 3, "fps": 8}
    asked = EvaluationConfig.model_validate({**config.model_dump(), "generation": generation})
    results = run_evaluation([f"VACE={vace}"], asked, out)
    assert not results.failures()
    note = json.loads((out / "videos/VACE/case-2.json").read_text())
    assert (note["pipeline"], note["seed"]) == ("WanVACEPipeline", case_seed(3, "case-2"))
    assert (note["settings"]["guidance_high"], note["settings"]["guidance_low"]) == (4, 3)
    latency = note["latency"]
    assert latency["evaluations"] == 2 and latency["references"] > 0 and latency["decoding"] > 0 and latency["warm"]
    alone = WanVACEPipeline.from_pretrained(vace)
    alone.set_progress_bar_config(disable=True)
    picture = results.cases[2].references[0].path
    theirs = alone(
        prompt="a ball 2", negative_prompt="", reference_images=[Image.open(picture).convert("RGB")], height=32,
        width=32, num_frames=5, num_inference_steps=3, guidance_scale=4.0, guidance_scale_2=3.0, output_type="np",
        generator=torch.Generator().manual_seed(case_seed(3, "case-2")),
    ).frames[0]  # fmt: skip
    expected = encode_mp4((np.clip(theirs, 0, 1) * 255).round().astype(np.uint8), 8)
    assert (out / "videos/VACE/case-2.mp4").read_bytes() == expected
    page = (out / "report/index.html").read_text()
    assert "high noise 4.0, low noise 3.0" in page and "applies 3 and 4" in page
    with pytest.raises(ConfigError, match=r"4 n \+ 1: use 5"):
        wrong = EvaluationConfig.model_validate({**config.model_dump(), "generation": {**generation, "frames": 6}})
        run_evaluation([f"VACE={vace}"], wrong, tmp_path / "bad")


def test_our_clips_are_those_of_the_pipeline_alone(model: Path, config: EvaluationConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"reference_guidance": 1.5, "guidance_low": 3.0, "crf": 30, "batch": 5}
    results = run_evaluation(
        [str(model)], EvaluationConfig.model_validate({**config.model_dump(), "generation": asked}), out
    )
    alone = DomainShuttlePipeline.from_pretrained(model)
    alone.set_progress_bar_config(disable=True)
    case = results.cases[4]
    ours = alone(
        prompt=case.prompt, negative_prompt="", references=[Image.open(case.references[0].path)],
        reference_subjects=[0], reference_domains=["object"], height=32, width=48, num_frames=5, num_inference_steps=2,
        guidance_scale=2.0, guidance_scale_2=3.0, reference_guidance_scale=1.5, seed=case_seed(3, "case-4"),
        output_type="np",
    ).frames[0]  # fmt: skip
    expected = encode_mp4((np.clip(ours, 0, 1) * 255).round().astype(np.uint8), 8, 30)
    found = (out / "videos/model/case-4.mp4").read_bytes()
    if found != expected:  # another batch adds in another order: a level of a few pixels at most
        from domainshuttle.platform.evaluation.metrics.metric import Video

        (tmp_path / "alone.mp4").write_bytes(expected)
        paths = tmp_path / "alone.mp4", out / "videos/model/case-4.mp4"
        pair = [Video.read(path).frames.astype(int) for path in paths]
        assert np.abs(pair[0] - pair[1]).mean() < 0.5
    latency = json.loads((out / "videos/model/case-4.json").read_text())["latency"]
    assert latency["evaluations"] == 3  # text, no text, no references
    assert latency["batch"] == 5 and latency["references_count"] == 1


def test_a_digest_tells_weights_and_not_places_or_times(model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "copy")
    assert model_digest(str(tmp_path / "copy")) == model_digest(str(model))
    (tmp_path / "copy/generation.json").write_text("{}")  # how clips are made is told apart
    assert model_digest(str(tmp_path / "copy")) == model_digest(str(model))
    weights = next((tmp_path / "copy/transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert model_digest(str(tmp_path / "copy")) != model_digest(str(model))


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanVACEPipeline"}')
    with pytest.raises(ConfigError, match="can't be loaded as a WanVACEPipeline"):
        load_generator(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        load_generator(str(tmp_path))
    assert Settings.of(str(tmp_path), EvaluationConfig.model_fields["generation"].default).width == 832


def test_a_model_that_was_made_on_two_devices_says_both() -> None:
    latency = Latency(2, 4, denoising=8.0, total=10.0, device="H200", dtype="bfloat16").to_dict()
    made = [{"latency": latency | {"device": name}, "settings": {"frames": 5, "height": 32, "width": 48}}
            for name in ("H200", "CPU, 2 threads", "H200")]  # fmt: skip
    clips = {("a", str(n)): [Clip("a", str(n), 0, Path(), "sha", "", one)] for n, one in enumerate(made)}
    (row,) = latency_rows(SimpleNamespace(columns=[Column("a", "", True)], clips=clips))  # type: ignore[arg-type]
    assert (row["device"], row["size"], row["batch"]) == ("H200 and CPU, 2 threads", "5x32x48", "2")
    assert (row["total"], row["step"]) == (5.0, 1.0)
