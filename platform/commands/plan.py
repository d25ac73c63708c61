"""What a run would do, said before it starts: stages, data, buckets, trained parameters."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.console import console
from domainshuttle.platform.driver.preflight import (
    missing_corpora,
    no_data,
    require_as_configured,
    selected_parameters,
)
from domainshuttle.platform.engine.trained_parameters import parameter_table
from domainshuttle.platform.run.folder import Run


def print_plan(config: RunConfig) -> None:
    """Prints the schedule as a table; the data columns are filled where the corpora are encoded."""
    from domainshuttle.platform.run.data import make_feed

    selections, missing = selected_parameters(config), missing_corpora(config)
    require_as_configured(config)
    least, most = config.cluster.least_workers, config.cluster.most_workers
    workers = str(least) if least == most else f"{least} to {most}"
    table = Table(title=f"Run {config.name}: {len(config.stages)} stages on {workers} workers")
    for column in ("stage", "steps", "batch", "data", "passes", "tokens a sample", "trained", "frozen", "loss"):
        table.add_column(column, justify="left" if column in ("stage", "data", "loss") else "right")
    run = Run(config)
    plans: dict[str, dict[str, Any]] = {}
    for segment in run.segments():
        stage = segment.stage
        selected = selections[segment.name]
        passes = tokens = "?"
        if not set(stage.mixture) & set(missing):
            described = make_feed(config, segment).plan().describe()
            passes = "by hours" if stage.endless else f"{stage.steps / described['steps_per_epoch']:.2f}"
            tokens = f"{described['mean_video_tokens']:.0f}"
            plans[segment.name] = described
        weight = stage.loss.cross_pair_weight
        table.add_row(
            segment.name,
            str(stage.steps) if stage.gpu_hours is None else f"{stage.gpu_hours:g} GPU-hours",
            str(stage.global_batch),
            stage.shown_mixture,
            passes,
            tokens,
            f"{selected.trained_count / 1e6:.2f} M",
            f"{selected.frozen_count / 1e6:.2f} M",
            "flow" + (f" + {weight:g} cross-pair ({stage.loss.cross_pair_target})" if weight else ""),
        )
    console.print(table)
    if plans:
        console.print(_bucket_table(config, plans))
    if message := no_data(config):
        console.print(f"No data yet: {message}", markup=False)
    console.print(f"Next: domainshuttle train; the run's folder will be {run.folder}")


def _bucket_table(config: RunConfig, plans: Mapping[str, dict[str, Any]]) -> Table:
    """What each segment's steps are made of: a row a bucket, with the tokens of a sample that shows all references."""
    table = Table(title="Buckets: of a step all samples are of one")
    for column in ("stage", "bucket", "samples", "of the steps", "video tokens", "with references", ""):
        table.add_column(column, justify="left" if column in ("stage", "bucket", "") else "right")
    for name, plan in plans.items():
        references, shown = Run(config).segment(name).stage.references, name
        for bucket, one in plan["buckets"].items():
            whole = one["video_tokens"] + references * one["reference_tokens"]
            repeats = "[yellow]fewer samples than a batch: repeats within it[/]" if one["repeats_within_batch"] else ""
            share = f"{one['share_of_steps']:.1%}"
            table.add_row(
                shown, bucket, f"{one['samples']:,}", share, f"{one['video_tokens']:,}", f"{whole:,}", repeats
            )
            shown = ""  # once
    return table


def print_parameters(config: RunConfig) -> None:
    """Prints which parameters each segment trains."""
    console.print(parameter_table(selected_parameters(config)))
