"""Which kernel computes attention: what a configured name means, whether it can train, and which one runs.

A kernel is tried forwards and backwards before anything is trained, so that one without a backward pass, or that is not
installed, is refused at the start; what ran then is what the run's log says.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
from torch.utils._python_dispatch import TorchDispatchMode

from domainshuttle.model.attention import attend
from domainshuttle.platform.config.schema import ConfigError, EngineSection, nearest

logger = logging.getLogger(__name__)

ACTIVATED = {"fa3": "FA3", "fa4": "FA4"}
"""Our names of kernels that take the place of torch's flash attention, its backward pass included."""
FLASH = "_native_flash"
_PACKAGES = {
    "fa3": "the flash_attn_interface of a FlashAttention 3 built for this torch (PyTorch's own index has wheels)",
    "fa4": "flash-attn-4 and what it needs (nvidia-cutlass-dsl, quack-kernels)",
}
_WITHOUT_BACKWARD = {"_flash_3": "fa3", "sage": "native"}
"""Kernels that only infer, alone or with more behind the name's first part, and one that trains in their place."""
_OTHER_DEVICES = ("_native_npu", "_native_xla")
_HALF_ONLY = ("flash", "fa3", "fa4", "cudnn", "aiter")
_LEAST_CUDNN = 91501
"""Below it cuDNN is wrong at lengths that 128 does not divide (pytorch #169849), and torch does not choose it."""


def require_trainable(engine: EngineSection, on_gpu: bool) -> None:
    """Raises ConfigError for an `engine.attention_backend` that is none, or that can't train in this precision.

    What runs on a CPU is tried; whether a GPU's kernel is installed is known where there is one (`AttentionKernels`).
    """
    name = engine.attention_backend
    if name is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [*(backend.value for backend in AttentionBackendName), *ACTIVATED]
    if name not in known:
        raise ConfigError(f"engine.attention_backend={name!r} is no backend of diffusers{nearest(name, known)}")
    instead = _WITHOUT_BACKWARD.get(name) or _WITHOUT_BACKWARD.get(name.strip("_").split("_")[0])
    if instead is not None:
        raise ConfigError(
            f"engine.attention_backend={name!r} has no backward pass, so it can't train: set it to {instead!r}, "
            "or leave it out"
        )
    if name in _OTHER_DEVICES:
        raise ConfigError(f"engine.attention_backend={name!r} is of other devices than CPUs and GPUs: leave it out")
    if on_gpu and engine.precision == "float32" and any(part in name for part in _HALF_ONLY):
        raise ConfigError(
            f"engine.attention_backend={name!r} computes in bf16 alone, and engine.precision is float32: set "
            "engine.precision=bf16, or engine.attention_backend=native"
        )
    if not on_gpu:
        AttentionKernels.tried(engine, torch.device("cpu"), heads=1, head_dim=64)


@dataclass(frozen=True)
class AttentionKernels:
    """What computed attention when it was tried."""

    backend: str | None
    """Of diffusers' dispatcher; None: torch's own choice."""
    unmasked: str
    masked: str
    """For batches with padded references; `unavailable` where there is none."""

    @classmethod
    def tried(
        cls, engine: EngineSection, device: torch.device, heads: int, head_dim: int, tokens: int = 193
    ) -> "AttentionKernels":
        """Computes attention and its gradients as training does, over a length that 128 does not divide.

        Raises ConfigError for a backend that is not installed, or that fails at either of them.
        """
        name = engine.attention_backend
        backend = activate(name) if name in ACTIVATED else name
        dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
        if backend is not None:
            _load(backend)

        def run(masked: bool) -> str:
            return _kernel_of(backend, device, dtype, (1, tokens, heads, head_dim), masked)

        try:
            unmasked = run(masked=False)
        except Exception as error:  # of a library: any
            raise ConfigError(
                f"engine.attention_backend={name!r} can't train here ({_first_line(error)}): leave it out, which lets "
                "torch choose, or set engine.attention_backend=native"
            ) from error
        try:
            masked = run(masked=True)
        except Exception as error:
            logger.warning("attention: no masks with %s (%s)", name or "torch's choice", _first_line(error))
            masked = UNAVAILABLE
        return cls(backend, unmasked, masked)

    def require_masks(self, needed: bool, setting: str) -> None:
        """Raises ConfigError where micro-batches may have padded references, and no kernel takes a mask."""
        if needed and self.masked == UNAVAILABLE:
            raise ConfigError(
                f"engine.attention_backend={self.backend!r} takes no mask, which padded references need: set "
                f"{setting}.micro_batch=1, or engine.attention_backend=native"
            )

    def __str__(self) -> str:
        """One line for the log."""
        return f"attention by {self.unmasked}; with padded references by {self.masked}"

    def warn_of_old_cudnn(self) -> None:
        """Says where a cuDNN below 9.15.1 computes attention, or is skipped for slower kernels."""
        version = torch.backends.cudnn.version() if torch.cuda.is_available() else None
        if version is None or version >= _LEAST_CUDNN or self.backend not in (None, "native", "_native_cudnn"):
            return
        logger.warning(
            "attention: cuDNN %d.%d.%d is older than 9.15.1, which is wrong at lengths that 128 does not divide, and "
            "which torch passes over for a slower kernel: remove the one on LD_LIBRARY_PATH, or install "
            "nvidia-cudnn-cu13>=9.15.1; until then set engine.attention_backend=%s",
            version // 10000, version // 100 % 100, version % 100, FLASH,
        )  # fmt: skip


