"""What training costs beside the model: the parts of a restart, and the loop's own work in a step.

    python benchmarks/training.py            (a few minutes on two cores; leave the machine alone meanwhile)

* restart: a run of the demo's size is killed and goes on; each start's parts are in the run's `starts.jsonl`.
* overhead: of each step after the kill, what passes outside of loss, backward and the engine's step: waiting for data,
  agreement of the ranks, guard, accounts, tracking, checkpoints. Both are taken in the same step of the same process,
  since two runs differ by more than the loop's work on a shared machine. On CPUs alone: a GPU's calls return early.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.driver import worker_group
from domainshuttle.platform.driver.driver import train_run
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import SegmentEnd, WorkerJob

CLI = [sys.executable, "-m", "domainshuttle.platform.cli"]
STAGE = "stage2"
TIMES = "times.json"
WARM_UP = 5
"""Steps after the start that do not count."""
console = Console()


def prepare(folder: Path, steps: int) -> tuple[Path, RunConfig]:
    """The demo with one stage, and its corpora."""
    config = load_config("demo", [f"data={folder}/data", f"output={folder}/runs", "tracking.every=10"])
    content = config.model_dump(mode="json")
    content["stages"] = [{**stage, "steps": steps} for stage in content["stages"] if stage["name"] == STAGE]
    content["checkpoint"]["every"] = 50
    config = RunConfig.model_validate(content)
    path = folder / "training.yaml"
    path.write_text(config.to_yaml())
    for verb in ("build", "encode"):
        command = [*CLI, "data", verb, str(path), "--corpus", "sprites-videos"]
        subprocess.run(command, check=True)
    return path, config


def timed_work(config: dict[str, WorkerJob]) -> SegmentEnd:
    """The worker's function, with the time that passes inside of the model and the engine taken apart."""
    # here, since Ray sends this function by value, with what it names
    import torch.distributed as dist

    from domainshuttle.platform.driver import worker_group
    from domainshuttle.platform.engine import stage_model
    from domainshuttle.platform.engine.zero3 import Engine

    steps: list[tuple[float, float]] = []
    inside, ended = 0.0, None

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal inside
            began = time.perf_counter()
            result = function(*given, **named)
            inside += time.perf_counter() - began
            return result

        return call

    engine_step = timed(Engine.step)

    def step(self: Engine, number: int) -> Any:
        nonlocal inside, ended
        result = engine_step(self, number)
        now = time.perf_counter()
        if ended is not None:
            steps.append((now - ended, inside))
        ended, inside = now, 0.0
        return result

    stage_model.training_loss = timed(stage_model.training_loss)
    Engine.backward, Engine.step = timed(Engine.backward), step
    end = worker_group._work(config)
    if dist.get_rank() == 0:
        Path(config["job"].config["output"], TIMES).write_text(json.dumps(steps))
    return end


def drive(path: Path) -> int:
    """The run's driver, whose workers take the time."""
    worker_group._work = timed_work
    return train_run(load_config(path))


def train_twice(path: Path, run: Run) -> list[tuple[float, float]]:
    """Kills a run half way and lets it go on; of its second half, seconds of each step and of these the model's."""
    log = path.with_name("train.log").open("w")
    half = run.segments()[0].last_step // 2
    for attempt in range(2):
        command = [sys.executable, __file__, "--drive", str(path)]
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while attempt == 0 and run.read_progress().get("step", 0) < half:
            time.sleep(0.5)
            if driver.poll() is not None:
                raise SystemExit(f"training ended early: see {log.name}")
        if attempt == 0:
            for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
                process.kill()
        driver.wait()
    return json.loads(Path(run.config.output, TIMES).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("build/training-benchmark"), help="is removed first")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        sys.exit(drive(options.drive))
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path, config = prepare(folder, options.steps)
    run = Run(config)
    steps = train_twice(path, run)[WARM_UP:]
    console.print(f"{date.today()}, {os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}")
    starts = [json.loads(line)["seconds"] for line in run.starts_path.read_text().splitlines()]
    table = Table(title="A start, in seconds")
    table.add_column("part")
    for number in range(len(starts)):
        table.add_column("first" if number == 0 else "after the kill", justify="right")
    meaning = {
        "asked": "the command: Ray, MLflow, corpora", "process": "Ray Train places the workers",
        "imports": "a worker's imports, the group's set-up", "build": "model, engine, loader",
        "restore": "restore", "first_step": "first step, with the first data",
    }  # fmt: skip
    for part, words in meaning.items():
        table.add_row(words, *(f"{start.get(part, 0.0):.1f}" for start in starts))
    table.add_row("in all", *(f"{sum(start.values()):.1f}" for start in starts))
    console.print(table)
    own = [whole - model for whole, model in steps]
    console.print(
        f"A step: {median(whole for whole, _ in steps):.3f} s (median of {len(steps)}). Outside of model and engine: "
        f"median {1e3 * median(own):.1f} ms, mean {1e3 * mean(own):.1f} ms with the checkpoints; "
        f"{mean(own):.2%} of a step of one second"
    )


if __name__ == "__main__":
    main()
