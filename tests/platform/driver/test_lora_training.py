"""A stage of adapters through Ray: trained by two workers, stopped, gone on with, merged, and exported alone.

Run: python -m pytest tests/platform/driver/test_lora_training.py -m nightly
"""

import signal
from pathlib import Path

import numpy as np
import pytest
from running import (
    balanced,
    cli,
    in_process,
    losses,
    run_of,
    same_weights,
    skip_stage1,
    start,
    wait_for_step,
    weights,
)
from safetensors.numpy import load_file

from domainshuttle.model.lora import LORA_FILE, LORA_FOLDER
from domainshuttle.platform.checkpoint.store import CheckpointStore
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.engine.sharded_state import saved_parameters

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

RANK, ALPHA = 2, 3.0
LORA = "{lora: {rank: 2, alpha: 3, targets: ['attn1.*', 'ffn.net.0.proj']}, parameters: ['domain_embedding_ref*']}"
FILE = "diffusion_pytorch_model.safetensors"


def test_adapters_are_trained_stopped_resumed_and_exported(
    tiny: Path, unbroken: tuple[RunConfig, str], cluster_variables: dict[str, str], tmp_path: Path
) -> None:
    before, _ = unbroken
    settings = [f"stages.stage2.trained={LORA}", "stages.stage2.steps=12"]
    whole, whole_run, arguments = run_of(tiny, "lora-whole", *settings)
    skip_stage1(whole_run, before)
    cli("train", tiny, *arguments, **cluster_variables)

    broken, run, arguments = run_of(tiny, "lora-broken", *settings)
    skip_stage1(run, before)
    process = start(tiny, *arguments, **cluster_variables)
    wait_for_step(process, run, "stage2", 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 3
    stopped = CheckpointStore(run.checkpoints).newest("stage2")
    assert stopped is not None and 3 <= stopped.state.step < 12
    half_way = tmp_path / "half-way"
    printed = in_process("export", run.folder, half_way, "--lora", "--checkpoint", stopped.name)
    assert "stage2, a LoRA of rank 2 of" in " ".join(printed.split())
    resumed = cli("train", tiny, *arguments, **cluster_variables)
    assert f"goes on after step {stopped.state.step}" in resumed
    balanced(broken)
    same_weights(broken, whole)
    assert losses(broken, "stage2") == losses(whole, "stage2")

    # merged: what the stage began with, in the type of frozen weights, and what its adapters add
    began, ended = weights(broken, "stage1"), weights(broken, "stage2")
    assert began.keys() == ended.keys()
    lora = load_file(run.segment("stage2").weights / LORA_FOLDER / LORA_FILE)
    layers = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in lora}
    assert {"blocks.0.attn1.to_q", "blocks.1.attn1.to_out.0", "blocks.0.ffn.net.0.proj"} <= layers
    still = set()
    for name, value in ended.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in layers:
            a, b = (lora[f"transformer.{layer}.lora_{kind}.weight"] for kind in "AB")
            assert a.shape[0] == b.shape[1] == RANK, name
            still |= set() if np.abs(b).max() > 0 else {layer}
            np.testing.assert_allclose(value, began[name] + b @ a, rtol=2**-8, atol=1e-6, err_msg=name)
        elif not name.startswith("domain_embedding_ref"):
            np.testing.assert_allclose(value, began[name], rtol=2**-8, atol=1e-6, err_msg=name)
    assert still <= {"blocks.1.attn1.to_q_ref"}  # nobody sees what references become in the last block
    assert any(
        not np.array_equal(ended[name], began[name]) for name in ended if name.startswith("domain_embedding_ref")
    )

    # a checkpoint holds the adapters and what is trained beside them, and nothing else
    store = CheckpointStore.of(broken)
    newest = store.newest("stage2")
    assert newest is not None and newest.state.step == 12
    beside = {name for name in ended if name.startswith("domain_embedding_ref")}
    with saved_parameters(store.fetch(newest), averaged=False) as (held, read):
        assert held.keys() == {name.removeprefix("transformer.") for name in lora} | beside
        for layer in layers:
            b = read(f"{layer}.lora_B.weight").numpy() * (ALPHA / RANK)
            np.testing.assert_array_equal(b, lora[f"transformer.{layer}.lora_B.weight"])
    store.release(newest)

    # alone, and in a pipeline from which clips are made
    in_process("export", run.folder, tmp_path / "alone", "--lora")
    alone = load_file(tmp_path / "alone" / LORA_FILE)
    assert [path.name for path in (tmp_path / "alone").rglob("*") if path.is_file()] == [LORA_FILE]
    assert alone.keys() == lora.keys() == load_file(half_way / LORA_FILE).keys()
    for name, value in lora.items():
        np.testing.assert_array_equal(alone[name], value)
    in_process("export", run.folder, tmp_path / "pipeline")
    merged = load_file(tmp_path / "pipeline" / "transformer" / FILE)
    assert merged.keys() == ended.keys()
    for name, value in ended.items():
        np.testing.assert_allclose(merged[name], value, rtol=2**-8, atol=1e-6, err_msg=name)
    in_process("generate", tmp_path / "pipeline", "--prompt", "a star", "--out", tmp_path / "clips")
    assert [*(tmp_path / "clips").glob("*.mp4")]
