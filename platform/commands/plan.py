"""What a run would do, printed before it starts: stages, data, buckets, trained parameters."""

from collections.abc import Mapping
from typing import Any

from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.pipelines.encoding.throughput import Throughput
from domainshuttle.pipelines.errors import counted
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.plan.step_plan import StepPlan
from domainshuttle.pipelines.storage.files import exists
from domainshuttle.platform.commands.prediction import print_prediction
from domainshuttle.platform.config.loading import load_cluster
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.console import console
from domainshuttle.platform.driver.preflight import (
    missing_corpora,
    no_data,
    require_as_configured,
    require_schedule,
    selected_parameters,
)
from domainshuttle.platform.engine.trained_parameters import parameter_table
from domainshuttle.platform.report.text import Prose, Records
from domainshuttle.platform.run.folder import Run


def print_plan(config: RunConfig, samples: int | None = None, cluster: ClusterSpec | None = None) -> None:
    """Prints the schedule, a record a segment; data, passes and tokens are known where the corpora are encoded. Then
    what it takes on a cluster (None: an assumed one of H100, where workers have GPUs), and what encoding `samples`
    would take (None: all raw ones), a record a corpus of which some are encoded."""
    from domainshuttle.platform.run.data import make_feed

    require_schedule(config)
    selections, missing = selected_parameters(config), missing_corpora(config)
    require_as_configured(config)
    run, rows = Run(config), []
    plans: dict[str, dict[str, Any]] = {}
    steps: dict[str, StepPlan] = {}
    for segment in run.segments():
        stage = segment.stage
        selected = selections[segment.name]
        passes = tokens = "unknown"
        if not set(stage.mixture) & set(missing):
            steps[segment.name] = make_feed(config, segment).plan()
            plan = plans[segment.name] = steps[segment.name].describe()
            passes = (
                "by hours"
                if stage.duration.steps is None
                else f"{stage.duration.planned_steps / plan['steps_per_epoch']:.2f}"
            )
            tokens = f"{plan['mean_video_tokens']:.0f}"
        weight = stage.loss.cross_pair_weight
        rows.append(
            [
                segment.name,
                f"{stage.duration.planned_steps:,}"
                if stage.gpu_hours is None
                else f"{stage.gpu_hours:g} {config.cluster.hours}",
                str(stage.global_batch),
                stage.described_mixture,
                passes,
                tokens,
                f"{selected.trained_count / 1e6:.2f} M",
                f"{selected.frozen_count / 1e6:.2f} M",
                "flow" + (f" + {weight:g} cross-pair ({stage.loss.cross_pair_target})" if weight else ""),
            ]
        )
    least, most = config.cluster.least_workers, config.cluster.most_workers
    workers = counted(least, "worker") if least == most else f"{least} to {most} workers"
    title = f"Run {config.name}: {counted(len(config.stages), 'stage')} on {workers}"
    console.print(Records(_FIELDS, rows, title, numeric=[name for name in _FIELDS if name not in _TEXTS]))
    if plans:
        console.print(_buckets(run, plans))
    if cluster is None and config.cluster.gpus_per_worker:
        cluster = _assumed(config)
        console.print(Prose(f"Assumed: the cluster {cluster.name}, {_title(cluster)}; --cluster names yours"))
    elif cluster is not None:
        console.print(Prose(f"Cluster {cluster.name}: {_title(cluster)}"))
    print_prediction(config, run.segments(), steps, cluster)
    _print_encoding(config, samples)
    if message := no_data(config):
        console.print(Prose(f"No data yet: {message}"))
    console.print(Prose(f"Next: domainshuttle train CONFIG; the run's folder will be {run.folder}"))


_ASSUMED = ("h100-1", "h100-8", "h100-64")


def _assumed(config: RunConfig) -> ClusterSpec:
    """The least of the clusters that ship which has a device for each worker, or else the largest."""
    clusters = [load_cluster(name) for name in _ASSUMED]
    enough = (one for one in clusters if one.most_devices >= config.cluster.most_workers)
    return next(enough, clusters[-1])


def _title(cluster: ClusterSpec) -> str:
    pool = cluster.trainers
    links = f"{cluster.links.bus_bandwidth / 1e9:.0f} GB/s between nodes" if pool.most_nodes > 1 else "one node"
    return f"{pool.most_nodes} x {pool.devices} {cluster.device.name}, {links}"


_FIELDS = ("stage", "steps", "batch", "data", "passes", "tokens a sample", "trained", "frozen", "loss")
_TEXTS = ("stage", "data", "loss")


def _buckets(run: Run, plans: Mapping[str, Mapping[str, Any]]) -> Records:
    """What each segment's steps are made of: a record a bucket, with the tokens of a sample that has all references."""
    rows = []
    for name, plan in plans.items():
        references = run.segment(name).stage.references
        for bucket, one in plan["buckets"].items():
            rows.append(
                [
                    name,
                    bucket,
                    f"{one['samples']:,}",
                    f"{one['share_of_steps']:.1%}",
                    f"{one['video_tokens']:,}",
                    f"{one['video_tokens'] + references * one['reference_tokens']:,}",
                    "fewer samples than a batch: repeats within it" if one["repeats_within_batch"] else "",
                ]
            )
    fields = ("stage", "bucket", "samples", "share of steps", "video tokens", "tokens with references", "note")
    return Records(fields, rows, "Buckets: all samples of a step are of one", numeric=fields[2:6], heads=2)


def _print_encoding(config: RunConfig, samples: int | None) -> None:
    """Prints what encoding takes, by what was measured of each corpus when it, or a part of it, was encoded."""
    rows, lacking = [], []
    for name in config.corpora if not config.encoders.live else ():
        raw, encoded = config.corpus(name, "raw").index, config.corpus(name, "encoded")
        measured = Throughput.load(encoded.folder)
        if measured is None:
            lacking.append(name)
            continue
        count = samples or len(Index.load(raw if exists(raw) else encoded.index, ("bucket",), verify=False))
        size, hours = measured.estimate(count)
        actors = config.cluster.encoding.actors or measured.actors
        rows.append(
            [
                name, f"{count:,}", f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB",
                f"{hours:,.2f} h", f"{hours / actors:,.2f} h on {actors}", f"{measured.rate:.3g}",
                f"{measured.bottleneck} (of {counted(measured.samples, 'sample')})",
            ]
        )  # fmt: skip
    fields = ("corpus", "samples", "cache", "actor time", "duration", "samples/s an actor", "bottleneck")
    if rows:
        console.print(Records(fields, rows, "Encoding, as measured here before", numeric=fields[1:6]))
    if samples and lacking:
        console.print(
            Prose(
                f"Of {', '.join(lacking)} nothing is measured: encode a part first, with data encode CONFIG --where"
                " FILTER --set data=FOLDER, or all of it until it is stopped"
            )
        )


def print_parameters(config: RunConfig) -> None:
    """Prints which parameters each segment trains."""
    console.print(parameter_table(selected_parameters(config)))
