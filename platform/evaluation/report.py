"""The report of an evaluation: a static folder that opens from disk, with videos side by side and all figures.

`index.html` needs only what lies beside it: videos and pictures are links to those of the evaluation, or copies where
links can't be made. A browser loads a video when it is played, and a poster when it is scrolled to.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any
from urllib.parse import quote

from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.media.decode import encode_jpeg, opened_clip, shown_frames
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.platform.evaluation.cases import EvaluationCase
from domainshuttle.platform.evaluation.choices import choices_of, judges_of, title_of
from domainshuttle.platform.evaluation.config import EvaluationConfig
from domainshuttle.platform.evaluation.evidence import edited_pictures, found_subjects
from domainshuttle.platform.evaluation.identity import read_identities
from domainshuttle.platform.evaluation.latency import latency_rows
from domainshuttle.platform.evaluation.metrics.metric import Metric
from domainshuttle.platform.evaluation.published import published_table
from domainshuttle.platform.evaluation.rating import agreement, of_now, preferences, read_answers
from domainshuttle.platform.evaluation.results import ALL, Results
from domainshuttle.platform.evaluation.sources import expected_counts
from domainshuttle.platform.evaluation.statistics import Estimate, as_plain
from domainshuttle.platform.evaluation.videos import Clip, Column, read_manifest
from domainshuttle.platform.report import page

_WIDTH, _ROW, _NAMES = 450, 26, 165
"""Of a plot, of a model in it, and of the models' names, in pixels."""


def write_report(folder: Path, results: Results) -> Path:
    """Writes the report into `folder`; returns its page. Posters and links that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [column.name for column in results.columns]
    answers = read_answers(folder.parent)
    ratings = of_now(answers, results)
    return page.write_page(
        folder / "index.html",
        "evaluation.html",
        title=f"Evaluation: {results.config.name}",
        counts=expected_counts(results.config.sources, results.cases),
        columns=results.columns,
        labels={column.name: label_of(column) for column in results.columns},
        identity=_identities(results, folder.parent),
        metrics=[{"label": one.label, "title": title_of(one), "source": one.source} for one in results.metrics],
        strata=[_stratum(results, stratum) for stratum in results.strata],
        confidence=results.config.statistics.confidence,
        published=published_table([metric.label for metric in results.metrics]),
        verdicts=_verdicts(results),
        tests=_tests(results),
        pairs=[asdict(one) for one in results.pairs],
        tested=results.tests.column.name if results.tests.column else "",
        voids=[(column, metric, why) for (column, metric), why in results.voids.items()],
        latency=latency_rows(results),
        settings=_settings(results),
        choices=choices_of(results),
        judges=judges_of(results),
        ratings=agreement(ratings, results),
        preferences=preferences(ratings, results),
        raters=len({one.rater for one in ratings}),
        outdated=len(answers) - len(ratings),
        decisions=[(title_of(one), json.dumps(_decisions(one), indent=1, default=str)) for one in results.metrics],
        open_points=open_points(results),
        failures=results.failures()[:_MOST_FAILURES],
        failure_count=len(results.failures()),
        cases=[_case(folder, results, case, columns) for case in results.cases],
        data=_data(results, columns),
    )


def label_of(column: Column) -> str:
    """A column's name for people: what a control is made with."""
    with_what = {"other": "other references", "none": "no references"}
    return f"{column.of}, {with_what[column.control]}" if column.control else column.name


def _identities(results: Results, out: Path) -> list[dict[str, Any]]:
    """The identity test of each model that it was made of."""
    found = read_identities(out) if results.config.identity is not None else {}
    return [{"label": column.name, **found[column.name]} for column in results.columns if column.name in found]


def _decisions(metric: Metric[Any]) -> dict[str, Any]:
    """What decides a metric's values, and the hub's commits of its models where they are known."""
    commits = metric.commits()
    return {**metric.decisions(), **({"hub commits": dict(commits)} if commits else {})}


def _tests(results: Results) -> list[dict[str, Any]]:
    """The sensitivity tests, those that failed first."""
    titles = {metric.label: title_of(metric) for metric in results.metrics}
    order = {"failed": 0, "passed": 1, "undecided": 2}
    return [
        {**asdict(one), "title": titles[one.metric], "trial": one.trial.replace("_", " ")}
        for one in sorted(results.sensitivity, key=lambda one: order[one.state])
    ]


_MOST_FAILURES = 500
"""Failures that the page lists; results.json has all."""


def _stratum(results: Results, stratum: str) -> dict[str, Any]:
    """The table and the plots of a stratum."""
    metrics = [metric for metric in results.metrics if results.cases_of(metric.label, stratum)]
    return {
        "name": "All cases" if stratum == ALL else stratum.replace("_", " ").capitalize(),
        "metrics": [title_of(metric) for metric in metrics],
        "rows": [
            {
                "column": column,
                "figures": [_figure(results, stratum, metric.label, column.name) for metric in metrics],
            }
            for column in results.columns
        ],
        "plots": [
            {
                "title": title_of(metric),
                "cases": len(results.cases_of(metric.label, stratum)),
                **_plot(
                    [(column.name, results.estimates[stratum, metric.label, column.name]) for column in results.columns]
                ),
            }
            for metric in metrics
        ],
    }


