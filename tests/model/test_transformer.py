"""The network as a diffusers model, its masks and its refusals. Run: pytest tests/model/test_transformer.py"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]


def inputs(b: int = 2, r: int = 3, f: int = 2, h: int = 4, w: int = 6, seed: int = 0) -> dict[str, Tensor]:
    batch = TrainingBatch.fake(b, frames=f, height=h, width=w, references=r, text_tokens=5, text_dim=32, seed=seed)
    return {
        "hidden_states": batch.latents,
        "timestep": torch.linspace(10, 990, b),
        "encoder_hidden_states": batch.text,
        "reference_latents": batch.references,
        "reference_subjects": batch.reference_subjects,
        "reference_domains": batch.reference_domains,
    }


@torch.no_grad()
def run(model: DomainShuttleTransformer3DModel, given: dict[str, Any]) -> Tensor:
    return model(**given).sample


def test_save_and_load(make_model: MakeModel, tmp_path: Path) -> None:
    model, given = make_model(reference_gate="video"), inputs()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DomainShuttleTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config.reference_gate == "video"
    assert torch.equal(run(loaded, given), run(model, given))
    half = DomainShuttleTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert any(fnmatchcase(name, "blocks.*.scale_shift_table_ref") for name in kept)
    assert not any(".attn1.to_" in name for name in kept)
    error = (run(half, given).float() - run(model, given)).norm() / run(model, given).norm()
    assert error < 0.03


def test_return_types(make_model: MakeModel) -> None:
    model, given = make_model(), inputs()
    (sample,) = model(**given, return_dict=False)
    assert torch.equal(sample, model(**given).sample)
    assert sample.shape == given["hidden_states"].shape


@pytest.mark.parametrize("junk", [0.0, 1e3])
def test_masked_references_do_not_matter(junk: float, make_model: MakeModel) -> None:
    model, given = make_model(), inputs(b=2, r=4)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    given["reference_latents"] = torch.where(mask[..., None, None, None], given["reference_latents"], junk)
    masked = run(model, given | {"reference_mask": mask})
    for i, count in enumerate([2, 1]):
        alone = {k: v[i : i + 1, :count] if k.startswith("reference") else v[i : i + 1] for k, v in given.items()}
        torch.testing.assert_close(masked[i : i + 1], run(model, alone), atol=5e-6, rtol=1e-5)


def test_holes_in_the_mask_do_not_move_images(make_model: MakeModel) -> None:
    model, given = make_model(), inputs(b=1, r=3)
    mask = torch.tensor([[True, False, True]])
    kept = {k: v[:, [0, 2]] if k.startswith("reference") else v for k, v in given.items()}
    torch.testing.assert_close(run(model, given | {"reference_mask": mask}), run(model, kept), atol=5e-6, rtol=1e-5)


def test_fully_masked_sample_equals_no_references(make_model: MakeModel) -> None:
    model, given = make_model(), inputs(b=1, r=2)
    none = {k: v for k, v in given.items() if not k.startswith("reference")}
    masked = run(model, given | {"reference_mask": torch.zeros(1, 2, dtype=torch.bool)})
    torch.testing.assert_close(masked, run(model, none), atol=5e-6, rtol=1e-5)


def test_domains_change_the_output(make_model: MakeModel) -> None:
    model, given = make_model(), inputs(b=1, r=1)
    outputs = [run(model, given | {"reference_domains": torch.tensor([[a]])}) for a in range(-1, 5)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("gate", ["own", "video"])
def test_every_parameter_gets_a_gradient(r: int, gate: str, make_model: MakeModel) -> None:
    """Ranks with and without references reduce the same set of gradients."""
    model = make_model(reference_gate=gate)
    model(**inputs(r=r)).sample.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_patterns_choose_the_reference_branch(make_model: MakeModel) -> None:
    names = [name for name, _ in make_model().named_parameters()]
    base = [name for name, _ in make_model(reference_projections="shared", domain_adaln=False).named_parameters()]
    assert {n for n in names if fnmatchcase(n, "*_ref*")} == set(names) - set(base)
    attention = {n for n in names if fnmatchcase(n, "blocks.*.attn1.*")}
    assert {"blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_v_ref.bias", "blocks.0.attn1.norm_k.weight"} <= attention


def test_lora_trains_and_scales(make_model: MakeModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="make test-nightly installs it, apart")
    model, given = make_model(), inputs()
    before = run(model, given)
    targets = ["to_q", "to_q_ref", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    assert (run(model, given) - before).abs().max() > 1e-4
    torch.testing.assert_close(run(model, given | {"attention_kwargs": {"scale": 0.0}}), before, atol=1e-6, rtol=0)
    model.save_lora_adapter(tmp_path)
    other = make_model()
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(run(other, given), run(model, given), atol=1e-6, rtol=0)


def test_attention_backend_is_choosable(make_model: MakeModel) -> None:
    model, given = make_model(), inputs()
    before = run(model, given)
    model.set_attention_backend("native")
    assert torch.equal(run(model, given), before)


def test_rejects_a_list_of_faults_at_once(make_model: MakeModel) -> None:
    model, given = make_model(), inputs()
    bad = given | {"timestep": torch.rand(3), "encoder_hidden_states": torch.rand(2, 5, 31)}
    with pytest.raises(ValueError, match=r"timestep is \[3\], expected \[2\].*encoder_hidden_states is \[2, 5, 31\]"):
        run(model, bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.rand(2, 16, 4, 6)}, r"expected \[b, c, frames, height, width\]"),
        ({"hidden_states": torch.rand(2, 8, 2, 4, 6)}, "8 channels, the model 16"),
        ({"hidden_states": torch.rand(2, 16, 2, 5, 6)}, "2x5x6 must be a multiple of the patch 1x2x2"),
        ({"reference_latents": torch.rand(2, 3, 16, 4, 4)}, r"reference_latents is \[2, 3, 16, 4, 4\]"),
        ({"reference_latents": torch.rand(2, 16, 4, 6)}, r"reference_latents is \[2, 16, 4, 6\]"),
        ({"reference_subjects": torch.zeros(2, 2, dtype=torch.long)}, r"reference_subjects is \[2, 2\]"),
        ({"reference_subjects": None}, "need reference_subjects and reference_domains"),
        ({"reference_domains": torch.full((2, 3), 5)}, r"reference_domains run 5..5, expected -1 \(none\)..4"),
        ({"reference_domains": torch.full((2, 3), -2)}, "reference_domains run -2..-2"),
        ({"reference_mask": torch.ones(2, 4, dtype=torch.bool)}, r"reference_mask is \[2, 4\], expected \[2, 3\]"),
    ],
)
def test_rejects_bad_input(change: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_model(), inputs() | change)


def test_rejects_too_many_references(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="4 references, the model takes max_references=3"):
        run(make_model(max_references=3), inputs(r=4))


def test_rejects_unknown_switches(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reference_gate is 'both'; use one of \('own', 'video'\)"):
        DomainShuttleTransformer3DModel(**tiny_config, reference_gate="both")
