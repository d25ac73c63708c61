"""Connections: what can go wrong ends with one message that says what to do.

Run: python -m pytest tests/cluster
"""

import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray

from domainshuttle.cluster import local
from domainshuttle.cluster.local import ClusterError, Connection, Resources, check_port, check_resources


def test_a_busy_port_is_named_with_another_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port {port} is busy.*dashboard_port=\d+") as error:
            check_port(port)
        # the next one, unless another program has it
        named = re.findall(r"dashboard_port=(\d+)", str(error.value))
        assert port < int(named[0]) < port + 100
        check_port(int(named[0]))
    check_port(port)


def test_a_busy_dashboard_port_stops_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ClusterError, match="busy"), Connection(dashboard_port=listener.getsockname()[1]):
            pass


@pytest.mark.parametrize(("there", "word"), [({"CPU": 1.0}, "CPU"), ({"CPU": 8.0}, "GPU"), ({}, "CPU")])
def test_too_few_resources_say_how_many_and_the_remedy(there: dict[str, float], word: str) -> None:
    less = {"workers=1": Resources(1, 1), "cpus_per_worker=1": Resources(2, 0)}
    with pytest.raises(ClusterError, match=rf"too few {word}s.*\. ") as error:
        check_resources(there, Resources(2, 1, lighter=less))
    # only what would be enough here is advised
    told = {"GPU": ", or ask for less: --set cpus_per_worker=1"}.get(word, "")
    assert str(error.value).endswith(f". Add nodes{told}")


def test_enough_resources_pass() -> None:
    check_resources({"CPU": 2.0, "GPU": 1.0}, Resources(2, 1))


def test_nodes_that_go_are_watched_for_where_they_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train's process for that is spared on this machine alone, and is there for a cluster that is taken later."""
    name, seen = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", []
    for one in ("RAY_ADDRESS", name):
        monkeypatch.delenv(one, raising=False)

    def init(**options: object) -> SimpleNamespace:
        seen.append(os.environ.get(name))
        return SimpleNamespace(dashboard_url=None)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    for check in ("require_own_address", "check_reachable", "require_no_dashboard"):
        monkeypatch.setattr(local, check, lambda address: None)
    for address in (None, "10.0.0.1:6379", None):
        with Connection(address):
            pass
        assert name not in os.environ
    assert seen == ["0", "1", "0"]
    with pytest.raises(ClusterError, match="too few CPUs"):
        Connection(None, Resources(2)).__enter__()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ClusterError, match="is busy"):
            Connection(None, dashboard_port=taken.getsockname()[1]).__enter__()
    assert name not in os.environ  # nor is it left by one that could not be had
    monkeypatch.setenv(name, "0")  # a user's own choice holds
    with Connection("10.0.0.1:6379"):
        pass
    assert seen[-1] == "0" == os.environ[name]


def test_what_gets_no_gpu_from_ray_sees_none() -> None:
    """In a process of its own, whose workers would inherit its devices."""
    code = (
        "import os, ray\n"
        "from domainshuttle.cluster.local import Connection\n"
        "with Connection():\n"
        "    print('sees', repr(ray.get(ray.remote(lambda: os.environ.get('CUDA_VISIBLE_DEVICES')).remote())))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "sees ''" in run.stdout


def test_no_cluster_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127.0.0.1:1\b"), Connection("127.0.0.1:1"):
        pass


def test_submission_to_nobody_names_the_address() -> None:
    """In a process of its own, since Ray takes its authentication mode once."""
    code = (
        "from domainshuttle.cluster.submit import submit_training\n"
        "from domainshuttle.cluster.local import ClusterError\n"
        "try: submit_training('name: x', 'x', 'http://127.0.0.1:1')\n"
        "except ClusterError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "not taken by http://127.0.0.1:1" in run.stdout


def test_a_submission_carries_the_options_and_time_for_a_last_checkpoint() -> None:
    code = (
        "import ray.job_submission as jobs\nfrom types import SimpleNamespace\n"
        "class Client:\n"
        "    def __init__(self, address): pass\n"
        "    def list_jobs(self):\n"
        "        return [SimpleNamespace(submission_id=i, metadata=None) for i in ('x-1', 'x-y-7', None)]\n"
        "    def submit_job(self, entrypoint, runtime_env, metadata, submission_id):\n"
        "        if submission_id == 'x-2': raise RuntimeError('x-2 already exists, use another')\n"
        "        print(entrypoint); print(runtime_env['env_vars']); return submission_id\n"
        "jobs.JobSubmissionClient = Client\n"
        "from domainshuttle.cluster.submit import submit_training\n"
        "options = ['--stage', 'one', '--resume', '/a b/one-step00000010']\n"
        "print(submit_training('name: x', 'x', 'http://host', options, 90).id)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.splitlines() == [
        "python -m domainshuttle.platform.cli train run.yaml --stage one --resume '/a b/one-step00000010'",
        "{'RAY_JOB_STOP_WAIT_TIME_S': '90'}",
        "x-3",  # the run's name, with a number that no job has or had
    ]
