"""What is kept of a forward pass, and what runs again in the backward pass: memory and FLOPs against the specification.

Run: python -m pytest tests/platform/engine/test_activation_checkpointing.py
"""

from collections import Counter
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from domainshuttle.model import fused
from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.spec import ModelSpec, Product
from domainshuttle.platform.config.schema import ActivationSection, ModelSection
from domainshuttle.platform.engine import activation_offload
from domainshuttle.platform.engine.activation_checkpointing import checkpoint_blocks
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.run.weights_origin import WeightsOrigin

LAYERS = 5
SIZE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": LAYERS,
    "ffn_dim": 52,
    "text_dim": 16,
    "freq_dim": 32,
}
TRAINED = ("blocks.*.attn1.*", "*_ref*")
BATCH = TrainingBatch.fake(1, frames=2, height=4, width=8, references=2, text_dim=16, text_tokens=3)
TOKENS = 4 * 8


class Held(TorchDispatchMode):
    """Notes the memory that operators make, and how often each runs."""

    def __init__(self, *others: Tensor) -> None:
        super().__init__()
        self._others = {StorageWeakRef(one.untyped_storage()).cdata for one in others}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.ran[str(func)] += 1
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self._made[StorageWeakRef(storage).cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self) -> int:
        """Of what is still there, whoever holds it."""
        return sum(
            size for at, (storage, size) in self._made.items() if at not in self._others and not storage.expired()
        )

    @property
    def attentions(self) -> int:
        return sum(count for name, count in self.ran.items() if "attention" in name and "backward" not in name)


def step(section: ActivationSection) -> tuple[int, int, int, dict[str, Tensor]]:
    """Bytes that a forward pass leaves for the backward pass, FLOPs of linear products and attentions that the latter
    runs, and gradients."""
    network = build_model(ModelSection(size=SIZE), WeightsOrigin(None, 1))
    nn.init.normal_(network.proj_out.weight, generator=torch.Generator().manual_seed(2))  # else no gradient flows
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in TRAINED))
    network.compute_in(torch.float32)
    network.set_attention_backend("native")
    checkpoint_blocks(network, section)
    given = [BATCH.latents, torch.tensor([300.0]), BATCH.text, BATCH.references, BATCH.reference_subjects]
    held = Held(*network.parameters(), *given, BATCH.reference_domains)
    with held:
        loss = network(*given, BATCH.reference_domains).sample.square().mean()
    left = held.bytes
    held.ran.clear()
    with FlopCounterMode(display=False) as counter, held:
        loss.backward()
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    return left, counter.get_total_flops(), held.attentions, gradients


@pytest.fixture(scope="module")
def ends() -> tuple[Any, Any]:
    """Nothing is run again, and all blocks are."""
    return step(ActivationSection(mode="none")), step(ActivationSection(mode="full"))


KEEPS: list[dict[Product, int]] = [
    {"attention": 4}, {"qkv": 2}, {"ffn": 3}, {"attention": LAYERS, "qkv": 3, "ffn": 1}
]  # fmt: skip


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_kept_products_take_what_the_specification_says_and_do_not_run_again(
    keep: dict[Product, int], offload: bool, ends: tuple[Any, Any]
) -> None:
    (_, _, _, plain), (bytes_of_full, flops_of_full, attentions_of_full, _) = ends
    left, flops, attentions, gradients = step(ActivationSection(mode="products", keep=keep, offload=offload))
    assert gradients.keys() == plain.keys()
    assert all(gradients[name].equal(plain[name]) for name in plain)
    spec = ModelSpec(**SIZE)
    sizes = {product: 2 * size for product, size in spec.product_bytes(TOKENS).items()}  # of float32, not bf16
    sizes["attention"] -= TOKENS * 4 * spec.num_attention_heads  # the log-sum-exp is float32 in both
    assert left - bytes_of_full == sum(count * sizes[product] for product, count in keep.items())
    saved = spec.product_flops(TOKENS)
    assert flops_of_full - flops == sum(count * saved[one] for one, count in keep.items() if one != "attention")
    assert attentions_of_full - attentions == keep.get("attention", 0)


def test_what_runs_again_is_what_the_specification_says(ends: tuple[Any, Any]) -> None:
    """Without the FFN's second product, and with inputs of blocks alone kept."""
    (kept, flops_of_none, attentions_of_none, plain), (left, flops, attentions, gradients) = ends
    assert all(gradients[name].equal(plain[name]) for name in plain)
    spec = ModelSpec(**SIZE)
    expected = spec.step_flops((2, 4, 8), references=2, text_tokens=3, trained=TRAINED, recompute=True)
    # the counter does not know the CPU's attention
    assert flops - flops_of_none == expected.recompute - expected.attention_forward
    assert attentions - attentions_of_none == 2 * LAYERS
    assert flops_of_none == expected.backward - expected.attention_backward
    assert left < kept / 3


def test_an_offloaded_input_is_fetched_while_the_block_behind_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing is copied back, but the order is a GPU's: each is begun once, one block ahead."""
    begun: list[str] = []
    fetch, take = activation_offload._Input.fetch, activation_offload._Input.take

    def noted_fetch(one: Any) -> None:
        if one._fetched is None:
            begun.append(f"fetch {names.setdefault(id(one), len(names))}")
        fetch(one)

    def noted_take(one: Any) -> Tensor:
        value = take(one)
        begun.append(f"take {names[id(one)]}")
        return value

    names: dict[int, int] = {}
    monkeypatch.setattr(activation_offload._Input, "fetch", noted_fetch)
    monkeypatch.setattr(activation_offload._Input, "take", noted_take)
    section = ActivationSection(mode="full", offload=True)
    step(section)
    ahead = [word for number in range(1, LAYERS) for word in (f"fetch {number}", f"take {number}")]
    assert begun == ["fetch 0", "take 0", *ahead]


def test_the_default_keeps_self_attention() -> None:
    assert ActivationSection().kept(LAYERS) == {"attention": LAYERS}
    of_default, given = (step(one) for one in (ActivationSection(), ActivationSection(mode="attention")))
    assert of_default[:3] == given[:3]


@pytest.mark.skipif(not fused.available(), reason="needs triton: pip install domainshuttle[kernels]")
def test_kernels_keep_products_too() -> None:
    """The projections of fused blocks are one operator. In Triton's interpreter."""
    found = []
    for mode in ("none", "products"):
        network = build_model(ModelSection(size=SIZE | {"num_layers": 2}), WeightsOrigin(None, 1))
        nn.init.normal_(network.proj_out.weight, generator=torch.Generator().manual_seed(2))
        network.compute_in(torch.float32)
        keep = {"attention": 2, "qkv": 1, "ffn": 2} if mode == "products" else None
        checkpoint_blocks(network, ActivationSection.model_validate({"mode": mode, "keep": keep}))
        fused.fuse(network)
        given = BATCH.latents, torch.tensor([300.0]), BATCH.text, BATCH.references, BATCH.reference_subjects
        loss = network(*given, BATCH.reference_domains).sample.square().mean()
        with Held() as again:
            loss.backward()
        found.append(({name: one.grad for name, one in network.named_parameters()}, again))
    (plain, nothing), (gradients, again) = found
    assert all(one.equal(plain[name]) for name, one in gradients.items())
    assert nothing.ran["domainshuttle.projections.default"] == 0
    assert again.ran["domainshuttle.projections.default"] == 1  # of the other block
    assert again.attentions == 2  # those to the text
