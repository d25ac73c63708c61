"""`domainshuttle compare`: the runs of one or more experiments side by side, as a table, a picture and a page.

The table is a tree, a schedule with its segments below it, and shows of the configuration only the keys in which the
schedules differ. The picture shows losses against steps and against GPU-hours. All of it is read through `records`.
"""

from __future__ import annotations

import base64
import html
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from domainshuttle.platform.records import RunRecord, read_history, read_runs

LOSSES = ("loss", "loss/flow", "loss/cross_pair")
_HOURS = "gpu_hours/used"
# Okabe and Ito's colours, told apart also by the colour-blind
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SPARE = ("flow", "cross pair", "min", "samples/s", "duration")  # what a narrow console goes without, in this order
_STATUS_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "killed": "yellow"}


@dataclass(frozen=True)
class Row:
    """A run in the table: `depth` 0 is a schedule, 1 one of its segments; texts by column and by configuration key."""

    run: RunRecord
    label: str
    depth: int
    values: dict[str, str]
    differences: dict[str, str]


def compare(uri: str, experiments: Sequence[str], runs: Sequence[str] = ()) -> list[Row]:
    """The rows of the table: schedules, oldest first, each with its segments after it.

    `runs` chooses schedules by their name or the beginning of their id; without it all are shown. Raises
    ConnectionError when the server does not answer, LookupError for an experiment or a run that is not there.
    """
    records = read_runs(uri, experiments)
    ids = {record.id for record in records}
    parents = [record for record in records if record.parent not in ids]
    for wanted in runs:
        if not any(_is(record, wanted) for record in parents):
            names = ", ".join(sorted({record.name for record in parents}))
            raise LookupError(f"no run {wanted!r} in {', '.join(experiments)}; there are: {names}")
    if runs:
        parents = [record for record in parents if any(_is(record, wanted) for wanted in runs)]
    titles = [(record.experiment, record.name) for record in parents]
    configs = [configuration(record) for record in parents]
    keys = differing(configs)
    rows: list[Row] = []
    for parent, config in zip(parents, configs, strict=True):
        unique = titles.count((parent.experiment, parent.name)) == 1
        label = parent.name if unique else f"{parent.name} ({parent.id[:6]})"
        if len(experiments) > 1:
            label = f"{parent.experiment}: {label}"
        children = [record for record in records if record.parent == parent.id]
        used = [child.metrics.get(_HOURS, 0.0) for child in children]
        total = parent.metrics.get(_HOURS, max(used, default=0.0))
        steps = sum(_steps(record) or 0 for record in [parent, *children]) or None
        values = _values(uri, parent, steps, total)
        rows.append(Row(parent, label, 0, values, {key: config.get(key, "") for key in keys}))
        before = 0.0
        for child, hours in zip(children, used, strict=True):
            # the ledger counts over the whole schedule: a segment's own hours are those since the segment before it
            values = _values(uri, child, _steps(child), hours - before if hours else 0.0)
            rows.append(Row(child, child.name, 1, values, {}))
            before = max(before, hours)
    return rows


def _is(record: RunRecord, wanted: str) -> bool:
    return wanted == record.name or record.id.startswith(wanted)


def configuration(record: RunRecord) -> dict[str, str]:
    """The params of a run; of those that were changed on a resume the newest values."""
    changed = {key.removeprefix("changed."): value for key, value in record.tags.items() if key.startswith("changed.")}
    return {**record.params, **changed}


def differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose value is not the same, or not there, in all configurations; sorted."""
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def _steps(record: RunRecord) -> int | None:
    """The last step that anything was logged at; system metrics count samples, not steps."""
    return max((step for key, step in record.steps.items() if not key.startswith("system/")), default=None)


def _values(uri: str, record: RunRecord, steps: int | None, hours: float) -> dict[str, str]:
    metrics = record.metrics
    losses = read_history(uri, record.id, "loss") if "loss" in metrics else []
    finite = [value for _, value in losses if math.isfinite(value)]
    return {
        "status": record.status.lower(),
        "steps": "" if steps is None else f"{steps:,}",
        "loss": _number(metrics.get("loss")),
        "min": _number(min(finite, default=None)),
        "flow": _number(metrics.get("loss/flow")),
        "cross pair": _number(metrics.get("loss/cross_pair")),
        "samples/s": _number(metrics.get("samples/s")),
        "GPU-hours": _number(hours or None),
        "duration": _duration((record.end or time.time()) - record.start),
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m {rest:02d}s"


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Prints the rows, then the configuration's differences; on a narrow console without the less important columns."""
    if not rows:
        console.print("There are no runs yet.")
        return
    columns, keys = list(rows[0].values), list(rows[0].differences)
    beside = keys if _fits(_table(rows, columns, keys), console) else []
    for name in _SPARE:
        if _fits(_table(rows, columns, beside), console):
            break
        columns.remove(name)
    console.print(_table(rows, columns, beside))
    for row in rows if keys and not beside else ():
        if row.depth == 0:
            texts = zip(short_names(keys), row.differences.values(), strict=True)
            console.print(f"[bold]{escape(row.label)}[/]", escape(", ".join(f"{key} = {text}" for key, text in texts)))


def _fits(table: Table, console: Console) -> bool:
    return console.measure(table, options=console.options.update(max_width=100_000)).maximum <= console.width


def _table(rows: Sequence[Row], columns: Sequence[str], keys: Sequence[str]) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    for name in short_names(keys):
        table.add_column(escape(name))
    for row in rows:
        texts = {name: escape(row.values[name]) for name in columns}
        if style := _STATUS_STYLES.get(row.values["status"]):
            texts["status"] = f"[{style}]{texts['status']}[/]"
        name = f"[bold]{escape(row.label)}[/]" if row.depth == 0 else f"  └ {escape(row.label)}"
        table.add_row(name, *texts.values(), *(escape(row.differences.get(key, "")) for key in keys))
    return table


