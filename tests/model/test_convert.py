"""Weights of Wan and of the release, in and out. Run: pytest tests/model/test_convert.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainshuttle.model.convert import (
    convert_checkpoint,
    from_release,
    from_wan,
    load_transformer,
    to_release,
)
from domainshuttle.model.layouts import expert_folders, release_name
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]
RELEASE_CONFIG = {
    "dim": 48,
    "ffn_dim": 96,
    "num_heads": 2,
    "num_layers": 2,
    "text_dim": 32,
    "text_len": 8,
    "freq_dim": 32,
    "in_dim": 16,
    "out_dim": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "reference_num": 3,
    "num_domains": 5,
    "boundary": 0.875,
}


def outputs(model: DomainShuttleTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            torch.randn(1, 16, 2, 4, 6, generator=generator),
            torch.tensor([421.0]),
            torch.randn(1, 5, 32, generator=generator),
            torch.randn(1, 2, 16, 4, 6, generator=generator),
            torch.tensor([[0, 1]]),
            torch.tensor([[0, 2]]),
        ).sample


def write_folder(folder: Path, state_dict: dict[str, Tensor], config: dict[str, Any], shards: int = 1) -> Path:
    """A checkpoint folder as others write it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state_dict)
    weight_map = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        if shards == 1:
            file = "diffusion_pytorch_model.safetensors"
        save_file({name: state_dict[name].contiguous().clone() for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_computes_what_the_released_code_computes(golden_folder: Path) -> None:
    config = json.loads((golden_folder / "config.json").read_text())["config"]
    io = load_file(golden_folder / "io.safetensors")
    model = from_release(load_file(golden_folder / "weights.safetensors"), config)
    text = torch.zeros(1, config["text_len"], config["text_dim"])
    text[0, : len(io["text.0"])] = io["text.0"]
    with torch.no_grad():
        output = model(
            io["latents"],
            io["timestep"],
            text,
            io["reference_latents"].transpose(1, 2),
            torch.arange(3)[None],
            io["domain_codes"],
        ).sample
    assert (output - io["output"]).abs().max() < 5e-6


def test_names_follow_the_released_layout(golden_folder: Path, make_model: MakeModel) -> None:
    stored = load_file(golden_folder / "weights.safetensors")
    named = {release_name(n): tuple(p.shape) for n, p in make_model(max_references=3).named_parameters()}
    assert named == {name: tuple(value.shape) for name, value in stored.items()}


def test_missing_slots_are_zero_latents_without_domain(golden_folder: Path) -> None:
    """The release fills its slots with zeros that are embedded and attended to: not the same as no reference."""
    config = json.loads((golden_folder / "config.json").read_text())["config"]
    io = load_file(golden_folder / "io.safetensors")
    model = from_release(load_file(golden_folder / "weights.safetensors"), config)
    references, domains = io["reference_latents"].transpose(1, 2).clone(), io["domain_codes"].clone()
    references[:, 1:], domains[:, 1:] = 0, -1
    given = io["latents"], io["timestep"], torch.zeros(1, 8, 32)
    with torch.no_grad():
        filled = model(*given, references, torch.arange(3)[None], domains).sample
        single = model(*given, references[:, :1], torch.zeros(1, 1, dtype=torch.long), domains[:, :1]).sample
    assert (filled - single).abs().max() > 1e-3


def test_release_round_trip_is_exact(make_model: MakeModel) -> None:
    model = make_model(reference_gate="video", timestep_angles="float64", max_references=3, text_len=8, boundary=0.875)
    state_dict, config = to_release(model)
    assert config == RELEASE_CONFIG
    again = from_release(state_dict, config)
    assert dict(again.config) | {"_use_default_values": None} == dict(model.config) | {"_use_default_values": None}
    assert torch.equal(outputs(again), outputs(model))
    back, same = to_release(again)
    assert same == config
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[name], state_dict[name]) for name in back)
    with torch.no_grad():
        again.proj_out.weight.add_(1)
    assert not torch.equal(outputs(again), outputs(model))  # a copy, not the same memory


def test_the_papers_gate_survives_the_released_layout(make_model: MakeModel) -> None:
    model = make_model(reference_gate="own")
    state_dict, config = to_release(model)
    assert config["reference_gate"] == "own"
    assert torch.equal(outputs(from_release(state_dict, config)), outputs(model))


def test_ablations_do_not_fit_the_released_layout(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"cannot hold \{'reference_rope': 'frames'\}"):
        to_release(make_model(reference_rope="frames"))


