"""What a checkpoint costs the training: stall, time until it is whole, bytes; with training going on, or waiting.

    python benchmarks/checkpoints.py                 # two CPU workers under ZeRO-3, about 50 M parameters
    python benchmarks/checkpoints.py --layers 16 --folder /a/shared/disk

Prints one table. Rows of one table were measured in turn, within one run; `--folder` is the disk that is written to.
At the end a checkpoint that was written during further steps is loaded again, and compared bit for bit.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRAINED = {"all parameters": ["*"], "stage 2's (attention, references)": ["blocks.*.attn1.*", "*_ref*"]}
RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to write to; none: a temporary one")
    options = parser.parse_args()
    if "RANK" in os.environ:
        work(options)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = [sys.executable, __file__, "--layers", str(options.layers), "--rounds", str(options.rounds)]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*arguments, "--folder", folder],
                env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)},
            )
            for rank in range(RANKS)
        ]
        codes = [rank.wait() for rank in ranks]
    raise SystemExit(max(codes))


def work(options: argparse.Namespace) -> None:
    """One rank: trains, saves in turn while going on and waiting, and rank 0 prints the table."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main_rank = dist.get_rank() == 0
    if main_rank:
        print(f"{'trained':<34} {'save':<12} stall s  until whole s    MB  step s (while writing)")
    for label, trained in TRAINED.items():
        for row in measure(options, label, trained):
            if main_rank:
                print(row, flush=True)
    dist.destroy_process_group()


def measure(options: argparse.Namespace, label: str, trained: list[str]) -> list[str]:
    import torch
    import torch.distributed as dist

    from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer, gather_objects
    from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState
    from domainshuttle.platform.config.schema import CheckpointSection

    engine = build(options.layers, trained)
    section = CheckpointSection(every=1, keep=1)
    gather = gather_objects(3600.0)
    store = CheckpointStore(options.folder / f"{len(trained)}")
    writer = AsyncCheckpointer(store, section, dist.get_rank(), RANKS, gather)
    number = 0

    def step() -> float:
        nonlocal number
        began = time.perf_counter()
        engine.backward(loss_of(engine, number))
        engine.step(number)
        number += 1
        return time.perf_counter() - began

    def save() -> None:
        writer.save(TrainingState("stage1", number, 1, RANKS, "benchmark", {}, {}, {}), engine.snapshot)

    modes = ("waited for", "asynchronous")
    stalls: dict[str, list[float]] = {mode: [] for mode in modes}
    whole: dict[str, list[float]] = {mode: [] for mode in modes}
    alone: list[float] = []
    beside: list[float] = []
    step()  # makes the optimiser's states
    for _ in range(options.rounds + 1):
        for mode in modes:
            alone += [step(), step()]
            dist.barrier()
            began = time.perf_counter()
            save()
            if mode == "waited for":
                writer.wait()
            stalls[mode].append(time.perf_counter() - began)
            while mode == "asynchronous" and not any(gather(writer.ended())):
                beside.append(step())
            saved = writer.wait()
            writer.ended()
            assert saved
            whole[mode].append(saved.seconds)

    step()
    save()
    expected = {name: value.clone() for name, value in engine.full_parameters()}
    step()  # while it is written
    writer.wait()
    newest = store.newest("stage1")
    assert newest
    engine.load(newest.folder)
    differing = [name for name, value in engine.full_parameters() if not torch.equal(value, expected[name])]
    assert not differing, f"{len(differing)} parameters differ after the restore, such as {differing[:3]}"

    middle = statistics.median
    seconds = {"waited for": f"{middle(alone):.2f}", "asynchronous": f"{middle(alone):.2f} ({middle(beside):.2f})"}
    return [
        f"{label:<34} {mode:<12} {middle(stalls[mode][1:]):7.3f}  {middle(whole[mode][1:]):13.2f}  "
        f"{newest.size / 1e6:4.0f}  {seconds[mode]}"
        for mode in modes
    ]


def build(layers: int, trained: list[str]) -> Any:
    """A model of the width of 512 under ZeRO-3, of which the patterns are trained."""
    from domainshuttle.platform.config.schema import EngineSection, ModelSection, StageSection
    from domainshuttle.platform.engine.initialization import blueprint
    from domainshuttle.platform.engine.trained_parameters import select_trained
    from domainshuttle.platform.engine.zero3 import Engine
    from domainshuttle.platform.run.weights_origin import WeightsOrigin

    size = {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": layers, "ffn_dim": 2048}
    design = blueprint(ModelSection(size={**size, "text_dim": 64, "text_len": 8}), WeightsOrigin(None, 1))
    select_trained(design.outline, trained)
    stage = StageSection(
        name="stage1", mixture={"x": 1}, steps=1000, global_batch=2, micro_batch=1, learning_rate=1e-4, trained=trained
    )
    return Engine(design, stage, EngineSection(persistent_parameters=0), 1)


def loss_of(engine: Any, step: int) -> Any:
    import torch
    import torch.distributed as dist

    from domainshuttle.model.batch import TrainingBatch
    from domainshuttle.model.flow import FlowConfig
    from domainshuttle.model.objective import training_loss

    batch = TrainingBatch.fake(1, height=4, width=4, seed=RANKS * step + dist.get_rank())
    batch = batch.to("cpu", torch.bfloat16)
    return training_loss(engine, batch, run_seed=1, step=step, flow=FlowConfig(), cross_pair_weight=0.0).loss


if __name__ == "__main__":
    main()
