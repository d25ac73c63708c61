"""From the colours that a file names to sRGB.

Primaries and transfer functions go by their numbers in ITU-T H.273, which the codecs, MP4, Matroska, FFmpeg and PNG's
cICP share. What is made for common screens is taken as it is coded: BT.709, both systems of BT.601, and what is not
named. Wider primaries are converted, and HDR is brought to SDR:

    in linear light of BT.709's primaries, 1 = SDR white (by BT.2408 203 cd/m2 in PQ; in HLG a signal of 75 %, of whose
    light, the scene's, no system gamma is taken), m = the largest of R, G and B:
    up to m = 0.8 nothing changes; above, R, G and B are multiplied by c / m,
    c = 0.8 + 0.2 t / (1 + t), t = (m - 0.8) / 0.2

So what SDR can show keeps its level, but for the brightest (white becomes 243 of 255), no highlight is cut off, and no
hue changes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from domainshuttle.pipelines.errors import DataError

Chromaticities = tuple[float, float, float, float, float, float, float, float]
"""x and y of red, green, blue and white."""
Curve = Literal["sRGB", "PQ", "HLG"] | float
"""How levels are light: as named, or by a power, of which 1 is linear."""

_D65, _C = (0.3127, 0.3290), (0.310, 0.316)
BT709: Chromaticities = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, *_D65)
_TAKEN_AS_BT709 = {0, 1, 2, 3, 5, 6, 7, 22}
"""BT.601's two systems and what is near them, as FFmpeg takes them; unspecified; 0 and 3 are reserved."""
_OTHERS: dict[int, Chromaticities] = {
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, *_C),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, *_C),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),
}
_SDR = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15}
_CURVES: dict[int, Curve] = {8: 1.0, 16: "PQ", 18: "HLG"}

_SDR_WHITE = 203.0
_KNEE = 0.8
_STRIP = 1 << 20
"""Pixels that are converted at a time: in float32 they take six times their own memory."""


@dataclass(frozen=True)
class ColourSpace:
    """Colours that are not sRGB's."""

    chromaticities: Chromaticities
    curve: Curve


def named(primaries: int, transfer: int, name: str) -> ColourSpace | None:
    """The colours of numbers of H.273; None where levels are taken as they are coded.

    Raises DataError for those that can't be shown on a screen without knowing more.
    """
    if primaries not in _TAKEN_AS_BT709 | _OTHERS.keys():
        raise DataError(f"{name}: colour primaries {primaries} of H.273 are not read")
    if transfer not in _SDR | _CURVES.keys():
        raise DataError(f"{name}: transfer function {transfer} of H.273 is not read")
    if primaries in _TAKEN_AS_BT709 and transfer in _SDR:
        return None
    return ColourSpace(_OTHERS.get(primaries, BT709), _CURVES.get(transfer, "sRGB"))


def to_srgb(levels: NDArray[np.uint16], space: ColourSpace) -> NDArray[np.uint8]:
    """[h,w,3] of 16 bits, RGB in full range, as sRGB [h,w,3]. Raises DataError for chromaticities that are none."""
    light, matrix = _light_of_levels(space.curve), _to_bt709(space.chromaticities).astype(np.float32)
    shown = np.empty(levels.shape, np.uint8)
    rows = max(1, _STRIP // levels.shape[1])
    for top in range(0, len(levels), rows):
        rgb = light[levels[top : top + rows]] @ matrix.T
        if space.curve in ("PQ", "HLG"):
            most = rgb.max(axis=-1, keepdims=True)
            over = np.maximum(most - _KNEE, 0) / (1 - _KNEE)
            rgb *= np.where(over > 0, (_KNEE + (1 - _KNEE) * over / (1 + over)) / np.maximum(most, _KNEE), 1)
        shown[top : top + rows] = _srgb_levels()[(np.clip(rgb, 0, 1) * 65535 + 0.5).astype(np.uint16)]
    return shown


@lru_cache(maxsize=16)
def _light_of_levels(curve: Curve) -> NDArray[np.float32]:
    """Linear light of each of 65536 levels; HDR's in units of SDR white."""
    level = np.arange(65536) / 65535
    if curve == "PQ":
        root = level ** (32 / 2523)
        light = (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        light = light * (10000 / _SDR_WHITE)
    elif curve == "HLG":
        a, b = 0.17883277, 0.28466892
        c = 0.5 - a * np.log(4 * a)
        scene = np.where(level <= 0.5, level**2 / 3, (np.exp((level - c) / a) + b) / 12)
        light = scene / ((np.exp((0.75 - c) / a) + b) / 12)
    elif curve == "sRGB":
        light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    else:
        light = level**curve
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _srgb_levels() -> NDArray[np.uint8]:
    """The level of 8 bits for each of 65536 steps of linear light."""
    light = np.arange(65536) / 65535
    level = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(level * 255).astype(np.uint8)


@lru_cache(maxsize=64)
def _to_bt709(chromaticities: Chromaticities) -> NDArray[np.float64]:
    """Linear RGB of some primaries to that of BT.709's, white to white (Bradford)."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    source, target = _to_xyz(chromaticities), _to_xyz(BT709)
    cones = (bradford @ target.sum(axis=1)) / (bradford @ source.sum(axis=1))
    return np.linalg.inv(target) @ np.linalg.inv(bradford) @ np.diag(cones) @ bradford @ source


def _to_xyz(chromaticities: Chromaticities) -> NDArray[np.float64]:
    """Linear RGB to XYZ, white having Y = 1; raises DataError where there is no such matrix."""
    x, y = np.array(chromaticities).reshape(4, 2).T
    xyz = np.stack([x, y, 1 - x - y])
    if (y <= 0).any() or (xyz < -1e-6).any() or abs(np.linalg.det(xyz[:, :3])) < 1e-4:
        raise DataError(f"chromaticities {chromaticities} are those of no screen")
    primaries, white = xyz[:, :3] / y[:3], xyz[:, 3] / y[3]
    matrix: NDArray[np.float64] = primaries * np.linalg.solve(primaries, white)
    return matrix
