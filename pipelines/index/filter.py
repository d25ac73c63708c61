"""Filters of index rows, written as a person would: `seconds >= 2 and scores.aesthetic > 4.5 and 'human' in domains`.

The text is parsed as a Python expression and evaluated over whole Arrow columns; nothing of it is ever executed. What
it says holds for the same rows as in Python over the values of `key.json`, whatever type a column has. One rule is
SQL's: a missing value holds in no comparison, and neither does the comparison's negation.
"""

import ast
import difflib
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import KINDS, ORIGINS

_COMPARISONS = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_TURNED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Eq: ast.Eq, ast.NotEq: ast.NotEq}
"""The comparison that says the same with its sides exchanged."""
_PYTHON: dict[type[ast.operator], Any] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right,
}
_EXACT = {ast.Add: pc.add_checked, ast.Sub: pc.subtract_checked, ast.Mult: pc.multiply_checked}
_FLOAT = {ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply, ast.Div: pc.divide}
_DERIVED = {"references": ("reference_subjects",), "subject_count": ("subjects",), "seconds": ("frames", "fps")}
"""What is computed of other columns."""
_KNOWN = {"domains": DOMAINS, "reference_origins": ORIGINS}
"""The names that a list may hold: another is a mistake, which would leave no row without a word."""
_POSSIBLE = {"kind": KINDS}
"""Texts that a column may hold, whether or not a sample has them."""
_MOST_NAMED = 8
"""Texts of a column that a message names."""
_MOST_COMPARED = 10_000
"""Texts among which the nearest is looked for: a column of keys has millions."""

Literal = int | float | str
Value = Any  # Literal | pa.Array, which has no types
"""What a part of a filter stands for: a constant, or a value a row (null where it is missing)."""


