"""Renders a cluster's description, with a run, into files for what manages the cluster."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from domainshuttle.cluster.kuberay.manifests import ray_cluster, ray_job, require_room
from domainshuttle.cluster.kuberay.pods import Manifest
from domainshuttle.cluster.kuberay.rules import faults
from domainshuttle.cluster.local import ClusterError
from domainshuttle.cluster.mlflow.manifests import mlflow_manifests
from domainshuttle.cluster.monitoring.alerts import alert_rules
from domainshuttle.cluster.monitoring.dashboard import dashboard
from domainshuttle.cluster.monitoring.manifests import monitoring_manifests, prometheus_config
from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.cluster.vm import launcher
from domainshuttle.cluster.workload import Workload

Files = dict[str, str]
"""Texts by file name."""

_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"


def render(target: str, spec: ClusterSpec, workload: Workload) -> Files:
    """The files of a target: kuberay, mlflow, monitoring or vm. Raises ClusterError for what could not run there."""
    return TARGETS[target](spec, workload)


def _kuberay(spec: ClusterSpec, workload: Workload) -> Files:
    return {
        "rayjob.yaml": _resources(ray_job(spec, workload)),
        "raycluster.yaml": _resources(ray_cluster(spec, workload.drain_seconds)),
        **({"mlflow.yaml": _resources(mlflow_manifests(spec))} if spec.mlflow else {}),
        "monitoring.yaml": _resources(monitoring_manifests(spec)),
    }


def _mlflow(spec: ClusterSpec, workload: Workload) -> Files:
    if spec.mlflow is None:
        raise ClusterError(
            f"cluster {spec.name} has no section `mlflow`: add one, such as mlflow: {{artifacts: s3://bucket/mlflow}}"
        )
    return {"mlflow.yaml": _resources(mlflow_manifests(spec))}


def _monitoring(spec: ClusterSpec, workload: Workload) -> Files:
    return {
        "monitoring.yaml": _resources(monitoring_manifests(spec)),
        "alerts.yaml": _yaml(alert_rules(spec.monitoring)),
        "prometheus.yaml": _yaml(prometheus_config(_TARGETS, "alerts.yaml")),
        "dashboard.json": json.dumps(dashboard(), indent=2) + "\n",
    }


def _vm(spec: ClusterSpec, workload: Workload) -> Files:
    launched = launcher(spec, workload.drain_seconds)
    require_room(spec, workload)
    return {
        "cluster.yaml": _yaml(launched),
        "run.yaml": workload.config_yaml,
        **{name: text for name, text in _monitoring(spec, workload).items() if name != "monitoring.yaml"},
    }


TARGETS: dict[str, Callable[[ClusterSpec, Workload], Files]] = {
    "kuberay": _kuberay,
    "vm": _vm,
    "mlflow": _mlflow,
    "monitoring": _monitoring,
}


def _resources(manifests: Iterable[Manifest]) -> str:
    """Kubernetes' resources in one text. Raises ClusterError for what the operator would refuse."""
    wrong = [fault for manifest in manifests for fault in faults(manifest)]
    if wrong:
        raise ClusterError("KubeRay's operator would refuse it:\n  " + "\n  ".join(wrong))
    return "---\n".join(_yaml(manifest) for manifest in manifests)


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, and no anchors, which people misread."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


def _yaml(content: Any) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)
