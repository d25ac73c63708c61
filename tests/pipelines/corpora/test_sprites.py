"""The synthetic corpus and the media it is made of.

Run: python -m pytest tests/pipelines/corpora/test_sprites.py
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora.drawing import PALETTE, identities
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import (
    decode_image,
    decode_video,
    encode_jpeg,
    encode_mp4,
    fit_reference,
    fit_target,
)
from domainshuttle.platform.evaluation.identity import describe

SHARED = Path(__file__).resolve().parents[4] / "shared" / "media"


def builder(**changes: object) -> SpritesBuilder:
    return SpritesBuilder(SpritesConfig(**({"samples": 200, "seed": 2} | changes)), "sprites")


def test_identities_are_different_and_any_sixteen_in_a_row_differ_in_colour() -> None:
    found = identities(480, seed=1)
    assert len({(i.form, i.colour, i.marking, i.marking_colour) for i in found}) == 480
    pairs = [frozenset((i.colour, i.marking_colour)) for i in found]
    for start in range(len(pairs) - 16):
        assert len(set(pairs[start : start + 16])) == 16
    assert identities(480, seed=1) == found != identities(480, seed=2)
    with pytest.raises(ValueError, match="at most"):
        identities(10**6, seed=1)


def test_held_out_identities_are_never_in_training() -> None:
    train, held = builder(), builder(split="held_out")
    assert not {i.number for i in train.identities} & {i.number for i in held.identities}
    assert len(held.identities) == 32


def test_a_sample_is_a_function_of_seed_and_number() -> None:
    one, again = builder().sample(17), builder().sample(17)
    assert one.files == again.files
    assert one.info == again.info
    assert builder(seed=3).sample(17).files != one.files
    (listed,) = builder().build(17, 18)
    assert listed.files == one.files


def test_the_corpus_has_every_case_of_the_recipe() -> None:
    samples = list(builder(kind="image").build(0, 200))
    domains = Counter(DOMAINS[s.domain] for one in samples for s in one.info.subjects)
    assert set(domains) == {"human", "object", "fantasy", "background"}
    assert {len(one.info.subjects) for one in samples} == {1, 2}
    origins = Counter(r.origin for one in samples for r in one.info.references)
    assert set(origins) == {"same_clip", "other_clip", "edited", "photo"}
    for one in samples:
        counts = Counter(r.subject for r in one.info.references)
        assert all(counts[s.id] >= 2 for s in one.info.subjects)  # the cross-pair loss needs two


def test_captions_never_name_a_colour() -> None:
    for one in builder(kind="video", side=32, frames=5).build(0, 40):
        assert not set(one.info.caption.replace(",", " ").split()) & set(PALETTE)


def test_files_are_real_jpeg_and_h264_and_show_the_identity() -> None:
    one = builder(kind="video", frames=9, two_subjects=0).sample(3)
    clip = decode_video(one.files["mp4"], 9)
    assert clip.shape == (9, 96, 96, 3)
    references = [decode_image(one.files[r.file]) for r in one.info.references]
    others = [decode_image(f) for k, f in builder(two_subjects=0).sample(4).files.items() if k.startswith("ref")]
    target = describe(clip)
    nearest_own = max(float(target @ describe(r[None])) for r in references)
    nearest_other = max(float(target @ describe(r[None])) for r in others)
    assert nearest_own > nearest_other


def test_clips_move() -> None:
    still = moving = 0
    for one in builder(kind="video", side=48, frames=5, two_subjects=0).build(0, 24):
        clip = decode_video(one.files["mp4"], 5).astype(float)
        change = np.abs(clip[-1] - clip[0]).mean()
        if "standing still" in one.info.caption or one.info.subjects[0].word == "landscape":
            still += change < 2
        else:
            moving += change > 2
    assert moving >= 10
    assert still >= 1


def test_jpeg_and_mp4_come_back() -> None:
    rng = np.random.default_rng(1)
    smooth = np.clip(np.cumsum(rng.normal(0, 3, (40, 48, 3)), 1) + 128, 0, 255).astype(np.uint8)
    assert np.abs(decode_image(encode_jpeg(smooth)).astype(int) - smooth).mean() < 3
    clip = np.stack([np.roll(smooth, n, 1) for n in range(6)])
    data = encode_mp4(clip, 8)
    assert data == encode_mp4(clip, 8)
    assert np.abs(decode_video(data, 6).astype(int) - clip).mean() < 12


def test_frames_are_sampled_at_the_rate_that_is_asked_for() -> None:
    clip = np.stack([np.full((32, 32, 3), 20 * n, np.uint8) for n in range(12)])
    data = encode_mp4(clip, 8)
    half = decode_video(data, 6, fps=4)
    assert np.abs(half[:, 0, 0, 0].astype(int) - [0, 40, 80, 120, 160, 200]).max() <= 4
    with pytest.raises(DataError, match="6 frames at 4 fps could be read; the bucket needs 7"):
        decode_video(data, 7, fps=4)


@pytest.mark.parametrize("cut", [0, 1, 10, 200, -40])
def test_damaged_media_are_data_errors(cut: int) -> None:
    one = builder(kind="video", side=48, frames=5).sample(1)
    with pytest.raises(DataError):
        decode_image(one.files["ref0.jpg"][:cut], "ref0.jpg")
    with pytest.raises(DataError):
        decode_video(one.files["mp4"][: max(cut, 0)], 5, name="clip.mp4")


def test_targets_are_cut_and_references_padded() -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    bucket = parse_bucket("1x32x32")
    target = fit_target(wide[None], bucket)
    assert target.shape == (1, 32, 32, 3)
    assert target.min() > 150  # the middle square
    reference = fit_reference(wide, bucket)
    assert (reference[:6] == 255).all()
    assert (reference[-6:] == 255).all()
    assert reference[16, 1].max() < 60


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared media are not there")
def test_real_media_decode() -> None:
    clip = next(SHARED.glob("opens2v_nexus/data_process/demo_result/step0/videos/dataset1/*.mp4"))
    frames = decode_video(clip.read_bytes(), 17, fps=16)  # its container's tags are not UTF-8
    assert frames.shape == (17, 720, 1280, 3)
    assert fit_target(frames[:1], parse_bucket("1x480x832")).shape == (1, 480, 832, 3)
    photo = decode_image(next(SHARED.glob("domainshuttle/test_case/real_human/*.jpg")).read_bytes())
    assert fit_reference(photo, parse_bucket("1x480x832")).shape == (480, 832, 3)
