"""The engine: DeepSpeed ZeRO-3 behind a small interface. This is the only module that imports deepspeed.

Parameters, gradients and optimiser states are partitioned over the workers; blocks are gathered as a whole, one after
the other. Frozen parameters are partitioned too, and have neither gradients nor optimiser states. Weights train in
bf16 with float32 masters in the optimiser.
"""

import contextlib
import fnmatch
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from domainshuttle.model.mot import DomainMoTBlock
from domainshuttle.platform.config import ConfigError, EngineSection, StageSection

TAG = "zero"
"""The folder of the ZeRO shards in a checkpoint."""

# What DeepSpeed's own optimiser shards hold beside tensors; a shard that names any other class is refused.
_KNOWN_GLOBALS = ("deepspeed.", "torch.", "collections.OrderedDict", "numpy.", "argparse.Namespace", "builtins.")


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step did."""

    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """Whether the gradients were not finite, so that nothing was changed."""


@dataclass(frozen=True)
class TrainedParameters:
    """Which parameters a stage trains, by its patterns."""

    trained: dict[str, int]
    frozen: dict[str, int]

    @property
    def trained_count(self) -> int:
        return sum(self.trained.values())

    @property
    def frozen_count(self) -> int:
        return sum(self.frozen.values())


def select_trained(model: nn.Module, patterns: list[str]) -> TrainedParameters:
    """Freezes what no pattern names. Raises ConfigError for a pattern that names nothing."""
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        used.update(hits)
        parameter.requires_grad_(bool(hits))
        (trained if hits else frozen)[name] = parameter.numel()
    if unused := [pattern for pattern in patterns if pattern not in used]:
        groups = sorted({_anonymous(name) for name in [*trained, *frozen]})
        raise ConfigError(
            f"trained: {unused} name no parameter; the model has: {', '.join(groups)} (write * for a block's number)"
        )
    return TrainedParameters(trained, frozen)


def _anonymous(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def deepspeed_config(stage: StageSection, engine: EngineSection, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours: there is no second file to keep in step."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.gradient_clipping,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": stage.learning_rate,
                "betas": list(stage.betas),
                "weight_decay": stage.weight_decay,
                # torch's own: without it DeepSpeed compiles a fused kernel on the spot
                "torch_adam": not torch.cuda.is_available(),
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": engine.persistent_parameters,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if not torch.cuda.is_available():
        # the defaults zero gigabyte buffers that a small model never fills
        config["zero_optimization"] |= {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}
    if engine.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config


def learning_rate(stage: StageSection, step: int) -> float:
    """The rate of step `step`: linear warm-up, then constant or a cosine to `final_learning_rate`."""
    warm = min(1.0, (step + 1) / stage.warmup_steps) if stage.warmup_steps else 1.0
    if stage.final_learning_rate is None:
        return stage.learning_rate * warm
    along = min(1.0, step / stage.steps)
    span = stage.learning_rate - stage.final_learning_rate
    return warm * (stage.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * along)))


class Engine:
    """A model under ZeRO-3. Call it like the model; then `backward`, and after the last micro-batch `step`.

    All ranks must make the same calls. `model` is a whole model on the CPU, its trained parameters selected; the engine
    takes it over and partitions it.
    """

    def __init__(self, model: Any, stage: StageSection, section: EngineSection, accumulation: int) -> None:
        deepspeed = _deepspeed()
        if section.activation_checkpointing:
            model.enable_gradient_checkpointing()
        if not torch.cuda.is_available():
            # over the short sequences of a desk, the CPU's flash kernel takes longer than the plain products
            _set_attention_backend(model, "_native_math")
        _gather_whole_blocks(model)
        self.config = deepspeed_config(stage, section, accumulation)
        self.stage = stage
        self._accumulation, self._pending = accumulation, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=trained, config=self.config
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch (its share of the step's mean)."""
        if self._pending:
            # the one before was not the step's last: DeepSpeed counts micro-batches by calls of its `step`
            self._engine.step()
        self._engine.backward(loss)
        self._pending += 1

    def step(self, step: int) -> StepResult:
        """Clips and applies the gradients at the rate of `step`, or, when they are not finite, drops them."""
        if self._pending != self._accumulation:
            raise RuntimeError(f"step {step} after {self._pending} micro-batches; expected {self._accumulation}")
        self._pending = 0
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.stage, step)
        skipped = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepResult(float(norm if norm is not None else 0.0), self._engine.skipped_steps > skipped)

    def save(self, folder: Path) -> None:
        """Writes this rank's shards (trained parameters and optimiser states) into folder/zero."""
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True, save_latest=False)

    def load(self, folder: Path) -> None:
        """Loads this rank's shards. Frozen parameters stay as the model was built with.

        Raises RuntimeError for shards that hold anything but tensors and DeepSpeed's own classes.
        """
        for shard in sorted((folder / TAG).glob("*.pt")):
            unknown = [
                name
                for name in torch.serialization.get_unsafe_globals_in_checkpoint(shard)
                if not name.startswith(_KNOWN_GLOBALS)
            ]
            if unknown:
                raise RuntimeError(f"{shard} names {unknown}: not a shard that this platform wrote; it is not loaded")
        with _quiet():
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"{folder / TAG}: DeepSpeed found no shards for this rank")

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after the other, in float32 on the CPU: the masters of those that are trained.

        All ranks must run through it to the end; what is yielded is valid until the next.
        """
        deepspeed = _deepspeed()
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter).detach().cpu()
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().float().cpu()
                yield name, whole

    def export(self, folder: Path) -> None:
        """Writes the whole model as a diffusers folder, float32; rank 0 writes, all ranks must call."""
        main = dist.get_rank() == 0
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[dict[str, Tensor]] = [{}]
        sizes: list[int] = [0]
        names: dict[str, str] = {}
        for name, tensor in self.full_parameters():
            if not main:
                continue
            if sizes[-1] + tensor.nbytes > _EXPORT_SHARD_BYTES and shards[-1]:
                save_file(shards[-1], folder / f"part-{len(shards):05d}.safetensors", {"format": "pt"})
                shards[-1].clear()
                shards.append({})
                sizes.append(0)
            shards[-1][name] = tensor.contiguous().clone()
            sizes[-1] += tensor.nbytes
            names[name] = f"part-{len(shards):05d}.safetensors"
        if main:
            save_file(shards[-1], folder / f"part-{len(shards):05d}.safetensors", {"format": "pt"})
            _finish_export(folder, names, sum(sizes), self._engine.module)
        dist.barrier()


_EXPORT_SHARD_BYTES = 5 << 30


def _finish_export(folder: Path, names: dict[str, str], size: int, module: Any) -> None:
    """Gives the shards their diffusers names and writes index and configuration."""
    count = len(set(names.values()))
    stem = "diffusion_pytorch_model"
    final = {
        f"part-{n:05d}.safetensors": f"{stem}-{n:05d}-of-{count:05d}.safetensors"
        if count > 1
        else f"{stem}.safetensors"
        for n in range(1, count + 1)
    }
    for old, new in final.items():
        (folder / old).rename(folder / new)
    if count > 1:
        index = {"metadata": {"total_size": size}, "weight_map": {name: final[part] for name, part in names.items()}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    module.save_config(folder)


def frozen_copy(model: nn.Module, section: EngineSection) -> nn.Module:
    """A model without training under ZeRO-3, for the `snapshot` target of the cross-pair loss."""
    deepspeed = _deepspeed()
    _gather_whole_blocks(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": section.persistent_parameters},
    }
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=config)
    frozen: nn.Module = engine.eval()
    return frozen


def _gather_whole_blocks(model: nn.Module) -> None:
    """Makes a block the unit that is gathered: a third less time a step than by layers (benchmarks/README.md)."""
    from deepspeed.utils import set_z3_leaf_modules

    with _quiet():
        set_z3_leaf_modules(model, [DomainMoTBlock])


def _set_attention_backend(model: Any, name: str) -> None:
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that backends are experimental
    model.set_attention_backend(name)
    logger.setLevel(level)


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed compiles with the ninja it finds first; another version of it would compile everything again
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    with _quiet():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what DeepSpeed prints and logs below errors: a hundred lines for a start."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
            yield
    finally:
        logger.setLevel(level)


def build_cpu_operator() -> None:
    """Compiles DeepSpeed's shared-memory collective for the CPU, which its first start would do; a no-op elsewhere."""
    if torch.cuda.is_available():
        return
    _deepspeed()
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
