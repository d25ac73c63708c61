"""Test sets: ids, seeds, importers and frozen files. Run: pytest tests/platform/evaluation/test_cases.py"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.evaluation.cases import read_case_file
from domainshuttle.platform.evaluation.config import EvaluationConfig, load_evaluation
from domainshuttle.platform.evaluation.sources import build_test_set, expected_counts
from domainshuttle.platform.generation.cases import case_seed, read_cases

EVAL = Path(__file__).resolve().parents[4] / "shared/media/opens2v_nexus/eval/demo_result/input_json"


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(path)
    return path


def line(prompt: str, *pictures: str, **more: Any) -> str:
    return json.dumps({"prompts": prompt, "seg_meta": [{"seg_file": list(pictures)}], **more})


def test_ids_and_seeds_do_not_depend_on_the_position(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    lines = [line("a cup", "a.png"), line("a hat", "a.png", id="hat"), line("a box", "a.png")]
    (tmp_path / "cases.jsonl").write_text("\n".join(lines))
    before = {one.case.prompt: one.id for one in read_cases(tmp_path / "cases.jsonl")}
    (tmp_path / "cases.jsonl").write_text("\n".join([line("new", "a.png"), lines[2], lines[0], lines[1]]))
    after = {one.case.prompt: one.id for one in read_cases(tmp_path / "cases.jsonl")}
    assert {name: after[name] for name in before} == before
    assert before["a hat"] == "hat" and len(set(after.values())) == 4
    seeds = {case_seed(seed, name, repeat) for seed in (0, 1) for name in after.values() for repeat in (0, 1, 2)}
    assert len(seeds) == 24 and all(0 <= seed < 2**63 for seed in seeds)
    assert case_seed(7, "multihuman_3", 1) == 6201892668082947865  # of every version: clips can be made again


def test_a_frozen_test_set_is_read_as_it_was_and_needs_nothing_else(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png", 1)
    picture(tmp_path / "in" / "b.png", 2)
    (tmp_path / "in" / "cases.jsonl").write_text(
        line("a man", "a.png", "b.png", id="one", split="real_to_fantasy", domain_code=["Fantasy Domain", None],
             labels=["man", "hat"], edit_prompts=["as a Pixar figure", ""], subjects=[0, 1])
        + "\n" + line("a hat", "b.png", id="two")
    )  # fmt: skip
    sources = {"own": {"kind": "cases", "path": str(tmp_path / "in" / "cases.jsonl"), "expected": 3}}
    config = EvaluationConfig.model_validate({"name": "t", "sources": sources, "metrics": {}})
    cases = build_test_set(config.sources, None, tmp_path / "out")
    (tmp_path / "in" / "a.png").unlink()
    again = read_case_file(tmp_path / "out" / "cases.jsonl")
    assert [one.digest for one in again] == [one.digest for one in cases]
    first = again[0]
    assert (first.id, first.split, first.subjects, first.labels) == ("one", "real_to_fantasy", (0, 1), ("man", "hat"))
    assert first.references[0].edit_prompt == "as a Pixar figure" and first.references[0].domain == 2
    for one in first.references:
        assert hashlib.sha256(one.path.read_bytes()).hexdigest() == one.sha256 == one.path.stem
    assert expected_counts(config.sources, cases) == {"in_domain": (1, 3), "real_to_fantasy": (1, 1)}
    picture(first.references[1].path, 9)
    with pytest.raises(ConfigError, match="restore the picture"):
        read_case_file(tmp_path / "out" / "cases.jsonl")
    picture(tmp_path / "in" / "a.png", 1)
    build_test_set(config.sources, None, tmp_path / "out")
    assert read_case_file(tmp_path / "out" / "cases.jsonl") == again


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"split": "in_domian"}, "did you mean 'in_domain'"),
        ({"labels": ["a", "b"]}, "labels: expected a list with an entry for each of 1 picture"),
        ({"id": "../up"}, "expected 1 to 80 letters"),
        ({"target": "none.mp4"}, "no clip"),
        ({"domain_code": ["Fantsy"]}, "unknown domain"),
        ({"label": ["cup"]}, "label: the key is labels"),
        ({"labels": [3]}, "labels and edit_prompts are texts"),
        ({"source": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, item: dict[str, Any], message: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "cases.jsonl").write_text(line("a cup", "a.png", **item))
    with pytest.raises(ConfigError, match=message):
        read_case_file(tmp_path / "cases.jsonl")


def test_a_file_of_others_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """A mark of Windows' editors, other ends of lines in a prompt, 0 as an id, and keys of others."""
    picture(tmp_path / "a.png")
    sha256 = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    one = {"prompts": "a cup\u2028on a\x85table", "seg_meta": [{"seg_file": ["a.png"]}], "id": 0, "label": "cup"}
    text = json.dumps({**one, "sha256": [sha256.upper()]}, ensure_ascii=False)
    (tmp_path / "cases.jsonl").write_text(f"\ufeff{text}\r\n", encoding="utf-8")
    sources = {"own": {"kind": "cases", "path": str(tmp_path / "cases.jsonl")}}
    config = EvaluationConfig.model_validate({"name": "t", "sources": sources, "metrics": {}})
    build_test_set(config.sources, None, tmp_path / "out")
    (case,) = read_case_file(tmp_path / "out" / "cases.jsonl")
    assert (case.id, case.prompt) == ("0", one["prompts"])


