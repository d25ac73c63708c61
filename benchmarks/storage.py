"""What storage costs: requests, CPU, speed and behaviour under faults, of our layer and of what it could be built on.

Each contestant reads and writes the same objects of a real S3 server (moto's) through the tests' proxy, in a process of
its own, so that its CPU seconds are its own. The server is Python: its speed bounds the MB/s, the CPU it does not.

Run: pip install obstore==0.12.1, then python benchmarks/storage.py [--rounds 3] [--other FOLDER]

`--other` is a folder that has another version of the package, as `domainshuttle`, to compare with.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, SAMPLES = 1_300_000, 24
"""Bytes of an encoded sample, and how many lie in the shard."""
SHARD = SAMPLE * SAMPLES
UPLOAD = 48 << 20
FILES = 1_500
QUICK = {"attempts": 4, "total_seconds": 20, "first_wait": 0.01, "longest_wait": 0.02, "connect_seconds": 2}

FAULTS: dict[str, Any] = {
    "503 SlowDown": (503, "SlowDown"), "500": (500, "InternalError"), "429": (429, "TooManyRequests"),
    "reset": "reset", "cut": "cut", "stall of 5 s": 5.0, "trickle": "trickle",
    "403": (403, "AccessDenied"), "404": (404, "NoSuchKey"), "416": (416, "InvalidRange"),
}  # fmt: skip


class Ours:
    """`pipelines.storage.files`, of whichever version is on the path."""

    def __init__(self, port: int) -> None:
        from domainshuttle.pipelines.storage import files
        from domainshuttle.pipelines.storage.retry import Limits

        self.files, self.limits = files, Limits
        self.query = f"?endpoint_override=http://127.0.0.1:{port}"

    def at(self, key: str) -> str:
        return f"s3://bucket/{key}{self.query}"

    def quick(self) -> None:
        self.files.LIMITS = self.limits(**QUICK, stall_seconds=1)

    def whole(self, key: str) -> bytes:
        return self.files.read_bytes(self.at(key))

    def ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[Any]:
        return self.files.read_ranges(self.at(key), ranges)

    def footer(self, key: str) -> int:
        return self.files.open_parquet(self.at(key)).metadata.num_rows

    def column(self, key: str) -> int:
        return self.files.open_parquet(self.at(key)).read(["a"]).num_rows

    def put(self, key: str, data: bytes) -> None:
        self.files.write_bytes(self.at(key), data)

    def upload(self, key: str, path: Path) -> None:
        self.files.write_file(path, self.at(key))

    def list(self, key: str) -> int:
        return len(self.files.list_files(self.at(key)))


class Obstore:
    """obstore alone, as its documentation shows it, with the same limits."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.store = self.make(14, "30s")

    def make(self, attempts: int, seconds: str) -> Any:
        from datetime import timedelta

        from obstore.store import S3Store

        return S3Store(
            "bucket", endpoint=f"http://127.0.0.1:{self.port}", client_options={"allow_http": True, "timeout": seconds},
            retry_config={
                "max_retries": attempts - 1, "retry_timeout": timedelta(seconds=20),
                "backoff": {"init_backoff": timedelta(seconds=0.01), "max_backoff": timedelta(seconds=0.02), "base": 2},
            },
        )  # fmt: skip

    def quick(self) -> None:
        self.store = self.make(4, "1s")

    def whole(self, key: str) -> bytes:
        return bytes(self.store.get(key).bytes())

    def ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[Any]:
        starts, lengths = [at for at, _ in ranges], [size for _, size in ranges]
        return list(self.store.get_ranges(key, starts=starts, lengths=lengths))

    def footer(self, key: str) -> int:
        return self.parquet(key).metadata.num_rows

    def column(self, key: str) -> int:
        return self.parquet(key).read(["a"]).num_rows

    def parquet(self, key: str) -> Any:
        import obstore
        import pyarrow as pa
        import pyarrow.parquet as pq

        # its own reader has `closed` as a method, which pyarrow takes for true
        reader = obstore.open_reader(self.store, key)

        class Open(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def tell(self) -> int:
                return int(reader.tell())

            def seek(self, offset: int, whence: int = 0) -> int:
                return int(reader.seek(offset, whence))

            def read(self, size: int = -1) -> bytes:
                return bytes(reader.read(size))

        return pq.ParquetFile(pa.PythonFile(Open(), mode="r"), pre_buffer=True)

    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)

    def upload(self, key: str, path: Path) -> None:
        self.store.put(key, path)

    def list(self, key: str) -> int:
        return sum(len(part) for part in self.store.list(key))


