"""The trial group: Ray Train's workers as a run has them, which try collectives and steps of the largest batch."""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.platform.cluster_checks.findings import Finding, failure, passed, warning
from domainshuttle.platform.config.schema import RunConfig, StageSection
from domainshuttle.platform.engine.hub import resolve
from domainshuttle.platform.engine.lean_imports import without

if TYPE_CHECKING:
    from domainshuttle.platform.cluster_checks.group_worker import Link, Steps, Trial, TrialResult
    from domainshuttle.platform.driver.restarts import Fault

_SLOW = 0.8
"""Share of the median below which a link is slow; of gloo's on CPUs, which other work disturbs, a half."""
_FULL = 0.95
"""Share of a device's memory above which a longer caption or a fragment too many ends the run."""
_LONGEST = 600
"""Characters of a finding that are shown of an error."""


def largest_batch(config: RunConfig) -> tuple[StageSection, Bucket]:
    """The stage and the bucket whose micro-batch has most tokens, references counted in."""

    def tokens(stage: StageSection, bucket: Bucket) -> int:
        _, frames, height, width = bucket.latent_shape
        return stage.micro_batch * (frames + stage.references) * height * width

    found = [
        (tokens(stage, bucket), number, stage, bucket)
        for number, stage in enumerate(config.stages)
        for name in stage.mixture
        for bucket in config.corpora[name].parsed_buckets
    ]
    _, _, stage, bucket = max(found, key=lambda one: one[:2])
    return stage, bucket


def check_group(
    config: RunConfig, spec: ClusterSpec | None, named: Callable[[str], str], seconds: float
) -> Iterator[Finding]:
    """Runs the trial group, and judges what it says; `named` names a node for people."""
    from domainshuttle.platform.cluster_checks.group_worker import Trial

    stage, bucket = largest_batch(config)
    expert = config.experts[0] if config.experts else None
    section = config.model_of(expert)
    trial = Trial(
        config=config.model_dump(mode="json"),
        stage=stage.name,
        bucket=(bucket.frames, bucket.height, bucket.width),
        expert=expert.name if expert else None,
        origin=resolve(section.base, config.seed),
    )
    try:
        result = _run(config, trial, seconds)
    except Exception as error:
        from domainshuttle.platform.driver.restarts import explain  # which imports Ray

        fault = explain(error)
        said = str(fault.final or fault.what)[:_LONGEST]
        yield failure("trial steps", said, f"{stage.name}, {bucket}", _remedy(fault))
        return
    yield from judged_links(result.links, result.wrong, spec, named, gpus=config.cluster.gpus_per_worker > 0)
    yield judged_steps(result.steps, stage, bucket, named(result.nodes[result.steps.rank]))


def _run(config: RunConfig, trial: "Trial", seconds: float) -> "TrialResult":
    from domainshuttle.platform.driver.worker_group import ray_trainer

    storage = Path(config.output) / f".preflight-{uuid.uuid4().hex[:8]}"
    storage.mkdir(parents=True)
    trainer = ray_trainer(
        config,
        _work,
        {"trial": trial},
        config.cluster.least_workers,
        name="preflight",
        storage=storage,
        room=storage / "room",
        timeout_seconds=seconds,
    )
    try:
        result: TrialResult = trainer.fit().return_value  # type: ignore[attr-defined]
        return result
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _work(config: dict[str, Any]) -> "TrialResult":
    import ray

    with without("scipy"):  # as a run's workers do
        from domainshuttle.platform.cluster_checks.group_worker import run_trial

    return run_trial(config["trial"], ray.get_runtime_context().get_node_id())


