"""What others do not promise to keep, and this product relies on: all of it, and that it still is what we need.

A use of it that is not listed here fails, and so does an entry that is not used any more. Where a new version of a
library fails here, mend the place that is named, then the entry.
Run: python -m pytest tests/test_private_interfaces.py
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import batch_loss, engine, one_rank

from domainshuttle.model.batch import TrainingBatch

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "platform/engine/zero3.py"
STATE = "platform/engine/sharded_state.py"
KERNELS = "platform/engine/attention_kernels.py"

SOURCE = "pipelines/loading/ray_source.py"
TRAINER = "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer"
RESTARTS = "platform/driver/restarts.py"

USES: dict[str, tuple[str, ...]] = {
    # DeepSpeed: of an engine
    "skipped_steps": (ENGINE,),
    "get_global_grad_norm": (ENGINE,),
    "destroy": (ENGINE,),
    "optimizer": (ENGINE, STATE),
    "module": (ENGINE,),
    "device": (ENGINE,),
    "backward": (ENGINE,),
    "step": (ENGINE,),
    "eval": (ENGINE,),
    # of ZeRO-3's optimiser
    "param_groups": (ENGINE,),
    "fp16_groups": (STATE,),
    "fp16_partitioned_groups_flat": (STATE,),
    "fp32_partitioned_groups_flat": (STATE,),
    "checkpoint_event_prologue": (STATE,),
    "checkpoint_event_epilogue": (STATE,),
    # of a parameter that it divides
    "ds_tensor": (ENGINE,),
    "ds_shape": (ENGINE, STATE),
    "ds_numel": (STATE,),
    "partition_numel": (STATE,),
    # of its modules
    "local_device": (ENGINE,),
    "deepspeed.runtime.zero.muon.original_muon": (ENGINE,),
    "patch deepspeed.ops.__compatible_ops__.": (ENGINE,),
    "patch torch.compile": (ENGINE,),
    # PyAV's enumeration of the notes beside a frame (EXIF in Motion JPEG: tests/pipelines/media/test_streams.py)
    "_missing_": ("pipelines/media/clips.py",),
    "_name_": ("pipelines/media/clips.py",),
    "_value_": ("pipelines/media/clips.py",),
    # Ray Data's scheduling loop
    "ray.data._internal.execution.execution_callback.ExecutionCallback": (SOURCE,),
    "custom_execution_callback_classes": (SOURCE,),
    "_topology": (SOURCE,),
    "_in_task_output_backpressure": (SOURCE,),
    # Ray Train's trainer without torch, which its public module is of its first version
    TRAINER: ("platform/driver/worker_group.py",),
    # Ray's errors and processes, by name
    "health_check_failure": (RESTARTS,),
    "WorkerGroupStartupTimeoutError": (RESTARTS,),
    "InsufficientClusterResourcesError": (RESTARTS,),
    "WorkerGroupStartupFailedError": (RESTARTS,),
    "TrainController": (RESTARTS,),
    "SplitCoordinator": (RESTARTS,),
    "SynchronizationActor": (RESTARTS,),
    "RayTrainWorker": (RESTARTS,),
    # what is free on each node; the public function sums over all
    "ray._private.state.available_resources_per_node": ("platform/driver/group_size.py",),
    # and how the folder of a job's working directory begins
    "_ray_pkg_": ("platform/config/loading.py",),
    # torch
    "torch.utils._python_dispatch.TorchDispatchMode": ("platform/engine/initialization.py", KERNELS),
    "torch._dynamo.exc.TorchDynamoException": ("platform/engine/compilation.py",),
    "torch._dynamo.exc.FailOnRecompileLimitHit": ("platform/engine/compilation.py",),
    "OutOfMemoryError": ("pipelines/quarantine.py",),
    "AcceleratorError": ("pipelines/quarantine.py",),
    # diffusers
    "_execution_device": ("model/generation.py",),
    "_gradient_checkpointing_func": ("model/mot.py", "platform/engine/activation_checkpointing.py"),
    # its attention backends, by name
    "_flash_3": (KERNELS, "model/attention.py"),
    "_flash_3_hub": ("model/attention.py",),
    "_native_flash": (KERNELS, "model/attention.py"),
    "_native_cudnn": (KERNELS,),
    "_native_npu": (KERNELS,),
    "_native_xla": (KERNELS,),
    # pyarrow
    "__reduce__": ("pipelines/storage/filesystems.py",),
}
"""What is used, and where."""

PUBLIC = {"cause", "error_code", "n_frames", "parameters", "named_parameters", "state", "defaults"}
"""Documented: of Ray's RayTaskError, MLflow's MlflowException, Pillow's pictures, torch's modules and optimisers."""
_NAMES_OF_OURS = {
    "_ref", "_analysis", "_synthesis", "_class_name", "_diffusers_version",  # in files that others write too
}  # fmt: skip
_DUNDERS = {"__reduce__", "__reduce_ex__", "__dict__", "__getstate__", "__setstate__", "__wrapped__", "__globals__"}
_OBJECTS = {"self._engine", "self._optimizer", "self._engine.module", "engine", "optimizer"}
"""Expressions in platform/engine/ that are DeepSpeed's: an engine, ZeRO-3's optimiser."""
_ERRORS_BY_NAME = re.compile(r"[A-Z]\w+Error")


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def defined(tree: ast.AST) -> set[str]:
    """The names that a module gives: of functions, classes, variables, fields and attributes of self."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    return own


