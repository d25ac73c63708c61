"""What a GPU computes in bf16, tried on the CPU: clips and captions come out as in float32 but for its rounding.

Run: python -m pytest tests/platform/engine/test_precision.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainshuttle.model.encoders import byte_umt5, load_text_encoder
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.pipelines.encoding.sample_encoder import SampleEncoder, load_encoders
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.generation import assemble, generate
from domainshuttle.platform.generation.assemble import assemble_pipeline
from domainshuttle.platform.generation.generate import load_pipeline
from domainshuttle.platform.run.weights_origin import WeightsOrigin


def as_on_a_gpu(device: str) -> torch.dtype:
    return torch.bfloat16


def clip(pipeline: Any) -> np.ndarray:
    """Pixels [F,H,W,3] in 0..1 of the same case."""
    pipeline.set_progress_bar_config(disable=True)
    given = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    return np.asarray(pipeline(prompt="a red star", negative_prompt="", **given).frames[0])


def test_clips_in_bf16_keep_what_wan_keeps_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("demo")
    model = build_model(config.model, WeightsOrigin(None, 0))
    with torch.no_grad():  # as made, the last layer is zero
        model.proj_out.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "weights")
    exact: Any = assemble_pipeline(config, [tmp_path / "weights"])
    exact.save_pretrained(tmp_path / "pipeline")
    expected = clip(exact)
    for module in (assemble, generate):
        monkeypatch.setattr(module, "network_dtype", as_on_a_gpu)
    for pipeline in (assemble_pipeline(config, [tmp_path / "weights"]), load_pipeline(tmp_path / "pipeline")):
        found: Any = pipeline
        kept = DomainShuttleTransformer3DModel._keep_in_fp32_modules
        for name, parameter in found.transformer.named_parameters():
            own = torch.float32 if any(part in kept for part in name.split(".")) else torch.bfloat16
            assert parameter.dtype == own, name
        assert {tensor.dtype for tensor in found.vae.buffers()} == {torch.float32}
        assert next(found.text_encoder.parameters()).dtype == torch.bfloat16
        difference = np.abs(clip(found) - expected)
        assert 0 < difference.mean() < 0.02


def test_captions_of_a_umt5_are_in_bf16_on_every_device_and_those_in_float32_but_for_rounding(tmp_path: Path) -> None:
    model, tokenizer = byte_umt5()
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    video, text = load_encoders(EncoderSources(video="block-dct", text=str(tmp_path), text_len=32))
    assert next(text.model.parameters()).dtype == torch.bfloat16
    exact = load_text_encoder(str(tmp_path), 32)
    assert next(exact.model.parameters()).dtype == torch.float32
    assert exact.identity != text.identity
    found, expected = (SampleEncoder(video, one).caption("a cat and a dog") for one in (text, exact))
    assert found.dtype == torch.bfloat16 and not torch.equal(found, expected)
    assert float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean()) < 0.03
    built_in = load_encoders(EncoderSources(video="block-dct", text="byte-umt5", text_len=32))[1]
    assert next(built_in.model.parameters()).dtype == torch.float32  # CPUs may multiply bf16 far slower
