"""Filters of index rows, written as a person would: `seconds >= 2 and scores.aesthetic > 4.5 and 'human' in domains`.

The text is parsed as a Python expression and evaluated over whole Arrow columns; nothing of it is ever executed.
"""

import ast
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import DOMAINS

_COMPARISONS = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_DERIVED = {"references": ("reference_subjects",), "subject_count": ("subjects",), "seconds": ("frames", "fps")}
"""What is computed of other columns."""
_ARITHMETIC = {ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply, ast.Div: pc.divide}


class RowFilter:
    """A filter in Python's syntax, parsed, never executed: `seconds >= 2 and scores.aesthetic > 4.5 and 'human' in
    domains`.

    It knows the columns that hold one value a row, `references` (how many), `subject_count`, `seconds` (frames / fps,
    missing for images), `scores.NAME`, and `in` over a list of constants, `domains` (names or numbers), `subjects`,
    `reference_origins`. A comparison with a missing value does not hold.
    """

    def __init__(self, table: pa.Table, text: str) -> None:
        self.table = table
        self.text = text

    @staticmethod
    def columns(text: str) -> list[str]:
        """The columns that a filter reads, by name, also where there are none of such names; raises DataError."""
        try:
            names = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
        except (SyntaxError, ValueError, RecursionError) as error:
            raise DataError(f"filter {text!r} can't be evaluated: {error}") from error
        return sorted({column for name in names for column in _DERIVED.get(name, (name,))})

    def mask(self) -> np.ndarray:
        """bool [rows], True for those that stay; raises DataError that shows what is not understood."""
        try:
            value = self._value(ast.parse(self.text, mode="eval").body)
        except DataError:
            raise
        except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
            raise DataError(f"filter {self.text!r} can't be evaluated: {error}") from error
        if not isinstance(value, pa.ChunkedArray | pa.Array) or not pa.types.is_boolean(value.type):
            raise DataError(f"filter {self.text!r}: expected a condition, such as 'frames >= 17'")
        return np.asarray(pc.fill_null(value, False).to_numpy(zero_copy_only=False), bool)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str()):
                return node.value
            case ast.BoolOp():
                join = pc.and_ if isinstance(node.op, ast.And) else pc.or_
                values = [pc.fill_null(self._value(value), False) for value in node.values]
                result = values[0]
                for value in values[1:]:
                    result = join(result, value)
                return result
            case ast.UnaryOp(op=ast.Not()):
                return pc.invert(pc.fill_null(self._value(node.operand), False))
            case ast.UnaryOp(op=ast.USub()):
                return pc.negate(self._value(node.operand))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                left, right = (self._number(side) for side in (node.left, node.right))
                return _ARITHMETIC[type(node.op)](left, right)
            case ast.Compare():
                return self._comparison(node)
            case ast.Name(id=name):
                return self._name(name)
            case ast.Attribute(value=ast.Name(id="scores"), attr=name):
                return self._score(name)
            case ast.Subscript(value=ast.Name(id="scores"), slice=ast.Constant(value=str() as name)):
                return self._score(name)
        raise self._fault(node)

    def _number(self, node: ast.expr) -> Any:
        value = self._value(node)
        return float(value) if isinstance(value, int | float) else pc.cast(value, pa.float64())

    def _comparison(self, node: ast.Compare) -> Any:
        result, left = None, node.left
        for operation, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(operation, ast.In | ast.NotIn):
                held = self._membership(left, right)
                held = pc.invert(held) if isinstance(operation, ast.NotIn) else held
            elif type(operation) in _COMPARISONS:
                held = _COMPARISONS[type(operation)](self._value(left), self._value(right))
            else:
                raise self._fault(node)
            held = pc.fill_null(held, False)
            result, left = held if result is None else pc.and_(result, held), right
        return result

    def _membership(self, left: ast.expr, right: ast.expr) -> Any:
        match right:
            case ast.Tuple() | ast.List():
                column = self._value(left)
                return pc.is_in(column, pa.array([self._value(element) for element in right.elts]).cast(column.type))
            case ast.Name(id="domains" | "subjects" | "reference_origins" as name):
                wanted = self._value(left)
                if name == "domains" and isinstance(wanted, str):
                    if wanted not in DOMAINS:
                        raise DataError(f"filter {self.text!r}: no domain {wanted!r}; there are {list(DOMAINS)}")
                    wanted = DOMAINS.index(wanted)
                lists = self._column(name).combine_chunks()
                parents = pc.list_parent_indices(lists).to_numpy()
                mask = np.zeros(len(self.table), bool)
                mask[parents[pc.equal(lists.flatten(), wanted).to_numpy(zero_copy_only=False)]] = True
                return pa.array(mask)
        raise self._fault(right)

    def _name(self, name: str) -> Any:
        if name in ("references", "subject_count"):
            return pc.list_value_length(self._column(*_DERIVED[name]))
        if name == "seconds":
            return pc.divide(pc.cast(self._column("frames"), pa.float64()), self._column("fps"))
        if name not in self.table.column_names or pa.types.is_nested(self.table.schema.field(name).type):
            plain = [f.name for f in self.table.schema if not pa.types.is_nested(f.type)]
            raise DataError(f"filter {self.text!r}: no value {name!r}; there are {[*plain, *_DERIVED]} and scores.NAME")
        column = self.table.column(name)
        return pc.cast(column, pa.string()) if pa.types.is_dictionary(column.type) else column

    def _score(self, name: str) -> Any:
        scores = self._column("scores")
        found = pc.map_lookup(scores, name, "first")
        if found.null_count == len(found):  # a misspelt score would quietly leave no row
            known = sorted({key for chunk in scores.chunks for key in pc.unique(chunk.keys).to_pylist()})
            raise DataError(f"filter {self.text!r}: no sample has a score {name!r}; there are {known}")
        return found

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise DataError(f"filter {self.text!r} needs the column {name!r}, which was not loaded")
        return self.table.column(name)

    def _fault(self, node: ast.expr) -> DataError:
        return DataError(
            f"filter {self.text!r}: {ast.unparse(node)!r} is not understood; an example is "
            "\"references >= 2 and scores.aesthetic > 4.5 and 'human' in domains\""
        )
