"""The contact sheet, pixel by pixel. Run: python -m pytest tests/platform/commands/test_contact_sheet.py"""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.media.augment import apply_view, augmented_view
from domainshuttle.pipelines.media.decode import Pixels, decode_video, encode_mp4, fit_reference, fit_target
from domainshuttle.pipelines.plan.pairing import choose_references
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.platform.commands.contact_sheet import GAP, HEAD, LABEL, SPACE, draw_sheet
from domainshuttle.platform.commands.corpus_page import write_corpus_page
from domainshuttle.platform.commands.data import inspect_corpus
from domainshuttle.platform.config.schema import ConfigError

SIDE = 64
RNG = np.random.default_rng(0)
BUCKETS = {"picture": "1x32x64", "clip": "5x64x32", "bad-target": "1x64x64", "bad-reference": "1x64x64"}
FRAMES = np.kron(RNG.integers(0, 256, (9, 6, 6, 3), np.uint8), np.ones((1, 16, 16, 1), np.uint8))
PICTURE = np.kron(RNG.integers(0, 256, (6, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))


def png(picture: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str) -> RawSample:
    video = key == "clip"
    target = {"mp4": encode_mp4(FRAMES, 8.0)} if video else {"png": png(FRAMES[0])}
    if key == "bad-target":
        target = {"png": b"%!PS not a picture"}
    references = {"ref0.png": png(PICTURE), "ref1.png": png(PICTURE[::-1]), "ref2.png": png(255 - PICTURE)}
    if key == "bad-reference":
        references["ref2.png"] = references["ref2.png"][:200]
    info = SampleInfo(
        caption="two things",
        source="mine",
        kind="video" if video else "image",
        fps=8.0 if video else None,
        frames=9 if video else 1,
        size=(96, 96),
        subjects=[Subject(id=0, word="cat", domain=1), Subject(id=1, word="a dog\nin two lines", domain=1)],
        references=[
            Reference(file=file, subject=subject, origin="photo", size=(96, 64))
            for subject, file in zip((0, 0, 1), references, strict=True)
        ],
    )
    return RawSample(key, info, {**target, **references})


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Subject 0 has two pictures, subject 1 one, which set B shows as an altered view."""
    folder, infos = tmp_path_factory.mktemp("sheet"), {}
    with ShardWriter(folder, "part", 1 << 20) as writer:
        for key in BUCKETS:
            one = sample(key)
            writer.write(key, one.members())
            infos[key] = one.info
    rows = [IndexRow.of(entry, infos[entry.key], BUCKETS[entry.key]) for entry in writer.entries]
    write_index(folder / "index.parquet", rows, IndexMetadata(corpus="mine", stage="raw", fps=4.0))
    return Index.load(folder / "index.parquet")


def cell(sheet: Image.Image, row: int, column: int, shape: tuple[int, int] = (SIDE, SIDE)) -> Pixels:
    """The pixels of the picture of (height, width) in the middle of a cell; columns 3 and 5 begin sets A and B."""
    top = HEAD + row * (SIDE + LABEL) + LABEL
    left = column * (SIDE + SPACE) + GAP * ((column >= 3) + (column >= 5))
    square = np.asarray(sheet)[top : top + SIDE, left : left + SIDE]
    y, x = (SIDE - shape[0]) // 2, (SIDE - shape[1]) // 2
    return square[y : y + shape[0], x : x + shape[1]]


def test_targets_are_as_they_are_cropped_and_references_as_they_are_shown(index: Index) -> None:
    sheet = draw_sheet(index, 4, SIDE)
    assert sheet.size == (7 * (SIDE + SPACE) - SPACE + 2 * GAP, HEAD + 4 * (SIDE + LABEL))
    for number, row in enumerate(index.rows(range(2))):
        bucket, one = parse_bucket(row.bucket), sample(row.key)
        shape = bucket.height, bucket.width
        if row.kind == "video":
            clip = fit_target(decode_video(one.target, 5, 4.0), bucket)
            for column, frame in enumerate((clip[0], clip[2], clip[4])):
                assert np.array_equal(cell(sheet, number, column, shape), frame)
        else:
            assert np.array_equal(cell(sheet, number, 0, shape), fit_target(FRAMES[:1], bucket)[0])
            assert (cell(sheet, number, 1) == 235).all() and (cell(sheet, number, 2) == 235).all()
        pairing = choose_references(row.reference_subjects, row.reference_origins, 0, 0, row.sample_id)
        pictures = [PICTURE, PICTURE[::-1], 255 - PICTURE]
        assert pairing.set_b[-1] == 2 and pairing.augment_b == [False, True]
        for slot, picture in enumerate(pairing.set_a):
            expected = fit_reference(pictures[picture], bucket)
            assert np.array_equal(cell(sheet, number, 3 + slot, shape), expected)
        plain = fit_reference(pictures[pairing.set_b[0]], bucket)
        altered = fit_reference(apply_view(pictures[2], augmented_view(0, 0, row.sample_id, 2)), bucket)
        assert np.array_equal(cell(sheet, number, 5, shape), plain)
        assert np.array_equal(cell(sheet, number, 6, shape), altered)
        assert not np.array_equal(altered, fit_reference(pictures[2], bucket))


def test_what_can_not_be_decoded_is_grey_with_its_reason(index: Index) -> None:
    sheet = draw_sheet(index, 4, SIDE)
    for row, column in ((2, 0), (3, 4), (3, 6)):
        pixels = cell(sheet, row, column)
        assert (pixels == 150).all(-1).mean() > 0.5 and (pixels < 100).any()
    assert np.array_equal(cell(sheet, 3, 0), fit_target(FRAMES[:1], parse_bucket("1x64x64"))[0])


def test_a_shard_that_is_gone_leaves_a_row_with_the_reason(index: Index) -> None:
    folders = [index.table.schema.get_field_index("folder"), "folder"]
    gone = Index(index.table.set_column(*folders, [["/nowhere"] * 4]), index.parts, index.digest)
    pixels = cell(draw_sheet(gone, 1, SIDE), 0, 0)
    assert (pixels == 150).all(-1).mean() > 0.5


def test_no_samples_are_said_to_be_none(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = index.row(0).folder
    with pytest.raises(DataError, match=r"no samples: 'frames > 100' holds for none of the 4 in .*index.parquet"):
        inspect_corpus(folder, tmp_path / "sheet.png", 8, "frames > 100")
    with pytest.raises(DataError, match="no samples"):
        draw_sheet(index, 0)
    inspect_corpus(folder, tmp_path / "sheet.png", 2, None)
    assert Image.open(tmp_path / "sheet.png").height == HEAD + 2 * (128 + LABEL)
    said = capsys.readouterr().out
    assert "caption, tokens: estimated" in said and "quarantine" not in said


def test_an_index_is_shown_with_its_own_quarantine(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("index.parquet", "other.parquet"):
        (tmp_path / name).write_bytes((Path(index.row(0).folder) / "index.parquet").read_bytes())
    bad = {"source": "mine", "shard": "a.tar", "key": "k"}
    (tmp_path / "quarantine.jsonl").write_text(json.dumps({**bad, "reason": "cut [short]"}) + "\n")
    (tmp_path / "other.quarantine.jsonl").write_text(2 * (json.dumps({**bad, "reason": "too small"}) + "\n"))
    inspect_corpus(tmp_path, None, 8, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 sample in quarantine" in said and "such as: cut [short]" in said
    inspect_corpus(tmp_path / "other.parquet", None, 8, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 samples in quarantine" in said and "such as: too small" in said
    with pytest.raises(ConfigError, match=r"quarantine.jsonl is no index: give an index.parquet, or the folder"):
        inspect_corpus(tmp_path / "quarantine.jsonl", None, 8, None)


def test_the_page_counts_each_row_of_what_was_left_out_and_converted(index: Index, tmp_path: Path) -> None:
    place = tmp_path / "index.parquet"
    for name, rows in (
        ("quarantine.jsonl", [("a.tar", "k", "wrong size: x"), ("b.tar", "k", "wrong size: y"), ("c", "", "cut: z")]),
        ("converted.jsonl", [("a.tar", "k", "HDR to SDR"), ("a.tar", "l", "HDR to SDR"), ("a.tar", "l", "cropped")]),
    ):  # fmt: skip
        lines = [
            json.dumps({"source": "s", "shard": shard, "key": key, "reason": reason}) for shard, key, reason in rows
        ]
        (tmp_path / name).write_text("\n".join(lines))
    page = write_corpus_page(place, index, tmp_path / "page.html", 1).read_text()
    bars = dict(re.findall(r"<span>([^<]+)</span><i [^>]+></i><b>(\d+)</b>", page))
    assert (bars["wrong size"], bars["cut"], bars["HDR to SDR"], bars["cropped"]) == ("2", "1", "2", "1")
    assert page.count("<td>k</td>") == 2 and "2 cropped (up to" in page
    assert (bars["image"], bars["video"]) == ("3", "1")
