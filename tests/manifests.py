"""Manifests for tests: rendered ones, and what Kubernetes' API server would say of them.

An unknown field is an error, as with `kubectl --validate=strict`; the rules in CEL of the definitions are run.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
import yaml

from domainshuttle.cluster.render import render
from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.cluster.workload import Workload

CRDS = Path(__file__).resolve().parents[2] / "shared/crds"


def workload(**changes: Any) -> Workload:
    """A run of 64 workers."""
    values = {
        "name": "Paper_Run.1",
        "config_yaml": "name: Paper_Run.1\n",
        "workers": (32, 64),
        "cpus_per_worker": 4.0,
        "gpus_per_worker": 1,
        "stop_seconds": 3720,
        "drain_seconds": 120.0,
    }
    return Workload(**{**values, **changes})


def rendered(target: str, spec: ClusterSpec, **changes: Any) -> list[dict[str, Any]]:
    """The resources of a target."""
    files = render(target, spec, workload(**changes))
    return [one for name, text in files.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text)]


@functools.cache
def _definition(kind: str) -> dict[str, Any]:
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    return next(one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1")


def _strict(schema: Any) -> Any:
    """JSON schema of a structural one."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: _strict(value) for key, value in schema.items() if key not in ("format", "properties")}
    if "properties" in schema:
        found["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            found["additionalProperties"] = False
    return found


def schema_faults(manifest: dict[str, Any]) -> list[str]:
    """What a custom resource's definition, or Kubernetes' own schema, says against a manifest."""
    if manifest["kind"] in ("RayJob", "RayCluster"):
        schema = _definition(manifest["kind"])
        strict = _strict(schema) | {"additionalProperties": True}  # kind and metadata
        validator = jsonschema.Draft202012Validator(strict)
        found = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
        found += [*_rules(schema, manifest, "")]
        for path, template in pods(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **template["metadata"]}}
            found += [f"{path}: {one}" for one in schema_faults({**pod, "spec": template["spec"]})]
        return found
    if manifest["apiVersion"].startswith("monitoring.coreos.com"):
        return []  # its definitions are not here: rules are read by promtool
    try:
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [str(error)]
    return []


def _rules(schema: dict[str, Any], value: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:
            continue  # of updates
        environment = celpy.Environment()
        program = environment.program(environment.compile(rule["rule"]))
        if not program.evaluate({"self": celpy.json_to_cel(value)}):
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in schema.get("properties", {}):
                yield from _rules(schema["properties"][key], inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _rules(schema.get("items", {}), inner, f"{path}[{number}]")


def pods(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pods' templates of a RayJob or RayCluster, with their places."""
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
