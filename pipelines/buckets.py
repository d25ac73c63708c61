"""Buckets: the few (frames, height, width) to which targets and references are brought, so that samples stack into
batches.

A bucket is written `frames x height x width` in pixels, such as `81x480x832`; an image's has one frame. Latents follow
Wan's VAE (time stride 4 with the first frame alone, space stride 8, 16 channels), tokens its patch of (1, 2, 2).

The geometry is stated here and carried out by `media`: a target is scaled until it covers its bucket and its centre is
cropped; a reference is scaled until it is contained in the bucket's frame and padded with white.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import LATENT_CHANNELS, LEAST_FPS, MOST_FPS

TIME_STRIDE = 4
SPACE_STRIDE = 8
PATCH = 2

# Heights and widths of one class have nearly the same area, so their steps cost nearly the same.
RESOLUTIONS: dict[str, tuple[tuple[int, int], ...]] = {
    "480p": ((480, 832), (544, 704), (624, 624), (704, 544), (832, 480)),
    "720p": ((720, 1280), (832, 1104), (960, 960), (1104, 832), (1280, 720)),
}


@dataclass(frozen=True, order=True)
class Bucket:
    """`frames` (1 + a multiple of 4), `height` and `width` (multiples of 16) in pixels; raises DataError on others."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.frames - 1) % TIME_STRIDE:
            raise DataError(
                f"bucket {self}: {self.frames} frames; expected 1 + a multiple of {TIME_STRIDE}, such as 1, 5, 81"
            )
        step = SPACE_STRIDE * PATCH
        if min(self.height, self.width) < step or self.height % step or self.width % step:
            raise DataError(f"bucket {self}: height and width must be multiples of {step} pixels, such as 480x832")

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[channels, f, h, w] of the target's latents."""
        return (
            LATENT_CHANNELS,
            (self.frames - 1) // TIME_STRIDE + 1,
            self.height // SPACE_STRIDE,
            self.width // SPACE_STRIDE,
        )

    @property
    def reference_shape(self) -> tuple[int, int, int]:
        """[channels, h, w] of one reference's latents."""
        channels, _, height, width = self.latent_shape
        return channels, height, width

    @property
    def reference_tokens(self) -> int:
        """Tokens of one reference image: those of one latent frame."""
        _, _, height, width = self.latent_shape
        return (height // PATCH) * (width // PATCH)

    @property
    def video_tokens(self) -> int:
        """Tokens of the target."""
        return self.latent_shape[1] * self.reference_tokens

    def tokens(self, references: int = 0) -> int:
        """Tokens of one sample's joint sequence, the target's and those of `references` images."""
        return self.video_tokens + references * self.reference_tokens


def parse_bucket(text: str) -> Bucket:
    """The bucket of a string such as '81x480x832' (`str(bucket)`); raises DataError on any other form."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise DataError(f"bucket {text[:60]!r}: expected frames x height x width in pixels, such as '81x480x832'")
    frames, height, width = map(int, match.groups())
    return Bucket(frames, height, width)


def standard_buckets(resolution: str, frames: Iterable[int]) -> list[Bucket]:
    """The buckets of a resolution class ('480p' or '720p') for each number of frames; 1 is for images."""
    if resolution not in RESOLUTIONS:
        raise DataError(f"resolution {resolution!r}: expected one of {sorted(RESOLUTIONS)}, or list the buckets")
    return sorted(Bucket(count, height, width) for count in set(frames) for height, width in RESOLUTIONS[resolution])


def frames_at(frames: int, fps: float | None, target_fps: float | None) -> int:
    """How many frames of a target of `frames` at `fps` can be sampled at `target_fps` (None: at its own rate).

    They are those at times 0, 1 / target_fps, ... that `decode_video(..., fps=target_fps)` gives. One that falls into
    the last eighth of the last frame is not counted: rounded timestamps may put it after the end. An image (one frame)
    stays one. Raises DataError for a clip that does not say its rate, for one of which only a still would be left, and
    for rates that are none.
    """
    if frames == 1 or target_fps is None:
        return frames
    if fps is None:
        raise DataError(f"a clip of {frames} frames without fps can't be sampled at {target_fps:g} fps: add its fps")
    for rate in (fps, target_fps):
        checked_rate(rate, f"a clip of {frames} frames")
    target, own = (Fraction(rate).limit_denominator(1001) for rate in (target_fps, fps))
    count = math.ceil((frames - Fraction(1, 8)) * target / own)
    if count == 1:
        raise DataError(f"a clip of {frames} frames at {fps:g} fps has one frame at {target_fps:g} fps: too short")
    return count


def checked_rate(fps: float | None, name: str) -> None:
    """Raises DataError for a rate, in frames a second, at which no clip is; None is each clip's own."""
    if fps is not None and not LEAST_FPS <= fps <= MOST_FPS:
        raise DataError(f"{name}: a rate of {fps:g} frames a second; expected {LEAST_FPS:g} to {MOST_FPS:g}")


def choose_bucket(frames: int, height: int, width: int, buckets: Iterable[Bucket]) -> Bucket:
    """The bucket for a target of `frames` (at the rate at which it will be sampled) of `height` x `width` pixels.

    1. Length: the longest buckets that the target fills; an image (one frame) goes to one-frame buckets only, a clip
       only to longer ones, so that a clip is never trained on as a still.
    2. Size: those that need no enlarging; where all do, those that need the least.
    3. Crop: those whose crop keeps within a tenth of what the best keeps.
    4. Resolution: of these the largest class (areas of at least 0.7 of the largest), and in it the least crop.

    Raises DataError where no bucket is short enough.
    """
    offered = sorted(set(buckets))
    fitting = [b for b in offered if b.frames <= frames and (b.frames == 1) == (frames == 1)]
    if not fitting:
        what = "an image" if frames == 1 else f"a clip of {frames} frames"
        raise DataError(
            f"no bucket for {what} of {height}x{width}: the list has {[str(b) for b in offered]}; "
            "add one of its length or leave the sample out"
        )
    longest = max(b.frames for b in fitting)
    fitting = [b for b in fitting if b.frames == longest]
    scale = {b: max(b.height / height, b.width / width) for b in fitting}
    kept = {b: b.height * b.width / (scale[b] ** 2 * height * width) for b in fitting}
    least = max(1.0, min(scale.values()) * 1.01)
    fitting = [b for b in fitting if scale[b] <= least]
    most = max(kept[b] for b in fitting)
    fitting = [b for b in fitting if kept[b] >= most - 0.1]
    largest = max(b.height * b.width for b in fitting)
    fitting = [b for b in fitting if b.height * b.width >= 0.7 * largest]
    return max(fitting, key=lambda b: (round(kept[b], 9), b.height * b.width, b.width))


def cover_geometry(size: tuple[int, int], bucket: Bucket) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """How a target of `size` (height, width) fills its bucket: the least scale that leaves no gap, its centre kept.

    Returns the (height, width) to scale to, and the box (top, left, height, width) to cut from that.
    """
    height, width = _checked_size(size)
    if height * bucket.width >= width * bucket.height:  # taller than the bucket: the width fits exactly
        scaled = (max(bucket.height, round(height * bucket.width / width)), bucket.width)
    else:
        scaled = (bucket.height, max(bucket.width, round(width * bucket.height / height)))
    top, left = (scaled[0] - bucket.height) // 2, (scaled[1] - bucket.width) // 2
    return scaled, (top, left, bucket.height, bucket.width)


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    if min(size) < 1:
        raise DataError(f"a picture of {size[0]}x{size[1]} pixels: expected at least 1x1")
    return size


def nearest_shareable(bucket: Bucket, ranks: int) -> Bucket:
    """The bucket of as many frames, and of nearly the same size, whose frames have a multiple of `ranks` tokens."""
    step = SPACE_STRIDE * PATCH
    reach = range(-ranks * step, (ranks + 1) * step, step)
    near = [
        Bucket(bucket.frames, bucket.height + more, bucket.width + wider)
        for more in reach
        for wider in reach
        if min(bucket.height + more, bucket.width + wider) >= step
    ]
    return min(
        (one for one in near if one.reference_tokens % ranks == 0),
        key=lambda one: (
            abs(one.height - bucket.height) + abs(one.width - bucket.width),
            abs(one.height * bucket.width - one.width * bucket.height),
            -one.reference_tokens,
        ),
    )
