"""What a worker notes of its own doing: samples consumed, metrics, time, progress. The recipe calls it and reads on."""

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from domainshuttle.model.objective import LossOutput
from domainshuttle.pipelines.loader import MicroBatch
from domainshuttle.platform.engine import StepResult, learning_rate
from domainshuttle.platform.ledger import Attempt, Ledger
from domainshuttle.platform.metrics import LossMetrics
from domainshuttle.platform.schedule import Run, Segment
from domainshuttle.platform.tracking import MetricLogger, RunIds


class Account:
    """The books of one rank for one attempt at a segment. Only rank 0 keeps the ledger, the tracking and the progress.

    All ranks must call `step` and `stop_requested` together.
    """

    def __init__(self, run: Run, segment: Segment, ids: dict[str, Any], first_step: int, began: float) -> None:
        config = run.config
        self.run, self.segment, self.first_step = run, segment, first_step
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.losses = LossMetrics(sorted(segment.stage.mixture), segment.stage.loss.cross_pair_weight, device)
        self.pair_kinds: Counter[str] = Counter()
        self._consumed = run.consumed_path(segment.name, self.rank).open("a")
        self._flag = torch.zeros(1)
        self._due = config.tracking.every
        self._since = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps = self._skipped = 0
        self.last: dict[str, float] = {}
        self.ledger = Ledger(run.ledger_path)
        self.attempt: Attempt | None = None
        self.logger: MetricLogger | None = None
        if self.main:
            self.attempt = self.ledger.start(self.world_size, segment.name, first_step, began)
            self.logger = MetricLogger(
                RunIds.from_dict(ids, config.tracking_uri),
                segment.name,
                run.spool,
                start_step=first_step or None,
                system_every=15.0,
            )
            self._write_progress(first_step, "training")

    def begin(self) -> None:
        """Notes that the model is built and restored: the time until here was starting."""
        self._add("starting", time.perf_counter() - self._since)
        self._restart_interval()

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Adds the time of a block to a category of the ledger."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(category, time.perf_counter() - began)

    def _add(self, category: str, seconds: float) -> None:
        self._seconds[category] += seconds
        if self.attempt:
            self.attempt.add(category, seconds)

    def waited(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same micro-batches; the time until each is there counts as waiting for data."""
        while True:
            with self.measure("waiting"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def micro_batch(self, micro: MicroBatch, loss: LossOutput) -> None:
        """Notes which samples a forward and backward pass was made of, and their losses."""
        line = {"step": micro.step, "part": micro.part, "first": self.first_step, "samples": micro.keys}
        self._consumed.write(json.dumps(line) + "\n")
        self.losses.add(micro.batch, loss)
        self.pair_kinds.update(micro.pair_kinds)

    def step(self, step: int, result: StepResult) -> None:
        """Notes that optimiser step `step` is done; logs when it is due."""
        self._steps += 1
        self._skipped += result.skipped
        self._consumed.flush()
        if (step + 1) % self._due and step + 1 != self.segment.stage.steps:
            return
        metrics = self.losses.reduce()
        elapsed = time.perf_counter() - self._since
        if not self.main:
            self._restart_interval()
            return
        # what is neither waiting nor writing is the work itself
        self._add("productive", max(0.0, elapsed - self._seconds["waiting"] - self._seconds["checkpointing"]))
        tokens = metrics.pop("tokens")
        samples = metrics.pop("samples")
        self.last = {
            **metrics,
            "grad_norm": result.grad_norm,
            "skipped_steps": float(self._skipped),
            "learning_rate": learning_rate(self.segment.stage, step),
            "samples/s": samples / elapsed,
            "tokens/s/device": tokens / elapsed,
            "step_seconds": elapsed / self._steps,
            "data_wait_fraction": self._seconds["waiting"] / elapsed,
            "checkpoint_stall_seconds": self._seconds["checkpointing"],
            **{f"pairs/{kind}": float(count) for kind, count in self.pair_kinds.items()},
        }
        if self.attempt and self.logger:
            self.attempt.progress(step + 1, every=10.0)
            hours = self.ledger.summary().metrics()
            self.logger.log(step + 1, {**self.last, **hours})
        self._write_progress(step + 1, "training")
        self._restart_interval()

    def _restart_interval(self) -> None:
        self._since = time.perf_counter()
        self._seconds.clear()
        self._steps = 0

    def checkpointed(self, step: int) -> None:
        """Notes that a checkpoint of `step` is whole."""
        if self.attempt:
            self.attempt.progress(step)

    def ledger_snapshot(self) -> dict[str, Any]:
        """The ledger's account, to be kept in the checkpoint."""
        return self.ledger.snapshot() if self.main else {}

    def stop_requested(self) -> bool:
        """Whether somebody asked the run to stop; the same answer on every rank."""
        self._flag.fill_(float(self.main and self.run.stop_path.exists()))
        if dist.get_backend() == "gloo":
            dist.all_reduce(self._flag)
        else:
            flag = self._flag.to("cuda")
            dist.all_reduce(flag)
            self._flag.copy_(flag)
        return bool(self._flag.item())

    def close(self, step: int, reason: str) -> None:
        """Ends the attempt: `reason` is `finished`, `stopped`, or what went wrong."""
        self._consumed.close()
        if self.attempt:
            self.attempt.end(reason)
        if self.logger:
            if reason == "finished":
                self.logger.finish("FINISHED")
            elif reason == "stopped":
                self.logger.finish("KILLED")
            else:
                self.logger.fail(reason)
        if self.main:
            self._write_progress(step, reason)

    def _write_progress(self, step: int, state: str) -> None:
        content = {
            "segment": self.segment.name,
            "step": step,
            "steps": self.segment.stage.steps,
            "first_step": self.first_step,
            "state": state,
            "time": time.time(),
            "metrics": self.last,
        }
        temporary = self.run.progress_path.with_suffix(".partial")
        temporary.write_text(json.dumps(content))
        temporary.rename(self.run.progress_path)


def read_consumed(run: Run, segment: str) -> dict[tuple[int, int, int], list[str]]:
    """The samples of the surviving history: (step, part, rank) to samples, as the last attempt at each trained them.

    A step that was trained again after a restore counts once, as it was done the last time.
    """
    consumed: dict[tuple[int, int, int], list[str]] = {}
    for path in sorted((run.folder / "consumed").glob(f"{segment}.rank*.jsonl")):
        rank = int(path.stem.rsplit("rank", 1)[1])
        lines: Sequence[str] = path.read_text().splitlines()
        for text in lines:
            with contextlib.suppress(ValueError):  # the last line of a killed worker may be torn
                line = json.loads(text)
                consumed[line["step"], line["part"], rank] = line["samples"]
    return consumed
