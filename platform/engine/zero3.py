"""The engine: DeepSpeed ZeRO-3 behind a small interface. This is the only module that imports deepspeed.

Parameters, gradients and optimiser states are partitioned over the workers; blocks are gathered as a whole, one after
the other. Frozen parameters are partitioned too, and have neither gradients nor optimiser states.

What is trained is float32, and is its own master: layers round it to bf16 for their products, unless a section says
float32. Gradients are float32 from the products of a micro-batch on, and add up in it over micro-batches and ranks.
Frozen parameters are held in bf16, but for those that generation keeps in float32; an export has them from where they
came.
"""

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from domainshuttle.model import fused
from domainshuttle.model.convert import MAX_SHARD_BYTES
from domainshuttle.model.float8 import use_float8
from domainshuttle.model.lora import LORA_FOLDER, LoraWeights
from domainshuttle.model.mot import DomainMoTBlock
from domainshuttle.model.spec import lora_layer
from domainshuttle.model.token_groups import TokenGroup
from domainshuttle.model.weight_files import write_shards
from domainshuttle.platform.config.schema import EngineSection, StageSection
from domainshuttle.platform.engine.activation_checkpointing import checkpoint_blocks
from domainshuttle.platform.engine.attention_kernels import AttentionKernels
from domainshuttle.platform.engine.compilation import compile_blocks
from domainshuttle.platform.engine.deepspeed_config import BlockSize, deepspeed_config
from domainshuttle.platform.engine.initialization import Blueprint
from domainshuttle.platform.engine.lean_imports import without
from domainshuttle.platform.engine.sharded_state import AVERAGE, MASTER, Partition
from domainshuttle.platform.run.segments import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step did."""

    grad_norm: float
    """Global norm before clipping."""
    dropped: bool
    """Whether the gradients were not finite and were dropped: nothing was changed."""


class Engine:
    """A model under ZeRO-3. Call it like the model; then `backward`, and after the last micro-batch `step`.

    All ranks must make the same calls. The blueprint's outline, its trained parameters selected, becomes the model:
    rank 0 reads its weights, and each rank receives its part of one tensor after the other, so that none ever holds
    the whole.
    """

    predicts_pairs = True

    def __init__(self, blueprint: Blueprint, stage: StageSection, section: EngineSection, accumulation: int) -> None:
        deepspeed = import_deepspeed()
        of_block = BlockSize.of(
            (name, one.numel(), one.requires_grad) for name, one in blueprint.outline.named_parameters()
        )
        self.config = deepspeed_config(stage, section, accumulation, torch.cuda.is_available(), of_block)
        self.stage, self._decay = stage, section.ema
        self._accumulation, self._pending = accumulation, 0
        model: Any = blueprint.outline
        self._source = blueprint.source()
        device = _materialise(blueprint, self.config)
        checkpoint_blocks(model, section.activations)
        self.attention = _choose_attention(model, section, device)
        self._tokens = _share_tokens(model, section)
        if section.float8:
            changed = use_float8(model)
            logger.warning("float8: %d frozen layers are computed in it, so the numbers are others", len(changed))
        if section.kernels == "triton":
            fused.fuse(model)
        if section.compile is not None:
            compile_blocks(model, section.compile)
        _gather_whole_blocks(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        trained = [parameter for parameter in names if parameter.requires_grad]
        if not any(names[parameter].startswith("patch_embedding.") for parameter in trained):
            # ZeRO-3 finds its way back through the first block by the gradient of what went in
            model.patch_embedding.register_forward_hook(_require_gradient)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=trained, config=self.config
        )
        self._partition = Partition(self._optimizer, names)
        if self._decay is not None:
            self._partition.start_average()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def close(self) -> None:
        """Gives the memory back, for the next engine of this process; it can't be used any more."""
        self._partition.release()
        release(self._engine)
        if self._tokens is not None:
            dist.destroy_process_group(self._tokens.ranks)

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products, and of the batches that the model is given."""
        return _dtype(self.config)

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
        before = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        dropped = self._engine.skipped_steps > before
        if self._decay is not None and not dropped:
            self._partition.update_average(self._decay)
        return StepResult(float(norm if norm is not None else 0.0), dropped)

    def drop(self, step: int) -> StepResult:
        """Throws the gradients of a step away, as if they had overflowed: nothing is changed.

        Raises RuntimeError when DeepSpeed applied them all the same.
        """
        # it discards a step whose gradients have no finite norm, after which all its buffers are as after a step
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for parameter in self._engine.module.parameters():
            if parameter.requires_grad:
                safe_set_local_grad(parameter, torch.full_like(safe_get_local_grad(parameter), float("nan")))
        result = self.step(step)
        if not result.dropped:
            raise RuntimeError(
                f"step {step} was to be dropped, and DeepSpeed applied it: the weights in memory are spoilt, the last "
                "checkpoint is not. Install the version of deepspeed that pyproject.toml names, and run again"
            )
        return result

    def weights_finite(self) -> bool:
        """Whether this rank's part of what is trained, and of its average, has finite numbers alone."""
        return self._partition.finite()

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self._decay is not None

    def device_bytes(self) -> int:
        """Bytes that weights, gradients and optimiser states take of this rank's device between two steps."""
        parameters = list(self._engine.module.parameters())
        of_parameters = [
            tensor for one in parameters for tensor in (one, one.ds_tensor, one.grad) if tensor is not None
        ]
        held = [*of_parameters, *_tensors_in([vars(self._optimizer), self._partition.flats()])]
        storages = {
            one.untyped_storage().data_ptr(): one.untyped_storage() for one in held if one.device == self.device
        }
        return sum(storage.nbytes() for storage in storages.values())

    def checkpoint_bytes(self, trained: int) -> int:
        """About how many bytes all ranks write of so many trained parameters: master and two moments, and average."""
        return trained * 4 * (4 if self.averages else 3)

    def snapshot(self) -> Callable[[Path], None]:
        """Copies this rank's shard: trained parameters, optimiser states and average.

        The function returned writes it later, from any thread, into folder/zero; it raises OSError when it can't.
        """
        return self._partition.snapshot()

    def load(self, folder: Path, own: bool = False) -> None:
        """Loads this rank's part from the shards of any number of ranks. Frozen parameters stay as they were built.

        With `own`, of as many ranks, its own shard is enough. Raises RuntimeError for shards that are missing, damaged,
        or of other parameters.
        """
        self._partition.load(folder, own)

    def full_parameters(self, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after the other, in float32 on the CPU: what is trained, and the others' sources.

        With `ema`, the moving averages of what is trained. All ranks must run through it to the end, and each reads the
        sources; what is yielded is valid until the next. Raises RuntimeError when no average is kept, OSError and
        ValueError for sources that can't be read or that are not what they were when the engine was built.
        """
        source = self._frozen()
        for name, held in self._gathered(ema):
            yield name, self._exact(name, held, source)

    def _gathered(self, ema: bool) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole on all ranks, on the CPU: a trained one's master or average, a frozen one as held."""
        self._require_average(ema)
        deepspeed = import_deepspeed()
        for name, parameter in self._engine.module.named_parameters():
            if name in self._partition.parts:
                yield name, self._partition.gather(name, AVERAGE if ema else MASTER).cpu()
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    held = parameter.detach().cpu()
                yield name, held

    def _require_average(self, ema: bool) -> None:
        if ema and self._decay is None:
            raise RuntimeError("no moving average is kept: set engine.ema, such as 0.9999")

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of the frozen parameters, where they came from."""
        left = sum(1 for _ in self._engine.module.parameters()) - len(self._partition.parts)
        for name, value in self._source() if left else ():
            if name not in self._partition.parts:
                yield name, value
                left -= 1
            if not left:
                return

    def _exact(self, name: str, held: Tensor, source: Iterator[tuple[str, Tensor]]) -> Tensor:
        """A parameter in float32: as it is held where it is trained, else of its source, which must still agree."""
        if name in self._partition.parts:
            return held
        found, value = next(source)
        if found != name or value.shape != held.shape or not value.to(held.dtype).equal(held):
            raise ValueError(
                f"{name} is frozen, and is not what it was when this run loaded it: the model that the stage began "
                "with has changed meanwhile. Restore it, and run the command again: it goes on from the last checkpoint"
            )
        return value.float()

    def export(self, folder: Path, ema: bool = False) -> None:
        """Writes the whole model as a diffusers folder, float32; rank 0 writes, all ranks must call.

        Frozen parameters are bit for bit those that the engine was built with, but where adapters are trained: those
        are added to their layers' weights, and lie in the folder `lora` too. Raises OSError, on every rank, when the
        folder can't be written or the source of frozen parameters can't be read or has changed.
        """
        adapters = self._adapters(ema)
        gathered = self._gathered(ema)
        faults: list[str | None] = [None]
        if dist.get_rank() == 0:
            module, source = self._engine.module, self._frozen()
            named = [(name, tuple(p.ds_shape)) for name, p in module.named_parameters()]
            order = [(name, shape, torch.float32) for name, shape in named if not lora_layer(name)]
            own = ((name, held) for name, held in gathered if not lora_layer(name))

            def value(name: str) -> Tensor:
                exact = self._exact(*next(own), source)
                return exact if adapters is None else adapters.merged(name, exact)

            try:
                write_shards(folder, order, value, MAX_SHARD_BYTES)
                module.save_config(folder)
                if adapters is not None:
                    adapters.save(folder / LORA_FOLDER)
            except (OSError, ValueError) as error:
                faults = [str(error)]
        for _ in gathered:  # on rank 0 what a fault left: the others wait for it in every gathering
            pass
        dist.broadcast_object_list(faults)
        if faults[0] is not None:
            raise OSError(f"the weights could not be written to {folder}: {faults[0]}")

    def _adapters(self, ema: bool) -> LoraWeights | None:
        """The adapters that are trained, or their averages, on rank 0; all ranks must call."""
        self._require_average(ema)
        lora = self.stage.lora
        if lora is None:
            return None
        kind = AVERAGE if ema else MASTER
        whole = {name: self._partition.gather(name, kind).cpu() for name in self._partition.parts if lora_layer(name)}
        return LoraWeights.of(whole, lora.scale) if dist.get_rank() == 0 else None


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


def release(engine: Any) -> None:
    """Ends a DeepSpeed engine and empties what it holds: its hooks in the autograd graph keep the engine itself alive,
    so that the garbage collector never takes it."""
    engine.destroy()
    parameters = [(parameter, parameter.ds_tensor) for parameter in engine.module.parameters()]
    for tensor in _tensors_in([parameters, vars(engine.optimizer)]):  # of the optimiser gradients and buffers
        tensor.grad = None
        tensor.untyped_storage().resize_(0)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


def frozen_copy(blueprint: Blueprint, section: EngineSection) -> nn.Module:
    """A model without training under ZeRO-3, built as an engine's, for the `snapshot` target of the cross-pair loss."""
    deepspeed = import_deepspeed()
    model = blueprint.outline.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": section.precision == "bf16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": section.persistent_parameters,
            "memory_efficient_linear": False,
        },
    }
    _choose_attention(model, section, _materialise(blueprint, config))
    _share_tokens(model, section)
    _gather_whole_blocks(model)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # DeepSpeed's returns nothing
    frozen: nn.Module = engine
    return frozen


