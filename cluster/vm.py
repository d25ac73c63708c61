"""Clusters on VMs: the YAML of Ray's launcher (`ray up`)."""

import shlex
from typing import Any

from domainshuttle.cluster.kuberay.pods import POOL_LABEL, Manifest, environment, nccl_environment
from domainshuttle.cluster.local import ClusterError
from domainshuttle.cluster.spec import ClusterSpec, HeadSection, Pool, VmSection

_CACHE = "/var/lib/domainshuttle"
"""Of each machine: what its containers keep."""
_HEAD = "head"


def launcher(spec: ClusterSpec, drain: float) -> Manifest:
    """The launcher's YAML. Raises ClusterError where the description lacks what a cloud asks for."""
    vm = spec.vm
    if vm is None:
        raise ClusterError(
            f"cluster {spec.name} has no section `vm`: add one, such as "
            "vm: {provider: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}"
        )
    if vm.provider == "local":
        _require_trainers_alone(spec, vm)
    variables = {**environment(spec, drain), **nccl_environment(spec), "RAY_AUTH_MODE": "token"}
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items()))
    start = f"{exports} ray start --object-spilling-directory={shlex.quote(f'{spec.storage.scratch}/spilled')}"
    content: Manifest = {
        "cluster_name": spec.name,
        "max_workers": sum(pool.most_nodes for pool in spec.pools.values()),
        "idle_timeout_minutes": 10,
        "provider": _provider(vm),
        "auth": {"ssh_user": vm.ssh_user, **({"ssh_private_key": vm.ssh_key} if vm.ssh_key else {})},
        # Ray's launcher starts the container with the devices that it finds, and --shm-size of the machine's memory
        "docker": {
            "image": spec.image,
            "container_name": "domainshuttle",
            "pull_before_run": True,
            "run_options": [
                "--ulimit nofile=65536:65536",
                "--ulimit memlock=-1",
                f"-v {shlex.quote(f'{spec.storage.mount}:{spec.storage.mount}')}",
                f"-v {shlex.quote(f'{_CACHE}:{spec.storage.scratch}')}",
            ],
        },
        # the token by which clients, head and workers know each other
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --num-cpus=0 --dashboard-host=0.0.0.0 --metrics-export-port=8080 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{start} --address=$RAY_HEAD_IP:6379 --metrics-export-port=8080",
        ],
    }
    if vm.provider != "local":
        content["head_node_type"] = _HEAD
        content["available_node_types"] = {
            _HEAD: {"resources": {"CPU": 0}, "node_config": _node(vm, _HEAD, spec.head)},
            **{name: _node_type(vm, name, pool) for name, pool in spec.pools.items()},
        }
    return content


def _require_trainers_alone(spec: ClusterSpec, vm: VmSection) -> None:
    """Raises ClusterError where machines that are given by their addresses are not the trainers that are described:
    the launcher gives them no labels by which pools could be told apart."""
    if others := [name for name in spec.pools if name != "trainers"]:
        raise ClusterError(
            f"cluster {spec.name}: all of vm.worker_ips are trainers, and it has {' and '.join(others)} too: leave "
            f"them out with {' '.join(f'--cluster-set {name}=null' for name in others)}"
        )
    if (there := len(vm.worker_ips)) != spec.trainers.most_nodes:
        raise ClusterError(
            f"cluster {spec.name}: vm.worker_ips names {there}, and trainers.nodes has {spec.trainers.most_nodes}: "
            f"name them all, or give --cluster-set trainers.nodes={there}"
        )


def _provider(vm: VmSection) -> Manifest:
    if vm.provider == "local":
        return {"type": "local", "head_ip": vm.head_ip, "worker_ips": list(vm.worker_ips)}
    place = {"region": vm.region, "availability_zone": vm.zone}
    more = {"cache_stopped_nodes": False} if vm.provider == "aws" else {"project_id": vm.project}
    zone = {**place, **more}
    return {"type": vm.provider, **{key: value for key, value in zone.items() if value is not None}}


def _node_type(vm: VmSection, name: str, pool: Pool) -> Manifest:
    resources: dict[str, int] = {"CPU": int(pool.cpus)}
    if pool.devices:
        resources["GPU"] = pool.devices
    return {
        "min_workers": pool.least_nodes,
        "max_workers": pool.most_nodes,
        "resources": resources,
        "labels": {POOL_LABEL: name},
        "node_config": _node(vm, name, pool),
    }


def _node(vm: VmSection, name: str, place: Pool | HeadSection) -> dict[str, Any]:
    """A cloud's machine: its type, its disk, and whether the cloud may take it back."""
    if place.instance is None:
        example = "p5.48xlarge" if vm.provider == "aws" else "a3-highgpu-8g"
        raise ClusterError(f"{name}.instance is missing: name the machine type, such as {example}")
    spot = isinstance(place, Pool) and place.spot
    if vm.provider == "aws":
        volume = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": place.scratch_gib, "VolumeType": "gp3"}}
        node: dict[str, Any] = {"InstanceType": place.instance, "BlockDeviceMappings": [volume]}
        return {**node, **({"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {})}
    disk: dict[str, Any] = {
        "boot": True,
        "autoDelete": True,
        "type": "PERSISTENT",
        "initializeParams": {"diskSizeGb": place.scratch_gib},
    }
    return {"machineType": place.instance, "disks": [disk], "scheduling": [{"preemptible": spot}]}