def _figure(results: Results, stratum: str, metric: str, column: str) -> dict[str, Any]:
    one = results.estimates[stratum, metric, column]
    many = one.share_missing > results.config.statistics.most_missing
    return {
        "mean": None if one.mean != one.mean else one.mean,
        "low": None if one.low != one.low else one.low,
        "high": None if one.high != one.high else one.high,
        "missing": one.missing,
        "bounds": (one.worst, one.best) if many and one.worst == one.worst else None,
        "beside": results.beside(column, metric, stratum),
    }


def _plot(rows: Sequence[tuple[str, Estimate]]) -> dict[str, Any]:
    """Means and intervals as places on a line, a row a column."""
    known = [value for _, one in rows for value in (one.low, one.high, one.mean) if value == value]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = (high - low) * 0.08 or 0.05
    low, high = low - margin, high + margin

    def place(value: float) -> float | None:
        return None if value != value else round(_NAMES + (value - low) / (high - low) * (_WIDTH - _NAMES - 20), 1)

    marks = [
        {
            "name": name, "y": 16 + number * _ROW, "x": place(one.mean), "low": place(one.low), "high": place(one.high),
            "text": f"{name}: {one.mean:.4f}",
        }
        for number, (name, one) in enumerate(rows)
    ]  # fmt: skip
    ticks = [{"x": place(value), "text": f"{value:.3g}"} for value in (low + margin, high - margin)]
    return {"width": _WIDTH, "height": len(rows) * _ROW + 28, "marks": marks, "ticks": ticks}


def _verdicts(results: Results) -> list[dict[str, Any]]:
    """What is said of each pair, and with what right."""
    titles = {metric.label: title_of(metric) for metric in results.metrics}
    shown = {column.name: label_of(column) for column in results.columns}
    found = []
    for (stratum, left, right), by_metric in results.comparisons.items():
        for metric, one in by_metric.items():
            void = [shown[name] for name in (left, right) if (name, metric) in results.voids]
            said = {1: f"{shown[left]} is better", -1: f"{shown[right]} is better", 0: "no difference shown"}
            found.append(
                {
                    "stratum": stratum.replace("_", " "), "left": left, "right": right, "metric": titles[metric],
                    "difference": one.difference.mean, "low": one.difference.low, "high": one.difference.high,
                    "cases": one.difference.cases, "missing": one.difference.missing, "p": one.adjusted,
                    "text": f"void: {' and '.join(void)}" if void else said[one.verdict],
                }
            )  # fmt: skip
    return found


