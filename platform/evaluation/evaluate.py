"""`domainshuttle evaluate`: a test set's clips are made, measured and reported; what is there is not made again.

An evaluation is a folder that needs nothing else: `cases.jsonl` with its pictures (the test set), `videos/`,
`rows.jsonl` (every value with its reason), `evaluation.yaml`, `columns.json`, `results.json` and `report/`. Running it
again with another model adds a column.
"""

import contextlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from domainshuttle.pipelines.endpoints.answers import Answers
from domainshuttle.pipelines.errors import counted
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.pipelines.storage.locks import locked
from domainshuttle.platform.config.loading import read_text
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.console import console, say
from domainshuttle.platform.evaluation.cases import CASES_NAME, EvaluationCase, read_case_file
from domainshuttle.platform.evaluation.choices import choices_of, judges_of, title_of
from domainshuttle.platform.evaluation.config import EvaluationConfig, load_evaluation
from domainshuttle.platform.evaluation.judges.pairs import PairJudge
from domainshuttle.platform.evaluation.metrics.edits import edit_answers
from domainshuttle.platform.evaluation.results import Results, summary
from domainshuttle.platform.evaluation.sensitivity import choose_column
from domainshuttle.platform.evaluation.sources import build_test_set, expected_counts
from domainshuttle.platform.evaluation.stages import say_terms
from domainshuttle.platform.evaluation.statistics import as_plain
from domainshuttle.platform.evaluation.store import ResultStore
from domainshuttle.platform.evaluation.videos import Clip, Column, VideoFolder, columns_of, read_manifest, strangers
from domainshuttle.platform.report.text import Prose, Records
from domainshuttle.platform.run.folder import Run

CONFIG_NAME, COLUMNS_NAME, RESULTS_NAME, REPORT_NAME = "evaluation.yaml", "columns.json", "results.json", "report"
TESTS_NAME = "sensitivity"
"""The folder of the rows of altered cases."""


def chosen_config(source: str | None, run: RunConfig | None, overrides: Sequence[str]) -> EvaluationConfig:
    """The configuration that is named; without a name that of a run's held-out corpus.

    Raises ConfigError where there is neither.
    """
    if source is not None and source.lower().endswith(".jsonl"):
        raise ConfigError(
            f"{source} has cases, and --cases takes the evaluation, whose sources such files are: write a YAML with "
            "a source of kind `cases` whose path it is (docs/evaluation.md)"
        )
    if source is not None:
        return load_evaluation(source, list(overrides))
    if run is None:
        raise ConfigError("which cases? Give --cases FILE.yaml, or --run RUN to take those that a run holds out")
    section = run.evaluation
    if section is None:
        raise ConfigError(
            f"run {run.name!r} has no `evaluation` section: name its held-out corpus there, or give --cases"
        )
    sampling = run.generation
    of_run = [
        f"name={run.name.lower()}",
        f"seed={run.seed}",
        f"sources.held-out.corpus={json.dumps(section.corpus)}",
        f"sources.held-out.samples={section.candidates * section.groups}",
        f"identity.candidates={section.candidates}",
        f"generation.steps={sampling.steps}",
        f"generation.guidance_high={sampling.guidance}",
        f"generation.reference_guidance={sampling.guidance}",
        f"generation.fps={sampling.fps}",
    ]
    return load_evaluation("demo", [*of_run, *overrides])


