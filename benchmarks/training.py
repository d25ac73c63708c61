"""What training costs beside the model: the parts of a restart, and the loop's own work in a step.

    python benchmarks/training.py            (a few minutes on two cores; leave the machine alone meanwhile)

* restart: a run of the demo's size is killed and goes on; each start's parts are in the run's `starts.jsonl`.
* overhead: the same steps by the recipe (loader, guard, agreement, accounts, tracking) and bare (the same engine on one
  batch, nothing else), two processes each; the difference of the medians is the loop's own work.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import training_loss
from domainshuttle.pipelines.feed import planned_rows
from domainshuttle.pipelines.loader import Loader
from domainshuttle.platform.build import blueprint
from domainshuttle.platform.config import RunConfig, load_config
from domainshuttle.platform.engine import Engine, select_trained
from domainshuttle.platform.records import read_history, read_runs
from domainshuttle.platform.schedule import Run
from domainshuttle.platform.train import make_feed

CLI = [sys.executable, "-m", "domainshuttle.platform.cli"]
STAGE = "stage2"
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


def recipe(path: Path, config: RunConfig) -> list[float]:
    """Seconds a step, each a mean of ten, of a run that is killed once half way."""
    run = Run(config)
    log = path.with_name("train.log").open("w")
    for attempt in range(2):
        driver = subprocess.Popen([*CLI, "train", str(path)], stdout=log, stderr=log, start_new_session=True)
        while attempt == 0 and run.read_progress().get("step", 0) < config.stages[0].steps // 2:
            time.sleep(0.5)
            if driver.poll() is not None:
                raise SystemExit(f"training ended early: see {log.name}")
        if attempt == 0:
            for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
                process.kill()
        driver.wait()
    records = {record.name: record for record in read_runs(config.tracking_uri, [config.tracking.experiment])}
    history = [value for _, value in read_history(config.tracking_uri, records[STAGE].id, "step_seconds")]
    return history[2:]  # the first steps warm up


def bare(rank: int, port: int, config: RunConfig, steps: int, out: Path) -> None:
    """One of two processes that do the engine's steps on one batch and nothing else."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    os.nice(15)  # as Ray's workers are
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    segment = Run(config).segments()[0]
    design = blueprint(config.model, None, segment.seed)
    select_trained(design.outline, segment.stage.trained)
    feed = make_feed(config, segment)
    rows = planned_rows(feed, 0, 1, rank, 2)

    loader: Loader[Any] = Loader([rows], feed, rank, 2, out.parent / f"quarantine-{rank}.jsonl")
    batch = next(iter(loader)).batch
    engine = Engine(design, segment.stage, config.engine, loader.accumulation)
    flow, weight = FlowConfig(**segment.flow.model_dump()), segment.stage.loss.cross_pair_weight
    times = []
    for _ in range(steps // 10):
        began = time.perf_counter()
        for step in range(10):
            loss = training_loss(
                engine, batch.to(engine.device, engine.dtype), run_seed=1, step=step, flow=flow,
                cross_pair_weight=weight, cross_pair_target="stop_gradient",
            )  # fmt: skip
            engine.backward(loss.loss)
            engine.step(step)
        times.append((time.perf_counter() - began) / 10)
    if rank == 0:
        out.write_text(json.dumps(times[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("build/training-benchmark"), help="is removed first")
    options = parser.parse_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path, config = prepare(folder, options.steps)
    loop = recipe(path, config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    out = folder / "bare.json"
    mp.spawn(bare, (port, config, options.steps, out), nprocs=2)
    alone = json.loads(out.read_text())
    console.print(f"{date.today()}, {os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}")
    starts = [json.loads(line)["seconds"] for line in Run(config).starts_path.read_text().splitlines()]
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
        table.add_row(words, *(f"{start[part]:.1f}" for start in starts))
    table.add_row("in all", *(f"{sum(start.values()):.1f}" for start in starts))
    console.print(table)
    for name, times in (("recipe", loop), ("bare", alone)):
        low, middle, high = (1e3 * value for value in (min(times), median(times), max(times)))
        console.print(f"A step, {name}: median {middle:.1f} ms ({low:.1f} to {high:.1f})")
    difference = median(loop) - median(alone)
    console.print(f"The loop's own work: {difference * 1e3:.1f} ms, {difference:.2%} of a step of one second")


if __name__ == "__main__":
    main()
