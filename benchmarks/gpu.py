"""Training at Wan's sizes on one GPU: where a step's time goes, and a whole run by the product's commands.

    python benchmarks/gpu.py budget                                            # in 12 minutes: everything below
    python benchmarks/gpu.py budget --dry                                      # the same at a tiny size, on a CPU
    python benchmarks/gpu.py engine --size wan2.1-t2v-1.3b                     # steps of the engine alone
    python benchmarks/gpu.py engine --size wan2.1-t2v-14b --layers 8           # of the width of 14B, not as deep
    python benchmarks/gpu.py run --size wan2.1-t2v-1.3b --steps 24             # build, encode, train, kill, resume

Clips are 81 frames of 480x832 unless --bucket says otherwise; weights are random, also the VAE's, which has Wan's
size. Stage 2 of the paper is trained: self-attention and references, with the cross-pair consistency loss. Each row
is measured in a process of its own, so that one that runs out of memory, or of time, is a row and not an end.

`budget` appends a JSON line a row to `rows.jsonl` in its folder, and called again makes only the rows that are missing;
`picture` draws where the time of a layer goes from them (`budget.png`).
"""

import argparse
import functools
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chaos import processes_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from domainshuttle.model.attention import attend
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
    "recompute all": {"activations": {"mode": "full"}},
    "recompute all but attention": {"activations": {"mode": "attention"}},
    "the same, compiled": {"activations": {"mode": "attention"}, "compile": "inductor"},
    "the same, kernels": {"activations": {"mode": "attention"}, "kernels": "triton"},
    "the same, kernels, FlashAttention 4": {
        "activations": {"mode": "attention"}, "kernels": "triton", "attention_backend": "fa4",
    },
    "the same, kernels, FlashAttention 2": {
        "activations": {"mode": "attention"}, "kernels": "triton", "attention_backend": "_native_flash",
    },
    "keep attention and projections, kernels": {
        "activations": {"mode": "products", "keep": {"attention": 1000, "qkv": 1000}}, "kernels": "triton",
    },
    "keep all": {"activations": {"mode": "none"}},
    "recompute all, inputs on the host": {"activations": {"mode": "full", "offload": True}},
    "recompute every second": {"activations": {"mode": "every", "every": 2}},
    "recompute all, optimiser on the host": {"activations": {"mode": "full"}, "offload_optimizer": True},
}  # fmt: skip
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


def one_engine(options: argparse.Namespace) -> dict[str, Any]:
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
    steps, first = options.warm_up + options.steps, None
    weight = 0.1 if options.paired else 0.0

    def one_step(step: int) -> tuple[float, float]:
        loss = training_loss(engine, batch, run_seed=1, step=step, flow=flow, cross_pair_weight=weight)
        engine.backward(loss.loss)
        return loss.loss.item(), engine.step(step).grad_norm

    for step in range(steps):
        if step == options.warm_up:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = one_step(step)
        first = first or result
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    kinds = profiled(lambda: one_step(steps)) if getattr(options, "profile", False) else None
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
        "trained": trained.trained_count, "frozen": trained.frozen_count, "attention": str(engine.attention),
        "loss of step 1": first and first[0], "norm of step 1": first and first[1], "kinds": kinds,
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


# A step's budget: ceilings of the machine, a block by itself, engines, and what runs in a step


@dataclass(frozen=True)
class Shape:
    """What one block computes on: of the 14B at 81x480x832 with five references, or tiny."""

    width: int
    hidden: int
    heads: int
    frames: int
    references: int
    tokens: int
    text: int

    @property
    def all_tokens(self) -> int:
        return (self.frames + self.references) * self.tokens


