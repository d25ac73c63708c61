"""Both losses and what they send back. Run: pytest tests/model/test_objective.py"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig, sample_noise, sample_timesteps
from domainshuttle.model.objective import LossOutput, training_loss
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]
FLOW = FlowConfig(shift=5.0)


def loss_of(model: Any, batch: TrainingBatch, **given: Any) -> LossOutput:
    settings = {"run_seed": 3, "step": 11, "flow": FLOW, "cross_pair_weight": 0.1}
    return training_loss(model, batch, **{**settings, **given})


@pytest.fixture
def batch() -> TrainingBatch:
    return TrainingBatch.fake(3, height=4, width=6, references=3, text_dim=32, mask_tail=True)


def predictions(model: DomainShuttleTransformer3DModel, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Both predictions and the velocity, written out."""
    noise = sample_noise(3, batch.sample_ids, 11, batch.latents.shape[1:])
    t = sample_timesteps(3, batch.sample_ids, 11, shift=5.0)
    noisy = torch.stack([(1 - t[i]) * batch.latents[i] + t[i] * noise[i] for i in range(batch.batch_size)])
    predicted = [
        model(
            noisy,
            1000 * t,
            batch.text,
            *(getattr(batch, f"{prefix}{n}") for n in ("references", "reference_subjects", "reference_domains")),
            getattr(batch, f"{prefix}reference_mask"),
        ).sample
        for prefix in ("", "paired_")
    ]
    return predicted[0], predicted[1], noise - batch.latents


