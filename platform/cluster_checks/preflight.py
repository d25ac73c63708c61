"""All checks of a cluster for a run, in order: what nodes are, what they share, what a run needs, what they can do."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.pipelines.errors import counted
from domainshuttle.platform.cluster_checks.findings import Finding, failed, failure, warning
from domainshuttle.platform.cluster_checks.group import check_group
from domainshuttle.platform.cluster_checks.node_facts import node_facts, versions
from domainshuttle.platform.cluster_checks.node_rules import judged
from domainshuttle.platform.cluster_checks.services import check_services
from domainshuttle.platform.cluster_checks.storage import check_storage
from domainshuttle.platform.cluster_checks.tasks import Nodes
from domainshuttle.platform.config.schema import RunConfig

PARTS = ("nodes", "storage", "services", "group")


def run_checks(
    config: RunConfig,
    spec: ClusterSpec | None = None,
    parts: Sequence[str] = PARTS,
    echo: Callable[[str], None] = lambda text: None,
    seconds: float = 300.0,
) -> list[Finding]:
    """The findings of the chosen parts on the connected cluster. `seconds` is what one part may take on a node.

    The group is left out where a check before it failed: it would fail for the same.
    """
    nodes = Nodes(seconds)
    findings: list[Finding] = []
    echo(f"Preflight of {counted(len(nodes.ids), 'node')}")
    if "nodes" in parts:
        findings += _check_nodes(config, spec, nodes)
    if "storage" in parts:
        findings += check_storage(nodes, _places(config))
    if "services" in parts:
        findings += check_services(config)
    if "group" in parts:
        if failed(findings):
            findings.append(warning("trial steps", "left out, since checks before it failed", "", "mend those first"))
        else:
            workers = counted(config.cluster.least_workers, "worker")
            echo(f"Trial group of {workers}: collectives, two steps of the largest batch")
            findings += check_group(config, spec, nodes.named, max(seconds, 600.0))
    return findings


def _check_nodes(config: RunConfig, spec: ClusterSpec | None, nodes: Nodes) -> list[Finding]:
    folders = [config.output, *([config.checkpoint.scratch] if config.checkpoint.scratch else [])]
    hosts = sorted({host for host in map(_host, (config.tracking_uri, os.environ.get("AWS_ENDPOINT_URL"))) if host})
    wanted = config.cluster.gpus_per_worker > 0
    # GPUs of other pools are not this run's, and may be at work for another
    trainers = nodes.labelled(config.cluster.node_labels) if wanted else []
    before = time.time()
    arguments = {node: (folders, hosts, nodes.gpus(node) if node in trainers else 0) for node in nodes.ids}
    facts = list(nodes.each(node_facts, arguments, trainers).values())
    pool = spec.trainers if spec and wanted else None
    asked = before, time.time()
    findings = judged(facts, versions(), asked, pool.devices if pool else 0, pool.accelerator if pool else None)
    if wanted and not any(node.gpus for node in facts):
        findings.append(failure("GPUs", "no node has one", "", "add some, or --set cluster.gpus_per_worker=0"))
    return findings


def _places(config: RunConfig) -> dict[str, str]:
    places = {"runs": config.output}
    if config.checkpoint.store:
        places["checkpoints"] = config.checkpoint.store
    return {purpose: str(Path(place)) if "://" not in place else place for purpose, place in places.items()}


def _host(uri: str | None) -> str | None:
    parts = urlsplit(uri or "")
    return parts.hostname if parts.scheme in ("http", "https") else None
