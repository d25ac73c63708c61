"""A cluster as its owner describes it: nodes and their devices, links, storage, and how the cluster is managed.

From it `plan` predicts time, memory and cost, and `cluster render` makes manifests. Every field is declared once, here.
Nothing here imports torch or Ray.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from domainshuttle.cluster.devices import Device, device_named
from domainshuttle.cluster.local import ClusterError
from domainshuttle.pipelines.values import Count, Cpus, Real, Seconds, Section, Text, Whole


def _form(pattern: str, longest: int, meaning: str) -> AfterValidator:
    """Refuses a text that Kubernetes would, in plain words."""

    def check(text: str) -> str:
        if len(text) > longest or not re.fullmatch(pattern, text):
            raise ValueError(f"should be {meaning}, with at most {longest} characters")
        return text

    return AfterValidator(check)


_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_QUALIFIED = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_OF_NAMES = "small letters, digits and dashes between them"
Name = Annotated[str, _form(r"[a-z]([-a-z0-9]*[a-z0-9])?", 40, f"{_OF_NAMES}, with a letter first")]
"""A name that Kubernetes takes for a service too (DNS-1035), with room for what is added to it."""
Namespace = Annotated[str, _form(_LABEL, 63, _OF_NAMES)]
ObjectName = Annotated[
    str, _form(rf"{_LABEL}(\.{_LABEL})*", 253, "small letters, digits, and dashes or dots between them")
]
"""The name of something that is there already, such as a Secret."""
LabelKey = Annotated[
    str,
    _form(rf"({_LABEL}(\.{_LABEL})*/)?(?=.{{1,63}}$){_QUALIFIED}", 317, "a label's name, such as example.com/pool"),
]
LabelValue = Annotated[
    str,
    _form(rf"({_QUALIFIED})?", 63, "a label's value: letters, digits, and dashes, dots or underscores between them"),
]
Labels = dict[LabelKey, LabelValue]
Image = Annotated[str, _form(r"\S+", 1000, "a container image without spaces")]
Mount = Annotated[str, _form(r"/[^:]*", 1000, "an absolute path without a colon")]
Store = Annotated[
    str, _form(r"(?!file:)[a-z][a-z0-9+.-]*://\S+", 1000, "the address of a store, such as s3://bucket/mlflow")
]
Host = Annotated[
    str, _form(r"[^\s,/]+", 300, "a host's name as clients give it, such as mlflow.example.com or HOST:PORT")
]
Address = Annotated[str, _form(r"https?://[^\s/]+\S*", 1000, "an address that begins with http:// or https://")]
Nodes = Annotated[Whole, Field(ge=0, le=100_000)]


def _how_many(value: Any) -> str:
    return "<several>" if isinstance(value, list | tuple) else "<one>"


Range = Annotated[
    Annotated[Nodes, Tag("<one>")] | Annotated[tuple[Nodes, Nodes], Tag("<several>")], Discriminator(_how_many)
]


class Toleration(Section):
    """A taint of nodes that pods of a pool accept."""

    key: LabelKey
    operator: Literal["Exists", "Equal"] = "Exists"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] | None = None

    @model_validator(mode="after")
    def _compared(self) -> "Toleration":
        if self.value is not None and self.operator == "Exists":
            raise ValueError("a value goes with operator: Equal: Exists asks for the key alone")
        return self


class Pool(Section):
    """Nodes of one kind; on Kubernetes a pod takes a whole node of trainers, or its share of another."""

    device: Text | None = Field(None, description="H100, H200, B200, A100, L40S, MI300X, ...; none: no accelerator")
    nodes: Range = Field(1, description="how many, or [least, most] between which the autoscaler moves")
    devices_per_node: Whole = Field(8, ge=1, le=64)
    cpus: Cpus = Field(16.0, gt=0, description="of a node, for Ray")
    memory_gib: Count = Field(64, description="of a node's memory, for Ray; /dev/shm is a part of it")
    scratch_gib: Count = Field(100, description="of a node's own disk, for spilled objects and copies of checkpoints")
    spot: bool = Field(False, description="nodes that the provider may take back at short notice")
    notice_seconds: Seconds | None = Field(
        None, description="between that notice and the end, such as 120 at AWS, 30 at GCP and Azure; none: no notice"
    )
    device_hour_usd: Real | None = Field(None, ge=0, le=1e6, description="price of a device's hour")
    node_selector: Labels = Field(default_factory=dict, description="labels that its nodes have")
    tolerations: list[Toleration] = Field(default_factory=list)
    instance: Text | None = Field(None, description="machine type of a cloud, for VMs: p5.48xlarge, a3-highgpu-8g")

    @field_validator("device")
    @classmethod
    def _known(cls, device: str | None) -> str | None:
        if device is None:
            return None
        try:
            return device_named(device).name
        except ClusterError as error:
            raise ValueError(str(error)) from None

    @field_validator("nodes")
    @classmethod
    def _ordered(cls, nodes: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(nodes, int) and nodes[0] > nodes[1]:
            raise ValueError("should be [least, most]")
        return nodes

    @model_validator(mode="after")
    def _spot_has_notice(self) -> "Pool":
        if self.spot and self.notice_seconds is None:
            raise ValueError("spot nodes need notice_seconds: AWS gives 120, GCP and Azure 30")
        return self

    @property
    def accelerator(self) -> Device | None:
        """Its device, with figures."""
        return device_named(self.device) if self.device else None

    @property
    def devices(self) -> int:
        """Of a node."""
        return self.devices_per_node if self.device else 0

    @property
    def least_nodes(self) -> int:
        return self.nodes if isinstance(self.nodes, int) else self.nodes[0]

    @property
    def most_nodes(self) -> int:
        return self.nodes if isinstance(self.nodes, int) else self.nodes[1]


class TrainerPool(Pool):
    """The nodes that train."""

    device: Text | None = Field(description="H100, H200, B200, A100, L40S, MI300X, or `null` for CPUs")


class HeadSection(Section):
    """The node of Ray's head, of the driver and of the dashboard: no accelerator, never spot."""

    cpus: Cpus = Field(8.0, gt=0)
    memory_gib: Count = Field(32, ge=16, description="the head's own tables grow with jobs and events: at least 16")
    scratch_gib: Count = 100
    node_selector: Labels = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)
    instance: Text | None = Field(None, description="machine type of a cloud, for VMs")


