"""The description of a cluster, and the figures of devices."""

from pathlib import Path

import pytest

from domainshuttle.cluster.devices import DEVICES, device_named, device_shown_as
from domainshuttle.cluster.local import ClusterError
from domainshuttle.platform.config.loading import load_cluster
from domainshuttle.platform.config.schema import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_clusters_are_read_by_name(path: Path) -> None:
    spec = load_cluster(path.stem)
    assert spec.name == path.stem
    assert spec.most_devices == int(path.stem.rpartition("-")[2])
    assert load_cluster(str(path)) == spec


def test_a_field_can_be_set() -> None:
    spec = load_cluster("h100-64", ["trainers.device=b200", "trainers.nodes=[2, 3]", "links.measured_gb_s=12"])
    assert spec.device.name == "B200"
    assert (spec.trainers.least_nodes, spec.trainers.most_nodes, spec.most_devices) == (2, 3, 24)
    assert spec.links.bus_bandwidth == 12e9


def test_links_reach_most_of_what_their_cards_can() -> None:
    assert load_cluster("h100-64").links.bus_bandwidth == pytest.approx(370e9)  # eight NDR cards of 50 GB/s


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainers.device=H10", "did you mean 'H100'"),
        ("trainers.divice=H100", "did you mean 'device'"),
        ("trainers.nodes=[8, 4]", "should be [least, most]"),
        ("trainers.nodes=0", "at least one"),
        ("trainers.spot=true", "notice_seconds"),
        ("name=H100_64", "name:"),
        ("head.memory_gib=8", "greater than or equal to 16"),
        ("kubernetes.queue={kind: volcano, name: q, topology: rack}", "tier"),
        ("vm={provider: aws}", "needs region"),
        # what Kubernetes' API server refuses, or pods can't be with
        ("trainers.node_selector={a b: c}", "should be a label's name"),
        ("trainers.node_selector={pool: big nodes}", "trainers.node_selector.pool: should be a label's value"),
        ("trainers.node_selector={pool: " + "x" * 64 + "}", "with at most 63 characters"),
        ("trainers.tolerations=[{key: gpu, value: yes}]", "a value goes with operator: Equal"),
        ("kubernetes.queue.name=my queue", "should be a label's value"),
        ("kubernetes.queue.priority_class=Umläut", "should be a label's value"),
        ("monitoring.labels={release: my prometheus}", "should be a label's value"),
        ("kubernetes.namespace=Training", "small letters, digits and dashes"),
        ("kubernetes.secrets=[AWS_KEYS]", "small letters, digits, and dashes or dots"),
        ("links.resource=rdma/a b", "should be a label's name"),
        ("storage.mount=shared", "an absolute path without a colon"),
        ("storage.mount=/scratch/", "should be folders of their own"),
        ("storage.scratch=/tmp/ray", "should be folders of their own"),
        ("storage.mount=/", "should be folders of their own"),
        ("storage.endpoint=minio:9000", "begins with http:// or https://"),
        ("image=my image", "without spaces"),
        ("mlflow.artifacts=/data", "the address of a store"),
        ("mlflow.artifacts=file:///data", "the address of a store"),
        ("mlflow.hosts=[https://mlflow.example.com]", "a host's name"),
    ],
)
def test_mistakes_are_named_with_the_remedy(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match="can't be used") as error:
        load_cluster("h100-64", [override])
    assert expected in str(error.value)


def test_names_of_what_is_there_are_taken_as_kubernetes_takes_them() -> None:
    longer = "a" * 60
    spec = load_cluster(
        "h100-64",
        [f"kubernetes.secrets=[store.keys, {longer}]", f"kubernetes.namespace=9{longer}", "storage.claim=fast.claim",
         "kubernetes.image_pull_secret=registry.example.com", "kubernetes.service_account=trainer.v2"],
    )  # fmt: skip
    assert spec.kubernetes.secrets == ["store.keys", longer] and spec.storage.claim == "fast.claim"


def test_an_unknown_name_is_answered_with_those_that_ship() -> None:
    with pytest.raises(ConfigError, match="h100-8"):
        load_cluster("h100-9")


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Tesla T4", None),
    ],
)
def test_devices_are_known_by_what_torch_shows(shown: str, name: str | None) -> None:
    device = device_shown_as(shown)
    assert (device and device.name) == name


def test_figures_of_devices_are_of_one_kind() -> None:
    """Against the ratio that no device leaves: 100 to 700 FLOPs a byte of memory traffic, 24 to 192 GB."""
    for device in DEVICES.values():
        assert 100 < device.flops / device.memory_bandwidth < 700, device
        assert 24e9 <= device.memory <= 192e9 and device.link_bandwidth < device.memory_bandwidth, device


def test_a_device_that_is_not_known_is_answered_with_the_nearest() -> None:
    with pytest.raises(ClusterError, match="did you mean 'L40S'"):
        device_named("l40")
