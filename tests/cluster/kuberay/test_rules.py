"""What KubeRay's operator and Kueue refuse, each broken once in a job that is else good."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from manifests import rendered

from domainshuttle.cluster.kuberay.rules import faults
from domainshuttle.platform.config.loading import load_cluster


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return next(one for one in rendered("kuberay", load_cluster("h100-64")) if one["kind"] == "RayJob")


def changed(job: dict[str, Any], **paths: Any) -> dict[str, Any]:
    """`a__b__0__c=value` sets a place; the value ... removes it."""
    found = copy.deepcopy(job)
    for path, value in paths.items():
        *parents, last = [int(one) if one.isdigit() else one for one in path.split("__")]
        place: Any = found
        for one in parents:
            place = place[one] if isinstance(place, list) else place.setdefault(one, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return found


def inner_places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested mappings and in the first entries of lists."""
    for key in list(content) if isinstance(content, dict) else range(min(len(content), 1)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from inner_places(content[key])


CLUSTER = "spec__rayClusterSpec__"
TRAINERS = f"{CLUSTER}workerGroupSpecs__0__"
RULE = {"condition": {"jobStatus": "FAILED", "ttlSeconds": 0}, "policy": "DeleteCluster"}

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "long name": ({"metadata__name": "a" * 48}, "at most 47"),
    "name of capitals": ({"metadata__name": "Run"}, "small letters"),
    "name that begins with a digit": ({"metadata__name": "1-run"}, "begin with a letter"),
    "groups that are no list": ({f"{CLUSTER}workerGroupSpecs": {"a": 1}}, "workerGroupSpecs should be a list"),
    "number in quotes": ({"spec__backoffLimit": "3"}, "spec.backoffLimit should be a whole number without quotes"),
    "environment as a mapping": (
        {f"{TRAINERS}template__spec__containers__0__env": {"A": "b"}}, "containers[0].env should be a list"),
    "drain in minutes": (
        {f"{TRAINERS}template__spec__containers__0__env":
         [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "2m"}]}, "give seconds, such as '120'"),
    "environment that is no YAML": ({"spec__runtimeEnvYAML": "env_vars: {"}, "runtimeEnvYAML is not valid YAML"),
    "runtime environment that is a list": ({"spec__runtimeEnvYAML": "[a]"}, "runtimeEnvYAML should be keys"),
    "mode": ({"spec__submissionMode": "HttpMode"}, "submissionMode"),
    "no cluster": ({"spec__rayClusterSpec": ...}, "neither rayClusterSpec"),
    "retries of a chosen cluster": ({"spec__clusterSelector": {"a": "b"}}, "beside clusterSelector"),
    "interactive retries": ({"spec__submissionMode": "InteractiveMode"}, "InteractiveMode: leave it out"),
    "no entrypoint": ({"spec__entrypoint": ...}, "entrypoint is missing"),
    "sidecar": ({"spec__submissionMode": "SidecarMode"}, "submitterPodTemplate"),
    "sidecar's retries": (
        {"spec__submissionMode": "SidecarMode", "spec__submitterConfig": {"backoffLimit": 1}}, "submitterConfig"),
    "ttl": ({"spec__shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs"),
    "suspend": ({"spec__shutdownAfterJobFinishes": False, "spec__suspend": True}, "spec.suspend needs"),
    "deletion rules": ({"spec__deletionStrategy": {"deletionRules": [RULE]}}, "exclude each other"),
    "order of deletion": (
        {"spec__deletionStrategy": {"deletionRules": [
            RULE, {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 9}}]}},
        "comes later than DeleteCluster"),
    "policy twice": ({"spec__deletionStrategy": {"deletionRules": [RULE, RULE]}}, "twice"),
    "Kueue's shutdown": ({"spec__shutdownAfterJobFinishes": False}, "Kueue"),
    "Kueue's group": ({f"{TRAINERS}groupName": "head"}, "groupName is head"),
    "Kueue's growth": ({"metadata__annotations": {}}, "elastic-job"),
    "Kueue's selected job": ({"spec__clusterSelector": {"a": "b"}}, "Kueue ignores"),
    "too many sets": ({f"{CLUSTER}workerGroupSpecs": [{"groupName": f"g{n}"} for n in range(17)]}, "18 sets"),
    "groups of one name": ({f"{TRAINERS}groupName": "encoders"}, "groupName twice"),
    "group without replicas": ({f"{TRAINERS}minReplicas": ...}, "minReplicas missing"),
    "replicas": ({f"{TRAINERS}minReplicas": 9}, "minReplicas 9 is above maxReplicas 8"),
    "hosts": ({f"{TRAINERS}numOfHosts": 8}, "numOfHosts is 8"),
    "resources twice": (
        {f"{TRAINERS}resources": {"CPU": "1"}, f"{TRAINERS}rayStartParams": {"num-gpus": "8"}}, "in one of both"),
    "labels": ({f"{TRAINERS}rayStartParams": {"labels": "a=b"}}, "labels"),
    "no limits": ({f"{TRAINERS}template__spec__containers__0__resources": {}}, "no limits"),
    "no token": ({f"{CLUSTER}authOptions": {}}, "authOptions.mode is not token"),
    "token of an old Ray": ({f"{CLUSTER}rayVersion": "2.51.1"}, "2.52 or later"),
    "token without a version": ({f"{CLUSTER}rayVersion": ...}, "2.52 or later"),
    "Kubernetes' token": (
        {f"{CLUSTER}authOptions": {"mode": "token", "enableK8sTokenAuth": True}}, "enableK8sTokenAuth"),
    "restarts": ({f"{TRAINERS}template__spec__restartPolicy": "Always"}, "Never with autoscaler v2"),
    "gate": ({f"{CLUSTER}networkPolicy": {"enabled": True}}, "RayClusterNetworkPolicy"),
    "embedded storage": ({f"{CLUSTER}gcsFaultToleranceOptions": {"backend": "rocksdb"}}, "rocksdb"),
    "grace": ({f"{TRAINERS}template__spec__terminationGracePeriodSeconds": 120}, "set it to 150"),
    "secret": ({"spec__runtimeEnvYAML": "env_vars: {HF_TOKEN: abc}"}, "HF_TOKEN looks like a secret"),
    "deadline": ({"spec__activeDeadlineSeconds": 0}, "activeDeadlineSeconds"),
}  # fmt: skip


