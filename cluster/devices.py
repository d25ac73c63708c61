"""The accelerators that are known: what each can do at most, as its vendor states it."""

import difflib
from dataclasses import dataclass

from domainshuttle.cluster.local import ClusterError


@dataclass(frozen=True)
class Device:
    """One accelerator. Figures are the vendor's for dense matrices, without sparsity; GB and TB are decimal."""

    name: str
    flops: float
    """FLOP/s in bf16 with dense matrices."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes/s between the chip and its memory."""
    link_bandwidth: float
    """Bytes/s to the other devices of its node, both directions together."""
    link: str
    """What these links are."""
    names: tuple[str, ...]
    """Parts of the name under which torch shows it, one of which is enough."""
    resource: str = "nvidia.com/gpu"
    """As Kubernetes' device plugins call it."""
    product: str = ""
    """Value of the node label that the vendor's feature discovery sets; empty: it sets none that is known."""
    all_reduce: float | None = None
    """Bytes/s of bus bandwidth that an all-reduce of 16 GB over the 8 devices of a healthy node reaches at least, by
    Azure's node health checks; None: not published."""
    plan_only: bool = False
    """Whether only `plan` knows it: there is no code that trains on it."""

    @property
    def label(self) -> str:
        """The node label that names the product; empty where there is none."""
        vendor = {"nvidia.com/gpu": "nvidia.com/gpu.product", "amd.com/gpu": "amd.com/gpu.product-name"}
        return vendor.get(self.resource, "") if self.product else ""


_GB, _TB, _TFLOPS = 1e9, 1e12, 1e12
_NVLINK3, _NVLINK4, _NVLINK5 = "NVLink 3", "NVLink 4", "NVLink 5"

DEVICES: dict[str, Device] = {
    one.name: one
    for one in (
        Device("B200", 2250 * _TFLOPS, 180 * _GB, 7.7 * _TB, 1800 * _GB, _NVLINK5, ("B200",), product="NVIDIA-B200"),
        Device("GH200", 989 * _TFLOPS, 96 * _GB, 4.0 * _TB, 900 * _GB, _NVLINK4, ("GH200",),
               product="NVIDIA-GH200-480GB"),
        Device("H200 NVL", 835 * _TFLOPS, 141 * _GB, 4.8 * _TB, 900 * _GB, _NVLINK4, ("H200 NVL",),
               product="NVIDIA-H200-NVL"),
        Device("H200", 989 * _TFLOPS, 141 * _GB, 4.8 * _TB, 900 * _GB, _NVLINK4, ("H200",), product="NVIDIA-H200",
               all_reduce=431 * _GB),
        Device("H100 NVL", 835 * _TFLOPS, 94 * _GB, 3.9 * _TB, 600 * _GB, _NVLINK4, ("H100 NVL",),
               product="NVIDIA-H100-NVL"),
        Device("H100 PCIe", 756 * _TFLOPS, 80 * _GB, 2.0 * _TB, 128 * _GB, "PCIe 5", ("H100 PCIe",),
               product="NVIDIA-H100-PCIe"),
        Device("H100", 989 * _TFLOPS, 80 * _GB, 3.35 * _TB, 900 * _GB, _NVLINK4, ("H100",),
               product="NVIDIA-H100-80GB-HBM3", all_reduce=460 * _GB),
        Device("A100", 312 * _TFLOPS, 80 * _GB, 2.04 * _TB, 600 * _GB, _NVLINK3, ("A100",),
               product="NVIDIA-A100-SXM4-80GB"),
        Device("L40S", 362 * _TFLOPS, 48 * _GB, 0.864 * _TB, 64 * _GB, "PCIe 4", ("L40S",), product="NVIDIA-L40S"),
        Device("RTX 4090", 165 * _TFLOPS, 24 * _GB, 1.008 * _TB, 64 * _GB, "PCIe 4", ("RTX 4090",),
               product="NVIDIA-GeForce-RTX-4090"),
        # sites print 2615 TFLOP/s, which is with sparsity
        Device("MI300X", 1307 * _TFLOPS, 192 * _GB, 5.3 * _TB, 896 * _GB, "Infinity Fabric", ("MI300X",),
               resource="amd.com/gpu", product="AMD_Instinct_MI300X_OAM", all_reduce=314 * _GB),
        # the least of 910B1 to B4, which have 280 to 376 TFLOP/s; B4 has 32 GB. Not verified: needs torch_npu and HCCL
        Device("Ascend 910B", 280 * _TFLOPS, 64 * _GB, 1.6 * _TB, 392 * _GB, "HCCS", ("Ascend910B",),
               resource="huawei.com/Ascend910", plan_only=True),
    )
}  # fmt: skip
"""By name; a name that is part of another comes after it."""


def device_named(name: str) -> Device:
    """The device of a name, in any case. Raises ClusterError that names the nearest one."""
    for known, device in DEVICES.items():
        if known.lower() == name.strip().lower():
            return device
    close = difflib.get_close_matches(name.upper(), DEVICES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(DEVICES)}"
    raise ClusterError(f"device {name!r} is not known; {hint}")


def device_shown_as(shown: str) -> Device | None:
    """The device that torch shows under a name, such as `NVIDIA H100 80GB HBM3`; None: it is not known."""
    return next((one for one in DEVICES.values() if any(part in shown for part in one.names)), None)
