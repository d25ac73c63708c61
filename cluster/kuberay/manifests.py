"""RayJob, RayCluster and what they need beside them, for KubeRay from 1.6."""

import shlex
from typing import Any

import yaml

from domainshuttle.cluster.kuberay.pods import (
    CONFIG_FOLDER,
    POOL_LABEL,
    RUN_LABEL,
    UID,
    Manifest,
    head_pod,
    worker_pod,
)
from domainshuttle.cluster.local import ClusterError
from domainshuttle.cluster.spec import ClusterSpec, Pool
from domainshuttle.cluster.workload import RAY_VERSION, Workload

_METRICS_PORTS = (8080, 44217, 44227)
"""Of Ray's nodes, its autoscaler and its dashboard."""
_DASHBOARD_PORTS = (8265, 52365)
"""By which the operator and the submitter speak to the cluster."""


def ray_job(spec: ClusterSpec, workload: Workload) -> list[Manifest]:
    """A run as a RayJob, with its configuration, its disruption budget and its network policy.

    Raises ClusterError where the cluster can't hold the run, or the operator would refuse it.
    """
    require_room(spec, workload)
    name, kubernetes = workload.resource_name, spec.kubernetes
    config_map = f"{name}-config"
    arguments = ["domainshuttle", "train", f"{CONFIG_FOLDER}/run.yaml", "--stopped-code", "0", *workload.options]
    job: Manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(spec, name, name),
        "spec": {
            "submissionMode": "K8sJobMode",
            "entrypoint": shlex.join(arguments),
            # what fails is tried again on a new cluster, where it goes on with its newest checkpoint
            "backoffLimit": kubernetes.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": kubernetes.keep_seconds,
            "metadata": {"run": workload.name},
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(workload.stop_seconds)}}),
            "submitterPodTemplate": _submitter(spec, name),
            "rayClusterSpec": _cluster(spec, name, workload.drain_seconds, config_map),
        },
    }
    if kubernetes.deadline_hours:
        job["spec"]["activeDeadlineSeconds"] = round(kubernetes.deadline_hours * 3600)
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _plain_metadata(spec, config_map, name),
            "data": {"run.yaml": workload.config_yaml},
        },
        job,
        *_guards(spec, name),
    ]


def ray_cluster(spec: ClusterSpec, drain: float) -> list[Manifest]:
    """A standing Ray cluster for jobs that are submitted to it."""
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(spec, spec.name, spec.name),
        "spec": _cluster(spec, spec.name, drain, None),
    }
    return [cluster, *_guards(spec, spec.name)]


def require_room(spec: ClusterSpec, workload: Workload) -> None:
    """Raises ClusterError where the most nodes of the trainers do not hold the most workers of the run."""
    trainers, most = spec.trainers, workload.workers[1]
    if workload.gpus_per_worker and not trainers.devices:
        raise ClusterError(
            f"cluster {spec.name}: trainers.device is null, and the run has cluster.gpus_per_worker="
            f"{workload.gpus_per_worker}: name a device, or --set cluster.gpus_per_worker=0"
        )
    if trainers.devices and not workload.gpus_per_worker:
        raise ClusterError(
            f"cluster {spec.name}: trainers have {trainers.device}, and the run would leave them idle with "
            "cluster.gpus_per_worker=0: give --set cluster.gpus_per_worker=1, or --cluster-set trainers.device=null"
        )
    per_node = trainers.devices // workload.gpus_per_worker if workload.gpus_per_worker else 10**6
    per_node = min(per_node, int(trainers.cpus // workload.cpus_per_worker))
    if most > (room := per_node * trainers.most_nodes):
        raise ClusterError(
            f"cluster {spec.name} holds {room} workers ({trainers.most_nodes} nodes of {per_node}), and the run asks "
            f"for {most}: raise trainers.nodes, or lower cluster.workers or cluster.cpus_per_worker"
        )
    # beside the workers: data tasks, and what encodes live
    spare = sum(pool.cpus * pool.most_nodes for pool in spec.pools.values()) - most * workload.cpus_per_worker
    if spare < 1:
        raise ClusterError(
            f"cluster {spec.name}: {most} workers take all CPUs ({most} x {workload.cpus_per_worker:g}), and data "
            "tasks need one more at least: lower cluster.cpus_per_worker, or raise trainers.cpus"
        )


def _cluster(spec: ClusterSpec, run: str, drain: float, config_map: str | None) -> Manifest:
    queue = spec.kubernetes.queue
    scales = any(pool.least_nodes != pool.most_nodes for pool in spec.pools.values())
    if scales and queue and queue.kind == "kueue" and not queue.elastic:
        ranges = [name for name, pool in spec.pools.items() if pool.least_nodes != pool.most_nodes]
        raise ClusterError(
            f"cluster {spec.name}: {' and '.join(ranges)} have a range of nodes, and Kueue admits a job that grows "
            "only with kubernetes.queue.elastic: true (Kueue from 0.18): set it, or give numbers instead of ranges"
        )
    cluster: Manifest = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # nothing is computed where the cluster's tables and the driver are
            "rayStartParams": {"num-cpus": "0", "object-spilling-directory": _spill(spec)},
            "template": head_pod(spec, run, drain, config_map),
        },
        "workerGroupSpecs": [_group(spec, name, pool, run, drain) for name, pool in spec.pools.items()],
    }
    if scales:
        cluster["enableInTreeAutoscaling"] = True
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "upscalingMode": "Default",
            "resources": {"limits": {"cpu": "1", "memory": "2Gi"}, "requests": {"cpu": "1", "memory": "2Gi"}},
        }
    return cluster


