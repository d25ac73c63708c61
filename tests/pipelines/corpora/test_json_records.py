"""Records of large JSON files. Run: python -m pytest tests/pipelines/corpora/test_json_records.py"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainshuttle.pipelines.corpora import json_records as module
from domainshuttle.pipelines.corpora.json_records import json_records, jsonl_records, read_at
from domainshuttle.pipelines.errors import DataError

TEXTS = st.text('ab"\\{}[],: \nü\U0001f600', max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.dictionaries(TEXTS, VALUES, max_size=3) | st.lists(VALUES, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(RECORDS, max_size=5) | st.dictionaries(TEXTS, RECORDS, max_size=5), st.integers(1, 30), st.booleans())
def test_records_are_those_of_the_parser_wherever_a_piece_ends(root: Any, piece: int, wide: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "x.json"
        path.write_text(json.dumps(root, indent=1 if wide else None, ensure_ascii=wide), encoding="utf-8")
        patch.setattr(module, "_PIECE", piece)
        found = list(json_records(path))
        assert all(read_at(path, one.offset, len(one.data)) == one.data for one in found)
    assert [one.parse("x") for one in found] == (list(root.values()) if isinstance(root, dict) else root)
    if isinstance(root, dict):
        assert [one.key for one in found] == list(root)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXTS, RECORDS, min_size=1, max_size=4), st.data(), st.integers(1, 30))
def test_a_cut_file_is_an_error(root: Any, data: st.DataObject, piece: int) -> None:
    whole = json.dumps(root).encode()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (path := Path(folder) / "x.json").write_bytes(cut)
        patch.setattr(module, "_PIECE", piece)
        with pytest.raises(DataError, match=r"x.json: .*(cut short|empty)"):
            list(json_records(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {}} x', "more follows|follows the end"),
        ('{"a": {}}{"b": {}}', "more follows the end"),
        ('{"a": 5, "b": {}}', "at byte 1: .* should begin"),
        ('{"a": {}, "b": 5}', "neither object nor list"),
        ("[{} {}, 7]", "neither object nor list"),
        ("<html>[{}]</html>", "begins with"),
        ("5", "cut short"),
        ("{'a': {}}", "should begin"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(json_records(path))


def test_a_record_that_is_no_json_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "x.json").write_text('{"a": {"v": NaN}, "b": {"v": 1}}')
    first, second = json_records(path)
    with pytest.raises(DataError, match="record a: not valid JSON: NaN"):
        first.parse("record a")
    assert second.parse("b") == {"v": 1}


def test_lines_have_their_places(tmp_path: Path) -> None:
    (path := tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  {"b": "\xc3\xbc"}\n{"c": 3}')
    found = list(jsonl_records(path))
    assert [one.parse("x") for one in found] == [{"a": 1}, {"b": "ü"}, {"c": 3}]
    assert all(read_at(path, one.offset, len(one.data)) == one.data for one in found)


SCAN = """
import resource, sys
from pathlib import Path
from domainshuttle.pipelines.corpora.json_records import json_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in json_records(Path(sys.argv[1]))), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_memory_is_that_of_a_record(tmp_path: Path) -> None:
    record = json.dumps({"text": 'x{"\\' * 100 + "[]" * 10000, "boxes": [[1, 2, 3, 4]] * 100})
    with (path := tmp_path / "x.json").open("w") as file:
        file.write("{")
        for number in range(3000):
            file.write(f'{"," if number else ""}"{number}": {record}')
        file.write("}")
    assert path.stat().st_size > 60 << 20
    run = subprocess.run([sys.executable, "-c", SCAN, str(path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, run.stdout.split())
    assert count == 3000 and kilobytes < 40 << 10
