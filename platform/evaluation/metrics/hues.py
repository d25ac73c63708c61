"""A descriptor of pictures that needs no model: the hues that they show.

It is simple on purpose: a histogram of hue, weighted by chroma, so that white, grey and skin hardly count. Two are
compared by their product, the Bhattacharyya coefficient of the histograms.
"""

import numpy as np

from domainshuttle.model.pictures import Pixels

HUES = 24
LEAST_CHROMA = 0.06


def describe(frames: Pixels) -> np.ndarray:
    """The descriptor of [F,h,w,3] uint8: square roots of a hue histogram [24] that sums to 1 (zeros without colour)."""
    red, green, blue = np.moveaxis(frames.astype(np.float64) / 255, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    cb, cr = 0.564 * (blue - luma), 0.713 * (red - luma)
    weight = np.clip(np.hypot(cb, cr) - LEAST_CHROMA, 0, None).ravel()
    place = (np.arctan2(cr, cb).ravel() + np.pi) / (2 * np.pi) * HUES
    low = np.floor(place).astype(int)
    share = place - low
    # each pixel is shared between the two nearest hues, so that a small shift changes little
    histogram = np.bincount(low % HUES, weight * (1 - share), HUES) + np.bincount(
        (low + 1) % HUES, weight * share, HUES
    )
    total = histogram.sum()
    return np.sqrt(histogram / total) if total > 0 else histogram
