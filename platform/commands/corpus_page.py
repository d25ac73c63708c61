"""The page of a corpus: what it holds in numbers and plots, its contact sheet, and what each stage did, in one HTML
file."""

import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.folder import beside
from domainshuttle.pipelines.index.parts import CONVERTED_NAME, REPORT_NAME
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.quarantine import QUARANTINE_NAME, fault_kind
from domainshuttle.pipelines.storage.files import exists, read_bytes
from domainshuttle.pipelines.storage.uri import Location, redacted
from domainshuttle.platform.commands.contact_sheet import draw_sheet
from domainshuttle.platform.commands.pair_pictures import PairReport, paired_samples, read_pair_report, similarities
from domainshuttle.platform.report.page import write_page

_MOST_BARS = 14
_MOST_ROWS = 50  # of what was left out
_TAKEN, _REJECTED = "#2c8c4c", "#c0392b"


def write_corpus_page(place: Location, index: Index, path: Path, samples: int) -> Path:
    """Writes the page of `index`, which may be a part of the corpus at `place`, with so many samples of it. Returns its
    path."""
    summary = index.summary()
    rows = _lines(beside(place, QUARANTINE_NAME))
    left_out = {row["key"] or row["shard"]: row["reason"] for row in rows}
    found = read_pair_report(place)
    counted = {
        **({"samples, by source": summary["source"]} if len(summary["source"]) > 1 else {}),
        **({"samples, by kind": summary["kind"]} if len(summary["kind"]) > 1 else {}),
        "samples, by bucket": summary["bucket"],
        "subjects, by domain": summary["domains"],
        "samples, by how many subjects they have": summary["subjects"],
        "samples, by how many references they have": summary["references"],
        "references, by origin": summary["origins"],
        "samples, by what was done to their pixels": _by_reason(_lines(beside(place, CONVERTED_NAME))),
        "samples left out, by reason": _by_reason(rows),
        **({"candidates rejected, by reason": found.rejected} if found else {}),
    }
    sheet: bytes | str
    try:
        sheet = _png(draw_sheet(index, samples))
    except DataError as error:
        sheet = str(error)
    paired = _paired(found, index, samples, left_out) if found else []
    return write_page(
        path,
        "corpus.html",
        title=f"{', '.join(summary['corpora'])} ({'paired' if found else summary['stage']})",
        facts=_facts(place, index, summary, found),
        counts=[(heading, _bars(counts)) for heading, counts in counted.items() if counts],
        similar=_similar(found) if found else None,
        sheet=sheet,
        paired=paired,
        quarantine=[[row["key"] or row["shard"], row["reason"]] for row in rows[:_MOST_ROWS]],
        more=max(len(rows) - _MOST_ROWS, 0),
    )


def _lines(table: Location) -> list[dict[str, str]]:
    """The rows of a table beside an index; none where there is no such table."""
    return [json.loads(line) for line in read_bytes(table).splitlines()] if exists(table) else []


def _by_reason(rows: list[dict[str, str]]) -> dict[str, int]:
    """How many rows there are by the kind of their reason, the most frequent first."""
    return dict(Counter(fault_kind(row["reason"]) for row in rows).most_common())


def _facts(place: Location, index: Index, summary: dict[str, Any], found: PairReport | None) -> list[list[str]]:
    single = summary["single_picture_subjects"]
    facts = [
        ["samples", f"{len(index):,}"],
        ["size", f"{summary['bytes'] / 2**20:,.1f} MiB"],
        ["index", f"{redacted(place)} ({summary['digest'][:8]})"],
        [
            "subjects with a single picture",
            f"{single:,} of {sum(summary['domains'].values()):,}",
        ],
    ]
    altered = index.alterations()
    if changed := altered.sentences():
        facts.append(["fitted to their buckets", ", ".join(changed)])
    if altered.cut_captions:
        facts.append(["captions that are cut", f"{altered.cut_captions:,}"])
    if exists(beside(place, REPORT_NAME)):
        report = json.loads(read_bytes(beside(place, REPORT_NAME)))
        facts.append(["made by", f"data {report['stage']}" if "stage" in report else "data build"])
        notes = {name: count for name, count in report["notes"].items() if not name.startswith("candidates rejected")}
        facts += [[name, f"{count:,}"] for name, count in notes.items()]
    if found:
        settings = found.report["settings"]
        gates = ("least_detection", "least_mask", "least_area", "most_area", "least_side", "least_dino", "most_dino",
                 "least_clip", "least_pictures", "pictures", "frames", "other_clips", "references")  # fmt: skip
        facts.append(["settings", ", ".join(f"{name} {settings[name]}" for name in gates)])
    return facts


def _paired(found: PairReport, index: Index, samples: int, left_out: Mapping[str, str]) -> list[Any]:
    chosen = np.unique(np.linspace(0, len(index) - 1, min(samples, len(index))).astype(int))
    keys = [*index.column("key")[chosen].tolist(), *[*left_out][: max(samples // 2, 1)]]
    return paired_samples(found, index, keys, left_out)


def _bars(counts: Mapping[Any, int]) -> list[tuple[str, float, str]]:
    """Name, share of the longest bar, and count of each; of many the last ones as one."""
    named = [(str(name), count) for name, count in counts.items()]
    if len(named) > _MOST_BARS:
        rest = named[_MOST_BARS - 1 :]
        named = [*named[: _MOST_BARS - 1], (f"{len(rest)} more", sum(count for _, count in rest))]
    longest = max(count for _, count in named)
    return [(name, round(count / longest, 3) if longest else 0.0, f"{count:,}") for name, count in named]


def _similar(found: PairReport) -> bytes | None:
    """Histograms of the similarities of candidates, with the thresholds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    taken, rejected = similarities(found)
    if not taken and not rejected:
        return None
    settings = found.report["settings"]
    figure = Figure(figsize=(12, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low = min([0.0, *taken, *rejected])
    bins = np.linspace(low, 1.0, 61).tolist()
    axes.hist([taken, rejected], bins, stacked=True, color=[_TAKEN, _REJECTED], label=["became pictures", "rejected"])
    for name in ("least_dino", "most_dino"):
        axes.axvline(settings[name], color="#444444", linestyle="--", linewidth=1)
        axes.text(settings[name], 0.98, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=9)
    axes.set_xlabel("similarity of a candidate to its subject's first pictures, by DINOv2")
    axes.set_ylabel("candidates")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def _drawn(figure: Any) -> bytes:
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=110)
    return made.getvalue()


def _png(image: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, "PNG")
    return made.getvalue()