def test_a_real_clip_that_was_changed_is_taken_anew(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "cases.jsonl").write_text(line("a cup", "a.png", id="cup", target="clip.mp4"))
    sources = {"own": {"kind": "cases", "path": str(tmp_path / "cases.jsonl")}}
    config = EvaluationConfig.model_validate({"name": "t", "sources": sources, "metrics": {}})
    for content in (b"one", b"two"):
        (tmp_path / "clip.mp4").write_bytes(content)
        (case,) = build_test_set(config.sources, None, tmp_path / "out")
        assert case.target is not None and case.target.read_bytes() == content


def opens2v(folder: Path, records: dict[str, Any]) -> Path:
    for key, one in records.items():
        for number, name in enumerate(one["img_paths"]):
            if not (folder / name).exists():
                picture(folder / name, hash((key, number)) % 1000)
    (folder / "Open-Domain_Eval.json").write_text(json.dumps(records))
    return folder / "Open-Domain_Eval.json"


def test_opens2v_by_groups_with_the_first_references(tmp_path: Path) -> None:
    records = {
        f"{group}_{n}": {
            "img_paths": [f"Images/{group}/{n}{x}.png" for x in "abcde"], "prompt": f"the {group} {n}",
            "class_label": ["Man", "Woman", "Cup", "Beach", "Dragon"], "synthesis_flag": "wrong",
        }
        for group in ("multihuman", "multiobject") for n in (1, 2)
    }  # fmt: skip
    path = opens2v(tmp_path, records)
    source = {"kind": "opens2v", "path": str(path), "groups": ["multihuman"], "most_references": 4, "prefix": "open-"}
    config = EvaluationConfig.model_validate({"name": "t", "sources": {"open": source}, "metrics": {}})
    cases = build_test_set(config.sources, None, tmp_path / "out")
    assert [case.id for case in cases] == ["open-multihuman_1", "open-multihuman_2"]
    assert cases[0].labels == ("man", "woman", "cup", "beach")
    assert cases[0].domains == "human, object, background"
    with pytest.raises(ConfigError, match=r"there is no .*Open-Domain_Eval\.json: hf download"):
        load_evaluation("opens2v", [f"sources.open-domain.path={tmp_path}/x/Open-Domain_Eval.json"]).sources[
            "open-domain"
        ].read(None, tmp_path)
    (tmp_path / "Images/multihuman/2b.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of its pictures are not beside it.*hf download"):
        build_test_set(config.sources, None, tmp_path / "again")
    source["groups"] = ["multihumans"]
    with pytest.raises(ConfigError, match="it has: multihuman, multiobject"):
        build_test_set(EvaluationConfig.model_validate({**config.model_dump(), "sources": {"open": source}}).sources,
                       None, tmp_path / "again")  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [{"prompt": None}, {"prompt": ["a"]}, {"img_paths": "a.png"}, {"img_paths": 3}, {"class_label": [None]},
     {"class_label": []}],
)  # fmt: skip
def test_a_record_of_opens2v_that_is_none_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    picture(tmp_path / "a.png")
    record = {"prompt": "a cup", "img_paths": ["a.png"], "class_label": ["Cup"], **more}
    (tmp_path / "open.json").write_text(json.dumps({"singleobj_1": record}))
    source = {"kind": "opens2v", "path": str(tmp_path / "open.json")}
    config = EvaluationConfig.model_validate({"name": "t", "sources": {"open": source}, "metrics": {}})
    with pytest.raises(ConfigError, match=r"case singleobj_1: .*expected"):
        build_test_set(config.sources, None, tmp_path / "out")


