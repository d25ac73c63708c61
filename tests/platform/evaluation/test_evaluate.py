"""An evaluation from end to end: clips, rows, resuming, failures, baselines, report.

Run: pytest tests/platform/evaluation/test_evaluate.py
"""

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import Reply, openai_server
from PIL import Image
from running import in_process

from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import console
from domainshuttle.platform.evaluation.cases import read_case_file
from domainshuttle.platform.evaluation.config import EvaluationConfig
from domainshuttle.platform.evaluation.evaluate import read_results, run_evaluation
from domainshuttle.platform.evaluation.store import ResultStore
from domainshuttle.platform.evaluation.videos import partner
from domainshuttle.platform.generation.cases import case_seed


def changed(config: EvaluationConfig, **more: object) -> EvaluationConfig:
    return EvaluationConfig.model_validate({**config.model_dump(mode="json"), **more})


def digests(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*.mp4")}


@pytest.fixture(scope="module")
def done(model: Path, cases_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationConfig]:
    """An evaluation of one model with both controls and two clips a case."""
    out = tmp_path_factory.mktemp("evaluation")
    config = EvaluationConfig.model_validate(
        {
            "name": "mini", "seed": 3, "repeats": 2, "sources": {"own": {"kind": "cases", "path": str(cases_file)}},
            "metrics": {"hue_identity": {}, "steadiness": {"cases": "in_domain"}}, "controls": ["other", "none"],
            "identity": {"candidates": 3}, "statistics": {"resamples": 200}, "generation": {"batch": 4},
        }
    )  # fmt: skip
    run_evaluation([str(model)], config, out)
    return out, config


def test_every_clip_has_a_row_a_metric_and_says_what_it_was_made_of(done: tuple[Path, EvaluationConfig]) -> None:
    out, _ = done
    results = read_results(out)
    assert [column.name for column in results.columns] == ["model", "model~other", "model~none"]
    assert len(list((out / "videos" / "model").glob("*.mp4"))) == 12
    assert len(ResultStore(out)) == 3 * 12 + 3 * 6  # steadiness of the in-domain half alone
    note = json.loads((out / "videos/model/case-1.r1.json").read_text())
    assert note["seed"] == case_seed(3, "case-1", 1)
    assert note["settings"]["guidance_high"] == note["settings"]["guidance_low"] == 2.0
    assert note["sha256"] == hashlib.sha256((out / "videos/model/case-1.r1.mp4").read_bytes()).hexdigest()
    latency = note["latency"]
    assert latency["warm"] and latency["evaluations"] == 2 and latency["steps"] == 2 and latency["batch"] == 4
    parts = sum(latency[part] for part in ("text", "references", "denoising", "decoding"))
    assert 0 < parts <= latency["total"] and latency["denoising"] > 0 and latency["references"] > 0
    assert json.loads((out / "videos/model~none/case-1.json").read_text())["latency"]["references"] == 0
    assert not results.failures()
    # a case's value is the mean over its clips, and the case is the unit
    rows = [results.cell("model", "hue_identity", "case-2").scores[n].value for n in (0, 1)]  # type: ignore[union-attr]
    assert results.values("model", "hue_identity")[2] == pytest.approx(np.mean(rows))
    assert results.estimates["all", "hue_identity", "model"].cases == 6
    assert results.estimates["in_domain", "steadiness", "model"].cases == 3
    assert ("real_to_fantasy", "steadiness", "model") not in results.estimates


def test_nothing_is_made_twice_and_what_is_missing_is_made_again_alike(
    done: tuple[Path, EvaluationConfig], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = done[0], done[1]
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before, rows = digests(copy / "videos"), (copy / "rows.jsonl").read_bytes()
    (copy / "videos/model/case-3.mp4").unlink()
    run_evaluation([str(model)], config, copy)
    assert digests(copy / "videos") == before and (copy / "rows.jsonl").read_bytes() == rows
    # a stop in the middle of a row, and a metric that is added
    (copy / "rows.jsonl").write_bytes(rows[: len(rows) // 2])
    wider = changed(config, metrics={"hue_identity": {}, "steadiness": {"cases": "in_domain"}, "sharpness": {}})
    whole = len(ResultStore(copy))
    run_evaluation([str(model)], wider, copy)
    assert digests(copy / "videos") == before and len(ResultStore(copy)) == 3 * 12 * 2 + 3 * 6 > whole
    with monkeypatch.context() as patch:  # nothing is missing: no model is loaded, no video decoded
        patch.setattr("domainshuttle.platform.evaluation.generators.load_generator", None)
        patch.setattr("domainshuttle.platform.evaluation.metrics.metric.Video.read", None)
        run_evaluation([str(model)], changed(wider, identity=None), copy)
    # cases that are added change no clip of the others
    lines = (copy / "cases.jsonl").read_text().splitlines()
    more = {**json.loads(lines[0]), "id": "aaa-new", "prompts": "new"}
    (copy / "more.jsonl").write_text("\n".join([json.dumps(more), *lines[::-1]]))
    source = {"own": {"kind": "cases", "path": str(copy / "more.jsonl")}}
    run_evaluation([str(model)], changed(wider, sources=source, controls=[], identity=None), copy)
    assert {name: digest for name, digest in digests(copy / "videos").items() if "aaa" not in name} == before


def test_another_model_other_settings_and_failures(
    config: EvaluationConfig, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    first, out = make_model(tmp_path / "first", seed=1), tmp_path / "out"
    few = changed(config, metrics={"hue_identity": {}})
    run_evaluation([str(first)], few, out)
    before = digests(out / "videos")
    make_model(tmp_path / "first", seed=2)  # other weights under the same name: all of it is made anew
    results = run_evaluation([f"first={first}"], few, out)
    assert not set(digests(out / "videos").values()) & set(before.values())
    # a case that the model can't make is a failure with its reason, and no other is touched
    lines = [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()]
    many = {**lines[0], "id": "many", "subjects": [0] * 7}
    for key in ("labels", "edit_prompts", "sha256", "domain_code"):
        many[key] = many[key] * 7
    many["seg_meta"] = [{"seg_file": many["seg_meta"][0]["seg_file"] * 7}]
    (out / "many.jsonl").write_text("\n".join(map(json.dumps, [many, *lines])))
    source = {"own": {"kind": "cases", "path": str(out / "many.jsonl")}}
    results = run_evaluation([f"first={first}"], changed(few, sources=source, generation={"batch": 3}), out)
    ((column, metric, case, reason),) = results.failures()
    assert (column, metric, case) == ("first", "hue_identity", "many") and "7 reference images" in reason
    one = results.estimates["all", "hue_identity", "first"]
    assert (one.cases, one.missing) == (6, 1) and one.worst < one.mean < one.best
    assert "7 reference images" in (out / "report/index.html").read_text()
    with pytest.raises(ConfigError, match=r"height x width 33x48 must be multiples"):
        run_evaluation([f"first={first}"], changed(few, generation={"height": 33}), tmp_path / "bad")
    with pytest.raises(ConfigError, match="has no videos"):
        run_evaluation([str(tmp_path)], few, tmp_path / "bad")


def test_a_baseline_is_a_folder_of_videos(config: EvaluationConfig, model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "kling", tmp_path / "out"
    folder.mkdir()
    for number in range(5):  # one is missing
        clip = np.random.default_rng(number).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
        (folder / f"case-{number}.mp4").write_bytes(encode_mp4(clip, 8))
    (folder / "case-1.mp4").write_bytes(b"no video")
    results = run_evaluation([str(model), f"Kling={folder}"], config, out)
    assert [column.name for column in results.columns] == ["model", "Kling"]
    reasons = {case: reason for column, _, case, reason in results.failures() if column == "Kling"}
    assert set(reasons) == {"case-1", "case-5"} and "there is no video" in reasons["case-5"]
    assert results.estimates["all", "sharpness", "Kling"].cases == 4
    pair = results.comparisons["all", "model", "Kling"]["sharpness"]
    assert (pair.difference.cases, pair.difference.missing, pair.verdict) == (4, 2, 0)
    page = (out / "report/index.html").read_text()
    assert "there is no video" in page and (out / "report/videos/Kling/case-0.mp4").is_file()


def test_clips_of_another_time_are_not_taken_for_those_of_now(
    config: EvaluationConfig, cases_file: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A model that is not named again keeps its clips, but none of a case that has changed since."""
    lines = [json.loads(line) for line in cases_file.read_text().splitlines()]
    for one in lines:
        one["seg_meta"] = [{"seg_file": [str(cases_file.parent / one["seg_meta"][0]["seg_file"][0])]}]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    theirs, out, model = tmp_path / "theirs", tmp_path / "out", make_model(tmp_path / "ours")
    theirs.mkdir()
    for name in ("case-0.mp4", "Case-1.mp4", "case-2.MP4", "notes.txt"):
        (theirs / name).write_bytes(encode_mp4(np.zeros((3, 32, 32, 3), np.uint8), 8))
    (theirs / "case-3.mp4").mkdir()
    (theirs / "manifest.json").write_text('{"made with": "<b>Kling</b> 1.6", "fps": 24}')
    sources = {"own": {"kind": "cases", "path": str(tmp_path / "cases.jsonl")}}
    config = changed(config, sources=sources, metrics={"steadiness": {}}, sensitivity={"cases": 0})
    run_evaluation([str(model)], config, out)
    lines[1]["prompts"] = "something else"
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with console.capture() as printed:
        results = run_evaluation([str(theirs)], changed(config, repeats=2), out)
    said = " ".join(printed.get().split())
    assert "theirs has 2 videos of no case, such as Case-1.mp4" in said and "1 of the 6 cases that" in said
    found = json.loads((out / "results.json").read_text())
    assert {one["choice"] for one in found["choices"]} > {"as in the table"} and found["judges"] == []
    reasons = {(column, case): reason for column, _, case, reason in results.failures()}
    assert "made otherwise than is asked for now (case)" in reasons["ours", "case-1"]
    assert "clip 2 of 2: failed: there is no video" in reasons["ours", "case-0"]  # a part of a value is told too
    assert "can't be read: Is a directory" in reasons["theirs", "case-3"]
    page = (out / "report/index.html").read_text()
    assert "&lt;b&gt;Kling&lt;/b&gt; 1.6" in page and "3 frames of 32x32 at 8 a second" in page
    (out / "videos/ours/case-2.mp4").write_bytes((out / "videos/ours/case-4.mp4").read_bytes()[:-1])
    reasons = {(column, case): reason for column, _, case, reason in read_results(out).failures()}
    assert "is not the clip that its JSON is of" in reasons["ours", "case-2"]
    with (out / "rows.jsonl").open("a") as rows:  # neither damage nor lines of another version end anything
        rows.write('{"case": "x"}\n{"case": "x", "video": "y", "metric": "z", "name": "n", "score": {"state": 3}}\n')
    read_results(out)
    # of a model that was stopped while its clips were made anew, old and new ones are not averaged
    columns = json.loads((out / "columns.json").read_text())
    columns[0]["how"]["settings"]["steps"] = 40
    (out / "columns.json").write_text(json.dumps(columns))
    assert {reason for column, _, case, reason in read_results(out).failures() if (column, case) == ("ours", "case-0")}
    assert read_results(out).estimates["all", "steadiness", "ours"].cases == 0
    for path in theirs.glob("case-0*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no video has the name of a case.*rename them to CASE\.mp4"):
        run_evaluation([str(theirs)], config, out)
    (theirs / "manifest.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected an object"):
        run_evaluation([str(theirs)], config, out)


def test_a_control_has_the_references_of_another_case(cases_file: Path) -> None:
    cases = read_case_file(cases_file)
    for group in (None, 2, 3, 4):  # the last group of a split may be of one case alone
        assert all(partner(case, cases, group).id != case.id for case in cases)
    assert partner(cases[0], cases[:2]).id == cases[1].id  # another split's, where there is no other of its own
    assert partner(cases[0], cases[:1]) is cases[0]


def test_an_identity_test_that_can_not_be_made_says_so(
    config: EvaluationConfig, cases_file: Path, model: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in cases_file.read_text().splitlines()[:4:2]]
    for one in lines:
        one["seg_meta"] = [{"seg_file": [str(cases_file.parent / one["seg_meta"][0]["seg_file"][0])]}]
        one["target"] = "target.mp4"
    (tmp_path / "target.mp4").write_bytes(b"damaged")
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    more = {
        "sources": {"own": {"kind": "cases", "path": str(tmp_path / "cases.jsonl")}}, "identity": {"candidates": 2},
        "metrics": {"steadiness": {}}, "statistics": {"confidence": 0.9, "resamples": 100}, "controls": ["other"],
    }  # fmt: skip
    with console.capture() as printed:
        run_evaluation([str(model)], changed(config, **more), tmp_path / "out")
    said = " ".join(printed.get().split())
    assert "The identity of model is not tested: it needs the control `other`, and 2 cases" in said
    assert "their 90% intervals" in said


def test_what_is_void_says_nothing_and_is_asked_again(config: EvaluationConfig, tmp_path: Path) -> None:
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(6):
            shown = np.arange(level + 10 * number, level + 10 * number + 9, 3, np.uint8)  # no two frames are alike
            shown = np.broadcast_to(shown[:, None, None, None], (3, 32, 32, 3)).copy()
            (tmp_path / name / f"case-{number}.mp4").write_bytes(encode_mp4(shown, 8))
    broken = True

    def answer(request: dict[str, Any], number: int) -> Reply:
        pictures = [part["image_url"]["url"] for part in request["messages"][1]["content"][:-1]]
        levels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.split(",")[1])))).mean() for one in pictures]
        if broken and (len(pictures) == 3 or levels[1] < 42):  # one frame of a dark clip
            return Reply("a good one")
        score = json.dumps({"score": 5 if levels[1] > 150 else 1})
        return Reply('{"better": "neither"}' if len(pictures) == 3 else score)

    with openai_server(answer) as server:
        endpoint = {"url": server.url, "model": "judge", "answers": 1}
        judged = {"endpoint": endpoint, "frames": 2, "cases": "all"}
        more = {"cd_score": {**judged, "questions": ["cross_domain"]}}
        config = changed(config, metrics=more, pairs=judged, sensitivity={"cases": 1})
        models = [str(tmp_path / "dark"), str(tmp_path / "light")]
        results = run_evaluation(models, config, tmp_path / "out")
        assert "1 of 12 answers" in results.voids["dark", "cd_score"]
        (one,) = results.comparisons["all", "dark", "light"].values()
        assert one.verdict == 0 and one.p != one.p and one.difference.cases == 0
        mean = results.estimates["all", "cd_score", "dark"]
        assert mean.cases == 6 and mean.mean != mean.mean and not results.pairs[0].cases
        page = (tmp_path / "out/report/index.html").read_text()
        assert "void: dark" in page and "light is better" not in page
        asked, broken = len(server.requests), False
        run_evaluation(models, config, tmp_path / "out")
        assert len(server.requests) == asked  # what failed stays so
        results = run_evaluation(models, config, tmp_path / "out", again=True)
    assert not results.voids and results.estimates["all", "cd_score", "dark"].mean == 0
    assert (results.pairs[0].cases, results.pairs[0].missing) == (6, 0)
    assert "light is better" in (tmp_path / "out/report/index.html").read_text()


def test_the_commands(model: Path, config: EvaluationConfig, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    arguments = ("--cases", tmp_path / "mini.yaml", "--out", tmp_path / "out", "--set", "generation.steps=1")
    printed = in_process("evaluate", f"ours={model}", *arguments)
    assert "Test set mini: 6 cases (in domain 3 of 3, real to fantasy 3 of 3)" in printed
    assert "Hue identity" in printed
    (tmp_path / "out/report/index.html").unlink()
    assert "index.html" in in_process("evaluate", "report", tmp_path / "out")
    assert (tmp_path / "out/report/index.html").is_file()
    assert "or --run RUN" in in_process("evaluate", model, expect=2)
    assert "whose sources such files are" in in_process("evaluate", model, "--cases", tmp_path / "c.jsonl", expect=2)
    assert "no evaluation 'papr'" in in_process("evaluate", model, "--cases", "papr", expect=2)
    assert "is no folder of an evaluation" in in_process("evaluate", "report", tmp_path, expect=2)
