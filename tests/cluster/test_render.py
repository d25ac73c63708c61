"""What is rendered is what Kubernetes, KubeRay, Ray and Prometheus take, and holds what keeps a run safe."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifests import CRDS, pods, rendered, schema_faults, workload

from domainshuttle.cluster.local import ClusterError
from domainshuttle.cluster.render import TARGETS, render
from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.platform.config.loading import load_cluster

SPECS: dict[str, list[str]] = {
    "as shipped": [],
    "fixed size, no queue": ["kubernetes.queue=null", "trainers.nodes=8", "encoders=null", "evaluators=null"],
    "volcano": ["kubernetes.queue={kind: volcano, name: gpus, topology: 2, priority_class: high}"],
    "yunikorn": ["kubernetes.queue={kind: yunikorn, name: root.gpus}"],
    "AMD on the nodes' network": ["trainers.device=MI300X", "links={nics: 8, nic_gbit: 400, host_network: true}"],
    "EFA, scratch of a class": [
        "links={nics: 32, nic_gbit: 100, resource: vpc.amazonaws.com/efa}", "storage.scratch_class=nvme",
    ],
    "a PostgreSQL of its own": ["mlflow.postgres={storage_gib: 20, storage_class: fast, image: 'postgres:17'}"],
    "no claim, no sidecar, a login for MLflow": [
        "storage.claim=null", "kubernetes.log_sidecar=false", "mlflow.auth_secret=mlflow-login",
        "kubernetes.image_pull_secret=registry", "kubernetes.deadline_hours=700", "kubernetes.service_account=trainer",
    ],
}  # fmt: skip


def shipped(*overrides: str) -> ClusterSpec:
    return load_cluster("h100-64", list(overrides))


@pytest.mark.skipif(not CRDS.is_dir(), reason="needs KubeRay's definitions")
@pytest.mark.parametrize("overrides", SPECS.values(), ids=SPECS)
def test_kuberay_takes_what_is_rendered(overrides: list[str]) -> None:
    manifests = rendered("kuberay", shipped(*overrides))
    assert {"RayJob", "RayCluster", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "PodMonitor"} <= {
        one["kind"] for one in manifests
    }
    for one in manifests:
        assert not schema_faults(one), one["kind"]


@pytest.mark.skipif(not CRDS.is_dir(), reason="needs KubeRay's definitions")
def test_the_validator_finds_a_field_that_is_none_and_a_rule_that_is_broken() -> None:
    job = next(one for one in rendered("kuberay", shipped()) if one["kind"] == "RayJob")
    job["spec"]["backofLimit"] = 3
    job["spec"]["managedBy"] = "somebody"
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    found = "\n".join(schema_faults(job))
    assert "backofLimit" in found and "managedBy field value" in found and "imagePulPolicy" in found


def test_a_rendered_postgresql_keeps_its_files_and_lets_only_mlflow_in() -> None:
    manifests = rendered("mlflow", shipped("mlflow.postgres={}"))
    by_kind = {(one["kind"], one["metadata"]["name"]): one for one in manifests}
    assert len(by_kind) == len(manifests) == len(rendered("mlflow", shipped())) + 3
    database = by_kind["StatefulSet", "mlflow-postgres"]["spec"]
    pod = database["template"]["spec"]
    variables = {one["name"]: one for one in pod["containers"][0]["env"]}
    assert variables["POSTGRES_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "mlflow-database", "key": "password"}
    mount = pod["containers"][0]["volumeMounts"][0]
    assert mount["name"] == database["volumeClaimTemplates"][0]["metadata"]["name"]
    assert variables["PGDATA"]["value"].startswith(mount["mountPath"] + "/") and pod["securityContext"]["runAsNonRoot"]
    (rule,) = by_kind["NetworkPolicy", "mlflow-postgres"]["spec"]["ingress"]
    clients = rule["from"][0]["podSelector"]["matchLabels"]
    for name in ("mlflow", "mlflow-db-upgrade"):  # both reach it
        kind = "Deployment" if name == "mlflow" else "Job"
        labels = by_kind[kind, name]["spec"]["template"]["metadata"]["labels"]
        assert clients.items() <= labels.items()
        assert not clients.items() <= database["template"]["metadata"]["labels"].items()


def job_of(spec: ClusterSpec, **changes: Any) -> dict[str, Any]:
    return next(one for one in rendered("kuberay", spec, **changes) if one["kind"] == "RayJob")


def test_pods_are_killed_only_after_ray_has_drained_and_hold_what_the_description_says() -> None:
    spec = shipped("trainers.nodes=[2, 8]")
    job = job_of(spec, drain_seconds=200.0)
    for name, template in pods(job):
        if name == "submitter":
            continue
        pod = template["spec"]
        ray = pod["containers"][0]
        assert {one["name"]: one.get("value") for one in ray["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "200"
        assert pod["terminationGracePeriodSeconds"] >= 230
        assert pod["securityContext"]["runAsNonRoot"] and ray["resources"]["limits"] == ray["resources"]["requests"]
    groups = {one["groupName"]: one for one in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    limits = groups["trainers"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "160", "memory": "1536Gi", "nvidia.com/gpu": "8", "rdma/hca_shared_devices_a": "1"}
    assert (groups["trainers"]["minReplicas"], groups["trainers"]["maxReplicas"]) == (2, 8)
    assert groups["encoders"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_a_spent_budget_is_not_tried_again_and_secrets_are_no_part_of_the_job() -> None:
    job = job_of(shipped())["spec"]
    assert "--stopped-code 0" in job["entrypoint"] and job["backoffLimit"] == 3
    assert set(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}
    ray = job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert ray["envFrom"] == [{"secretRef": {"name": "object-store"}}, {"secretRef": {"name": "hub-token"}}]
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_only_the_run_the_operator_and_prometheus_reach_the_pods() -> None:
    policy = next(one for one in rendered("kuberay", shipped("monitoring.namespace=monitoring"))
                  if one["kind"] == "NetworkPolicy")  # fmt: skip
    run = policy["spec"]["podSelector"]["matchLabels"]
    rules = policy["spec"]["ingress"]
    assert rules[0] == {"from": [{"podSelector": {"matchLabels": run}}]}
    places = [rule["from"][0]["namespaceSelector"]["matchLabels"] for rule in rules[1:]]
    assert [one["kubernetes.io/metadata.name"] for one in places] == ["kuberay-system", "monitoring"]
    assert [port["port"] for port in rules[1]["ports"]] == [8265, 52365]
    for template in (one for _, one in pods(job_of(shipped()))):
        assert template["metadata"]["labels"].items() >= run.items()


@pytest.mark.parametrize(
    ("overrides", "changes", "expected"),
    [
        (["kubernetes.queue.elastic=false"], {}, "kubernetes.queue.elastic: true"),
        (["trainers.nodes=2"], {}, "holds 16 workers (2 nodes of 8), and the run asks for 64"),
        ([], {"cpus_per_worker": 40.0}, "holds 32 workers"),
        (["trainers.device=null"], {}, "gpus_per_worker"),
        (["trainers.device=Ascend 910B"], {}, "only `plan` knows it"),
        (["trainers.cpus=32", "encoders=null", "evaluators=null"], {}, "data tasks need one more"),
    ],
)
def test_what_could_not_run_there_is_said(overrides: list[str], changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ClusterError) as error:
        render("kuberay", shipped(*overrides), workload(**changes))
    assert expected in str(error.value)


def test_labels_of_queues() -> None:
    kueue = job_of(shipped())
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert kueue["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    trainers = dict(pods(kueue))["trainers"]
    topology = trainers["metadata"]["annotations"]["kueue.x-k8s.io/podset-preferred-topology"]
    assert topology == "cloud.provider.com/topology-block"
    volcano = job_of(shipped(SPECS["volcano"][0]))["metadata"]["labels"]
    assert volcano["volcano.sh/queue-name"] == "gpus"
    assert volcano["volcano.sh/network-topology-mode"] == "soft"


VMS = {
    "local": ["vm={head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}", "trainers.nodes=2", "encoders=null",
              "evaluators=null", "storage.endpoint='http://store:9000/?a=b&c=d'"],
    "aws": ["vm={provider: aws, region: us-east-1}", "trainers.instance=p5.48xlarge", "head.instance=m7i.4xlarge",
            "encoders.instance=g6e.12xlarge", "evaluators.instance=g6e.4xlarge"],
    "gcp": ["vm={provider: gcp, region: us-central1, zone: us-central1-a, project: p}", "head.instance=n2-standard-16",
            "trainers.instance=a3-highgpu-8g", "encoders=null", "evaluators=null"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", VMS.values(), ids=VMS)
def test_rays_launcher_takes_what_is_rendered(overrides: list[str]) -> None:
    """By the schema in Ray's wheel, by which `ray up` checks the file."""
    import importlib.util

    found = importlib.util.find_spec("ray")
    assert found and found.origin
    schema = json.loads((Path(found.origin).parent / "autoscaler/ray-schema.json").read_text())
    content = yaml.safe_load(render("vm", shipped(*overrides), workload(workers=(8, 16)))["cluster.yaml"])
    jsonschema.validate(content, schema)
    words = shlex.split(content["head_start_ray_commands"][1])  # as a shell reads it
    assert "RAY_AUTH_MODE=token" in words[: words.index("ray")]
    if content["provider"]["type"] == "local":
        assert "AWS_ENDPOINT_URL=http://store:9000/?a=b&c=d" in words and content["max_workers"] == 2
    if content["provider"]["type"] == "aws":
        encoders = content["available_node_types"]["encoders"]
        assert encoders["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert encoders["resources"] == {"CPU": 60, "GPU": 4}


def test_a_vm_without_a_machine_type_is_answered() -> None:
    with pytest.raises(ClusterError, match=r"head.instance is missing.*p5"):
        render("vm", shipped(VMS["aws"][0]), workload())
    with pytest.raises(ClusterError, match="no section `vm`"):
        render("vm", shipped(), workload())


def test_what_machines_of_given_addresses_can_not_be_is_said() -> None:
    local = "vm={head_ip: 10.0.0.1, worker_ips: [10.0.0.2]}"
    alone = ["encoders=null", "evaluators.nodes=0"]
    for overrides, expected in (
        ([local], r"has encoders and evaluators too: .*--cluster-set encoders=null"),
        ([local, *alone], "worker_ips names 1, and trainers.nodes has 8"),
        ([local, *alone, "trainers.nodes=1"], "holds 8 workers"),
    ):
        with pytest.raises(ClusterError, match=expected):
            render("vm", shipped(*overrides), workload())


def test_runs_of_different_names_are_different_resources() -> None:
    names = [
        "run",
        "Run",
        "run-",
        "RUN",
        "a" * 47,
        "a" * 48,
        "a" * 49,
        "a.b",
        "1",
        "a--b",
        "...",
        "b" * 60 + "1",
        "b" * 60 + "2",
    ]
    found = [workload(name=name).resource_name for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47, name
    assert workload(name="wan2.1-t2v_14b").resource_name == "wan2-1-t2v-14b"
    assert (found[0], found[4]) == ("run", "a" * 47)


def test_a_pool_without_nodes_is_none() -> None:
    groups = job_of(shipped("encoders.nodes=0"))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [one["groupName"] for one in groups] == ["trainers", "evaluators"]


def test_cpus_are_rendered_as_they_are_given() -> None:
    job = job_of(shipped("trainers.cpus=12345.678", "head.cpus=20"))
    limits = {
        name: one["spec"]["containers"][0]["resources"]["limits"] for name, one in pods(job) if name != "submitter"
    }
    assert (limits["trainers"]["cpu"], limits["head"]["cpu"]) == ("12345.678", "20")


def test_the_command_writes_and_checks(tmp_path: Path) -> None:
    def domainshuttle(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "domainshuttle.platform.cli", "cluster", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)

    done = domainshuttle("render", "kuberay", "wan2.1-t2v-14b", "--cluster", "h100-64", "--out", "m",
                         "--set", "data=/shared/data", "--set", "output=/shared/runs")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "give its digest" in " ".join(done.stdout.split())
    assert "--set tracking.uri=http://mlflow:5000" in " ".join(done.stdout.split())
    applied = re.findall(r"-f (\S+)", done.stdout)
    assert applied == ["m/mlflow.yaml", "m/monitoring.yaml", "m/rayjob.yaml"]  # what the job needs comes before it
    assert all((tmp_path / one).is_file() for one in applied)
    assert domainshuttle("check", "m/rayjob.yaml", "m/raycluster.yaml").returncode == 0
    path = tmp_path / "m/rayjob.yaml"
    path.write_text(path.read_text().replace("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"))
    checked = domainshuttle("check", "m/rayjob.yaml")
    assert checked.returncode == 1 and "Kueue" in checked.stdout
    config = next(yaml.safe_load_all(path.read_text()))
    assert config["kind"] == "ConfigMap" and "name: wan2.1-t2v-14b" in config["data"]["run.yaml"]
    # the cluster has other pools with GPUs: workers go to the trainers' nodes, which have this label of Ray
    labels = yaml.safe_load(config["data"]["run.yaml"])["cluster"]["node_labels"]
    job = next(one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "RayJob")
    groups = {one["groupName"]: one["labels"] for one in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert labels.items() <= groups["trainers"].items() and not labels.items() <= groups["encoders"].items()


def test_each_target_has_files() -> None:
    spec = shipped(*VMS["local"])
    for target in TARGETS:
        assert render(target, spec, workload(workers=(8, 16)))
