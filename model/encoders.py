"""Video and text encoders behind one small interface.

Two pairs exist. The real one is Wan's: `AutoencoderKLWan` and UMT5-XXL, loaded from a local folder or a hub id.
The desk-size one needs no download: `BlockDCTCodec`, a fixed linear codec with the shape rules of the Wan VAE
(stride 4 x 8 x 8, first frame alone, 16 channels), and a small frozen UMT5 over bytes with seeded weights.
Both give the same latents' layout, so nothing behind the encoders knows which pair made them.
"""

import hashlib
import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ftfy
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    UMT5Config,
    UMT5EncoderModel,
)

from domainshuttle.model.encoder_sources import (
    BLOCK_DCT,
    BYTE_UMT5,
    BYTE_UMT5_WIDTH,
    TILE,
    TILE_ABOVE,
    TILE_STRIDE,
    deciding_options,
)
from domainshuttle.model.file_mode import UmaskMode

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TEMPORAL_STRIDE, SPATIAL_STRIDE, LATENT_CHANNELS = 4, 8, 16


class VideoEncoder(Protocol):
    """Pixels to normalised latents and back."""

    identity: str
    """What made the latents: a name, and a digest of configuration and weights. Caches may be mixed only if equal."""

    def encode(self, pixels: Tensor) -> Tensor:
        """[b,3,F,H,W] in -1..1, F = 4 (f-1) + 1, to latents [b,16,f,H/8,W/8] of about unit variance."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b,16,f,h,w] to pixels [b,3,4(f-1)+1,8h,8w] in -1..1."""
        ...


