"""Wan's encoders, tiny, against diffusers' own paths.

Run: python -m pytest tests/pipelines/encoding/test_wan_encoders.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

from domainshuttle.model.encoder_sources import TILE, TILE_ABOVE, TILE_STRIDE, tiling_rule
from domainshuttle.model.encoders import WanVideoEncoder, byte_umt5, cleaned_caption, load_text_encoder
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.encoding.sample_encoder import load_encoders, to_pixels
from domainshuttle.pipelines.encoding.units import Recipe
from domainshuttle.pipelines.media.decode import decode_video, encode_mp4, fit_target
from domainshuttle.pipelines.plan.feed import EncoderSources

CAPTIONS = ["a red  cat\n sits", "Tom &amp;amp; Jerry", "donâ€™t mend me", "", "word " * 60]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with tiny encoders, as they are downloaded."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    statistics = {"latents_mean": torch.randn(16).tolist(), "latents_std": (0.5 + torch.rand(16)).tolist()}
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)
    vae.save_pretrained(folder / "vae")
    model, tokenizer = byte_umt5(seed=2)
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def clip(height: int, width: int, frames: int = 5) -> torch.Tensor:
    """A real clip's pixels [1,3,F,H,W], through H.264."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (frames, height // 8 + 2, width // 8 + 2, 3), np.uint8)
    pictures = noise.repeat(8, 1).repeat(8, 2)
    bucket = parse_bucket(f"{frames}x{height}x{width}")
    return to_pixels(fit_target(decode_video(encode_mp4(pictures, 8.0), frames), bucket))


@torch.no_grad()
def test_a_clip_is_encoded_and_decoded_as_diffusers_does(wan: Path) -> None:
    video, _ = load_encoders(EncoderSources(str(wan), str(wan), 32))
    vae = AutoencoderKLWan.from_pretrained(wan / "vae")
    pixels = clip(48, 64, 9)
    mean, deviation = (torch.tensor(vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = (vae.encode(pixels).latent_dist.mode() - mean) / deviation
    found = video.encode(pixels)
    assert found.shape == (1, 16, 3, 6, 8) and found.equal(expected)
    shown = vae.decode(expected / (1 / deviation) + mean).sample  # as WanPipeline brings latents back
    torch.testing.assert_close(video.decode(found), shown, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_large_frames_are_encoded_in_tiles_and_smaller_ones_whole(wan: Path) -> None:
    assert 480 * 832 < TILE_ABOVE < 720 * 1280
    vae = AutoencoderKLWan.from_pretrained(wan / "vae")
    ours = WanVideoEncoder(AutoencoderKLWan.from_pretrained(wan / "vae"), "x", tile_above=200_000)
    large, small = clip(400, 640, 1), clip(240, 416, 1)  # wider than a tile, and not
    whole = WanVideoEncoder(vae, "x", None)
    assert ours.encode(small).equal(whole.encode(small))
    plain = whole.encode(large)
    vae.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
    tiled = ours.encode(large)
    assert tiled.equal(whole.encode(large)) and not tiled.equal(plain)
    assert ours.encode(small).equal(WanVideoEncoder(AutoencoderKLWan.from_pretrained(wan / "vae"), "x").encode(small))


def test_tiles_are_another_transform_where_they_are_used() -> None:
    encoders = {"video": "wan:1-2", "text": "t:3-4:32", "transform": "r"}
    rules = [tiling_rule("wan", above) for above in (600_000, 300_000)]
    plain, tiled, small = (Recipe({**encoders, **({"tiles": r} if r else {})}, 16.0) for r in (None, *rules))
    assert plain.pixels("81x480x832") == tiled.pixels("81x480x832") != small.pixels("81x480x832")
    assert plain.pixels("81x720x1280") != tiled.pixels("81x720x1280") != small.pixels("81x720x1280")
    assert tiled.changes(plain, ["81x480x832"]) == []
    assert tiled.changes(plain, ["81x720x1280"])[0].startswith("tiles was None, now frames above 600000 pixels")
    assert tiling_rule("block-dct", 600_000) is None
    moved = Recipe({**encoders, "video": "/elsewhere/wan:1-2", "text": "/elsewhere:3-4:32"}, 16.0)
    assert moved.changes(plain, ["81x720x1280"]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captions_are_encoded_as_the_pipeline_encodes_its_prompt(wan: Path, dtype: torch.dtype) -> None:
    text = load_text_encoder(str(wan), 64, dtype=dtype)
    model, tokenizer = text.model, text.tokenizer
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=model, vae=None, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    expected, _ = pipeline.encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=64, device=torch.device("cpu")
    )
    assert cleaned_caption(CAPTIONS[1]) == "Tom & Jerry" and cleaned_caption(CAPTIONS[2]) == "don't mend me"
    for caption, states in zip(CAPTIONS, expected, strict=True):
        found = text.encode_padded([caption])[0]
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        torch.testing.assert_close(found, states, atol=tolerance, rtol=tolerance)
        assert found.any(1).equal(states.any(1))


def test_a_umt5_computes_in_bf16_and_the_built_in_encoder_in_float32(wan: Path) -> None:
    _, text = load_encoders(EncoderSources(str(wan), str(wan), 32))
    assert {one.dtype for one in text.model.parameters()} == {torch.bfloat16}
    _, built_in = load_encoders(EncoderSources("block-dct", "byte-umt5", 32))
    assert {one.dtype for one in built_in.model.parameters()} == {torch.float32}
    assert load_text_encoder(str(wan), 32).identity != text.identity
