"""Filters against Python's own evaluation over what `key.json` says.

Run: python -m pytest tests/pipelines/index/test_filter.py
"""

import json
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index import table as index_module
from domainshuttle.pipelines.index.digest import table_digest
from domainshuttle.pipelines.index.filter import RowFilter
from domainshuttle.pipelines.index.selection import selected_rows
from domainshuttle.pipelines.index.table import SCHEMA, Index, IndexMetadata, IndexRow, rows_table, write_index
from domainshuttle.pipelines.sample import ORIGINS, SampleInfo
from domainshuttle.pipelines.shards.tar import Member, ShardEntry

RAW = IndexMetadata(corpus="c", stage="raw")
Row = dict[str, Any]
"""What `key.json` says, with the sample's key."""
Held = bool | None
"""Whether a condition holds; None where a missing value decides it."""
RATES = [23.976, 24000 / 1001, 24, 25, 29.97, 30000 / 1001, math.nextafter(29.97, 30), 30, 59.94, 60, 0.1, 1000 / 3]


def index_of(folder: Path, descriptions: list[Row]) -> Index:
    write_index(folder / "index.parquet", index_rows(descriptions), RAW)
    return Index.load(folder / "index.parquet")


def index_rows(descriptions: list[Row]) -> list[IndexRow]:
    rows = []
    for row in descriptions:
        info = SampleInfo.from_json(json.dumps({name: value for name, value in row.items() if name != "key"}).encode())
        entry = ShardEntry("a.tar", row["key"], (Member("json", 512, 2),), 2**63 + 1)
        rows.append(IndexRow.of(entry, info, "1x64x64" if info.kind == "image" else "5x64x64"))
    return rows


def description(key: str, kind: str = "video", frames: int = 48, fps: float | None = 24.0, **more: Any) -> Row:
    base: Row = {"caption": "", "source": "s", "size": [64, 64], "subjects": [], "references": [], "scores": {}}
    return {**base, "key": key, "kind": kind, "frames": frames, "fps": fps, **more}


@st.composite
def descriptions(draw: st.DrawFn) -> list[Row]:
    made = []
    for number in range(draw(st.integers(1, 8))):
        subjects = [
            {"id": one, "word": draw(st.sampled_from(["cat", "man", "Ball"])), "domain": draw(st.integers(-1, 4))}
            for one in range(draw(st.integers(0, 3)))
        ]
        references = [
            {
                "file": f"ref{one}.jpg",
                "subject": draw(st.integers(0, len(subjects) - 1)),
                "origin": draw(st.sampled_from(ORIGINS)),
                "size": [8, 8],
            }
            for one in range(draw(st.integers(0, 3)) if subjects else 0)
        ]
        kind = draw(st.sampled_from(["image", "video"]))
        made.append(
            description(
                f"k{number}",
                kind,
                1 if kind == "image" else draw(st.sampled_from([2, 48, 81, 2997, 2**31 - 1])),
                draw(st.none() | st.sampled_from(RATES) | st.floats(0.01, 1000)),
                caption="x" * draw(st.integers(0, 3)),
                source=draw(st.sampled_from(["uno", "musar", "Ä"])),
                size=[draw(st.sampled_from([1, 480, 65536])), draw(st.sampled_from([1, 832, 65536]))],
                subjects=subjects,
                references=references,
                scores=draw(
                    st.dictionaries(
                        st.sampled_from(["a", "b"]),
                        st.sampled_from([0.1, 4.5, 1e300, -0.0]) | st.floats(allow_nan=False, allow_infinity=False),
                    )
                ),
            )
        )
    made[0]["scores"] = {"a": 0.5, "b": 4.5}  # a score that nobody has is an error
    return made


Number = tuple[str, Callable[[Row], Any]]
"""A part of a filter, as text, and what it is of a description (None: missing)."""
NUMBERS: dict[str, Callable[[Row], Any]] = {
    "fps": lambda row: row["fps"],
    "frames": lambda row: row["frames"],
    "height": lambda row: row["size"][0],
    "width": lambda row: row["size"][1],
    "references": lambda row: len(row["references"]),
    "subject_count": lambda row: len(row["subjects"]),
    "seconds": lambda row: None if row["fps"] is None else row["frames"] / row["fps"],
    "caption_length": lambda row: len(row["caption"]),
    "checksum": lambda row: 2**63 + 1,
    "scores.a": lambda row: row["scores"].get("a"),
    "scores['b']": lambda row: row["scores"].get("b"),
}
TEXTS: dict[str, Callable[[Row], Any]] = {
    name: (lambda row, name=name: row[name]) for name in ("source", "kind", "key")
}  # type: ignore[misc]
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq} | {
    "!=": operator.ne
}
LITERALS = st.sampled_from(
    [*RATES, 0, 1, -1, 2, 48, 48.0, 47.5, 480, 2.0, 100, 100.0, 2**31, 2**40, 2**63, 2**63 + 1]
) | (st.sampled_from([2**64, -(2**70), 10**400, 0.1, 4.5, 1e300, 1e-300, 2**53 + 1]) | st.floats(-1e6, 1e6))


