"""Cases in the release's format. Run: pytest tests/model/test_cases.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from domainshuttle.model.cases import GenerationCase
from domainshuttle.model.domains import domain_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Human", 0),
        ("Man", 0),
        ("Woman", 0),
        ("object", 1),
        ("Fantasy Domain", 2),
        ("Background", 3),
        ("others", 4),
        ("other", 4),
        (3, 3),
        (None, -1),
        (-1, -1),
    ],
)
def test_domain_names(name: str | int | None, expected: int) -> None:
    assert domain_id(name) == expected


@pytest.mark.parametrize("name", ["alien", "", 5, -2, True, 1.5, float("inf"), float("nan"), [1], {}])
def test_unknown_domains(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown domain .*human \(0\)"):
        domain_id(name)


def test_an_unknown_name_is_none_of_more_domains_either() -> None:
    with pytest.raises(ValueError, match="unknown domain 'alien'"):
        domain_id("alien", 8)
    assert domain_id(7, 8) == 7


def test_release_line(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    for name in ("7.jpg", "13.jpg"):
        (tmp_path / "people" / name).touch()
    item = {
        "domain_code": ["Fantasy Domain", "Human"],
        "seg_meta": [{"seg_file": ["people/7.jpg", "people/13.jpg"]}],
        "prompts": "Two friends.",
        "seg_root": "./people",
    }
    case = GenerationCase.from_release(item, tmp_path)
    assert case.prompt == "Two friends."
    assert [path.name for path in case.references] == ["7.jpg", "13.jpg"]
    assert case.subjects == (0, 1)
    assert case.domains == (2, 0)
    assert GenerationCase.from_release(item | {"seg_root": "."}, tmp_path) == case
    plain = GenerationCase.from_release({"prompt": "One.", "image_path": "people/7.jpg", "subjects": [0]}, tmp_path)
    assert plain.domains == (-1,)


def test_every_fault_of_a_line_is_named(tmp_path: Path) -> None:
    item = {"seg_meta": {"seg_file": ["a.jpg"]}, "domain_code": ["Alien"]}
    with pytest.raises(ValueError, match=r"no prompt.*no picture a\.jpg: tried .*unknown domain 'Alien'"):
        GenerationCase.from_release(item, tmp_path)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match="domain_code has 2 entries for 1 pictures"):
        GenerationCase.from_release(item | {"prompt": "x", "domain_code": ["Human", "Human"]}, tmp_path)
    with pytest.raises(ValueError, match=r"seg_file 'a\.jpg': expected a list"):  # not its letters
        GenerationCase.from_release({"prompt": "x", "seg_meta": [{"seg_file": "a.jpg"}]}, tmp_path)
    with pytest.raises(ValueError, match="seg_meta has 2 entries, of which one is read"):
        GenerationCase.from_release({"prompt": "x", "seg_meta": [{"seg_file": ["a.jpg"]}] * 2}, tmp_path)
    for key in ("references", "img_paths", "Photo"):
        with pytest.raises(ValueError, match=rf"{key}: not read; give pictures as \"seg_meta\""):
            GenerationCase.from_release({"prompt": "x", key: ["a.jpg"]}, tmp_path)
    for subjects in (["man"], [0.6], [True], [-1], "0"):
        with pytest.raises(ValueError, match=r"subjects .*: expected"):
            GenerationCase.from_release(item | {"prompt": "x", "domain_code": None, "subjects": subjects}, tmp_path)
    with pytest.raises(ValueError, match="is no text"):
        GenerationCase.from_release({"prompt": ["x"]}, tmp_path)
    with pytest.raises(ValueError, match="expected an object"):
        GenerationCase.from_release([1], tmp_path)  # type: ignore[arg-type]
