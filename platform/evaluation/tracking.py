"""The results of an evaluation in MLflow: means with their bounds as metrics of the run, one table, and the report.

Nothing is appended and nothing is listed in a tag, as MLflow's `log_table` would: the table is a file of its own, which
replaces the one before.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.console import console
from domainshuttle.platform.evaluation.identity import IdentityResult
from domainshuttle.platform.evaluation.results import ALL, Results
from domainshuttle.platform.report.text import Prose
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.tracking.mlflow import RunIds, Tracker

TABLE_NAME = "table.json"


def log_results(
    run: Run, out: Path, results: Results, identities: Mapping[str, IdentityResult], files: Sequence[Path]
) -> None:
    """Logs to the run of the last stage; to none, with a word, where the run has no ids yet."""
    saved = run.read_ids()
    if saved is None:
        console.print(Prose(f"Nothing is logged: the run {run.config.name} has not begun, and is not in MLflow"))
        return
    last = run.segments()[-1]
    tracker = Tracker(RunIds.from_dict(saved, run.config.tracking_uri), run.spool)
    values = logged_values(results, identities)
    steps = last.stage.duration.planned_steps
    tracker.log(values, steps, last.name)
    run.note_scores(last.name, steps, {name: value for name, value in values.items() if value == value})
    # the schedule's run, which MLflow's charts show alone, has the means over all cases
    bounds = ("low", "high")
    means = {
        name: value for name, value in values.items() if name.count("/") == 1 and name.rpartition("_")[2] not in bounds
    }
    tracker.log(means, run.step_in_schedule(last, steps))
    write_table(out / TABLE_NAME, results)
    for path in (out / TABLE_NAME, *files):
        tracker.artifact(path.absolute(), "evaluation", last.name)
    tracker.artifact((out / "report").absolute(), "evaluation/report", last.name)


def logged_values(results: Results, identities: Mapping[str, IdentityResult]) -> dict[str, float]:
    """The figures by their names in MLflow: of several models with the model's, since nobody says which is the run's.
    What is void has none."""
    judged = [column.name for column in results.columns if column.judged]
    values: dict[str, float] = {}
    for (stratum, metric, column), one in results.estimates.items():
        if column not in judged or not one.cases or (column, metric) in results.voids:
            continue
        name = f"evaluation/{metric}" if stratum == ALL else f"evaluation/{stratum}/{metric}"
        name = name if len(judged) == 1 else f"{name}/{column}"
        values[name] = one.mean
        if one.low == one.low:
            values |= {f"{name}_low": one.low, f"{name}_high": one.high}
    for column, identity in identities.items():
        parts = {"own": identity.own, "other": identity.other, "chance": identity.chance, "target": identity.target}
        of = "" if len(judged) == 1 else f"/{column}"
        values |= {f"evaluation/identity_{name}{of}": value for name, value in parts.items() if value == value}
    return values


def write_table(path: Path, results: Results) -> None:
    """A row a case and column, in the form that MLflow shows as a table."""
    labels = [metric.label for metric in results.metrics]
    rows: list[list[object]] = []
    for case in results.cases:
        for column in results.columns:
            cells = [results.cell(column.name, label, case.id) for label in labels]
            values = [None if cell is None or cell.value != cell.value else round(cell.value, 6) for cell in cells]
            rows.append([case.id, case.split, column.name, *values])
    content = {"columns": ["case", "split", "model", *labels], "data": rows}
    write_bytes(path, json.dumps(content).encode())
