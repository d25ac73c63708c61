"""`domainshuttle compare`: the runs of one or more experiments side by side, as text, a picture and a page.

The records are a tree, a schedule with its segments below it, and show of the configuration only the keys in which the
schedules, and the segments of one name, differ. `curves` draws the losses, `compare_page` writes the page. All of it is
read through `tracking.queries`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from domainshuttle.platform.config.schema import absolute_uri
from domainshuttle.platform.report.text import Prose, Records, headline
from domainshuttle.platform.tracking.mlflow import page_of_runs
from domainshuttle.platform.tracking.queries import RunRecord, UnknownRecordError, read_history, read_runs
from domainshuttle.platform.tracking.training_steps import HOURS_TAG, OWN_HOURS, last_training_step

HOURS = "gpu_hours/used"
_IDENTITY = "evaluation/identity_own"
_STATUS_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "killed": "yellow"}


@dataclass(frozen=True)
class Row:
    """A run of the comparison: texts by field and by configuration key."""

    run: RunRecord
    label: str
    depth: int
    """0: a schedule; 1: one of its segments; more: a run below another, which is not of our making."""
    values: dict[str, str]
    differences: dict[str, str]


def compare(uri: str, experiments: Sequence[str], runs: Sequence[str] = ()) -> list[Row]:
    """The rows: schedules, oldest first, each with its segments after it.

    `runs` chooses schedules by their name or the beginning of their id; without it all are there. Raises
    ConnectionError when the server does not answer, LookupError for an experiment or a run that is not there.
    """
    records = read_runs(uri, experiments)
    trees = _trees(records)
    for wanted in runs:
        if not any(_is(tree[0].run, wanted) for tree in trees):
            names = ", ".join(sorted({tree[0].run.name for tree in trees}))
            raise UnknownRecordError(f"no run {wanted!r} in {', '.join(experiments)}; there are: {names}")
    if runs:
        trees = [tree for tree in trees if any(_is(tree[0].run, wanted) for wanted in runs)]
    titles = Counter((tree[0].run.experiment, tree[0].run.name) for tree in trees)
    configs = fold_absent([configuration(tree[0].run) for tree in trees])
    keys = differing(configs)
    same = _differing_by_name([node.run for tree in trees for node in tree[1:]], keys)
    evaluated = any(_IDENTITY in record.metrics for record in records)
    judged = sorted({name for record in records for name in judged_metrics(record)})
    hours_field = hours_name([tree[0].run for tree in trees])
    rows: list[Row] = []
    for tree, config in zip(trees, configs, strict=True):
        parent, below = tree[0].run, tree[1:]
        label = _label(parent, titles[parent.experiment, parent.name] == 1)
        if len(experiments) > 1:
            label = f"{parent.experiment}: {label}"
        used = [node.run.metrics.get(HOURS, 0.0) for node in below]
        owned = [node.run.tags.get(HOURS_TAG) == OWN_HOURS for node in below]
        total = parent.metrics.get(HOURS, sum(used) if all(owned) else max(used, default=0.0))
        # the schedule's own curve has the steps of its segments again
        steps = sum(trained_steps(node.run) or 0 for node in below) or trained_steps(parent)
        values = _values(uri, parent, steps, total, evaluated, hours_field, judged)
        rows.append(Row(parent, label, 0, values, {key: config.get(key, "") for key in keys}))
        before, siblings = 0.0, Counter(node.run.name for node in below)
        for node, hours, own_hours in zip(below, used, owned, strict=True):
            child = node.run
            # where they count over the whole schedule, its own hours are those since the segment before it
            spent = hours if own_hours else max(0.0, hours - before)
            values = _values(uri, child, trained_steps(child), spent, evaluated, hours_field, judged)
            own = configuration(child)
            label = _label(child, siblings[child.name] == 1)
            rows.append(Row(child, label, node.depth, values, {key: own.get(key, "") for key in same[child.name]}))
            before = before + hours if own_hours else max(before, hours)
    return rows


def mlflow_page(uri: str, rows: Sequence[Row]) -> str | None:
    """Where MLflow shows the schedules of a comparison; None for a store that has no pages here, or without rows."""
    tops = {row.run.id: row.run.experiment_id for row in rows if row.depth == 0}
    return page_of_runs(absolute_uri(uri), tops) if tops else None


def hours_name(runs: Sequence[RunRecord]) -> str:
    """What the hours are of: GPUs, unless a run had none; its devices are then its workers."""
    configs = [configuration(run) for run in runs]
    without = any(config.get("cluster.gpus_per_worker") in ("0", "0.0") for config in configs)
    return "device-hours" if without else "GPU-hours"


@dataclass(frozen=True)
class _Node:
    """A run and how many runs are above it."""

    run: RunRecord
    depth: int


def _trees(records: Sequence[RunRecord]) -> list[list[_Node]]:
    """Each run without a parent among them, oldest first, with all that is below it, however deep."""
    children: dict[str | None, list[RunRecord]] = {}
    ids = {record.id for record in records}
    for record in records:
        children.setdefault(record.parent if record.parent in ids else None, []).append(record)
    placed: set[str] = set()

    def tree(run: RunRecord, depth: int) -> Iterator[_Node]:
        placed.add(run.id)
        yield _Node(run, depth)
        for child in children.get(run.id, []):
            if child.id not in placed:
                yield from tree(child, depth + 1)

    trees = [list(tree(run, 0)) for run in children.get(None, [])]
    # runs that name each other as parents are below nothing
    return trees + [list(tree(record, 0)) for record in records if record.id not in placed]


def _label(record: RunRecord, unique: bool) -> str:
    """A run's name, with the beginning of its id where the name is not enough."""
    return record.name if unique and record.name.strip() else f"{record.name} ({record.id[:6]})".lstrip()


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
        known_of_stage = [key for key in known if key.startswith(f"stages.{name}.")]
        keys = differing([configuration(segment) for segment in segments if segment.name == name])
        found[name] = [key for key in keys if not any(long.endswith(f".{key}") for long in known_of_stage)]
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


