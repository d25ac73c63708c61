"""Buckets and their geometry. Run: pytest tests/pipelines/test_buckets.py"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainshuttle.model.pictures import contain_geometry
from domainshuttle.pipelines.buckets import (
    Bucket,
    choose_bucket,
    cover_geometry,
    frames_at,
    parse_bucket,
    standard_buckets,
)
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import decode_video, encode_mp4

SIDES = st.integers(1, 5000)


def test_the_shapes_and_tokens_of_the_recipe() -> None:
    bucket = Bucket(81, 480, 832)
    assert bucket.latent_shape == (16, 21, 60, 104)
    assert bucket.reference_shape == (16, 60, 104)
    assert (bucket.video_tokens, bucket.reference_tokens) == (32760, 1560)
    assert bucket.tokens(references=5) == 32760 + 5 * 1560
    assert Bucket(1, 64, 64).latent_shape == (16, 1, 8, 8)


def test_text_form() -> None:
    assert str(Bucket(5, 64, 96)) == "5x64x96"
    assert parse_bucket("5x64x96") == Bucket(5, 64, 96)
    for text in ("", "5x64", "5x64x96x1", "5X64X96", "-5x64x96", " 5x64x96", "5x64x96\n", "1e3x64x64"):
        with pytest.raises(DataError, match="frames x height x width"):
            parse_bucket(text)
    for text in ("4x64x64", "0x64x64", "5x60x64", "5x64x0"):
        with pytest.raises(DataError, match="bucket"):
            parse_bucket(text)


@pytest.mark.parametrize("resolution", ["480p", "720p"])
def test_a_class_costs_nearly_the_same_in_every_shape(resolution: str) -> None:
    buckets = standard_buckets(resolution, [1, 81])
    assert len(buckets) == 10
    tokens = [bucket.video_tokens for bucket in buckets if bucket.frames == 81]
    assert max(tokens) / min(tokens) < 1.06
    with pytest.raises(DataError, match="360p"):
        standard_buckets("360p", [1])


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((100, 1080, 1920), "81x720x1280"),  # the largest class that needs no enlarging
        ((100, 1080, 1872), "81x720x1280"),  # also where a smaller class would crop a little less
        ((100, 600, 1000), "81x480x832"),
        ((100, 1920, 1080), "81x1280x720"),
        ((80, 1080, 1920), "49x720x1280"),  # the longest that it fills
        ((49, 500, 500), "49x624x624"),  # all would enlarge it: the one that does so least
        ((49, 700, 700), "49x624x624"),
        ((1, 1000, 1000), "1x960x960"),
        ((1, 725, 1024), "1x544x704"),
        ((90, 240, 426), "81x480x832"),  # too small for all: the one that enlarges least
    ],
)
def test_choice(clip: tuple[int, int, int], expected: str) -> None:
    buckets = standard_buckets("480p", [1, 49, 81]) + standard_buckets("720p", [1, 49, 81])
    assert str(choose_bucket(*clip, buckets)) == expected
    assert str(choose_bucket(*clip, reversed(buckets))) == expected


def test_a_larger_bucket_that_would_crop_much_is_not_chosen() -> None:
    assert choose_bucket(1, 1400, 1400, [Bucket(1, 720, 1280), Bucket(1, 624, 624)]) == Bucket(1, 624, 624)


def test_no_bucket_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match="a clip of 40 frames"):
        choose_bucket(40, 480, 832, standard_buckets("480p", [1, 49]))
    with pytest.raises(DataError, match="an image"):
        choose_bucket(1, 480, 832, standard_buckets("480p", [49]))


@pytest.mark.parametrize("own", [8, 16, 24, 25, 29.97, 30000 / 1001, 30, 60])
@pytest.mark.parametrize("frames", [2, 9, 30])
def test_as_many_frames_can_be_decoded_as_are_counted(own: float, frames: int) -> None:
    clip = encode_mp4(np.random.default_rng(0).integers(0, 255, (frames, 32, 32, 3)).astype(np.uint8), own)
    for target in (5, 8, 12, 16, 23.976, 24, own):
        try:
            count = frames_at(frames, own, target)
        except DataError:
            assert frames * target / own < 1.5
            continue
        assert len(decode_video(clip, count, fps=target)) == count
        with pytest.raises(DataError, match="could be read"):  # one more only in the last eighth of the last frame
            decode_video(clip, count + 1 + (count < (frames * target / own)), fps=target)


def test_frames_at_a_rate() -> None:
    assert frames_at(121, 24, 16) == 81 == frames_at(81, 24, None)
    assert frames_at(1, None, 16) == 1
    assert frames_at(10, 8, 16) == 20
    with pytest.raises(DataError, match="without fps"):
        frames_at(9, None, 16)
    with pytest.raises(DataError, match="has one frame at 5 fps: too short"):
        frames_at(5, 30, 5)  # a clip is never trained on as a still
    for fps, target in ((0.0001, 16), (24, 0.0001), (1e6, 16)):
        with pytest.raises(DataError, match=r"expected 0\.01 to 1000"):
            frames_at(81, fps, target)


@given(SIDES, SIDES, st.sampled_from([*standard_buckets("480p", [5]), Bucket(5, 64, 64)]))
def test_cover_leaves_no_gap_and_cuts_the_centre(height: int, width: int, bucket: Bucket) -> None:
    scaled, (top, left, box_height, box_width) = cover_geometry((height, width), bucket)
    assert (box_height, box_width) == (bucket.height, bucket.width)
    assert scaled[0] == bucket.height or scaled[1] == bucket.width
    assert 0 <= top <= scaled[0] - box_height and 0 <= left <= scaled[1] - box_width
    assert abs(scaled[0] - box_height - 2 * top) <= 1 and abs(scaled[1] - box_width - 2 * left) <= 1
    assert abs(scaled[0] * width - scaled[1] * height) <= max(height, width)  # the aspect, to a pixel


@given(SIDES, SIDES, st.sampled_from([*standard_buckets("480p", [5]), Bucket(5, 64, 64)]))
def test_contain_keeps_everything_within_the_frame(height: int, width: int, bucket: Bucket) -> None:
    scaled, (top, left) = contain_geometry((height, width), (bucket.height, bucket.width))
    assert scaled[0] == bucket.height or scaled[1] == bucket.width
    assert 1 <= scaled[0] <= bucket.height - top and 1 <= scaled[1] <= bucket.width - left
    assert abs(bucket.height - scaled[0] - 2 * top) <= 1 and abs(bucket.width - scaled[1] - 2 * left) <= 1
    if min(scaled) > 1:
        assert abs(scaled[0] * width - scaled[1] * height) <= max(height, width)


def test_what_fits_exactly_is_left_alone() -> None:
    bucket = Bucket(81, 480, 832)
    assert cover_geometry((480, 832), bucket) == ((480, 832), (0, 0, 480, 832))
    assert contain_geometry((480, 832), (480, 832)) == ((480, 832), (0, 0))
    with pytest.raises(DataError, match="0x5"):
        cover_geometry((0, 5), bucket)
