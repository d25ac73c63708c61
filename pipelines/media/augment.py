"""Altered views of a reference picture: how one is drawn, and how it is applied to pixels."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from domainshuttle.model.pictures import Pixels

_MASK = (1 << 64) - 1
_VIEW_STREAM = 2  # 0 and 1 are pairing's


@dataclass(frozen=True, slots=True)
class AugmentedView:
    """How to alter a picture so that it is not the same input twice: cut the box `crop` (top, left, height, width as
    fractions of the picture), mirror it where `flip`, then multiply brightness, contrast and saturation."""

    crop: tuple[float, float, float, float]
    flip: bool
    brightness: float
    contrast: float
    saturation: float


def augmented_view(seed: int, epoch: int, sample_id: int, picture: int) -> AugmentedView:
    """The view for a picture of B that A shows too: 0.75 to 0.95 of each side kept, mirrored in half of the cases,
    colours within a fifth. `picture` is its position in the sample's list of references."""
    draws = uniforms(seed, epoch, sample_id, _VIEW_STREAM, 8, picture)
    height, width = 0.75 + 0.2 * draws[0], 0.75 + 0.2 * draws[1]
    top, left = (1 - height) * draws[2], (1 - width) * draws[3]
    brightness, contrast, saturation = (float(0.8 + 0.4 * draw) for draw in draws[5:8])
    crop = (float(top), float(left), float(height), float(width))
    return AugmentedView(crop, bool(draws[4] < 0.5), brightness, contrast, saturation)


def apply_view(picture: Pixels, view: AugmentedView) -> Pixels:
    """[h,w,3] cut, mirrored and recoloured as `view` says: [h',w',3].

    Brightness multiplies; contrast scales the distance from the mean grey, saturation that from each pixel's own grey.
    """
    height, width, _ = picture.shape
    top, left = round(view.crop[0] * height), round(view.crop[1] * width)
    bottom, right = top + max(1, round(view.crop[2] * height)), left + max(1, round(view.crop[3] * width))
    image = Image.fromarray(picture[top:bottom, left:right])
    if view.flip:
        image = ImageOps.mirror(image)
    image = ImageEnhance.Brightness(image).enhance(view.brightness)
    image = ImageEnhance.Contrast(image).enhance(view.contrast)
    return np.asarray(ImageEnhance.Color(image).enhance(view.saturation))


def uniforms(seed: int, epoch: int, sample_id: int, stream: int, count: int, item: int = 0) -> np.ndarray:
    """`count` float64 in [0, 1) of a counter-based generator.

    Only the generator's raw words are used: numpy promises those, but not its distributions, to stay the same.
    """
    generator = np.random.Philox(
        key=np.array([seed & _MASK, sample_id & _MASK], np.uint64),
        counter=np.array([0, item, stream, epoch], np.uint64),
    )
    words: np.ndarray = generator.random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53
