"""UNO-1M. Run: python -m pytest tests/pipelines/corpora/test_uno.py"""

import json
from pathlib import Path
from typing import Any

import pytest
from built import MEDIA, made
from sources.uno import pair, source

from domainshuttle.pipelines.corpora.uno import UnoConfig
from domainshuttle.pipelines.errors import DataError

UNO = MEDIA / "uno" / "assets" / "examples"


def test_the_second_picture_is_the_target_and_the_first_its_reference(tmp_path: Path) -> None:
    config = source(tmp_path / "root", {"split1": [pair(0)], "split2": [pair(0, "split2")]})
    one, other = made(config, tmp_path / "survey")
    assert one.key != other.key
    info = one.info
    assert (info.caption, info.kind, info.size) == ("Bread 0 in a park.", "image", (32, 40))
    assert [(subject.word, subject.domain) for subject in info.subjects] == [("bread", 1)]
    assert info.scores == {"consistency": 4.0, "domains_from_words": 1.0}
    images = tmp_path / "root" / "images"
    # files keep their bytes, and are called what they are: these "png" are JPEG
    assert one.target_extension == "jpg"
    assert one.target == (images / pair(0)["img_path2"]).read_bytes()
    assert one.files["ref0.jpg"] == (images / pair(0)["img_path1"]).read_bytes()


def test_dirty_and_unwanted_records_are_counted(tmp_path: Path) -> None:
    cot = {"score_part": {"Shape": 4.0}, "score_final": 4.0}
    records = [
        pair(0),
        pair(1, vlm_filter_cot={**cot, "score_final": 131184.67}),
        pair(2, vlm_filter_cot={**cot, "score_part": {"Shape": 8.5}}),
        pair(3, vlm_filter_cot={**cot, "score_final": 3.5}),
        pair(4, caption={**pair(4)["caption"], "img_path2": ""}),
        pair(5, caption={**pair(5)["caption"], "subject": []}),
        pair(6, img_path1="split1/lost.png"),
        pair(7, img_path2="../secret.png"),
    ]
    config = source(tmp_path / "root", {"split1": records})
    result = made(config, tmp_path / "survey")
    assert result.tally.counts == {"impossible score": 2, "low score": 1, "empty caption": 1, "no subject": 1}
    assert sorted(one.reason.partition(":")[0] for one in result.bad) == ["missing picture", "unsafe name"]
    assert len(result.samples) == 1
    lower = config.model_copy(update={"least_score": 3.0})
    assert len(made(lower, tmp_path / "again").samples) == 2


@pytest.mark.parametrize(
    "record",
    [
        {"img": "a.png"},
        [1, 2],
        pair(0, vlm_filter_cot={"score_final": "4.0"}),
        pair(0, caption="bread"),
        pair(0, caption={**pair(0)["caption"], "subject": "bread"}),
    ],
)
def test_other_forms_name_the_record(tmp_path: Path, record: Any) -> None:
    result = made(source(tmp_path / "root", {"split1": [record]}), tmp_path / "survey")
    assert result.tally.counts == {"unknown form": 1}
    assert "labels/split1.json at byte 1" in result.tally.examples["unknown form"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page and not the file"),
        (b'{"error":"Access to dataset is restricted"}', "error message"),
        (b"", "is empty"),
        (json.dumps([pair(0), pair(1)]).encode()[:-30], "cut short"),
    ],
)
def test_downloads_that_went_wrong_are_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    config = source(tmp_path / "root", {"split1": [pair(0)]})
    (tmp_path / "root" / "labels" / "split1.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        made(config, tmp_path / "survey")


def test_archives_that_are_not_extracted_are_named(tmp_path: Path) -> None:
    config = source(tmp_path / "root", {})
    images = tmp_path / "root" / "images"
    images.mkdir()
    with pytest.raises(DataError, match="no label files"):
        made(UnoConfig(folder=str(images)), tmp_path / "a")
    (images / "split1.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"not extracted: run `tar -xf split1.tar.gz`"):
        made(config, tmp_path / "b")
    (images / "split1.tar.gz").unlink()
    for number in (0, 1, 3):
        (images / f"all.tar.gz.part{number:02}").write_bytes(b"x")
    with pytest.raises(DataError, match=r"pieces 02 are missing, the last one being 03"):
        made(config, tmp_path / "c")
    (images / "all.tar.gz.part02").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cat all.tar.gz.part\* \| tar -xz"):
        made(config, tmp_path / "d")


@pytest.mark.skipif(not UNO.is_dir(), reason="needs ../shared/media")
def test_the_authors_own_pictures_in_their_training_form(tmp_path: Path) -> None:
    """The form of their training files, of one reference or several, with their example pictures."""
    records = []
    for folder in sorted(UNO.iterdir()):
        said = json.loads((folder / "config.json").read_text())
        paths = [f"{folder.name}/{said[name][2:]}" for name in sorted(said) if name.startswith("image_ref")]
        target = f"{folder.name}/{said['image_result'][2:]}"
        records.append({"prompt": said["prompt"], "image_tgt_path": target, "image_paths": paths})
    records[0]["image_path"] = records[0].pop("image_paths")[0]
    root = tmp_path / "root"
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "train.json").write_text(json.dumps(records))
    (root / "images").symlink_to(UNO)
    result = made(UnoConfig(folder=str(root)), tmp_path / "survey")
    assert not result.bad and not result.tally.counts
    assert [len(sample.info.references) for sample in result] == [1, 1, 2, 2, 3]
    assert {sample.info.size for sample in result} == {(512, 512)}
