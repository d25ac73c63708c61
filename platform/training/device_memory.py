"""What a worker ran out of memory over, of its GPU or of its node: one message with the figures and what helps."""

import pickle
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.buckets import PATCH, SPACE_STRIDE, TIME_STRIDE, Bucket
from domainshuttle.pipelines.errors import counted, one_line
from domainshuttle.pipelines.loading.reader import MicroBatch
from domainshuttle.platform.config.schema import RunConfig, StageSection
from domainshuttle.platform.run.workers import DeviceMemoryError


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a worker's device, or where it has no GPU, of its process and its node."""

    device: str
    used: int
    """By this worker."""
    peak: int
    """The most that it has used."""
    idle: int
    """Taken from the device, and not in use: too small in its parts for what was asked."""
    free: int
    """Left by all processes."""
    total: int

    @classmethod
    def now(cls) -> "MemoryUse":
        """The bytes of this process."""
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            used = torch.cuda.memory_allocated()
            name = f"its GPU ({torch.cuda.get_device_name()})"
            return cls(name, used, torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved() - used, free, total)
        node, used = psutil.virtual_memory(), psutil.Process().memory_info().rss
        return cls("its node", used, used, 0, node.available, node.total)


def peak_bytes() -> int:
    """The most that torch has used of this worker's GPU, or where it has none, that its process has used of its node,
    since it started."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# of an allocator of torch's, a CUDA library, or the driver; torch raises a type of its own for the first alone
_TEXTS = re.compile(r"(?i)out of memory|can't allocate memory|cannot allocate memory|_ALLOC_FAILED|bad_alloc")
_ASKED = re.compile(r"(?i)tried to allocate (\d+(?:\.\d+)?) *(bytes|[KMG]i?B)")
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def memory_error(
    error: BaseException,
    config: RunConfig,
    stage: StageSection,
    rank: int,
    micro: MicroBatch[TrainingBatch] | None,
    states: Callable[[], int] | None,
    snapshot: Path | None = None,
) -> DeviceMemoryError | None:
    """What to say of an error for want of memory; None: it is another.

    `micro` was worked at, none: the model was built, or a batch loaded. `states` says the bytes that weights, gradients
    and optimiser states take of the device, which is known before the first step; none: they were not there yet. What
    the allocator of a GPU holds is written to the folder `snapshot`.
    """
    other = not isinstance(error, MemoryError | torch.OutOfMemoryError)
    if other and not (isinstance(error, RuntimeError) and _TEXTS.search(str(error))):
        return None
    use = MemoryUse.now()
    asked = _ASKED.search(str(error))
    size = float(asked[1]) * _UNITS[asked[2][0].lower()] if asked else None
    facts = [
        *([f"it asked for {_gib(size)}"] if size is not None else []),
        f"{_gib(use.used)} of {_gib(use.total)} were in use by it (at most {_gib(use.peak)}), {_gib(use.free)} free",
        *([f"{_gib(use.idle)} held in parts too small"] if use.idle > (size or 0) else []),
        *([f"planned for weights, gradients and optimiser states: {_gib(states())}"] if states is not None else []),
    ]
    written = _write_snapshot(snapshot, rank) if snapshot is not None and torch.cuda.is_available() else ""
    return DeviceMemoryError(
        f"worker {rank} ran out of memory of {use.device} {_over(micro)}: {'; '.join(facts)}. What helps, also when "
        f"the run goes on from its checkpoint: {', '.join(_remedies(config, stage, use.idle > (size or 0)))}{written}"
    )


def _write_snapshot(folder: Path, rank: int) -> str:
    """Writes what torch's allocator holds, for people; says where, or why it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{rank:05d}.pickle"
        # the form that pytorch.org/memory_viz shows; it is never read here
        path.write_bytes(pickle.dumps({"segments": torch.cuda.memory_snapshot(), "device_traces": []}))
        path.with_suffix(".txt").write_text(torch.cuda.memory_summary())
    except (OSError, RuntimeError) as error:
        return f". What the allocator held can't be written: {one_line(error)}"
    return f". What the allocator held: {path} (for https://pytorch.org/memory_viz) and {path.stem}.txt"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _over(micro: MicroBatch[TrainingBatch] | None) -> str:
    """The step, and of what its micro-batch was made."""
    if micro is None:
        return "while the model was built, or a batch was loaded"
    batch = micro.batch
    frames, height, width = batch.bucket
    bucket = Bucket((frames - 1) * TIME_STRIDE + 1, height * SPACE_STRIDE, width * SPACE_STRIDE)
    references = batch.references.shape[1]
    paired = batch.paired_references.shape[1] if batch.paired_references is not None else 0
    one = (height // PATCH) * (width // PATCH)
    tokens = bucket.video_tokens + references * one
    again = f", and again with {paired} others for the cross-pair loss" if paired else ""
    return (
        f"in step {micro.step}, over a micro-batch of {counted(batch.batch_size, 'sample')} in bucket {bucket}: "
        f"{tokens:,} tokens a sample ({bucket.video_tokens:,} of video, {references} references of {one:,}{again})"
    )


def _remedies(config: RunConfig, stage: StageSection, scattered: bool) -> Iterator[str]:
    """Settings that take less memory than those there are: they change a step by rounding only."""
    engine, micro = config.engine, stage.micro_batch
    if micro > 1:
        smaller = max(number for number in range(1, micro) if micro % number == 0)
        yield f"--set stages.{stage.name}.micro_batch={smaller}"
    if engine.activations.mode != "full":
        yield "--set 'engine.activations={mode: full}'"
    if not engine.activations.offload:
        yield "--set 'engine.activations={mode: full, offload: true}' (their inputs wait in the host's memory)"
    if not engine.offload_optimizer and config.cluster.gpus_per_worker:
        yield "--set engine.offload_optimizer=true"
    if scattered:
        yield "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the workers' environment"
    yield "more workers (cluster.workers), over which weights and optimiser states are divided"
    yield f"smaller buckets (corpora.{sorted(stage.mixture)[0]}.buckets)"
