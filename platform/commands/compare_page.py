"""The page of a comparison: runs, curves, what differs, and the runs' samples side by side, all in one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainshuttle.platform.commands.compare import Row, differences, errors
from domainshuttle.platform.report import page
from domainshuttle.platform.tracking.queries import list_artifacts, read_artifact

_SAMPLES = re.compile(r"samples/step-(\d+)/grid\.png")


@dataclass(frozen=True)
class Picture:
    """A PNG of a run with the texts above it."""

    label: str
    note: str
    png: bytes


def last_grids(uri: str, rows: Sequence[Row]) -> dict[str, list[Picture]]:
    """By title, the newest pictures of each schedule: samples of held-out cases in training, and of its evaluation."""
    training: dict[str, Picture] = {}
    evaluation: dict[str, Picture] = {}
    schedule = ""
    for row in rows:
        schedule = row.label if row.depth == 0 else schedule
        names = list_artifacts(uri, row.run.id, "samples") + list_artifacts(uri, row.run.id, "evaluation")
        grids = [name for name in names if name.endswith("/grid.png")]
        # of a schedule the last segment that has any; of a segment the last step
        steps = {int(match[1]): name for name in grids if (match := _SAMPLES.fullmatch(name))}
        if steps:
            last = max(steps)
            png = read_artifact(uri, row.run.id, steps[last])
            training[schedule] = Picture(schedule, f"{row.label}, step {last:,}", png)
        if "evaluation/grid.png" in grids:
            evaluation[schedule] = Picture(schedule, row.label, read_artifact(uri, row.run.id, "evaluation/grid.png"))
    found = {"Samples in training": list(training.values()), "Evaluation": list(evaluation.values())}
    return {title: pictures for title, pictures in found.items() if pictures}


def write_page(
    uri: str,
    rows: Sequence[Row],
    curves: Path | str,
    path: Path | str,
    title: str = "Runs",
    template: str = "compare.html",
    **more: Any,
) -> Path:
    """Writes an HTML page at `path` that needs nothing else.

    `template` may be one that extends the comparison's, and has the values `more` too.
    """
    labels, different = differences(rows)
    return page.write_page(
        path,
        template,
        title=title,
        rows=rows,
        fields=["run", *rows[0].values] if rows else [],
        errors=errors(rows),
        curves=Path(curves).read_bytes(),
        labels=labels,
        differences=[[key, *texts] for key, texts in different],
        galleries=last_grids(uri, rows),
        **more,
    )
