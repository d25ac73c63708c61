"""Equality with diffusers' Wan and with the plain equations. Run: pytest tests/model/test_parity.py"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from domainshuttle.model.rope import axis_dims
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]


def references(b: int, r: int, h: int, w: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "reference_latents": torch.randn(b, r, 16, h, w, generator=generator),
        "reference_subjects": torch.arange(r).div(2, rounding_mode="floor").expand(b, r),
        "reference_domains": torch.randint(-1, 5, (b, r), generator=generator),
    }


def plain_forward(
    model: DomainShuttleTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    reference_latents: Tensor,
    reference_subjects: Tensor,
    reference_domains: Tensor,
    reference_mask: Tensor | None = None,
) -> Tensor:
    """The equations of the paper, one sample and one token grid at a time, in float64 with complex rotations."""
    p = {name: value.double() for name, value in model.named_parameters()}
    c = model.config
    heads, head_dim = c.num_attention_heads, c.attention_head_dim
    dim = heads * head_dim

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.eps).sqrt() * p[f"{name}.weight"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + c.eps).sqrt()

    def patches(x: Tensor, name: str) -> Tensor:  # c f h w -> n d
        return F.conv3d(x[None], p[f"{name}.weight"], p[f"{name}.bias"], stride=c.patch_size)[0].flatten(1).T

    def theta(t: int, y: int, x: int) -> Tensor:
        angles = []
        for position, size in zip((t, y, x), axis_dims(head_dim), strict=True):
            angles += [position / 10000 ** (2 * i / size) for i in range(size // 2)]
        return torch.polar(torch.ones(len(angles), dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (heads, head_dim)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.transpose(1, 2) / math.sqrt(head_dim)).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    outputs = []
    for s in range(latents.shape[0]):
        keep = [i for i in range(reference_latents.shape[1]) if reference_mask is None or reference_mask[s, i]]
        f, h, w = (size // patch for size, patch in zip(latents.shape[2:], c.patch_size, strict=True))
        half = c.freq_dim // 2
        angles = timestep[s].double() * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        embedder = "condition_embedder"
        time = linear(torch.cat([angles.cos(), angles.sin()]), f"{embedder}.time_embedder.linear_1")
        time = linear(F.silu(time), f"{embedder}.time_embedder.linear_2")
        modulation = linear(F.silu(time), f"{embedder}.time_proj").view(6, dim)
        context = linear(text[s].double(), f"{embedder}.text_embedder.linear_1")
        context = linear(F.gelu(context, approximate="tanh"), f"{embedder}.text_embedder.linear_2")

        suffix = "_ref" if c.reference_projections == "own" else ""
        video = patches(latents[s].double(), "patch_embedding")
        positions = [theta(i + 1, j, k) for i in range(f) for j in range(h) for k in range(w)]
        tokens, domains = [], []
        for n, i in enumerate(keep):
            x = patches(reference_latents[s, i].double()[:, None], f"patch_embedding{suffix}")
            m, a = int(reference_subjects[s, i]), int(reference_domains[s, i])
            domain = torch.zeros(dim, dtype=torch.float64)
            if c.domain_adaln:
                domain = p["domain_embedding_ref.weight"][a] if a >= 0 else domain
                x = x * (1 + linear(domain, "film_scale_ref")) + linear(domain, "film_shift_ref")
            tokens.append(x)
            domains.append(domain.expand(h * w, dim))
            if c.reference_rope == "dual":
                positions += [theta(0, j + h * (m + 1), k + w * (n + 1)) for j in range(h) for k in range(w)]
            else:
                positions += [theta(f + 1 + n, j, k) for j in range(h) for k in range(w)]
        reference = torch.cat([*tokens, video[:0]])
        domain = torch.cat([*domains, video[:0]])
        rotation = torch.stack(positions)[:, None]  # n 1 d/2

        def rotate(x: Tensor, rotation: Tensor = rotation) -> Tensor:
            pairs = torch.view_as_complex(x.unflatten(1, (heads, -1, 2)).contiguous()) * rotation
            return torch.view_as_real(pairs).flatten(1)

        for b in range(c.num_layers):
            name = f"blocks.{b}"
            video_mod = list(p[f"{name}.scale_shift_table"][0] + modulation)
            ref_mod = list(p[f"{name}.scale_shift_table{'_ref' if c.domain_adaln else ''}"][0] + modulation)
            ref_mod = [ref_mod[i] + domain if c.reference_gate == "own" or i % 3 != 2 else ref_mod[i] for i in range(6)]
            if c.reference_gate == "video":
                ref_mod[2] = video_mod[2]
            x_v = norm(video) * (1 + video_mod[1]) + video_mod[0]
            x_r = norm(reference) * (1 + ref_mod[1]) + ref_mod[0]
            q, k, v = (
                torch.cat([linear(x_v, f"{name}.attn1.to_{i}"), linear(x_r, f"{name}.attn1.to_{i}{suffix}")])
                for i in "qkv"
            )
            q, k = rotate(rms(q, f"{name}.attn1.norm_q")), rotate(rms(k, f"{name}.attn1.norm_k"))
            update = linear(attention(q, k, v), f"{name}.attn1.to_out.0")
            video = video + video_mod[2] * update[: len(video)]
            reference = reference + ref_mod[2] * update[len(video) :]
            both = torch.cat([video, reference])
            x = norm(both) * p[f"{name}.norm2.weight"] + p[f"{name}.norm2.bias"]
            q = rms(linear(x, f"{name}.attn2.to_q"), f"{name}.attn2.norm_q")
            k = rms(linear(context, f"{name}.attn2.to_k"), f"{name}.attn2.norm_k")
            both = both + linear(attention(q, k, linear(context, f"{name}.attn2.to_v")), f"{name}.attn2.to_out.0")
            video, reference = both[: len(video)], both[len(video) :]

            def ffn(x: Tensor, name: str = name) -> Tensor:
                hidden = F.gelu(linear(x, f"{name}.ffn.net.0.proj"), approximate="tanh")
                return linear(hidden, f"{name}.ffn.net.2")

            video = video + video_mod[5] * ffn(norm(video) * (1 + video_mod[4]) + video_mod[3])
            reference = reference + ref_mod[5] * ffn(norm(reference) * (1 + ref_mod[4]) + ref_mod[3])
        shift, scale = p["scale_shift_table"][0] + time
        out = linear(norm(video) * (1 + scale) + shift, "proj_out")
        out = out.view(f, h, w, *c.patch_size, -1).permute(6, 0, 3, 1, 4, 2, 5)
        outputs.append(out.reshape(-1, *latents.shape[2:]))
    return torch.stack(outputs)


@pytest.mark.parametrize("size", [(2, 2, 8, 8), (1, 5, 6, 10), (3, 1, 4, 4), (1, 3, 16, 2)])
@pytest.mark.parametrize("passed", ["nothing", "empty"])
def test_without_references_equals_wan(size: tuple[int, ...], passed: str, tiny_config: dict[str, Any]) -> None:
    b, f, h, w = size
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**tiny_config).eval()
    with torch.no_grad():
        for parameter in wan.parameters():
            parameter.mul_(1.7)
    model = DomainShuttleTransformer3DModel(**tiny_config).eval()
    missing, unexpected = model.load_state_dict(wan.state_dict(), strict=False)
    assert not unexpected
    assert all("_ref" in name for name in missing)
    inputs = torch.randn(b, 16, f, h, w), torch.rand(b) * 1000, torch.randn(b, 7, 32)
    extra = references(b, 0, h, w) if passed == "empty" else {}
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs, **extra).sample, wan(*inputs).sample, atol=2e-5, rtol=0)


def test_gradients_without_references_equal_wan(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**tiny_config)
    model = DomainShuttleTransformer3DModel(**tiny_config)
    model.load_state_dict(wan.state_dict(), strict=False)
    inputs = torch.randn(2, 16, 2, 4, 6), torch.rand(2) * 1000, torch.randn(2, 7, 32)
    for network in (wan, model):
        network(*inputs).sample.square().mean().backward()
    ours = dict(model.named_parameters())
    for name, parameter in wan.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=2e-6, rtol=1e-3, msg=name)
    for name in ours.keys() - dict(wan.named_parameters()).keys():
        # Zero and not None, so that every rank reduces the same gradients.
        assert ours[name].grad is not None, name
        assert ours[name].grad.abs().max() == 0, name


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"reference_gate": "video"},
        {"reference_projections": "shared"},
        {"domain_adaln": False},
        {"reference_rope": "frames"},
        {"reference_projections": "shared", "domain_adaln": False, "reference_rope": "frames"},
        {"attention_head_dim": 16, "num_attention_heads": 3, "timestep_angles": "float64"},
    ],
    ids=lambda switches: ",".join(f"{k}={v}" for k, v in switches.items()) or "paper",
)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_plain_equations(switches: dict[str, Any], masked: bool, make_model: MakeModel) -> None:
    model = make_model(**switches)
    inputs = torch.randn(2, 16, 2, 4, 6), torch.tensor([3.0, 421.0]), torch.randn(2, 5, 32)
    given = references(2, 4, 4, 6)
    if masked:
        given["reference_mask"] = torch.tensor([[True, True, True, False], [True, False, False, False]])
    output = model(*inputs, **given).sample
    expected = plain_forward(model, *inputs, **given)
    assert (output - expected).abs().max() < 2e-5
    weight = torch.randn_like(output)
    gradients = torch.autograd.grad((output * weight).sum(), list(model.parameters()))
    wanted = torch.autograd.grad((expected * weight).sum(), list(model.parameters()), allow_unused=True)
    for (name, parameter), gradient, want in zip(model.named_parameters(), gradients, wanted, strict=True):
        want = torch.zeros_like(parameter) if want is None else want
        assert (gradient - want).abs().max() <= 2e-5 * max(1.0, float(want.abs().max())), name


def test_reference_branch_starts_as_the_video_branch(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = DomainShuttleTransformer3DModel(**tiny_config).eval()
    shared = DomainShuttleTransformer3DModel(**tiny_config, reference_projections="shared", domain_adaln=False).eval()
    shared.load_state_dict({k: v for k, v in model.state_dict().items() if "_ref" not in k})
    inputs = torch.randn(2, 16, 2, 4, 6), torch.rand(2) * 1000, torch.randn(2, 5, 32)
    with torch.no_grad():
        ours, base = (network(*inputs, **references(2, 3, 4, 6)).sample for network in (model, shared))
        none = model(*inputs).sample
    torch.testing.assert_close(ours, base, atol=2e-6, rtol=0)
    assert (ours - none).abs().max() > 1e-3  # the references are attended to


def test_bfloat16_stays_near_float32(make_model: MakeModel) -> None:
    model = make_model()
    inputs = torch.randn(2, 16, 2, 8, 8), torch.tensor([999.5, 7.25]), torch.randn(2, 5, 32)
    given = references(2, 3, 8, 8)
    with torch.no_grad():
        exact = model(*inputs, **given).sample
        rounded = make_model().bfloat16()(*inputs, **given).sample
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03