def test_value_and_gradient_are_those_of_the_equations(make_model: MakeModel, batch: TrainingBatch) -> None:
    model = make_model()
    output = loss_of(model, batch)
    output.loss.backward()
    prediction, paired, target = predictions(model, batch)
    flow_loss = ((prediction - target) ** 2).mean()
    cross_pair = ((prediction - paired.detach()) ** 2).mean()
    torch.testing.assert_close(output.loss, flow_loss + 0.1 * cross_pair, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.flow.mean(), flow_loss.detach(), atol=1e-5, rtol=1e-5)
    assert output.cross_pair is not None
    torch.testing.assert_close(output.cross_pair.mean(), cross_pair.detach(), atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(flow_loss + 0.1 * cross_pair, list(model.parameters()), allow_unused=True)
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_losses_against_finite_differences(batch: TrainingBatch) -> None:
    """A network with one weight, in float64: the loss's own gradient, without the frozen branch's."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    calls = []

    def network(noisy: Tensor, timestep: Tensor, text: Tensor, reference_latents: Tensor, **_: Any) -> tuple[Tensor]:
        calls.append(torch.is_grad_enabled())
        mean = reference_latents.double().mean((1, 2, 3, 4)).view(-1, 1, 1, 1, 1)
        return (weight * noisy.double() + weight**2 * mean,)

    gradient = torch.autograd.grad(loss_of(network, batch, cross_pair_weight=0.5).loss.double(), weight)[0]
    assert calls == [False, True]  # the frozen forward first, without gradients
    frozen = weight.item()

    def value(w: float) -> float:
        noise = sample_noise(3, batch.sample_ids, 11, batch.latents.shape[1:]).double()
        t = sample_timesteps(3, batch.sample_ids, 11, shift=5.0).double().view(-1, 1, 1, 1, 1)
        z0 = batch.latents.double()
        means = [
            x.double().mean((1, 2, 3, 4)).view(-1, 1, 1, 1, 1) for x in (batch.references, batch.paired_references)
        ]
        noisy = (1 - t) * z0 + t * noise
        prediction, consistent = w * noisy + w**2 * means[0], frozen * noisy + frozen**2 * means[1]
        return float(((prediction - noise + z0) ** 2).mean() + 0.5 * ((prediction - consistent) ** 2).mean())

    difference = (value(frozen + 1e-5) - value(frozen - 1e-5)) / 2e-5
    assert abs(gradient.item() - difference) < 1e-5 * max(1.0, abs(difference))


def test_samples_do_not_depend_on_their_batch(make_model: MakeModel, batch: TrainingBatch) -> None:
    model = make_model()
    whole = loss_of(model, batch)
    for i in range(batch.batch_size):
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        one = replace(batch, **{k: v[i : i + 1] for k, v in values.items() if v is not None})
        alone = loss_of(model, one)
        torch.testing.assert_close(alone.flow[0], whole.flow[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.cross_pair[0], whole.cross_pair[i], atol=1e-5, rtol=1e-5)
        assert alone.timesteps[0] == whole.timesteps[i]


def test_equal_references_are_consistent(make_model: MakeModel, batch: TrainingBatch) -> None:
    names = ("references", "reference_subjects", "reference_domains", "reference_mask")
    twins = replace(batch, **{f"paired_{n}": getattr(batch, n) for n in names})
    output = loss_of(make_model(), twins)
    assert output.cross_pair.abs().max() < 1e-10


def test_snapshot_is_the_target(make_model: MakeModel, batch: TrainingBatch) -> None:
    model, snapshot = make_model(), make_model(seed=5)
    output = loss_of(model, batch, cross_pair_target="snapshot", snapshot_model=snapshot)
    prediction, _, _ = predictions(model, batch)
    _, frozen, _ = predictions(snapshot, batch)
    torch.testing.assert_close(output.cross_pair.mean(), (prediction - frozen).square().mean(), atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert all(p.grad is None for p in snapshot.parameters())


def test_weight_zero_runs_one_forward(make_model: MakeModel) -> None:
    model, calls = make_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    output = loss_of(model, TrainingBatch.fake(2, text_dim=32, paired=False), cross_pair_weight=0.0)
    assert len(calls) == 1
    assert output.cross_pair is None


def test_frozen_forward_stores_nothing(make_model: MakeModel, batch: TrainingBatch) -> None:
    """What autograd keeps for the backward pass is the same with the cross-pair loss, but for the loss itself."""
    model = make_model()

    def stored(weight: float) -> int:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, batch, cross_pair_weight=weight)
        return kept

    assert stored(0.1) - stored(0.0) <= 3 * batch.latents.numel()


def test_gradient_checkpointing_changes_nothing(make_model: MakeModel, batch: TrainingBatch) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss_of(model, batch).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_bfloat16_batch_and_model(make_model: MakeModel, batch: TrainingBatch) -> None:
    exact = loss_of(make_model(), batch)
    rounded = loss_of(make_model().bfloat16(), batch.to("cpu", torch.bfloat16))
    assert rounded.loss.dtype == torch.float32
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.02, atol=0)


def test_what_is_missing_is_named(make_model: MakeModel, batch: TrainingBatch) -> None:
    with pytest.raises(ValueError, match="no paired references"):
        loss_of(make_model(), TrainingBatch.fake(2, text_dim=32, paired=False))
    with pytest.raises(ValueError, match="snapshot_model is None"):
        loss_of(make_model(), batch, cross_pair_target="snapshot")


@pytest.mark.parametrize("mask_tail", [False, True])
def test_both_predictions_of_one_call_are_those_of_two(make_model: MakeModel, mask_tail: bool) -> None:
    """Bit for bit, gradients too; each block is called once."""

    class Twice:
        """The model as one that takes a single set of references."""

        def __init__(self, model: DomainShuttleTransformer3DModel) -> None:
            self.model = model

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    batch = TrainingBatch.fake(2, height=4, width=6, references=3, text_dim=32, mask_tail=mask_tail)
    batch = replace(
        batch, paired_references=batch.paired_references[:, :2], paired_reference_mask=None,
        paired_reference_subjects=batch.paired_reference_subjects[:, :2],
        paired_reference_domains=batch.paired_reference_domains[:, :2],
    )  # fmt: skip
    found = []
    for wrap, calls in ((lambda model: model, 1), (Twice, 2)):
        model, runs = make_model().train(), []
        model.enable_gradient_checkpointing()
        for block in model.blocks:
            block.register_forward_pre_hook(lambda block, _, runs=runs: runs.append(block))
        output = loss_of(wrap(model), batch)
        assert len(runs) == calls * len(model.blocks)
        output.loss.backward()
        assert len(runs) == calls * len(model.blocks)  # what is computed again is inside
        found.append([output.loss, output.cross_pair, *(p.grad for p in model.parameters())])
    assert all(one.equal(two) for one, two in zip(*found, strict=True))
