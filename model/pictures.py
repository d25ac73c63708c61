"""Reference pictures as the model is shown them: as they are meant to be looked at, fitted to a frame on white.

Training and generation both come here, so that a model is asked with what it was trained on. Without torch, since the
processes that decode for training need none.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile

Pixels = NDArray[np.uint8]

_ICC = b"ICC_PROFILE\0"
_WHITE = (255, 255, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def contain_geometry(size: tuple[int, int], frame: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a picture of `size` (height, width) lies in a `frame` (height, width): the largest scale that fits, centred.

    Returns the (height, width) to scale to, and the (top, left) at which to lay it.

    Raises:
        ValueError: for a picture without pixels.
    """
    height, width = size
    if min(size) < 1:
        raise ValueError(f"a picture of {height}x{width} pixels: expected at least 1x1")
    if height * frame[1] >= width * frame[0]:  # taller than the frame: the height fits exactly
        scaled = (frame[0], min(frame[1], max(1, round(width * frame[0] / height))))
    else:
        scaled = (min(frame[0], max(1, round(height * frame[1] / width))), frame[1])
    return scaled, ((frame[0] - scaled[0]) // 2, (frame[1] - scaled[1]) // 2)


def fit_reference(picture: Pixels, height: int, width: int) -> Pixels:
    """[h,w,3] to [height,width,3]: scaled to lie inside it, padded with white (as the release does)."""
    scaled, (top, left) = contain_geometry((picture.shape[0], picture.shape[1]), (height, width))
    canvas = Image.new("RGB", (width, height), _WHITE)
    canvas.paste(resized(picture, scaled), (left, top))
    return np.asarray(canvas)


def resized(picture: Pixels, size: tuple[int, int]) -> Image.Image:
    """[h,w,3] as a picture of `size` (height, width), by Lanczos; as it is where it has that size."""
    image = Image.fromarray(picture)
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.LANCZOS)


def as_shown(image: Image.Image, convert: Callable[[Image.Image], Image.Image] | None = None) -> Image.Image:
    """A picture of any mode as RGB, as it is meant to be looked at.

    Its ICC profile is obeyed, transparent parts are laid on white, of 16 bits a channel the upper 8 are taken, and it
    is turned as its orientation says (EXIF or XMP, wherever Pillow finds it).

    Args:
        image: as Pillow opened it.
        convert: makes its colours (L, RGB or CMYK) sRGB, where others than the ICC profile's are meant.

    Raises:
        ValueError: for a profile that can't be read, or that is not one for such a picture.
        OSError: when the picture itself can't be decoded.
    """
    image.load()  # a PNG may say its orientation after its pixels
    colours, opacity = _split(image)
    shown = to_srgb(colours, profile_of(image)) if convert is None else convert(colours)
    return upright_on_white(shown, opacity, upright_turn(image))


def profile_of(image: Image.Image) -> bytes | None:
    """A picture's ICC profile, wherever before the pixels it stands; None for none.

    Raises:
        ValueError: for one of which a part is missing or can't be read, which Pillow takes for none.
    """
    notes = image.applist if isinstance(image, JpegImageFile) else []
    if parts := [content for name, content in notes if name == "APP2" and content[:12] == _ICC]:
        if min(map(len, parts)) < 14:
            raise ValueError("its ICC profile is damaged")
        parts.sort(key=lambda part: part[12])
        if [part[12] for part in parts] != [*range(1, parts[0][13] + 1)]:
            raise ValueError(f"of its ICC profile the parts {[part[12] for part in parts]} of {parts[0][13]} are there")
        return b"".join(part[14:] for part in parts)
    profile: bytes | None = image.info.get("icc_profile")
    if profile is None and "icc_profile" in image.info:
        raise ValueError("its ICC profile is damaged")
    return profile


def upright_on_white(image: Image.Image, opacity: Image.Image | None, turn: Image.Transpose | None) -> Image.Image:
    """An RGB picture with its opacity, an L, laid on white, then turned."""
    if opacity is not None:
        image = Image.composite(image, Image.new("RGB", image.size, _WHITE), opacity)
    return image if turn is None else image.transpose(turn)


def upright_turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn a picture so that it stands upright; None for not at all, also where its EXIF can't be read."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF breaks in many ways, each with an error of its own, and none of them is the picture's
        return None


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A picture's colours, in a mode that has profiles (L, RGB, CMYK), and its opacity, an L, where it has one."""
    hidden = image.info.get("transparency")
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
        levels = np.asarray(image)
        grey = Image.fromarray((levels >> 8).astype(np.uint8))
        return grey, None if hidden is None else Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8))
    if image.mode in ("LA", "La"):
        grey, opacity = image.convert("LA").split()
        return grey, opacity
    if image.mode in ("RGBA", "RGBa", "PA") or hidden is not None:
        whole = image.convert("RGBA")
        return whole.convert("RGB"), whole.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An L, RGB or CMYK picture as sRGB by its ICC profile (Little CMS, perceptual intent); without one RGB and grey
    are sRGB, and CMYK is what Pillow makes of it.

    Raises:
        ValueError: for a profile that can't be read, or that is not one for such a picture.
    """
    if profile is None:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")
        shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(f"its ICC profile of {len(profile)} bytes can't be used for {image.mode}: {error}") from error
    assert shown is not None
    return shown
