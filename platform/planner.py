"""What a run would do, said before it starts: stages, data, buckets, trained parameters."""

from rich.table import Table

from domainshuttle.pipelines.sample import DataError
from domainshuttle.platform.config import RunConfig
from domainshuttle.platform.console import console


def print_plan(config: RunConfig) -> None:
    """Prints the schedule as a table; the data columns are filled where the corpora are encoded."""
    from domainshuttle.platform.build import build_model
    from domainshuttle.platform.engine import select_trained
    from domainshuttle.platform.schedule import Run
    from domainshuttle.platform.train import make_feed

    table = Table(title=f"Run {config.name}: {len(config.stages)} stages on {config.cluster.workers} workers")
    for column in ("stage", "steps", "batch", "data", "passes", "tokens a sample", "trained", "frozen", "loss"):
        table.add_column(column, justify="left" if column in ("stage", "data", "loss") else "right")
    run = Run(config)
    for segment in run.segments():
        stage = segment.stage
        model = build_model(config.model, config.model.base, segment.seed)
        selected = select_trained(model, stage.trained)
        try:
            described = make_feed(config, segment).plan().describe()
            passes = f"{stage.steps / described['steps_per_epoch']:.2f}"
            tokens = f"{described['mean_video_tokens']:.0f}"
        except DataError:
            passes = tokens = "not encoded"
        weight = stage.loss.cross_pair_weight
        table.add_row(
            stage.name,
            str(stage.steps),
            str(stage.global_batch),
            ", ".join(f"{name} {share:g}" for name, share in stage.mixture.items()),
            passes,
            tokens,
            f"{selected.trained_count / 1e6:.2f} M",
            f"{selected.frozen_count / 1e6:.2f} M",
            "flow" + (f" + {weight:g} cross-pair ({stage.loss.cross_pair_target})" if weight else ""),
        )
    console.print(table)
    console.print(f"Next: domainshuttle train; the run's folder will be {run.folder}")
