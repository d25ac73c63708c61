"""MLflow as it is rendered, on a real PostgreSQL, with files in an S3 server (moto's): both are started here.

Run: python -m pytest tests/cluster/mlflow/test_server.py -m nightly --timeout=1200. It needs PostgreSQL's programs, of
Debian's package postgresql-15 for example.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import free_port
from manifests import rendered

from domainshuttle.cluster.mlflow.manifests import PORT, database_name
from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.platform.config.loading import load_cluster

BIN = next((one.parent for one in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
MLFLOW = Path(sys.executable).parent / "mlflow"


def spec(*overrides: str) -> ClusterSpec:
    return load_cluster("h100-64", ["mlflow.workers=1", *overrides])


def manifest(kind: str, name: str, found: ClusterSpec) -> dict[str, Any]:
    return next(
        one for one in rendered("mlflow", found) if one["kind"] == kind and one["metadata"]["name"] == name
    )  # fmt: skip


@contextlib.contextmanager
def postgres(password: str) -> Iterator[str]:
    """A PostgreSQL with the user, the database and the password of the rendered one; yields the Secret's `uri`."""
    assert BIN is not None
    root = os.geteuid() == 0  # as which PostgreSQL does not run
    user = pwd.getpwnam("postgres").pw_name if root else None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    (folder / "password").write_text(password)
    if user is not None:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    port = free_port()
    container = manifest("StatefulSet", database_name(spec().mlflow), WITH_POSTGRES)["spec"]["template"]["spec"]  # type: ignore[arg-type]
    variables = {one["name"]: one.get("value") for one in container["containers"][0]["env"]}
    name, database = variables["POSTGRES_USER"], variables["POSTGRES_DB"]
    assert name and database
    process = None
    try:
        subprocess.run(
            [BIN / "initdb", "-D", folder / "data", "-U", name, "--auth=scram-sha-256", "--no-sync",
             f"--pwfile={folder / 'password'}"],
            user=user, check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        process = subprocess.Popen(
            [BIN / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"],
            user=user, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        import psycopg

        deadline = time.monotonic() + 120
        while True:
            try:
                with psycopg.connect(
                    host="127.0.0.1", port=port, user=name, password=password, dbname="postgres", autocommit=True
                ) as connection:
                    connection.execute(f"CREATE DATABASE {database}")  # type: ignore[call-overload]
                break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.5)
        yield f"postgresql+psycopg://{name}:{password}@127.0.0.1:{port}/{database}"
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


WITH_POSTGRES = spec("mlflow.postgres={}")


@dataclass
class Server:
    port: int
    database: str
    objects: Any
    """A client of the S3 server."""

    def status(self, host: str) -> int:
        """What an API call is answered that names the server so."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import boto3
    from moto.server import ThreadedMotoServer

    folder, moto, port = tmp_path_factory.mktemp("mlflow"), ThreadedMotoServer("127.0.0.1", 0), free_port()
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    objects = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    objects.create_bucket(Bucket="training")
    with postgres("s3cret") as uri:
        container = manifest("Deployment", "mlflow", WITH_POSTGRES)["spec"]["template"]["spec"]["containers"][0]
        own = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        environment = {**os.environ, **keys, **own, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_S3_ENDPOINT_URL": endpoint}
        environment["PATH"] = f"{MLFLOW.parent}{os.pathsep}{environment['PATH']}"
        upgrade = manifest("Job", "mlflow-db-upgrade", WITH_POSTGRES)["spec"]["template"]["spec"]["containers"][0]
        subprocess.run(upgrade["command"], env=environment, check=True, capture_output=True, timeout=600)
        command = list(container["command"])
        command[command.index("--port") + 1] = str(port)
        log = (folder / "log.txt").open("w")
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 400
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    assert time.monotonic() < deadline and process.poll() is None, (folder / "log.txt").read_text()
                    time.sleep(1)
            yield Server(port, uri, objects)
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)
            moto.stop()


pytestmark = [pytest.mark.nightly, pytest.mark.skipif(BIN is None, reason="needs PostgreSQL's programs")]


def test_a_run_is_in_the_database_and_its_files_are_in_the_object_store(server: Server, tmp_path: Path) -> None:
    import psycopg

    from domainshuttle.platform.tracking.mlflow import open_schedule
    from domainshuttle.platform.tracking.queries import read_history, read_runs

    uri = f"http://127.0.0.1:{server.port}"
    tracker = open_schedule(uri, "paper", "run-1", {"seed": 7}, {"config.digest": "d"}, tmp_path / "spool", timeout=120)
    assert tracker.open_segment("stage1", params={"steps": 4}, tags={"a": "b"})
    for step in range(1, 5):
        assert tracker.log({"loss": 1.0 / step}, step, "stage1")
    file = tmp_path / "table.json"
    file.write_text('{"rows": 1}')
    assert tracker.artifact(file, "evaluation", "stage1") and tracker.finish()
    assert [run.name for run in read_runs(uri, ["paper"])] and tracker.ids.segments
    points = read_history(uri, tracker.ids.segments["stage1"], "loss")
    assert points == [(step, 1.0 / step) for step in range(1, 5)]
    with psycopg.connect(server.database.replace("+psycopg", "")) as connection:
        found = connection.execute("SELECT key, step, value, run_uuid FROM metrics ORDER BY step").fetchall()
    mine = [(step, value) for key, step, value, run in found if run == tracker.ids.segments["stage1"] and "loss" in key]
    assert mine == points, (tracker.ids, found)
    keys = [one["Key"] for one in server.objects.list_objects_v2(Bucket="training")["Contents"]]
    assert [key for key in keys if key.startswith("mlflow/") and key.endswith("evaluation/table.json")]


def test_names_that_it_was_told_are_answered_and_others_are_403_with_what_helps(server: Server) -> None:
    from domainshuttle.platform.tracking.mlflow import TrackingError
    from domainshuttle.platform.tracking.queries import read_runs

    for host in ("mlflow", "mlflow.training", "mlflow.training.svc", "mlflow.training.svc.cluster.local"):
        assert server.status(host) == server.status(f"{host}:{PORT}") == 200
    for host in ("mlflow.other", "training.example.com", f"mlflow.evil.com:{PORT}"):
        assert server.status(host) == 403
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        assert address
        with pytest.raises(TrackingError, match=r"403.*--allowed-hosts NAME:PORT,NAME"):
            read_runs(f"http://{name}:{server.port}", ["paper"])
