"""Losses against steps and against GPU-hours, drawn for the runs of a comparison."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from domainshuttle.platform.commands.compare import HOURS, Row, hours_name, trained_steps
from domainshuttle.platform.report.text import visible
from domainshuttle.platform.tracking.queries import read_history
from domainshuttle.platform.tracking.training_steps import HOURS_TAG, OWN_HOURS

LOSSES = ("loss", "loss/flow", "loss/cross_pair")
# the palette of Okabe and Ito, which colour-blind readers can tell apart; then the same as dashed lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Piece:
    """The part of a loss curve that one segment made: `hours` are NaN where the GPU-hours are not known."""

    schedule: str
    segment: str
    first_step: int
    steps: Any  # numpy arrays
    hours: Any
    values: Sequence[float]
    left_out: int
    """Points that are not finite, which no axis has."""


def pieces(uri: str, rows: Sequence[Row], loss: str) -> list[Piece]:
    """A loss over the steps of each schedule, in which a segment's steps follow those of the segment before it."""
    import numpy

    found, schedule, offset, spent = [], "", 0, 0.0
    for number, row in enumerate(rows):
        if row.depth == 0:
            schedule, offset, spent = row.label, 0, 0.0
            after = rows[number + 1 :]
            below = takewhile(lambda other: other.depth > 0, after)
            if any(trained_steps(other.run) for other in below):
                continue  # its own curve is that of its segments again
        logged = read_history(uri, row.run.id, loss)
        points = [point for point in logged if math.isfinite(point[1])]
        if points:
            steps = numpy.array([step for step, _ in points])
            owned = row.run.tags.get(HOURS_TAG) == OWN_HOURS
            hours = _hours(steps, read_history(uri, row.run.id, HOURS)) + (spent if owned else 0.0)
            values, left_out = [value for _, value in points], len(logged) - len(points)
            found.append(Piece(schedule, row.label, offset, steps + offset, hours, values, left_out))
        offset += trained_steps(row.run) or 0
        spent += row.run.metrics.get(HOURS, 0.0)
    return found


def _hours(steps: Any, used: Sequence[tuple[int, float]]) -> Any:
    """The GPU-hours at steps, between those at which the ledger knew them; NaN before the first.

    The ledger counts on every some seconds, so that of equal figures only the first is news; the last figure is taken
    to be reached with the last step. What the driver logs after the last step is no point of the curve.
    """
    import numpy

    used = [(step, hour) for step, hour in used if step <= steps[-1]]
    news = [(step, hour) for n, (step, hour) in enumerate(used) if n == 0 or hour > used[n - 1][1]]
    if not news:
        return numpy.full(len(steps), math.nan)
    if len(news) > 1:
        news[-1] = (used[-1][0], news[-1][1])
    known, at = zip(*news, strict=True)
    return numpy.interp(steps, known, at, left=math.nan)


_DASHES = ("-", "--", ":")


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
    from matplotlib.lines import Line2D

    drawn = {loss: found for loss in LOSSES if (found := pieces(uri, rows, loss))} or {LOSSES[0]: []}
    hours_text = hours_name([row.run for row in rows if row.depth == 0])
    schedules = list(dict.fromkeys(piece.schedule for found in drawn.values() for piece in found))
    looks: dict[str, Any] = {
        schedule: {"color": COLOURS[n % len(COLOURS)], "linestyle": _DASHES[n // len(COLOURS) % len(_DASHES)]}
        for n, schedule in enumerate(schedules)
    }
    names = [_in_lines(schedule, _LEGEND_CHARS) for schedule in schedules]
    widest = max((len(line) for name in names for line in name.split("\n")), default=1)
    columns = max(1, min(5, _LEGEND_CHARS // (widest + 6)))
    legend_lines = sum(
        max(name.count("\n") + 1 for name in names[n : n + columns]) for n in range(0, len(names), columns)
    )
    figure = Figure(figsize=(12, 1.0 + 3.2 * len(drawn) + 0.2 * max(0, legend_lines - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(drawn), 2, squeeze=False, sharex="col", sharey="row")
    for number, (loss, found) in enumerate(drawn.items()):
        by_step, by_hours = grid[number]
        borders = {piece.first_step: piece.segment for piece in found if piece.first_step}
        for piece in found:
            look = looks[piece.schedule]
            alone = "o" if len(piece.values) == 1 else ""  # a line of one point is none
            for axes, x in ((by_step, piece.steps), (by_hours, piece.hours)):
                axes.plot(x, piece.values, color=look["color"], linewidth=0.7, alpha=0.25)
                axes.plot(x, _smooth(piece.values), **look, linewidth=1.8, marker=alone, markersize=4)
        for step, segment in borders.items():
            by_step.axvline(step, color="#888888", linewidth=1, linestyle=":")
            if number == 0:
                top = by_step.get_xaxis_transform()
                name = by_step.text(step, 0.97, f" {_in_lines(segment, 30)}", transform=top, va="top", color="#666666",
                                    fontsize=9)  # fmt: skip
                name.set_parse_math(False)
        if left_out := sum(piece.left_out for piece in found):
            low = by_step.transAxes
            note = f"{left_out} points are not finite and not drawn"
            by_step.text(0.01, 0.02, note, transform=low, color="#888888", fontsize=9)
        if not any(math.isfinite(hour) for piece in found for hour in piece.hours):
            middle = by_hours.transAxes
            by_hours.text(0.5, 0.5, f"no {hours_text} logged", ha="center", transform=middle, color="#888888")
        last = number == len(drawn) - 1
        course = [value for piece in found for value in _smooth(piece.values)]
        by_step.xaxis.get_major_locator().set_params(integer=True)
        _finish_axes(by_step, "step of the schedule" if last else "", loss, course)
        _finish_axes(by_hours, hours_text if last else "", "", course)
    figure.align_ylabels(grid[:, 0])
    if schedules:
        handles = [Line2D([], [], linewidth=1.8, **looks[schedule]) for schedule in schedules]
        unnamed = [" "] * len(handles)
        legend = figure.legend(handles, unnamed, loc="outside upper left", ncols=columns, frameon=False)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)  # as a label, one that begins with an underscore would be left out
            text.set_parse_math(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # characters that the font does not have are drawn as boxes; the table has the whole names
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=120, facecolor="white")
    return path


_LEGEND_CHARS = 110
"""Characters that a line of the legend has room for."""


def _in_lines(name: str, width: int) -> str:
    """A name as it is drawn: whole, in as many lines as it needs."""
    return "\n".join(textwrap.wrap(visible(name), width, break_on_hyphens=False)) or name


def _finish_axes(axes: Any, x_name: str, y_name: str, values: Sequence[float]) -> None:
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
