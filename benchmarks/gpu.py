"""Training at Wan's sizes on one GPU: the engine's choices side by side, and a whole run by the product's commands.

    python benchmarks/gpu.py engine --size wan2.1-t2v-1.3b                     # steps of the engine alone
    python benchmarks/gpu.py engine --size wan2.1-t2v-14b --layers 8           # of the width of 14B, not as deep
    python benchmarks/gpu.py run --size wan2.1-t2v-1.3b --steps 24             # build, encode, train, kill, resume

Clips are 81 frames of 480x832 unless --bucket says otherwise; weights are random, also the VAE's, which has Wan's
size. Stage 2 of the paper is trained: self-attention and references, with the cross-pair consistency loss. Each engine
is measured in a process of its own, so that one that runs out of memory is a row and not an end.
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
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chaos import workers_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import training_loss
from domainshuttle.model.spec import ModelSpec
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.platform.config.schema import EngineSection, ModelSection, RunConfig, StageSection
from domainshuttle.platform.engine.initialization import Blueprint, blueprint
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.sample_audit import audit_samples
from domainshuttle.platform.run.weights_origin import WeightsOrigin
from domainshuttle.platform.tracking.queries import read_history, read_runs
from domainshuttle.platform.training.mfu import Utilization

CLI = [sys.executable, "-m", "domainshuttle.platform.cli"]
STAGE_2 = ["blocks.*.attn1.*", "*_ref*"]
ENGINES: dict[str, dict[str, Any]] = {
    "keep all": {},
    "recompute all": {"activations": {"mode": "full"}},
    "recompute all, inputs on the host": {"activations": {"mode": "full", "offload": True}},
    "recompute all but attention": {"activations": {"mode": "attention"}},
    "recompute every second": {"activations": {"mode": "every", "every": 2}},
    "recompute all, compiled": {"activations": {"mode": "full"}, "compile": "inductor"},
    "recompute all, flash attention 4": {"activations": {"mode": "full"}, "attention_backend": "fa4"},
    "recompute all, cuDNN's attention": {"activations": {"mode": "full"}, "attention_backend": "_native_cudnn"},
    "recompute all, optimiser on the host": {"activations": {"mode": "full"}, "offload_optimizer": True},
}
GIGA = 10**9
console = Console(width=140)


def sized(name: str, layers: int | None, text_width: int | None = None) -> dict[str, Any]:
    """Arguments of a transformer of Wan's size, of fewer layers or narrower text where that is asked for."""
    spec = ModelSpec.preset(name)
    changes = {"num_layers": layers, "text_dim": text_width}
    spec = replace(spec, **{key: value for key, value in changes.items() if value is not None})
    # the parts of the method are the model section's own choices
    return {key: value for key, value in spec.transformer_config().items() if key not in ModelSection().choices}


