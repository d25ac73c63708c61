"""Encoders: the codec's shapes and fidelity, and Wan's VAE and UMT5 through the same interface.

Run: python -m pytest tests/model/test_encoders.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image, ImageDraw

from domainshuttle.model.encoders import (
    BlockDCTCodec,
    byte_umt5,
    load_text_encoder,
    load_video_encoder,
    pad_text,
    weights_digest,
)


def moving_square(frames: int, side: int = 64) -> torch.Tensor:
    """[1,3,F,side,side] in -1..1: a coloured square on a grey ground that moves right."""
    pictures = []
    for frame in range(frames):
        picture = Image.new("RGB", (side, side), (200, 205, 200))
        ImageDraw.Draw(picture).rectangle((10 + frame, 16, 40 + frame, 46), fill=(220, 40, 40))
        pictures.append(np.asarray(picture))
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_codec_has_wans_shapes_and_keeps_the_picture(frames: int) -> None:
    codec, pixels = BlockDCTCodec(), moving_square(frames)
    latents = codec.encode(pixels)
    assert latents.shape == (1, 16, (frames - 1) // 4 + 1, 8, 8)
    decoded = codec.decode(latents)
    assert decoded.shape == pixels.shape
    error = (decoded - pixels).square().mean()
    assert float(10 * torch.log10(4 / error)) > 20  # dB; 16 of 192 (or 768) coefficients are kept


def test_codec_is_a_projection() -> None:
    """What the codec can represent comes back exactly: encoding is a left inverse of decoding."""
    codec = BlockDCTCodec()
    latents = 0.1 * torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    decoded = codec.decode(latents)
    assert float(decoded.abs().max()) < 1  # nothing was clamped
    torch.testing.assert_close(codec.encode(decoded), latents, atol=1e-5, rtol=1e-4)


def test_codec_keeps_exactly_the_strongest_coefficients() -> None:
    """A constant block is its mean: one coefficient, since R = G = B has no chroma."""
    codec = BlockDCTCodec()
    pixels = torch.full((1, 3, 1, 8, 8), 0.25)
    latents = codec.encode(pixels)[0, :, 0, 0, 0]
    assert int((latents.abs() > 1e-5).sum()) == 1
    torch.testing.assert_close(codec.decode(latents.view(1, 16, 1, 1, 1)), pixels, atol=1e-6, rtol=1e-6)


def test_first_frame_alone() -> None:
    codec, pixels = BlockDCTCodec(), moving_square(5)
    changed = pixels.clone()
    changed[:, :, 1:] = 0
    torch.testing.assert_close(codec.encode(changed)[:, :, 0], codec.encode(pixels)[:, :, 0])
    assert not torch.allclose(codec.encode(changed)[:, :, 1], codec.encode(pixels)[:, :, 1])


@pytest.mark.parametrize("shape", [(1, 3, 2, 64, 64), (1, 3, 1, 60, 64), (1, 4, 1, 64, 64)])
def test_codec_names_sizes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        BlockDCTCodec().encode(torch.zeros(shape))


def test_codec_saves_and_loads(tmp_path: Path) -> None:
    codec = BlockDCTCodec(whitening=0.6)
    codec.save_pretrained(tmp_path)
    loaded = load_video_encoder(str(tmp_path))
    assert isinstance(loaded, BlockDCTCodec)
    assert loaded.identity == codec.identity != BlockDCTCodec().identity
    pixels = moving_square(5)
    torch.testing.assert_close(loaded.encode(pixels), codec.encode(pixels))


def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def test_wans_vae_loads_from_a_folder_and_is_normalised(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    encoder = load_video_encoder(str(tmp_path))  # a pipeline's folder: its vae is found
    pixels = moving_square(5)
    latents = encoder.encode(pixels)
    assert latents.shape == (1, 16, 2, 8, 8)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    expected = (vae.encode(pixels).latent_dist.mode() - mean) / deviation
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(
        encoder.decode(latents), vae.decode(latents * deviation + mean).sample.clamp(-1, 1), atol=1e-5, rtol=1e-4
    )
    assert weights_digest(vae) in encoder.identity


def test_umt5_loads_from_a_folder_and_pads_with_zeros(tmp_path: Path) -> None:
    model, tokenizer = byte_umt5(seed=3)
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = load_text_encoder(str(tmp_path), text_len=32)
    captions = ["a star", "a much longer caption of a person in a room"]
    features = encoder.encode(captions)
    assert [len(feature) for feature in features] == [7, 32]  # bytes and the end mark; cut at text_len
    padded = encoder.encode_padded(captions)
    assert padded.shape == (2, 32, 64)
    assert float(padded[0, 7:].abs().max()) == 0.0
    torch.testing.assert_close(padded[0, :7], encoder.encode(["a star"])[0], atol=1e-5, rtol=1e-4)


def test_the_built_in_text_encoder_is_the_same_everywhere_and_tells_captions_apart() -> None:
    first, again = load_text_encoder("byte-umt5", 48), load_text_encoder("byte-umt5", 48)
    assert first.identity == again.identity != load_text_encoder("byte-umt5", 32).identity
    one, two = first.encode(["a star in a room", "a gear in a room"])
    assert not torch.allclose(one[:4], two[:4])


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no encoder at ./nowhere"):
        load_video_encoder("./nowhere")


def test_pad_text_stacks() -> None:
    out = pad_text([torch.ones(2, 3), torch.ones(4, 3)], 5)
    assert out.sum(dim=(1, 2)).tolist() == [6.0, 12.0]


def test_the_codec_takes_what_it_is_given_to_its_own_device() -> None:
    codec = BlockDCTCodec().to("meta")  # stands for a GPU: other devices' tensors don't mix with its own either
    latents = codec.encode(torch.zeros(1, 3, 5, 16, 16))
    assert latents.is_meta
    assert latents.shape == (1, 16, 2, 2, 2)
    assert codec.decode(torch.zeros(latents.shape)).is_meta