class Pyarrow:
    """pyarrow's file system alone."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.store = self.make(14, 20)

    def make(self, attempts: int, seconds: float) -> Any:
        from pyarrow import fs

        return fs.S3FileSystem(
            endpoint_override=f"http://127.0.0.1:{self.port}", region="us-east-1", request_timeout=seconds,
            connect_timeout=2, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        )  # fmt: skip

    def quick(self) -> None:
        self.store = self.make(4, 1)

    def whole(self, key: str) -> bytes:
        return self.store.open_input_file(f"bucket/{key}").read()

    def ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[Any]:
        file = self.store.open_input_file(f"bucket/{key}")
        return [file.read_at(size, at) for at, size in ranges]

    def footer(self, key: str) -> int:
        return self.parquet(key).metadata.num_rows

    def column(self, key: str) -> int:
        return self.parquet(key).read(["a"]).num_rows

    def parquet(self, key: str) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.store.open_input_file(f"bucket/{key}"), pre_buffer=True)

    def put(self, key: str, data: bytes) -> None:
        with self.store.open_output_stream(f"bucket/{key}") as stream:
            stream.write(data)

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as file, self.store.open_output_stream(f"bucket/{key}") as stream:
            while piece := file.read(8 << 20):
                stream.write(piece)

    def list(self, key: str) -> int:
        from pyarrow import fs

        return len(self.store.get_file_info(fs.FileSelector(f"bucket/{key}", recursive=True)))


CONTESTANTS: dict[str, Callable[[int], Any]] = {
    "ours": Ours, "ours, other": Ours, "obstore alone": Obstore, "pyarrow alone": Pyarrow,
}  # fmt: skip


def works(one: Any, folder: Path) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is measured: the work, and the bytes that it moves."""
    members = [(n * SAMPLE + at, size) for n in range(SAMPLES) for at, size in ((0, 900), (1_000, SAMPLE - 1_000))]

    def samples() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: one.ranges("shard", members[2 * n : 2 * n + 2]), range(SAMPLES)))

    def apart() -> None:
        # of every third sample the description only, as a filter by captions would
        one.ranges("shard", members[0 : 2 * SAMPLES : 6])

    def small() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: one.whole(f"small/{n:05d}"), range(200)))

    return {
        "samples of a shard, 8 threads": (samples, SHARD),
        "descriptions of a shard": (apart, 900 * (SAMPLES // 3)),
        "a whole shard": (lambda: one.whole("shard"), SHARD),
        "200 small objects, 8 threads": (small, 200 * 1000),
        "20 Parquet footers": (lambda: [one.footer("table") for _ in range(20)], 0),
        "a column of a Parquet file": (lambda: one.column("table"), 8 * 1_000_000),
        "20 small files written": (lambda: [one.put(f"written/{n}", b"x" * 1000) for n in range(20)], 20_000),
        "a file of 48 MiB uploaded": (lambda: one.upload("uploaded", folder / "upload"), UPLOAD),
        f"{FILES} files listed": (lambda: one.list("small"), 0),
    }


def compete(name: str, port: int, control: int, folder: Path, with_faults: bool) -> None:
    """A contestant's process: prints a line of JSON."""
    import urllib.request

    def tell(what: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{control}/{what}", timeout=30) as answer:
            return json.load(answer)

    one = CONTESTANTS[name](port)
    figures: dict[str, Any] = {}
    for work, (run, moved) in works(one, folder).items():
        run()  # connections, imports
        tell("forget")
        began, cpu = time.perf_counter(), time.process_time()
        run()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        figures[work] = {"requests": tell("count"), "cpu": cpu, "wall": wall, "bytes": moved}
    faults: dict[str, str] = {}
    if with_faults:
        one.quick()
        faults = under_faults(one, tell)
    print(json.dumps({"figures": figures, "faults": faults}))


def under_faults(one: Any, tell: Callable[[str], Any]) -> dict[str, str]:
    """What becomes of a read of 1000 bytes under each fault."""
    faults: dict[str, str] = {}
    expected = _shard()[11:1011]
    for fault in FAULTS:
        told = fault.replace(" ", "_")
        for times in ("once", "always"):
            tell("forget")
            tell(f"fault/{times}/{told}")
            began = time.perf_counter()
            try:
                whole = bytes(one.ranges("shard", [(11, 1000)])[0]) == expected
                outcome = "right" if whole else "WRONG BYTES"
            except Exception as error:
                outcome = type(error).__name__
            seconds = time.perf_counter() - began
            faults[f"{fault}, {times}"] = f"{outcome}, {tell('count')} requests, {seconds:.1f} s"
    tell("forget")
    for change in ("shorter", "gone"):
        one.put("changing", b"x" * 10_000)
        one.ranges("changing", [(0, 10)])
        tell(f"change/{change}")
        try:
            outcome = f"{len(bytes(one.ranges('changing', [(5000, 100)])[0]))} bytes"
        except Exception as error:
            outcome = type(error).__name__
        faults[f"object {change} since it was read"] = outcome
    return faults


def _shard() -> bytes:
    import random

    return random.Random(5).randbytes(SHARD)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[Any, int]]:
    """The store with its objects, and the port at which a contestant says which faults it wants."""
    sys.path.insert(0, str(ROOT / "tests"))
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    import boto3
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from faulty_s3 import serve_s3

    with serve_s3() as proxy:
        client = boto3.client(
            "s3", endpoint_url="http://{}:{}".format(*proxy.upstream), region_name="us-east-1",
            aws_access_key_id="key", aws_secret_access_key="secret",
        )  # fmt: skip
        put = client.put_object
        put(Bucket="bucket", Key="shard", Body=_shard())
        for number in range(FILES):
            put(Bucket="bucket", Key=f"small/{number:05d}", Body=b"x" * 1000)
        rows = np.random.default_rng(1).random((1_000_000, 3))
        pq.write_table(pa.table({name: rows[:, n] for n, name in enumerate("abc")}), folder / "table")
        put(Bucket="bucket", Key="table", Body=(folder / "table").read_bytes())
        (folder / "upload").write_bytes(os.urandom(UPLOAD))

        class Control(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                verb, *rest = self.path[1:].split("/")
                answer: Any = None
                if verb == "count":
                    answer = len(proxy.requests)
                elif verb == "forget":
                    proxy.forget()
                elif verb == "fault":
                    fault = FAULTS[rest[1].replace("_", " ")]
                    proxy.always = fault if rest[0] == "always" else None
                    if rest[0] == "once":
                        proxy.fail("GET", fault)
                elif rest == ["shorter"]:
                    put(Bucket="bucket", Key="changing", Body=b"y" * 100)
                else:
                    client.delete_object(Bucket="bucket", Key="changing")
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

        control = ThreadingHTTPServer(("127.0.0.1", 0), Control)
        threading.Thread(target=control.serve_forever, daemon=True).start()
        yield proxy, control.server_port
        control.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--compete", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compete:
        name, port, control, folder, round_ = given.compete
        compete(name, int(port), int(control), Path(folder), round_ == "0")
        return
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary, served(Path(temporary)) as (proxy, control):
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        for round_ in range(given.rounds):
            for name in CONTESTANTS:
                environment = os.environ | keys | {"AWS_EC2_METADATA_DISABLED": "true"}
                if name == "ours, other":
                    if given.other is None:
                        continue
                    environment["PYTHONPATH"] = str(given.other)
                proxy.forget()
                told = [name, str(proxy.port), str(control), temporary, str(round_)]
                command = [sys.executable, __file__, "--compete", *told]
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if run.returncode:
                    print(f"{name} ended with {run.returncode}:\n{run.stderr[-3000:]}", file=sys.stderr, flush=True)
                    continue
                results.setdefault(name, []).append(json.loads(run.stdout.splitlines()[-1]))
                print(f"round {round_ + 1}, {name}: done", file=sys.stderr, flush=True)
    report(results)


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    names = list(results)
    print(f"| {' | '.join(['requests, CPU ms, MB/s', *names])} |\n|{'---|' * (len(names) + 1)}")
    for work in results[names[0]][0]["figures"]:
        cells = []
        for name in names:
            rounds = [one["figures"][work] for one in results[name]]
            cpu, wall = (median(one[key] for one in rounds) for key in ("cpu", "wall"))
            speed = f"{rounds[0]['bytes'] / wall / 1e6:.0f}" if rounds[0]["bytes"] > 1e6 else f"{wall * 1e3:.0f} ms"
            cells.append(f"{rounds[0]['requests']}, {cpu * 1e3:.0f}, {speed}")
        print(f"| {' | '.join([work, *cells])} |")
    print(f"\n| {' | '.join(['fault', *names])} |\n|{'---|' * (len(names) + 1)}")
    for fault in results[names[0]][0]["faults"]:
        print(f"| {' | '.join([fault, *(results[name][0]['faults'][fault] for name in names)])} |")


if __name__ == "__main__":
    main()