@torch.no_grad()
def _materialise(blueprint: Blueprint, config: dict[str, Any]) -> torch.device:
    """Gives the outline its weights, divided over the ranks. Returns the device of this rank.

    What is trained, and what generation keeps in float32, is float32; all else is of the configured type.
    """
    deepspeed, dtype = import_deepspeed(), _dtype(config)
    with _quiet(), _without_operators():
        deepspeed.init_distributed()
        device = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype).local_device
    outline = blueprint.outline
    weights = blueprint.source()() if dist.get_rank() == 0 else None
    for name, parameter in list(outline.named_parameters()):
        own = torch.float32 if parameter.requires_grad or outline.keeps_float32(name) else dtype
        whole = torch.empty(parameter.shape, dtype=own, device=device)
        if weights is not None:
            source, value = next(weights)
            if source != name:
                raise RuntimeError(f"the weights are out of order: {source} came where {name} was expected")
            whole.copy_(value)
        owner, _, short = name.rpartition(".")
        real = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        setattr(outline.get_submodule(owner), short, real)
        with _quiet():
            # sends rank 0's to all, and keeps this rank's part
            deepspeed.zero.Init(nn.ParameterList([real]), config_dict_or_path=config, dtype=dtype)
    outline.compute_in(dtype)
    return torch.device(device)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if config["bf16"]["enabled"] else torch.float32