def _settings(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """How each model's clips were made, as the JSON beside them says."""
    found = []
    for column in results.columns:
        clips = [clip for (name, _), some in results.clips.items() if name == column.name for clip in some]
        if not column.generated:
            headers = Counter(clip.made["header"] for clip in clips if clip.sha256 and "header" in clip.made)
            told = [(str(name), str(value)) for name, value in read_manifest(column).items()]
            found.append((column.name, [*told, *((header, f"{count} clips") for header, count in headers.items())]))
            continue
        made = next((clip.made for clip in clips if clip.made.get("settings")), None)
        if made is None:
            continue
        settings = {name: value for name, value in made["settings"].items() if name != "negative_prompt"}
        lines = [("pipeline", str(made.get("pipeline"))), ("model", str(made.get("model")))]
        lines += [(name.replace("_", " "), "none" if value is None else str(value)) for name, value in settings.items()]
        if made.get("control"):
            lines.append(("references", f"control: {made['control']}"))
        found.append((column.name, lines))
    return found


def open_points(results: Results) -> list[tuple[str, str]]:
    """What the paper leaves open, and what was chosen here; of videos that were brought only how they are measured."""
    config = results.config
    made = _how_made(config) if any(column.generated for column in results.columns) else []
    return [
        ("Splits behind AES, MS and GMEScore", "every metric has the cases that its choice of cases names, below"),
        *made,
        ("The metrics' own choices", "frames, models, rules for missing subjects, prompts: listed with each, below"),
        *[("Note", note) for note in config.notes],
    ]


def _how_made(config: EvaluationConfig) -> list[tuple[str, str]]:
    high, low = config.generation.guidance_high, config.generation.guidance_low
    guidance = "one value for both experts" if low is None else f"high noise {high}, low noise {low}"
    return [
        (
            "Guidance by expert",
            f"{guidance}. The paper says 4 at high and 3 at low noise; the released code, given its default (4, 3), "
            "applies 3 and 4",
        ),
        (
            "Seeds and clips a case",
            f"run seed {config.seed}, {counted(config.repeats, 'clip')} a case; not stated by the paper",
        ),
        ("Rate and compression", "the decoded MP4 is measured, at the rate and CRF below; not stated by the paper"),
    ]


def _case(folder: Path, results: Results, case: EvaluationCase, columns: Sequence[str]) -> dict[str, Any]:
    """What the page shows of a case."""
    videos = []
    for one in results.columns:
        clips = results.clips.get((one.name, case.id), [])
        videos += [_video(folder, clip, label_of(one), len(clips) > 1) for clip in clips]
    cells = [
        (column, cell)
        for column in columns
        for metric in results.metrics
        if (cell := results.cell(column, metric.label, case.id)) is not None
    ]
    scores = [score for _, cell in cells for score in cell.scores]
    found: dict[str, str] = {}
    for column, cell in cells:
        clips = results.clips.get((column, case.id), [])
        if clips and cell.scores and not found.get(column):
            found[column] = found_subjects(folder, clips[0], cell.scores[0])
    return {
        "id": case.id,
        "split": case.split.replace("_", " "),
        "prompt": case.prompt,
        "source": case.source,
        "domains": case.domains,
        "references": [
            {
                "src": _linked(folder, one.path, Path("pictures") / one.path.name),
                "label": one.label or f"subject {one.subject}",
                "edit": one.edit_prompt,
            }
            for one in case.references
        ],
        "videos": videos,
        "edits": edited_pictures(folder.parent, folder, scores),
        "found": [(label, name) for label, name in found.items() if name],
        "details": _write_details(folder, results, case),
        "scores": [
            {
                "title": title_of(metric),
                "values": [_cell(results, column, metric.label, case.id) for column in columns],
            }
            for metric in results.metrics
            if results.cell(columns[0], metric.label, case.id) is not None
        ] if columns else [],
    }  # fmt: skip


def _cell(results: Results, column: str, metric: str, case: str) -> dict[str, Any]:
    """A value of a case as the page shows it: there are tens of thousands."""
    cell = results.cell(column, metric, case)
    if cell is None:
        return {"text": None, "reason": ""}
    return {"text": None if isnan(cell.value) else f"{cell.value:.3f}", "reason": cell.reason}


def _write_details(folder: Path, results: Results, case: EvaluationCase) -> str:
    """Writes what the values of a case can be checked with into a file of its own, which the page loads when somebody
    wants to see it: of 220 cases of 10 models they are tens of megabytes. Returns its name; empty where there is
    nothing."""
    found = []
    for metric in results.metrics:
        for column in results.columns:
            cell = results.cell(column.name, metric.label, case.id)
            details = [one.details for one in cell.scores if one.details] if cell is not None else []
            if details:
                text = json.dumps(details[0] if len(details) == 1 else details)
                found.append([f"{title_of(metric)}, {label_of(column)}", text])
    if not found:
        return ""
    name = f"details/{case.id}.js"
    content = f"showDetails({json.dumps(case.id)}, {json.dumps(found)});\n"
    if not (folder / name).is_file() or (folder / name).read_text() != content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / name, sync=False) as aside:
            aside.write_text(content)
    return name


def _video(folder: Path, clip: Clip, label: str, several: bool) -> dict[str, Any]:
    label = f"{label}, clip {clip.repeat + 1}" if several else label
    if clip.failure:
        return {"column": clip.column, "label": label, "failure": clip.failure, "src": "", "poster": ""}
    name = f"{clip.case}{f'.r{clip.repeat}' if clip.repeat else ''}"
    src = _linked(folder, clip.path, Path("videos") / clip.column / f"{name}{clip.path.suffix}")
    poster = Path("posters") / clip.column / f"{name}-{clip.sha256[:12]}.jpg"
    try:
        if not (folder / poster).exists():
            _write_poster(clip.path, folder / poster)
    except DataError as error:
        return {"column": clip.column, "label": label, "failure": str(error), "src": "", "poster": ""}
    return {"column": clip.column, "label": label, "failure": "", "src": src, "poster": str(poster)}


def _write_poster(video: Path, path: Path) -> None:
    """The first frame. Raises DataError."""
    with opened_clip(video.read_bytes(), str(video)) as clip:
        frame = next(shown_frames(clip), None)
    if frame is None:
        raise DataError(f"{video}: no frame could be decoded")
    with atomic_file(path, sync=False) as aside:
        aside.write_bytes(encode_jpeg(frame, 85))


def _linked(folder: Path, source: Path, name: Path) -> str:
    """Puts a file into the folder; returns the link to it, which holds for an ending such as `.png?x` too."""
    there, link = folder / name, quote(str(name))
    there.parent.mkdir(parents=True, exist_ok=True)
    if there.exists() and os.path.samestat(there.stat(), source.stat()):
        return link
    there.unlink(missing_ok=True)
    try:
        os.link(source, there)
    except OSError:  # another file system, or one without links
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(source, there)
    return link


def _data(results: Results, columns: Sequence[str]) -> Any:
    """Values for sorting: by metric and column, one a case; None where there is none."""
    return as_plain(
        {
            title_of(metric): {
                column: [
                    None if (cell := results.cell(column, metric.label, case.id)) is None else cell.value
                    for case in results.cases
                ]
                for column in columns
            }
            for metric in results.metrics
        }
    )