def literal(value: float) -> Number:
    return (f"({value!r})", lambda row: value)


@st.composite
def numbers(draw: st.DrawFn) -> Number:
    """A column, or a little arithmetic of two."""
    name = draw(st.sampled_from(list(NUMBERS)))
    first: Number = (name, NUMBERS[name])
    sign = draw(st.sampled_from([None, None, None, "+", "-", "*", "/"]))
    if sign is None or name == "checksum":  # whose products are beyond 64 bits
        return first
    second = draw(st.sampled_from(["frames", "fps", "references", 2, 0.5, 1001, -3]))
    text, of = (second, NUMBERS[second]) if isinstance(second, str) else literal(second)

    def value(row: Row) -> Any:
        left, right = first[1](row), of(row)
        if left is None or right is None or (sign == "/" and right == 0):
            return None
        found = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign](left, right)
        return None if math.isnan(found) else found

    return f"{name} {sign} {text}", value


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[str, Callable[[Row], Held]]:
    kind = draw(st.sampled_from(["number", "chain", "numbers", "in", "text", "texts", "list"]))
    sign, inverse = draw(st.sampled_from(list(COMPARE))), draw(st.booleans())
    word = "not in" if inverse else "in"
    if kind == "list":
        column, known = draw(
            st.sampled_from(
                [
                    ("domains", [*DOMAINS, 1, -1, 9, 1.0, 0.5]),
                    ("subjects", ["cat", "Ball", "x"]),
                    ("reference_origins", ORIGINS),
                ]
            )
        )
        wanted = draw(st.sampled_from(list(known)))

        def within(row: Row) -> Held:
            held = {
                "domains": [one["domain"] for one in row["subjects"]],
                "subjects": [one["word"] for one in row["subjects"]],
                "reference_origins": [one["origin"] for one in row["references"]],
            }[column]
            number = DOMAINS.index(wanted) if wanted in DOMAINS else wanted
            return (number not in held) if inverse else (number in held)

        return f"{wanted!r} {word} {column}", within
    if kind in ("text", "texts"):
        name = draw(st.sampled_from(list(TEXTS)))
        options = draw(
            st.lists(st.sampled_from(["uno", "Ä", "musar", "video", "image", "k1", ""]), min_size=1, max_size=3)
        )
        if kind == "text":
            return f"{name} {sign} {options[0]!r}", lambda row: COMPARE[sign](TEXTS[name](row), options[0])
        return f"{name} {word} {options}", lambda row: (TEXTS[name](row) in options) != inverse
    text, of = draw(numbers())
    if kind == "in":
        listed = draw(st.lists(LITERALS, max_size=3))

        def among(row: Row) -> Held:
            return None if of(row) is None else (of(row) in listed) != inverse

        return f"{text} {word} {listed}", among
    other, other_of = literal(draw(LITERALS)) if kind != "numbers" else draw(numbers())
    if draw(st.booleans()):
        text, of, other, other_of = other, other_of, text, of

    def compared(row: Row) -> Held:
        left, right = of(row), other_of(row)
        return None if left is None or right is None else COMPARE[sign](left, right)

    if kind != "chain":
        return f"{text} {sign} {other}", compared
    after, (last, last_of) = draw(st.sampled_from(list(COMPARE))), literal(draw(LITERALS))

    def chained(row: Row) -> Held:
        right = other_of(row)
        return kleene("and", compared(row), None if right is None else COMPARE[after](right, last_of(row)))

    return f"{text} {sign} {other} {after} {last}", chained


def kleene(join: str, *values: Held) -> Held:
    decisive = join == "or"
    return decisive if decisive in values else None if None in values else not decisive


