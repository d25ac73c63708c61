"""Labelling, against a real server. Run: python -m pytest tests/pipelines/curation/labels/test_labelling.py"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import MEDIA, made, mp4
from faulty_s3 import serve_s3
from label_corpora import asked_text, endpoint, pictures, raw_sample, rows_of, says, without_ray, write_corpus
from openai_server import Reply, openai_server

from domainshuttle.pipelines.corpora.opens2v import OpenS2VConfig
from domainshuttle.pipelines.corpora.uno import UnoConfig
from domainshuttle.pipelines.corpora.words import CAPTION_IS_INSTRUCTION, FROM_WORDS, HUMAN, domain_of, is_unnamed
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.labels.labellers import Show
from domainshuttle.pipelines.curation.labels.rules import SCORE
from domainshuttle.pipelines.curation.labels.stage import keep_labels, label_corpus
from domainshuttle.pipelines.curation.stage import Work
from domainshuttle.pipelines.endpoints.client import EndpointError
from domainshuttle.pipelines.errors import DataError, UserFacingError
from domainshuttle.pipelines.index.labels import lost_labels
from domainshuttle.pipelines.index.samples import read_info, read_verified_sample
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.index.verify import _verify_shard
from domainshuttle.pipelines.media.decode import decode_image
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.pipelines.storage.uri import join

UNO = MEDIA / "uno" / "assets" / "examples"
NEXUS = MEDIA / "opens2v_nexus" / "data_process" / "demo_result"
NODES = [{"CPU": 2.0}]
pytestmark = pytest.mark.usefixtures("without_ray")
__all__ = ["without_ray"]


def label(folder: Path, config: LabelConfig, ask_again: bool = False) -> dict[str, Any]:
    return label_corpus(folder, config, NODES, lambda *_: None, ask_again).report


def contents(folder: Path) -> dict[str, bytes]:
    """Of all that decides what is read; answers' files have names of their processes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "answers" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "report.json"}


def test_edits_become_captions_with_words_domains_and_where_they_are_from(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(8)))
    with openai_server(says()) as server:
        report = label(folder, endpoint(server.url, frames=3))
        assert len(server.requests) == 8
        assert report["values"] == {
            "caption: labelled, by endpoint": 8, "domains: labelled, by endpoint": 8, "words: labelled, by endpoint": 4,
        }  # fmt: skip
        assert (report["samples"], report["labelled"], report["failed"]) == (8, 8, {})
        for number, row in enumerate(rows_of(folder)):
            info = read_info(row)
            shown = 1 + (3 if number % 5 == 4 else 1)
            assert info.caption == f"A plain picture that asks {shown}."
            word = "dancer" if number % 4 in (1, 3) else ("person", "", "bread")[number % 4]
            assert (info.subjects[0].word, row.domains) == (word, (2,))
            assert info.scores == {"aesthetic": number / 2, SCORE: 4.0}
            assert {one.by for one in info.labels.values()} == {"endpoint"}
        # what a model is shown: frames of the target, evenly spread, and the reference
        (body,) = (one for one in server.requests if "Change 4:" in asked_text(one))
        levels = [decode_image(base64.b64decode(url.partition(",")[2])).mean() for url in pictures(body)]
        assert levels == pytest.approx([4, 4, 4, 104], abs=3)
        again = label(folder, endpoint(server.url, frames=3))
        assert len(server.requests) == 8 and again == report
        label(folder, endpoint(server.url, frames=2))  # another question only of the clip
        assert len(server.requests) == 8 + 1


def test_frames_are_evenly_spread_and_made_small(tmp_path: Path) -> None:
    clip = raw_sample(4)
    data = mp4(frames=10, height=120, width=200)
    info = clip.info.model_copy(update={"frames": 10, "size": (120, 200), "fps": 10.0})
    folder = write_corpus(tmp_path, [type(clip)("long", info, {**clip.files, "mp4": data})])
    (row,) = rows_of(folder)
    work = Work(row, info)
    Show(LabelConfig(frames=4, side=64))([work])
    count, shown, small = work.carried["shown"]
    assert (count, shown) == (4, [0])
    found = [decode_image(picture) for picture in small[:4]]
    assert [picture.shape for picture in found] == [(38, 64, 3)] * 4
    assert [picture.mean() for picture in found] == pytest.approx([10, 30, 60, 80], abs=4)  # frames 1, 3, 6, 8 of 10


