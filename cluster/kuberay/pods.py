"""The pods of a Ray cluster: their containers, environment, volumes and places."""

from typing import Any

from domainshuttle.cluster.local import ClusterError
from domainshuttle.cluster.spec import ClusterSpec, HeadSection, Pool

Manifest = dict[str, Any]

RUN_LABEL = "domainshuttle.io/run"
POOL_LABEL = "domainshuttle.io/pool"
"""Label of pods, and of Ray's nodes: of which pool they are."""
CONFIG_FOLDER = "/etc/domainshuttle"
UID = 1000
"""The image's user."""
_KEEP = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""Annotations that keep the autoscalers of nodes from moving a pod."""


def grace_seconds(drain: float) -> int:
    """Kubernetes' seconds between SIGTERM and SIGKILL: as long as Ray drains, Ray needs more to end."""
    return round(drain) + 30


def head_pod(spec: ClusterSpec, run: str, drain: float, config_map: str | None) -> Manifest:
    """The template of the head's pod, with the driver of the run, whose configuration is in `config_map`."""
    head = spec.head
    monitoring = spec.monitoring
    more = {
        # the dashboard keeps events of all tasks otherwise, until the head is out of memory
        "RAY_DASHBOARD_MAX_EVENTS_TO_CACHE": "10000",
        "RAY_PROMETHEUS_HOST": monitoring.prometheus_url,
        "RAY_GRAFANA_HOST": monitoring.grafana_url,
        "RAY_GRAFANA_IFRAME_HOST": monitoring.grafana_page_url or monitoring.grafana_url,
    }
    container = _container(spec, "ray-head", drain, {name: value for name, value in more.items() if value})
    container["resources"] = _resources({"cpu": head.cpus, "memory": f"{head.memory_gib}Gi"})
    container["ports"] = [
        {"name": name, "containerPort": port}
        for name, port in (("gcs-server", 6379), ("dashboard", 8265), ("client", 10001), ("metrics", 8080),
                           ("as-metrics", 44217), ("dash-metrics", 44227))
    ]  # fmt: skip
    template = _pod(spec, container, head, run, "head", drain, _KEEP)
    if config_map:
        template["spec"]["volumes"].append({"name": "run", "configMap": {"name": config_map}})
        container["volumeMounts"].append({"name": "run", "mountPath": CONFIG_FOLDER, "readOnly": True})
    return template