class ReliabilitySection(Section):
    """How often devices fail, and what a failure costs beside the steps that are done again."""

    device_hours: Real = Field(
        8_090.0, gt=0, le=1e9, description="of a device between failures: 8,090 is one every 7.9 h of 1,024 devices"
    )
    detect_seconds: Real = Field(30.0, ge=0, le=1e5, description="until a failure ends the workers")
    start_seconds: Real = Field(180.0, ge=0, le=1e5, description="of a start of the workers, to their first step")


class LinksSection(Section):
    """What connects the nodes of trainers."""

    nics: Whole = Field(1, ge=1, le=64, description="network cards of a node that NCCL may use")
    nic_gbit: Real = Field(100.0, gt=0, le=10_000, description="Gbit/s of each, such as 400 for NDR InfiniBand")
    measured_gb_s: Real | None = Field(
        None, gt=0, le=1e5, description="bus bandwidth of an all-reduce over all nodes, as preflight prints; none: "
        "0.925 of the cards"
    )  # fmt: skip
    socket_interface: Text | None = Field(None, description="NCCL_SOCKET_IFNAME, such as =eth0")
    ib_hca: Text | None = Field(None, description="NCCL_IB_HCA, such as =mlx5_0,mlx5_1")
    ib_gid_index: Whole | None = Field(None, ge=0, le=255, description="NCCL_IB_GID_INDEX, for RoCE")
    ib_traffic_class: Whole | None = Field(None, ge=0, le=255, description="NCCL_IB_TC, for RoCE")
    resource: LabelKey | None = Field(
        None,
        description="the cards' resource in Kubernetes, such as rdma/hca_shared_devices_a or vpc.amazonaws.com/efa",
    )
    host_network: bool = Field(False, description="pods use their node's network, where cards are no resource")

    @property
    def efa(self) -> bool:
        """Whether they are AWS's, which NCCL reaches through libfabric."""
        return self.resource == "vpc.amazonaws.com/efa"

    @property
    def bus_bandwidth(self) -> float:
        """Bytes/s of bus bandwidth that a collective over all nodes reaches."""
        return (self.measured_gb_s or self.nics * self.nic_gbit / 8 * _OF_CARDS) * 1e9


_OF_CARDS = 0.925
"""Share of its cards' rate that an all-reduce over nodes reaches: 370 GB/s of eight NDR cards' 400."""


