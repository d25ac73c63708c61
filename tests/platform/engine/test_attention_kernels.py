"""Which kernel computes attention. Run: pytest tests/platform/engine/test_attention_kernels.py"""

import logging
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.nn.attention import register_flash_attention_impl, restore_flash_attention_impl

from domainshuttle.model.attention import NO_MASKS, attend
from domainshuttle.platform.config.schema import ConfigError, EngineSection
from domainshuttle.platform.engine.attention_kernels import AttentionKernels, require_trainable

CPU = torch.device("cpu")


def section(backend: str | None, **more: Any) -> EngineSection:
    return EngineSection(**{"attention_backend": backend, "precision": "float32"} | more)


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("_flash_3", "no backward pass.*'fa3'"),
        ("sage", "no backward pass.*'native'"),
        ("_sage_qk_int8_pv_fp16_cuda", "no backward pass.*'native'"),
        ("sage_hub", "no backward pass.*'native'"),
        ("_native_npu", "other devices"),
        ("flash3", "is no backend of diffusers"),
    ],
)
def test_what_cannot_train_is_refused_with_what_can(backend: str, told: str) -> None:
    for on_gpu in (False, True):
        with pytest.raises(ConfigError, match=told):
            require_trainable(section(backend, precision="bf16"), on_gpu)


def test_every_backend_is_tried_on_a_cpu_and_taken_only_if_its_gradients_are_there() -> None:
    """Each by the reference: gradients of attention by plain products. No name of diffusers' escapes."""
    taken = []
    for backend in AttentionBackendName:
        try:
            require_trainable(section(backend.value), on_gpu=False)
        except ConfigError as error:
            assert "engine.attention_backend" in str(error) and ("native" in str(error) or "leave it" in str(error))
            continue
        taken.append(backend.value)
        given = [torch.randn(1, 7, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        plain = [one.detach().clone().requires_grad_() for one in given]
        attend(*given, None, backend.value).square().sum().backward()
        scores = torch.einsum("bnhd,bmhd->bhnm", *plain[:2]) / 4
        torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), plain[2]).square().sum().backward()
        for one, expected in zip(given, plain, strict=True):
            torch.testing.assert_close(one.grad, expected.grad)
    assert {"native", "_native_math", "_native_flash"} <= set(taken)
    assert not {"_native_cudnn", "flash", "xformers", "flash_4_hub"} & set(taken)


def test_kernels_of_half_precision_are_refused_in_float32() -> None:
    for backend in ("fa3", "_native_flash", "_native_cudnn"):
        with pytest.raises(ConfigError, match=r"bf16 alone.*engine\.precision=bf16"):
            require_trainable(section(backend), on_gpu=True)
        require_trainable(section(backend, precision="bf16"), on_gpu=True)


def test_a_kernel_that_is_not_installed_is_named_with_what_to_install() -> None:
    for backend, package in (("fa4", "flash-attn-4"), ("fa3", "flash_attn_interface")):
        with pytest.raises(ConfigError, match=f"{backend}.* is not installed here .*{package}"):
            AttentionKernels.tried(section(backend), CPU, 1, 64)


def test_an_installed_kernel_takes_the_place_of_torchs_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("torch.nn.attention._registry._FLASH_ATTENTION_IMPLS", {}, raising=False)
    register_flash_attention_impl("FA4", register_fn=lambda: calls.append("FA4"))
    try:
        assert AttentionKernels.tried(section("fa4"), CPU, 1, 64).backend == "_native_flash"
    finally:
        restore_flash_attention_impl(_raise_warn=False)
    assert calls == ["FA4"]


def test_the_kernels_that_ran_are_named_with_and_without_a_mask() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert "fused kernel for CPUs" in AttentionKernels.tried(section(None), CPU, 1, 64).unmasked
    assert "unfused products" in AttentionKernels.tried(section("_native_math"), CPU, 1, 64).unmasked
    flash = AttentionKernels.tried(section("_native_flash"), CPU, 1, 64)
    assert "fused kernel for CPUs" in flash.unmasked and "unavailable" not in flash.masked
    assert torch.get_rng_state().equal(state)  # what training draws stays as it is


@pytest.mark.parametrize("backend", ["_native_flash", "native"])
def test_a_mask_is_obeyed_whatever_the_backend(backend: str) -> None:
    query, key, value = (torch.randn(2, 9, 2, 16) for _ in range(3))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., 5:] = False
    out = attend(query, key, value, mask, backend)
    torch.testing.assert_close(out[:1], attend(query[:1], key[:1, :5], value[:1, :5], None, backend))


def test_names_of_the_dispatcher_are_found_as_strings_and_as_its_enumeration() -> None:
    assert all(AttentionBackendName(name) in NO_MASKS for name in NO_MASKS)


def test_stages_with_padding_need_a_kernel_that_takes_masks() -> None:
    kernels = AttentionKernels("x", "a kernel", "unavailable")
    kernels.require_masks(False, "stages.a")
    with pytest.raises(ConfigError, match=r"stages\.a\.micro_batch=1"):
        kernels.require_masks(True, "stages.a")


@pytest.mark.parametrize(("version", "warned"), [(91400, True), (91501, False), (92000, False)])
def test_an_old_cudnn_is_warned_of(
    version: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    with caplog.at_level(logging.WARNING):
        AttentionKernels(None, "cuDNN", "cuDNN").warn_of_old_cudnn()
        AttentionKernels("_native_flash", "flash", "cuDNN").warn_of_old_cudnn()
    assert ("9.14.0 is older than 9.15.1" in caplog.text) == warned
    assert len(caplog.records) == int(warned)
