"""How fast the network is, and how much memory a conversion takes.

    python benchmarks/model.py compare               # against diffusers' Wan, same weights and equal token counts
    python benchmarks/model.py block --size wan2.1-t2v-14b --layers 3   # full-width blocks, on an accelerator
    python benchmarks/model.py convert --gigabytes 4 # peak memory of converting a synthetic checkpoint

Each prints one table; rows of one table were measured in turn within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import logging
from torch import Tensor

from domainshuttle.cluster.devices import device_shown_as
from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.convert import from_wan
from domainshuttle.model.spec import ModelSpec
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.model.weight_files import write_shards

STAGE_2 = ("blocks.*.attn1.*", "*_ref*")
GIGA = 10**9


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, run in turn after one warm-up of all.

    On a CPU of processor time, which changes less with what else the machine does.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            synchronise()
            started = clock()
            run()
            synchronise()
            if i:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_tflops() -> float | None:
    """Peak of the accelerator, where it is known."""
    if not torch.cuda.is_available():
        return None
    device = device_shown_as(torch.cuda.get_device_name())
    return device and device.flops / 1e12


def forward_of(model: torch.nn.Module, batch: TrainingBatch, references: bool) -> Callable[[], Tensor]:
    """A forward; without references the same number of tokens are video tokens."""
    timestep = torch.linspace(10, 990, batch.batch_size, device=batch.latents.device)
    if not references:
        video = torch.cat([batch.latents, batch.references.transpose(1, 2)], 2)
        return lambda: model(video, timestep, batch.text, return_dict=False)[0]
    given = batch.references, batch.reference_subjects, batch.reference_domains
    return lambda: model(batch.latents, timestep, batch.text, *given, return_dict=False)[0]


def compare(arguments: argparse.Namespace) -> None:
    """Forward and forward + backward of diffusers' Wan and ours, without and with references."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    frames, height, width = arguments.latents
    spec = replace(
        ModelSpec.preset("tiny"),
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        attention_head_dim=arguments.head_dim,
        ffn_dim=4 * arguments.heads * arguments.head_dim,
        text_len=64,
    )
    shared = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "freq_dim")
    wan = WanTransformer3DModel(**{name: getattr(spec, name) for name in shared})
    ours = from_wan(wan).to(device, dtype)
    ours.compute_in(dtype)  # with the layers that training has
    wan = wan.to(device, dtype)
    batch = TrainingBatch.fake(
        arguments.batch,
        frames=frames,
        height=height,
        width=width,
        references=arguments.references,
        text_tokens=spec.text_len,
        text_dim=spec.text_dim,
        paired=False,
    ).to(device, dtype)
    tokens = arguments.batch * (
        spec.tokens((frames, height, width)) + arguments.references * spec.reference_tokens((frames, height, width))
    )
    networks = {"diffusers Wan": (wan, False), "ours, no references": (ours, False), "ours": (ours, True)}
    forwards = {name: forward_of(model, batch, references) for name, (model, references) in networks.items()}

    def no_grad(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(run)

    def with_backward(run: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: run().float().square().mean().backward()

    forward = measure({name: no_grad(run) for name, run in forwards.items()}, arguments.rounds)
    both = measure({name: with_backward(run) for name, run in forwards.items()}, arguments.rounds)
    flops = arguments.batch * 3 * spec.step_flops((frames, height, width), references=arguments.references).forward
    peak = peak_tflops()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{device}, {dtype}, dim {spec.dim}, {spec.num_layers} layers, {tokens} tokens; load of the machine {load}")
    print(f"{'':22}{'forward ms':>12}{'of Wan':>9}{'+ backward ms':>15}{'tokens/s':>12}{'of Wan':>9}{'MFU':>8}")
    for name in networks:
        ratio = both[name] / both["diffusers Wan"]
        share = f"{flops / both[name] / 1e12 / peak:8.1%}" if peak else f"{'-':>8}"
        of_forward = forward[name] / forward["diffusers Wan"]
        times = f"{forward[name] * 1e3:12.1f}{of_forward:9.2f}{both[name] * 1e3:15.1f}"
        print(f"{name:22}{times}{tokens / both[name]:12.0f}{ratio:9.2f}{share}")


def block(arguments: argparse.Namespace) -> None:
    """Training step of a few full-width blocks: time, TFLOP/s, MFU and peak memory for each attention backend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = replace(ModelSpec.preset(arguments.size), num_layers=arguments.layers)
    with torch.device(device):
        model = DomainShuttleTransformer3DModel(**spec.transformer_config()).to(torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in STAGE_2))
    if arguments.checkpoint:
        model.enable_gradient_checkpointing()
    if arguments.compile:
        model.compile_repeated_blocks(fullgraph=True)
    size = tuple(arguments.latents)
    batch = TrainingBatch.fake(
        1,
        frames=size[0],
        height=size[1],
        width=size[2],
        references=arguments.references,
        text_tokens=spec.text_len,
        text_dim=spec.text_dim,
        paired=False,
    ).to(device, torch.bfloat16)
    flops = spec.step_flops(size, references=arguments.references, trained=STAGE_2, recompute=arguments.checkpoint)
    tokens = spec.tokens(size) + arguments.references * spec.reference_tokens(size)
    run, peak = forward_of(model, batch, True), peak_tflops()
    switches = [name for name in ("compile", "checkpoint") if getattr(arguments, name)]
    print(f"{device}, {arguments.size}, {spec.num_layers} layers, {tokens} tokens, bf16, stage 2", *switches, sep=", ")
    columns = f"{'forward ms':>12}{'step ms':>10}{'model TFLOP/s':>15}{'MFU':>8}{'hardware':>10}{'peak GB':>9}"
    print(f"{'attention':16}{columns}")
    for backend in arguments.backends:
        try:
            model.set_attention_backend(backend)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            forward = measure({backend: torch.no_grad()(run)}, arguments.rounds)[backend]
            step = measure({backend: lambda: run().float().square().mean().backward()}, arguments.rounds)[backend]
        except (RuntimeError, ImportError, ValueError) as error:  # a backend that is not there is a row, not an end
            print(f"{backend:16}{str(error).splitlines()[0][:90]}")
            continue
        rate = flops.model / step / 1e12
        share = f"{rate / peak:8.1%}" if peak else f"{'-':>8}"
        memory = torch.cuda.max_memory_allocated() / GIGA if device == "cuda" else 0.0
        rates = f"{rate:15.2f}{share}{flops.hardware / step / 1e12:10.2f}"
        print(f"{backend:16}{forward * 1e3:12.1f}{step * 1e3:10.1f}{rates}{memory:9.1f}")


def convert(arguments: argparse.Namespace) -> None:
    """Peak memory and time of converting a synthetic Wan checkpoint of full width, made and removed here."""
    spec = ModelSpec.preset("wan2.1-t2v-14b")
    plain = replace(spec, reference_projections="shared", domain_adaln=False)
    per_layer = (plain.parameters() - replace(plain, num_layers=0).parameters()) // plain.num_layers
    layers = max(1, round(arguments.gigabytes * GIGA / 2 / per_layer))
    plain = replace(plain, num_layers=layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, target = Path(name) / "wan", Path(name) / "release"
        shapes = plain.parameter_shapes()
        tensors = [(key, shape, torch.bfloat16) for key, shape in shapes.items()]
        write_shards(source, tensors, lambda key: torch.ones(shapes[key], dtype=torch.bfloat16), 5 * GIGA)
        config = {"_class_name": "WanTransformer3DModel", "num_layers": layers, "num_attention_heads": 40}
        config |= {"attention_head_dim": 128, "ffn_dim": plain.ffn_dim, "text_dim": 4096, "freq_dim": 256}
        (source / "config.json").write_text(json.dumps(config))
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        code = (
            "import resource, sys, time\n"
            "from domainshuttle.model.convert import convert_checkpoint\n"
            "before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()\n"
            "convert_checkpoint(sys.argv[1], sys.argv[2], layout='release')\n"
            "print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - started)\n"
        )
        # a process of its own, since the peak is that of the process
        command = [sys.executable, "-c", code, str(source), str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        before, peak, seconds = int(result[-3]), int(result[-2]), float(result[-1])
        written = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    print(f"{layers} layers of 14B width, bf16: {size / GIGA:.2f} GB to {written / GIGA:.2f} GB in {seconds:.1f} s")
    print(f"peak memory {peak * 1024 / GIGA:.2f} GB, of which {before * 1024 / GIGA:.2f} GB before the conversion")


def main() -> None:
    logging.set_verbosity_error()  # diffusers warns of casts that are meant here
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("compare")
    verb.set_defaults(run=compare)
    verb.add_argument("--batch", type=int, default=4)
    verb.add_argument("--latents", type=int, nargs=3, default=(4, 16, 16), help="latent frames, height, width")
    verb.add_argument("--references", type=int, default=2)
    verb.add_argument("--heads", type=int, default=4)
    verb.add_argument("--head-dim", type=int, default=64)
    verb.add_argument("--layers", type=int, default=2)
    verb.add_argument("--rounds", type=int, default=7)
    verb = verbs.add_parser("block")
    verb.set_defaults(run=block)
    verb.add_argument("--size", default="wan2.1-t2v-14b")
    verb.add_argument("--latents", type=int, nargs=3, default=(21, 60, 104))
    verb.add_argument("--references", type=int, default=5)
    verb.add_argument("--layers", type=int, default=3)
    verb.add_argument("--backends", nargs="+", default=["native", "_native_flash", "_native_cudnn"])
    verb.add_argument("--rounds", type=int, default=5)
    verb.add_argument("--compile", action="store_true", help="compile the blocks")
    verb.add_argument("--checkpoint", action="store_true", help="recompute blocks in the backward pass")
    verb = verbs.add_parser("convert")
    verb.set_defaults(run=convert)
    verb.add_argument("--gigabytes", type=float, default=4.0)
    verb.add_argument("--folder", type=Path, default=None, help="where the synthetic checkpoint is put")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