def drawn_on_the_device(design: Blueprint) -> Blueprint:
    """The same outline with small random weights: Wan's own initialisation draws billions of numbers on one core."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in design.outline.named_parameters():
            yield name, torch.randn(parameter.shape, device="cuda") * 0.02

    return Blueprint(design.outline, weights)


def one_engine(options: argparse.Namespace) -> dict[str, float]:
    """Steps of one engine on one batch in this process, and the copy that a checkpoint holds the training up for."""
    import torch.distributed as dist

    from domainshuttle.platform.engine.trained_parameters import select_trained
    from domainshuttle.platform.engine.zero3 import Engine

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    size = sized(options.size, options.layers)
    design = drawn_on_the_device(blueprint(ModelSection(size=size), WeightsOrigin(None, 0)))
    trained = select_trained(design.outline, STAGE_2)
    stage = StageSection(
        name="stage2", mixture={"clips": 1}, steps=100, global_batch=1, micro_batch=1, learning_rate=1e-5,
        trained=STAGE_2,
    )  # fmt: skip
    engine = Engine(design, stage, EngineSection(**ENGINES[options.one]), 1)
    channels, frames, height, width = parse_bucket(options.bucket).latent_shape
    assert channels == size.get("in_channels", 16)
    batch = TrainingBatch.fake(
        1, frames=frames, height=height, width=width, references=options.references, text_tokens=512, text_dim=4096,
        paired=options.paired,
    ).to(engine.device, engine.dtype)  # fmt: skip
    flow, counted = FlowConfig(), Utilization(dict(design.outline.config), STAGE_2)
    times = []
    for step in range(options.warm_up + options.steps):
        if step == options.warm_up:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        weight = 0.1 if options.paired else 0.0
        loss = training_loss(engine, batch, run_seed=1, step=step, flow=flow, cross_pair_weight=weight)
        engine.backward(loss.loss)
        engine.step(step)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    counted.add(batch)
    seconds, peak = median(times[options.warm_up :]), torch.cuda.max_memory_allocated()
    stall = writing = float("nan")
    if options.checkpoint:
        write = engine.snapshot()  # its pinned memory is made once, and used again after the write
        began = time.perf_counter()
        write(Path(options.folder))
        writing = time.perf_counter() - began
        began = time.perf_counter()
        engine.snapshot()
        stall = time.perf_counter() - began
    return {
        "first": times[0], "seconds": seconds, "mfu": counted.take(seconds).get("mfu", float("nan")), "peak": peak,
        "stall": stall, "writing": writing, "bytes": engine.checkpoint_bytes(trained.trained_count),
        "trained": trained.trained_count, "frozen": trained.frozen_count,
    }  # fmt: skip


def engines(options: argparse.Namespace) -> None:
    """One row for each engine asked for."""
    bucket, spec = parse_bucket(options.bucket), ModelSpec.preset(options.size)
    latent = bucket.latent_shape[1:]
    tokens = spec.tokens(latent) + options.references * spec.reference_tokens(latent)
    title = f"{options.size}, {options.layers or spec.num_layers} layers, {options.bucket}, {options.references} "
    title += f"references ({tokens} tokens), {'with' if options.paired else 'without'} the cross-pair loss"
    table = Table(title=title)
    for column in ("engine", "first step", "step", "MFU", "peak memory", "a checkpoint holds up", "its writing"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name in options.engines or ENGINES:
        folder = Path(options.folder) / "engine"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--folder", str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if "Error" in line] or run.stderr.splitlines()[-1:]
            table.add_row(name, (lines or ["?"])[-1][:100])
            console.print(name, run.stderr[-1500:] if options.verbose else lines[-1:])
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        table.add_row(
            name, f"{found['first']:.1f} s", f"{found['seconds']:.3f} s", f"{found['mfu']:.1%}",
            f"{found['peak'] / GIGA:.1f} GB", f"{found['stall']:.2f} s", f"{found['writing']:.1f} s",
        )  # fmt: skip
        console.print(name, json.dumps(found))
    console.print(f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    console.print(table)


def whole_run(options: argparse.Namespace) -> None:
    """A run as a user makes it, with a worker killed half way; what it logged is shown."""
    from diffusers import AutoencoderKLWan

    folder = Path(options.folder).absolute()
    shutil.rmtree(folder / "runs", ignore_errors=True)  # corpora that are there are used again
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    torch.manual_seed(0)
    AutoencoderKLWan().save_pretrained(folder / "vae")
    console.print(f"a VAE of Wan's size, random: {time.monotonic() - began:.1f} s")
    bucket = parse_bucket(options.bucket)
    side = min(bucket.height, 480)
    config = RunConfig.model_validate(
        {
            "name": "gpu",
            "data": f"{folder}/data",
            "output": f"{folder}/runs",
            "model": {"size": sized(options.size, options.layers, text_width=64)},
            "encoders": {"video": str(folder / "vae"), "text": "byte-umt5", "text_len": 512},
            "corpora": {
                "clips": {
                    "build": {
                        "builder": "sprites", "kind": "video", "samples": options.samples, "side": side,
                        "frames": bucket.frames, "fps": 16, "two_subjects": 0.5, "references_per_subject": 2,
                    },
                    "buckets": [options.bucket],
                }
            },
            "stages": [
                {
                    "name": "stage2", "mixture": {"clips": 1}, "steps": options.steps, "global_batch": options.batch,
                    "micro_batch": 1, "learning_rate": 1e-5, "trained": STAGE_2, "loss": {"cross_pair_weight": 0.1},
                }
            ],
            "cluster": {"workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 4},
            "engine": {"activations": {"mode": "full"}},
            "checkpoint": {"every": max(2, options.steps // 4)},
            "tracking": {"every": 2},
        }
    )  # fmt: skip
    path = folder / "gpu.yaml"
    path.write_text(config.to_yaml())
    times = {}
    for verb in ("build", "encode"):
        began = time.monotonic()
        subprocess.run([*CLI, "data", verb, str(path)], check=True)
        times[verb] = time.monotonic() - began
    run = Run(config)
    began = time.monotonic()
    driver = subprocess.Popen([*CLI, "train", str(path)])
    killed = False
    while driver.poll() is None:
        state = run.read_progress()
        if not killed and state and state["state"] == "training" and state["step"] > options.steps * 5 // 8:
            for worker in workers_of(driver.pid):
                worker.kill()
                killed = True
        time.sleep(0.1)
    times["train"] = time.monotonic() - began
    if driver.returncode:
        raise SystemExit(f"training ended with code {driver.returncode}")
    books = audit_samples(config)
    records = {record.name: record for record in read_runs(config.tracking_uri, [config.tracking.experiment])}
    console.print(f"{date.today()}, {torch.cuda.get_device_name()}, {platform.machine()}, torch {torch.__version__}")
    console.print(
        f"seconds: {json.dumps({key: round(value, 1) for key, value in times.items()})}, {options.samples} clips"
    )
    for name in ("step_seconds", "mfu", "data_wait_fraction", "checkpoint_stall_seconds", "loss"):
        history = [value for _, value in read_history(config.tracking_uri, records["stage2"].id, name)]
        if not history:  # of a device whose peak is not known there is no MFU
            continue
        console.print(f"{name}: median {median(history):.4g}; {', '.join(f'{value:.4g}' for value in history)}")
    for line in run.starts_path.read_text().splitlines():
        console.print("a start:", json.dumps({k: round(v, 1) for k, v in json.loads(line)["seconds"].items()}))
    console.print(books)
    console.print(Ledger(run.ledger_path).summary().metrics())
    subprocess.run([*CLI, "status", str(run.folder)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, action in (("engine", engines), ("run", whole_run)):
        verb = verbs.add_parser(name)
        verb.set_defaults(action=action)
        verb.add_argument("--size", default="wan2.1-t2v-1.3b")
        verb.add_argument("--layers", type=int, default=None, help="fewer than the size has")
        verb.add_argument("--bucket", default="81x480x832")
        verb.add_argument("--folder", default="build/gpu", help="for what is made")
        verb.add_argument("--steps", type=int, default=24 if name == "run" else 5)
        if name == "run":
            verb.add_argument("--samples", type=int, default=12)
            verb.add_argument("--batch", type=int, default=1)
            continue
        verb.add_argument("--warm-up", type=int, default=2)
        verb.add_argument("--references", type=int, default=5)
        verb.add_argument("--paired", action=argparse.BooleanOptionalAction, default=True)
        verb.add_argument("--engines", nargs="+", choices=list(ENGINES), default=None)
        verb.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True)
        verb.add_argument("--timeout", type=float, default=300)
        verb.add_argument("--verbose", action="store_true")
        verb.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; on a CPU measure with benchmarks/training.py and benchmarks/model.py")
    if getattr(options, "one", None):
        print(json.dumps(one_engine(options)))
    else:
        options.action(options)


if __name__ == "__main__":
    main()
