"""A sample's tokens over 2 and 4 ranks against one, in float64 over gloo. Run: pytest tests/model/test_token_groups.py

This file is also the program of the ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import environment
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.token_groups import TokenGroup
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

SIZE = {"num_attention_heads": 4, "attention_head_dim": 6, "text_dim": 8, "freq_dim": 8, "ffn_dim": 20, "num_layers": 3}
BATCHES: dict[str, dict[str, Any]] = {
    "three references": {"references": 3, "frames": 2},
    "padded references": {"references": 3, "frames": 3, "mask_tail": True, "batch_size": 4},
    "no references": {"references": 0, "frames": 2},
}
"""Frames of 4 x 8 latents: 8 tokens each."""


def gradients(name: str, group: TokenGroup | None, recompute: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = DomainShuttleTransformer3DModel(**SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.double().train()
    if recompute:
        model.enable_gradient_checkpointing()
    if group is not None:
        model.share_tokens(group)
    size = {"batch_size": 2, "height": 4, "width": 8, "text_dim": 8, "dtype": torch.float64, **BATCHES[name]}
    batch = TrainingBatch.fake(**size)
    labels = ("latents", "subjects", "domains", "mask")
    given = {
        f"{kind}reference_{label}": getattr(
            batch, f"{kind}references" if label == "latents" else f"{kind}reference_{label}"
        )
        for kind in ("", "paired_")
        for label in labels
    }
    timesteps = torch.linspace(100, 900, batch.batch_size, dtype=torch.float64)
    prediction, consistent = model(batch.latents, timesteps, batch.text, **given, return_dict=False)
    loss = (prediction - batch.latents).square().mean() + 0.1 * (prediction - consistent).square().mean()
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters()}
    if group is not None:
        for one in found.values():
            dist.all_reduce(one)  # gloo has no mean
            one /= dist.get_world_size()
    found["norm"] = torch.stack([one.norm() for one in found.values()]).norm()
    return found | {"loss": loss.detach(), "prediction": prediction.detach(), "consistent": consistent}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]  # what is float32 beside bf16 is float64
    dist.init_process_group("gloo", f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    # of four ranks also two groups of two, which hold the same batch here
    for size in sorted({2, ranks}):
        own, _ = dist.new_subgroups(size)
        for name in BATCHES:
            for recompute in (False, True):
                torch.save(
                    gradients(name, TokenGroup(own), recompute), folder / f"{ranks}-{rank}-{size}-{name}-{recompute}.pt"
                )
    dist.barrier()


def fork(folder: Path) -> int:
    """Two ranks, and then four, of processes that share what this one has imported."""
    torch.set_num_threads(1)
    for ranks in (2, 4):
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                try:
                    main(rank, ranks, folder)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            return 1
    return 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    command = [sys.executable, __file__, str(folder)]
    own = environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    run = subprocess.run(command, env=own, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", BATCHES)
def test_loss_gradients_and_norm_are_those_of_one_rank(
    name: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    expected = gradients(name, None, False)
    assert expected["loss"].dtype == torch.float64 and expected["norm"] > 0
    files = sorted(results.glob(f"*-{name}-*.pt"))
    assert len(files) == 2 * (2 + 4 + 4)
    for file in files:
        found = torch.load(file)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            error = (value - expected[key]).norm() / max(1e-3, float(expected[key].norm()))
            assert error < 1e-12, (file.name, key, float(error))


if __name__ == "__main__":
    sys.exit(fork(Path(sys.argv[1])))