def test_refusals_bad_answers_low_scores_and_damage_are_told_apart(tmp_path: Path) -> None:
    def fails(body: dict[str, Any], _: int) -> Reply | None:
        text = asked_text(body)
        if "Change 0:" in text:
            return Reply("I'm sorry, I can't help with people.")
        if "Change 1:" in text:
            return Reply("a caption without JSON")
        if "Change 2:" in text:
            return says(score=2)(body, 0)
        return None

    samples = [raw_sample(number) for number in range(6)]
    samples[3] = type(samples[3])("s3", samples[3].info, {**samples[3].files, "jpg": b"\xff\xd8 no picture"})
    folder = write_corpus(tmp_path, samples)
    with openai_server(says(fails=fails)) as server:
        report = label(folder, endpoint(server.url, endpoint={"answers": 2}))
        assert report["failed"] == {"refused": 1, "bad answer": 1, "low score": 1, "unreadable": 1}
        lines = [json.loads(line) for line in (folder / "labels/failed.jsonl").read_text().splitlines()]
        assert {line["key"]: line["reason"].partition(":")[0] for line in lines} == {
            "s0": "refused", "s1": "bad answer", "s2": "low score", "s3": "unreadable"
        }  # fmt: skip
        states = {row.key: {one.state for one in read_info(row).labels.values()} for row in rows_of(folder)}
        assert states == {
            "s0": {"refused"}, "s1": {"bad_answer"}, "s2": {"low_score"}, "s3": {"unreadable"},
            "s4": {"labelled"}, "s5": {"labelled"},
        }  # fmt: skip
        for row in rows_of(folder)[:4]:
            info = read_info(row)
            assert info.caption.startswith("Change ") and info.scores[CAPTION_IS_INSTRUCTION] == 1
            assert info.scores[FROM_WORDS] == 1 and info.labels["domains"].by == "words"
        asked = len(server.requests)
        label(folder, endpoint(server.url, endpoint={"answers": 2}))
        assert len(server.requests) == asked == 5 + 1  # the bad one twice, the unreadable one not at all
    with openai_server(says()) as server:  # it was repaired
        report = label(folder, endpoint(server.url, endpoint={"answers": 2}), ask_again=True)
        assert report["failed"] == {"low score": 1, "unreadable": 1} and len(server.requests) == 2


def test_a_labelling_that_stopped_goes_on_and_gives_the_same_bytes(tmp_path: Path, without_ray: list[int]) -> None:
    whole = write_corpus(tmp_path / "whole", map(raw_sample, range(70)))
    stopped = write_corpus(tmp_path / "stopped", map(raw_sample, range(70)))
    down: list[int] = []

    def fails(body: dict[str, Any], _: int) -> Reply | None:
        down.append(int(40 < len(down) < 60))
        return Reply(code=503) if down[-1] else None

    with openai_server(says()) as server:
        label(whole, endpoint(server.url))
        units = len(without_ray)
        assert units > 2 and len(server.requests) == 70
    without_ray.clear()
    with openai_server(says(fails=fails)) as server:
        config = endpoint(server.url, endpoint={"patience": 0.01, "at_once": 1})
        with pytest.raises(EndpointError, match=r"no answer for 0\.01 s.*run the command again"):
            label(stopped, config)
        assert 0 < len(without_ray) < units and not lost_labels(stopped)
        down += [0] * 60
        label(stopped, config)
        assert len(without_ray) == units  # each is made once
        assert len(server.requests) - down.count(1) == 70  # nothing is asked twice
    assert contents(stopped) == contents(whole)


def test_only_what_is_new_is_labelled_when_a_corpus_grows(tmp_path: Path, without_ray: list[int]) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(30)))
    with openai_server(says()) as server:
        label(folder, endpoint(server.url))
        first = len(without_ray)
        rows = [row for row in rows_of(folder) if row]
        # built again, without labels, and with more samples
        write_corpus(folder, map(raw_sample, range(30)))
        built = rows_of(folder)
        write_corpus(folder, [raw_sample(number) for number in range(30, 34)], "more", built)
        assert lost_labels(folder)
        kept = keep_labels(folder)
        assert (kept.labelled, kept.without) == (30, 4) and not lost_labels(folder)
        assert rows_of(folder)[:30] == rows
        label(folder, endpoint(server.url))
        assert len(server.requests) == 34 and len(without_ray) == first + 1
    fresh = write_corpus(tmp_path / "fresh", map(raw_sample, range(30)))
    write_corpus(fresh, [raw_sample(number) for number in range(30, 34)], "more", rows_of(fresh))
    with openai_server(says()) as server:
        label(fresh, endpoint(server.url))
    mine = {name: data for name, data in contents(folder).items() if not name.startswith("fresh")}
    assert mine == contents(fresh)


def test_a_corpus_in_a_store_is_labelled_there_and_only_descriptions_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)
    local = write_corpus(tmp_path / "raw", map(raw_sample, range(12)))
    label_corpus(local, LabelConfig(), NODES, lambda *_: None)
    with serve_s3() as proxy:
        folder = proxy.uri("raw")
        write_corpus(tmp_path / "plain", map(raw_sample, range(12)))
        for path in (tmp_path / "plain").iterdir():
            write_bytes(join(folder, path.name), path.read_bytes())
        with pytest.raises(DataError, match=r"--set labels\.answers=FOLDER"):
            label_corpus(folder, LabelConfig(), NODES, lambda *_: None)
        config = LabelConfig(answers=str(tmp_path / "answers"))
        assert label_corpus(folder, config, NODES, lambda *_: None).report["labelled"] == 12
        index = Index.load(join(folder, "index.parquet"))
        assert index.digest == Index.load(local / "index.parquet").digest
        rows = index.rows(range(12))
        assert [read_verified_sample(row)[0].info for row in rows] == [read_info(row) for row in rows_of(local)]
        for shard in index.codes("shard")[1]:
            numbers = [number for number, row in enumerate(rows) if row.shard == shard]
            decoded = np.ones(len(numbers), bool)
            assert _verify_shard(index.table.take(numbers), index.parts[0], folder, decoded, True)[0] == []