class BlockDCTCodec(UmaskMode, ModelMixin, ConfigMixin):
    """A fixed video codec: the strongest 16 coefficients of a block discrete cosine transform.

    A block is 8 x 8 pixels of YCbCr in one frame (the first) or in four (the others), as in the Wan VAE. Which
    coefficients are kept, and their scale, follow from the variances of a separable first-order Markov picture, in
    closed form; nothing is learned. Coefficients are divided by sigma ** `whitening`, so that latents are of
    comparable size while strong coefficients still weigh more in a squared error. `pixel_mean` is subtracted first.
    """

    @register_to_config
    def __init__(
        self,
        correlation_space: float = 0.92,
        correlation_time: float = 0.95,
        chroma_variance: float = 0.7,
        pixel_mean: float = 0.45,
        pixel_deviation: float = 0.5,
        whitening: float = 0.5,
    ) -> None:
        super().__init__()
        for name, frames in (("image", 1), ("clip", TEMPORAL_STRIDE)):
            basis, deviation = self._strongest(frames)
            # a clip's block has four times an image's pixels: brought to the same size, since Wan's latents are too
            scale = deviation**whitening * frames ** ((1 - whitening) / 2)
            # [16, 3 * frames * 64]: analysis divides by the scale, synthesis is the transpose times the scale
            self.register_buffer(f"{name}_analysis", basis / scale[:, None])
            self.register_buffer(f"{name}_synthesis", (basis * scale[:, None]).T.contiguous())

    def _strongest(self, frames: int) -> tuple[Tensor, Tensor]:
        """The 16 coefficients of most variance of a block: orthonormal rows [16, 3*frames*64], deviations [16]."""
        space = _dct(SPATIAL_STRIDE)
        time = _dct(frames)
        variance_space = _markov_variances(space, self.config.correlation_space)
        variance_time = _markov_variances(time, self.config.correlation_time)
        colour = torch.tensor([1.0, self.config.chroma_variance, self.config.chroma_variance], dtype=torch.float64)
        variance = torch.einsum("c,t,y,x->ctyx", colour, variance_time, variance_space, variance_space)
        chosen = variance.flatten().sort(descending=True, stable=True).indices[:LATENT_CHANNELS]
        c, t, y, x = torch.unravel_index(chosen, variance.shape)
        # coefficient of colour c: the product of one temporal and two spatial cosines, on the RGB axes
        rows = torch.einsum("kc,kt,ky,kx->kctyx", _YCBCR[c], time[t], space[y], space[x])
        deviation = (variance.flatten()[chosen] * self.config.pixel_deviation**2).sqrt()
        return rows.flatten(1).float(), deviation.float()

    @property
    def identity(self) -> str:
        # what diffusers adds, such as where it was loaded from, begins with an underscore
        options = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return f"{BLOCK_DCT}:{_digest(json.dumps(options, sort_keys=True).encode())}"

    def encode(self, pixels: Tensor) -> Tensor:
        """[b,3,F,H,W] in -1..1 to latents [b,16,f,H/8,W/8]; raises ValueError for sizes that do not divide."""
        _, c, frames, height, width = pixels.shape
        if c != 3 or (frames - 1) % TEMPORAL_STRIDE or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; expected [b, 3, 4 k + 1, 8 m, 8 n]: "
                "resize and cut the clip to a bucket first"
            )
        pixels = pixels.to(self.device)
        parts = [self._analyse(pixels[:, :, :1], 1, self.image_analysis)]
        if frames > 1:
            parts.append(self._analyse(pixels[:, :, 1:], TEMPORAL_STRIDE, self.clip_analysis))
        return torch.cat(parts, dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b,16,f,h,w] to pixels [b,3,4(f-1)+1,8h,8w], clamped to -1..1."""
        latents = latents.to(self.device)
        parts = [self._synthesise(latents[:, :, :1], 1, self.image_synthesis)]
        if latents.shape[2] > 1:
            parts.append(self._synthesise(latents[:, :, 1:], TEMPORAL_STRIDE, self.clip_synthesis))
        return torch.cat(parts, dim=2).add_(self.config.pixel_mean).clamp_(-1, 1)

    def _analyse(self, pixels: Tensor, frames: int, analysis: Tensor) -> Tensor:
        b, _, total, height, width = pixels.shape
        s = SPATIAL_STRIDE
        blocks = (pixels - self.config.pixel_mean).reshape(b, 3, total // frames, frames, height // s, s, width // s, s)
        # b c f t h y w x -> b f h w (c t y x)
        blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return (blocks.to(analysis.dtype) @ analysis.T).permute(0, 4, 1, 2, 3).contiguous()

    def _synthesise(self, latents: Tensor, frames: int, synthesis: Tensor) -> Tensor:
        b, _, f, h, w = latents.shape
        s = SPATIAL_STRIDE
        blocks = latents.permute(0, 2, 3, 4, 1).to(synthesis.dtype) @ synthesis.T
        # b f h w (c t y x) -> b c (f t) (h y) (w x)
        blocks = blocks.reshape(b, f, h, w, 3, frames, s, s).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return blocks.reshape(b, 3, f * frames, h * s, w * s)


# Orthonormal luma/chroma axes over RGB, so that the transform is an isometry.
_YCBCR = torch.tensor(
    [
        [1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)],
        [-1 / math.sqrt(6), -1 / math.sqrt(6), 2 / math.sqrt(6)],
        [1 / math.sqrt(2), -1 / math.sqrt(2), 0.0],
    ],
    dtype=torch.float64,
)


def _dct(n: int) -> Tensor:
    """The orthonormal type-II cosine basis, rows by frequency: [n,n] float64."""
    k, i = torch.meshgrid(torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64), indexing="ij")
    basis = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def _markov_variances(basis: Tensor, correlation: float) -> Tensor:
    """Variance of each coefficient of a unit-variance first-order Markov signal: the diagonal of B R B^T."""
    i = torch.arange(basis.shape[1], dtype=torch.float64)
    covariance = correlation ** (i[:, None] - i[None, :]).abs()
    return torch.einsum("ki,ij,kj->k", basis, covariance, basis)


class WanVideoEncoder:
    """diffusers' `AutoencoderKLWan` as a `VideoEncoder`: the posterior's mode, normalised by the VAE's statistics.

    Frames of more than `tile_above` pixels are encoded in tiles (None: never). Not for several threads at once: the VAE
    holds what it needs of the frames before.
    """

    def __init__(self, vae: "AutoencoderKLWan", identity: str, tile_above: int | None = TILE_ABOVE) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.identity = identity
        self.tile_above = tile_above
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean).view(shape)
        self._deviation = torch.tensor(vae.config.latents_std).view(shape)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        tiled = self.tile_above is not None and pixels.shape[-2] * pixels.shape[-1] > self.tile_above
        if tiled:
            self.vae.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
        try:
            latents = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode().float()
        finally:
            if tiled:
                self.vae.disable_tiling()
        return (latents - self._mean.to(latents.device)) / self._deviation.to(latents.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, torch.float32)
        latents = latents * self._deviation.to(latents.device) + self._mean.to(latents.device)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float().clamp_(-1, 1)


class TextEncoder:
    """A UMT5 encoder and its tokenizer: captions to features, padded with zeros to a fixed length (as Wan does)."""

    def __init__(
        self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, identity: str, text_len: int
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = f"{identity}-ftfy{ftfy.__version__}:{text_len}"
        self.text_len = text_len

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """Features of each caption without padding: tensors [l, text_dim], l <= text_len."""
        tokens = self.tokenizer(
            [cleaned_caption(caption) for caption in captions],
            padding=True,
            truncation=True,
            max_length=self.text_len,
            return_tensors="pt",
        ).to(self.model.device)
        hidden = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    def count_tokens(self, caption: str) -> int:
        """Tokens of a whole caption, of which `encode` takes at most text_len."""
        return len(self.tokenizer(cleaned_caption(caption), truncation=False, verbose=False).input_ids)

    def encode_padded(self, captions: list[str]) -> Tensor:
        """Features of captions as one batch [b, text_len, text_dim], zeros behind each caption's end."""
        return pad_text(self.encode(captions), self.text_len)