@functools.cache
def product(root: Path) -> frozenset[str]:
    """The names that the product gives, in any module."""
    return frozenset().union(*(defined(ast.parse(path.read_text())) for path in sources(root)))


def sources(root: Path) -> list[Path]:
    rooms = ("model", "pipelines", "cluster", "platform")
    return [path for room in rooms for path in sorted((root / room).rglob("*.py"))]


def uses(path: Path) -> Iterator[str]:
    """What a file uses that others do not promise to keep."""
    tree, inside = ast.parse(path.read_text()), str(path.relative_to(ROOT))
    own = defined(tree) | _NAMES_OF_OURS
    in_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("domainshuttle"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if private(name) or (name.startswith("deepspeed.") and name.count(".") > 2):
                    yield name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if private(alias.name) or (alias.name.startswith("deepspeed.") and alias.name.count(".") > 1):
                    yield alias.name
        elif isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            hidden = (private(node.attr) and node.attr not in own) or node.attr in _DUNDERS
            if (
                hidden
                or node.attr.startswith("ds_")
                or (inside in (ENGINE, STATE) and of in _OBJECTS and node.attr not in PUBLIC)
            ):
                yield node.attr
        elif isinstance(node, ast.Call):
            function, constants = ast.unparse(node.func), [a.value for a in node.args if isinstance(a, ast.Constant)]
            if function in ("getattr", "hasattr", "setattr") and constants and isinstance(constants[0], str):
                if constants[0] not in product(ROOT) | PUBLIC and not constants[0].startswith("__"):
                    yield constants[0]
            elif "patch" in function.split(".") or function.endswith("patch.object"):
                yield f"patch {ast.unparse(node.args[0])}.{'.'.join(map(str, constants))}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_texts:
            of_data = inside.startswith("pipelines/")  # whose files and fields have such names
            hidden = re.fullmatch(r"_[A-Za-z]\w*", node.value) and node.value not in own and not of_data
            if hidden or _ERRORS_BY_NAME.fullmatch(node.value):
                yield node.value
        if isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value).split(".")[0] in LIBRARIES:
                    yield f"patch {ast.unparse(target)}"


LIBRARIES = {"torch", "ray", "deepspeed", "mlflow", "diffusers", "transformers", "pyarrow", "pa", "dist", "av", "nn"}


