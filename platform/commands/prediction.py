"""What a run takes on a cluster, as `plan` prints it: memory, time, data, hours and cost, and the layouts that fit."""

import math
from collections.abc import Sequence
from dataclasses import replace

from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.pipelines.errors import counted
from domainshuttle.pipelines.plan.step_plan import StepPlan
from domainshuttle.platform.config.schema import RunConfig, StageSection
from domainshuttle.platform.console import console
from domainshuttle.platform.engine.model_size import model_size
from domainshuttle.platform.engine.trained_parameters import with_adapters
from domainshuttle.platform.planning.data import assumed_steps, known_steps
from domainshuttle.platform.planning.forecast import Forecast, Layout, Work, layouts
from domainshuttle.platform.planning.memory import Policy, best_policy
from domainshuttle.platform.planning.step_time import StepTime, bus_bandwidth
from domainshuttle.platform.report.text import Advice, Prose, Records
from domainshuttle.platform.run.segments import Segment

_PAPERS_HOURS = "The paper reports about 30,000 GPU-hours for both stages of both experts of Wan2.2."
_LAYOUTS = 6
"""Layouts that are shown of a stage."""


def print_prediction(
    config: RunConfig, segments: Sequence[Segment], plans: dict[str, StepPlan], cluster: ClusterSpec | None
) -> None:
    """Prints what each segment takes. `plans` are those whose corpora are there; `cluster` None: workers on CPUs."""
    forecasts = {segment.name: forecast(config, segment, plans.get(segment.name), cluster) for segment in segments}
    if cluster is not None and (short := [name for name, one in forecasts.items() if not _holds(cluster, one)]):
        ranks = max(forecasts[name].layout.ranks for name in short)
        console.print(
            Prose(
                f"{cluster.name} has {counted(cluster.most_devices, 'device')}, too few for the workers of "
                f"{', '.join(short)}: all before the layouts is said of {ranks} devices. Raise trainers.nodes, or set "
                "cluster.workers to the devices of a layout that fits"
            )
        )
    unknown = [name for name, one in forecasts.items() if not one.work.data.known]
    if unknown:
        console.print(
            Prose(
                f"Assumed for {', '.join(unknown)}, whose corpora are not there: all buckets equally often, and the "
                "most references in every sample"
            )
        )
    _print_memory(forecasts, cluster)
    if cluster is None:
        return
    _print_buckets(forecasts)
    _print_times(forecasts, cluster)
    _print_hours(config, segments, forecasts, cluster)
    _print_layouts(segments, forecasts, cluster)


def _holds(cluster: ClusterSpec, one: Forecast) -> bool:
    return one.layout.ranks <= cluster.most_devices


def forecast(config: RunConfig, segment: Segment, plan: StepPlan | None, cluster: ClusterSpec | None) -> Forecast:
    """A segment as the configuration lays it out, with the most of its workers that the cluster has devices for."""
    stage = segment.stage
    spec = with_adapters(model_size(config.model_of(segment.expert)), stage.trained)
    data = (
        known_steps(plan, stage.references, stage.reference_dropout)
        if plan is not None
        else assumed_steps(config, segment, stage.references)
    )
    sizes = config.worker_sizes(stage)
    fitting = [size for size in sizes if cluster is None or size <= cluster.most_devices]
    ranks = (fitting or sizes)[-1]
    work = Work(spec, stage, config.engine, data, config.encoders.text_len)
    sharing = config.engine.sequence_parallel
    return Forecast(work, Layout(ranks, stage.micro_batch, Policy.of(config.engine, spec), sharing), cluster)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"


def _print_memory(forecasts: dict[str, Forecast], cluster: ClusterSpec | None) -> None:
    """The parts of a device's memory with the largest sample, a row a part, and whether they fit."""
    memories = {name: one.memory(one.work.largest) for name, one in forecasts.items()}
    parts = dict.fromkeys(part for memory in memories.values() for part in memory.parts)
    rows = [
        [part, *(_gb(memory.parts.get(part, 0.0)) for memory in memories.values())]
        for part in parts
        if any(memory.parts.get(part) for memory in memories.values())
    ]
    rows.append(["torch's peak", *(_gb(memory.tensors) for memory in memories.values())])
    if cluster is not None:
        rows.append(["with CUDA and NCCL", *(_gb(memory.total) for memory in memories.values())])
        rows.append(
            [f"fits {cluster.device.name} ({_gb(cluster.device.memory)})"]
            + ["yes" if memory.fits(cluster.device.memory) else "NO" for memory in memories.values()]
        )
    title = "Memory of a device in GB, at its most, with the largest sample"
    console.print(Records(("part", *memories), rows, title, numeric=list(memories)))
    if cluster is None:
        return
    _print_policy(forecasts, cluster)


