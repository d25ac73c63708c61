"""Clips and pictures of all codecs, formats and traits, made here with PyAV and Pillow."""

import io
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from icc import profile
from PIL import Image

from domainshuttle.pipelines.media import colours
from domainshuttle.pipelines.media.decode import Pixels

HEIGHT, WIDTH = 64, 96


def scene(shift: int, height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """[h,w,3]: light and dark spots that move by `shift` pixels over colours that change slowly, since decoders differ
    in how they interpolate between samples of colour."""
    spots = np.random.default_rng(0).integers(70, 180, (8, 12)).astype(np.float32)
    luma = np.roll(np.asarray(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)), shift, axis=1)
    blue = np.linspace(-50, 50, width)[None, :] + np.zeros((height, 1))
    red = np.linspace(-50, 50, height)[:, None] + np.zeros((1, width))
    rgb = np.stack([luma + 1.4 * red, luma - 0.34 * blue - 0.71 * red, luma + 1.77 * blue], -1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


SCENE = scene(0)


@dataclass(frozen=True)
class Codec:
    """An encoder of PyAV with a pixel format and a container."""

    name: str
    form: str
    container: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name}-{self.form}-{self.container}"


X264, X265 = {"crf": "4", "threads": "1"}, {"crf": "4", "x265-params": "log-level=none:pools=none"}
CODECS = [
    *(Codec("libx264", form, "mp4", X264) for form in ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le")),
    *(Codec("libx264", "yuv420p", container, X264) for container in ("mov", "matroska")),
    *(Codec("libx265", form, "mp4", X265) for form in ("yuv420p", "yuv420p10le")),
    *(Codec("libvpx-vp9", form, "webm", {"crf": "4", "b": "0"}) for form in ("yuv420p", "yuv444p")),
    Codec("libvpx", "yuv420p", "webm", {"crf": "4", "b": "8M", "qmax": "10"}),
    Codec("libsvtav1", "yuv420p", "mp4", {"crf": "8", "svtav1-params": "lp=1"}),
    Codec("mpeg4", "yuv420p", "mp4", {"qmin": "1", "qmax": "2"}),
    Codec("mpeg2video", "yuv420p", "matroska", {"qmin": "1", "qmax": "2"}),
    Codec("mjpeg", "yuvj420p", "mov", {"qmin": "1", "qmax": "1"}),
    Codec("mjpeg", "yuvj444p", "matroska", {"qmin": "1", "qmax": "1"}),
    Codec("prores_ks", "yuv422p10le", "mov"),
    *(Codec("ffv1", form, "matroska") for form in ("yuv420p", "yuv410p", "yuv444p16le", "bgr0", "gbrp10le", "gray")),
    Codec("qtrle", "rgb24", "mov"),
    Codec("png", "rgb24", "mov"),
]
INTERLACED = [CODECS[0], CODECS[1], CODECS[4], next(codec for codec in CODECS if codec.name == "mpeg2video")]
ALPHA = [
    Codec("libvpx-vp9", "yuva420p", "webm", {"crf": "4", "b": "0"}),
    Codec("prores_ks", "yuva444p10le", "mov", {"profile": "4444"}),
    Codec("ffv1", "yuva420p", "matroska"),
    Codec("qtrle", "argb", "mov"),
    Codec("png", "rgba", "mov"),
]
IDENTITY, TURNED, MIRRORED = (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, 1)
ORIENTATIONS = [IDENTITY, TURNED, MIRRORED, (-1, 0, 0, -1), (1, 0, 0, -1), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0)]


@dataclass(frozen=True)
class Traits:
    """What a clip says of itself."""

    aspect: Fraction = Fraction(1)
    orientation: tuple[int, int, int, int] = IDENTITY
    matrix: int = 2
    full: bool | None = None
    interlaced: bool = False

    @property
    def label(self) -> str:
        turn = ORIENTATIONS.index(self.orientation) + 1
        return f"sar{self.aspect}-turn{turn}-matrix{self.matrix}-full{self.full}-interlaced{self.interlaced:d}"


def clip(codec: Codec, traits: Traits, frames: Pixels) -> bytes:
    """[F,h,w,3 or 4] with those traits."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=codec.container) as out:
        options = dict(codec.options)
        if traits.interlaced:
            options["flags"] = "+ildct+ilme"
            if codec.name == "libx264":
                options["x264-params"] = "tff=1"
        stream = out.add_stream(codec.name, rate=Fraction(8), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], codec.form
        coder = stream.codec_context
        coder.sample_aspect_ratio = traits.aspect
        if traits.orientation != IDENTITY:
            a, b, c, d = (value << 16 for value in traits.orientation)
            stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        said = (traits.matrix, {None: 0, False: 1, True: 2}[traits.full])
        coder.colorspace, coder.color_range = said
        for frame in frames:
            one = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame), format="rgb24" if frame.shape[-1] == 3 else "rgba"
            )
            one = one.reformat(
                format=codec.form,
                dst_colorspace={1: 1, 7: 7, 9: 9, 4: 4}.get(traits.matrix, 5),
                dst_color_range=2 if traits.full or codec.form.startswith("yuvj") else 1,
            )
            one.colorspace, one.color_range = said
            out.mux(stream.encode(one))
        out.mux(stream.encode())
    return buffer.getvalue()


MODES = {
    "JPEG": ["L", "RGB", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"],
    "WEBP": ["RGB", "RGBA"],
}


def picture(kind: str, mode: str, wide: bool, turned: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """A picture of a format and a mode of Pillow, with an ICC profile of wide colours, and an EXIF orientation."""
    opacity = Image.fromarray(np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width)))
    image: Image.Image = Image.fromarray(scene(0, height, width))
    more: dict[str, Any] = {}
    if mode in ("LA", "RGBA"):
        image = image.convert(mode[:-1])
        image.putalpha(opacity)
    elif mode == "PA":  # a palette of which one colour is transparent
        image = image.quantize(32)
        more["transparency"] = 3
    elif mode == "P":
        image = image.quantize(32)
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if wide:
        more["icc_profile"] = profile(colours.ColourSpace(colours._OTHERS[12], 1.8))
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = turned
    if kind == "WEBP":
        more["lossless"] = True
    image.save(data, kind, exif=exif.tobytes(), **more)
    return data.getvalue()
