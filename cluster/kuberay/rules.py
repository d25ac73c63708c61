"""What KubeRay's operator refuses although the schema of its resources accepts it, and what Kueue would.

Read in KubeRay 1.7 (`ray-operator/controllers/ray/utils/validation.go`) and Kueue 0.19. Each fault is one line: where,
what, and what to do. The operator itself says so only in the events of a resource that is already created, or at the
end of a queue.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import yaml

from domainshuttle.cluster.kuberay.pods import Manifest

LONGEST_NAMES = {"RayJob": 47, "RayCluster": 53}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUEUE = "kueue.x-k8s.io/queue-name"
_MOST_POD_SETS = 18
_GATED = {
    "networkPolicy": ("RayClusterNetworkPolicy", "use a plain networking.k8s.io/v1 NetworkPolicy"),
    "tlsOptions": ("RayClusterMTLS", "encrypt the nodes' network, or use a service mesh"),
    "historyServerOptions": ("RayClusterHistoryServer", "keep logs with a sidecar"),
}
"""Fields behind feature gates that are off."""
_SECRET = re.compile(r"(?i)(secret|token|passw|credential|access_?key|api_?key)")
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def faults(manifest: Mapping[str, Any]) -> list[str]:
    """Every fault of a RayJob or RayCluster; none for a resource of another kind."""
    kind = str(manifest.get("kind"))
    if kind not in LONGEST_NAMES:
        return []
    name = str(_at(manifest, "metadata").get("name", ""))
    manifest = _without_nulls(manifest)
    wrong = [*_shapes(manifest, "")]  # the rules read on only where these are right
    return [f"{kind} {name}: {fault}" for fault in wrong or (*_named(kind, name), *_of_kind[kind](manifest))]


def _without_nulls(content: Any) -> Any:
    """What Kubernetes makes of a key without a value: it is not there."""
    if isinstance(content, dict):
        return {key: _without_nulls(value) for key, value in content.items() if value is not None}
    return [_without_nulls(one) for one in content] if isinstance(content, list) else content


_ENTRIES = ("workerGroupSpecs", "containers", "env", "deletionRules")
"""Lists of mappings."""
_SHAPES: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (
        dict, "keys with values",
        ("metadata", "spec", "labels", "annotations", "rayClusterSpec", "headGroupSpec", "template", "authOptions",
         "autoscalerOptions", "gcsFaultToleranceOptions", "deletionStrategy", "condition", "rayStartParams", "limits",
         "clusterSelector"),
    ),
    (list, "a list", _ENTRIES),
    (
        int, "a whole number without quotes",
        ("backoffLimit", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "minReplicas", "maxReplicas", "numOfHosts",
         "ttlSeconds", "terminationGracePeriodSeconds"),
    ),
    (str, "a text", ("name", "runtimeEnvYAML", "entrypoint", "submissionMode", "groupName", "rayVersion", "version")),
)  # fmt: skip
"""Of what the rules read: what the values of keys are."""


def _shapes(content: Any, path: str) -> Iterator[str]:
    """What is not of the kind that the schema wants."""
    for key, value in content.items():
        here = f"{path}.{key}" if path else str(key)
        for kind, meaning, keys in _SHAPES:
            if key in keys and (not isinstance(value, kind) or isinstance(value, bool)):
                yield f"{here} should be {meaning}"
        entries = value if isinstance(value, list) else []
        for number, entry in enumerate(entries):
            if isinstance(entry, dict):
                yield from _shapes(entry, f"{here}[{number}]")
            elif key in _ENTRIES:
                yield f"{here}[{number}] should be keys with values"
        if isinstance(value, dict) and key not in _OF_OTHERS:
            yield from _shapes(value, here)


_OF_OTHERS = ("rayStartParams", "labels", "annotations", "limits", "requests", "nodeSelector")
"""Mappings whose keys are their owner's."""