class StorageSection(Section):
    """What all nodes see, and how fast it is."""

    claim: ObjectName | None = Field(
        "training", description="PersistentVolumeClaim of the shared folders; none: no claim"
    )
    mount: Mount = Field("/shared", description="where nodes see it")
    scratch: Mount = Field("/scratch", description="where a node's own disk is")
    scratch_class: ObjectName | None = Field(
        None, description="StorageClass of scratch; none: the node's own disk, as an emptyDir"
    )
    read_gb_s: Real = Field(10.0, gt=0, le=1e5, description="GB/s that all nodes together read")
    write_gb_s: Real = Field(10.0, gt=0, le=1e5, description="GB/s that all nodes together write")
    endpoint: Address | None = Field(None, description="URL of the object store where it is not AWS's")
    region: Text | None = None

    @model_validator(mode="after")
    def _apart(self) -> "StorageSection":
        places = [one.rstrip("/") for one in (self.mount, self.scratch, *_PODS_OWN)]
        if len(set(places)) < len(places) or "" in places:
            raise ValueError(
                f"mount={self.mount} and scratch={self.scratch} should be folders of their own, neither / nor "
                f"{' nor '.join(_PODS_OWN)}"
            )
        return self


_PODS_OWN = ("/tmp/ray", "/etc/domainshuttle")
"""Where pods mount what is neither shared nor scratch."""


class QueueSection(Section):
    """Who decides when a job begins."""

    kind: Literal["kueue", "volcano", "yunikorn"]
    name: LabelValue = Field(min_length=1, description="of the LocalQueue, or queue")
    priority_class: LabelValue | None = None
    topology: LabelKey | None = Field(
        None, description="Kueue: label of the topology's level; Volcano: highest tier, such as 2"
    )
    topology_mode: Literal["required", "preferred"] = Field(
        "preferred", description="whether trainers wait until they fit into one domain of that level"
    )
    elastic: bool = Field(False, description="Kueue from 0.18: jobs may grow and shrink while they run")

    @model_validator(mode="after")
    def _fits(self) -> "QueueSection":
        if self.kind != "kueue" and self.elastic:
            raise ValueError("elastic is Kueue's: leave it out, or set kind: kueue")
        if self.kind == "yunikorn" and self.topology is not None:
            raise ValueError("topology is Kueue's and Volcano's: leave it out, or set kind: kueue")
        if self.kind == "volcano" and self.topology is not None and not self.topology.isdigit():
            raise ValueError("topology of Volcano is a tier, such as 2")
        return self


class KubernetesSection(Section):
    """How the cluster is managed by KubeRay."""

    namespace: Namespace = "training"
    operator_namespace: Namespace = Field("kuberay-system", description="where KubeRay's operator runs")
    queue: QueueSection | None = Field(None, description="none: Kubernetes' own scheduler, which can't hold back a job")
    service_account: ObjectName | None = None
    image_pull_secret: ObjectName | None = None
    secrets: list[ObjectName] = Field(
        default_factory=list, description="Secrets whose keys are the pods' environment: AWS_..., MLFLOW_..., HF_TOKEN"
    )
    retries: Whole = Field(3, ge=0, le=100, description="new Ray clusters that a failed job gets")
    deadline_hours: Real | None = Field(
        None, gt=0, le=1e5, description="the job fails after so long, without a checkpoint; none: no limit"
    )
    keep_seconds: Whole = Field(600, ge=0, le=10_000_000, description="that a finished job's cluster is kept")
    drain_seconds: Seconds | None = Field(
        None, description="between the notice of a pod's end and the kill: two steps and a save; none: as predicted"
    )
    log_sidecar: bool = Field(True, description="a container beside Ray's that prints what Ray writes to files")
    log_image: Image = "fluent/fluent-bit:3.2.4"


class VmSection(Section):
    """Nodes that Ray's own launcher starts, or reaches by SSH."""

    provider: Literal["local", "aws", "gcp"] = "local"
    head_ip: Text | None = Field(None, description="local: address of the head")
    worker_ips: list[Text] = Field(default_factory=list, description="local: addresses of the other nodes")
    region: Text | None = Field(None, description="aws, gcp: such as us-east-1")
    zone: Text | None = Field(None, description="aws, gcp: such as us-east-1a")
    project: Text | None = Field(None, description="gcp: project id")
    ssh_user: Text = "ubuntu"
    ssh_key: Text | None = Field(None, description="private key; none: the SSH agent's, or the launcher's own")

    @model_validator(mode="after")
    def _complete(self) -> "VmSection":
        needs = {"local": ("head_ip", "worker_ips"), "aws": ("region",), "gcp": ("region", "zone", "project")}
        if missing := [name for name in needs[self.provider] if not getattr(self, name)]:
            raise ValueError(f"provider {self.provider} needs {' and '.join(missing)}")
        return self