def test_every_fault_is_in_one_error(make_model: MakeModel) -> None:
    state_dict, config = to_release(make_model())
    del state_dict["blocks.1.ffn.0.bias"]
    state_dict["blocks.9.extra"] = torch.zeros(1)
    state_dict["head.head.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="missing") as error:
        from_release(state_dict, config)
    for fault in (
        "1 missing: blocks.1.ffn.0.bias",
        "1 unexpected: blocks.9.extra",
        "head.head.bias is [3], expected [64]",
    ):
        assert fault in str(error.value)


def test_plain_wan_given_as_release_is_told_apart(make_model: MakeModel) -> None:
    state_dict, config = to_release(make_model())
    plain = {name: value for name, value in state_dict.items() if "ref" not in name and "dom" not in name}
    with pytest.raises(ValueError, match=r"no reference branch.*from_wan"):
        from_release(plain, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, r"config lacks \['dim'\]"),
        ({"qk_norm": False}, "qk_norm is off"),
        ({"model_type": "i2v"}, "model_type is 'i2v'"),
        ({"num_heads": 5}, "dim 48 is not a multiple of num_heads 5"),
    ],
)
def test_other_configs_are_refused(change: dict[str, Any], message: str) -> None:
    config = {k: v for k, v in (RELEASE_CONFIG | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        from_release({}, config)


def test_from_wan_starts_at_wan(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**tiny_config).eval()
    model = from_wan(wan, max_references=3)
    assert model.config.max_references == 3
    given = torch.randn(2, 16, 2, 4, 6), torch.tensor([5.0, 990.0]), torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(*given).sample, wan(*given).sample, atol=2e-5, rtol=0)
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if name.startswith(("domain_embedding_ref", "film_")):
            assert not value.any()
        elif "_ref" in name:
            twin = parameters[name.replace("_ref", "")]
            assert torch.equal(value, twin)
            assert value.data_ptr() != twin.data_ptr()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["diffusers", "original"])
def test_wan_folders(kind: str, shards: int, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**tiny_config).eval()
    if kind == "diffusers":
        wan.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "150KB")
    else:
        state_dict = {release_name(name): p.detach() for name, p in wan.named_parameters()}
        config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 48, "ffn_dim": 96, "num_heads": 2}
        write_folder(tmp_path, state_dict, config | {"num_layers": 2, "text_dim": 32, "freq_dim": 32}, shards)
    model, expected = load_transformer(tmp_path), from_wan(wan)
    assert model.config.reference_gate == "own"
    for (name, value), (_, want) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(value, want), name
    torch.testing.assert_close(outputs(model), outputs(expected), atol=2e-5, rtol=0)


def test_two_experts_to_our_layout_to_the_release_and_back(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    for i, name in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(i)
        WanTransformer3DModel(**tiny_config).save_pretrained(tmp_path / "wan22" / name)
    ours = convert_checkpoint(tmp_path / "wan22", tmp_path / "ours", max_shard_bytes=200_000, reference_gate="video")
    assert [folder.name for folder in ours] == ["transformer", "transformer_2"]
    models = [DomainShuttleTransformer3DModel.from_pretrained(folder) for folder in ours]
    assert [model.config.boundary for model in models] == [0.875, 0.875]
    assert len(list(ours[0].glob("*.safetensors"))) > 1
    released = convert_checkpoint(tmp_path / "ours", tmp_path / "release", layout="release")
    assert [folder.name for folder in released] == ["high_noise_model", "low_noise_model"]
    assert expert_folders(tmp_path / "release") == released
    for folder, model in zip(released, models, strict=True):
        assert torch.equal(outputs(load_transformer(folder)), outputs(model))
    back = convert_checkpoint(tmp_path / "release", tmp_path / "back")
    for first, second in zip(ours, back, strict=True):
        assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())
        one, two = (DomainShuttleTransformer3DModel.from_pretrained(folder).state_dict() for folder in (first, second))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_conversion_to_bfloat16(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "ours")
    (written,) = convert_checkpoint(tmp_path / "ours", tmp_path / "half", layout="release", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(written / "diffusion_pytorch_model.safetensors").values()} == {
        torch.bfloat16
    }
    state_dict, _ = to_release(make_model())
    stored = load_file(written / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in state_dict.items())


def test_damaged_files_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model in"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"is cut off: .* fetch it again"):
        load_transformer(tmp_path)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="is damaged"):
        load_transformer(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        load_transformer(tmp_path)


def test_index_of_absent_files_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="200KB")
    next(tmp_path.glob("*-00001-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="names 1 files that are not there"):
        load_transformer(tmp_path)


def test_what_every_model_keeps_in_float32_is_not_rounded(make_model: MakeModel, tmp_path: Path) -> None:
    """Not on the way to bf16 in our layout, nor in the release's and back; and what is computed is the same."""
    model = make_model(num_layers=2)
    model.save_pretrained(tmp_path / "exact")
    (half,) = convert_checkpoint(tmp_path / "exact", tmp_path / "half", dtype=torch.bfloat16)
    (release,) = convert_checkpoint(half, tmp_path / "release", layout="release")
    (back,) = convert_checkpoint(release, tmp_path / "back")
    state_dict, config = to_release(load_transformer(half))
    kept = 0
    for folder in (half, back):
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        for name, parameter in model.named_parameters():
            wanted = parameter.detach() if model.keeps_float32(name) else parameter.detach().bfloat16()
            assert stored[name].dtype == wanted.dtype and stored[name].equal(wanted), name
            assert dict(from_release(state_dict, config).named_parameters())[name].equal(wanted), name
            kept += model.keeps_float32(name)
    assert kept == 2 * (4 + 1 + 2 * 4)  # time embedding, last table, and two blocks' tables and norms
    expected = DomainShuttleTransformer3DModel.from_pretrained(tmp_path / "exact", torch_dtype=torch.bfloat16)
    assert outputs(load_transformer(back)).equal(outputs(expected))