@pytest.mark.skipif(not EVAL.is_dir(), reason="the real JSONs of OpenS2V-Eval are not there")
def test_the_real_opens2v_jsons(tmp_path: Path) -> None:
    """Their pictures are not public here: each stands as one of another content."""
    counts = {}
    for name in ("Open-Domain_Eval", "Human-Domain_Eval", "Single-Domain_Eval"):
        records = json.loads((EVAL / f"{name}.json").read_text())
        for path in {path for one in records.values() for path in one["img_paths"]}:
            if not (tmp_path / path).exists():
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_bytes(path.encode())
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        source = {"kind": "opens2v", "path": str(tmp_path / f"{name}.json")}
        config = EvaluationConfig.model_validate({"name": "t", "sources": {"s": source}, "metrics": {}})
        cases = config.sources["s"].read(None, tmp_path)
        counts[name] = len(cases), sum(len(case.references) for case in cases)
        assert len({case.id for case in cases}) == len(cases)
    assert counts["Open-Domain_Eval"] == (180, 320)
    assert (counts["Human-Domain_Eval"], counts["Single-Domain_Eval"]) == ((60, 60), (90, 90))


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    picture(tmp_path / "sets" / "dog on the moon" / "1.png")
    picture(tmp_path / "sets" / "dog on the moon" / "2.png", 2)
    (tmp_path / "sets" / "dog on the moon" / "prompt.txt").write_text("a dog on the moon\n")
    (tmp_path / "sets" / "dog on the moon" / "case.json").write_text('{"split": "mixed", "labels": ["dog", "moon"]}')
    source = {"kind": "folder", "path": str(tmp_path / "sets")}
    config = EvaluationConfig.model_validate({"name": "t", "sources": {"own": source}, "metrics": {}})
    (case,) = build_test_set(config.sources, None, tmp_path / "out")
    assert (case.prompt, case.split, case.labels) == ("a dog on the moon", "mixed", ("dog", "moon"))
    (tmp_path / "sets" / "dog on the moon" / "._1.png").write_bytes(b"of macOS")
    assert len(build_test_set(config.sources, None, tmp_path / "out")[0].references) == 2
    (tmp_path / "sets" / "dog on the moon" / "3.bmp").write_bytes(b"BM")
    with pytest.raises(ConfigError, match=r"3\.bmp would not be used"):
        build_test_set(config.sources, None, tmp_path / "out")
    (tmp_path / "sets" / "dog on the moon" / "3.bmp").unlink()
    (tmp_path / "sets" / "dog on the moon" / "prompt.txt").unlink()
    with pytest.raises(ConfigError, match="no prompt"):
        build_test_set(config.sources, None, tmp_path / "again")


def test_the_same_id_of_two_sources_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "cases.jsonl").write_text(line("a cup", "a.png", id="cup"))
    source = {"kind": "cases", "path": str(tmp_path / "cases.jsonl")}
    config = EvaluationConfig.model_validate({"name": "t", "sources": {"a": source, "b": source}, "metrics": {}})
    with pytest.raises(ConfigError, match="`prefix`"):
        build_test_set(config.sources, None, tmp_path / "out")
    other = {"a": source, "b": {**source, "prefix": "b-"}}
    config = EvaluationConfig.model_validate({"name": "t", "sources": other, "metrics": {}})
    assert [case.id for case in build_test_set(config.sources, None, tmp_path / "out")] == ["cup", "b-cup"]


def test_the_papers_test_set_says_which_cases_the_user_must_bring(tmp_path: Path) -> None:
    records = {
        f"{group}_{n}": {"img_paths": ["a.png"] * 2, "prompt": f"{group} {n}", "class_label": ["Man", "Cup"]}
        for group, count in (("multihuman", 15), ("multiface", 15), ("multiobject", 30), ("singleobj", 30))
        for n in range(1, count + 1)
    }
    hard = {f"case_{n}": {"img_paths": ["a.png"] * 5, "prompt": str(n), "class_label": ["Man"] * 5} for n in range(30)}
    open_domain = opens2v(tmp_path / "open", records)
    overrides = [f"sources.open-domain.path={open_domain}", f"sources.hard-dev.path={opens2v(tmp_path / 'hard', hard)}"]
    config, said = load_evaluation("paper", overrides), list[str]()
    cases = build_test_set(config.sources, None, tmp_path / "out", said.append)
    counts = expected_counts(config.sources, cases)
    assert counts == {
        "in_domain": (90, 110), "real_to_fantasy": (0, 40), "fantasy_to_real": (0, 40), "mixed": (0, 30)
    }  # fmt: skip
    assert len(said) == 4 and said[0].startswith("20 cases of human-object have to be brought")
    assert max(len(case.references) for case in cases) == 4
    assert (config.generation.guidance_high, config.generation.guidance_low) == (4, 3)
    assert load_evaluation("demo").identity is not None and load_evaluation("opens2v").sources