def combined(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def negated(child: Any) -> Any:
        return f"not ({child[0]})", lambda row: None if child[1](row) is None else not child[1](row)

    def joined(join: str, first: Any, second: Any) -> Any:
        return f"({first[0]}) {join} ({second[0]})", lambda row: kleene(join, first[1](row), second[1](row))

    return st.builds(negated, children) | st.builds(joined, st.sampled_from(["and", "or"]), children, children)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(descriptions(), st.recursive(comparisons(), combined, max_leaves=4))
def test_a_filter_holds_where_python_says_so(made: list[Row], condition: tuple[str, Callable[[Row], Held]]) -> None:
    text, holds = condition
    try:
        expected = [bool(holds(row)) for row in made]
    except OverflowError:  # Python's own, of a whole number beyond float's range
        return
    assert RowFilter(rows_table(index_rows(made)), text).mask().tolist() == expected, text


MISSING = [
    description("film", fps=23.976),
    description("ntsc", fps=29.97, scores={"q": 1.0}),
    description("sixty", fps=60),
]
MISSING.append(description("picture", "image", 1, None, scores={"q": 2.0}))


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("fps == 29.97", ["ntsc"]),
        ("fps in (29.97,)", ["ntsc"]),
        ("fps in {29.97, 60}", ["ntsc", "sixty"]),
        ("fps >= 29.97", ["ntsc", "sixty"]),
        ("fps >= +29.97", ["ntsc", "sixty"]),
        ("29.97 <= fps", ["ntsc", "sixty"]),
        ("fps < 29.97", ["film"]),
        ("fps != 29.97", ["film", "sixty"]),
        ("not fps == 29.97", ["film", "sixty"]),
        ("not fps > 24", ["film"]),
        ("fps not in (60,)", ["film", "ntsc"]),
        ("not (fps in (60,))", ["film", "ntsc"]),
        ("not (fps not in (60,))", ["sixty"]),
        ("fps not in ()", ["film", "ntsc", "sixty"]),
        ("seconds != 2", ["film", "ntsc", "sixty"]),
        ("seconds == 48 / 29.97", ["ntsc"]),
        ("scores.q != 1", ["picture"]),
        ("not scores.q == 1", ["picture"]),
        ("not (scores.q == 1 and fps > 1)", ["picture"]),  # its score is another, whatever its rate would be
        ("not (scores.q == 2 and fps > 1)", ["ntsc"]),
        ("fps > 1 or kind == 'image'", ["film", "ntsc", "sixty", "picture"]),
        ("not (fps > 1 or kind == 'image')", []),
        ("frames / references != 1", []),  # divided by zero: missing
        ("not frames / references > 1", []),
        ("fps * 0 == 0", ["film", "ntsc", "sixty"]),
        ("frames == 1.0 or frames in (48.0, 47.5)", ["film", "ntsc", "sixty", "picture"]),
        ("frames < 47.5", ["picture"]),
        ("1 < 2 and fps == 60", ["sixty"]),
        ("'a' < 'b' and fps == 60", ["sixty"]),
    ],
)
def test_a_missing_value_holds_in_no_comparison(tmp_path: Path, text: str, keys: list[str]) -> None:
    assert index_of(tmp_path, MISSING).filter(text).column("key").tolist() == keys


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind == 3", "'kind' is text and '3' is a number"),
        ("3 < kind", "'3' is a number and 'kind' is text"),
        ("fps in (29.97, 'x')", "'x'\\\" is text|is text"),
        ("source in (1,)", "'1' is a number"),
        ("kind + 1 == 2", "'kind' is text, where a number is expected"),
        ("'foto' in reference_origins", "no 'foto' in reference_origins"),
        ("2 in subjects", "is a number, which subjects don't hold"),
        ("fps in (29.97)", "not understood"),
        ("source in subjects", "not understood"),
        ("fps == None", "not understood"),
        ("fps is None", "not understood"),
        ("frames == True", "not understood"),
        ("frames and fps > 1", "is no condition"),
        ("frames > 1 / 0", "division by zero"),
        ("(" * 300 + "frames" + ")" * 300 + " > 1", "filter"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        index_of(tmp_path, MISSING).filter(text)


NAMED = [
    description("a", source="uno", subjects=[{"id": 0, "word": "cat", "domain": 1}]),
    description("b", source="musar"),
]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind != 'vidoe'", r"no sample has 'vidoe' in kind; there are \['video'\]"),
        ("kind == 'vidoe'", "no sample has 'vidoe' in kind"),
        ("not kind == 'vidoe'", "no sample has 'vidoe' in kind"),
        ("'vidoe' != kind", "no sample has 'vidoe' in kind"),
        ("kind not in ('image', 'vidoe')", "no sample has 'vidoe' in kind"),
        ("frames > 1 or source != 'un'", r"no sample has 'un' in source; there are \['musar', 'uno'\]"),
        ("source in ('uno', 'mussar')", "no sample has 'mussar' in source"),
        ("bucket != '5x32x32'", r"no sample has '5x32x32' in bucket; there are \['5x64x64'\]"),
        ("'cta' not in subjects", r"no sample has 'cta' in subjects; there are \['cat'\]"),
        ("9 not in domains", "no sample has '9' in domains; there are"),
    ],
)
def test_a_text_that_no_sample_has_is_a_mistake_whatever_the_operator(text: str, said: str, tmp_path: Path) -> None:
    index = index_of(tmp_path, NAMED)
    with pytest.raises(DataError, match=said):
        index.filter(text)
    with pytest.raises(DataError, match=said):
        selected_rows(tmp_path / "index.parquet", text, known=True)
    # a run that has begun with it goes on, unless nothing is left
    held = RowFilter(index.table, text).mask()
    if held.any():
        assert selected_rows(tmp_path / "index.parquet", text).tolist() == held.tolist()


