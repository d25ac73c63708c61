"""Fixtures of whole runs: a tiny configuration with its corpora, and a run of it from beginning to end."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from running import cli, end_started, environment, free_port

from domainshuttle.platform.commands.data import build_corpora, encode_corpora
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig


@pytest.fixture(autouse=True)
def no_driver_outlives_its_test() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture(scope="session")
def tiny(tiny_yaml: Path, ray_cluster: None) -> Path:
    """The tiny configuration with its corpora built and encoded."""
    config = load_config(str(tiny_yaml))
    build_corpora(config)
    encode_corpora(config)
    return tiny_yaml


@pytest.fixture(scope="session")
def unbroken(tiny: Path, cluster_variables: dict[str, str]) -> tuple[RunConfig, str]:
    """A run from beginning to end, on the cluster of the session, and what it printed."""
    printed = cli("train", tiny, **cluster_variables)
    return load_config(str(tiny)), printed


@pytest.fixture
def users_cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray cluster as a user would start it: `ray start --head`, with a dashboard and a token."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    # the agent's port too: beside another cluster on this machine the agent would find its usual one taken
    port, dashboard, agent = free_port(), free_port(), free_port()
    ray = Path(sys.executable).parent / "ray"
    log = (tmp_path / "ray.log").open("w")
    command = [ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    # a folder of its own, so that no other program takes the cluster for that of this machine; a short one, since a
    # socket's path has at most 107 characters
    own = tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True)
    command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={own.name}", "--disable-usage-stats"]
    head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert head.poll() is None, (tmp_path / "ray.log").read_text()
            time.sleep(0.5)
        yield address, env
    finally:
        children = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=5)
        except subprocess.TimeoutExpired:
            head.kill()
        for child in children:
            if child.is_running():
                child.kill()
        own.cleanup()
