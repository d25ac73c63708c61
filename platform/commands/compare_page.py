"""The page of a comparison: table, curves, what differs, and the runs' samples side by side, all in one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from domainshuttle.platform.commands.compare import Row, differences, errors
from domainshuttle.platform.tracking.queries import list_artifacts, read_artifact

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8883; white-space: nowrap; }
th { border-bottom: 2px solid #8886; }
th:first-child, td:first-child, .text { text-align: left; }
.differs td { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; max-width: 24rem; text-align: left;
  vertical-align: top; }
.differs th { text-align: left; } .differs td:first-child { white-space: nowrap; max-width: none; }
tr.segment td:first-child { padding-left: 2rem; }
tr.schedule { font-weight: 600; }
.finished { color: #2a8a4a; } .failed { color: #c62f2f; } .running { color: #1f7fae; } .killed { color: #a87400; }
img { display: block; width: 100%; border-radius: 6px; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { margin-bottom: .3rem; } figcaption span { opacity: .65; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG of a run with what is said above it."""

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
        if steps := sorted(name for name in grids if name.startswith("samples/step-")):
            step = int(steps[-1].split("/")[1].removeprefix("step-"))
            png = read_artifact(uri, row.run.id, steps[-1])
            training[schedule] = Picture(schedule, f"{row.label}, step {step:,}", png)
        if "evaluation/grid.png" in grids:
            evaluation[schedule] = Picture(schedule, row.label, read_artifact(uri, row.run.id, "evaluation/grid.png"))
    found = {"Samples in training": list(training.values()), "Evaluation": list(evaluation.values())}
    return {title: pictures for title, pictures in found.items() if pictures}


def write_page(
    uri: str, rows: Sequence[Row], curves: Path | str, path: Path | str, title: str = "Runs", lead: str = ""
) -> Path:
    """Writes an HTML page at `path` that needs nothing else; `lead` is HTML to put before the table."""
    sections = [f"<h1>{html.escape(title)}</h1>", lead, *_sections(uri, rows, Path(curves))]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>{chr(10).join(sections)}\n</body></html>\n",
        encoding="utf-8",
    )
    return path


def _sections(uri: str, rows: Sequence[Row], curves: Path) -> Iterator[str]:
    if rows:
        yield _runs(rows)
    for label, error in errors(rows):
        yield f'<p><b class="failed">{html.escape(label)}</b> failed: {html.escape(error)}</p>'
    yield "<h2>Losses</h2>"
    yield image(curves.read_bytes(), "Losses against steps and GPU-hours")
    labels, lines = differences(rows, short=False)
    if lines:
        yield "<h2>What differs</h2>"
        yield table_of(["key", *labels], [[key, *texts] for key, texts in lines], "differs")
    elif len(labels) > 1:
        yield "<p>The configurations do not differ.</p>"
    for heading, pictures in last_grids(uri, rows).items():
        yield f'<h2>{heading}</h2><div class="samples">'
        for shown in pictures:
            caption = f"<b>{html.escape(shown.label)}</b> <span>{html.escape(shown.note)}</span>"
            alt = f"{heading}: {shown.label}, {shown.note}"
            yield f"<figure><figcaption>{caption}</figcaption>{image(shown.png, alt)}</figure>"
        yield "</div>"


def image(png: bytes, alt: str) -> str:
    """A PNG inside the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table_of(heads: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of texts."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>\n" for line in lines)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _runs(rows: Sequence[Row]) -> str:
    heads = "".join(
        f"<th{' class=text' if name in ('run', 'status') else ''}>{html.escape(name)}</th>"
        for name in ["run", *rows[0].values]
    )
    lines = []
    for row in rows:
        cells = [f"<td>{html.escape(row.label)}</td>"]
        for name, value in row.values.items():
            kind = f' class="text {html.escape(value)}"' if name == "status" else ""
            cells.append(f"<td{kind}>{html.escape(value)}</td>")
        lines.append(f'<tr class="{"segment" if row.depth else "schedule"}">{"".join(cells)}</tr>')
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>'
