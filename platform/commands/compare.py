"""`domainshuttle compare`: the runs of one or more experiments side by side, as a table, a picture and a page.

The table is a tree, a schedule with its segments below it, and shows of the configuration only the keys in which the
schedules, and the segments of one name, differ. `curves` draws the losses, `compare_page` writes the page. All of it is
read through `records`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from domainshuttle.platform.tracking.queries import RunRecord, read_history, read_runs

HOURS = "gpu_hours/used"
_IDENTITY = "evaluation/identity_own"
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
    configs = fold_absent([configuration(record) for record in parents])
    keys = differing(configs)
    below = {parent.id: [record for record in records if record.parent == parent.id] for parent in parents}
    same = _differing_by_name([child for children in below.values() for child in children], keys)
    evaluated = any(_IDENTITY in record.metrics for children in below.values() for record in children)
    rows: list[Row] = []
    for parent, config in zip(parents, configs, strict=True):
        unique = titles.count((parent.experiment, parent.name)) == 1
        label = parent.name if unique else f"{parent.name} ({parent.id[:6]})"
        if len(experiments) > 1:
            label = f"{parent.experiment}: {label}"
        children = below[parent.id]
        used = [child.metrics.get(HOURS, 0.0) for child in children]
        total = parent.metrics.get(HOURS, max(used, default=0.0))
        steps = sum(last_step(record) or 0 for record in [parent, *children]) or None
        values = _values(uri, parent, steps, total, evaluated)
        rows.append(Row(parent, label, 0, values, {key: config.get(key, "") for key in keys}))
        before = 0.0
        for child, hours in zip(children, used, strict=True):
            # the ledger counts over the whole schedule: a segment's own hours are those since the segment before it
            values = _values(uri, child, last_step(child), hours - before if hours else 0.0, evaluated)
            own = configuration(child)
            rows.append(Row(child, child.name, 1, values, {key: own.get(key, "") for key in same[child.name]}))
            before = max(before, hours)
    return rows


def fold_absent(configs: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The configurations with one key, such as `stages.base`, for all keys of an entry that some do not have at all."""
    entries = [{entry for key in config if (entry := _entry(key))} for config in configs]
    absent = {entry for found in entries for entry in found if not all(entry in others for others in entries)}
    folded = []
    for config, found in zip(configs, entries, strict=True):
        kept = {key: value for key, value in config.items() if _entry(key) not in absent}
        for entry in absent & found:
            steps = config.get(f"{entry}.steps")
            kept[entry] = f"{steps} steps" if steps else "there"
        folded.append(kept)
    return folded


def _entry(key: str) -> str | None:
    """The stage, corpus or expert that a key belongs to."""
    parts = key.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[0] in ("stages", "corpora", "experts") else None


def _differing_by_name(segments: Sequence[RunRecord], known: Sequence[str]) -> dict[str, list[str]]:
    """For each name of a segment the params in which its runs differ, but for those that `known` has of the stage."""
    found = {}
    for name in {segment.name for segment in segments}:
        told = [key for key in known if key.startswith(f"stages.{name}.")]
        keys = differing([configuration(segment) for segment in segments if segment.name == name])
        found[name] = [key for key in keys if not any(long.endswith(f".{key}") for long in told)]
    return found


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


def last_step(record: RunRecord) -> int | None:
    """The last step that anything was logged at; system metrics count samples, not steps."""
    return max((step for key, step in record.steps.items() if not key.startswith("system/")), default=None)


def _values(uri: str, record: RunRecord, steps: int | None, hours: float, evaluated: bool) -> dict[str, str]:
    metrics = record.metrics
    losses = read_history(uri, record.id, "loss") if "loss" in metrics else []
    finite = [value for _, value in losses if math.isfinite(value)]
    identity = metrics.get(_IDENTITY)
    return {
        "status": record.status.lower(),
        "steps": "" if steps is None else f"{steps:,}",
        "loss": _number(metrics.get("loss")),
        "min": _number(min(finite, default=None)),
        "flow": _number(metrics.get("loss/flow")),
        "cross pair": _number(metrics.get("loss/cross_pair")),
        # the share of clips that show their own subject
        **({"identity": "" if identity is None else f"{identity:.1%}"} if evaluated else {}),
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
    """Prints the rows, then what differs and what failed; on a narrow console without the less important columns.

    What differs is columns of the same table where that fits, else a table of its own, else a line a run.
    """
    if not rows:
        console.print("There are no runs yet.")
        return
    columns, keys = list(rows[0].values), list(rows[0].differences)
    among_segments = any(row.differences for row in rows if row.depth)
    beside = keys if not among_segments and _fits(_table(rows, columns, keys), console) else []
    for name in _SPARE:
        if _fits(_table(rows, columns, beside), console):
            break
        columns.remove(name)
    console.print(_table(rows, columns, beside))
    if beside != keys or among_segments:
        labels, lines = differences(rows)
        table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for head in ("differs", *labels):
            table.add_column(escape(head), overflow="fold")
        for key, texts in lines:
            table.add_row(escape(key), *map(escape, texts))
        if _fits(table, console):
            console.print(table)
        else:
            for place, label in enumerate(labels):
                console.print(f"[bold]{escape(label)}[/]", escape(", ".join(f"{k} = {t[place]}" for k, t in lines)))
    for label, error in errors(rows):
        console.print(f"[red]{escape(label)}[/] failed: {escape(error)}")


def differences(rows: Sequence[Row], short: bool = True) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The schedules' labels, and for each key that differs its (short) name and its text in each schedule.

    Keys of segments, which have the segment's name before them, come after those of the configuration.
    """
    schedules = [row for row in rows if row.depth == 0]
    keys = list(schedules[0].differences) if schedules else []
    lines = [
        (name, [row.differences[key] or _ABSENT for row in schedules])
        for key, name in zip(keys, short_names(keys) if short else keys, strict=True)
    ]
    texts: dict[str, list[str]] = {}
    place = -1
    for row in rows:
        place += row.depth == 0
        for key, text in row.differences.items() if row.depth else ():
            texts.setdefault(f"{row.label}: {key}", [_ABSENT] * len(schedules))[place] = text or _ABSENT
    return [row.label for row in schedules], lines + sorted(texts.items())


_ABSENT = "–"


def errors(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Label and error of each run that failed and said why."""
    failed, schedule = [], ""
    for row in rows:
        schedule = row.label if row.depth == 0 else schedule
        if row.run.status == "FAILED" and (lines := row.run.tags.get("error", "").strip().splitlines()):
            # of a traceback the kind of failure and its cause; MLflow has the whole of it
            error = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1].strip()}"
            failed.append((row.label if row.depth == 0 else f"{schedule}, {row.label}", error))
    return failed


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
