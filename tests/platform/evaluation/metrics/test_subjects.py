"""DINO-I and CLIP-I: the rules against brute force, and the whole with tiny models of the real classes."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metric_inputs import clip, work
from tiny_models import save_models

from domainshuttle.pipelines.curation.detector import Detector, without_repeats
from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.pipelines.curation.segmenter import Segmenter
from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.evaluation.metrics import weights
from domainshuttle.platform.evaluation.metrics.choices import SubjectChoices
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Reference, Work
from domainshuttle.platform.evaluation.metrics.subject_similarity import ClipSimilarity, DinoSimilarity
from domainshuttle.platform.evaluation.metrics.subjects import (
    CutOut,
    mask_of,
    match_subjects,
    outline_of,
    shown_places,
)
from domainshuttle.platform.evaluation.metrics.weights import MetricModels


class Colours:
    """Vectors of pictures: their mean colour, of length 1."""

    def vectors(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        means = np.stack([one.reshape(-1, 3).mean(0) for one in pictures]) if pictures else np.zeros((0, 3))
        return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)).astype(np.float32)


class Found:
    """A finder that gives what a test says, in place of the two models."""

    key = ("a test",)

    def __init__(self, frames: list[list[np.ndarray]], references: bool = False) -> None:
        self.frames, self.references, self.calls = frames, references, 0

    def find(self, frames: list[np.ndarray], word: str) -> list[list[CutOut]]:
        if len(frames) == 1 and len(self.frames) != 1:
            return [[CutOut((0, 0, 1, 1), 1, 1, frames[0])] if self.references else []]
        self.calls += 1
        return [
            [CutOut((n, 0, n + 1, 1), 1 - n / 10, 1, pixels) for n, pixels in enumerate(found)] for found in self.frames
        ]


def colour(*rgb: int) -> np.ndarray:
    return np.full((6, 4, 3), rgb, np.uint8)


def case(*references: Reference) -> Work:
    one = work(clip(frames=4))
    return Work(MetricCase("a", "", references, "in_domain"), one.video)


def matched(one: Work, found: Found, choices: SubjectChoices) -> list[Any]:
    return match_subjects(one, found, Colours(), choices, Models())  # type: ignore[arg-type]


RED, GREEN, BLUE, GREY = colour(250, 5, 5), colour(5, 250, 5), colour(5, 5, 250), colour(99, 99, 99)


def test_two_men_are_assigned_so_that_the_sum_is_largest_as_by_brute_force() -> None:
    random = np.random.default_rng(3)
    cut = [[random.integers(0, 256, (5, 4, 3)).astype(np.uint8) for _ in range(count)] for count in (3, 2, 1, 0)]
    references = [Reference(random.integers(0, 256, (5, 5, 3)).astype(np.uint8), "Man", n) for n in range(3)]
    for candidates in ("all", "surest"):
        choices = SubjectChoices(frames=4, candidates=candidates)
        matches = matched(case(*references), Found(cut), choices)
        own = Colours().vectors([one.picture for one in references]).astype(float)
        for frame, pictures in enumerate(cut):
            table = own @ Colours().vectors(pictures).astype(float).T
            places = [*range(len(pictures)), *[-1] * 3]
            best = max(
                sum(table[row, column] for row, column in enumerate(chosen) if column >= 0)
                for chosen in itertools.permutations(places, 3)
            )
            assert np.nansum([one.similarity[frame] for one in matches]) == pytest.approx(best, abs=1e-6)
            boxes = [one.boxes[frame] for one in matches if one.boxes[frame]]
            assert len(boxes) == len(set(boxes)) == min(3, len(pictures))


def test_the_surest_boxes_are_as_many_as_the_subjects() -> None:
    cut, reference = [[GREY, RED]] * 4, Reference(RED, "cup")
    surest, every = (
        matched(case(reference), Found(cut), SubjectChoices(frames=4, candidates=candidates))[0]
        for candidates in ("surest", "all")
    )
    assert every.similarity == pytest.approx(1, abs=1e-6)
    assert (surest.similarity < 0.8).all() and surest.boxes == [(0, 0, 1, 1)] * 4


def test_references_of_one_subject_are_averaged_or_the_best_is_taken() -> None:
    references = Reference(RED, "cup", 0), Reference(GREEN, "cup", 0)
    mean, best = (
        matched(case(*references), Found([[RED]] * 4), SubjectChoices(frames=4, references=rule))[0].similarity[0]
        for rule in ("mean", "max")
    )
    red, green = Colours().vectors([RED, GREEN]).astype(float)
    assert best == pytest.approx(1, abs=1e-6) and mean == pytest.approx((1 + red @ green) / 2, abs=1e-6)


def test_backgrounds_and_subjects_without_a_word_take_the_whole_frame() -> None:
    one = case(Reference(RED, "cup", 0), Reference(GREEN, "park", 1, background=True), Reference(BLUE, "", 2))
    found = matched(one, Found([[RED]] * 4), SubjectChoices(frames=4))
    whole = Colours().vectors([*one.video.frames]).astype(float)
    by_subject = {match.subject: match for match in found}
    np.testing.assert_allclose(by_subject[1].similarity, whole @ Colours().vectors([GREEN])[0], atol=1e-6)
    np.testing.assert_allclose(by_subject[2].similarity, whole @ Colours().vectors([BLUE])[0], atol=1e-6)
    left_out = matched(one, Found([[RED]] * 4), SubjectChoices(frames=4, backgrounds="left_out"))
    assert sorted(match.subject for match in left_out) == [0, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> MetricModels:
    return MetricModels.model_validate(save_models(tmp_path_factory.mktemp("models")))


EVERY = SubjectChoices(frames=3, least_box=0.0, least_mask=0.0)


def test_values_are_those_of_the_models_one_by_one(folders: MetricModels) -> None:
    frames = clip(5, frames=7, height=72, width=96)
    reference = np.ascontiguousarray(clip(6, frames=1, height=72, width=96)[0])
    one = Work(MetricCase("a", "", (Reference(reference, "dog"),), "in_domain"), work(frames).video)
    models = Models()
    detector, segmenter = Detector(str(folders.detector)), Segmenter(str(folders.segmenter))

    def cut(picture: np.ndarray) -> np.ndarray | None:
        for box in without_repeats(detector.find([picture], "dog", 0.0)[0], 0.7):
            (segment,) = segmenter.masks(picture, [box.box])
            if not segment.mask.any():
                continue
            white = np.where(segment.mask[..., None], picture, np.uint8(255))
            left, top, right, bottom = box.box
            return white[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
        return None

    for kind, role in ((DinoSimilarity, "dino"), (ClipSimilarity, "clip")):
        found = kind(EVERY, models, folders).score(one)
        embedder = Embedder(str(getattr(folders, role)), role)  # type: ignore[arg-type]
        own = cut(reference)
        (wanted,) = embedder.vectors([reference if own is None else own])
        expected, seen = [], []
        for number in (0, 3, 6):
            part = cut(frames[number])
            seen.append(part is not None)
            expected.append(0.0 if part is None else float(embedder.vectors([part])[0] @ wanted))
        assert found.state == "measured", found.reason
        assert found.value == pytest.approx(np.mean(expected), abs=1e-5)
        assert found.beside["detection_rate"] == pytest.approx(np.mean(seen))
        (subject,) = found.details["subjects"]
        assert subject["reference_found"] == (own is not None) and any(seen)
        assert [str(place) in subject["outlines"] for place in range(3)] == seen


@pytest.mark.parametrize(("height", "width"), [(40, 60), (480, 832), (3, 5)])
def test_an_outline_is_the_mask_small_enough_to_keep(height: int, width: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    mask = ((rows - height / 2) / height) ** 2 + ((columns - width / 3) / width) ** 2 < 0.06
    outline = outline_of(mask)
    found = mask_of(outline, height, width)
    assert len(outline) < 700 and found.shape == mask.shape
    assert (found & mask).sum() / (found | mask).sum() > (0.98 if max(height, width) > 192 else 0.999)
    for bad in ("", "4:1", "2x2:zz~", f"9{outline}"):
        with pytest.raises(DataError):
            mask_of(bad, height, width)


def test_the_frames_that_are_shown_are_even() -> None:
    assert [shown_places(count) for count in (1, 3, 16)] == [[0], [0, 1, 2], [0, 5, 10, 15]]


def test_other_weights_are_another_row_and_are_read_once_on_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = MetricModels(**save_models(tmp_path / "models"))

    def digest() -> str:
        weights._role_digest.cache_clear()  # as in another process
        return DinoSimilarity(SubjectChoices(), Models(), folders).digest

    first = digest()
    assert digest() == first
    with monkeypatch.context() as patch:
        patch.setattr(weights, "model_digest", None)  # no file is read again
        assert digest() == first
    (dino,) = Path(str(folders.dino)).glob("*.safetensors")
    whole = dino.read_bytes()
    dino.write_bytes(whole[:-4] + b"\0\0\0@")  # another revision: one weight is 2
    second = digest()
    assert second != first
    dino.write_bytes(whole)
    assert digest() == first
    for damaged in (tmp_path / "cache").rglob("*"):
        if damaged.is_file():
            damaged.write_bytes(b"\xff")
    assert digest() == first


def test_the_hubs_commit_is_said_where_the_folder_has_it(tmp_path: Path) -> None:
    commit, other = "0123456789abcdef" * 2 + "01234567", "f" * 40
    assert weights.hub_commit(str(tmp_path)) == ""
    notes = tmp_path / "model/.cache/huggingface/download/part"
    notes.mkdir(parents=True)
    (tmp_path / "model/head.pth").write_bytes(b"")
    for name in ("../config.json", "a.safetensors", "../head.pth"):
        (notes / f"{name}.metadata").write_text(f"{commit}\netag\n1.0\n")  # as hf download writes it
    assert weights.hub_commit(str(tmp_path / "model")) == commit
    assert weights.hub_commit(str(tmp_path / "model/head.pth")) == commit
    (notes / "a.safetensors.metadata").write_text(f"{other}\netag\n1.0\n")
    assert weights.hub_commit(str(tmp_path / "model")) == ""  # of two revisions
    snapshot = tmp_path / "models--a--b/snapshots" / commit
    snapshot.mkdir(parents=True)
    assert weights.hub_commit(str(snapshot)) == commit


def test_the_two_metrics_search_a_video_once(folders: MetricModels, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, models = clip(5, frames=3, height=72, width=96), Models()
    one = Work(MetricCase("a", "", (Reference(frames[0], "dog"),), "in_domain"), work(frames).video)
    calls, find = list[int](), Detector.find
    monkeypatch.setattr(
        Detector, "find", lambda self, frames, *rest: calls.append(len(frames)) or find(self, frames, *rest)
    )
    assert [kind(EVERY, models, folders).score(one).state for kind in (DinoSimilarity, ClipSimilarity)] == [
        "measured", "measured",
    ]  # fmt: skip
    assert sorted(calls) == [1, 3]  # the reference, the frames


def test_a_subject_that_is_never_found_is_zero_or_missing(folders: MetricModels) -> None:
    frames = clip(5, frames=3, height=72, width=96)
    one = Work(MetricCase("a", "", (Reference(frames[0], "dog"),), "in_domain"), work(frames).video)
    choices = EVERY.model_copy(update={"least_box": 1.0})
    found = DinoSimilarity(choices, Models(), folders).score(one)
    assert found.value == 0 and found.beside["detection_rate"] == 0
    assert found.details["subjects"][0]["reference_found"] is False
    left_out = DinoSimilarity(choices.model_copy(update={"not_found": "left_out"}), Models(), folders)
    assert left_out.score(one).state == "missing" and left_out.score(one).beside["detection_rate"] == 0
    assert "half_without_subject" not in left_out.expectations()
    assert DinoSimilarity(choices, Models(), folders).expectations()["half_without_subject"] == "halves"
    no_reference = Work(replace(one.case, references=()), one.video)
    assert left_out.score(no_reference).state == "missing"
