"""What a clip costs: seconds by part and memory, of the clips that were made after a warm-up."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from domainshuttle.platform.evaluation.results import Results

PARTS = ("text", "references", "denoising", "decoding", "total")


def latency_rows(results: Results) -> list[dict[str, Any]]:
    """A row a model: medians over its clips, in seconds a clip; of the clips that were the first of their process none
    count, and of a batch each clip has its share."""
    rows = []
    for column in results.columns:
        clips = [clip for (name, _), some in results.clips.items() if name == column.name for clip in some]
        found = [clip.made["latency"] for clip in clips if clip.made.get("latency") and clip.sha256]
        warm = [one for one in found if one["warm"]]
        if not warm:
            continue
        sizes = [clip.made["settings"] for clip in clips if clip.made.get("latency")]
        shapes = [{"size": f"{one['frames']}x{one['height']}x{one['width']}"} for one in sizes]
        rows.append(
            {
                "column": column.name,
                "clips": len(warm),
                "batch": _each(warm, "batch"),
                **{part: median(one[part] / one["batch"] for one in warm) for part in PARTS},
                "step": median(one["denoising"] / one["steps"] / one["batch"] for one in warm),
                "evaluations": fmean(one["evaluations"] for one in warm),
                "allocated": max(one["allocated"] for one in warm) / 2**30,
                "reserved": max(one["reserved"] for one in warm) / 2**30,
                "device": _each(warm, "device"),
                "dtype": _each(warm, "dtype"),
                "attention": _each(warm, "attention"),
                "steps": _each(warm, "steps"),
                "size": _each(shapes, "size"),
                "references_count": fmean(one["references_count"] for one in warm),
            }
        )
    return rows


def _each(found: Sequence[Mapping[str, Any]], name: str) -> str:
    """What clips have of a name: of a model that was made on two kinds of devices both."""
    return " and ".join(dict.fromkeys(str(one[name]) for one in found))
