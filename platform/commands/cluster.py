"""Manifests of a cluster, with a run on it, and checks of such that others have changed."""

import math
import shlex
from collections.abc import Collection
from pathlib import Path

import yaml

from domainshuttle.cluster.kuberay.pods import POOL_LABEL
from domainshuttle.cluster.kuberay.rules import faults, manifests_of
from domainshuttle.cluster.mlflow.manifests import PORT
from domainshuttle.cluster.render import render
from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.cluster.workload import Workload
from domainshuttle.pipelines.errors import counted
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.console import console
from domainshuttle.platform.report.text import Advice, Prose

_DRAIN_SECONDS = 120.0
"""Two steps of a 14B model and its save take less on 64 H100."""


def workload_of(config: RunConfig, spec: ClusterSpec, options: tuple[str, ...] = ()) -> Workload:
    """What a run asks of a cluster. Raises ConfigError where spot nodes go before their workers have saved."""
    drain = spec.kubernetes.drain_seconds or _DRAIN_SECONDS
    trainers = spec.trainers
    if trainers.spot and trainers.notice_seconds is not None and trainers.notice_seconds < drain:
        raise ConfigError(
            f"cluster {spec.name}: trainers are spot nodes that go {trainers.notice_seconds:g} s after their notice, "
            f"and two steps and a save take {drain:g} s: use other nodes, or set kubernetes.drain_seconds"
        )
    cluster = config.cluster
    if len(spec.pools) > 1 and not cluster.node_labels:
        # the other pools have devices too, which workers must not take
        cluster = cluster.model_copy(update={"node_labels": {POOL_LABEL: "trainers"}})
        config = config.model_copy(update={"cluster": cluster})
    return Workload(
        name=config.name,
        config_yaml=config.to_yaml(),
        workers=(cluster.least_workers, cluster.most_workers),
        cpus_per_worker=cluster.cpus_per_worker,
        gpus_per_worker=cluster.gpus_per_worker,
        stop_seconds=math.ceil(config.grace_seconds),
        drain_seconds=drain,
        options=options,
    )


def _require_shared(config: RunConfig, spec: ClusterSpec) -> None:
    """Raises ConfigError for places that containers do not see: a run there would end with its pod, or find no data."""
    places = {
        "data": config.data,
        "output": config.output,
        "checkpoint.store": config.checkpoint.store,
        "model.base": config.model.base,
        "encoders.video": config.encoders.video,
        "encoders.text": config.encoders.text,
        **{f"experts.{expert.name}.base": expert.base for expert in config.experts},
    }
    mount = spec.storage.mount
    outside = {
        key: place
        for key, place in places.items()
        if place and place.startswith("/") and not Path(place).is_relative_to(mount)
    }
    if outside:
        raise ConfigError(
            f"containers of cluster {spec.name} see {mount} (storage.mount) and stores, but not "
            f"{', '.join(f'{key}={place}' for key, place in outside.items())}: give "
            + " ".join(f"--set {key}={shlex.quote(str(Path(mount) / key.rpartition('.')[2]))}" for key in outside)
        )


def render_cluster(target: str, config: RunConfig, spec: ClusterSpec, out: Path) -> None:
    """Writes the files of a target (cluster/render.py) into a folder, and says what comes next.

    Raises ConfigError for a run whose places are not there.
    """
    if target in ("kuberay", "vm"):
        _require_shared(config, spec)
    files = render(target, spec, workload_of(config, spec))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_file(out / name) as path:
            path.write_text(text)
        console.print(Prose(f"Wrote {out / name}"))
    if "@sha256:" not in spec.image and target in ("kuberay", "vm"):
        console.print(
            Prose(
                f"image: {spec.image} is a tag, which may name another image tomorrow: give its digest "
                "(REPOSITORY@sha256:...)"
            )
        )
    if spec.mlflow and config.tracking.uri is None and target in ("kuberay", "mlflow"):
        console.print(
            Prose(
                f"tracking.uri is not set: the run's numbers go into {config.output}/mlflow.db, not to the rendered "
                f"MLflow: --set tracking.uri=http://{spec.mlflow.name}:{PORT}"
            )
        )
    console.print(Advice("Next:", _next(target, files, out)))


_APPLIED = ("mlflow.yaml", "monitoring.yaml", "rayjob.yaml")
"""Files of Kubernetes, in the order in which they are needed."""


def _next(target: str, files: Collection[str], out: Path) -> str:
    if target == "vm":
        return f"ray up {shlex.quote(str(out / 'cluster.yaml'))}"
    return "kubectl apply --server-side " + " ".join(
        f"-f {shlex.quote(str(out / name))}" for name in _APPLIED if name in files
    )


def check_manifests(paths: list[Path]) -> bool:
    """Prints what KubeRay's operator would refuse of the RayJobs and RayClusters in files; whether there is nothing.

    Raises ConfigError where a file can't be read, and where no file has any of these.
    """
    found, checked = [], 0
    for path in paths:
        try:
            manifests = manifests_of(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        checked += sum(manifest.get("kind") in ("RayJob", "RayCluster") for manifest in manifests)
        found += [f"{path}: {fault}" for manifest in manifests for fault in faults(manifest)]
    if not checked:
        raise ConfigError(f"{', '.join(map(str, paths))}: no RayJob and no RayCluster is there, so nothing was checked")
    for fault in found:
        console.print(Prose(fault))
    console.print(Prose(f"{checked} of KubeRay's resources checked, {counted(len(found), 'fault')}"))
    return not found