def _named(kind: str, name: str) -> Iterator[str]:
    if not _DNS_1035.fullmatch(name) or len(name) > LONGEST_NAMES[kind]:
        yield (
            f"metadata.name should be small letters, digits and dashes, begin with a letter, and have at most "
            f"{LONGEST_NAMES[kind]} characters (it has {len(name)}): choose another"
        )


def _job_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    spec, queued = manifest.get("spec") or {}, _queued(manifest)
    mode, selected = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    shuts_down, cluster = spec.get("shutdownAfterJobFinishes", False), spec.get("rayClusterSpec")
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules") or []
    if mode not in (modes := ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")):
        yield f"spec.submissionMode {mode!r} is none of {', '.join(modes)}"
    if not selected and not cluster:
        yield "spec has neither rayClusterSpec nor clusterSelector: give one"
    if spec.get("backoffLimit", 0) < 0:
        yield "spec.backoffLimit is below 0"
    if spec.get("backoffLimit", 0) > 0 and selected:
        yield "spec.backoffLimit needs a cluster of its own for each try: leave it out beside clusterSelector"
    if spec.get("backoffLimit", 0) > 0 and mode == "InteractiveMode":
        yield "spec.backoffLimit: nothing is submitted again in InteractiveMode: leave it out"
    if mode == "InteractiveMode" and spec.get("entrypoint"):
        yield "spec.entrypoint: InteractiveMode has none: leave it out"
    if mode != "InteractiveMode" and not spec.get("entrypoint"):
        yield "spec.entrypoint is missing: give the command, such as domainshuttle train run.yaml"
    if mode == "SidecarMode":
        yield from _sidecar_faults(spec)
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "spec.ttlSecondsAfterFinished is below 0"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
        yield "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if spec.get("activeDeadlineSeconds") is not None and spec["activeDeadlineSeconds"] <= 0:
        yield "spec.activeDeadlineSeconds should be above 0"
    if spec.get("suspend"):
        if not shuts_down:
            yield "spec.suspend needs shutdownAfterJobFinishes: true"
        if selected:
            yield "spec.suspend: a job of clusterSelector can't be suspended"
    if rules and shuts_down:
        yield "spec.deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other: keep one"
    if rules and selected:
        yield "spec.deletionStrategy.deletionRules: the cluster of clusterSelector is not this job's to delete"
    yield from _ttl_faults(rules)
    if queued:
        if not shuts_down:
            yield f"spec.shutdownAfterJobFinishes: Kueue ({_QUEUE}) admits only jobs that have it true"
        if selected:
            yield f"spec.clusterSelector: Kueue ignores such jobs, although {_QUEUE} is set: give rayClusterSpec"
    if cluster and (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth is not for RayJobs: leave it out"
    yield from _secret_faults(spec.get("runtimeEnvYAML"))
    if cluster:
        submitter = mode == "K8sJobMode"
        yield from _cluster_faults(cluster, "spec.rayClusterSpec", queued, submitter, _elastic(manifest))


def _sidecar_faults(spec: Mapping[str, Any]) -> Iterator[str]:
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field):
            yield f"spec.{field}: in SidecarMode the submitter is a container of the head: leave it out"
    if spec.get("clusterSelector"):
        yield "spec.clusterSelector: SidecarMode needs a cluster of its own: give rayClusterSpec"
    template = _at(spec, "rayClusterSpec", "headGroupSpec", "template", "spec")
    if template.get("restartPolicy", "Always") != "Never":
        yield "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy must be Never in SidecarMode"


def _ttl_faults(rules: list[Mapping[str, Any]]) -> Iterator[str]:
    """Workers go first, then the cluster, then the job; each policy at most once a condition."""
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    for status in ("SUCCEEDED", "FAILED", "Failed"):
        chosen = [one for one in rules if status in (one.get("condition") or {}).values()]
        seconds = {str(one.get("policy")): (one["condition"].get("ttlSeconds", 0)) for one in chosen}
        if len(seconds) < len(chosen):
            yield f"spec.deletionStrategy.deletionRules has a policy twice for {status}: keep one"
        times = [(policy, seconds[policy]) for policy in order if policy in seconds]
        for (earlier, first), (later, second) in pairwise(times):
            if first > second:
                yield (
                    f"spec.deletionStrategy.deletionRules for {status}: {earlier} after {first} s comes later than "
                    f"{later} after {second} s: raise the second ttlSeconds"
                )


def _secret_faults(runtime_env: str | None) -> Iterator[str]:
    try:
        content = yaml.safe_load(runtime_env) if runtime_env else {}
    except yaml.YAMLError as error:
        yield f"spec.runtimeEnvYAML is not valid YAML: {' '.join(str(error).split())}"
        return
    if not isinstance(content, dict) or not isinstance(content.get("env_vars") or {}, dict):
        yield "spec.runtimeEnvYAML should be keys with values, env_vars too"
        return
    for name in content.get("env_vars") or {}:
        if _SECRET.search(name):
            yield (
                f"spec.runtimeEnvYAML: {name} looks like a secret, and all who may see jobs read it: put it into "
                "a Secret, and that into envFrom of the containers (kubernetes.secrets)"
            )


def _of_cluster(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield from _cluster_faults(manifest.get("spec") or {}, "spec", _queued(manifest), False, _elastic(manifest))


def _cluster_faults(
    cluster: Mapping[str, Any], path: str, queued: bool, submitter: bool, elastic: bool
) -> Iterator[str]:
    groups = cluster.get("workerGroupSpecs") or []
    scales = bool(cluster.get("enableInTreeAutoscaling"))
    for field, (gate, remedy) in _GATED.items():
        if cluster.get(field):
            yield f"{path}.{field} needs the feature gate {gate}, which is off: {remedy}"
    if (cluster.get("gcsFaultToleranceOptions") or {}).get("backend") == "rocksdb":
        yield (
            f"{path}.gcsFaultToleranceOptions.backend rocksdb needs GCSFaultToleranceEmbeddedStorage, a gate that is "
            "off: use redis"
        )
    yield from _token_faults(cluster, path)
    if queued:
        sets = len(groups) + 1 + submitter
        if sets > _MOST_POD_SETS:
            yield f"{path}.workerGroupSpecs: Kueue admits {_MOST_POD_SETS} sets of pods, these are {sets}: join groups"
        if scales and not elastic:
            yield (
                f"{path}.enableInTreeAutoscaling: Kueue admits it only with the annotation "
                'kueue.x-k8s.io/elastic-job: "true" (from 0.18): add it, or leave autoscaling out'
            )
    names = [str(group.get("groupName", "")) for group in groups]
    if len(set(names)) < len(names):
        yield f"{path}.workerGroupSpecs has a groupName twice: {', '.join(names)}"
    version = (cluster.get("autoscalerOptions") or {}).get("version", _autoscaler_of(cluster.get("rayVersion")))
    needs_never = scales and version == "v2"
    yield from _group_faults(cluster.get("headGroupSpec") or {}, f"{path}.headGroupSpec", "ray-head", needs_never)
    for number, group in enumerate(groups):
        here = f"{path}.workerGroupSpecs[{number}]"
        if missing := [one for one in ("groupName", "minReplicas", "maxReplicas", "template") if one not in group]:
            yield f"{here}: {', '.join(missing)} missing"
        if queued and group.get("groupName") == "head":
            yield f"{here}.groupName is head, as Kueue calls the head's own set: choose another"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 1 << 31):
            yield f"{here}: minReplicas {group['minReplicas']} is above maxReplicas {group['maxReplicas']}"
        if group.get("numOfHosts", 1) != 1 and _devices(group):
            yield (
                f"{here}.numOfHosts is {group['numOfHosts']}: the group has replicas x numOfHosts pods: set it to 1 "
                "and replicas to the nodes of GPUs, a pod each"
            )
        if group.get("suspend") and scales:
            yield f"{here}.suspend and autoscaling exclude each other"
        yield from _group_faults(group, here, "ray-worker", needs_never)


def _token_faults(cluster: Mapping[str, Any], path: str) -> Iterator[str]:
    options = cluster.get("authOptions") or {}
    if options.get("mode") != "token":
        yield f"{path}.authOptions.mode is not token: whoever reaches the cluster runs programs on it: set mode: token"
        return
    if not _at_least(cluster.get("rayVersion"), (2, 52)):
        yield f"{path}.rayVersion must be 2.52 or later for authOptions.mode token (it is {cluster.get('rayVersion')})"


def _group_faults(group: Mapping[str, Any], path: str, ray: str, needs_never: bool) -> Iterator[str]:
    parameters, template = group.get("rayStartParams") or {}, _at(group, "template", "spec")
    containers = template.get("containers") or []
    if not containers:
        yield f"{path}.template has no container"
        return
    named = [one.get("name") for one in containers]
    if ray in named[1:]:
        yield f"{path}.template: the operator takes the first container for Ray's, and {ray} is number "\
              f"{named.index(ray) + 1}: put it first"  # fmt: skip
    given = [one for one in ("num-cpus", "num-gpus", "memory", "resources") if one in parameters]
    if given and group.get("resources"):
        yield f"{path}: {', '.join(given)} in rayStartParams and `resources` of the group: give them in one of both"
    if "labels" in parameters:
        yield f"{path}.rayStartParams.labels: the operator takes labels from the group's own `labels`: move them there"
    limits = _at(containers[0], "resources", "limits")
    if not limits and not given and not group.get("resources"):
        yield f"{path}: the Ray container has no limits, from which CPUs, memory and devices are taken: give them"
    if needs_never and template.get("restartPolicy", "Always") != "Never":
        yield f"{path}.template.spec.restartPolicy must be Never with autoscaler v2 (the default from Ray 2.47)"
    drain = {one.get("name"): one.get("value") for one in containers[0].get("env") or []}.get(DRAIN)
    grace = template.get("terminationGracePeriodSeconds", 30)
    seconds = str(drain or 30)
    if not re.fullmatch(r"\d+(\.\d+)?", seconds):
        yield f"{path}.template: {DRAIN} is {seconds!r}: give seconds, such as '120'"
    elif float(seconds) + 30 > grace:
        yield (
            f"{path}.template.spec.terminationGracePeriodSeconds is {grace}, and Ray drains for {seconds} s "
            f"({DRAIN}): the pod is killed before its workers have saved: set it to {round(float(seconds)) + 30}"
        )


def _devices(group: Mapping[str, Any]) -> bool:
    containers = _at(group, "template", "spec").get("containers") or [{}]
    return any(name.endswith("gpu") for name in _at(containers[0], "resources", "limits"))


def _autoscaler_of(version: Any) -> str:
    return "v2" if _at_least(version, (2, 47)) else "v1"


def _at_least(version: Any, least: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", str(version or ""))
    return bool(found) and (int(found[1]), int(found[2])) >= least  # type: ignore[index]


def _queued(manifest: Mapping[str, Any]) -> bool:
    return _QUEUE in _at(manifest, "metadata", "labels")


def _elastic(manifest: Mapping[str, Any]) -> bool:
    return _at(manifest, "metadata", "annotations").get("kueue.x-k8s.io/elastic-job") == "true"


def _at(content: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping below keys; empty where there is none."""
    for key in keys:
        found = content.get(key)
        content = found if isinstance(found, Mapping) else {}
    return content


_of_kind: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "RayJob": _job_faults,
    "RayCluster": _of_cluster,
}


def manifests_of(text: str) -> list[Manifest]:
    """The resources of a YAML text. Raises yaml.YAMLError."""
    return [one for one in yaml.safe_load_all(text) if isinstance(one, dict)]
