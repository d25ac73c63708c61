"""A model of transformers that labels in process, a tiny one of a real class with random weights.

Run: python -m pytest tests/pipelines/curation/labels/test_local_labeller.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from label_corpora import raw_sample, rows_of, without_ray, write_corpus
from tiny_models import save_labeller

from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.labels.local_labeller import LocalModel
from domainshuttle.pipelines.curation.labels.questions import Needs, question_of
from domainshuttle.pipelines.curation.labels.stage import label_corpus
from domainshuttle.pipelines.endpoints.json_answer import parse_answer
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.samples import read_info
from domainshuttle.pipelines.media.decode import encode_jpeg

__all__ = ["without_ray"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_labeller(tmp_path_factory.mktemp("llava"))


def settings(folder: Path, **changes: object) -> LabelConfig:
    return LabelConfig.model_validate(
        {"labeller": "transformers", "model": str(folder), "values": ["domains"], "least_score": 1, **changes}
    )


def test_random_weights_answer_in_the_form_and_what_the_model_likes_best_in_it(folder: Path, tmp_path: Path) -> None:
    import torch

    model = LocalModel(settings(folder), str(tmp_path))
    info = raw_sample(0).info
    question = question_of(info, Needs(domains=True), 1, [0], [encode_jpeg(np.full((28, 28, 3), 90, np.uint8))] * 2)
    (answer,) = model.answers([question])
    assert answer.state == "answered" and not answer.cached
    assert parse_answer(answer.raw, question.form) == answer.value
    (again,) = model.answers([question])
    assert again.cached and again.value == answer.value and again.digest == answer.digest
    # an independent look: at each place where the form leaves a choice, the likeliest of the whole answers' beginnings
    form = question.form.model_json_schema()
    domains = form["$defs"]["Subject"]["properties"]["domain"]["enum"]
    every = [f'{{"subjects":[{{"domain":"{one}"}}],"score":{score}}}' for one in domains for score in range(1, 6)]
    assert answer.raw in every
    text = f"{question.system}\n{question.text}\nAnswer with one JSON object of this schema: {json.dumps(form)}"
    prompt = f"user: <image><image>{text}\nassistant: "
    pictures = [np.asarray(picture) for picture in [np.full((28, 28, 3), 90, np.uint8)] * 2]
    inputs = model.processor(images=pictures, text=prompt, return_tensors="pt")
    tokens = model.processor.tokenizer
    said = ""
    while said not in every:
        left = sorted({one[len(said)] for one in every if one.startswith(said)})
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens(said)["input_ids"]], dtype=torch.long)], 1)
        with torch.inference_mode():
            scores = model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits[0, -1]
        said += max(left, key=lambda letter: float(scores[tokens(letter)["input_ids"][0]]))
    assert answer.raw == said


def test_an_answer_that_is_cut_is_a_bad_one(folder: Path, tmp_path: Path) -> None:
    model = LocalModel(settings(folder, answer_tokens=16), str(tmp_path))
    question = question_of(raw_sample(0).info, Needs(domains=True), 1, [], [encode_jpeg(np.zeros((9, 9, 3), np.uint8))])
    (answer,) = model.answers([question])
    assert answer.state == "bad_answer" and answer.reason.startswith("cut")


def test_a_corpus_is_labelled_by_it_and_says_so(folder: Path, tmp_path: Path, without_ray: list[int]) -> None:
    corpus = write_corpus(tmp_path / "raw", map(raw_sample, range(3)))
    report = label_corpus(corpus, settings(folder), [{"CPU": 2.0}], lambda *_: None).report
    assert report["values"] == {"domains: labelled, by transformers": 3}
    for row in rows_of(corpus):
        one = read_info(row).labels["domains"]
        assert one.by == "transformers" and one.model.startswith(f"{folder.name}:") and len(one.answer) == 32


def test_a_folder_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"has no chat template.*such as Qwen/Qwen3-VL"):
        LocalModel(settings(copy), str(tmp_path / "answers"))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        LocalModel(settings(copy), str(tmp_path / "answers"))
