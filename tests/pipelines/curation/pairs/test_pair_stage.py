"""Cross pairs with tiny models of the real classes, and what the commands say. Run: python -m pytest
tests/pipelines/curation/pairs/test_pair_stage.py"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import Reply, openai_server
from PIL import Image
from tiny_models import save_models

from domainshuttle.pipelines.corpora.masks import cut_out, decode_rle
from domainshuttle.pipelines.curation.detector import Detector
from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.pipelines.curation.pairs.candidates import STORE_NAME, Found, name_of
from domainshuttle.pipelines.curation.pairs.config import PairConfig
from domainshuttle.pipelines.curation.pairs.find import FindJob, find_steps
from domainshuttle.pipelines.curation.pairs.stage import find_recipe, pair_corpus
from domainshuttle.pipelines.curation.segmenter import Segmenter
from domainshuttle.pipelines.curation.stage import Passing, Work
from domainshuttle.pipelines.endpoints.client import EndpointError
from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import TRACE_NAME
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.media.cut import frames_at
from domainshuttle.pipelines.media.decode import decode_image, encode_jpeg, encode_mp4
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.values import ActorPool

SIZE = (72, 96)
POOLS = {name: ActorPool(cpus=0.5) for name in ("decode", "find", "embed", "choose")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def loose(models: dict[str, str], **changes: Any) -> PairConfig:
    """Thresholds that random weights pass."""
    loose: dict[str, Any] = {
        "frames": 2, "least_detection": 0.0, "most_found": 3, "least_mask": 0.0, "least_area": 0.0, "most_area": 1.0,
        "least_side": 1, "least_dino": 0.0, "least_clip": 0.0, "most_dino": 1.0, "pictures": 2,
    }  # fmt: skip
    return PairConfig(models=models, **{**loose, **changes})


def clip(seed: int, frames: int = 6) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, 6, 8, 3), np.uint8)
    shown = [np.asarray(Image.fromarray(one).resize(SIZE[::-1], Image.Resampling.BICUBIC)) for one in coarse]
    return encode_mp4(np.stack(shown), 10)


def sample(number: int, **changes: Any) -> RawSample:
    """A clip of a dog on a beach, with a reference of the dog."""
    picture = encode_jpeg(np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8))
    known: dict[str, Any] = {
        "caption": "A dog on a beach.", "source": "mine", "kind": "video", "fps": 10, "frames": 6, "size": SIZE,
        "subjects": [Subject(id=0, word="dog", domain=1), Subject(id=1, word="beach", domain=3)],
        "references": [Reference(file="ref0.jpg", subject=0, origin="photo", size=(30, 40))],
    }  # fmt: skip
    info = SampleInfo(**{**known, **changes})
    files = {"mp4": clip(number), "ref0.jpg": picture}
    return RawSample(f"s{number}", info, files | ({info.source_clip: clip(90 + number)} if info.source_clip else {}))


def corpus(folder: Path, samples: list[RawSample]) -> CorpusSpec:
    infos = {one.key: one.info for one in samples}
    with ShardWriter(folder, "own", 1 << 20) as writer:
        for one in samples:
            writer.write(one.key, one.members())
    rows = [IndexRow.of(entry, infos[entry.key], "5x64x96") for entry in writer.entries]
    write_index(folder / "index.parquet", rows, IndexMetadata(corpus="mine", stage="raw"))
    return CorpusSpec("mine", "raw", str(folder))


def found_here(raw: CorpusSpec, folder: Path, config: PairConfig) -> list[Found]:
    """What the steps find, one after the other in this process, in the store where the command looks for it."""
    index = Index.load(raw.index)
    _, store = find_recipe(raw, folder, config)
    job = FindJob(raw, store, tuple(range(len(index))))
    steps = [step.make(*step.arguments) for step in find_steps(config, POOLS)]
    for part in range(job.parts):
        works = [Work(row, read_raw_sample(row).info) for row in job.rows(index, part)]
        passing = Passing([*enumerate(works)], [], Counter())
        for step in steps:
            passing.call(step)
        job.write(part, passing)
    rows = index.rows(range(len(index)))
    kept = store.gather(map(name_of, rows))
    return [one for row in rows if (one := kept.find(name_of(row))) is not None]


def test_what_is_found_is_what_the_models_give_of_the_frames(tmp_path: Path, models: dict[str, str]) -> None:
    config = loose(models)
    broken = RawSample("s9", sample(9).info, {**sample(9).files, "mp4": b"\0" * 50})
    one = sample(0, video="film")
    raw = corpus(tmp_path / "raw", [one, sample(1, source_clip="source.mp4"), broken])
    own, edited, fault = found_here(raw, tmp_path / "paired", config)
    assert (own.key, own.video, own.fault) == ("s0", "film", "")
    assert fault.fault.startswith("undecodable target: s9.mp4") and not fault.candidates

    frames = frames_at(one.files["mp4"], {1, 4}, "s0")  # two, evenly spread over six
    detector, segmenter = Detector(models["detector"]), Segmenter(models["segmenter"])
    dino, looks = Embedder(models["dino"], "dino"), Embedder(models["clip"], "clip")
    dogs = [found for found in own.candidates if found.word == "dog" and found.place == "target"]
    assert {found.frame for found in dogs} == {1, 4}
    for number, boxes in zip((1, 4), detector.find([frames[1], frames[4]], "dog", 0.0), strict=True):
        here = [found for found in dogs if found.frame == number]
        assert 0 < len(here) <= 3 and here[0].detection == pytest.approx(boxes[0].score, abs=1e-5)
        masks = segmenter.masks(frames[number], [found.box for found in here])
        covered = np.zeros(SIZE, bool)
        for found, segment in zip(here, masks, strict=True):
            np.testing.assert_array_equal(decode_rle(found.counts, *SIZE), segment.mask)
            assert found.area == pytest.approx(segment.mask.mean(), abs=1e-6)
            covered |= segment.mask
            if segment.mask.any():
                cut = cut_out(frames[number], segment.mask)
                assert found.picture == encode_jpeg(cut) and found.picture_size == cut.shape[:2]
                np.testing.assert_allclose(found.dino, dino.vectors([cut])[0], atol=1e-4)
                np.testing.assert_allclose(found.clip, looks.vectors([cut])[0], atol=1e-4)
        scene = next(found for found in own.candidates if found.word == "beach" and found.frame == number)
        left = np.where(covered[:, :, None], np.uint8(255), frames[number])  # what no subject covers
        assert scene.picture == encode_jpeg(left) and not scene.counts
    (photo,) = (found for found in own.candidates if found.place == "reference")
    np.testing.assert_allclose(photo.dino, dino.vectors([decode_image(one.files["ref0.jpg"])])[0], atol=1e-4)
    assert {found.place for found in edited.candidates} == {"source", "reference"}
    shown = frames_at(clip(91), {1}, "source")[1]
    here = [found for found in edited.candidates if found.frame == 1 and found.place == "source"]
    for found in here:
        if found.word == "dog":
            shown = np.where(decode_rle(found.counts, *SIZE)[:, :, None], np.uint8(255), shown)
    assert next(found for found in here if found.word == "beach").picture == encode_jpeg(shown)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def pair(raw: CorpusSpec, folder: Path, config: PairConfig) -> Any:
    nothing: Any = lambda *_: None  # noqa: E731
    return pair_corpus(raw, folder, config, POOLS, nothing, nothing, most_bad=0.5, samples_per_part=2)


@pytest.mark.usefixtures("ray_cluster")
def test_pairs_are_chosen_again_after_a_stop_with_the_same_bytes(tmp_path: Path, models: dict[str, str]) -> None:
    config, folder = loose(models), tmp_path / "paired"
    broken = RawSample("s9", sample(9).info, {**sample(9).files, "mp4": b"\0" * 50})
    samples = [sample(0, video="film"), sample(1, video="film"), sample(2, source_clip="source.mp4"), broken]
    raw = corpus(tmp_path / "raw", samples)
    candidates = found_here(raw, folder, config)
    made = pair(raw, folder, config)
    whole = contents(folder)
    assert made.report["left_out"] == {"undecodable target": 1} and made.report["notes"]["pairs"] > 0
    index = Index.load(folder / "index.parquet")
    for row in index.rows(range(3)):
        one = read_raw_sample(row)
        before = next(sample for sample in samples if sample.key == row.key)
        assert bytes(one.target) == bytes(before.target) and one.info.source_clip is None
        assert one.files["ref0.jpg"] == before.files["ref0.jpg"]  # of the dog, which stays
        pictures = {candidate.picture for found in candidates for candidate in found.candidates}
        assert all(bytes(data) in pictures for name, data in one.files.items() if name not in ("ref0.jpg", "mp4"))
        origins = {reference.origin for reference in one.info.references}
        assert ("other_clip" in origins) == (row.key in ("s0", "s1")) and ("edited" in origins) == (row.key == "s2")
    traces = [json.loads(line) for line in (folder / TRACE_NAME).read_text().splitlines()]
    assert [trace["key"] for trace in traces] == ["s0", "s1", "s2"]

    (folder / "index.parquet").unlink()  # as where it was killed
    (folder / ".parts" / "part-000000.done").unlink()
    (folder / "part-000000-000000.tar").write_bytes(b"torn")
    pair(raw, folder, config)
    assert contents(folder) == whole
    store = next((folder / STORE_NAME).iterdir())
    kept = {path: path.stat().st_mtime_ns for path in store.glob("*.arrow")}
    fewer = pair(raw, folder, config.model_copy(update={"pictures": 1}))  # no model is loaded for it
    assert (
        "pairs" not in fewer.report["notes"]
        and {path: path.stat().st_mtime_ns for path in store.glob("*.arrow")} == kept
    )

    with openai_server(lambda *_: Reply(code=404, body=b"no such page")) as server:
        judged = config.model_copy(update={"quality": EndpointConfig(url=server.url, model="m", patience=5)})
        with pytest.raises(EndpointError, match="HTTP 404"):
            pair(raw, folder, judged)
    assert not (folder / "index.parquet").exists()  # what there was is of other settings
    pair(raw, folder, config)
    assert contents(folder) == whole


def test_nothing_at_all_that_is_detected_is_one_message(tmp_path: Path, models: dict[str, str]) -> None:
    config = loose(models, least_detection=1.0)
    plain = sample(0).info.model_copy(update={"subjects": sample(0).info.subjects[:1]})
    raw = corpus(tmp_path / "raw", [RawSample("s0", plain, sample(0).files)])
    found_here(raw, tmp_path / "paired", config)
    with pytest.raises(DataError, match=r"found nothing in 1 samples.*pair\.least_detection=1"):
        pair(raw, tmp_path / "paired", config)
    broken = corpus(tmp_path / "broken", [RawSample("s9", plain, {**sample(0).files, "mp4": b"x" * 50})])
    found_here(broken, tmp_path / "other", config)
    with pytest.raises(DataError, match=r"none of the 1 samples.*such as: undecodable target: s9\.mp4"):
        pair(broken, tmp_path / "other", config)