def worker_pod(spec: ClusterSpec, name: str, pool: Pool, run: str, drain: float) -> Manifest:
    """The template of a pool's pods, each of which takes a node of it."""
    container = _container(spec, "ray-worker", drain, nccl_environment(spec) if name == "trainers" else {})
    needs: dict[str, Any] = {"cpu": pool.cpus, "memory": f"{pool.memory_gib}Gi"}
    if (device := pool.accelerator) is not None:
        if device.plan_only:
            raise ClusterError(
                f"{name}.device={device.name}: only `plan` knows it, there is no code that runs on it: choose another "
                f"with --cluster-set {name}.device=H100"
            )
        needs[device.resource] = pool.devices
    annotations = dict(_KEEP) if name == "trainers" else {}
    if name == "trainers" and spec.links.resource:
        needs[spec.links.resource] = spec.links.nics if spec.links.efa else 1
    if name == "trainers" and (spec.links.resource or spec.links.host_network):
        # registers memory with the cards
        container["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    queue = spec.kubernetes.queue
    if name == "trainers" and queue and queue.kind == "kueue" and queue.topology:
        annotations[f"kueue.x-k8s.io/podset-{queue.topology_mode}-topology"] = queue.topology
    container["resources"] = _resources(needs)
    container["ports"] = [{"name": "metrics", "containerPort": 8080}]
    template = _pod(spec, container, pool, run, name, drain, annotations)
    if name == "trainers" and spec.links.host_network:
        template["spec"] |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return template


def nccl_environment(spec: ClusterSpec) -> dict[str, str]:
    """NCCL's settings for the cluster's links. What helps only to search for a fault is none of them."""
    links = spec.links
    found = {
        "NCCL_DEBUG": "WARN",
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that torch's flight recorder keeps, to name the one that hangs
        "NCCL_SOCKET_IFNAME": links.socket_interface,
        "NCCL_IB_HCA": links.ib_hca,
        "NCCL_IB_GID_INDEX": None if links.ib_gid_index is None else str(links.ib_gid_index),
        "NCCL_IB_TC": None if links.ib_traffic_class is None else str(links.ib_traffic_class),
        "FI_PROVIDER": "efa" if links.efa else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def environment(spec: ClusterSpec, drain: float) -> dict[str, str]:
    """What each of Ray's nodes has, in pods and on VMs."""
    store = {"AWS_ENDPOINT_URL": spec.storage.endpoint, "AWS_REGION": spec.storage.region}
    return {
        # answers SIGTERM by draining its node for so long: workers write a checkpoint
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(round(drain)),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        # a worker without a GPU sees none of its node's
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "HF_HOME": f"{spec.storage.mount}/hub",
        **{name: value for name, value in store.items() if value},
    }


def _container(spec: ClusterSpec, name: str, drain: float, more: dict[str, str]) -> Manifest:
    variables = {**environment(spec, drain), **more}
    mounts = [
        {"name": "scratch", "mountPath": spec.storage.scratch},
        {"name": "ray", "mountPath": "/tmp/ray"},
    ]
    if spec.storage.claim:
        mounts.append({"name": "shared", "mountPath": spec.storage.mount})
    return {
        "name": name,
        "image": spec.image,
        "env": [{"name": key, "value": value} for key, value in sorted(variables.items())],
        # workers of Ray inherit them: in a job's runtime_env everybody would read them
        **({"envFrom": [{"secretRef": {"name": one}} for one in spec.kubernetes.secrets]}
           if spec.kubernetes.secrets else {}),
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip


def _pod(
    spec: ClusterSpec,
    container: Manifest,
    place: Pool | HeadSection,
    run: str,
    pool: str,
    drain: float,
    annotations: dict[str, str],
) -> Manifest:
    kubernetes, storage = spec.kubernetes, spec.storage
    containers = [container]
    if kubernetes.log_sidecar:
        containers.append(_log_sidecar(spec))
    scratch: Manifest = {"emptyDir": {"sizeLimit": f"{place.scratch_gib}Gi"}}
    if storage.scratch_class:
        claim = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": storage.scratch_class,
            "resources": {"requests": {"storage": f"{place.scratch_gib}Gi"}},
        }
        scratch = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    volumes: list[Manifest] = [{"name": "scratch", **scratch}, {"name": "ray", "emptyDir": {}}]
    if storage.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": storage.claim}})
    optional: Manifest = {
        "serviceAccountName": kubernetes.service_account,
        "imagePullSecrets": [{"name": kubernetes.image_pull_secret}] if kubernetes.image_pull_secret else None,
        "nodeSelector": place.node_selector or None,
        "tolerations": [one.model_dump(exclude_none=True) for one in place.tolerations] or None,
    }
    return {
        "metadata": {
            "labels": {RUN_LABEL: run, POOL_LABEL: pool},
            **({"annotations": annotations} if annotations else {}),
        },
        "spec": {
            "containers": containers,
            "volumes": volumes,
            # under autoscaler v2 the operator takes no other; Ray starts a node anew, not a container
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": grace_seconds(drain),
            "automountServiceAccountToken": pool == "head",  # the autoscaler asks Kubernetes for pods
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": UID,
                "runAsGroup": UID,
                "fsGroup": UID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **{key: value for key, value in optional.items() if value},
        },
    }


def _log_sidecar(spec: ClusterSpec) -> Manifest:
    """Prints what Ray writes to files, which end with the pod."""
    logs = "/tmp/ray/session_latest/logs"
    arguments = ["-i", "tail", "-p", f"path={logs}/**/*,{logs}/*", "-p", "Path_Key=file", "-p", "Refresh_Interval=5",
                 "-o", "stdout", "-p", "format=json_lines"]  # fmt: skip
    return {
        "name": "logs",
        "image": spec.kubernetes.log_image,
        "args": arguments,
        "resources": _resources({"cpu": 0.1, "memory": "128Mi"}),
        "volumeMounts": [{"name": "ray", "mountPath": "/tmp/ray", "readOnly": True}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def _resources(needs: dict[str, Any]) -> Manifest:
    """Requests that equal the limits: Ray takes its CPUs, memory and devices from the limits."""
    quantities = {name: _quantity(value) for name, value in needs.items()}
    return {"limits": quantities, "requests": dict(quantities)}


def _quantity(value: Any) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
