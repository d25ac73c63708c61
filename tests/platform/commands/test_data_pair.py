"""What `data pair` says before it begins, and the page of a paired corpus. Run: python -m pytest
tests/platform/commands/test_data_pair.py"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import jpeg, mp4
from PIL import Image
from running import in_process
from tiny_models import save_models

from domainshuttle.pipelines.corpora.masks import encode_rle
from domainshuttle.pipelines.curation.pairs.candidates import STORE_NAME, Candidate, CandidateStore, Found
from domainshuttle.pipelines.curation.pairs.choose import choose
from domainshuttle.pipelines.curation.pairs.config import PairConfig, PairModels
from domainshuttle.pipelines.index.parts import TRACE_NAME
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.media.decode import decode_image
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.platform.commands.pair_pictures import COLOURS, draw_frame

SIZE = (48, 64)


def corpus(folder: Path, samples: list[RawSample]) -> Path:
    infos = {one.key: one.info for one in samples}
    with ShardWriter(folder, "own", 1 << 20) as writer:
        for one in samples:
            writer.write(one.key, one.members())
    rows = [IndexRow.of(entry, infos[entry.key], "5x32x48") for entry in writer.entries]
    write_index(folder / "index.parquet", rows, IndexMetadata(corpus="mine", stage="raw"))
    return folder


def sample(key: str) -> RawSample:
    info = SampleInfo(
        caption=f"A <dog> {key}.", source="mine", kind="video", fps=10, frames=10, size=SIZE,
        subjects=[Subject(id=0, word="dog", domain=1)],
        references=[Reference(file="ref0.jpg", subject=0, origin="photo", size=(40, 56))],
    )  # fmt: skip
    return RawSample(key, info, {"mp4": mp4(40), "ref0.jpg": jpeg(90)})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def test_what_is_missing_is_one_message_before_anything_starts(tmp_path: Path, models: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    folder = corpus(tmp_path / "data" / "mine" / "raw", [sample("a")])
    names = {"detector": "detector", "segmenter": "segmenter", "dino": "dino", "clip": "clip"}

    def said(*more: object, **other: str) -> str:
        chosen = [f"pair.models.{role}={tmp_path / 'models' / name}" for role, name in {**names, **other}.items()]
        return in_process("data", "pair", folder, *(word for one in chosen for word in ("--set", one)), *more, expect=2)

    assert "there is no such folder; download a whole one: hf download facebook/dinov2-base" in said(dino="lost")
    assert "is a folder of dinov2, not of CLIPVisionModelWithProjection" in said(clip="dino")
    (tmp_path / "models" / "segmenter" / "model.safetensors").rename(tmp_path / "models" / "segmenter" / "model.bin")
    assert "has no weights: model.bin is a pickle, which is not read" in said()
    assert "pair.frams: unknown key" in said("--set", "pair.frams=3")
    text = in_process("data", "pair", folder, expect=2)
    assert "pair.models: missing" in text
    assert "leave it out beside a corpus's folder" in said("--corpus", "mine")
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {tmp_path / 'data'}\ncorpora: {{mine: {{buckets: [5x32x48]}}}}\n")
    assert "has a `pair` section" in in_process("data", "pair", file, expect=2)
    paired = f"{{models: {{{', '.join(f'{role}: {models / name}' for role, name in names.items())}}}}}"
    file.write_text(f"data: {tmp_path / 'data'}\ncorpora: {{other: {{buckets: [5x32x48], pair: {paired}}}}}\n")
    assert "corpus 'other' is not built" in in_process("data", "pair", file, expect=2)
    assert not (tmp_path / "data" / "mine" / "paired").exists()


def candidate(frame: int, cosine: float, left: int = 8, **changes: Any) -> Candidate:
    mask = np.zeros(SIZE, bool)
    mask[10:40, left : left + 20] = True
    look = np.array([cosine, np.sqrt(1 - cosine**2)], np.float32)
    known: dict[str, Any] = {
        "word": "dog", "place": "target", "frame": frame, "box": (left, 10, left + 20, 40), "detection": 0.8,
        "counts": encode_rle(mask), "size": SIZE, "mask_score": 0.9, "area": float(mask.mean()),
        "picture": jpeg(150, 30, 20), "picture_size": (30, 20), "dino": look, "clip": look,
    }  # fmt: skip
    return Candidate(**{**known, **changes})


def test_the_page_shows_what_was_found_taken_and_rejected(tmp_path: Path) -> None:
    config = PairConfig(models=PairModels(detector="/d", segmenter="/s", dino="/v", clip="/c"), least_side=8)
    raw, folder = corpus(tmp_path / "raw", [sample("a"), sample("b")]), tmp_path / "paired"
    paired, traces = [], []
    photo = {"place": "reference", "picture": b"", "counts": "", "area": 1.0}
    for key in ("a", "b"):
        own = Found(f"n-{key}", key, "", (
            candidate(2, 0.8), candidate(7, 0.2), candidate(7, 0.1, 40), candidate(0, 1.0, **photo)
        ))  # fmt: skip
        store = CandidateStore(folder / STORE_NAME / "1234")
        store.write([own])
        chosen = choose(sample(key).info, own, [], config)
        traces.append({"key": key, "candidates": [one.trace() for one in chosen.outcomes]})
        files = {**sample(key).files, **chosen.files}
        paired.append(RawSample(key, chosen.info, files))
    store.gather(["n-a", "n-b"])
    corpus(folder, paired[:1])
    (folder / TRACE_NAME).write_text("".join(json.dumps(one) + "\n" for one in traces))
    (folder / "quarantine.jsonl").write_text(
        json.dumps({"source": "mine", "shard": "own-0", "key": "b", "reason": "no subject: none of 'dog'"}) + "\n"
    )
    report = {"stage": "pair", "from_folder": str(raw), "settings": {**config.choosing(), **config.finding()},
              "notes": {"pairs": 1, "candidates rejected: another subject": 2}}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    printed = in_process("data", "inspect", folder, "--page", tmp_path / "out" / "page.html")
    assert "Page: " in printed
    page = (tmp_path / "out" / "page.html").read_text()
    assert "A &lt;dog&gt; a." in page and "<script" not in page
    for section in page.split("<h3>")[1:]:
        assert section.count("<b>frame 2</b>") == 1 and section.count("<b>frame 7</b>") == 1
        assert section.count("<b>ref0.jpg</b>") == 1 and section.count("<b>ref1.jpg</b>") == 1
        assert len(re.findall(r"<b>another subject: DINOv2 0\.20", section)) == 1
        assert len(re.findall("<b>one more of its word", section)) == 1
    assert "<h4>samples, by bucket</h4>" in page
    assert '<span>5x32x48</span><i style="--share: 1.0"></i><b>1</b>' in page
    assert page.count("<h3>") == 2 and "Left out</b>: no subject" in page
    shutil.rmtree(folder / STORE_NAME)
    shutil.rmtree(raw)
    in_process("data", "inspect", folder, "--page", tmp_path / "page.html")
    assert "which is not there any more" in (tmp_path / "page.html").read_text()
    in_process("data", "inspect", corpus(tmp_path / "plain", [sample("c")]), "--page", tmp_path / "plain.html")
    assert "What was found" not in (tmp_path / "plain.html").read_text()


def test_masks_and_boxes_are_drawn_where_they_were_found() -> None:
    frame = np.full((*SIZE, 3), 100, np.uint8)
    taken = {"subject": 1, "reference": "ref1.jpg"}
    shown = decode_image(
        draw_frame(frame, [(taken, candidate(0, 1.0)), ({"rejected": "small"}, candidate(0, 1.0, 40))])
    )
    colour = np.array(COLOURS[1])
    inside, outside = shown[25, 15].astype(int), shown[44, 60].astype(int)
    assert np.abs(inside - (0.55 * 100 + 0.45 * colour)).max() < 12 and np.abs(outside - 100).max() < 12
    assert np.abs(shown[25, 9].astype(int) - colour).max() < 40  # the box's left side
    assert np.abs(shown[25, 50].astype(int) - 100).max() < 12  # within the one that was rejected
    assert Image.fromarray(shown).size == SIZE[::-1]