def trained_steps(record: RunRecord) -> int | None:
    """How many steps a run has trained, as far as they are logged; None where it is no training."""
    return last_training_step(record.steps)


def _values(
    uri: str,
    record: RunRecord,
    steps: int | None,
    hours: float,
    evaluated: bool,
    hours_field: str,
    judged: Sequence[str],
) -> dict[str, str]:
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
        **{name.replace("_", " "): _interval(metrics, f"evaluation/{name}") for name in judged},
        "samples/s": _number(metrics.get("samples/s")),
        hours_field: _number(hours or None),
        "duration": _duration(max(0.0, (record.end or time.time()) - record.start)),
    }


def judged_metrics(record: RunRecord) -> list[str]:
    """The metrics of all cases that an evaluation logged to a run, with their bounds."""
    names = [name.removeprefix("evaluation/") for name in record.metrics if name.startswith("evaluation/")]
    return [name for name in names if f"evaluation/{name}_low" in record.metrics and "/" not in name]


def _interval(metrics: Mapping[str, float], name: str) -> str:
    """A mean with its bounds."""
    if name not in metrics:
        return ""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{metrics[name]:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m {rest:02d}s"


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Prints the runs, then the keys in which they differ with the value of each run, then what failed."""
    if not rows:
        console.print("There are no runs yet.")
        return
    fields = ("run", *rows[0].values)
    lines = [[f"{'  ' * row.depth}{'└ ' if row.depth else ''}{row.label}", *row.values.values()] for row in rows]
    numeric = [name for name in fields if name not in ("run", "status")]
    console.print(Records(fields, lines, "", numeric, _STATUS_STYLES), soft_wrap=True)
    labels, different = differences(rows)
    if different:
        texts = [[key, *values] for key, values in different]
        console.print(Records(("key", *labels), texts, "What differs"), soft_wrap=True)
    for label, error in errors(rows):
        console.print(Prose(f"{label} failed: {error}", style="red"), soft_wrap=True)


def differences(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The schedules' labels, and for each key that differs its text in each schedule.

    Keys of segments, which have the segment's name before them, come after those of the configuration.
    """
    schedules = [row for row in rows if row.depth == 0]
    keys = list(schedules[0].differences) if schedules else []
    lines = [(key, [row.differences[key] or _ABSENT for row in schedules]) for key in keys]
    texts: dict[str, list[str]] = {}
    column = -1
    for row in rows:
        column += row.depth == 0
        for key, text in row.differences.items() if row.depth else ():
            texts.setdefault(f"{row.label}: {key}", [_ABSENT] * len(schedules))[column] = text or _ABSENT
    return [row.label for row in schedules], lines + sorted(texts.items())


_ABSENT = "–"


def errors(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Label and error of each run that failed and has a tag with its error."""
    failed, schedule = [], ""
    for row in rows:
        schedule = row.label if row.depth == 0 else schedule
        if row.run.status == "FAILED" and (error := row.run.tags.get("error", "").strip()):
            failed.append((row.label if row.depth == 0 else f"{schedule}, {row.label}", headline(error)))
    return failed
