"""What scrapes and watches the metrics: PodMonitors, a PrometheusRule and a dashboard, or Prometheus' own files."""

import json

from domainshuttle.cluster.kuberay.pods import Manifest
from domainshuttle.cluster.monitoring.alerts import alert_rules
from domainshuttle.cluster.monitoring.dashboard import dashboard
from domainshuttle.cluster.spec import ClusterSpec


def monitoring_manifests(spec: ClusterSpec) -> list[Manifest]:
    """For a Prometheus that its operator manages, and a Grafana whose sidecar loads labelled ConfigMaps."""
    head = ("metrics", "as-metrics", "dash-metrics")
    return [
        _pod_monitor(spec, "head", head),
        _pod_monitor(spec, "worker", ("metrics",)),
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": _metadata(spec, "domainshuttle"),
            "spec": alert_rules(spec.monitoring),
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                **_metadata(spec, "domainshuttle-dashboard"),
                "labels": {"grafana_dashboard": "1"},
            },
            "data": {"domainshuttle.json": json.dumps(dashboard())},
        },
    ]


def _pod_monitor(spec: ClusterSpec, node_type: str, ports: tuple[str, ...]) -> Manifest:
    labels = [
        {"sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": target}
        for label, target in (("ray_io_cluster", "ray_io_cluster"), ("domainshuttle_io_pool", "pool"))
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata(spec, f"domainshuttle-ray-{node_type}"),
        "spec": {
            "namespaceSelector": {"matchNames": [spec.kubernetes.namespace]},
            "selector": {"matchLabels": {"ray.io/node-type": node_type}},
            "podMetricsEndpoints": [{"port": port, "interval": "30s", "relabelings": labels} for port in ports],
        },
    }


def _metadata(spec: ClusterSpec, name: str) -> Manifest:
    return {"name": name, "namespace": spec.kubernetes.namespace, "labels": dict(spec.monitoring.labels)}


def prometheus_config(targets_file: str, rules_file: str, interval: str = "30s") -> Manifest:
    """Prometheus' own configuration for nodes that Ray lists in its `prom_metrics_service_discovery.json`."""
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [rules_file],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [targets_file]}]}],
    }
