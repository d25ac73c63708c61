"""What an index holds, in counts and quantiles, for people and trackers."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from domainshuttle.model.domains import DOMAINS


def summarise(table: pa.Table) -> dict[str, Any]:
    """The summary of index rows, ready for JSON.

    Counts of samples by source, kind, bucket, number of references and of subjects; of subjects by domain, of
    references by origin, of subjects with only one picture (their pairs for the cross-pair loss are augmented views);
    quantiles of seconds (at the files' own rates), caption lengths, and for encoded samples text tokens.
    """
    references = pc.list_value_length(table.column("reference_subjects"))
    seconds = pc.drop_null(pc.divide(pc.cast(table.column("frames"), pa.float64()), table.column("fps")))
    domains = pc.value_counts(pc.list_flatten(table.column("domains"))).to_pylist()
    summary = {
        "samples": len(table),
        "bytes": sum(
            pc.sum(pc.struct_field(chunk.flatten(), "size")).as_py() or 0 for chunk in table["members"].chunks
        ),
        **{name: _counts(table.column(name)) for name in ("source", "kind", "bucket")},
        "subjects": _by_number(pc.list_value_length(table.column("subjects"))),
        "references": _by_number(references),
        "single_picture_subjects": _single_picture_subjects(table.column("reference_subjects")),
        "domains": {DOMAINS[c["values"]] if c["values"] >= 0 else "none": c["counts"] for c in domains},
        "origins": _counts(pc.list_flatten(table.column("reference_origins"))),
        "seconds": _quantiles(seconds),
        "caption_length": _quantiles(table.column("caption_length")),
    }
    if len(table) and pc.max(table.column("text_tokens")).as_py():
        summary["text_tokens"] = _quantiles(table.column("text_tokens"))
    return summary


def _single_picture_subjects(pictures: pa.ChunkedArray) -> int:
    """How many (sample, subject) come with exactly one picture."""
    lists = pictures.combine_chunks()
    owners = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    subjects = pc.list_flatten(lists).to_numpy().astype(np.int64)
    _, counts = np.unique(owners * 256 + subjects, return_counts=True)
    return int((counts == 1).sum())


def _counts(values: pa.ChunkedArray | pa.Array) -> dict[Any, int]:
    counted = pc.value_counts(values)
    return {c["values"]: c["counts"] for c in sorted(counted.to_pylist(), key=lambda c: (-c["counts"], c["values"]))}


def _by_number(values: pa.ChunkedArray | pa.Array) -> dict[str, int]:
    return {str(number): count for number, count in sorted(_counts(values).items())}


def _quantiles(values: pa.ChunkedArray | pa.Array) -> dict[str, float]:
    if not len(values):
        return {}
    points = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    found = pc.quantile(values, list(points.values())).to_pylist()
    return dict(zip(points, found, strict=True))