def cleaned_caption(caption: str) -> str:
    """A caption as Wan's pipeline gives it to the tokenizer: broken Unicode mended, HTML's entities read, one space
    between words."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


def pad_text(features: list[Tensor], text_len: int) -> Tensor:
    """Stacks features [l_i, d] into [b, text_len, d] with zeros behind."""
    padded = features[0].new_zeros(len(features), text_len, features[0].shape[-1])
    for row, feature in zip(padded, features, strict=True):
        row[: feature.shape[0]] = feature
    return padded


def network_dtype(device: str) -> torch.dtype:
    """What transformers and text encoders compute in where they are not trained, as Wan's do; its VAE computes in
    float32 everywhere."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def load_video_encoder(
    source: str, device: str = "cpu", dtype: torch.dtype = torch.float32, tile_above: int | None = TILE_ABOVE
) -> VideoEncoder:
    """The video encoder named by `source`: `block-dct`, or a folder or hub id with an `AutoencoderKLWan`.

    A diffusers pipeline folder works too: its `vae` subfolder is taken. Raises ValueError when there is no such thing.
    """
    if source == BLOCK_DCT:
        return BlockDCTCodec().to(device)
    from diffusers import AutoencoderKLWan  # here, since it brings all of diffusers' models along, which takes seconds

    folder, options = _locate(source, "vae")
    config = AutoencoderKLWan.load_config(folder, **options)
    if config.get("_class_name") == "BlockDCTCodec":
        return BlockDCTCodec.from_pretrained(folder, **options).to(device)
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype, **options).to(device)
    return WanVideoEncoder(vae, f"{source}:{weights_digest(vae)}-{_digest_of(deciding_options(config))}", tile_above)


def load_text_encoder(
    source: str, text_len: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder named by `source`: `byte-umt5`, or a folder or hub id with UMT5 and its tokenizer.

    A diffusers pipeline folder works too: its `text_encoder` and `tokenizer` subfolders are taken.
    """
    if source == BYTE_UMT5:
        model, tokenizer = byte_umt5()
        model, decides = model.to(dtype), ""
    else:
        folder, options = _locate(source, "text_encoder")
        model = UMT5EncoderModel.from_pretrained(folder, dtype=dtype, **options)
        config, _ = PretrainedConfig.get_config_dict(folder, **options)
        folder, options = _locate(source, "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        tokens = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
        decides = f"-{_digest_of([deciding_options(config), tokens])}"
    return TextEncoder(model.to(device), tokenizer, f"{source}:{weights_digest(model)}{decides}", text_len)


def byte_umt5(seed: int = 0) -> tuple[UMT5EncoderModel, ByT5Tokenizer]:
    """A small UMT5 encoder over bytes with seeded random weights; its features separate captions, no more."""
    config = UMT5Config(
        vocab_size=384,
        d_model=BYTE_UMT5_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(config), ByT5Tokenizer()


def weights_digest(module: torch.nn.Module) -> str:
    """A short digest of a module's weights (names, shapes, types and bytes)."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of(options: Any) -> str:
    """Of what else than weights decides what an encoder gives: latents' statistics, a tokenizer's vocabulary."""
    return _digest(json.dumps(options, sort_keys=True, default=str).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _locate(source: str, subfolder: str) -> tuple[str, dict[str, Any]]:
    """Where to load from: `source` itself, or its `subfolder` where it is a pipeline's folder or a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path / subfolder if (path / subfolder).is_dir() else path), {}
    if path.is_absolute() or source.startswith("."):
        raise ValueError(
            f"no encoder at {source}: the folder does not exist; give a folder, a hub id or a built-in name"
        )
    return source, {"subfolder": subfolder}
