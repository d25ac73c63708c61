"""Own pictures and clips. Run: python -m pytest tests/pipelines/corpora/test_manifest.py"""

import csv
import json
import math
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built import grey, jpeg, made, mp4, reasons

from domainshuttle.pipelines.corpora.manifest import ManifestConfig
from domainshuttle.pipelines.errors import DataError


def media(root: Path) -> Path:
    (root / "refs").mkdir(parents=True)
    (root / "a.mp4").write_bytes(mp4(0))
    (root / "b.jpg").write_bytes(jpeg(77))
    for number in range(3):
        (root / "refs" / f"{number}.jpg").write_bytes(jpeg(10 * number))
    return root


ROWS: list[dict[str, Any]] = [
    {"clip": "a.mp4", "caption": "A man and a cup.", "subjects": ["man", "cup"], "domains": ["fantasy", "object"],
     "references": ["refs/0.jpg", "refs/1.jpg"], "scores": {"quality": 4.5}, "id": "first"},
    {"clip": "b.jpg", "caption": "A dog.", "subjects": ["dog"], "references": ["refs/1.jpg", "refs/2.jpg"]},
]  # fmt: skip


def check(result: Any) -> None:
    clip, picture = result
    assert not result.bad and not result.tally.counts
    assert (clip.info.kind, clip.info.frames, clip.info.fps, clip.info.size) == ("video", 10, 10.0, (48, 64))
    assert [(one.word, one.domain) for one in clip.info.subjects] == [("man", 2), ("cup", 1)]
    assert [(one.subject, one.origin) for one in clip.info.references] == [(0, "photo"), (1, "photo")]
    assert clip.info.scores == {"quality": 4.5} and clip.key == "first"
    assert grey(picture.target) == 77 and picture.info.scores == {"domains_from_words": 1.0}
    assert [one.subject for one in picture.info.references] == [0, 0]
    assert [grey(picture.files[f"ref{number}.jpg"]) for number in (0, 1)] == [10, 20]