class RowFilter:
    """A filter in Python's syntax, parsed, never executed: `seconds >= 2 and scores.aesthetic > 4.5 and 'human' in
    domains`.

    It knows the columns that hold one value a row, `references` (how many), `subject_count`, `seconds` (frames / fps,
    missing for images), `scores.NAME`, and `in` over a list of constants, `domains` (names or numbers), `subjects`,
    `reference_origins`; `and`, `or`, `not`, comparisons and + - * /.

    A missing value (a picture's fps, a score that a sample does not have, a division by zero) holds in no comparison:
    also `!=`, `not in` and `not (...)` leave its row out. An `or` still holds by its other side.
    """

    def __init__(self, table: pa.Table, text: str) -> None:
        self.table = table
        self.text = text
        self._strangers: dict[tuple[str, str], list[str]] = {}
        """Column and text of constants that no row has, and texts that rows have instead."""

    @staticmethod
    def columns(text: str) -> list[str]:
        """The columns that a filter reads, by name, also where there are none of such names; raises DataError."""
        try:
            names = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise DataError(f"filter {text!r} can't be evaluated: {error}") from error
        return sorted({column for name in names for column in _DERIVED.get(name, (name,))})

    def mask(self) -> np.ndarray:
        """bool [rows], True for those that stay; raises DataError that shows what is not understood."""
        try:
            held = self._condition(ast.parse(self.text, mode="eval").body)
        except DataError:
            raise
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, pa.ArrowException) as error:
            raise DataError(f"filter {self.text!r} can't be evaluated: {error}") from error
        return np.asarray(pc.fill_null(held, False).to_numpy(zero_copy_only=False), bool)

    def chosen(self) -> np.ndarray:
        """The mask of a filter as typed: a text that no sample has is a mistake, which with `!=` and `not in` would
        leave every row. Raises DataError with the texts that there are."""
        mask = self.mask()
        if self._strangers:
            (name, text), there = next(iter(self._strangers.items()))
            raise DataError(f"filter {self.text!r}: no sample has {text!r} in {name}; {_choices(there, text)}")
        return mask

    def _condition(self, node: ast.expr) -> pa.Array:
        """bool [rows], null where a missing value decides it: `and`, `or` and `not` are Kleene's, as in SQL."""
        match node:
            case ast.BoolOp(op=joined, values=values):
                join = pc.and_kleene if isinstance(joined, ast.And) else pc.or_kleene
                result = self._condition(values[0])
                for value in values[1:]:
                    result = join(result, self._condition(value))
                return result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(self._condition(operand))
            case ast.Compare(left=left, ops=operations, comparators=comparators):
                held = []
                for operation, right in zip(operations, comparators, strict=True):
                    if isinstance(operation, ast.In | ast.NotIn):
                        found = self._membership(left, right)
                        held.append(pc.invert(found) if isinstance(operation, ast.NotIn) else found)
                    elif type(operation) in _COMPARISONS:
                        held.append(self._compared(type(operation), left, right))
                    else:
                        raise self._fault(node)
                    left = right
                result = held[0]
                for one in held[1:]:
                    result = pc.and_kleene(result, one)
                return result
        raise DataError(
            f"filter {self.text!r}: {ast.unparse(node)!r} is no condition: expected one, such as 'frames >= 17'"
        )

    def _value(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=int() | float() | str() as value) if not isinstance(value, bool):
                return value
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._number(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._arithmetic(ast.Sub, 0, self._number(operand))
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _PYTHON:
                return self._arithmetic(type(operation), self._number(left), self._number(right))
            case ast.Name(id=name):
                return self._named(name)
            case ast.Attribute(value=ast.Name(id="scores"), attr=name):
                return self._score(name)
            case ast.Subscript(value=ast.Name(id="scores"), slice=ast.Constant(value=str() as name)):
                return self._score(name)
        raise self._fault(node)

    def _number(self, node: ast.expr) -> int | float | pa.Array:
        value = self._value(node)
        if isinstance(value, str) or (isinstance(value, pa.Array) and pa.types.is_string(value.type)):
            raise DataError(f"filter {self.text!r}: {ast.unparse(node)!r} is text, where a number is expected")
        return value

    def _arithmetic(
        self, operation: type[ast.operator], left: int | float | pa.Array, right: int | float | pa.Array
    ) -> int | float | pa.Array:
        """As Python reckons; what is divided by zero has no value, so it is missing."""
        if not isinstance(left, pa.Array) and not isinstance(right, pa.Array):
            try:
                result = _PYTHON[operation](left, right)
            except (ZeroDivisionError, OverflowError) as error:
                raise DataError(f"filter {self.text!r}: {left} and {right}: {error}") from error
            if math.isnan(result):
                raise DataError(f"filter {self.text!r}: {left} and {right} make no number")
            return result
        if operation in _EXACT and _is_whole(left) and _is_whole(right):
            try:
                return _EXACT[operation](_as(left, pa.int64()), _as(right, pa.int64()))
            except (pa.ArrowInvalid, OverflowError):  # beyond 64 bits
                pass
        made = _FLOAT[operation](_as(left, pa.float64()), _as(right, pa.float64()))
        undefined = pc.is_nan(made)
        if operation is ast.Div:
            undefined = pc.or_(undefined, pc.equal(_as(right, pa.float64()), 0.0))
        return pc.if_else(undefined, pa.scalar(None, pa.float64()), made)

    def _compared(self, operation: type[ast.cmpop], left: ast.expr, right: ast.expr) -> pa.Array:
        first, second = self._value(left), self._value(right)
        if _is_text(first) != _is_text(second):
            texts = [f"{ast.unparse(node)!r} is {_kind(value)}" for node, value in ((left, first), (right, second))]
            raise DataError(f"filter {self.text!r}: {' and '.join(texts)}: text and numbers can't be compared")
        if not isinstance(first, pa.Array) and not isinstance(second, pa.Array):
            return pa.array(np.full(len(self.table), _python_compared(operation, first, second)))
        if not isinstance(first, pa.Array):
            first, second, operation = second, first, _TURNED[operation]
            left, right = right, left
        if isinstance(second, pa.Array):
            return _COMPARISONS[operation](*_alike(first, second))
        if operation in (ast.Eq, ast.NotEq):
            self._note_strangers(left, first, [second])
        return _compared_with(first, operation, second)

    def _note_strangers(self, node: ast.expr, column: pa.Array, texts: list[Any]) -> None:
        """Notes those of some constants that no row of a column of texts has."""
        if not len(self.table) or not pa.types.is_string(column.type):
            return
        name = ast.unparse(node)
        wanted = [text for text in texts if text not in _POSSIBLE.get(name, ())]
        if wanted and (strange := set(wanted) - set(_held_by(column, wanted))):
            there = sorted(pc.unique(column).drop_null().to_pylist())
            self._strangers |= {(name, text): there for text in wanted if text in strange}

    def _membership(self, left: ast.expr, right: ast.expr) -> pa.Array:
        match right:
            case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
                column, wanted = self._value(left), [self._value(element) for element in elements]
                if any(isinstance(value, pa.Array) for value in wanted) or not isinstance(column, pa.Array):
                    raise self._fault(right)
                for value, element in zip(wanted, elements, strict=True):
                    if _is_text(value) != _is_text(column):
                        raise DataError(
                            f"filter {self.text!r}: {ast.unparse(left)!r} is {_kind(column)} and "
                            f"{ast.unparse(element)!r} is {_kind(value)}: text and numbers can't be compared"
                        )
                self._note_strangers(left, column, wanted)
                found = pc.is_in(column, _held_values(wanted, column.type))
                return pc.if_else(pc.is_null(column), pa.scalar(None, pa.bool_()), found)
            case ast.Name(id="domains" | "subjects" | "reference_origins" as name):
                wanted_one = self._value(left)
                lists = self._column(name)
                if isinstance(wanted_one, pa.Array):
                    raise self._fault(left)
                if isinstance(wanted_one, str) and name in _KNOWN and wanted_one not in _KNOWN[name]:
                    raise DataError(
                        f"filter {self.text!r}: no {wanted_one!r} in {name}; there are {list(_KNOWN[name])}"
                    )
                if name == "domains" and isinstance(wanted_one, str):
                    wanted_one = DOMAINS.index(wanted_one)
                if _is_text(wanted_one) != (name != "domains"):
                    raise DataError(
                        f"filter {self.text!r}: {ast.unparse(left)!r} is {_kind(wanted_one)}, which {name} don't hold"
                    )
                items = lists.flatten()
                if name == "subjects":
                    self._note_strangers(right, items, [wanted_one])
                elif name == "domains" and wanted_one not in range(-1, len(DOMAINS)):
                    self._strangers[name, str(wanted_one)] = list(DOMAINS)
                held = pc.is_in(items, _held_values([wanted_one], items.type)).to_numpy(zero_copy_only=False)
                mask = np.zeros(len(self.table), bool)
                mask[pc.list_parent_indices(lists).to_numpy()[held]] = True
                return pa.array(mask)
        raise self._fault(right)

    def _named(self, name: str) -> pa.Array:
        if name in ("references", "subject_count"):
            return pc.list_value_length(self._column(*_DERIVED[name]))
        if name == "seconds":
            return self._arithmetic(ast.Div, self._named("frames"), self._named("fps"))
        if name not in self.table.column_names or pa.types.is_nested(self.table.schema.field(name).type):
            plain = [f.name for f in self.table.schema if not pa.types.is_nested(f.type)]
            raise DataError(f"filter {self.text!r}: no value {name!r}; there are {[*plain, *_DERIVED]} and scores.NAME")
        column = self._column(name)
        if pa.types.is_dictionary(column.type):
            return pc.cast(column, pa.string())
        return as_written(column)

    def _score(self, name: str) -> pa.Array:
        scores = self._column("scores")
        found = pc.map_lookup(scores, name, "first")
        if found.null_count == len(found):  # a misspelt score would quietly leave no row
            known = sorted(pc.unique(scores.keys).to_pylist())
            raise DataError(f"filter {self.text!r}: no sample has a score {name!r}; there are {known}")
        return as_written(found)

    def _column(self, name: str) -> pa.Array:
        if name not in self.table.column_names:
            raise DataError(f"filter {self.text!r} needs the column {name!r}, which was not loaded")
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def _fault(self, node: ast.expr) -> DataError:
        return DataError(
            f"filter {self.text!r}: {ast.unparse(node)!r} is not understood; an example is "
            "\"references >= 2 and scores.aesthetic > 4.5 and 'human' in domains\""
        )


def as_written(column: pa.Array) -> pa.Array:
    """float32 values as the shortest decimals that they stand for, in float64: 29.97, and not 29.969999313; other
    columns as they are."""
    if not pa.types.is_float32(column.type):
        return column
    values, codes = np.unique(column.fill_null(0).to_numpy(zero_copy_only=False), return_inverse=True)
    whole = np.array([float(str(value)) for value in values], np.float64)
    return pc.if_else(column.is_valid(), pa.array(whole[codes.reshape(-1)]), pa.scalar(None, pa.float64()))


def _is_text(value: Value) -> bool:
    return isinstance(value, str) or (isinstance(value, pa.Array) and pa.types.is_string(value.type))


def _kind(value: Value) -> str:
    return "text" if _is_text(value) else "a number"


def _is_whole(value: int | float | pa.Array) -> bool:
    return pa.types.is_integer(value.type) if isinstance(value, pa.Array) else isinstance(value, int)


def _as(value: int | float | pa.Array, kind: pa.DataType) -> pa.Array | pa.Scalar:
    if isinstance(value, pa.Array):
        return pc.cast(value, kind, safe=pa.types.is_integer(kind))
    return pa.scalar(float(value) if pa.types.is_floating(kind) else value, kind)


def _alike(first: pa.Array, second: pa.Array) -> tuple[pa.Array, pa.Array]:
    if _is_text(first):
        return first, second
    kind = pa.float64()
    if _is_whole(first) and _is_whole(second):
        kind = pa.decimal128(20) if pa.uint64() in (first.type, second.type) else pa.int64()
    return pc.cast(first, kind, safe=kind != pa.float64()), pc.cast(second, kind, safe=kind != pa.float64())


def _python_compared(operation: type[ast.cmpop], left: Any, right: Any) -> bool:
    held = {ast.Lt: left < right, ast.LtE: left <= right, ast.Gt: left > right, ast.GtE: left >= right}
    return bool({**held, ast.Eq: left == right, ast.NotEq: left != right}[operation])


def _compared_with(column: pa.Array, operation: type[ast.cmpop], literal: Literal) -> pa.Array:
    """Compares a column with a constant, exactly: the constant becomes the largest value of the column's type that is
    not above it, and whether it lies above that (an int32 is below 2.5 where it is at most 2)."""
    if isinstance(literal, str):
        return _COMPARISONS[operation](column, pa.scalar(literal))
    nearest, above = _nearest(literal, column.type)
    if nearest is None:  # below all
        held = operation in (ast.Gt, ast.GtE, ast.NotEq)
    elif not above:
        return _COMPARISONS[operation](column, pa.scalar(nearest, column.type))
    elif operation in (ast.Lt, ast.LtE):
        return pc.less_equal(column, pa.scalar(nearest, column.type))
    elif operation in (ast.Gt, ast.GtE):
        return pc.greater(column, pa.scalar(nearest, column.type))
    else:
        held = operation is ast.NotEq
    return pc.if_else(column.is_valid(), held, pa.scalar(None, pa.bool_()))


def _nearest(literal: float, kind: pa.DataType) -> tuple[Any, bool]:
    """The largest value of a type that is not above a number (None: there is none), and whether the number is above
    it."""
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        least, most = int(limits.min), int(limits.max)
        if literal < least:
            return None, True
        if literal > most:
            return most, True
        whole = math.floor(literal)
        return whole, whole != literal
    try:
        value = float(literal)
    except OverflowError:
        value = math.inf if literal > 0 else -math.inf
    if value > literal:  # a whole number of more digits than a float has
        value = math.nextafter(value, -math.inf)
    return value, value != literal


def _held_values(wanted: list[Any], kind: pa.DataType) -> pa.Array:
    """Those of some constants that a column of a type can equal, in that type."""
    if pa.types.is_string(kind):
        return pa.array(wanted, kind)
    nearest = [_nearest(value, kind) for value in wanted]
    return pa.array([value for value, above in nearest if value is not None and not above], kind)


def _held_by(column: pa.Array, texts: list[str]) -> list[str]:
    """Those of some texts that a column has."""
    wanted = pa.array(texts, column.type)
    return pc.unique(column.filter(pc.is_in(column, wanted))).to_pylist()


def _choices(there: list[str], text: str) -> str:
    """The texts of a column, or of many those that are most like one."""
    if not there:
        return "none has any text there"
    if len(there) <= _MOST_NAMED:
        return f"there are {there}"
    alike = difflib.get_close_matches(text, there[:_MOST_COMPARED], 3) or there[:3]
    return f"there are {len(there)}, such as {alike}"