def test_of_samples_without_any_text_it_is_said_that_they_have_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample has 'cat' in subjects; none has any text there"):
        index_of(tmp_path, MISSING).filter("'cat' in subjects")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("kind != 'image'", ["a", "b"]),  # a kind that there is, though not here
        ("'human' not in domains", ["a", "b"]),
        ("'photo' not in reference_origins", ["a", "b"]),
        ("source not in ('uno',)", ["b"]),
        ("'cat' not in subjects", ["b"]),
        ("source < 'n'", ["b"]),
        ("frames != 81", ["a", "b"]),
    ],
)
def test_what_a_sample_may_have_is_no_mistake(text: str, keys: list[str], tmp_path: Path) -> None:
    assert index_of(tmp_path, NAMED).filter(text).column("key").tolist() == keys


def test_of_many_texts_the_most_alike_are_named(tmp_path: Path) -> None:
    index = index_of(tmp_path, [description(f"clip-{number:04d}") for number in range(50)])
    with pytest.raises(DataError, match=r"no sample has 'clip-0099' in key; there are 50, such as \['clip-00\d9'"):
        index.filter("key != 'clip-0099'")


def test_an_index_of_version_2_has_its_rates_as_they_were_written(tmp_path: Path) -> None:
    """Version 2 kept float32, and did not count a whole caption's tokens."""
    rates = [23.976, 29.97, 59.94, 0.1, float(np.float32(1000 / 3)), None]
    made = [description(f"k{number}", fps=rate) for number, rate in enumerate(rates)]
    table = index_of(tmp_path, made).table.select(SCHEMA.names).drop_columns("caption_tokens")
    place = table.column_names.index("fps")
    table = table.set_column(place, "fps", table.column("fps").cast(pa.float32()))
    described = RAW.model_copy(update={"digest": table_digest([table.combine_chunks()], RAW.identity())})
    described = described.model_copy(update={"format_version": 2})
    path = tmp_path / "old.parquet"
    pq.write_table(
        table.replace_schema_metadata({index_module.METADATA_KEY: described.model_dump_json().encode()}), path
    )
    index = Index.load(path)
    assert index.digest == described.digest and index.table.schema.names[:-2] == SCHEMA.names
    found = [row.fps for row in index.rows(range(len(rates)))]
    assert found[:4] == rates[:4] and found[4] == pytest.approx(1000 / 3) and found[5] is None
    assert {row.caption_tokens for row in index.rows(range(len(rates)))} == {0}
    assert index.filter("fps == 29.97").column("key").tolist() == ["k1"]
    # some columns, also only one that the file does not have
    assert Index.load(path, ["fps"]).filter("fps == 59.94").table.num_rows == 1
    assert Index.load(path, ["caption_tokens"]).column("caption_tokens").tolist() == [0] * len(rates)
    # written again it is of the newest version
    write_index(tmp_path / "new.parquet", index.table, RAW)
    assert Index.load(tmp_path / "new.parquet").rows(range(6)) == index.rows(range(6))


def test_fractions_tell_the_rates_apart() -> None:
    """The rates of this test differ as float64, and two of them not as float32."""
    assert len({Fraction(rate) for rate in RATES}) == len(RATES)
    assert len({np.float32(rate) for rate in RATES}) < len(RATES)
