"""The page of a comparison: runs, curves, what differs, and the runs' samples side by side, all in one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainshuttle.platform.commands.compare import Row, differences, errors
from domainshuttle.platform.console import console
from domainshuttle.platform.report import page
from domainshuttle.platform.report.text import Prose
from domainshuttle.platform.tracking.mlflow import TrackingError
from domainshuttle.platform.tracking.queries import list_artifacts, read_artifact

_SAMPLES = re.compile(r"samples/step-(\d+)/grid\.png")


@dataclass(frozen=True)
class Picture:
    """A PNG of a run with the texts above it."""

    label: str
    note: str
    png: bytes


def last_grids(uri: str, rows: Sequence[Row]) -> tuple[dict[str, list[Picture]], list[tuple[str, str]]]:
    """By title, the newest pictures of each schedule: samples of held-out cases in training, and of its evaluation.

    Also the runs whose pictures can't be read, and why: a client may have no access to where they are stored.
    """
    faults: list[tuple[str, str]] = []
    training: dict[str, Picture] = {}
    evaluation: dict[str, Picture] = {}
    schedule = ""
    for row in rows:
        schedule = row.label if row.depth == 0 else schedule
        try:
            names = list_artifacts(uri, row.run.id, "samples") + list_artifacts(uri, row.run.id, "evaluation")
            grids = [name for name in names if name.endswith("/grid.png")]
            # of a schedule the last segment that has any; of a segment the last step
            steps = {int(match[1]): name for name in grids if (match := _SAMPLES.fullmatch(name))}
            if steps:
                last = max(steps)
                png = read_artifact(uri, row.run.id, steps[last])
                training[schedule] = Picture(schedule, f"{row.label}, step {last:,}", png)
            if "evaluation/grid.png" in grids:
                evaluation[schedule] = Picture(
                    schedule, row.label, read_artifact(uri, row.run.id, "evaluation/grid.png")
                )
        except TrackingError as error:
            faults.append((row.label, str(error)))
    found = {"Samples in training": list(training.values()), "Evaluation": list(evaluation.values())}
    return {title: pictures for title, pictures in found.items() if pictures}, faults


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
    galleries, unread = last_grids(uri, rows)
    for label, fault in unread:
        console.print(Prose(f"The pictures of {label} are left out of the page: {fault}"))
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
        galleries=galleries,
        unread=unread,
        **more,
    )
