"""The jobs of a cluster that train runs, for people and programs."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from domainshuttle.cluster.submit import JobRecord
from domainshuttle.platform.console import console
from domainshuttle.platform.report.text import Prose, Records
from domainshuttle.platform.run.eta import span


def print_jobs(jobs: Sequence[JobRecord], as_json: bool) -> None:
    """Prints them, a record each."""
    if as_json:
        sys.stdout.write(json.dumps([asdict(job) for job in jobs], indent=2) + "\n")
        return
    if not jobs:
        console.print(Prose("This cluster has no jobs that train runs."))
        return
    rows = [
        [
            job.id,
            job.run,
            job.status.lower(),
            datetime.fromtimestamp(job.started).strftime("%m-%d %H:%M:%S"),
            span(max(0.0, (job.ended or time.time()) - job.started)),
            "" if job.code is None else str(job.code),
            job.message.splitlines()[0][:200] if job.message and not job.live else "",
        ]
        for job in jobs
    ]
    fields = ("job", "run", "status", "began", "duration", "exit code", "message")
    console.print(Records(fields, rows, "Jobs", ["exit code"]))
