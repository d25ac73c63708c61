"""The plan: what each stage trains, and what DeepSpeed is told, before anything starts.

Run: python -m pytest tests/platform/commands/test_plan.py
"""

import re

import pytest
from running import in_process

from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.commands.plan import print_parameters
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.console import console
from domainshuttle.platform.engine.deepspeed_config import deepspeed_configs


def test_every_parameter_is_listed_as_trained_or_frozen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 160)  # a name a line
    config = load_config("demo")
    print_parameters(config)
    rows = re.findall(r"│ (\S+) +│ +([\d,]+) │ (\S+) +│ (\S+) +│ (\S+) +│", capsys.readouterr().out)
    model = DomainShuttleTransformer3DModel(**config.model.size)
    assert sum(int(size.replace(",", "")) for _, size, *_ in rows) == sum(p.numel() for p in model.parameters())
    trained = {name: stages for name, _, *stages in rows}
    assert trained["blocks.*.attn1.to_k_ref.weight"] == ["trained"] * 3
    assert trained["patch_embedding.weight"] == ["trained", "trained", "."]
    assert trained["blocks.*.ffn.net.*.weight"] == ["trained", ".", "."]


def test_what_deepspeed_is_told_follows_from_the_configuration() -> None:
    config = load_config("demo", ["stages.stage2.gradient_clipping=0.5", "engine.offload_optimizer=true"])
    told = deepspeed_configs(config)
    assert list(told) == ["base", "stage1", "stage2"]
    assert told["stage2"]["gradient_clipping"] == 0.5
    assert told["stage2"]["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert told["stage1"]["gradient_accumulation_steps"] == 1
    assert told["stage1"]["train_micro_batch_size_per_gpu"] == 32


@pytest.mark.parametrize("mode", ["full", "none"])
def test_the_activations_that_it_advises_fit_all_stages(mode: str) -> None:
    """One setting holds for all, of which the largest has the least room."""

    def planned(activations: str) -> str:
        return in_process(
            "plan", "wan2.1-t2v-14b", "--cluster", "h100-64", "--set", f"engine.activations={activations}"
        )

    first = planned(f"{{mode: {mode}}}")
    (advised,) = re.findall(r"--set 'engine\.activations=(\{mode: products.*?\}\})'", " ".join(first.split()))
    fits = re.search(r"fits H100 \(80\.0\)(.*)", planned(advised))
    assert fits is not None and fits[1].count("yes") == 2 and "NO" not in fits[1]