def _gather_whole_blocks(model: nn.Module) -> None:
    """Makes a block the unit that is gathered: a third less time a step than by layers (benchmarks/README.md)."""
    from deepspeed.utils import set_z3_leaf_modules

    with _quiet():
        set_z3_leaf_modules(model, [DomainMoTBlock])


def _choose_attention(model: Any, section: EngineSection, device: torch.device) -> AttentionKernels:
    """Sets the backend of a model's attention, once it has been tried here."""
    config = model.config
    kernels = AttentionKernels.tried(section, device, config.num_attention_heads, config.attention_head_dim)
    if kernels.backend is not None:
        diffusers = logging.getLogger("diffusers.models.modeling_utils")
        level = diffusers.level
        diffusers.setLevel(logging.ERROR)  # it warns that backends are experimental
        model.set_attention_backend(kernels.backend)
        diffusers.setLevel(level)
    logger.info("%s", kernels)
    kernels.warn_of_old_cudnn()
    return kernels


def _share_tokens(model: Any, section: EngineSection) -> TokenGroup | None:
    """Has neighbouring ranks share the tokens of their samples, where the section says so. All ranks must call."""
    if section.sequence_parallel == 1:
        return None
    own, _ = dist.new_subgroups(section.sequence_parallel)
    group = TokenGroup(own)
    model.share_tokens(group)
    return group


@functools.cache
def import_deepspeed() -> Any:
    """DeepSpeed, without what it would take along. A run's workers call this before their tracking imports MLflow in a
    thread of its own, which would not find it meanwhile."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    # not used here are its Muon optimiser, which compiles where it is imported and so loads inductor, and its search
    # for settings, which loads MLflow: seconds of a start
    with _quiet(), without("mlflow"), mock.patch.object(torch, "compile", lambda function, **_: function):
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _without_operators() -> Iterator[None]:
    """While it lasts, DeepSpeed makes no collective of its own for CPUs, which is for inference only: it would compile
    it, and where ranks know that they share a node, each would leave 66 MiB in /dev/shm, which nothing removes."""
    deepspeed = import_deepspeed()
    with mock.patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        yield


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
