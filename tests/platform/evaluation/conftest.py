"""A model of seconds and a test set of a few cases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from domainshuttle.model.encoders import BlockDCTCodec, byte_umt5
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.model.sampling import make_scheduler
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.evaluation.config import EvaluationConfig

SETTINGS = {"height": 32, "width": 48, "frames": 5, "steps": 2, "guidance": 2.0, "fps": 8}


def save_model(folder: Path, seed: int = 0, **more: Any) -> Path:
    """An exported model with random weights."""
    text_encoder, tokenizer = byte_umt5()
    torch.manual_seed(seed)
    network = DomainShuttleTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=48, text_dim=64, freq_dim=32, text_len=48
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    pipeline = DomainShuttlePipeline(
        transformer=network, scheduler=make_scheduler("euler", 3.0), vae=BlockDCTCodec(), text_encoder=text_encoder,
        tokenizer=tokenizer,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps({**SETTINGS, **more}))
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    return save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="session")
def cases_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases of one reference, half of them cross-domain."""
    folder, lines = tmp_path_factory.mktemp("cases"), []
    for number in range(6):
        colour = np.random.default_rng(number).integers(0, 255, 3, dtype=np.uint8)
        Image.fromarray(np.broadcast_to(colour, (20, 20, 3)).copy()).save(folder / f"{number}.png")
        lines.append(
            {
                "id": f"case-{number}", "prompts": f"a ball {number}", "labels": ["ball"], "domain_code": ["object"],
                "seg_meta": [{"seg_file": [f"{number}.png"]}], "split": ("in_domain", "real_to_fantasy")[number % 2],
            }
        )  # fmt: skip
    (folder / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "cases.jsonl"


@pytest.fixture
def config(cases_file: Path) -> EvaluationConfig:
    return EvaluationConfig.model_validate(
        {
            "name": "mini", "seed": 3, "sources": {"own": {"kind": "cases", "path": str(cases_file)}},
            "metrics": {"hue_identity": {}, "steadiness": {}, "sharpness": {"frames": 3}},
            "statistics": {"resamples": 200},
        }
    )  # fmt: skip
