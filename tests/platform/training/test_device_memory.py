"""A worker that runs out of memory says over what, how much was used, and what helps.

Run: python -m pytest tests/platform/training/test_device_memory.py
"""

import os
import pickle
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import batch_loss, engine, one_rank
from ray.train import WorkerGroupError
from running import cli, start

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.loading.reader import MicroBatch
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver.restarts import explain
from domainshuttle.platform.run.workers import DeviceMemoryError
from domainshuttle.platform.training.device_memory import MemoryUse, memory_error

CUDA = (
    "CUDA out of memory. Tried to allocate 2.30 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.06 GiB is free."
)
H100 = MemoryUse("its GPU (NVIDIA H100)", 70 << 30, 75 << 30, 7 << 30, 1 << 30, 79 << 30)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with one_rank():
        yield


def micro(bucket: str = "81x480x832", samples: int = 2, **more: Any) -> MicroBatch[TrainingBatch]:
    _, frames, height, width = parse_bucket(bucket).latent_shape
    sizes = {"references": 2, "text_tokens": 5, "text_dim": 64, **more}
    batch = TrainingBatch.fake(samples, frames=frames, height=height, width=width, **sizes)
    return MicroBatch(12, 0, batch, ["a"] * samples, Counter())


def test_the_message_has_the_step_its_bucket_the_figures_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryUse, "now", classmethod(lambda _: H100))
    config = load_config("demo", ["cluster.gpus_per_worker=1"])
    stage = config.stages[1]
    bucket = parse_bucket("81x480x832")
    said = memory_error(torch.OutOfMemoryError(CUDA), config, stage, 3, micro(), lambda: 61 << 30)
    assert isinstance(said, DeviceMemoryError)
    tokens = bucket.video_tokens + 2 * bucket.reference_tokens
    for part in (
        "worker 3 ran out of memory of its GPU (NVIDIA H100) in step 12, over a micro-batch of 2 samples in bucket "
        f"81x480x832: {tokens:,} tokens a sample ({bucket.video_tokens:,} of video, 2 references of "
        f"{bucket.reference_tokens:,}",
        "it asked for 2.30 GiB; 70.00 GiB of 79.00 GiB were in use by it (at most 75.00 GiB), 1.00 GiB free; 7.00 GiB "
        "held in parts too small; planned for weights, gradients and optimiser states: 61.00 GiB",
    ):
        assert part in str(said), str(said)
    assert "\n" not in str(said)
    assert str(pickle.loads(pickle.dumps(said))) == str(said)
    # of the driver: the whole message, as one fault of the workers
    fault = explain(WorkerGroupError("a worker failed", {3: said}))
    assert fault.what == str(said) and fault.counted and fault.final is None


def test_what_the_allocator_of_a_gpu_held_is_in_a_file_that_its_viewer_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MemoryUse, "now", classmethod(lambda _: H100))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"address": 1, "blocks": []}])
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "a table")
    config = load_config("demo", ["cluster.gpus_per_worker=1"])
    said = str(memory_error(torch.OutOfMemoryError(CUDA), config, config.stages[1], 3, None, None, tmp_path / "memory"))
    path = tmp_path / "memory" / "rank00003.pickle"
    assert str(path) in said and path.with_suffix(".txt").read_text() == "a table"
    assert pickle.loads(path.read_bytes()) == {"segments": [{"address": 1, "blocks": []}], "device_traces": []}
    (tmp_path / "full").write_text("")
    said = str(memory_error(torch.OutOfMemoryError(CUDA), config, config.stages[1], 3, None, None, tmp_path / "full"))
    assert "What helps" in said and "can't be written" in said


@pytest.mark.parametrize("overrides", [[], ["engine.activations.mode=full", "engine.offload_optimizer=true"]])
def test_every_setting_that_helps_is_taken_and_may_change_when_a_run_goes_on(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryUse, "now", classmethod(lambda _: H100))
    config = load_config("demo", ["cluster.gpus_per_worker=1", *overrides])
    said = str(memory_error(torch.OutOfMemoryError(CUDA), config, config.stages[1], 0, None, None))
    settings = [shlex.split(text)[0] for text in re.findall(r"--set ('[^']*'|[^\s,]+)", said)]
    assert len(settings) == (2 if overrides else 4), said
    for setting in settings:
        changed = load_config("demo", ["cluster.gpus_per_worker=1", *overrides, setting])
        assert changed.digest() == config.digest(), setting
        assert changed.model_dump() != config.model_dump(), f"{setting} is so already"
    for key in re.findall(r"\((c[\w.-]+)\)", said):
        assert key.startswith(("cluster.workers", "corpora."))