def test_jsonl_csv_and_parquet_say_the_same(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with (root / "m.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["id", "clip", "caption", "subjects", "domains", "references", "scores"])
        table.writeheader()
        table.writerow({**ROWS[0], "subjects": "man; cup", "domains": "2;1", "scores": json.dumps(ROWS[0]["scores"]),
                        "references": json.dumps(ROWS[0]["references"])})  # fmt: skip
        table.writerow({**ROWS[1], "subjects": "dog", "references": "refs/1.jpg;refs/2.jpg"})
    pq.write_table(pa.Table.from_pylist(ROWS), root / "m.parquet")
    for kind in ("jsonl", "csv", "parquet"):
        check(made(ManifestConfig(folder=str(root), manifests=[f"m.{kind}"]), tmp_path / kind))


def test_references_may_say_their_subject_and_origin(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    row = {"video": str(root / "a.mp4"), "text": "x", "subjects": [{"word": "cat", "domain": "Fantasy Domain"}, "hat"],
           "references": [{"path": "refs/0.jpg", "subject": "hat", "origin": "other_clip"},
                          {"image": "refs/1.jpg", "subject": 0}]}  # fmt: skip
    (root / "m.jsonl").write_text(json.dumps(row))
    (sample,) = made(ManifestConfig(folder=str(root), manifests=["*.jsonl"]), tmp_path / "survey")
    assert [(one.subject, one.origin) for one in sample.info.references] == [(1, "other_clip"), (0, "photo")]
    assert [(one.word, one.domain) for one in sample.info.subjects] == [("cat", 2), ("hat", 1)]


def test_rows_of_one_name_are_named(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    rows = [ROWS[0], {**ROWS[0], "caption": "other"}, *({**ROWS[1], "caption": str(number)} for number in range(30))]
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = made(ManifestConfig(folder=str(root), manifests=["m.jsonl"]), tmp_path / "survey")
    assert sorted(sample.info.caption for sample in result) == ["0", "A man and a cup."]
    assert result.tally.counts == {"same name": 30}
    assert result.tally.examples == {"same name": ["first", *["b.jpg"] * 19]}


def test_a_folder_needs_no_manifest(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name, data in {"a.mp4": mp4(), "a.ref0.jpg": jpeg(1), "a.ref1.jpg": jpeg(2), "sub/b.jpg": jpeg(3),
                       "c.jpg": jpeg(4), "._d.jpg": b"", "e.jpg": jpeg(5)}.items():  # fmt: skip
        (root / name).write_bytes(data)
    (root / "a.txt").write_text("\ufeffA clip.")
    (root / "sub" / "b.json").write_text(json.dumps({"caption": "B", "subjects": ["bee"], "domains": ["object"]}))
    (root / "c.json").write_text("{broken")
    result = made(ManifestConfig(folder=str(root)), tmp_path / "survey")
    first, second = result
    assert (first.info.caption, len(first.info.references), first.info.subjects[0].word) == ("A clip.", 2, "subject")
    assert (second.info.caption, second.info.subjects[0].word) == ("B", "bee")
    assert result.tally.counts == {"unreadable sample": 1, "empty caption": 1}
    kept = made(ManifestConfig(folder=str(root), empty_captions="keep"), tmp_path / "kept")
    assert [sample.info.caption for sample in kept] == ["A clip.", "", "B"]
    assert kept.tally.counts == {"unreadable sample": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ["human"]}, "1 domain for 2 subjects"),
        ({"domains": ["human", "marble"]}, "domain 'marble'"),
        ({"domains": ["human", True]}, "domain True"),
        ({"domains": ["human", 1.5]}, "domain 1.5"),
        ({"subjects": "man"}, "expected a list"),
        ({"references": [{"path": "x.jpg", "subject": "owl"}]}, "reference"),
        ({"references": ["refs/0.jpg", "refs/1.jpg", "refs/2.jpg"]}, "reference 'refs/2.jpg'"),
        ({"references": [{"path": "refs/0.jpg", "origin": "moon"}]}, "origin"),
        ({"references": [{"path": "refs/0.jpg", "origin": ""}]}, "origin"),
        ({"references": [{"path": "refs/0.jpg", "origin": 0}]}, "origin"),
        ({"scores": {"quality": "high"}}, "expected a number"),
        ({"clip": None}, "no clip or video or image"),
    ],
)
def test_mistakes_name_the_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    root = media(tmp_path / "root")
    (root / "m.jsonl").write_text(json.dumps({**ROWS[0], **change}))
    result = made(ManifestConfig(folder=str(root), manifests=["m.jsonl"]), tmp_path / "survey")
    (example,) = result.tally.examples["unknown form"]
    assert "m.jsonl: byte 0" in example and message in example


def test_dirty_rows_and_wrong_folders(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    rows = [{**ROWS[0], "clip": "lost.mp4"}, {**ROWS[0], "id": "2", "references": ["/etc/passwd", "refs/0.jpg"]},
            {**ROWS[0], "id": "3", "clip": "b.jpg.mp4"}, {**ROWS[0], "caption": ""}]  # fmt: skip
    (root / "b.jpg.mp4").write_bytes(jpeg(1))
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = made(ManifestConfig(folder=str(root), manifests=["m.jsonl"]), tmp_path / "survey")
    assert reasons(result.bad) == ["missing target", "unreadable clip", "unsafe name"]
    in_full = made(ManifestConfig(folder=str(root), manifests=[str(root / "m.jsonl")]), tmp_path / "full")
    assert reasons(in_full.bad) == reasons(result.bad)
    with pytest.raises(DataError, match=r"no manifests \(x.jsonl\)"):
        made(ManifestConfig(folder=str(root), manifests=["x.jsonl"]), tmp_path / "a")
    with pytest.raises(DataError, match="manifests end with"):
        made(ManifestConfig(folder=str(root), manifests=["a.mp4"]), tmp_path / "b")
    for outside in ("/etc/*", "../*.jsonl", ""):
        with pytest.raises(DataError, match=r"names no files below .*root, where manifests are looked for"):
            made(ManifestConfig(folder=str(root), manifests=[outside]), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no pictures or clips"):
        made(ManifestConfig(folder=str(tmp_path / "empty")), tmp_path / "c")


COLUMNS = {
    "id": pa.array([7, 8], pa.int64()),
    "clip": pa.array(["a.mp4", "b.jpg"]).dictionary_encode(),
    "caption": pa.array(["", "A dog."], pa.large_string()),
    "text": pa.array(["A man.", None]),
    "subjects": pa.array([["man"], ["dog"]], pa.large_list(pa.large_string())),
    "references": pa.array(
        [[{"path": "refs/0.jpg", "subject": None, "origin": None}], []],
        pa.list_(pa.struct([("path", pa.string()), ("subject", pa.int8()), ("origin", pa.string())])),
    ),
    "scores": pa.array(
        [{"quality": Decimal("4.50"), "motion": None}, {"quality": None, "motion": 1}],
        pa.struct([("quality", pa.decimal128(5, 2)), ("motion", pa.int8())]),
    ),
    "added": pa.array([1, 2], pa.timestamp("ns")),
}


@pytest.mark.parametrize("scores", ["struct", "map"])
def test_columns_of_every_type_are_read_as_they_are_meant(tmp_path: Path, scores: str) -> None:
    root, columns = media(tmp_path / "root"), dict(COLUMNS)
    if scores == "map":
        kind = pa.map_(pa.string(), pa.float32())
        columns["scores"] = pa.array([[("quality", 4.5)], [("motion", 1.0)]], kind)
    pq.write_table(pa.table(columns), root / "m.parquet")
    result = made(ManifestConfig(folder=str(root), manifests=["m.parquet"]), tmp_path / "survey")
    clip, picture = result
    assert (clip.key, clip.info.caption, picture.info.caption) == ("7", "A man.", "A dog.")
    assert [(one.subject, one.origin) for one in clip.info.references] == [(0, "photo")]
    assert clip.info.scores == {"quality": 4.5, "domains_from_words": 1.0}
    assert picture.info.scores == {"motion": 1.0, "domains_from_words": 1.0}
    assert result.notes.counts == {"field 'added' is not read": 2}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("scores", pa.array([[("a", 1.0), ("a", 2.0)]], pa.map_(pa.string(), pa.float32())), "duplicate keys"),
        ("caption", pa.array([2**30], pa.date32()), "days=1073741824"),
        ("caption", pa.array([b"Caf\xe9"]).view(pa.string()), "'utf-8' codec"),
    ],
)
def test_a_value_that_python_has_no_object_for_is_one_message(
    tmp_path: Path, column: str, value: pa.Array, message: str
) -> None:
    root = media(tmp_path / "root")
    pq.write_table(pa.table({"clip": ["a.mp4"], column: value}), root / "m.parquet")
    with pytest.raises(DataError, match=rf"m.parquet has a value that can't be read .*{message}.*: correct it"):
        made(ManifestConfig(folder=str(root), manifests=["m.parquet"]), tmp_path / "survey")


@pytest.mark.parametrize("value", [[Decimal("1.5")], [math.inf]])
def test_domains_of_a_table_are_whole_numbers(tmp_path: Path, value: list[Any]) -> None:
    root = media(tmp_path / "root")
    columns = {"clip": ["a.mp4"], "caption": ["x"], "subjects": [["cup"]], "domains": [value]}
    pq.write_table(pa.table(columns), root / "m.parquet")
    result = made(ManifestConfig(folder=str(root), manifests=["m.parquet"]), tmp_path / "survey")
    assert "domain" in result.tally.examples["unknown form"][0]


@pytest.mark.parametrize("value", [pa.array([1], pa.timestamp("us")), pa.array([b"x"]), pa.array([Decimal("1.5")])])
def test_columns_of_another_type_are_an_unknown_form(tmp_path: Path, value: pa.Array) -> None:
    root = media(tmp_path / "root")
    pq.write_table(pa.table({"clip": ["a.mp4"], "caption": value}), root / "m.parquet")
    result = made(ManifestConfig(folder=str(root), manifests=["m.parquet"]), tmp_path / "survey")
    assert result.tally.counts == {"unknown form": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip,caption,caption\na.mp4,x,y\n", "columns of one name, caption"),
        ("clip, clip\na.mp4,b.mp4\n", "columns of one name, clip"),
        ("clip;caption\na.mp4;x\n", ""),
        ("Clip,Caption\na.mp4,x\n", ""),
        ('clip,caption\n"a.mp4,x\n', "is no CSV"),
        ("clip,caption\na.mp4\n", ""),
    ],
)
def test_a_csv_that_is_read_in_two_ways_is_refused(tmp_path: Path, text: str, message: str) -> None:
    root = media(tmp_path / "root")
    (root / "m.csv").write_text(text)
    config = ManifestConfig(folder=str(root), manifests=["m.csv"])
    if message:
        with pytest.raises(DataError, match=message):
            made(config, tmp_path / "survey")
    else:
        assert made(config, tmp_path / "survey").tally.counts == {"unknown form": 1}


def test_a_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    said = '\ufeffclip,caption,Rating\r\na.mp4,"A ""red"" cup, and\r\na man.",5\r\n\r\nb.jpg,,\r\n'
    (root / "m.csv").write_text(said, newline="")
    result = made(ManifestConfig(folder=str(root), manifests=["m.csv"]), tmp_path / "survey")
    assert [sample.info.caption for sample in result] == ['A "red" cup, and\r\na man.']
    assert result.tally.counts == {"empty caption": 1} and result.notes.counts == {"field 'Rating' is not read": 1}


def test_columns_without_a_name_are_not_read_and_lose_nothing_in_silence(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    (root / "m.csv").write_text("clip,caption,,\na.mp4,A man.,,\nb.jpg,A dog.,5,\n")
    result = made(ManifestConfig(folder=str(root), manifests=["m.csv"]), tmp_path / "survey")
    assert [sample.info.caption for sample in result] == ["A man.", "A dog."]
    assert result.notes.counts == {"field 'column 3' is not read": 1}


def test_many_fields_that_are_not_read_are_counted_too(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    (root / "m.jsonl").write_text(json.dumps({**ROWS[0], **{f"extra{n:02d}": n for n in range(25)}}))
    result = made(ManifestConfig(folder=str(root), manifests=["m.jsonl"]), tmp_path / "survey")
    assert result.notes.counts.total() == 25 and result.notes.counts["more fields are not read"] == 5


def test_names_of_files_that_are_no_utf8_are_left_out_by_name(tmp_path: Path) -> None:
    root = media(tmp_path / "root")
    for name, data in ((b"\xff.jpg", jpeg(1)), (b"\xff.txt", b"X."), (b"\xfe.bin", b"?")):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(data)
    (root / "b.txt").write_text("B.")
    (folder := Path(os.fsdecode(os.fsencode(root) + b"/\xfd"))).mkdir()
    (folder / "c.jpg").write_bytes(jpeg(2))
    (folder / "c.json").write_text(json.dumps({"id": "named", "caption": "C."}))
    result = made(ManifestConfig(folder=str(root)), tmp_path / "survey")
    assert [sample.info.caption for sample in result] == ["B."]
    assert result.tally.counts == {"empty caption": 4, "unsafe name": 2, "other file": 1}
    assert all(example.isascii() for named in result.tally.examples.values() for example in named)


def test_a_picture_of_a_clip_beside_it_does_not_take_its_caption(tmp_path: Path) -> None:
    """As programs that download clips leave them."""
    root = tmp_path / "root"
    root.mkdir()
    for name, data in {"a.mp4": mp4(), "a.webp": jpeg(1), "a.jpg": jpeg(1), "b.JPG": jpeg(2), "b.png": jpeg(3)}.items():
        (root / name).write_bytes(data)
    for stem in "ab":
        (root / f"{stem}.txt").write_text(stem)
    result = made(ManifestConfig(folder=str(root)), tmp_path / "survey")
    assert [(sample.info.kind, sample.info.caption) for sample in result] == [("video", "a"), ("image", "b")]
    assert result.tally.counts == {"other file": 3}
    assert result.tally.examples["other file"][0].endswith("a.mp4 has its name, and the caption; rename one")


def test_what_a_folder_has_beside_its_media_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    pictures = dict.fromkeys(("a.jpg", "b.jpg", "e.ref0.jpg"), jpeg(3))
    others = dict.fromkeys(("c.heic", "d.txt", "sub/f.avi", "sub/.DS_Store"), b"x")
    for name, data in {**pictures, **others, "a.txt": "Ä".encode("latin-1"), "b.txt": b"B."}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "linked").symlink_to(tmp_path)
    (root / "g.jpg").symlink_to(root / "gone.jpg")
    (root / "g.txt").write_text("G.")
    result = made(ManifestConfig(folder=str(root)), tmp_path / "survey")
    assert [sample.info.caption for sample in result] == ["B."]
    assert result.tally.counts == {"other file": 5, "unreadable caption": 1}
    assert reasons(result.bad) == ["missing target"]