class PostgresSection(Section):
    """A PostgreSQL of the cluster's own for MLflow, of one pod: for those who have no managed one."""

    image: Image = Field("postgres:17", description="container image, by digest: postgres@sha256:...")
    storage_gib: Count = Field(50, description="of its volume")
    storage_class: ObjectName | None = Field(
        None, description="StorageClass of its volume; none: the cluster's default"
    )
    memory_gib: Count = 4
    cpus: Cpus = Field(2.0, gt=0)


class MlflowSection(Section):
    """The tracking server that is rendered beside the jobs."""

    name: Name = "mlflow"
    image: Image | None = Field(None, description="none: the jobs' image, which has MLflow")
    artifacts: Store = Field(description="where files go: s3://bucket/mlflow")
    database_secret: ObjectName = Field("mlflow-database", description="Secret whose key `uri` is the PostgreSQL URI")
    postgres: PostgresSection | None = Field(
        None, description="a PostgreSQL beside the server; none: that of database_secret's uri exists already"
    )
    auth_secret: ObjectName | None = Field(
        None, description="Secret with MLFLOW_AUTH_ADMIN_PASSWORD and MLFLOW_FLASK_SERVER_SECRET_KEY; none: no login"
    )
    hosts: list[Host] = Field(
        default_factory=list, description="other names by which clients call it, as of an ingress"
    )
    workers: Whole = Field(4, ge=1, le=64)
    pool_size: Whole = Field(5, ge=1, le=1000, description="connections to the database that each worker keeps")
    artifacts_secrets: list[ObjectName] = Field(default_factory=list, description="Secrets with the store's keys")


class MonitoringSection(Section):
    """Where metrics go, and from what on somebody is called."""

    namespace: Namespace | None = Field(None, description="of the Prometheus that scrapes; none: from everywhere")
    labels: Labels = Field(
        default_factory=lambda: {"release": "prometheus"}, description="by which it selects monitors and rules"
    )
    prometheus_url: Address | None = Field(None, description="for Ray's dashboard")
    grafana_url: Address | None = Field(None, description="for Ray's dashboard: as the pods reach it")
    grafana_page_url: Address | None = Field(None, description="the same, as browsers reach it; none: grafana_url")
    no_step_minutes: Real = Field(30.0, gt=0, le=1e5)
    mfu_drop: Real = Field(0.15, gt=0, lt=1, description="share below the usual MFU")
    data_wait: Real = Field(0.05, gt=0, lt=1, description="share of time that is spent waiting for data")
    goodput: Real = Field(0.85, gt=0, lt=1, description="share of device-hours that went into steps that count")
    slow_rank: Real = Field(1.15, gt=1, le=100, description="how much slower a rank's matrix products may be")
    budget: Real = Field(0.9, gt=0, le=1, description="share of budget_gpu_hours that is used")


class ClusterSpec(Section):
    """A cluster: what it has, and how it is managed."""

    name: Name
    trainers: TrainerPool
    encoders: Pool | None = Field(None, description="cheaper nodes that encode corpora; none: the trainers' nodes do")
    evaluators: Pool | None = Field(None, description="cheaper nodes that evaluate; none: the trainers' nodes do")
    head: HeadSection = HeadSection()
    links: LinksSection = LinksSection()
    reliability: ReliabilitySection = ReliabilitySection()
    storage: StorageSection = StorageSection()
    image: Image = Field("domainshuttle:latest", description="container image, by digest: REPOSITORY@sha256:...")
    kubernetes: KubernetesSection = KubernetesSection()
    vm: VmSection | None = None
    mlflow: MlflowSection | None = None
    monitoring: MonitoringSection = MonitoringSection()

    @model_validator(mode="after")
    def _has_trainers(self) -> "ClusterSpec":
        if not self.trainers.most_nodes:
            raise ValueError("trainers.nodes: at least one")
        return self

    @property
    def device(self) -> Device:
        """The trainers' device. Raises ClusterError where they have none."""
        if self.trainers.accelerator is None:
            raise ClusterError(
                f"cluster {self.name}: trainers.device is null: name the device to plan for, such as H100"
            )
        return self.trainers.accelerator

    @property
    def pools(self) -> dict[str, Pool]:
        """The pools that have nodes, by the name of their worker group."""
        found = {"trainers": self.trainers, "encoders": self.encoders, "evaluators": self.evaluators}
        return {name: pool for name, pool in found.items() if pool is not None and pool.most_nodes}

    @property
    def most_devices(self) -> int:
        """Of the trainers, with all their nodes."""
        return self.trainers.devices * self.trainers.most_nodes
