"""What a node says of itself, measured there by a Ray task without any right beyond a user's. Nothing is judged here.

Facts of GPUs come from NVML (nvidia-ml-py), where it is installed; rates are measured by torch.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_ALWAYS_LINKS = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class GpuFacts:
    """One GPU. None: NVML does not say."""

    index: int
    name: str
    uuid: str = ""
    uncorrected_errors: int | None = None
    remap_failed: bool | None = None
    remap_pending: bool | None = None
    slowed: tuple[str, ...] = ()
    """Reasons of the hardware for a lower clock."""
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    flops: float = 0.0
    """Of its own bf16 products, FLOP/s."""
    product_digest: str = ""
    """Of a product of fixed matrices: the same on every GPU of a kind, bit by bit."""
    host_to_device: float = 0.0
    """Bytes/s."""


@dataclass(frozen=True)
class NodeFacts:
    """One node."""

    host: str
    node: str
    """Ray's id of it."""
    address: str
    time: float
    """Unix time there."""
    versions: dict[str, str]
    cpus: int
    cpu_flops: float
    """Of one thread's float32 products."""
    memory: int
    """Bytes that are free."""
    shared_memory: int
    """Bytes of /dev/shm."""
    disks: dict[str, int | str]
    """Free bytes by folder; a text: why it can't be written."""
    links: dict[str, str]
    """State of each port of an InfiniBand or RoCE card."""
    hosts: dict[str, str]
    """Why a name is not found; empty: it is."""
    held_gpus: int = 0
    """That Ray gave the task: all of the node."""
    gpus: tuple[GpuFacts, ...] = ()
    nvml: str = ""
    """Why NVML says nothing; empty: it does."""
    cuda: bool = False
    """Whether torch finds a GPU."""
    environment: dict[str, str] = field(default_factory=dict)


def node_facts(folders: Sequence[str], hosts: Sequence[str], gpus: int) -> NodeFacts:
    """The facts of this node, of which the task holds `gpus` GPUs. Takes seconds."""
    import ray
    import torch

    context = ray.get_runtime_context()
    devices, nvml = (_gpus() if gpus and torch.cuda.is_available() else ((), "")) if gpus else ((), "")
    return NodeFacts(
        host=socket.gethostname(),
        node=context.get_node_id(),
        address=ray.util.get_node_ip_address(),
        time=time.time(),
        versions=versions(),
        cpus=os.cpu_count() or 1,
        cpu_flops=_cpu_flops(),
        memory=psutil.virtual_memory().available,
        shared_memory=_free("/dev/shm", total=True),
        disks={folder: _writable(folder) for folder in folders},
        links=_links(),
        hosts={host: _resolved(host) for host in hosts},
        held_gpus=gpus,
        gpus=devices,
        nvml=nvml,
        cuda=torch.cuda.is_available(),
        environment={name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
    )


def versions() -> dict[str, str]:
    """Of everything that must be the same on all nodes; of the package a digest of its sources."""
    import ray
    import torch

    found = {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "domainshuttle": f"{importlib.metadata.version('domainshuttle')} {package_digest()}",
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def package_digest() -> str:
    """A digest of this package's own sources, as they are imported here."""
    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).resolve().parents[2]
    for room in ("model", "pipelines", "cluster", "platform", "configs"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _cpu_flops() -> float:
    import torch

    from domainshuttle.platform.training.rank_rates import MatrixProbe

    probe = MatrixProbe(torch.device("cpu"))
    return max(probe.rate() for _ in range(20))


def _free(folder: str, total: bool = False) -> int:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return 0
    return usage.total if total else usage.free


def _writable(folder: str) -> int | str:
    """Free bytes of a folder in which a file can be written; else why not."""
    import tempfile

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"preflight")
    except OSError as error:
        return error.strerror or str(error)
    return _free(folder)


def _links() -> dict[str, str]:
    found = {}
    for path in sorted(_ALWAYS_LINKS.glob("*/ports/*/state")):
        try:
            found[f"{path.parts[-4]}:{path.parts[-2]}"] = path.read_text().split(":")[-1].strip()
        except OSError as error:
            found[f"{path.parts[-4]}:{path.parts[-2]}"] = error.strerror or str(error)
    return found


def _resolved(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _gpus() -> tuple[tuple[GpuFacts, ...], str]:
    import torch

    nvml, reason = _nvml()
    found = []
    for index in range(torch.cuda.device_count()):
        rate, digest, copied = _measured(index)
        name = torch.cuda.get_device_name(index)
        said = _said_by_nvml(nvml, index) if nvml else {}
        found.append(GpuFacts(index, name, flops=rate, product_digest=digest, host_to_device=copied, **said))
    if nvml:
        nvml.nvmlShutdown()
    return tuple(found), reason


def _nvml() -> tuple[Any, str]:
    """NVML, or why it is not there."""
    if importlib.util.find_spec("pynvml") is None:
        return None, "nvidia-ml-py is not installed"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, str(error)
    return pynvml, ""


def _said_by_nvml(nvml: Any, index: int) -> dict[str, Any]:
    """What NVML says of torch's GPU number `index`; what it does not know is left out."""
    import torch

    found: dict[str, Any] = {}
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    except nvml.NVMLError:
        return found
    found["uuid"] = uuid

    def ask(*names: str, question: Any) -> None:
        try:
            values = question()
        except (nvml.NVMLError, AttributeError):
            return  # this GPU, or this driver, does not say
        found.update(zip(names, values if isinstance(values, tuple) else (values,), strict=False))

    volatile = nvml.NVML_VOLATILE_ECC
    uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    ask("uncorrected_errors", question=lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile))
    ask("remap", question=lambda: (tuple(nvml.nvmlDeviceGetRemappedRows(handle)),))
    if (remap := found.pop("remap", None)) is not None:  # corrected, uncorrected, pending, failed
        found |= {"remap_pending": bool(remap[2]), "remap_failed": bool(remap[3])}
    ask("slowed", question=lambda: (_slowdowns(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),))
    ask("pcie_width", question=lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle))
    ask("pcie_width_max", question=lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    return found


def _slowdowns(nvml: Any, mask: int) -> tuple[str, ...]:
    reasons = {
        "hardware slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
        "too hot": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "power brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    return tuple(name for name, bit in reasons.items() if mask & bit)


def _measured(index: int) -> tuple[float, str, float]:
    """FLOP/s of bf16 products, the digest of one, and bytes/s from the host."""
    import torch

    from domainshuttle.platform.training.rank_rates import MatrixProbe

    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        side = 8192
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(side // 8, side, generator=generator).to(device, torch.bfloat16)
        product = left @ left.T
        digest = hashlib.blake2b(product.float().cpu().numpy().tobytes(), digest_size=8).hexdigest()
        probe = MatrixProbe(device)
        deadline = time.monotonic() + 2.0  # until it is warm
        rate = probe.rate()
        while time.monotonic() < deadline:
            rate = probe.rate()
        host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
        copy = torch.empty_like(host, device=device)
        copy.copy_(host)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            copy.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        copied = 4 * host.numel() / (time.perf_counter() - began)
        del host, copy, left, product, probe
        torch.cuda.empty_cache()
    return rate, digest, copied