def test_smaller_settings_than_the_smallest_are_not_advised() -> None:
    config = load_config("demo", [*(f"stages.{name}.micro_batch=1" for name in ("base", "stage1", "stage2"))])
    said = str(memory_error(MemoryError(), config, config.stages[1], 0, None, None))
    assert "micro_batch" not in said and "offload_optimizer" not in said  # no GPU either
    assert "while the model was built, or a batch was loaded" in said


def _cpu() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def _raises(error: BaseException) -> Any:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (_cpu, f"{2**30:.2f} GiB"),
        (_raises(torch.OutOfMemoryError(CUDA)), "2.30 GiB"),
        (_raises(torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB (GPU 0")), "0.02 GiB"),
        (_raises(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous")), ""),
        (_raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), ""),
        (_raises(MemoryError()), ""),
    ],
)
def test_every_allocator_is_understood(function: Any, asked: str) -> None:
    config = load_config("demo")
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        function()
    said = memory_error(raised.value, config, config.stages[0], 0, micro("1x64x64"), None)
    assert said is not None
    assert ("it asked for" in str(said)) == bool(asked) and asked in str(said)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory"), OSError(28, "full"),
              KeyboardInterrupt(), RuntimeError("the batch is empty")],
)  # fmt: skip
def test_other_errors_are_left_as_they_are(error: BaseException) -> None:
    config = load_config("demo")
    assert memory_error(error, config, config.stages[0], 0, None, None) is None


def test_a_step_of_the_engine_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's states are what its tensors take; its forward pass meets an allocator that has no more."""
    model = engine(["*"], ema=0.9)
    small = micro("1x32x32")
    batch_loss(model, small.batch).item()
    trained = sum(parameter.ds_numel for parameter in model._engine.module.parameters())
    before = model.device_bytes()
    # weights, masters, gradients and the average, 4 bytes each; the moments come with the first step
    assert 16 * trained <= before < 21 * trained
    model.backward(batch_loss(model, small.batch))
    model.step(0)
    assert 8 * trained <= model.device_bytes() - before < 9 * trained

    def none_left(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", none_left)
    config = load_config("demo")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        model.backward(batch_loss(model, small.batch))
    said = memory_error(raised.value, config, config.stages[0], 0, small, model.device_bytes)
    assert "in bucket 1x32x32" in str(said) and "planned for weights" in str(said)
    model.close()


PATCH = """
import os, sys, importlib.abc, importlib.machinery

class AfterDeepSpeed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "domainshuttle.model.objective":
            return None
        sys.meta_path.remove(self)
        import torch
        backward = torch.Tensor.backward
        calls = []

        def out_of_memory(self, *args, **kwargs):
            calls.append(1)
            if len(calls) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB. GPU 0")
            return backward(self, *args, **kwargs)

        torch.Tensor.backward = out_of_memory
        return None

sys.meta_path.insert(0, AfterDeepSpeed())
"""


@pytest.mark.nightly
def test_a_run_that_is_out_of_memory_ends_with_the_message_and_goes_on_with_what_it_advises(
    tiny: Path, tmp_path: Path
) -> None:
    """The allocator of every worker has nothing left at the fourth backward pass."""
    (tmp_path / "sitecustomize.py").write_text(PATCH)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = ("--set", "name=full", "--set", "cluster.max_failures=0")
    log = tmp_path / "log"
    assert start(tiny, *arguments, log=log, PYTHONPATH=paths).wait(400) == 2
    said = log.read_text()
    assert "Traceback" not in said
    config = load_config(str(tiny), ["name=full"])
    stage = config.stages[0]
    line = next(line for line in said.splitlines() if "ran out of memory" in line)
    assert re.search(rf"stage {stage.name}: worker \d ran out of memory of its node in step \d+, over a micro-batch of "
                     rf"{stage.micro_batch} samples in bucket \d+x\d+x\d+: ", line), said  # fmt: skip
    assert "it asked for 2.30 GiB" in line and "planned for weights, gradients and optimiser states: 0." in line
    setting = re.findall(r"--set ('[^']*'|[^\s,]+)", line)[0]
    assert "Finished after" in cli("train", tiny, "--set", "name=full", "--set", *shlex.split(setting))
