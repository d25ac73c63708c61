"""Which facts of nodes are faults. A node is compared with the others of its kind: most of them are right."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

from domainshuttle.cluster.devices import Device, device_shown_as
from domainshuttle.pipelines.errors import counted
from domainshuttle.platform.cluster_checks.findings import Finding, failure, node_name, passed, warning
from domainshuttle.platform.cluster_checks.node_facts import GpuFacts, NodeFacts

_RATE = 0.95
"""Share of the median GPU's rate below which a GPU is slow."""
_COPY = 0.7
_CPU = 0.5
"""The same of a CPU's, which other processes use too."""
_SKEW = 2.0
"""Seconds by which a clock may differ."""
_LEAST_SHM = 1 << 30
"""Docker's default is 64 MiB, of which NCCL and Ray run out."""
_LEAST_DISK = 10_000_000_000
_GIB = 1 << 30


def judged(
    nodes: Sequence[NodeFacts],
    driver: dict[str, str],
    asked: tuple[float, float],
    gpus: int,
    device: Device | None = None,
) -> list[Finding]:
    """The findings on nodes. `driver` are its versions, `asked` the Unix times between which all nodes told theirs,
    `gpus` and `device` what a node of trainers must have, where that is known."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": lambda: _versions(nodes, driver),
        "clocks": lambda: _clocks(nodes, asked),
        "CPU rate": lambda: _cpus(nodes),
        "/dev/shm": lambda: _shared_memory(nodes),
        "disks": lambda: _disks(nodes),
    }
    if any(node.held_gpus for node in nodes):
        checks |= {
            "GPUs": lambda: (*_counts(nodes, gpus), *_kinds(nodes, device)),
            "GPU health": lambda: _health(nodes),
            "GPU rate": lambda: _rates(nodes),
            "GPU results": lambda: _results(nodes),
        }
    if any(node.links for node in nodes):
        checks["network cards"] = lambda: _links(nodes)
    if any(node.hosts for node in nodes):
        checks["names"] = lambda: _names(nodes)
    findings: list[Finding] = []
    for name, check in checks.items():
        found = list(check())
        findings += found or [passed(name, _good(name, nodes))]
    return findings


def _good(check: str, nodes: Sequence[NodeFacts]) -> str:
    """What to say of a check without faults."""
    gpus = [gpu for node in nodes for gpu in node.gpus]
    if check == "versions":
        return ", ".join(f"{name} {version}" for name, version in nodes[0].versions.items())
    if check == "GPUs":
        return f"{len(gpus)} on {counted(sum(bool(node.gpus) for node in nodes), 'node')}"
    if check == "GPU rate":
        return f"{median(gpu.flops for gpu in gpus) / 1e12:.0f} TFLOP/s in bf16, all within 5%"
    if check == "/dev/shm":
        return f"{min(node.shared_memory for node in nodes) / _GIB:.1f} GiB at least"
    return f"OK on {len(nodes)} nodes" if len(nodes) > 1 else "OK"


def _where(node: NodeFacts, gpu: GpuFacts | None = None) -> str:
    name = node_name(node.host, node.address, node.node)
    return name if gpu is None else f"{name}, GPU {gpu.index} {gpu.name} {gpu.uuid}".rstrip()


def _versions(nodes: Sequence[NodeFacts], driver: dict[str, str]) -> Iterator[Finding]:
    for node in nodes:
        for name, mine in driver.items():
            theirs = node.versions.get(name)
            if name in ("cuda", "nccl") or theirs == mine:
                continue
            yield failure(
                "versions", f"{name} is {theirs}, the driver's is {mine}", _where(node),
                "start its node from the same image, by digest, or install the same there",
            )  # fmt: skip
    for name in ("cuda", "nccl"):
        counts = Counter(version for node in nodes if (version := node.versions.get(name)))
        usual = counts.most_common(1)[0][0] if counts else None
        for node in nodes:
            if (theirs := node.versions.get(name)) is not None and theirs != usual:
                yield failure("versions", f"{name} is {theirs}, most have {usual}", _where(node), "use one image")


def _clocks(nodes: Sequence[NodeFacts], asked: tuple[float, float]) -> Iterator[Finding]:
    before, after = asked
    for node in nodes:
        skew = max(before - node.time, node.time - after, 0.0)
        if skew > _SKEW:
            yield failure(
                "clocks", f"its clock is {skew:.1f} s off", _where(node),
                "synchronise it (chronyd or systemd-timesyncd): stores refuse requests, and logs mislead",
            )  # fmt: skip


def _counts(nodes: Sequence[NodeFacts], gpus: int) -> Iterator[Finding]:
    for node in nodes:
        if node.held_gpus and not node.cuda:
            yield failure("GPUs", "torch finds none: the driver is too old for torch's CUDA, or the container has no "
                          "access", _where(node), "run nvidia-smi there; CUDA 13 needs driver 580")  # fmt: skip
        elif node.held_gpus and len(node.gpus) < max(gpus, node.held_gpus):
            yield failure("GPUs", f"{len(node.gpus)} of {max(gpus, node.held_gpus)}", _where(node),
                          "look for one that fell off the bus: nvidia-smi, dmesg (XID 79)")  # fmt: skip


def _kinds(nodes: Sequence[NodeFacts], device: Device | None) -> Iterator[Finding]:
    if device is None:
        return
    for node in nodes:
        for gpu in node.gpus:
            if device_shown_as(gpu.name) != device:
                yield failure(
                    "GPUs", f"it is no {device.name}, as the cluster's description says", _where(node, gpu),
                    "keep workers off it (cluster.node_labels), or correct trainers.device, by which plan reckons",
                )  # fmt: skip


def _health(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    for node in nodes:
        if node.gpus and node.nvml:
            yield warning("GPU health", f"not known: {node.nvml}", _where(node), "pip install nvidia-ml-py")
        for gpu in node.gpus:
            where = _where(node, gpu)
            if gpu.uncorrected_errors:
                yield failure("GPU health", f"{gpu.uncorrected_errors} uncorrectable memory errors", where,
                              "reset the GPU or take the node out; then dcgmi diag -r 3")  # fmt: skip
            if gpu.remap_failed:
                yield failure("GPU health", "a damaged row of memory could not be replaced", where, "replace the GPU")
            if gpu.remap_pending:
                yield warning("GPU health", "a row of memory is replaced at its next reset", where, "reset the GPU")
            if gpu.slowed:
                yield failure("GPU health", f"slowed down: {', '.join(gpu.slowed)}", where, "look at cooling and power")
            if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
                yield failure("GPU health", f"PCIe x{gpu.pcie_width} of x{gpu.pcie_width_max}", where,
                              "reseat it, or take the node out")  # fmt: skip


def _rates(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    for name, gpus in _by_kind(nodes).items():
        usual, copied = median(gpu.flops for _, gpu in gpus), median(gpu.host_to_device for _, gpu in gpus)
        for node, gpu in gpus:
            if gpu.flops < _RATE * usual:
                yield failure("GPU rate", f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.flops / usual:.0%} of the median "
                              f"{name}", _where(node, gpu), "take the node out, as all others would wait for it; look "
                              "at its clocks (nvidia-smi -q -d CLOCK,PERFORMANCE)")  # fmt: skip
            if gpu.host_to_device < _COPY * copied:
                yield warning("GPU rate", f"{gpu.host_to_device / 1e9:.1f} GB/s from the host, the median has "
                              f"{copied / 1e9:.1f}", _where(node, gpu), "look at its PCIe link")  # fmt: skip


def _results(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    for name, gpus in _by_kind(nodes).items():
        counts = Counter(gpu.product_digest for _, gpu in gpus)
        usual = counts.most_common(1)[0][0]
        for node, gpu in gpus:
            if gpu.product_digest != usual:
                yield failure("GPU results", f"its product of fixed matrices differs from that of {counts[usual]} "
                              f"other {name}", _where(node, gpu), "take the node out: it computes wrongly; then dcgmi "
                              "diag -r 3")  # fmt: skip


def _by_kind(nodes: Sequence[NodeFacts]) -> dict[str, list[tuple[NodeFacts, GpuFacts]]]:
    kinds: dict[str, list[tuple[NodeFacts, GpuFacts]]] = {}
    for node in nodes:
        for gpu in node.gpus:
            kinds.setdefault(gpu.name, []).append((node, gpu))
    return kinds


def _cpus(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    usual = median(node.cpu_flops for node in nodes)
    for node in nodes:
        if node.cpu_flops < _CPU * usual:
            yield warning("CPU rate", f"{node.cpu_flops / usual:.0%} of the median node's", _where(node),
                          "look for other work on it, or for lowered clocks")  # fmt: skip


def _shared_memory(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    for node in nodes:
        if node.shared_memory < _LEAST_SHM:
            yield failure("/dev/shm", f"{node.shared_memory / (1 << 20):.0f} MiB", _where(node),
                          "give its container more: docker --shm-size=64g, or a Memory emptyDir")  # fmt: skip


def _disks(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    for node in nodes:
        for folder, free in node.disks.items():
            if isinstance(free, str):
                yield failure("disks", f"{folder} can't be written: {free}", _where(node),
                              "mount it there, writable by the user of Ray")  # fmt: skip
            elif free < _LEAST_DISK:
                yield warning("disks", f"{folder} has {free / 1e9:.1f} GB free", _where(node), "make room")


def _links(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    active = Counter(port for node in nodes for port, state in node.links.items() if state == "ACTIVE")
    for node in nodes:
        for port, state in node.links.items():
            if state != "ACTIVE":
                others = active.get(port, 0)
                found = failure if others else warning
                said = f", on {counted(others, 'other node')} it is ACTIVE" if others else ""
                yield found("network cards", f"{port} is {state}{said}", _where(node),
                            "look at cable and switch (ibstat), or leave it out of NCCL_IB_HCA")  # fmt: skip


def _names(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    for node in nodes:
        for host, reason in node.hosts.items():
            if reason:
                yield failure("names", f"{host} is not found: {reason}", _where(node),
                              "correct the name, or the node's DNS")  # fmt: skip