def short_names(keys: Sequence[str]) -> list[str]:
    """The keys without leading parts that are not needed to tell them apart: `a.b.lr`, `a.c.lr` -> `b.lr`, `c.lr`."""
    names = []
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts) - 1, -1, -1))
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
        names.append(next(alone, key))
    return names


@dataclass(frozen=True)
class Piece:
    """The part of a loss curve that one segment made: `hours` are NaN where the GPU-hours are not known."""

    schedule: str
    segment: str
    first_step: int
    steps: Any  # numpy arrays
    hours: Any
    values: Sequence[float]


def pieces(uri: str, rows: Sequence[Row], loss: str) -> list[Piece]:
    """A loss over the steps of each schedule, in which a segment's steps follow those of the segment before it."""
    import numpy

    found, schedule, offset = [], "", 0
    for row in rows:
        if row.depth == 0:
            schedule, offset = row.label, 0
        points = [point for point in read_history(uri, row.run.id, loss) if math.isfinite(point[1])]
        if points:
            steps = numpy.array([step for step, _ in points])
            used = read_history(uri, row.run.id, _HOURS) or [(0, math.nan)]
            known, at = [step for step, _ in used], [hour for _, hour in used]
            hours = numpy.interp(steps, known, at, left=math.nan, right=math.nan)
            found.append(Piece(schedule, row.label, offset, steps + offset, hours, [value for _, value in points]))
        offset += _steps(row.run) or 0
    return found


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential average over about a fiftieth of the points, without a start that is pulled towards zero."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth


def plot(uri: str, rows: Sequence[Row], path: Path | str) -> Path:
    """Draws each loss against steps (left) and GPU-hours (right), a colour a schedule, into a PNG at `path`.

    Faint lines are all points, strong ones their course; dotted lines are where a segment begins.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {loss: found for loss in LOSSES if (found := pieces(uri, rows, loss))} or {LOSSES[0]: []}
    schedules = list(dict.fromkeys(piece.schedule for found in drawn.values() for piece in found))
    figure = Figure(figsize=(12, 1.0 + 3.2 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(drawn), 2, squeeze=False, sharex="col", sharey="row")
    for number, (loss, found) in enumerate(drawn.items()):
        by_step, by_hours = grid[number]
        borders = {piece.first_step: piece.segment for piece in found if piece.first_step}
        for piece in found:
            colour = _COLOURS[schedules.index(piece.schedule) % len(_COLOURS)]
            for axes, x in ((by_step, piece.steps), (by_hours, piece.hours)):
                axes.plot(x, piece.values, color=colour, linewidth=0.7, alpha=0.25)
                axes.plot(x, _smooth(piece.values), color=colour, linewidth=1.8, label=piece.schedule)
        for step, segment in borders.items():
            by_step.axvline(step, color="#888888", linewidth=1, linestyle=":")
            if number == 0:
                top = by_step.get_xaxis_transform()
                by_step.text(step, 0.97, f" {segment}", transform=top, va="top", color="#666666", fontsize=9)
        if not any(math.isfinite(hour) for piece in found for hour in piece.hours):
            middle = by_hours.transAxes
            by_hours.text(0.5, 0.5, "no GPU-hours logged", ha="center", transform=middle, color="#888888")
        last = number == len(drawn) - 1
        course = [value for piece in found for value in _smooth(piece.values)]
        _finish_axes(by_step, "step of the schedule" if last else "", loss, course)
        _finish_axes(by_hours, "GPU-hours" if last else "", "", course)
    figure.align_ylabels(grid[:, 0])
    if schedules:
        lines = {line.get_label(): line for axes in grid[:, 0] for line in axes.get_lines()}
        figure.legend([lines[name] for name in schedules], schedules, loc="outside upper left", ncols=4, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
    return path


def _finish_axes(axes: Any, x_name: str, y_name: str, values: Sequence[float]) -> None:
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8883; }
th { border-bottom: 2px solid #8886; }
th:first-child, td:first-child, .text { text-align: left; }
tr.segment td:first-child { padding-left: 2rem; }
tr.schedule { font-weight: 600; }
.finished { color: #2a8a4a; } .failed { color: #c62f2f; } .running { color: #1f7fae; } .killed { color: #a87400; }
img { width: 100%; margin-top: 1.5rem; border-radius: 6px; }
"""


def write_page(rows: Sequence[Row], picture: Path | str, path: Path | str, title: str = "Runs") -> Path:
    """Writes an HTML page at `path` that holds the table and the picture, and needs nothing else."""
    keys = list(rows[0].differences) if rows else []
    heads = ["run", *(rows[0].values if rows else ()), *keys]
    lines = []
    for row in rows:
        cells = [f"<td>{html.escape(row.label)}</td>"]
        for name, value in row.values.items():
            kind = f' class="text {html.escape(value)}"' if name == "status" else ""
            cells.append(f"<td{kind}>{html.escape(value)}</td>")
        cells += [f'<td class="text">{html.escape(row.differences.get(key, ""))}</td>' for key in keys]
        lines.append(f'<tr class="{"segment" if row.depth else "schedule"}">{"".join(cells)}</tr>')
    image = base64.b64encode(Path(picture).read_bytes()).decode()
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{"".join(lines)}</tbody></table></div>\n'
        f'<img alt="Losses against steps and GPU-hours" src="data:image/png;base64,{image}">\n</body></html>\n',
        encoding="utf-8",
    )
    return path