def _print_policy(forecasts: dict[str, Forecast], cluster: ClusterSpec) -> None:
    """What recomputation all stages have room for, since one setting holds for all; and which stages have none."""
    bests: dict[str, Policy] = {}
    for name, one in forecasts.items():
        work, layout = one.work, one.layout
        tokens = -(-work.largest.tokens(work.spec) // layout.sharing)
        best = best_policy(
            work.spec, work.stage, one.states, tokens, layout.micro_batch, cluster.device.memory,
            work.engine.precision, work.largest.reference_share(work.spec),
        )  # fmt: skip
        if best is not None:
            bests[name] = best
            continue
        console.print(
            Prose(
                f"{name} does not fit {layout.ranks} {cluster.device.name} whatever is computed again: use more "
                "devices, a smaller micro_batch, smaller buckets, or engine.offload_optimizer"
            )
        )
    now = [forecasts[name] for name in bests]
    tried = {
        str(best): [replace(one, layout=replace(one.layout, policy=best)) for one in now] for best in bests.values()
    }
    fitting = {text: some for text, some in tried.items() if all(one.fits() for one in some)}
    if not fitting:
        return
    text = min(fitting, key=lambda text: _seconds(fitting[text]))
    best = next(one for one in bests.values() if str(one) == text)
    if all(text == str(one.layout.policy) for one in now):
        return
    if all(one.fits() for one in now) and _seconds(now) <= _seconds(fitting[text]):
        return  # what is configured fits, and is better than what is tried here
    steps = ", ".join(
        f"{name} {after.step_seconds():.2f} s a step, not {before.step_seconds():.2f}"
        for name, before, after in zip(bests, now, fitting[text], strict=True)
    )
    console.print(
        Advice(
            f"Least recomputation that fits {', '.join(bests)} keeps {text}: {steps}, with",
            f"--set 'engine.activations={best.setting()}'",
        )
    )


def _seconds(some: Sequence[Forecast]) -> float:
    """Of all steps of some stages."""
    return sum(one.step_seconds() * _steps_of(one.work.stage, one) for one in some)


def _print_buckets(forecasts: dict[str, Forecast]) -> None:
    rows = []
    for name, one in forecasts.items():
        for bucket in one.work.data.buckets:
            most, mean = one.work.data.most(bucket), one.work.data.mean(bucket)
            sample = one.work.sample(bucket, *most)
            memory = one.memory(sample)
            rows.append(
                [
                    name,
                    str(bucket),
                    f"{one.work.data.share(bucket):.1%}",
                    f"{mean[0]:.1f}/{most[0]}",
                    f"{sample.tokens(one.work.spec):,}",
                    f"{one.flops(bucket) / 1e15:,.1f}",
                    f"{one.step_seconds(bucket):.2f}",
                    _gb(memory.total),
                ]
            )
    fields = ("stage", "bucket", "share", "refs", "tokens", "PFLOP", "s", "GB")
    title = (
        "Steps by bucket, predicted: share of the steps, references of a sample (mean/most), most tokens, FLOPs and "
        "seconds of a step on average, memory of a device"
    )
    console.print(Records(fields, rows, title, numeric=fields[2:], heads=2))


def _print_times(forecasts: dict[str, Forecast], cluster: ClusterSpec) -> None:
    rows = []
    for name, one in forecasts.items():
        stage, ranks = one.work.stage, one.layout.ranks
        micro, seconds = one.micro_batch(one.work.largest), one.step_seconds()
        data = one.work.data
        loading = sum(data.share(bucket) * one.work.sample_bytes(bucket) for bucket in data.buckets)
        rate = loading * stage.global_batch / seconds
        saved = one.checkpoint_bytes
        rows.append(
            [
                name,
                f"{one.layout} x {one.layout.accumulation(stage.global_batch)}",
                f"{seconds:.2f} s",
                f"{one.mfu:.1%}",
                f"{one.balance:.3f}",
                f"{micro.attention:.2f}, {micro.products:.2f}, {micro.elementwise:.2f} s",
                _messages(micro, bus_bandwidth(cluster, ranks)) if ranks > 1 else "none",
                f"{rate / 1e6:,.0f} MB/s ({rate / ranks / 1e6:,.0f} a rank), storage gives "
                f"{cluster.storage.read_gb_s * 1e3:,.0f}",
                f"{_gb(saved)} GB ({_gb(saved / ranks)} a rank), {saved / cluster.storage.write_gb_s / 1e9:.1f} s",
            ]
        )
    fields = (
        "stage", "devices x micro-batch x accumulation", "step", "MFU", "ranks: mean/longest",
        "attention, products, elementwise", "ZeRO-3's messages", "loader must read", "a checkpoint",
    )  # fmt: skip
    title = f"Time on {cluster.device.name}, predicted; parts are of the largest micro-batch"
    console.print(Records(fields, rows, title))


def _messages(micro: StepTime, bus: float) -> str:
    exchanged = f"; {micro.exchanges:.2f} s of exchanged tokens" if micro.exchanges else ""
    return f"{micro.messages:.2f} s at {bus / 1e9:.0f} GB/s, {micro.exposed:.2f} s not hidden{exchanged}"


def _steps_of(stage: StageSection, one: Forecast) -> float:
    """Steps of a stage, of one that its GPU-hours end as many as they make."""
    if stage.duration.steps is not None or stage.gpu_hours is None:
        return stage.duration.planned_steps
    return stage.gpu_hours / one.hours(1)


def _print_hours(
    config: RunConfig, segments: Sequence[Segment], forecasts: dict[str, Forecast], cluster: ClusterSpec
) -> None:
    rows, total, days = [], 0.0, 0.0
    every = config.checkpoint.every
    price = cluster.trainers.device_hour_usd
    for segment in segments:
        one = forecasts[segment.name]
        hours, share, known = one.hours(_steps_of(segment.stage, one)), one.goodput(every), one.reliability
        best = known.best_interval() / one.step_seconds()
        with_failures = hours / share if share > _NO_GOODPUT else math.inf
        total, days = total + with_failures, days + with_failures / one.layout.ranks / 24
        rows.append(
            [
                segment.name, f"{hours:,.0f}", f"{known.between_failures / 3600:,.0f} h", f"{share:.1%}",
                f"{every}, best {max(1, round(best)):,}",
                *_with_failures(with_failures, with_failures / one.layout.ranks / 24, price),
            ]
        )  # fmt: skip
    rows.append(["all", "", "", "", "", *_with_failures(total, days, price)])
    fields = (
        "stage", f"{cluster.device.name}-hours", "a failure every", "goodput", "checkpoint every (steps)",
        "hours with failures", "days", "US$",
    )  # fmt: skip
    note = "" if price is not None else "; no price: set trainers.device_hour_usd of the cluster"
    title = f"Hours, and with failures at the cluster's reliability; without evaluation{note}"
    console.print(Records(fields, rows, title, numeric=fields[1:]))
    spec = forecasts[segments[0].name].work.spec
    if (spec.dim, spec.num_layers) == (5120, 40):
        console.print(Prose(_PAPERS_HOURS))
    if config.budget_gpu_hours is not None and total > config.budget_gpu_hours:
        console.print(Prose(f"budget_gpu_hours={config.budget_gpu_hours:g} ends the run before its last step"))


_NO_GOODPUT = 1e-3
"""Below it a stage does not come to its end."""


def _with_failures(hours: float, days: float, price: float | None) -> tuple[str, str, str]:
    """Hours, days and cost; of a stage that failures never let come to its end, that."""
    return ("never", "never", "") if math.isinf(hours) else (f"{hours:,.0f}", f"{days:,.2f}", _cost(hours, price))


def _cost(hours: float, price: float | None) -> str:
    return f"{hours * price:,.0f}" if price is not None else ""


def _print_layouts(segments: Sequence[Segment], forecasts: dict[str, Forecast], cluster: ClusterSpec) -> None:
    rows, seen = [], set[str]()
    for segment in segments:
        stage, one = segment.stage, forecasts[segment.name]
        if stage.name in seen:  # experts are alike
            continue
        seen.add(stage.name)
        found = layouts(one.work, cluster, cluster.most_devices)
        shown, sizes = [], dict[int, int]()
        for other in found:
            # of each number of devices the two cheapest
            sizes[other.layout.ranks] = sizes.get(other.layout.ranks, 0) + 1
            if sizes[other.layout.ranks] <= 2:
                shown.append(other)
        for other in shown[:_LAYOUTS]:
            steps, ranks = _steps_of(stage, one), other.layout.ranks
            hours = other.hours(steps)
            rows.append(
                [
                    stage.name,
                    f"{other.layout} x {other.layout.accumulation(stage.global_batch)}",
                    str(other.layout.policy),
                    _gb(other.memory(other.work.largest).total),
                    f"{other.step_seconds():.2f}",
                    f"{hours:,.0f}",
                    f"{hours / ranks / 24:.2f}",
                    _cost(hours, cluster.trainers.device_hour_usd),
                ]
            )
        if not found:
            console.print(Prose(f"{stage.name}: no layout fits {cluster.most_devices} {cluster.device.name}"))
    fields = ("stage", "layout", "kept", "GB", "s", "hours", "days", "US$")
    title = (
        "Layouts that fit, the cheapest first: devices x micro-batch x accumulation, what is kept in how many blocks, "
        "memory of a device, seconds of a step"
    )
    console.print(Records(fields, rows, title, numeric=fields[3:], heads=2))
