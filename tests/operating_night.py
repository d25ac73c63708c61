"""Runs the commands of docs/operating.md as they stand, from an empty home, on a terminal of 80 columns.

In namespaces of its own, so that Ray's and MLflow's usual ports are free and everything ends with it:
unshare -rnpf --mount-proc bash -c 'python tests/operating_night.py FOLDER; exit $?'. Prints a JSON line a command.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

from domainshuttle.cluster.local import ClusterError
from domainshuttle.platform.commands.status import status_record
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.tracking.outbox import reachable
from domainshuttle.platform.tracking.queries import TrackingError, read_runs

DOCS = Path(__file__).resolve().parents[1] / "docs" / "operating.md"
MLFLOW = "http://127.0.0.1:5000"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07")
PATIENCE = 420.0
ENDS = {
    "stopped": ("KILLED", 3, "Stopped after"),
    "budget spent": ("KILLED", 3, "Budget spent after"),
    "diverged": ("FAILED", 2, ""),
    "failed": ("FAILED", 2, ""),
    "finished": ("FINISHED", 0, "Finished after"),
}
"""What MLflow, the exit code of the run's newest job and its log must say, by what `status` says; of a run at work
RUNNING. Where a run failed the log has the reason that `status` has."""


def steps_of(text: str) -> list[tuple[str, str, int]]:
    """The commands of the night: each with what it waits for, and its exit code."""
    night = text.partition("<!-- night -->")[2].partition("<!-- end of the night -->")[0]
    steps, wait = [], ""
    for line in night.splitlines():
        if after := re.fullmatch(r"<!-- after: (.*) -->", line):
            wait = after[1]
        elif line.startswith("$ "):
            command, _, code = line[2:].partition(" # code ")
            steps.append((wait, command, int(code or 0)))
            wait = ""
    return steps


def reached(run: Path, wanted: str) -> bool:
    """Whether a run is where a command waits for: `attempt 2 step 30`."""
    numbers = dict(re.findall(r"(attempt|step) (\d+)", wanted))
    try:
        record = status_record(run)
    except (ConfigError, OSError):
        return False
    if record["attempt"] < int(numbers.get("attempt", 0)):
        return False
    if "step" not in numbers:
        return True
    least, working = int(numbers["step"]), ("training", "saving", "sampling")
    at = [worker["step"] if worker["segment"] == "stage2" else -1 for worker in record["workers"]]
    return record["segment"] == "stage2" and record["state"] in working and min(at, default=-1) >= least


def on_a_terminal(command: str) -> tuple[int, str]:
    """The code of a command and what it prints to a terminal of 80 columns; one with & goes on behind it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 80, 0, 0))
    background = "&" in command.replace("2>&1", "").replace("&&", "")
    full = command if "| head" in command else f"set -o pipefail; {command}"  # head ends what it has read enough of
    process = subprocess.Popen(["bash", "-c", full], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # EIO, when the last writer has closed it
        while not (background and process.poll() is not None) and (data := os.read(ours, 1 << 16)):
            printed += data
    os.close(ours)
    text = _ESCAPES.sub("", printed.decode(errors="replace")).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    lines = [line for line in lines if not re.search(r"━ +\d+/", line)]  # bars move, and go away
    return process.wait(), "\n".join(lines).strip("\n")


def agreement(run: Path) -> dict[str, Any]:
    """What `status`, MLflow, the newest job's exit code and its log say of a run; all have some seconds to be told."""
    said: dict[str, Any] = {}
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            record = status_record(run)
            (tracked,) = [one for one in read_runs(MLFLOW, ["night"]) if one.parent is None and one.name == run.name]
            code, log = newest_job(run.name)
        except (ConfigError, TrackingError, ClusterError, OSError, ValueError) as error:
            said["error"] = repr(error)
            time.sleep(1)
            continue
        mlflow, wanted, words = ENDS.get(record["state"], ("RUNNING", None, ""))
        told = " ".join((record["why"].splitlines() or [""])[0].split()) or words
        said = {"status": record["state"], "why": record["why"], "mlflow": tracked.status, "code": code}
        said["logged"] = told in log
        said["agree"] = (tracked.status, code) == (mlflow, wanted) and (said["logged"] or wanted is None)
        if said["agree"]:
            break
        time.sleep(1)
    return said


def newest_job(run: str) -> tuple[int | None, str]:
    """The exit code of a run's newest job, None while it is at work, and its log in one line."""
    from domainshuttle.cluster.submit import find_job, list_jobs  # takes Ray's mode of the moment

    newest = next(job for job in list_jobs() if job.run == run)
    job = find_job(newest.id)
    log = " ".join(_ESCAPES.sub("", job.client.get_job_logs(newest.id)).split())
    return None if newest.live else job.exit_code(), log


def main(folder: Path) -> None:
    """Runs all commands in `folder`, which has night.yaml."""
    os.chdir(folder)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_"))]:
        del os.environ[name]
    home = folder / "home"
    home.mkdir()
    os.environ |= {"HOME": str(home), "RAY_TMPDIR": str(folder / "r"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    for wait, command, expected in steps_of(DOCS.read_text()):
        began = time.monotonic()
        while wait and not reached(folder / "runs" / "night", wait) and time.monotonic() - began < PATIENCE:
            time.sleep(1)
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            os.environ[name] = value
            code, text = 0, ""
        else:
            code, text = on_a_terminal(command)
        if command.startswith("mlflow server"):
            until = time.monotonic() + 300
            while time.monotonic() < until and not reachable(MLFLOW):
                time.sleep(1)
        waited = time.monotonic() - began
        line = {"command": command, "code": code, "expected": expected, "text": text, "waited": round(waited)}
        line["late"] = bool(wait) and waited >= PATIENCE
        for run in (folder / "runs" / "night", folder / "runs" / "wild"):
            if (run / "config.yaml").exists() and "domainshuttle s" in command:
                line[run.name] = agreement(run)
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        if code != expected and not (folder / "runs" / "night" / "config.yaml").exists():
            raise SystemExit(1)  # nothing could follow


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