def run_evaluation(
    models: Sequence[str], config: EvaluationConfig, out: Path, run: Run | None = None, again: bool = False
) -> Results:
    """Makes and measures what is missing in the folder `out`, and writes its report; returns the results.

    With `run` they are also logged to it. `again`: what failed is tried once more. Raises ConfigError, DataError, and
    what a metric's models or an endpoint say is wrong with them, before clips are made.
    """
    out = out.absolute()  # an actor on another node has another working directory
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        before: list[EvaluationCase] = []
        with contextlib.suppress(ConfigError):  # none yet, or damaged: it is made now
            before = read_case_file(out / CASES_NAME)
        cases = build_test_set(
            config.sources, run.config if run else None, out, lambda text: console.print(Prose(text))
        )
        there = {case.id: case.digest for case in cases}
        if changed := sum(there.get(case.id) != case.digest for case in before):
            what = f"{changed} of the {counted(len(before), 'case')} that {out} had are others now, or gone"
            console.print(Prose(f"{what}: another test set may want another folder (--out)"))
        metrics = config.metrics.build()
        for metric in metrics:
            metric.check()
        say_terms(metrics)
        columns = columns_of(models, config, cases)
        choose_column([*read_columns(out), *columns], config.sensitivity)
        _say_cases(config, cases)
        for column in columns:
            read_manifest(column)
            if others := strangers(column, cases, config.repeats):
                are = f"{counted(len(others), 'video')} of no case, such as {others[0]}: a case's is called CASE.mp4"
                console.print(Prose(f"{column.name} has {are}"))
        write_bytes(out / CONFIG_NAME, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
        folder = VideoFolder(out / "videos")
        for number, column in enumerate(columns):
            if column.generated:
                made, how = folder.generate(column, cases, config, again)
                columns[number] = replace(column, how=how)
                if made:
                    say(f"Made {counted(made, 'clip')} of {column.name}")
        columns = remember_columns(out, columns)
        results = measure(out, config, cases, columns, again)
        publish(out, results, run)
    return results


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    with locked(out / ".lock") as held:
        if not held:
            raise ConfigError(f"another evaluation works in {out}: wait for it, or give another folder with --out")
        yield


def measure(
    out: Path, config: EvaluationConfig, cases: Sequence[EvaluationCase], columns: Sequence[Column], again: bool = False
) -> Results:
    """Computes the rows that are missing, and `again` those that failed; returns all."""
    from domainshuttle.platform.evaluation.scoring import score_missing

    folder, store = VideoFolder(out / "videos"), ResultStore(out)
    clips = [clip for column in columns for clip in folder.clips(column, cases, config)]
    if again:
        for kept in (out / "answers", edit_answers(out)):
            if kept.is_dir():
                Answers(kept).forget(("refused", "bad_answer"))
    count = score_missing(cases, clips, config.metrics, store, config.scoring, out, again)
    results = _results(out, config, cases, columns, clips, store)
    count += results.tests.measure(config.metrics, out, config.scoring, again)
    if results.pair_judge is not None:
        count += results.pair_judge.measure(cases, columns, clips, again)
    whole = len(store) + len(results.tests.altered) + (len(results.pair_judge.store) if results.pair_judge else 0)
    say(f"Measured {counted(count, 'value')}; {whole} are in {out}")
    return results


def read_results(out: Path) -> Results:
    """The results of a folder, as far as they are computed. Raises ConfigError for what is no evaluation's folder."""
    if not (out / CONFIG_NAME).is_file() or not (out / CASES_NAME).is_file():
        raise ConfigError(
            f"{out} is no folder of an evaluation: make one with domainshuttle evaluate MODEL --out "
            f"{shlex.quote(str(out))}"
        )
    out = out.absolute()
    config = load_evaluation(str(out / CONFIG_NAME))
    cases, columns = read_case_file(out / CASES_NAME), read_columns(out)
    folder = VideoFolder(out / "videos")
    clips = [clip for column in columns for clip in folder.clips(column, cases, config)]
    return _results(out, config, cases, columns, clips, ResultStore(out))


def _results(
    out: Path,
    config: EvaluationConfig,
    cases: Sequence[EvaluationCase],
    columns: Sequence[Column],
    clips: Sequence[Clip],
    store: ResultStore,
) -> Results:
    judge = PairJudge(config.pairs, out) if config.pairs is not None else None
    altered = ResultStore(out / TESTS_NAME)
    return Results(config, cases, columns, clips, config.metrics.build(), store, altered, judge)


def publish(out: Path, results: Results, run: Run | None = None) -> None:
    """Writes the figures and the report, prints the table, and logs to a run."""
    from domainshuttle.platform.evaluation import tracking
    from domainshuttle.platform.evaluation.identity import (
        IdentityResult,
        measure_identity,
        print_result,
        write_identities,
    )
    from domainshuttle.platform.evaluation.report import write_report

    choices, judges = ([asdict(one) for one in found] for found in (choices_of(results), judges_of(results)))
    content = summary(results) | as_plain({"choices": choices, "judges": judges})
    write_bytes(out / RESULTS_NAME, json.dumps(content, indent=1).encode())
    identities: dict[str, IdentityResult] = {}
    files: list[Path] = []
    if results.config.identity is not None:
        clips = {column.name: [c for (name, _), found in results.clips.items() if name == column.name for c in found]
                 for column in results.columns}  # fmt: skip
        candidates = results.config.identity.candidates
        for column in results.columns:
            if not (column.judged and column.generated):
                continue
            found = measure_identity(
                results.cases, clips, column.name, candidates, results.config.generation.fps or 8, out
            )
            if found is not None:
                identities[column.name], files = found
                print_result(column.name, identities[column.name])
            else:
                why = f"it needs the control `other`, and {candidates} cases (identity.candidates) with all their clips"
                console.print(Prose(f"The identity of {column.name} is not tested: {why}"))
    if identities:
        files = [write_identities(out, identities), *files]
    print_table(results)
    page = write_report(out / REPORT_NAME, results)
    console.print(Prose(f"Report: {page}"))
    if files:
        console.print(Prose(f"Grid: {' and '.join(map(str, files[1:]))}; table: {files[0]}"))
    if run is not None:
        tracking.log_results(run, out, results, identities, files)


def rate(out: Path, answers: Sequence[Path]) -> None:
    """Adds people's answers to an evaluation, and prints how much they and the metrics agree."""
    from domainshuttle.platform.evaluation.rating import agreement, of_now, read_answers

    given, results = read_answers(out, answers), read_results(out)
    ratings = of_now(given, results)
    if others := len(given) - len(ratings):
        console.print(Prose(f"Left out: {counted(others, 'answer')} to clips that were replaced since"))
    rows = [
        [one.question, one.metric or "people among themselves", str(one.pairs), *(
            "–" if value != value else f"{value:.2f}" for value in (one.alpha, one.agree, one.tau)
        )]
        for one in agreement(ratings, results)
    ]  # fmt: skip
    people = len({one.rater for one in ratings})
    fields = ("question", "with", "pairs", "alpha", "same order", "tau")
    console.print(
        Records(fields, rows, f"Agreement of {people} {'person' if people == 1 else 'people'}", fields[2:]),
        soft_wrap=True,
    )


def print_table(results: Results) -> None:
    """Prints the means with their intervals, all cases."""
    fields = ["model", *(title_of(metric) for metric in results.metrics)]
    rows = [
        [column.name, *(figure(results, metric.label, column.name) for metric in results.metrics)]
        for column in results.columns
    ]
    if rows:
        level = 100 * results.config.statistics.confidence
        console.print(
            Records(fields, rows, f"Means over cases, and their {level:g}% intervals", fields[1:]), soft_wrap=True
        )


def figure(results: Results, metric: str, column: str, stratum: str = "all") -> str:
    """A mean with its interval, and how many cases have none."""
    one = results.estimates.get((stratum, metric, column))
    if one is None or not one.cases:
        return "–"
    if (column, metric) in results.voids:
        return f"void ({one.cases})"
    interval = "" if one.low != one.low else f" [{one.low:.3f}, {one.high:.3f}]"
    missing = f" {one.missing} missing" if one.missing else ""
    return f"{one.mean:.3f}{interval}{missing}"


def _say_cases(config: EvaluationConfig, cases: Sequence[EvaluationCase]) -> None:
    counts = expected_counts(config.sources, cases)
    parts = ", ".join(f"{name.replace('_', ' ')} {there} of {whole}" for name, (there, whole) in counts.items())
    console.print(Prose(f"Test set {config.name}: {counted(len(cases), 'case')} ({parts})"))


def remember_columns(out: Path, columns: Sequence[Column]) -> list[Column]:
    """All columns of a folder: those that were there before keep their places."""
    before = {column.name: column for column in read_columns(out)}
    together = [*({**before, **{column.name: column for column in columns}}).values()]
    write_bytes(out / COLUMNS_NAME, json.dumps([asdict(column) for column in together], indent=1).encode())
    return together


def read_columns(out: Path) -> list[Column]:
    """The columns of a folder; none where there are none yet."""
    path = out / COLUMNS_NAME
    if not path.is_file():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(read_text(path))
        return [Column(**one) for one in found]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it and evaluate the models again") from error
