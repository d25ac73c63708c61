"""The results of an ablation: a table, a picture and a page, of the variants that are done."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from domainshuttle.platform.commands import compare, compare_page, curves
from domainshuttle.platform.commands.ablation import Plan, result_of
from domainshuttle.platform.commands.ablation_steps import Step, steps_of
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.console import console
from domainshuttle.platform.engine.model_size import model_size
from domainshuttle.platform.engine.trained_parameters import trained_of
from domainshuttle.platform.evaluation.evaluate import read_results
from domainshuttle.platform.evaluation.statistics import Values
from domainshuttle.platform.report.text import Prose, Records
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.tracking.queries import read_history


@dataclass(frozen=True)
class VariantResult:
    """A variant that is done."""

    name: str
    clips: int
    own: float
    """Share of clips that are closest to their own subject's reference."""
    other: float
    """The same, generated with another subject's reference."""
    chance: float
    loss: float
    """Of flow matching, mean over the last tenth of the last stage's logged points."""
    parameters: int
    trained: int
    """Parameters that any stage trains."""
    device_hours: float

    @property
    def error(self) -> float:
        """Standard error of `own`."""
        return math.sqrt(self.own * (1 - self.own) / self.clips)


def read_result(plan: Plan, name: str) -> VariantResult | None:
    """The result of a variant; None while it is not done."""
    found, config = result_of(plan, name), plan.variants[name]
    if found is None or found["config"] != config.digest():
        return None
    parameters, trained = count_parameters(config)
    run = Run(config)
    points = read_history(config.tracking_uri, (run.read_ids() or {})["segments"][run.segments()[-1].name], "loss/flow")
    last = [value for _, value in points if math.isfinite(value)]
    return VariantResult(
        name=name,
        clips=found["clips"],
        own=found["own"],
        other=found["other"],
        chance=found["chance"],
        loss=fmean(last[-max(1, len(last) // 10) :]) if last else math.nan,
        parameters=parameters,
        trained=trained,
        device_hours=Ledger(run.ledger_path).summary().used,
    )


def read_rows(plan: Plan) -> dict[str, list[VariantResult]]:
    """The results of each variant whose runs, one a seed, are all done."""
    found = {name: [read_result(plan, run) for run in runs] for name, runs in plan.rows.items()}
    return {name: [one for one in some if one] for name, some in found.items() if all(some)}


def pooled(name: str, results: list[VariantResult]) -> VariantResult:
    """One result of a variant's seeds: means of what each found; the device-hours of all."""
    return VariantResult(
        name, results[0].clips, fmean(one.own for one in results), fmean(one.other for one in results),
        results[0].chance, fmean(one.loss for one in results), results[0].parameters, results[0].trained,
        sum(one.device_hours for one in results),
    )  # fmt: skip


def read_steps(plan: Plan, names: list[str]) -> list[Step]:
    """What each of these variants has more than the one before it, by the evaluation's metrics and by how often a clip
    is closest to its own subject's reference."""
    return steps_of({name: {run: _measured(plan, run) for run in plan.rows[name]} for name in names})


def _measured(plan: Plan, run: str) -> dict[str, Values]:
    results, done = read_results(plan.folder / "evaluation" / run), result_of(plan, run) or {}
    hits = done.get("hits", {})
    cases = [case.id for case in results.cases]
    own = np.array([float(hits[case]) if case in hits else np.nan for case in cases])
    return {OWN: own} | {metric.label: results.values(run, metric.label) for metric in results.metrics}


OWN = "own reference closest"


def count_parameters(config: RunConfig) -> tuple[int, int]:
    """All parameters of a configuration's model, and those that any of its stages trains."""
    size = model_size(config.model)
    trained: dict[str, int] = {}
    for stage in config.stages:
        trained |= trained_of(size, stage.trained).trained
    return size.parameters(), sum(trained.values())


def report(plan: Plan) -> None:
    """Prints the table and writes `ablation.png`, `losses.png` and `ablation.html` into the ablation's folder."""
    rows = read_rows(plan)
    results = [pooled(name, some) for name, some in rows.items()]
    left = [name for name in plan.rows if name not in rows]
    if not results:
        console.print(Prose(f"No variant is done yet; left: {', '.join(left)}"))
        return
    fields, lines = _texts(results, next(iter(plan.variants.values())).cluster.hours)
    title = f"{plan.name}: {results[0].clips} clips of held-out subjects a variant"
    console.print(Records(fields, lines, title, numeric=fields[1:]))
    uri = next(iter(plan.variants.values())).tracking_uri
    steps = read_steps(plan, list(rows))
    step_fields, step_lines = _step_texts(steps)
    if steps:
        title = "Each row against the row before it"
        console.print(Records(step_fields, step_lines, title, numeric=step_fields[2:4]))
    done = [run for name in rows for run in plan.rows[name]]
    runs = compare.compare(uri, [plan.name], done)
    picture = draw(results, plan.folder / "ablation.png")
    losses = curves.plot(uri, runs, plan.folder / "losses.png")
    note = f"Chance is {results[0].chance:.1%}."
    if (seeds := len(next(iter(rows.values())))) > 1:
        note += f" Each row is the mean of {seeds} seeds."
    if plan.shared is not None:
        used = f"{Ledger(Run(plan.shared).ledger_path).summary().used:.3f} {plan.shared.cluster.hours}"
        note += f" All variants begin with the weights of the run {plan.shared.name!r} ({used})."
    console.print(Prose(note))
    page = compare_page.write_page(
        uri, runs, losses, plan.folder / "ablation.html", plan.name, "ablation.html",
        variant_fields=fields, variants=lines, note=note, picture=picture.read_bytes(),
        step_fields=step_fields, steps=step_lines,
    )  # fmt: skip
    console.print(Prose(f"Picture: {picture}; curves: {losses}; page: {page}"))
    if shown := compare.mlflow_page(uri, runs):
        console.print(f"MLflow's page of these runs: {shown}", markup=False)
    if left:
        console.print(Prose(f"Left: {', '.join(left)}. The same command without --only goes on with them."))


def _step_texts(steps: list[Step]) -> tuple[list[str], list[list[str]]]:
    fields = ["row", "metric", "difference", "by seed", "what can be said"]
    lines = [
        [
            f"{one.row} against {one.before}",
            one.metric.replace("_", " "),
            f"{one.comparison.difference.mean:+z.3f} "
            f"[{one.comparison.difference.low:+z.3f}, {one.comparison.difference.high:+z.3f}]",
            ", ".join(f"{seed:+z.3f}" for seed in one.by_seed),
            one.text,
        ]
        for one in steps
    ]
    return fields, lines


def _texts(results: list[VariantResult], hours: str) -> tuple[list[str], list[list[str]]]:
    fields = ["variant", "own subject", "other's reference", "flow loss", "parameters", "trained", hours]
    lines = [
        [
            result.name,
            f"{result.own:.1%} ± {result.error:.1%}",
            f"{result.other:.1%}",
            f"{result.loss:.4f}",
            f"{result.parameters:,}",
            f"{result.trained:,}",
            f"{result.device_hours:.3f}",
        ]
        for result in results
    ]
    return fields, lines


def draw(results: list[VariantResult], path: Path) -> Path:
    """Draws identity (with standard errors, the control and chance) and flow loss, a row a variant, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.45 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    identity, loss = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(results))
    own, other = curves.COLOURS[0], curves.COLOURS[1]
    identity.errorbar(
        [result.own for result in results], places, xerr=[result.error for result in results],
        fmt="o", color=own, capsize=3, label="with its own reference (± standard error)",
    )  # fmt: skip
    identity.plot(
        [result.other for result in results], places, "D", color=other, markerfacecolor="none",
        label="with another subject's reference",
    )  # fmt: skip
    identity.axvline(results[0].chance, color="#888888", linestyle=":", label="chance")
    identity.set_xlim(-0.02, 1.02)  # room for the marks at the ends
    identity.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    identity.set_xlabel("clips closest to their own subject")
    loss.plot([result.loss for result in results], places, "s", color=curves.COLOURS[2])
    loss.set_xlabel("flow loss, last tenth of the last stage")
    identity.set_yticks(places, [result.name for result in results])
    identity.set_ylim(len(results) - 0.5, -0.5)  # the first on top
    loss.ticklabel_format(axis="x", useOffset=False)
    loss.locator_params(axis="x", nbins=4)
    for axes in (identity, loss):
        _plain(axes)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    figure.savefig(path, dpi=120, facecolor="white")
    return path


def _plain(axes: Any) -> None:
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