def judged_links(
    links: Sequence["Link"],
    wrong: Sequence[tuple[str, ...]],
    spec: ClusterSpec | None,
    named: Callable[[str], str],
    gpus: bool,
) -> Iterator[Finding]:
    """Links that sum wrongly or are slow: a node that is slow with all others is named, else the pair."""
    for nodes in wrong:
        yield failure("links", "a sum over its GPUs came out wrong", _places(nodes, named),
                      "take it out: gradients would be wrong; then dcgmi diag -r 3")  # fmt: skip
    slow, found = (_SLOW if gpus else 0.5), list[Finding]()
    of_kind = [link for link in links if link.kind == "all-reduce"]
    inside = [link for link in of_kind if len(link.nodes) == 1]
    pairs = [link for link in of_kind if len(link.nodes) == 2]
    verdict = failure if gpus else warning
    if inside:
        usual = median(link.bus_bandwidth for link in inside)
        for link in inside:
            if link.bus_bandwidth < slow * usual:
                found.append(verdict("links", f"{_rate(link)} within it, the median node has {usual / 1e9:.1f} GB/s",
                                     _places(link.nodes, named), "take it out, and look at its NVLink: nvidia-smi "
                                     "nvlink --status"))  # fmt: skip
    if pairs:
        usual = median(link.bus_bandwidth for link in pairs)
        of_node = {
            node: median(link.bus_bandwidth for link in pairs if node in link.nodes)
            for node in {node for link in pairs for node in link.nodes}
        }
        named_nodes = {node for node, rate in of_node.items() if rate < slow * usual} if len(of_node) > 2 else set()
        for node in sorted(named_nodes):
            found.append(verdict("links", f"{of_node[node] / 1e9:.1f} GB/s with other nodes, the median pair has "
                                 f"{usual / 1e9:.1f} GB/s", named(node), "take it out, and look at its network cards "
                                 "(ibstat, ethtool -S)"))  # fmt: skip
        for link in pairs:
            if link.bus_bandwidth < slow * usual and not named_nodes & set(link.nodes):
                found.append(warning("links", f"{_rate(link)} between them, the median pair has {usual / 1e9:.1f} GB/s",
                                     _places(link.nodes, named), "look at the switches between them"))  # fmt: skip
    yield from found
    yield from _against_spec(of_kind, spec, gpus)
    if not found and not wrong and links:
        rates: dict[str, list[float]] = {}
        for link in links:
            place = "within nodes" if len(link.nodes) == 1 else "between nodes"
            rates.setdefault(f"{link.kind} {place}", []).append(link.bus_bandwidth / 1e9)
        said = [f"{name} {min(all_of):.2f} to {max(all_of):.2f} GB/s" for name, all_of in sorted(rates.items())]
        yield passed("links", f"bus bandwidth of {', '.join(said)}")


def _against_spec(links: Sequence["Link"], spec: ClusterSpec | None, gpus: bool) -> Iterator[Finding]:
    """What the cluster's description promises of its links."""
    if spec is None or not gpus:
        return
    wide = [link for link in links if len(link.nodes) > 1]
    if wide and (link := max(wide, key=lambda one: one.ranks)).bus_bandwidth < _SLOW * spec.links.bus_bandwidth:
        yield warning("links", f"{_rate(link)} over {len(link.nodes)} nodes; the description expects "
                      f"{spec.links.bus_bandwidth / 1e9:.0f} GB/s", "", "see NCCL's choice with NCCL_DEBUG=INFO; or "
                      "correct `links` in it")  # fmt: skip
    least = spec.device.all_reduce if spec.trainers.devices == 8 else None
    inside = [link for link in links if len(link.nodes) == 1 and link.ranks == 8]
    if least and inside and (slowest := min(one.bus_bandwidth for one in inside)) < _SLOW * least:
        yield warning("links", f"{slowest / 1e9:.0f} GB/s within a node; a healthy one of {spec.device.name} has "
                      f"{least / 1e9:.0f} on 16 GB", "", "nvidia-smi topo -m; dcgmi diag -r 2")  # fmt: skip


def judged_steps(steps: "Steps", stage: StageSection, bucket: Bucket, where: str) -> Finding:
    """The memory that two steps of the largest batch took."""
    share = steps.peak / max(steps.total, 1)
    what = (
        f"{stage.micro_batch} x {bucket} with {stage.references} references: {steps.seconds:.2f} s a step, at most "
        f"{steps.peak / 2**30:.1f} of {steps.total / 2**30:.1f} GiB of {steps.device}"
    )
    if share > _FULL:
        return warning("trial steps", what, where, "leave more free: engine.activations={mode: full}, or a smaller "
                       f"stages.{stage.name}.micro_batch")  # fmt: skip
    return passed("trial steps", what, where)


def _rate(link: "Link") -> str:
    return f"{link.kind} at {link.bus_bandwidth / 1e9:.2f} GB/s"


def _places(nodes: Sequence[str], named: Callable[[str], str]) -> str:
    return " and ".join(named(node) for node in nodes)


def _remedy(fault: "Fault") -> str:
    """What to do about what ended the group; nothing where its message says it."""
    if fault.final is not None:
        return ""
    if "out of memory" in fault.what:
        return "raise recomputation or lower the micro-batch, as it says: domainshuttle plan shows what fits"
    return "run it alone with NCCL_DEBUG=INFO to see more: domainshuttle preflight CONFIG --only group"