def test_a_good_job_has_no_faults(good: dict[str, Any]) -> None:
    assert faults(good) == []
    assert faults({"kind": "ConfigMap"}) == []


@pytest.mark.parametrize(("paths", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_named(good: dict[str, Any], paths: dict[str, Any], expected: str) -> None:
    found = faults(changed(good, **paths))
    assert any(expected in fault for fault in found), found
    assert "abc" not in " ".join(found)


def test_a_key_without_a_value_is_not_there_and_no_value_ends_with_a_traceback(good: dict[str, Any]) -> None:
    assert faults(changed(good, spec__backoffLimit=None, **{f"{TRAINERS}minReplicas": None})) == [
        "RayJob paper-run-1-c7b97db3: spec.rayClusterSpec.workerGroupSpecs[0]: minReplicas missing"
    ]
    job = copy.deepcopy(good)
    for place, key in inner_places(job):
        kept = place[key]
        for value in (None, "x", [], ["a"]):
            place[key] = value
            faults(job)
        place[key] = kept


def test_the_ray_container_must_be_first(good: dict[str, Any]) -> None:
    containers = good["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    swapped = changed(good, **{f"{CLUSTER}headGroupSpec__template__spec__containers": containers[::-1]})
    assert any("put it first" in fault for fault in faults(swapped))


def test_of_a_cluster_its_own_rules_hold() -> None:
    cluster = next(one for one in rendered("kuberay", load_cluster("h100-64")) if one["kind"] == "RayCluster")
    assert faults(cluster) == []
    assert any("at most 53" in fault for fault in faults(changed(cluster, metadata__name="a" * 54)))
    assert any("2.52" in fault for fault in faults(changed(cluster, spec__rayVersion="2.40.0")))