def _group(spec: ClusterSpec, name: str, pool: Pool, run: str, drain: float) -> Manifest:
    return {
        "groupName": name,
        "replicas": pool.least_nodes,
        "minReplicas": pool.least_nodes,
        "maxReplicas": pool.most_nodes,
        "numOfHosts": 1,
        "labels": {POOL_LABEL: name},
        "rayStartParams": {"object-spilling-directory": _spill(spec)},
        "template": worker_pod(spec, name, pool, run, drain),
    }


def _spill(spec: ClusterSpec) -> str:
    return f"{spec.storage.scratch}/spilled"


def _submitter(spec: ClusterSpec, run: str) -> Manifest:
    """The pod that submits the job and follows its log: small, on any node, as safe from eviction as the head."""
    resources = {"cpu": "500m", "memory": "1Gi"}
    container = {
        "name": "ray-job-submitter",
        "image": spec.image,
        "resources": {"limits": resources, "requests": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pull = spec.kubernetes.image_pull_secret
    return {
        "metadata": {
            "labels": {RUN_LABEL: run, POOL_LABEL: "submitter"},
            "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
        },
        "spec": {
            "restartPolicy": "Never",
            "containers": [container],
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": UID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **({"imagePullSecrets": [{"name": pull}]} if pull else {}),
        },
    }


def _guards(spec: ClusterSpec, run: str) -> list[Manifest]:
    """What keeps a run's pods from being moved, and others from reaching them."""
    same = {"podSelector": {"matchLabels": {RUN_LABEL: run}}}
    operator = {"namespaceSelector": {"matchLabels": _named(spec.kubernetes.operator_namespace)}}
    monitoring = spec.monitoring.namespace
    scraper = {"namespaceSelector": {"matchLabels": _named(monitoring)} if monitoring else {}}
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": _plain_metadata(spec, run, run),
            "spec": {
                "maxUnavailable": 0,
                "selector": {
                    "matchLabels": {RUN_LABEL: run},
                    "matchExpressions": [
                        {"key": POOL_LABEL, "operator": "In", "values": ["head", "trainers", "submitter"]}
                    ],
                },
            },
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _plain_metadata(spec, run, run),
            "spec": {
                "podSelector": {"matchLabels": {RUN_LABEL: run}},
                "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [same]},
                    {"from": [operator], "ports": _ports(*_DASHBOARD_PORTS)},
                    {"from": [scraper], "ports": _ports(*_METRICS_PORTS)},
                ],
            },
        },
    ]


def _ports(*numbers: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": number} for number in numbers]


def _named(namespace: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": namespace}


def _plain_metadata(spec: ClusterSpec, name: str, run: str) -> Manifest:
    return {"name": name, "namespace": spec.kubernetes.namespace, "labels": {RUN_LABEL: run}}


def _metadata(spec: ClusterSpec, name: str, run: str) -> Manifest:
    """With what the queue's scheduler reads."""
    metadata, queue = _plain_metadata(spec, name, run), spec.kubernetes.queue
    if queue is None:
        return metadata
    labels: dict[str, str | None] = {}
    if queue.kind == "kueue":
        labels = {"kueue.x-k8s.io/queue-name": queue.name, "kueue.x-k8s.io/priority-class": queue.priority_class}
        if queue.elastic:
            metadata["annotations"] = {"kueue.x-k8s.io/elastic-job": "true"}
    elif queue.kind == "volcano":
        mode = {"required": "hard", "preferred": "soft"}[queue.topology_mode]
        labels = {
            "volcano.sh/queue-name": queue.name,
            "ray.io/priority-class-name": queue.priority_class,
            "volcano.sh/network-topology-mode": mode if queue.topology else None,
            "volcano.sh/network-topology-highest-tier-allowed": queue.topology,
        }
    else:
        labels = {
            "ray.io/gang-scheduling-enabled": "true",
            "yunikorn.apache.org/app-id": name,
            "yunikorn.apache.org/queue": queue.name,
        }
    metadata["labels"] |= {key: value for key, value in labels.items() if value}
    return metadata