UNAVAILABLE = "unavailable"


def activate(name: str) -> str:
    """Puts the kernel in the place of torch's flash attention, and returns the backend that reaches it.

    Raises ConfigError where it is not installed.
    """
    try:
        activate_flash_attention_impl(ACTIVATED[name])
    except Exception as error:  # of its own packages: ImportError, or what their imports raise
        raise ConfigError(
            f"engine.attention_backend={name!r} is not installed here ({_first_line(error)}): install "
            f"{_PACKAGES[name]}, or set engine.attention_backend=native"
        ) from error
    return FLASH


def _load(backend: str) -> None:
    """Has diffusers check for the packages of a backend, and fetch the kernels that come from the hub."""
    from diffusers.models.attention_dispatch import attention_backend

    try:
        with attention_backend(backend):
            pass
    except Exception as error:
        raise ConfigError(
            f"engine.attention_backend={backend!r} is not installed here ({_first_line(error)}): install it, or set "
            "engine.attention_backend=native"
        ) from error


def _kernel_of(
    backend: str | None, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], masked: bool
) -> str:
    """The kernel that computes attention of this shape, forwards and backwards; raises what it raises."""
    mask = None
    if masked:
        mask = torch.ones(1, 1, 1, shape[1], dtype=torch.bool, device=device)
        mask[..., -1] = False
    generator = torch.Generator(device).manual_seed(0)  # its own: what training draws stays as it is
    qkv = [torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]
    with _Operators() as seen:
        out = attend(qkv[0], qkv[1], qkv[2], mask, backend)
    gradients = torch.autograd.grad(out.float().square().sum(), qkv)
    if not all(bool(one.isfinite().all()) for one in (out, *gradients)):
        raise RuntimeError("its values or gradients are not finite")
    return seen.kernel() or f"the package of {backend}"


class _Operators(TorchDispatchMode):
    """Notes the operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})

    def kernel(self) -> str | None:
        """What of it computed attention; None where no operator says."""
        for part, name in _KERNELS.items():
            if any(part in one for one in self.names):
                return name() if callable(name) else name
        return None


def _flash() -> str:
    active = current_flash_attention_impl()
    return f"FlashAttention {active.removeprefix('FA')}" if active else "torch's flash attention (FlashAttention 2)"


def _cudnn() -> str:
    version = torch.backends.cudnn.version() or 0
    return f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}"


_KERNELS: dict[str, str | Callable[[], str]] = {
    "scaled_dot_product_cudnn": _cudnn,
    "flash_attention_for_cpu": "torch's fused kernel for CPUs",
    "scaled_dot_product_flash": _flash,
    "scaled_dot_product_efficient": "torch's memory-efficient attention",
    "flash_attn_3": "the package FlashAttention 3",
    "flash_attn": "the package FlashAttention",
    "flex_attention": "torch's flex attention",
    "xformers": "xformers",
    "softmax": "unfused products, whose memory grows with the square of the length",
}
"""By a part of the name of what runs, in the order to look for."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