@pytest.mark.parametrize(
    ("reply", "settings", "says_what"),
    [
        (Reply(code=401), {}, "refused the request"),
        (Reply(code=404, body=b'{"error": {"message": "no such model"}}'), {}, "Check url and model"),
        (Reply(code=429, headers={"Retry-After": "0"}), {"patience": 0.2}, "HTTP 429"),
        (Reply(body=b"<html>hello</html>"), {"patience": 60.0}, "does not speak OpenAI's protocol"),
        (Reply("what a nice picture"), {}, "answers give no labels"),
    ],
    ids=["key", "model", "429", "another server", "nonsense"],
)
def test_an_endpoint_that_is_of_no_use_ends_it_with_one_message(
    reply: Reply, settings: dict[str, Any], says_what: str, tmp_path: Path
) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(60)))
    index = (folder / "index.parquet").read_bytes()
    with openai_server(lambda *_: reply) as server:
        config = endpoint(server.url, endpoint={"answers": 1, **settings}, most_failed=0.5)
        with pytest.raises(UserFacingError, match=says_what) as error:
            label(folder, config)
        assert "\n" not in str(error.value)
    assert (folder / "index.parquet").read_bytes() == index and not lost_labels(folder)
    with openai_server(says()) as server:
        config = endpoint(server.url, most_failed=0.5)
        assert label(folder, config, ask_again=says_what.startswith("answers"))["failed"] == {}


def test_a_key_that_is_not_set_and_another_folder_are_said_before_work_starts(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, map(raw_sample, range(2)))
    os.environ.pop("NO_SUCH_KEY", None)
    with pytest.raises(DataError, match="NO_SUCH_KEY, which is not set"):
        label(folder, endpoint("http://127.0.0.1:1/v1", endpoint={"key_variable": "NO_SUCH_KEY"}))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(DataError, match=r"labels\.model = .* has no weights.*hf download Qwen/Qwen3-VL"):
        label(folder, LabelConfig(labeller="transformers", model=str(model)))
    (model / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(DataError, match="a folder of dinov2, not of AutoModelForImageTextToText"):
        label(folder, LabelConfig(labeller="transformers", model=str(model)))
    assert not (folder / "labels" / "report.json").exists()


@pytest.mark.skipif(not UNO.is_dir(), reason="needs ../shared/media")
def test_real_records_are_labelled_by_word_lists(tmp_path: Path) -> None:
    """Clips of OpenS2V, and the pictures of UNO in the form of its training files, which have no words."""
    options = {"jsons": "step5/merge_final_json/*.json", "videos": "step0/videos/{part}/{path}"}
    samples = made(OpenS2VConfig(folder=str(NEXUS), **options), tmp_path / "clips").samples
    records = []
    for place in sorted(UNO.iterdir()):
        said = json.loads((place / "config.json").read_text())
        paths = [f"{place.name}/{said[name][2:]}" for name in sorted(said) if name.startswith("image_ref")]
        target = f"{place.name}/{said['image_result'][2:]}"
        records.append({"prompt": said["prompt"], "image_tgt_path": target, "image_paths": paths})
    (tmp_path / "uno" / "labels").mkdir(parents=True)
    (tmp_path / "uno" / "labels" / "train.json").write_text(json.dumps(records))
    (tmp_path / "uno" / "images").symlink_to(UNO)
    samples += made(UnoConfig(folder=str(tmp_path / "uno")), tmp_path / "pairs").samples
    folder = write_corpus(tmp_path / "raw", samples)
    report = label(folder, LabelConfig())
    assert len(samples) == 3 + 5 == report["labelled"] and report["failed"] == {}
    assert report["values"]["domains: by word lists"] == 8
    rows = {row.key: row for row in rows_of(folder)}
    for before in samples:
        sample, _ = read_verified_sample(rows[before.key])
        assert sample.info.caption == before.info.caption and bytes(sample.target) == bytes(before.target)
        assert sample.info.labels["domains"].by == "words" and sample.info.scores[FROM_WORDS] == 1
        for now, then in zip(sample.info.subjects, before.info.subjects, strict=True):
            assert now == then or (is_unnamed(then.word) and now.domain == domain_of(now.word) == HUMAN), now


def test_the_greys_of_made_pictures_are_apart() -> None:
    """Else the tests above could not tell samples apart."""
    levels = [decode_image(raw_sample(number).files["ref0.jpg"]).mean() for number in range(20)]
    assert (np.diff(levels) > 0.5).all()