WHOLE, DRY = Shape(5120, 13824, 40, 21, 5, 1560, 512), Shape(64, 96, 4, 3, 2, 12, 8)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(run: Callable[[], object], rounds: int = 5) -> float:
    """Median after one run."""
    times = []
    for _ in range(rounds + 1):
        synchronise()
        began = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceilings(shape: Shape) -> dict[str, Any]:
    """What the machine does at most, at our sizes: products, a copy, and each kernel of attention both ways."""
    from domainshuttle.platform.engine.attention_kernels import AttentionKernels

    made: dict[str, Any] = {}
    n, place = shape.all_tokens, {"device": device(), "dtype": torch.bfloat16}
    for inner, outer in ((shape.width, shape.width), (shape.width, shape.hidden), (shape.hidden, shape.width)):
        left, right = torch.randn(n, inner, **place), torch.randn(inner, outer, **place)
        seconds = seconds_of(lambda left=left, right=right: left @ right)
        made[f"product {inner}x{outer}, TFLOP/s"] = 2 * n * inner * outer / seconds / 1e12
    x = torch.randn(n, shape.width, **place)
    made["copy, TB/s"] = 2 * x.numel() * 2 / seconds_of(x.clone) / 1e12
    flops = 4 * n * n * shape.width
    for name in (None, "_native_cudnn", "_native_flash", "fa4", "fa3"):
        label = name or "torch's choice"
        try:
            section = EngineSection(attention_backend=name)
            kernels = AttentionKernels.tried(section, device(), shape.heads, shape.width // shape.heads)
            qkv = [
                torch.randn(1, n, shape.heads, shape.width // shape.heads, **place).requires_grad_() for _ in range(3)
            ]
            forward = seconds_of(lambda qkv=qkv, kernels=kernels: attend(*qkv, None, kernels.backend), 3)
            back = torch.randn_like(qkv[0])
            both = seconds_of(
                lambda qkv=qkv, kernels=kernels, back=back: torch.autograd.grad(
                    attend(*qkv, None, kernels.backend), qkv, back
                ),
                3,
            )
        except (ValueError, RuntimeError) as error:  # not here, or out of memory: a ceiling less
            made[f"attention, {label}"] = str(error).splitlines()[0][:120]
            continue
        made[f"attention, {label}"] = {
            "kernel": kernels.unmasked,
            "forward, TFLOP/s": flops / forward / 1e12,
            "backward, TFLOP/s": 2.5 * flops / max(both - forward, 1e-9) / 1e12,
        }
    return made


def one_block(shape: Shape) -> dict[str, Any]:
    """A block by itself with what stage 2 trains: eager, compiled, and by kernels; times, memory, and how far each is
    from float32."""
    from domainshuttle.model import fused
    from domainshuttle.model.modulation import Rows
    from domainshuttle.model.mot import DomainMoTBlock

    torch.manual_seed(0)
    with torch.device(device()):
        block = DomainMoTBlock(shape.width, shape.hidden, shape.heads).bfloat16()
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name.startswith("attn1.") or "_ref" in name)
            if any(part in ("norm1", "norm2", "norm3") or "table" in part for part in name.split(".")):
                parameter.data = parameter.data.float()
        frames, n = shape.frames + shape.references, shape.all_tokens
        x = torch.randn(1, frames, shape.tokens, shape.width).bfloat16().requires_grad_()
        text = torch.randn(1, shape.text, shape.width).bfloat16()
        angles = torch.rand(1, n, 1, shape.width // shape.heads)
        rows = Rows(
            torch.randn(1, 1, 6, shape.width), torch.randn(1, shape.references, 6, shape.width).requires_grad_()
        )
        back = torch.randn_like(x)
    given = text, rows, (angles.cos(), angles.sin()), None
    wanted = [x, rows.reference, *(one for one in block.parameters() if one.requires_grad)]
    ways: dict[str, Callable[..., Tensor]] = {
        "eager": block.transform,
        "compiled": torch.compile(block.transform, backend="inductor" if device().type == "cuda" else "aot_eager"),
    }
    if fused.available() and (device().type == "cuda" or os.environ.get("TRITON_INTERPRET")):
        ways["kernels"] = functools.partial(fused.transform, block)
    made: dict[str, Any] = {}
    reference: list[Tensor] = []
    for name, way in ways.items():
        try:
            if device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            forward = seconds_of(lambda way=way: way(x, *given), 3)
            both = seconds_of(lambda way=way: torch.autograd.grad(way(x, *given), wanted, back), 3)
            out = way(x, *given)
            found = [out.detach(), *torch.autograd.grad(out, wanted, back)]
        except Exception as error:  # of a compiler: any
            made[name] = str(error).strip().splitlines()[0][:200]
            continue
        reference = reference or found
        apart = [
            float((one.float() - other.float()).norm() / other.float().norm())
            for one, other in zip(found, reference, strict=True)
        ]
        peak = torch.cuda.max_memory_allocated() / GIGA if device().type == "cuda" else None
        made[name] = {
            "forward, ms": forward * 1e3, "forward and backward, ms": both * 1e3, "peak, GB": peak,
            "values from eager's": apart[0], "gradients from eager's, at most": max(apart[1:]),
        }  # fmt: skip
    return made


def profiled(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device().type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        run()
        synchronise()
    made = dict.fromkeys((*_KINDS, "elementwise and the rest"), 0.0)
    for event in seen.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), None)
        made[kind or "elementwise and the rest"] += own / 1e3
    return made


_KINDS = {
    "attention": ("flash", "attention", "fmha", "sdpa", "cudnn"),
    "products": ("gemm", "cutlass", "addmm", "aten::mm", "aten::bmm", "cublas", "nvjet", "xmma"),
    "communication": ("nccl", "all_gather", "reduce_scatter", "allgather"),
    "optimiser": ("adam", "multi_tensor"),
}


def budget(options: argparse.Namespace) -> None:
    """All rows, each in a process of its own, until the minutes are over; those that are there are not made again."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, ends = folder / "rows.jsonl", time.monotonic() + 60 * options.minutes
    there = {json.loads(line)["row"] for line in path.read_text().splitlines()} if path.exists() else set()
    names = (
        ["ceilings", "block"]
        if options.dry
        else ["ceilings", "block", *list(ENGINES)[:6], "without the pair", "profile"]
    )
    for name in names:
        left = ends - time.monotonic()
        if name in there:
            continue
        if left < 20:
            console.print(f"{name}: no time is left for it")
            continue
        command = [sys.executable, __file__, "budget", "--row", name, "--folder", str(folder)]
        command += ["--dry"] if options.dry else []
        began = time.monotonic()
        line: dict[str, Any] = {"row": name}
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=min(left, options.row_seconds), check=False
            )
            if run.returncode:
                errors = [one for one in run.stderr.splitlines() if "Error" in one] or run.stderr.splitlines()[-1:]
                line["error"] = (errors or ["?"])[-1][:300]
            else:
                line["found"] = json.loads(run.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            line["error"] = "out of time"
        line |= {"seconds": round(time.monotonic() - began, 1), "date": str(date.today()), "torch": torch.__version__}
        line["machine"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        console.print_json(json.dumps(line))
    picture(path, folder / "budget.png")


def budget_row(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    shape = DRY if options.dry else WHOLE
    if options.row == "ceilings":
        return ceilings(shape)
    if options.row == "block":
        return one_block(shape)
    engine = options.row if options.row in ENGINES else "the same, kernels"
    given = argparse.Namespace(
        size="wan2.1-t2v-14b", layers=8, bucket="81x480x832", references=5, one=engine, warm_up=1, steps=3,
        paired=options.row != "without the pair", checkpoint=False, folder=options.folder,
        profile=options.row == "profile",
    )  # fmt: skip
    return one_engine(given)


def picture(rows: Path, to: Path) -> None:
    """A bar a row that was profiled or measured as an engine: milliseconds of a layer."""
    import matplotlib.pyplot as plt

    found = {one["row"]: one["found"] for one in map(json.loads, rows.read_text().splitlines()) if "found" in one}
    figure, axes = plt.subplots(figsize=(9, 4))
    if "profile" in found and "kinds" in found["profile"]:
        left = 0.0
        for kind, milliseconds in found["profile"]["kinds"].items():
            axes.barh("profile", milliseconds / 8, left=left, label=kind)
            left += milliseconds / 8
        axes.legend(loc="lower right", fontsize="small")
    for name, one in found.items():
        if "seconds" in one and name != "profile":
            axes.barh(name, one["seconds"] / 8 * 1e3, color="lightgrey")
    for name, one in found.get("block", {}).items():
        if isinstance(one, dict):
            axes.barh(f"block, {name}", one["forward and backward, ms"], color="steelblue")
    axes.set_xlabel("ms a layer")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(to, dpi=120)
    console.print(f"{to}: where the time goes")


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
            for worker in processes_of(driver.pid):
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
    verb = verbs.add_parser("budget")
    verb.set_defaults(action=budget)
    verb.add_argument("--folder", default="build/gpu/budget", help="for rows.jsonl and the picture")
    verb.add_argument("--minutes", type=float, default=12)
    verb.add_argument("--row-seconds", type=float, default=150, help="most that a row may take")
    verb.add_argument("--dry", action="store_true", help="at a tiny size, also on a CPU: whether the script works")
    verb.add_argument("--row", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if getattr(options, "row", None):
        print(json.dumps(budget_row(options)))
        return
    if not torch.cuda.is_available() and not getattr(options, "dry", False):
        raise SystemExit("needs a CUDA device; on a CPU measure with benchmarks/training.py and benchmarks/model.py")
    if getattr(options, "one", None):
        print(json.dumps(one_engine(options)))
    else:
        options.action(options)


if __name__ == "__main__":
    main()