def test_what_is_used_is_listed_and_what_is_listed_is_used() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for path in sources(ROOT):
        for name in uses(path):
            found[name].add(str(path.relative_to(ROOT)))
    unlisted = {name: sorted(places - set(USES.get(name, ()))) for name, places in found.items()}
    assert not {name: places for name, places in unlisted.items() if places}
    for name, places in USES.items():
        for place in places:
            word = name.rpartition(".")[2]
            assert re.search(rf"\b{word}\b", (ROOT / place).read_text()), f"{place} does not use {name} any more"
    assert set(CHECKS) == set(USES)


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo", "from mlflow.utils._spark import x", "from torch import _C", "run.data._metric_objs",
        "getattr(x, '_hidden')", "getattr(x, 'unlisted')", "mock.patch.object(torch, 'compile')", "torch.compile = x",
        "x.__reduce__()", "dispatch('_native')", "if name == 'OtherError': pass", "import deepspeed.runtime.engine",
        "from deepspeed.runtime.zero import stage3", "p.ds_id",
    ],
)  # fmt: skip
def test_the_scan_finds_every_kind(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(source)
    assert list(uses(tmp_path / "a.py")), source
    (tmp_path / "b.py").write_text("class A:\n    def __init__(self): self._own = 1\n    def f(self): return self._own")
    assert not list(uses(tmp_path / "b.py"))


# What each must be


@pytest.fixture(scope="module")
def trained() -> Iterator[Any]:
    """An engine of one rank after a step."""
    with one_rank():
        model = engine(["blocks.*"])
        model.backward(batch_loss(model, TrainingBatch.fake(2, height=4, width=4)))
        model.step(0)
        yield model
        model.close()


def of_engine(name: str) -> Callable[[Any], None]:
    def check(model: Any) -> None:
        assert hasattr(model._engine, name)

    return check


def _parameters(model: Any) -> list[Any]:
    return [parameter for parameter in model._engine.module.parameters() if parameter.requires_grad]


def _groups(model: Any) -> None:
    """The parameters that are trained, in groups; each parameter's part follows the one before in a flat tensor."""
    groups = model._optimizer.fp16_groups
    assert [id(one) for group in groups for one in group] == [id(one) for one in _parameters(model)]
    for group, held, master in zip(
        groups,
        model._optimizer.fp16_partitioned_groups_flat,
        model._optimizer.fp32_partitioned_groups_flat,
        strict=True,
    ):
        whole = torch.cat([one.ds_tensor.flatten() for one in group])
        assert master.dtype == held.dtype == torch.float32
        assert torch.equal(whole, held) and torch.equal(held, master)
        # views: what is copied into the flat tensor is what layers use
        assert held.untyped_storage().data_ptr() == group[0].ds_tensor.untyped_storage().data_ptr()
        assert {"step", "exp_avg", "exp_avg_sq"} <= set(model._optimizer.optimizer.state[master])


def _divided(model: Any) -> None:
    for parameter in _parameters(model):
        assert parameter.partition_numel() >= parameter.ds_numel == parameter.ds_shape.numel()
        assert parameter.ds_tensor.numel() == parameter.partition_numel()


def _muon(_: Any) -> None:
    """It still compiles where it is imported, which the patch is for."""
    code = (
        "import sys, deepspeed, deepspeed.runtime.zero.muon.original_muon; "
        "print('torch._inductor.config' in sys.modules)"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip().endswith("True"), "the patch of torch.compile is needed no more: remove it"


def _callback(_: Any) -> None:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    assert list(inspect.signature(ExecutionCallback.on_execution_step).parameters) == ["self", "executor"]


def _context(_: Any) -> None:
    from ray.data import DataContext

    assert "custom_execution_callback_classes" in {field.name for field in dataclasses.fields(DataContext)}


def _executor(_: Any) -> None:
    from ray.data import DataContext
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    executor = StreamingExecutor(DataContext())
    assert executor._topology is None  # a mapping by operator from its start on
    source = inspect.getsource(StreamingExecutor)
    assert "build_streaming_topology" in source and "on_execution_step" in source


def _operator(_: Any) -> None:
    from ray.data import DataContext
    from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer

    operator = InputDataBuffer(DataContext(), input_data=[])
    assert operator._in_task_output_backpressure is False
    assert list(operator.get_active_tasks()) == []


def _health(_: Any) -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    cause = ValueError("x")
    assert WorkerHealthCheckFailedError("y", cause).health_check_failure is cause


def _job_folder(_: Any) -> None:
    from ray._private.runtime_env.packaging import RAY_PKG_PREFIX

    assert RAY_PKG_PREFIX == "_ray_pkg_"


def of_ray(module: str, name: str) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        found = getattr(importlib.import_module(module), name)
        actor = getattr(found, "__ray_metadata__", None)  # of a class that is an actor already
        assert (actor.class_name if actor else found.__name__).split(".")[-1] == name

    return check


def _dispatch(_: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(torch.Tag.nondeterministic_seeded in function.tags)
            return function(*args, **(kwargs or {}))

    with Seen():
        torch.zeros(2).uniform_()
    assert seen == [False, True]


def of_torch(name: str) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        assert issubclass(getattr(torch, name), RuntimeError)

    return check


def _pipeline(_: Any) -> None:
    from diffusers import DiffusionPipeline

    assert isinstance(DiffusionPipeline._execution_device, property)


def _recomputation(_: Any) -> None:
    from diffusers.models.modeling_utils import ModelMixin

    source = inspect.getsource(ModelMixin)
    assert "gradient_checkpointing_func" in inspect.signature(ModelMixin.enable_gradient_checkpointing).parameters
    assert "_gradient_checkpointing_func" in source


def _store(_: Any) -> None:
    """Its keyword arguments, by which the same file system is made again with others."""
    from pyarrow import fs

    made = fs.S3FileSystem(region="eu-west-1", endpoint_override="localhost:9", scheme="http", anonymous=True)
    _, (options,) = made.__reduce__()
    assert options["region"] == "eu-west-1" and options["endpoint_override"] == "localhost:9"
    changed = {"connect_timeout": 1.0, "request_timeout": 2.0, "allow_delayed_open": True}
    strategy = fs.AwsStandardS3RetryStrategy(max_attempts=2)
    assert fs.S3FileSystem(**options | {"retry_strategy": strategy, **changed}).region == "eu-west-1"


def _operators(_: Any) -> None:
    from deepspeed.comm import comm
    from deepspeed.ops import __compatible_ops__ as known
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm" in known
    assert comm.cdb.shm_comm_op is None  # of the engine of this process


def _device(model: Any) -> None:
    import deepspeed

    made = deepspeed.zero.Init(torch.nn.ParameterList([]), config_dict_or_path=model.config)
    assert torch.device(made.local_device) == model.device
    assert "module" in inspect.signature(deepspeed.zero.Init.__init__).parameters
    # `memory_efficient_linear` of its configuration: its own product is in no one's place
    assert torch.nn.functional.linear is torch._C._nn.linear


def _events(model: Any) -> None:
    for name in ("checkpoint_event_prologue", "checkpoint_event_epilogue"):
        assert not inspect.signature(getattr(model._optimizer, name)).parameters


def _rates(model: Any) -> None:
    model._optimizer.param_groups[0]["lr"] = 0.125
    assert model._optimizer.optimizer.param_groups[0]["lr"] == 0.125  # the one that steps


def _skipped(model: Any) -> None:
    """A step whose gradients are not finite is counted, and changes nothing."""
    before = model._engine.skipped_steps
    model.backward(batch_loss(model, TrainingBatch.fake(2, height=4, width=4)))
    assert model.drop(1).dropped and model._engine.skipped_steps == before + 1


EXCEPTIONS = "ray.train.v2._internal.exceptions"


def _backend(_: Any) -> None:
    """Names of attention backends: those without a backward pass, and those that raise for a mask."""
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName

    from domainshuttle.model.attention import NO_MASKS

    names = {one.value for one in AttentionBackendName}
    assert {"_flash_3", "_native_flash", "_native_cudnn", "_native_npu", "_native_xla", "sage", *NO_MASKS} <= names
    assert any(name.startswith("_sage") for name in names)
    source = inspect.getsource(attention_dispatch)
    # the operator of _flash_3 has a forward and a fake, and no formula of its gradient
    assert "flash_attn_3::_flash_attn_forward" in source and "register_autograd" not in source
    given = [torch.ones(1, 3, 1, 8) for _ in range(3)]
    with pytest.raises(ValueError, match="attn_mask"):
        attention_dispatch.dispatch_attention_fn(*given, attn_mask=torch.ones(1, 1, 1, 3), backend="_native_flash")


def of_dynamo(_: Any) -> None:
    """What torch.compile raises with `fullgraph`."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    assert issubclass(FailOnRecompileLimitHit, Exception) and issubclass(TorchDynamoException, RuntimeError)


def _notes(trained: Any) -> None:
    importlib.import_module("domainshuttle.pipelines.media.clips")
    kinds = importlib.import_module("av.sidedata.sidedata").Type
    assert (kinds(4711).name, kinds(4711).value) == ("number 4711", 4711)


CHECKS: dict[str, Callable[[Any], None]] = {
    **{name: of_engine(name) for name in ("get_global_grad_norm", "destroy", "optimizer", "module", "device",
                                          "backward", "step", "eval")},
    "skipped_steps": _skipped, "param_groups": _rates,
    **dict.fromkeys(("fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"), _groups),
    **dict.fromkeys(("checkpoint_event_prologue", "checkpoint_event_epilogue"), _events),
    **dict.fromkeys(("ds_tensor", "ds_shape", "ds_numel", "partition_numel"), _divided),
    "local_device": _device,
    **dict.fromkeys(("deepspeed.runtime.zero.muon.original_muon", "patch torch.compile"), _muon),
    "patch deepspeed.ops.__compatible_ops__.": _operators,
    "ray.data._internal.execution.execution_callback.ExecutionCallback": _callback,
    "custom_execution_callback_classes": _context, "_topology": _executor, "_in_task_output_backpressure": _operator,
    "health_check_failure": _health,
    **{name: of_ray(EXCEPTIONS, name) for name in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError",
                                                   "InsufficientClusterResourcesError")},
    "ray._private.state.available_resources_per_node": of_ray("ray._private.state", "available_resources_per_node"),
    "_ray_pkg_": _job_folder,
    "TrainController": of_ray("ray.train.v2._internal.execution.controller.controller", "TrainController"),
    "SplitCoordinator": of_ray("ray.data._internal.iterator.stream_split_iterator", "SplitCoordinator"),
    TRAINER: of_ray(*TRAINER.rsplit(".", 1)),
    "SynchronizationActor": of_ray("ray.train.v2._internal.execution.checkpoint.sync_actor", "SynchronizationActor"),
    "RayTrainWorker": of_ray("ray.train.v2._internal.execution.worker_group.worker", "RayTrainWorker"),
    "torch.utils._python_dispatch.TorchDispatchMode": _dispatch,
    **{name: of_dynamo for name in USES if name.startswith("torch._dynamo.exc.")},
    "OutOfMemoryError": of_torch("OutOfMemoryError"), "AcceleratorError": of_torch("AcceleratorError"),
    "_execution_device": _pipeline, "_gradient_checkpointing_func": _recomputation,
    **dict.fromkeys(("_flash_3", "_flash_3_hub", "_native_flash"), _backend),
    **dict.fromkeys(("_native_cudnn", "_native_npu", "_native_xla"), _backend),
    "__reduce__": _store,
    **dict.fromkeys(("_missing_", "_name_", "_value_"), _notes),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_it_still_is_what_we_need(name: str, trained: Any) -> None:
    CHECKS[name](trained)
