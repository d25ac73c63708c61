"""A digest of a table's values that does not depend on how they are stored."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def table_digest(blocks: Iterable[pa.Table], head: Any) -> str:
    """A hash of the blocks' values, column by column, and of `head` (any JSON), as 32 hexadecimal digits.

    It is blind to chunks, dictionaries, compression and row groups. The same rows give the same digest where they are
    cut into blocks at the same rows.
    """
    columns: dict[str, Any] = {}
    for block in blocks:
        for name in block.column_names:
            column = columns.setdefault(name, hashlib.blake2b(digest_size=16))
            _hash_values(column, block.column(name).combine_chunks())
    digest = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=16)
    for name in sorted(columns):
        digest.update(name.encode() + columns[name].digest())
    return digest.hexdigest()


def combined_digest(*parts: str | bytes) -> str:
    """A hash of a sequence of names and digests, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _hash_values(digest: Any, values: pa.Array) -> None:
    # Null values are hashed as such, and then as nothing: what their places hold is the writer's chance.
    valid = pc.is_valid(values).to_numpy(zero_copy_only=False).tobytes() if values.null_count else b"all"
    digest.update(valid)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_map(values.type):
        entries = pa.struct([("key", values.type.key_type), ("value", values.type.item_type)])
        values = values.cast(pa.list_(entries))
    if pa.types.is_struct(values.type):
        for child in values.flatten():
            _hash_values(digest, child)
    elif pa.types.is_list(values.type):
        digest.update(_numbers(pc.list_value_length(values), np.int64))
        _hash_values(digest, values.flatten())
    elif pa.types.is_string(values.type):
        values = pc.fill_null(values, "").cast(pa.large_string())
        digest.update(_numbers(pc.binary_length(values), np.int64))
        offsets = np.frombuffer(values.buffers()[1] or b"", np.int64)[values.offset : values.offset + len(values) + 1]
        if len(values):
            digest.update(memoryview(values.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    else:
        digest.update(_numbers(values, values.type.to_pandas_dtype()))


def _numbers(values: pa.Array, dtype: Any) -> bytes:
    return pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(dtype, copy=False).tobytes()
